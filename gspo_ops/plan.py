"""Plans: what a loss from hidden states keeps in memory, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_bool, check_choice
from .head import (
    PRODUCTS,
    LoRA,
    check_lora,
    check_operands,
    grad_product_dtype,
    product_dtype,
    stats_dtype,
)
from .tiles_gpu import BLOCKS as GPU_BLOCKS
from .tiles_gpu import TRITON_BLOCKS, product_columns
from .tiles_torch import BLOCKS as TORCH_BLOCKS

PlanName = Literal["auto", "keep", "chunk", "recompute"]
PLAN_NAMES = get_args(PlanName)

COLUMNS = 1024  # exponentials are kept for a multiple of this many columns
ROUNDED_AT_ONCE = 1 << 21  # elements of a sum that are rounded to 16 bits at a time
_KEPT_ALIGN = 64  # elements: rows of kept exponentials start at multiples of it
# smaller chunks lose more to adding up dweight than recomputing live rows costs
_CHUNK_ROWS = 2048
_CPU_CHUNK_ROWS = 512  # in fp32: another chunk costs as much as the logits of some 160 live rows
_LEAST_BUDGET = 64 << 20
_LARGEST_BUDGET = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a loss from hidden states is computed, and what that costs. Made by `plan_from_hidden`.

    Attributes:
        name: `"keep"` keeps the exponentials of all logits from forward to backward, or those of
            the first `kept_columns` tokens of the vocabulary. `"chunk"` processes whole sequences
            at a time and computes gradients in the forward. `"recompute"` recomputes the logits in
            the backward.
        rows: N.
        vocabulary: V.
        hidden_size: H.
        rank: rank of the LoRA update, 0 without one.
        kept_columns: number of tokens of the vocabulary whose exponentials are kept.
        chunk_rows: largest number of rows at a time; N except for `"chunk"`.
        grad_hidden: whether dhidden is needed.
        grad_weight: whether dweight is needed.
        kept_bytes: bytes of the exponentials kept from forward to backward, or for a chunk.
        bytes: estimated peak of extra memory, beside the gradients that are returned.
    """

    name: PlanName
    rows: int
    vocabulary: int
    hidden_size: int
    rank: int
    kept_columns: int
    chunk_rows: int
    grad_hidden: bool
    grad_weight: bool
    kept_bytes: int
    bytes: int

    def flops(self, f: float = 1.0) -> float:
        """Floating-point operations of the products if a fraction f of the rows has a gradient."""
        inner = self.hidden_size + self.rank
        backward: float = inner * self.grad_hidden + self.hidden_size * self.grad_weight + self.rank
        if self.grad_hidden or self.grad_weight or self.rank:
            backward += inner * (1 - self.kept_columns / self.vocabulary)
        return 2.0 * self.rows * self.vocabulary * (inner + f * backward)

    def __str__(self) -> str:
        what: str = self.name
        if 0 < self.kept_columns < self.vocabulary:
            what += f" {self.kept_columns / self.vocabulary:.0%} of the exponentials"
        if self.name == "chunk":
            what += f" of up to {self.chunk_rows} rows"
        unit = self.rows * self.vocabulary * self.hidden_size
        live, dead = self.flops(1.0) / max(unit, 1), self.flops(0.0) / max(unit, 1)
        return (
            f"{what}: ({dead:.3g} + {live - dead:.3g} f) N V H FLOPs, {self.bytes / 2**20:.0f} MiB "
            f"beside the gradients (N={self.rows}, V={self.vocabulary}, H={self.hidden_size})"
        )


class Choice(NamedTuple):
    """A plan: the number of tokens whose exponentials are kept, and of rows at a time."""

    name: PlanName
    kept_columns: int
    chunk_rows: int


def check_plan(
    plan: str, memory_budget: int | None, products: str, allow_sync: bool, lora: LoRA | None
) -> None:
    """Refuse invalid options of a plan."""
    check_choice("plan", plan, PLAN_NAMES)
    check_choice("products", products, PRODUCTS)
    if memory_budget is not None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(
                f"memory_budget must be an int, the number of bytes, got "
                f"{type(memory_budget).__name__}"
            )
        if memory_budget < 0:
            raise ValueError(f"memory_budget must be >= 0 bytes, got {memory_budget}")
    check_bool("allow_sync", allow_sync)
    if products == "triton" and lora is not None:
        raise ValueError("products must be 'mm' or 'auto' with lora: 'triton' has no low-rank part")


def choose_plan(
    hidden: Tensor,
    weight: Tensor,
    plan: PlanName,
    memory_budget: int | None,
    *,
    has_gradient: bool,
    can_chunk: bool,
) -> Choice:
    """Return the plan that spends the fewest FLOPs within the budget."""
    vocabulary, rows = weight.shape[0], math.prod(hidden.shape[:-1])
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


