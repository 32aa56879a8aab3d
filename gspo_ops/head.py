"""The output head that maps hidden states to logits: dtypes, checks, and the choice of a plan."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .backend import compute_dtype, has_bf16, use_triton
from .layout import check_tensor
from .objective import check_number

PlanName = Literal["auto", "keep", "chunk", "recompute"]
Products = Literal["auto", "mm", "triton"]

_KEPT_ALIGN = 64  # elements: rows of kept exponentials start aligned
COLUMNS = 1024  # exponentials are kept for a multiple of so many columns
ROUNDED_AT_ONCE = 1 << 21  # elements of a sum that becomes a gradient in 16 bits
# smaller chunks lose more to adding up dweight than a recomputation of live rows costs
_CHUNK_ROWS = 2048
_CPU_CHUNK_ROWS = 512  # in fp32: a chunk more costs as much as the logits of some 160 live rows
_LEAST_BUDGET = 64 << 20
_LARGEST_BUDGET = 4 << 30


class LoRA(NamedTuple):
    """A low-rank update of the head, which is never merged: weight + scale * b @ a.

    Attributes:
        a: (r, H), with a gradient.
        b: (V, r), with a gradient.
        scale: alpha / r, usually.
    """

    a: Tensor
    b: Tensor
    scale: float


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_x: bool = False
    lora_b: bool = False


def default_memory_budget(rows: int, vocabulary: int) -> int:
    """2.1 bytes per logit; 64 MiB at least, 4 GiB at most.

    Eager PyTorch takes 8 to 14 with fp32 logits.
    """
    return max(_LEAST_BUDGET, min(_LARGEST_BUDGET, rows * vocabulary * 21 // 10))


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the products that make logits: the common 16-bit dtype on a GPU; fp32; or float64."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    if use_triton(hidden) and hidden.dtype == weight.dtype:
        return hidden.dtype
    return torch.float32


def grad_product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of exponentials and of the products that make gradients.

    float16 has not the range of exponentials, and bfloat16 not the precision of float16. On a CPU
    bfloat16 only where it has instructions for it.
    """
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    is_narrow = hidden.dtype == weight.dtype == torch.bfloat16
    if is_narrow and (use_triton(hidden) or has_bf16(hidden.device)):
        return torch.bfloat16
    return torch.float32


class Choice(NamedTuple):
    """A plan: the tokens whose exponentials are kept, for so many rows at a time."""

    name: PlanName
    kept_columns: int
    chunk_rows: int


def choose_plan(
    hidden: Tensor,
    weight: Tensor,
    *,
    plan: PlanName,
    memory_budget: int | None,
    has_gradient: bool,
    can_chunk: bool,
) -> Choice:
    """The plan that spends the fewest FLOPs within the budget."""
    vocabulary = weight.shape[0]
    rows = math.prod(hidden.shape[:-1])
    if not has_gradient or plan == "recompute":
        return Choice("recompute", 0, rows)
    budget = memory_budget
    if budget is None:
        budget = default_memory_budget(rows, vocabulary)
    itemsize = grad_product_dtype(hidden, weight).itemsize
    row_bytes = vocabulary * itemsize
    if plan == "keep" or (plan == "auto" and rows * row_bytes <= budget):
        return Choice("keep", vocabulary, rows)
    chunk_rows = max((budget - sum_bytes(hidden, weight)) // row_bytes, 1)
    least = _CPU_CHUNK_ROWS if hidden.device.type == "cpu" and itemsize > 2 else _CHUNK_ROWS
    if plan == "chunk" or (can_chunk and chunk_rows >= least):
        return Choice("chunk", vocabulary, min(chunk_rows, max(rows, 1)))
    kept = columns_that_fit(budget, rows, vocabulary, itemsize)
    return Choice("keep" if kept else "recompute", kept, rows)


def sum_bytes(hidden: Tensor, weight: Tensor) -> int:
    """Of sums over chunks, beyond those of the gradients that they become."""
    dtype = compute_dtype(product_dtype(hidden, weight))
    return sum(
        x.numel() * (dtype.itemsize - x.element_size()) for x in (hidden, weight) if x.requires_grad
    )


def kept_width(columns: int) -> int:
    """Of a row of kept exponentials: the columns, and padding."""
    return -(-columns // _KEPT_ALIGN) * _KEPT_ALIGN


def columns_that_fit(budget: int, rows: int, vocabulary: int, itemsize: int) -> int:
    """Columns of exponentials of so many rows that fit into the budget."""
    fit = budget // (max(rows, 1) * itemsize)
    return vocabulary if fit >= vocabulary else fit // COLUMNS * COLUMNS


# Checks


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    main_grad: Tensor | None,
) -> None:
    """Refuse operands that the operators can't take, by name."""
    check_operands(hidden, weight)
    check_tensor("targets", targets, hidden.device)
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have shape {tuple(hidden.shape[:-1])}, one per row of hidden, got "
            f"{tuple(targets.shape)}"
        )
    V, H = weight.shape
    if bias is not None:
        _check_operand("bias", bias, hidden.device, (V,))
    if lora is not None:
        check_lora(lora, hidden, weight)
    if main_grad is not None:
        check_tensor("main_grad", main_grad, hidden.device)
        if main_grad.dtype != torch.float32:
            raise TypeError(f"main_grad must be float32, got {main_grad.dtype}")
        if main_grad.shape != (V, H) or not main_grad.is_contiguous():
            raise ValueError(
                f"main_grad must be contiguous with the weight's shape {(V, H)}, got "
                f"{tuple(main_grad.shape)} with strides {main_grad.stride()}"
            )
        if main_grad.requires_grad:
            raise ValueError("main_grad requires grad, but is a buffer that is added to: detach it")
        if not weight.requires_grad:
            raise ValueError("main_grad is given, but weight does not require grad")
        if weight.dtype == torch.float64 or hidden.dtype == torch.float64:
            raise TypeError("main_grad is float32, which would round a float64 gradient")


