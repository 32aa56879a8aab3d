"""The output head that maps hidden states to logits: operands, options, dtypes and checks."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .backend import compute_dtype, has_bf16, has_tma, use_triton
from .checks import check_float, check_number, check_targets, check_tensor
from .parallel import ProcessGroup, replicated, vocab_part
from .softmax import Softmax

Products = Literal["auto", "mm", "triton"]
PRODUCTS = get_args(Products)
PRODUCTS_TABLE = Path(__file__).with_name("products.json")  # faster products, by device and dtype


class LoRA(NamedTuple):
    """A low-rank update of the head, weight + scale * b @ a, which is never merged.

    Attributes:
        a: (r, H), with a gradient.
        b: (V, r), with a gradient.
        scale: usually alpha / r.
    """

    a: Tensor
    b: Tensor
    scale: float


class Head(NamedTuple):
    """The operands of logits.

    logits = hidden @ weight^T + bias + lora_scale * (hidden @ lora_a^T) @ lora_b^T
    """

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_a: Tensor | None  # (r, H)
    lora_b: Tensor | None  # (V, r)

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: LoRA | None) -> Head:
        if lora is None:
            return cls(hidden, weight, bias, None, None)
        return cls(hidden, weight, bias, lora.a, lora.b)

    def has_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self)


class HeadGrads(NamedTuple):
    """Buffers for the gradients of the operands; None for one that is not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


class Wanted(NamedTuple):
    """Flags for the gradients that are needed."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    lora_a: bool = False
    lora_b: bool = False

    def but_weight(self) -> Wanted:
        return Wanted(self.hidden, False, self.bias, self.lora_a, self.lora_b)


class HeadOptions(NamedTuple):
    """The options for computing log-probs from the operands.

    Attributes:
        products: how products are computed: `"torch"`, `"mm"` or `"triton"`; in an operator also
            `"tma"`, the Triton products of kernels for GPUs with TMA.
        allow_sync: whether the host may look at which rows are live.
        lora_scale: factor of the low-rank part.
        kept_columns: number of tokens whose exponentials are kept from forward to backward.
    """

    softmax: Softmax
    products: str
    allow_sync: bool
    lora_scale: float
    kept_columns: int


def resolve_products(products: Products, head: Head) -> str:
    """Return how products are computed, as far as that is known without querying the device."""
    if not use_triton(head.hidden) or product_dtype(head.hidden, head.weight) == torch.float64:
        return "torch"
    # Triton's products have no low-rank part
    return "mm" if products == "auto" and head.lora_b is not None else products


def on_device(options: HeadOptions, head: Head) -> HeadOptions:
    """Return the options with the products of this device, which a traced graph cannot query."""
    products, hidden = options.products, head.hidden
    if products == "auto":
        products = faster_products(hidden.device, hidden.dtype)
    is_bf16 = hidden.dtype == head.weight.dtype == torch.bfloat16
    # rows have to start at multiples of 16 bytes
    has_boxes = is_bf16 and hidden.shape[-1] % 8 == 0
    is_capped = options.softmax.softcap is not None
    if products == "triton" and has_boxes and has_tma(hidden.device, is_capped):
        products = "tma"
    return options._replace(products=products)


def faster_products(device: torch.device, dtype: torch.dtype) -> Products:
    """Return the products that `make gpu` has found to be faster with half of the rows live.

    Without a measurement, return `"triton"`, which skips the other rows.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return _measured_products().get(name, {}).get(str(dtype)[6:], "triton")


@cache
def _measured_products() -> dict[str, dict[str, Products]]:
    table: dict[str, dict[str, Products]] = json.loads(PRODUCTS_TABLE.read_text())
    return table


# Dtypes


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the products that make logits: 16-bit on a GPU, fp32, or float64."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    if use_triton(hidden) and hidden.dtype == weight.dtype:
        return hidden.dtype
    return torch.float32


def stats_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of all per-row values."""
    return compute_dtype(product_dtype(hidden, weight))


def grad_product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of exponentials and of the products that make gradients.

    float16 lacks the range for exponentials, and bfloat16 lacks the precision of float16. A CPU
    uses bfloat16 only if it has instructions for it.
    """
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    is_narrow = hidden.dtype == weight.dtype == torch.bfloat16
    if is_narrow and (use_triton(hidden) or has_bf16(hidden.device)):
        return torch.bfloat16
    return torch.float32


# Operands


def local_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | None, LoRA | None]:
    """Return this rank's shards of the operands."""
    weight = vocab_part("weight", weight, 0, group)
    if bias is not None:
        bias = vocab_part("bias", bias, 0, group)
    if isinstance(lora, LoRA):
        a, b, scale = lora
        lora = LoRA(replicated("lora.a", a), vocab_part("lora.b", b, 0, group), scale)
    return replicated("hidden", hidden), weight, bias, lora


# Checks


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    main_grad: Tensor | None,
) -> None:
    """Refuse operands that the operators do not support; the error names the argument."""
    check_operands(hidden, weight)
    check_targets(targets, "hidden", hidden)
    if bias is not None:
        _check_operand("bias", bias, hidden.device, (weight.shape[0],))
    if lora is not None:
        check_lora(lora, hidden, weight)
    if main_grad is not None:
        _check_main_grad(main_grad, hidden, weight)


def check_operands(hidden: Tensor, weight: Tensor) -> None:
    """Refuse hidden states and a weight that do not match."""
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
        raise ValueError(f"weight must not be empty, got {tuple(weight.shape)}")


def check_lora(lora: LoRA, hidden: Tensor, weight: Tensor) -> None:
    """Refuse a low-rank update that does not match the head."""
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


def _check_main_grad(main_grad: Tensor, hidden: Tensor, weight: Tensor) -> None:
    check_tensor("main_grad", main_grad, hidden.device)
    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad must be float32, got {main_grad.dtype}")
    if main_grad.shape != weight.shape or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad must be contiguous with the weight's shape {tuple(weight.shape)}, got "
            f"{tuple(main_grad.shape)} with strides {main_grad.stride()}"
        )
    if main_grad.requires_grad:
        raise ValueError("main_grad requires grad, but is only a buffer for gradients: detach it")
    if not weight.requires_grad:
        raise ValueError("main_grad is given, but weight does not require grad")
    if weight.dtype == torch.float64 or hidden.dtype == torch.float64:
        raise TypeError("main_grad is float32, which would round a float64 gradient")


def _check_operand(name: str, x: Tensor, device: torch.device, shape: tuple[int, ...]) -> None:
    check_tensor(name, x, device)
    check_float(name, x)
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
