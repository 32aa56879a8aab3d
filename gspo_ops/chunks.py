"""The plan that processes a batch from hidden states in chunks of whole sequences.

The gradient with respect to the log-probs of a chunk is known as soon as its log-probs are.
Gradients are therefore computed in the forward, and a chunk's exponentials need not outlive it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .checks import check_cu_seqlens
from .head import Head, HeadGrads, HeadOptions, Wanted, stats_dtype
from .hidden import Grads, NeededRows, empty_kept
from .operators import Changed, flat, graph_is_kept, operator, reader, refuse_graph
from .parallel import gathered
from .passes import backward, forward
from .plan import COLUMNS, ROUNDED_AT_ONCE, kept_width
from .policy import Policy
from .policy_loss import empty_loss, policy_loss_fwd
from .softmax import TargetRows
from .tiles import Kept, slices


class Chunks(NamedTuple):
    """The options for processing a batch in chunks.

    Attributes:
        rows: largest number of rows in a chunk, unless one sequence is longer.
        main_grad: (V, H) buffer to which d loss / d weight is added; None to return it.
    """

    options: HeadOptions
    rows: int
    main_grad: Tensor | None


class SavedChunks(NamedTuple):
    """The record that the backward reads: gradients of loss * D, and their operands."""

    head: Head
    grads: Grads
    inv_denominator: Tensor


_read_saved = reader(SavedChunks)


class ChunkLoss(torch.autograd.Function):
    """Loss, statistics, log-ratio, mean entropy and log-probs of a head and a policy."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, chunks: Chunks, rows: TargetRows, policy: Policy, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        head, wanted = Head(*operands), Wanted(*ctx.needs_input_grad[3:])
        out = loss_in_chunks(head, rows.targets, policy, chunks.rows, chunks.options, wanted)
        ctx.save_for_backward(*flat(SavedChunks(head, out.grads(), out.inv_denominator)))
        ctx.main_grad = chunks.main_grad
        ctx.mark_non_differentiable(out.stats, out.log_ratio, out.entropy, out.log_probs)
        return out.loss, out.stats, out.log_ratio, out.entropy, out.log_probs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        head, grads, inv_denominator = _read_saved(ctx.saved_tensors)
        wanted = Wanted(*ctx.needs_input_grad[3:])
        if ctx.main_grad is not None and wanted.weight:
            refuse_graph()
            add_scaled(ctx.main_grad, grads.weight, grad_loss, inv_denominator)
            wanted = wanted.but_weight()
        return (
            None,
            None,
            None,
            *[
                _scaled(grad, x, grad_loss, inv_denominator) if want else None
                for grad, x, want in zip(grads, head, wanted, strict=True)
            ],
        )


def _scaled(grad: Tensor, like: Tensor, grad_loss: Tensor, inv_denominator: Tensor) -> Tensor:
    """Return grad * grad_loss / D, in place if dtypes match and no other backward can follow."""
    if grad.dtype != like.dtype or graph_is_kept():
        return scaled_like(grad, like, grad_loss, inv_denominator)
    return grad.mul_(grad_loss * inv_denominator)


# Operators


def _contiguous(grad: Tensor, like: Tensor, *_: object) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@operator(_contiguous)
def scaled_like(grad: Tensor, like: Tensor, grad_loss: Tensor, inv_denominator: Tensor) -> Tensor:
    """Return grad * grad_loss / D, in the dtype and shape of `like`, whose values are not read."""
    out = _contiguous(grad, like)
    source, to, scale = grad.view(-1), out.view(-1), grad_loss * inv_denominator
    for part in slices(len(to), ROUNDED_AT_ONCE):  # a scaled copy of the whole would double memory
        to[part] = source[part] * scale
    return out


@operator(lambda *_: None)
def add_scaled(out: Changed, grad: Tensor, grad_loss: Tensor, inv_denominator: Tensor) -> None:
    """Add grad * grad_loss / D to `out`."""
    out.addcmul_(grad, grad_loss * inv_denominator)


class LossInChunks(NamedTuple):
    """The loss of a policy and a head, and the gradients of loss * D in the dtype of sums."""

    loss: Tensor
    stats: Tensor
    log_ratio: Tensor
    entropy: Tensor  # 0-dim, the mean
    log_probs: Tensor  # (N,)
    inv_denominator: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def grads(self) -> Grads:
        return Grads(self.hidden, self.weight, self.bias, self.lora_a, self.lora_b)


