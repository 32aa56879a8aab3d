"""Measurements of the ops that start from logits or log-probs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import (
    log_probs_from_logits,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
    reference,
)
from .bounds import Measured
from .cases import Case, upstream
from .errors import (
    differing,
    grad_errors,
    largest,
    non_zeros,
    on_policy_errors,
    ratio_of,
    relative,
    statistic_errors,
    worst,
)
from .exact import active_token_frac, exact_loss


def measure_from_logits(case: Case) -> Iterator[Measured]:
    """Measure every op from logits and, for float32 logits, the op from log-probs."""
    parts = [
        ("log_probs_from_logits", _of_log_probs),
        ("policy_loss_from_logits", _of_loss),
        ("policy_loss_from_logits", _of_loss_on_policy),
    ]
    if case.dtype == torch.float32 and case.objective.entropy_coef == 0:
        parts.insert(1, ("policy_loss_from_log_probs", _of_loss_from_log_probs))
    for op, errors in parts:
        for quantity, value in errors(case).items():
            yield Measured(op, case.dtype, case.name, quantity, value)


def _of_log_probs(case: Case) -> dict[str, float]:
    exact = case.double()
    g, h = upstream(case.targets, 1), upstream(case.targets, 2)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        logits = case.logits.clone().requires_grad_()
        log_probs, entropy = log_probs_from_logits(
            logits, case.targets, return_entropy=True, **case.softmax()
        )
        (log_probs * g + entropy * h).sum().backward()
        assert logits.grad is not None
        return log_probs.detach(), entropy.detach(), logits.grad

    logits64 = exact.logits.requires_grad_()
    log_probs64 = reference.log_probs_from_logits(logits64, exact.targets, **exact.softmax())
    entropy64 = reference.entropy_from_logits(logits64, exact.targets, **exact.softmax())
    (log_probs64 * g + entropy64 * h).sum().backward()
    log_probs, entropy, grad = ours()
    return {
        "log_prob": worst(log_probs - log_probs64),
        "entropy": worst(entropy - entropy64),
        **grad_errors(grad, logits64.grad, case.targets),
        "non-zeros in dead rows": non_zeros(grad[~case.valid]),
        "bits that differ on repeat": differing(grad, ours()[2]),
    }


def _of_loss_from_log_probs(case: Case) -> dict[str, float]:
    exact = case.double()
    log_probs = reference.log_probs_from_logits(
        exact.logits, exact.targets, **exact.softmax()
    ).float()
    ours = torch.where(case.valid, log_probs, math.nan).requires_grad_()
    theirs = log_probs.double().requires_grad_()
    out = policy_loss_from_log_probs(ours, case.old_log_probs, case.advantages, **case.options())
    loss64, stats64 = reference.policy_loss_from_log_probs(
        theirs, exact.old_log_probs, exact.advantages, **exact.options()
    )
    g = upstream(loss64, 3)
    (out.loss * g).backward()
    (loss64 * g).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    flipped = (ours.grad == 0) != (theirs.grad == 0)
    stats64["active_token_frac"] = active_token_frac(case, theirs.grad)
    return {
        "loss": worst(out.loss - loss64),
        "ratio": worst(ratio_of(out.stats) - ratio_of(stats64)),
        **statistic_errors(out.stats, stats64, " of log_probs"),
        "clip decisions flipped": float(flipped.sum()),
        "grad of log_probs, rel L2": relative(ours.grad, theirs.grad),
        "non-zeros in dead rows": non_zeros(ours.grad[~case.valid]),
    }


def _of_loss(case: Case) -> dict[str, float]:
    g = upstream(case.logits.new_zeros(()), 4)
    exact = exact_loss(case, case.double().old_log_probs, g)

    def ours() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        logits = case.logits.clone().requires_grad_()
        out = policy_loss_from_logits(
            logits, case.targets, case.old_log_probs, case.advantages,
            **case.softmax(), **case.options(),
        )  # fmt: skip
        (out.loss * g).backward()
        assert logits.grad is not None
        return out.loss.detach(), out.stats, logits.grad

    loss, stats, grad = ours()
    at_target = _at_target(exact.dlogits, case.targets)
    flipped = (_at_target(grad, case.targets) == 0) != (at_target.to(grad.dtype) == 0)
    dead = (exact.dlogits == 0).all(-1)
    return {
        "loss": worst(loss - exact.loss),
        "ratio": worst(ratio_of(stats) - ratio_of(exact.stats)),
        **statistic_errors(stats, exact.stats),
        "clip decisions flipped": float(flipped.sum()),
        **grad_errors(grad, exact.dlogits, case.targets),
        "non-zeros in dead rows": non_zeros(grad[dead]),
        "bits that differ on repeat": differing(grad, ours()[2]),
    }


def _of_loss_on_policy(case: Case) -> dict[str, float]:
    """Measure with old log-probs that are bitwise the new ones, and with old_log_probs=None."""
    with torch.no_grad():
        new = log_probs_from_logits(case.logits, case.targets, **case.softmax())
    exact = exact_loss(case, None, torch.ones(()))
    found = []
    for old in (new, None):
        logits = case.logits.clone().requires_grad_()
        out = policy_loss_from_logits(
            logits, case.targets, old, case.advantages, **case.softmax(), **case.options()
        )
        out.loss.backward()
        found.append(
            on_policy_errors(out.stats)
            | statistic_errors(out.stats, exact.stats)
            | grad_errors(logits.grad, exact.dlogits, case.targets)
        )
    return {q: largest(errors[q] for errors in found) for q in found[0]}


def _at_target(x: Tensor, targets: Tensor) -> Tensor:
    return x.gather(-1, targets.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
