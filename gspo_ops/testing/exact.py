"""Losses of cases in float64, by the definitions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import reference
from .cases import Case


class ExactLoss(NamedTuple):
    """A loss with its statistics, and gradients of the loss times a factor."""

    loss: Tensor
    stats: dict[str, Tensor]
    g: Tensor  # with respect to log-probs
    h: Tensor | None  # with respect to entropies, with an entropy bonus
    dlogits: Tensor


def exact_loss(case: Case, old_log_probs: Tensor | None, factor: Tensor) -> ExactLoss:
    """Compute a case's loss with these old log-probs, and gradients of the loss times a factor."""
    exact = case.double()
    logits = exact.logits.requires_grad_()
    log_probs = reference.log_probs_from_logits(logits, exact.targets, **exact.softmax())
    log_probs.retain_grad()
    entropy = None
    if case.objective.entropy_coef > 0:
        entropy = reference.entropy_from_logits(logits, exact.targets, **exact.softmax())
        entropy.retain_grad()
    loss, stats = reference.policy_loss_of_tokens(
        log_probs, entropy, old_log_probs, exact.advantages, **exact.options()
    )
    (loss * factor).backward()
    h = None
    if entropy is not None:
        h = entropy.grad
        stats["entropy"] = entropy.detach()[case.valid].mean()
    assert log_probs.grad is not None
    assert logits.grad is not None
    stats["active_token_frac"] = active_token_frac(case, log_probs.grad, h)
    return ExactLoss(loss.detach(), stats, log_probs.grad, h, logits.grad)


def active_token_frac(case: Case, g: Tensor, h: Tensor | None = None) -> Tensor:
    """Return the fraction of valid tokens with a gradient."""
    is_active = g != 0 if h is None else (g != 0) | (h != 0)
    return is_active[case.valid].double().mean()
