"""Log-probs from hidden states and the output head, without N x V logits: the source.

Logits exist one tile at a time, in fp32; `tiles.py` defines the tiles. For each row, the forward
keeps the target's logit, a `shift` (0 except for very unlikely targets), and the sum of the other
tokens' exponentials relative to both. The ranks of a sharded vocabulary exchange the same numbers.
For each logit, the forward may keep its exponential. The backward is then two products: dhidden =
diag(s) P weight and dweight = P^T diag(s) hidden, with a factor s per row that only the backward
knows. The derivation is in `kernels/hidden.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import Forward
from .head import Head, HeadGrads, HeadOptions, Wanted, grad_product_dtype, stats_dtype
from .operators import Changed, flat, operator, reader, refuse_graph
from .parallel import Vocabulary
from .passes import backward, forward
from .plan import Choice, kept_width
from .policy import Policy
from .softmax import TargetRows, Upstream
from .tiles import Kept, RowSums


def vocabulary_of_head(head: Head, options: HeadOptions, choice: Choice) -> Vocabulary:
    """Return the vocabulary, with the facts that must be the same on all of its ranks."""

    group, returns_entropy = options.softmax.vocab_group, int(options.softmax.return_entropy)
    columns, checks_range = head.weight.shape[0], options.products == "torch"
    if group is None:
        return Vocabulary.of(None, columns, checks_range, {"return_entropy": returns_entropy})

    def wants_grad(x: Tensor | None) -> int:
        return int(torch.is_grad_enabled() and x is not None and x.requires_grad)

    return Vocabulary.of(
        group,
        columns,
        checks_range,
        {
            "the number of rows of hidden": math.prod(head.hidden.shape[:-1]),
            "the last dimension of hidden": head.hidden.shape[-1],
            "the rank of lora": 0 if head.lora_b is None else head.lora_b.shape[1],
            "the precision of log-probs, in bytes,": stats_dtype(head.hidden, head.weight).itemsize,
            "return_entropy": returns_entropy,
            "products": ("torch", "mm", "triton", "auto").index(options.products),
            "allow_sync": int(options.allow_sync),
            "whether plan is 'chunk'": int(choice.name == "chunk"),
            "whether hidden requires grad": wants_grad(head.hidden),
            "whether lora.a requires grad": wants_grad(head.lora_a),
        },
    )


class SavedHidden(NamedTuple):
    """The record that the backward reads."""

    head: Head
    rows: TargetRows
    sums: RowSums
    kept: Tensor  # exponentials


_read_saved = reader(SavedHidden)


class HiddenSource(NamedTuple):
    """Log-probs from the operands of `Head`.

    Attributes:
        main_grad: (V, H) buffer to which d loss / d weight is added; None to return it.
    """

    options: HeadOptions
    main_grad: Tensor | None

    def returns_entropy(self) -> bool:
        return self.options.softmax.return_entropy

    def forward(self, rows: TargetRows, policy: Policy | None, *operands: Any) -> Forward:
        head, needed = Head(*operands), NeededRows(rows.mask, None, True)
        if policy is not None:
            needed = NeededRows.of(policy, self.options)
        rows = TargetRows(rows.targets, needed.mask)
        log_probs, *stats, kept = hidden_fwd(head, rows, needed.grad_mask, self.options)
        saved = SavedHidden(head, rows, RowSums(*stats), kept)
        read = log_probs if needed.log_probs_are_read else None
        return Forward(read, saved.sums.entropy, tuple(flat(saved)))

    def backward(
        self, saved: tuple[Any, ...], upstream: Upstream, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        given = _read_saved(saved), upstream, self.options
        want = Wanted(*wanted)
        if self.main_grad is None or not want.weight:
            grads = hidden_bwd(*given, want)
        else:
            refuse_graph()
            want = want.but_weight()
            grads = hidden_bwd_into(self.main_grad, *given, want)
        return grads.where(want)


class NeededRows(NamedTuple):
    """The rows that a policy needs: (N,) each, non-zero for these rows, or None for all.

    Attributes:
        mask: rows whose logits are computed.
        grad_mask: rows that may have a gradient.
        log_probs_are_read: False if on-policy, where rows without an advantage are left out.
    """

    mask: Tensor | None
    grad_mask: Tensor | None
    log_probs_are_read: bool

    @classmethod
    def of(cls, policy: Policy, options: HeadOptions) -> NeededRows:
        grad_mask = policy.rows_with_gradient()
        if policy.reads_log_probs() or options.softmax.return_entropy:
            return cls(policy.sequences.mask, grad_mask, True)
        return cls(grad_mask, grad_mask, False)


# Operators


class HiddenStats(NamedTuple):
    """The results of the forward: log-probs and `RowSums`, (N,) each, and the exponentials."""

    log_probs: Tensor
    base: Tensor
    target_logit: Tensor
    shift: Tensor
    row_sum: Tensor
    entropy: Tensor  # (0,) unless requested
    kept: Tensor  # (N, columns or more)


class Grads(NamedTuple):
    """A contiguous gradient for each operand that needs one, an empty tensor for the others."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def empty(cls, head: Head, wanted: Wanted, dtype: torch.dtype | None = None) -> Grads:
        """Return empty buffers in the dtype of each operand, or all in one dtype."""

        def like(x: Tensor | None, want: bool) -> Tensor:
            if not want or x is None:
                return head.hidden.new_empty(0, dtype=dtype)
            return torch.empty_like(x, memory_format=torch.contiguous_format, dtype=dtype)

        return cls(*map(like, head, wanted))

    def where(self, wanted: Wanted) -> HeadGrads:
        """Return the gradients that are needed."""
        return HeadGrads(*[x if want else None for x, want in zip(self, wanted, strict=True)])