def default_memory_budget(rows: int, vocabulary: int) -> int:
    """Return 2.1 bytes per logit, but at least 64 MiB and at most 4 GiB.

    Eager PyTorch takes 8 to 14 bytes with fp32 logits.
    """
    return max(_LEAST_BUDGET, min(_LARGEST_BUDGET, rows * vocabulary * 21 // 10))


def kept_width(columns: int) -> int:
    """Return the width of a row of kept exponentials: the columns and padding."""
    return -(-columns // _KEPT_ALIGN) * _KEPT_ALIGN


def columns_that_fit(budget: int, rows: int, vocabulary: int, itemsize: int) -> int:
    """Return how many columns of exponentials fit into the budget for this many rows."""
    fit = budget // (max(rows, 1) * itemsize)
    return vocabulary if fit >= vocabulary else fit // COLUMNS * COLUMNS


def sum_bytes(hidden: Tensor, weight: Tensor) -> int:
    """Return the bytes of sums over chunks beyond those of the gradients that they become."""
    itemsize = stats_dtype(hidden, weight).itemsize
    return sum(
        x.numel() * (itemsize - x.element_size()) for x in (hidden, weight) if x.requires_grad
    )


def plan_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    *,
    lora: LoRA | None = None,
    plan: PlanName = "auto",
    memory_budget: int | None = None,
    chunks: bool = True,
) -> Plan:
    """The plan that `policy_loss_from_hidden` takes without an entropy bonus, and what it costs.

        FLOPs = (2 + 4 f) N V H if exponentials are kept, (2 + 6 f) N V H if they are recomputed,
                2 f N V H less with a frozen weight, for a fraction f of rows with a gradient

    With an entropy bonus, the loss always takes `"recompute"`.

    Args:
        hidden: (B, T, H) or (N, H).
        weight: (V, H) of the head; frozen if it does not require grad.
        lora: a low-rank update of the head.
        plan: `"auto"`, `"keep"`, `"chunk"` or `"recompute"`.
        memory_budget: bytes for kept exponentials and sums of gradients; by default 2.1 per logit
            (eager PyTorch takes 8 to 14), between 64 MiB and 4 GiB.
        chunks: whether `"auto"` may choose chunks. It may not for `log_probs_from_hidden`, for a
            function as objective, for a vocabulary or sequences sharded over ranks, and for packed
            sequences on a GPU, whose boundaries the host does not know.

    Returns:
        The plan. Print it, or read its `flops(f)` and `bytes`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
    """
    check_operands(hidden, weight)
    check_plan(plan, memory_budget, "auto", False, None)
    if lora is not None:
        check_lora(lora, hidden, weight)
    V, H = weight.shape
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    has_gradient = bool(wanted) or lora is not None
    choice = choose_plan(
        hidden, weight, plan, memory_budget, has_gradient=has_gradient, can_chunk=chunks
    )
    kept = 0
    if choice.kept_columns:
        itemsize = grad_product_dtype(hidden, weight).itemsize
        kept = choice.chunk_rows * kept_width(choice.kept_columns) * itemsize
    forward, backward = _work_bytes(hidden, weight, choice)
    if not has_gradient:
        peak = forward
    elif choice.name == "chunk":
        dtype = stats_dtype(hidden, weight)
        sums = [x.numel() for x in wanted if x.dtype != dtype]
        rounded = (sum(sums) + min(max(sums, default=0), ROUNDED_AT_ONCE)) * dtype.itemsize
        peak = max(kept + sum_bytes(hidden, weight) + max(forward, backward), rounded)
    else:
        peak = kept + max(forward - sum(x.nbytes for x in wanted), backward)
    return Plan(
        name=choice.name,
        rows=math.prod(hidden.shape[:-1]),
        vocabulary=V,
        hidden_size=H,
        rank=0 if lora is None else len(lora.a),
        kept_columns=choice.kept_columns,
        chunk_rows=choice.chunk_rows,
        grad_hidden=hidden.requires_grad,
        grad_weight=weight.requires_grad,
        kept_bytes=kept,
        bytes=peak,
    )


def _work_bytes(hidden: Tensor, weight: Tensor, choice: Choice) -> tuple[int, int]:
    """Return the bytes that forward and backward of a chunk need beside kept and returned ones."""
    V, H = weight.shape
    rows = choice.chunk_rows
    blocks = GPU_BLOCKS if use_triton(hidden) else TORCH_BLOCKS
    dtype, grad_dtype = product_dtype(hidden, weight), grad_product_dtype(hidden, weight)
    size, stats_size = grad_dtype.itemsize, stats_dtype(hidden, weight).itemsize
    tile_rows = min(blocks.rows, rows)
    tile = tile_rows * blocks.width(rows) * stats_size
    if dtype != hidden.dtype or dtype != weight.dtype:
        tile += (tile_rows + blocks.width(rows)) * H * dtype.itemsize  # copies of operands
    if not use_triton(hidden):
        tile *= torch.get_num_threads()  # each thread has its own
    if use_triton(hidden):  # sums of each tile, enough for any kernel
        forward = tile + 2 * TRITON_BLOCKS.entries(V) * rows * stats_size
    else:  # sums of each tile, and what adding them up takes
        forward = tile + 5 * blocks.entries(V) * rows * stats_size
    # scaled hidden states and a sum of dhidden; a tile for the products, if not all is kept
    backward = tile + rows * H * (size + stats_size)
    width = blocks.grad_width(rows)
    if choice.kept_columns < V:
        backward += rows * width * size
    if hidden.requires_grad and weight.dtype != grad_dtype:
        backward += min(width, V) * H * size  # a copy of these columns' weight
    if weight.requires_grad and size < stats_size:
        if use_triton(hidden):
            # a product that is not rounded yet
            backward += min(product_columns(H), V) * H * stats_size
        elif choice.name == "chunk":  # on a CPU, the product and its operands in fp32
            backward += (min(width, V) * (H + rows) + rows * H) * stats_size
    return forward, backward
