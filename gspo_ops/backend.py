"""One implementation per device, behind opaque operators.

Each operator is declared in `torch.library`: autograd.Functions call it, torch.compile and
FakeTensor see its schema and fake only. It has no derivative of its own, and says so when asked, so
that double backward is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

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


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Keep the caller's autocast out; it belongs to the thread, so nobody else notices."""
    return torch.autocast(device.type, enabled=False)


def rounds_fp32(device: torch.device) -> bool:
    """Whether the process lets products of float32 be rounded there, as to TF32 or bfloat16.

    These settings belong to the process: they are read, and left as they are.
    """
    is_cpu = device.type == "cpu"
    backend = torch.backends.mkldnn if is_cpu else torch.backends.cuda
    # torch >= 2.9
    precision = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if precision is None:
        older = torch.get_float32_matmul_precision()
        precision = {"high": "tf32", "medium": "bf16"}.get(older, "ieee")
    if not is_cpu:
        return precision == "tf32"
    # a CPU rounds where it has instructions for it
    return (precision == "bf16" and has_bf16(device)) or (
        precision == "tf32" and getattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)()
    )


def matmul_fp32(a: Tensor, b: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b, multiplied exactly and added up in fp32 (float64 for float64), whatever is allowed.

    The product goes to `out`, of any dtype, or is added to it.
    """
    dtype = compute_dtype(a.dtype)
    is_rounded = dtype == torch.float32 and rounds_fp32(a.device)
    is_narrow = a.dtype.itemsize == 2
    # on a GPU, sums that end in 16 bits may be made in them
    is_direct = not a.is_cuda if is_narrow else not is_rounded
    if out is not None and out.dtype == a.dtype and is_direct:
        return out.addmm_(a, b, beta=int(add))
    if is_narrow and _has_fp32_products(a):
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        exact = torch.float64 if is_rounded else dtype  # which nobody rounds
        product = torch.mm(a.to(exact), b.to(exact)).to(dtype)
    if out is None:
        return product
    return out.add_(product) if add else out.copy_(product)


def _has_fp32_products(x: Tensor) -> bool:
    """Whether torch multiplies this 16-bit dtype to fp32, and no setting makes the sums coarser."""
    if not x.is_cuda or not hasattr(torch.ops.aten.mm, "dtype"):  # torch >= 2.8
        return False
    return x.dtype == torch.bfloat16 or not getattr(
        torch.backends.cuda.matmul, "allow_fp16_accumulation", False
    )


@operator(
    "exact_matmul(Tensor a, Tensor b) -> Tensor",
    lambda a, b: a.new_empty(a.shape[0], b.shape[1], dtype=compute_dtype(a.dtype)),
)
def exact_matmul(a, b):
    """The same of dtypes that may differ, for autograd.Functions."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    with no_autocast(a.device):
        return matmul_fp32(a.to(dtype), b.to(dtype)).to(compute_dtype(a.dtype))
