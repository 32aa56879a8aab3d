"""One implementation per device, behind opaque operators.

Each operator is declared in `torch.library`: autograd.Functions call it, torch.compile and
FakeTensor see its schema and fake only. It has no derivative of its own, and says so when asked, so
that double backward is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("gspo_ops", "DEF")


def use_triton(x: Tensor) -> bool:
    """Triton for GPU tensors, and for CPU tensors in its interpreter; float64 is left to torch."""
    return x.dtype != torch.float64 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything per row: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# asked once: torch.compile can't trace the question
CPU_HAS_BF16: bool = (
    torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def has_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 are fast there: a CPU without instructions for them takes 50
    times as long as for float32."""
    if device.type == "cpu":
        return CPU_HAS_BF16
    return torch.cuda.is_bf16_supported(including_emulation=False)


def device_guard(x: Tensor) -> contextlib.AbstractContextManager:
    """Make launches go to the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Declare `gspo_ops::<schema>`; decorates its implementation and returns the callable op.

    For a float that changes from call to call, torch.compile would compile every value anew, as
    long as the float itself goes into an operator. One that takes floats therefore has an overload,
    `variable`, that takes them as tensors on the CPU.
    """

    def register(implementation: Callable) -> Callable:
        op = _declare(schema, implementation, fake)
        floats = [i for i, x in enumerate(op._schema.arguments) if "float" in str(x.type)]
        if not floats:
            return op

        def of_variables(*arguments):
            return implementation(*_mapped(torch.Tensor.item, arguments, floats))

        name, arguments = schema.replace("float", "Tensor").split("(", 1)
        variable = _declare(f"{name}.variable({arguments}", of_variables, fake)

        def call(*arguments):
            if torch.compiler.is_compiling() and any(_is_variable(arguments[i]) for i in floats):
                return variable(*_mapped(scalar, arguments, floats))
            return op(*arguments)

        return call

    return register


def _declare(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspo_ops::{name}", fake, lib=LIBRARY)
    if "(a!)" not in schema:  # one that changes its arguments can't have it: `refuse_graph`
        # without it the operator would pass for a constant, with a warning at most
        torch.library.register_autograd(f"gspo_ops::{name}", _refuse_derivative, lib=LIBRARY)
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.gspo_ops, name), overload or "default")


def _mapped(f: Callable, arguments: tuple, places: list[int]) -> list:
    """The arguments, with f(x) for those in these places, unless it is None."""
    return [f(x) if i in places and x is not None else x for i, x in enumerate(arguments)]


def _is_variable(x: float | None) -> bool:
    """Whether torch.compile traces this number for all its values."""
    from torch.fx.experimental import symbolic_shapes

    # an older torch can't tell: each value is compiled
    has_static_value = getattr(symbolic_shapes, "has_static_value", None)
    return x is not None and has_static_value is not None and not has_static_value(x)


def scalar(
    x: float, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> Tensor:
    """x as a 0-dim tensor, which stays a variable in torch.compile: torch.full would not."""
    return torch.ones((), dtype=dtype, device=device) * x


def _refuse_derivative(ctx: object, *grads: Tensor) -> None:
    raise NotImplementedError("gspo_ops has no second derivatives: double backward is impossible")


def refuse_graph() -> None:
    """Refuse a backward under create_graph=True, where an operator can't do it by itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _refuse_derivative(None)


def graph_is_kept() -> bool:
    """Whether the backward that runs may run again, so that what it has saved must not change."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return query is None or query()


@contextlib.contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Products in the dtype of their operands, added up in fp32, whatever the caller allows.

    No TF32, no partial sums in bfloat16, no autocast.
    """
    cuda = torch.backends.cuda.matmul
    settings: list[tuple[Any, str, Any]] = [(cuda, "allow_bf16_reduced_precision_reduction", False)]
    if hasattr(cuda, "fp32_precision"):  # torch >= 2.9
        backends: tuple[Any, ...] = cuda, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        settings += [(backend, "fp32_precision", "ieee") for backend in backends]
        older = None
    else:
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    before = [getattr(where, name) for where, name, _ in settings]
    for where, name, value in settings:
        setattr(where, name, value)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (where, name, _), value in zip(settings, before, strict=True):
            setattr(where, name, value)
        if older is not None:
            torch.set_float32_matmul_precision(older)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch >= 2.8
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