def empty_kept(head: Head, rows: int, kept_columns: int) -> Tensor:
    """Return a buffer for the exponentials of these rows and columns; empty without columns."""
    dtype = grad_product_dtype(head.hidden, head.weight)
    rows = rows if kept_columns else 0
    return head.hidden.new_empty(rows, kept_width(kept_columns), dtype=dtype)


def _fwd_fake(
    head: Head, rows: TargetRows, grad_mask: Tensor | None, options: HeadOptions
) -> HiddenStats:
    n = rows.targets.numel()
    x = rows.targets.new_empty(n, dtype=stats_dtype(head.hidden, head.weight))
    entropy = torch.empty_like(x) if options.softmax.return_entropy else x.new_empty(0)
    log_probs, base, target_logit, shift, row_sum = (torch.empty_like(x) for _ in range(5))
    kept = empty_kept(head, n, options.kept_columns)
    return HiddenStats(log_probs, base, target_logit, shift, row_sum, entropy, kept)


@operator(_fwd_fake)
def hidden_fwd(
    head: Head, rows: TargetRows, grad_mask: Tensor | None, options: HeadOptions
) -> HiddenStats:
    """Compute HiddenStats where the mask is non-zero, and exponentials where grad_mask is, too."""
    kept = empty_kept(head, rows.targets.numel(), options.kept_columns)
    log_probs, sums = forward(head, rows, grad_mask, options, Kept(kept, options.kept_columns))
    return HiddenStats(log_probs, *sums, kept)


@operator(lambda saved, upstream, options, wanted: Grads.empty(saved.head, wanted))
def hidden_bwd(
    saved: SavedHidden, upstream: Upstream, options: HeadOptions, wanted: Wanted
) -> Grads:
    """Compute the gradients of the operands."""
    grads = Grads.empty(saved.head, wanted)
    _backward(saved, upstream, options, grads.where(wanted), add=Wanted())
    return grads


@operator(lambda main_grad, saved, upstream, options, wanted: Grads.empty(saved.head, wanted))
def hidden_bwd_into(
    main_grad: Changed,
    saved: SavedHidden,
    upstream: Upstream,
    options: HeadOptions,
    wanted: Wanted,
) -> Grads:
    """Compute the gradients in `wanted`, and add d loss / d weight to main_grad."""
    grads = Grads.empty(saved.head, wanted)
    out = grads.where(wanted)._replace(weight=main_grad)
    _backward(saved, upstream, options, out, add=Wanted(weight=True))
    return grads


def _backward(
    saved: SavedHidden, upstream: Upstream, options: HeadOptions, out: HeadGrads, add: Wanted
) -> None:
    head, rows, sums, kept = saved
    dtype = sums.row_sum.dtype
    g, h, scale = upstream.log_probs.reshape(-1).to(dtype), upstream.entropy, upstream.scale()
    if scale is not None:
        g = g * scale
    if h is not None:
        h = h.reshape(-1).to(dtype)
    backward(head, rows, sums, g, h, options, Kept(kept, options.kept_columns), out, add=add)
