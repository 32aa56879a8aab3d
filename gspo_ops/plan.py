"""What a loss from hidden states costs, by plan."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import compute_dtype, use_triton
from .head import (
    ROUNDED_AT_ONCE,
    Choice,
    LoRA,
    PlanName,
    check_lora,
    check_operands,
    check_plan,
    choose_plan,
    grad_product_dtype,
    kept_width,
    product_dtype,
    sum_bytes,
)
from .logit_tiles import MatMulTiles, TorchTiles


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a loss from hidden states is computed, and what that costs. Made by `plan_from_hidden`.

    Attributes:
        name: `"keep"` the exponentials of all logits from forward to backward, or those of the
            first `kept_columns` tokens of the vocabulary; `"chunk"`: whole sequences at a time,
            gradients made in the forward; `"recompute"` the logits in the backward.
        rows: N.
        vocabulary: V.
        hidden_size: H.
        rank: of the LoRA update, 0 without.
        kept_columns: tokens of the vocabulary whose exponentials are kept.
        chunk_rows: largest number of rows at a time, N but for `"chunk"`.
        grad_hidden: dhidden is wanted.
        grad_weight: dweight is wanted.
        kept_bytes: exponentials kept from forward to backward, or for a chunk.
        bytes: estimated peak of extra memory beside the gradients that are returned.
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
        """Floating-point operations of the products, a fraction f of the rows having a gradient."""
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


def plan_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    *,
    lora: LoRA | None = None,
    plan: PlanName = "auto",
    memory_budget: int | None = None,
    chunks: bool = True,
) -> Plan:
    """The plan that `policy_loss_from_hidden` takes, and what it costs.

        FLOPs = (2 + 4 f) N V H when exponentials are kept, (2 + 6 f) N V H when recomputed,
                2 f N V H less for a frozen weight, for a fraction f of rows with a gradient

    Args:
        hidden: (B, T, H) or (N, H).
        weight: (V, H) of the head; frozen if it does not require grad.
        lora: a low-rank update of the head.
        plan: `"auto"`, `"keep"`, `"chunk"` or `"recompute"`.
        memory_budget: bytes for exponentials and sums of gradients that are kept; by default 2.1
            per logit, where eager PyTorch takes 8 to 14, between 64 MiB and 4 GiB.
        chunks: whether `"auto"` may choose chunks: False for `log_probs_from_hidden`, for a
            vocabulary or sequences over ranks, and on a GPU for packed sequences, whose borders the
            host does not know.

    Returns:
        The plan; `print` it, or ask for its `flops(f)` and `bytes`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    check_operands(hidden, weight)
    check_plan(plan, memory_budget, "auto", False, None)
    if lora is not None:
        check_lora(lora, hidden, weight)
    V, H = weight.shape
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    has_gradient = bool(wanted) or lora is not None
    choice = choose_plan(
        hidden, weight, plan=plan, memory_budget=memory_budget, has_gradient=has_gradient,
        can_chunk=chunks,
    )  # fmt: skip
    kept = 0
    if choice.kept_columns:
        itemsize = grad_product_dtype(hidden, weight).itemsize
        kept = choice.chunk_rows * kept_width(choice.kept_columns) * itemsize
    forward, backward = _work_bytes(hidden, weight, choice)
    if not has_gradient:
        peak = forward
    elif choice.name == "chunk":
        dtype = compute_dtype(product_dtype(hidden, weight))
        sums = [x.numel() for x in wanted if x.dtype != dtype]
        rounded = (sum(sums) + min(max(sums, default=0), ROUNDED_AT_ONCE)) * dtype.itemsize
        peak = max(kept + sum_bytes(hidden, weight) + max(forward, backward), rounded)
    else:
        peak = kept + max(forward - sum(x.nbytes for x in wanted), backward)
    return Plan(
        name=choice.name, rows=math.prod(hidden.shape[:-1]), vocabulary=V, hidden_size=H,
        rank=0 if lora is None else len(lora.a),
        kept_columns=choice.kept_columns, chunk_rows=choice.chunk_rows,
        grad_hidden=hidden.requires_grad, grad_weight=weight.requires_grad,
        kept_bytes=kept, bytes=peak,
    )  # fmt: skip


def _work_bytes(hidden: Tensor, weight: Tensor, choice: Choice) -> tuple[int, int]:
    """What the forward and the backward of a chunk need besides what they keep and return."""
    V, H = weight.shape
    rows = choice.chunk_rows
    tiles = MatMulTiles if use_triton(hidden) else TorchTiles
    dtype, grad_dtype = product_dtype(hidden, weight), grad_product_dtype(hidden, weight)
    size, stats_size = grad_dtype.itemsize, compute_dtype(dtype).itemsize
    tile_rows = min(tiles.ROWS, rows)
    tile = tile_rows * tiles.COLUMNS * stats_size
    if dtype != hidden.dtype or dtype != weight.dtype:
        tile += (tile_rows + tiles.COLUMNS) * H * dtype.itemsize  # copies of operands
    if not use_triton(hidden):
        tile *= torch.get_num_threads()  # each has its own
    # sums of each tile, and what it takes to add them up
    forward = tile + 5 * -(-V // tiles.SUMS) * rows * stats_size
    # scaled hidden states and a sum of dhidden; a tile for the products, if not all is kept
    backward = tile + rows * H * (size + stats_size)
    width = tiles.grad_width(rows)
    if choice.kept_columns < V:
        backward += rows * width * size
    if hidden.requires_grad and weight.dtype != grad_dtype:
        backward += min(width, V) * H * size  # a copy of these columns' weight
    if weight.requires_grad and size < stats_size:
        columns = min(width, V)
        if use_triton(hidden):
            backward += columns * H * stats_size  # a product that is not rounded yet
        elif choice.name == "chunk":  # and, on a CPU, what it is made of in fp32
            backward += (columns * (H + rows) + rows * H) * stats_size
    return forward, backward