def _chunks_fake(
    head: Head, targets: Tensor, policy: Policy, chunk_rows: int, options: object, wanted: Wanted
) -> LossInChunks:
    of_policy = empty_loss(None, None, policy)
    grads = Grads.empty(head, wanted, stats_dtype(head.hidden, head.weight))
    return LossInChunks(
        of_policy.loss,
        of_policy.stats,
        of_policy.log_ratio,
        torch.empty_like(of_policy.loss),
        torch.empty_like(of_policy.g),
        of_policy.inv_denominator,
        *grads,
    )


@operator(_chunks_fake)
def loss_in_chunks(
    head: Head,
    targets: Tensor,
    policy: Policy,
    chunk_rows: int,
    options: HeadOptions,
    wanted: Wanted,
) -> LossInChunks:
    """Compute the loss, and gradients summed over chunks."""
    needed = NeededRows.of(policy, options)
    targets = targets.reshape(-1)
    grads = Grads.empty(head, wanted, stats_dtype(head.hidden, head.weight))
    if policy.sequences.batch == 0:
        for x in grads[1:]:
            x.zero_()
    log_probs = grads.hidden.new_zeros(policy.sequences.rows)
    entropy = grads.hidden.new_zeros(())
    chunk_rows = _same_on_all_ranks(chunk_rows, targets, options)
    vocabulary = head.weight.shape[0]
    buffer = empty_kept(head, min(chunk_rows, max(policy.sequences.rows, 1)), vocabulary)
    for i, (sequences, rows) in enumerate(_chunks(policy, chunk_rows)):
        part = _rows_of(head, rows)
        mask, grad_mask = (None if x is None else x[rows] for x in (needed.mask, needed.grad_mask))
        of_part = TargetRows(targets[rows], mask)
        kept = _kept_in(buffer, rows.stop - rows.start, vocabulary)
        log_probs[rows], sums = forward(part, of_part, grad_mask, options, kept)
        read = log_probs[rows] if needed.log_probs_are_read else None
        g = policy_loss_fwd(read, None, policy.part(sequences, rows)).g
        backward(
            part,
            of_part,
            sums,
            g,
            None,
            options,
            kept,
            _rows_of(grads.where(wanted), rows),
            add=Wanted(weight=i > 0, bias=i > 0, lora_a=i > 0, lora_b=i > 0),
        )
        entropy += sums.entropy.sum()
    whole = policy_loss_fwd(log_probs if needed.log_probs_are_read else None, None, policy)
    return LossInChunks(
        whole.loss,
        whole.stats,
        whole.log_ratio,
        entropy / policy.sequences.tokens(),
        log_probs,
        whole.inv_denominator,
        *grads,
    )


def _same_on_all_ranks(chunk_rows: int, targets: Tensor, options: HeadOptions) -> int:
    """Return the smallest chunk_rows of all ranks, which exchange numbers in every chunk."""
    if (group := options.softmax.vocab_group) is None:
        return chunk_rows
    return int(gathered(targets.new_full((), chunk_rows, dtype=torch.int64), group).min())


T = TypeVar("T", Head, HeadGrads)


def _rows_of(head: T, rows: slice) -> T:
    """Return the operands, or the buffers for their gradients, restricted to some rows."""
    if head.hidden is None:
        return head
    return head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1])[rows])


def _chunks(policy: Policy, chunk_rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield the sequences and rows of each chunk: as many sequences as fit, at least one."""
    count, batch, cu_seqlens, _ = policy.sequences
    if cu_seqlens is None:
        T = count // max(batch, 1)
        borders = [b * T for b in range(batch + 1)]
    else:
        borders = cu_seqlens.tolist()
        check_cu_seqlens(borders, count)
    first = 0
    for b, (_, stop) in enumerate(pairwise(borders), start=1):
        is_last = b == batch
        if is_last or borders[b + 1] - borders[first] > chunk_rows:
            yield slice(first, b), slice(borders[first], stop)
            first = b


def _kept_in(buffer: Tensor, rows: int, vocabulary: int) -> Kept:
    """Return room for a chunk's exponentials: all columns, or those that fit if it is long."""
    if rows <= len(buffer):
        return Kept(buffer[:rows], vocabulary)
    columns = buffer.numel() // rows // COLUMNS * COLUMNS
    while columns and rows * kept_width(columns) > buffer.numel():
        columns -= COLUMNS
    width = kept_width(columns)
    e = buffer.view(-1)[: rows * width].view(rows, width) if columns else buffer[:0]
    return Kept(e, columns)
