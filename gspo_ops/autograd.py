"""The seam between public functions and operators: the interface of a source of log-probs, and the
autograd.Functions that work with any source.

    source.forward(rows, policy, *operands) -> log_probs, saved
    policy_loss_fwd(log_probs, entropy, policy) -> loss, stats, g, h
    source.backward(saved, g, h) -> gradients of the operands
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .policy import Policy
from .policy_loss import policy_loss_bwd, policy_loss_fwd, token_mean
from .softmax import TargetRows, Upstream


class Forward(NamedTuple):
    """The result of a source's forward.

    Attributes:
        log_probs: (N,); None if the policy does not read them.
        entropy: (N,) in nats; (0,) unless requested.
        saved: a flat record of tensors for the backward.
    """

    log_probs: Tensor | None
    entropy: Tensor
    saved: tuple[Tensor | None, ...]


class Source(Protocol):
    """A source of log-probs. It holds options; operands with gradients are passed as arguments."""

    def returns_entropy(self) -> bool: ...

    def forward(self, rows: TargetRows, policy: Policy | None, *operands: Any) -> Forward:
        """Compute the log-probs that a policy needs, or those of all rows without one."""

    def backward(
        self, saved: tuple[Any, ...], upstream: Upstream, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return a gradient for each operand, None if it is not needed."""


class GivenLogProbs:
    """The source whose one operand is the log-probs themselves."""

    def returns_entropy(self) -> bool:
        return False

    def forward(self, rows: TargetRows, policy: Policy | None, *operands: Any) -> Forward:
        (log_probs,) = operands
        return Forward(log_probs, log_probs.new_empty(0), operands)

    def backward(
        self, saved: tuple[Any, ...], upstream: Upstream, wanted: tuple[bool, ...]
    ) -> tuple[Tensor]:
        (log_probs,) = saved
        scale = upstream.scale()
        assert scale is not None
        return (policy_loss_bwd(log_probs, upstream.log_probs, scale),)


class LogProbs(torch.autograd.Function):
    """Log-probs and entropies of a source; entropies may be constants, without a gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, source: Source, rows: TargetRows, entropy_flows: bool, *operands: Any
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropy, saved = source.forward(rows, None, *operands)
        assert log_probs is not None
        ctx.save_for_backward(*saved)
        ctx.source, ctx.entropy_flows = source, entropy_flows
        shape = rows.targets.shape
        if not entropy_flows:
            ctx.mark_non_differentiable(entropy)
            return log_probs.view(shape), entropy
        return log_probs.view(shape), entropy.view(shape)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        source: Source = ctx.source
        upstream = Upstream(grad_log_probs, grad_entropy if ctx.entropy_flows else None)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *source.backward(ctx.saved_tensors, upstream, wanted)


class SourceLoss(torch.autograd.Function):
    """Loss, statistics, log-ratio, mean entropy and log-probs of a source and a policy."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, source: Source, rows: TargetRows, policy: Policy, *operands: Any
    ) -> tuple[Tensor, ...]:
        log_probs, entropy, saved = source.forward(rows, policy, *operands)
        has_bonus = policy.objective.entropy_coef > 0
        out = policy_loss_fwd(log_probs, entropy if has_bonus else None, policy)
        if source.returns_entropy():
            entropy = token_mean(entropy, policy.sequences, policy.context_group)
        ctx.save_for_backward(*saved, out.g, out.h, out.inv_denominator)
        ctx.source, ctx.has_bonus = source, has_bonus
        if log_probs is None or not policy.returns_log_probs:
            log_probs = out.g.new_empty(0)
        ctx.mark_non_differentiable(out.stats, out.log_ratio, entropy, log_probs)
        return out.loss, out.stats, out.log_ratio, entropy, log_probs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *saved, g, h, inv_denominator = ctx.saved_tensors
        source: Source = ctx.source
        of_entropy = h * (grad_loss * inv_denominator) if ctx.has_bonus else None
        upstream = Upstream(g, of_entropy, grad_loss, inv_denominator)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *source.backward(tuple(saved), upstream, wanted)