def check_operands(hidden: Tensor, weight: Tensor) -> None:
    """Refuse hidden states and a weight that do not fit together."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a torch.Tensor, got {type(hidden).__name__}")
    if hidden.ndim not in (2, 3):
        raise ValueError(f"hidden must have shape (B, T, H) or (N, H), got {tuple(hidden.shape)}")
    _check_operand("hidden", hidden, hidden.device, tuple(hidden.shape))
    check_tensor("weight", weight, hidden.device)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}), H like hidden, got "
            f"{tuple(weight.shape)}"
        )
    _check_operand("weight", weight, hidden.device, tuple(weight.shape))
    if weight.numel() == 0:
        raise ValueError(f"weight must have a vocabulary and a size, got {tuple(weight.shape)}")


def check_lora(lora: LoRA, hidden: Tensor, weight: Tensor) -> None:
    """Refuse a low-rank update that does not fit the head."""
    if not isinstance(lora, LoRA):
        raise TypeError(f"lora must be a LoRA(a, b, scale), got {type(lora).__name__}")
    check_tensor("lora.a", lora.a, hidden.device)
    if lora.a.ndim != 2:
        raise ValueError(f"lora.a must have shape (r, H), got {tuple(lora.a.shape)}")
    rank = lora.a.shape[0]
    _check_operand("lora.a", lora.a, hidden.device, (rank, weight.shape[1]))
    _check_operand("lora.b", lora.b, hidden.device, (weight.shape[0], rank))
    check_number("lora.scale", lora.scale, minimum=-math.inf)
    if weight.requires_grad:
        raise ValueError("weight requires grad, but a LoRA head trains a and b only: freeze it")


def _check_operand(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...]) -> None:
    check_tensor(name, x, device)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def check_plan(
    plan: str, memory_budget: int | None, products: str, allow_sync: bool, lora: LoRA | None
) -> None:
    """Refuse what is no plan."""
    for name, value, choices in (("plan", plan, PlanName), ("products", products, Products)):
        if value not in get_args(choices):
            known = ", ".join(repr(choice) for choice in get_args(choices))
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if memory_budget is not None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(
                f"memory_budget must be a number of bytes, an int, got "
                f"{type(memory_budget).__name__}"
            )
        if memory_budget < 0:
            raise ValueError(f"memory_budget must be >= 0 bytes, got {memory_budget}")
    if not isinstance(allow_sync, bool):
        raise TypeError(f"allow_sync must be a bool, got {type(allow_sync).__name__}")
    if products == "triton" and lora is not None:
        raise ValueError("products must be 'mm' or 'auto' with lora: 'triton' has no low-rank part")
