"""Distances from exact results, in the measures of the bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..constants import STATS


def grad_errors(grad: Tensor | None, exact: Tensor | None, targets: Tensor) -> dict[str, float]:
    """Return the errors of dlogits, in the contract's measure for the dtype."""
    assert grad is not None
    assert exact is not None
    if grad.dtype in (torch.bfloat16, torch.float16):
        return {"grad, ulp": ulp_distance(grad, exact)}
    is_target = torch.zeros_like(grad, dtype=torch.bool)
    index = targets.clamp(min=0).long().unsqueeze(-1)
    is_target.scatter_(-1, index, (targets >= 0).unsqueeze(-1))
    g = exact.abs().amax(-1).clamp(min=1e-30)
    # It is 0 without a soft cap, whose derivative differs between logits. float64 rounds it, by
    # more than the bound where a token is so likely that its gradient is below 1e-10.
    row_sum = exact.sum(-1)
    row_sum = torch.where(row_sum.abs() < 1e-14, 0.0, row_sum)
    return {
        "grad at target, rel L2": relative(grad[is_target], exact[is_target]),
        "grad elsewhere, rel L2": relative(grad[~is_target], exact[~is_target]),
        "grad row sum / g": worst((grad.double().sum(-1) - row_sum) / g),
    }


def statistic_errors(
    stats: dict[str, Tensor], exact: dict[str, Tensor], source: str = ""
) -> dict[str, float]:
    """Return the worst errors of fractions, of other statistics (relative beyond 1) and of entropy.

    `source` ends the names of those that an error of log-probs moves.
    """
    errors = {
        name: worst((stats[name] - exact[name]) / exact[name].abs().clamp(min=1))
        for name in STATS
        if name in exact
    }
    fractions = {name for name in errors if "frac" in name}
    found = {
        "clip and active fractions": largest(errors[name] for name in fractions),
        f"statistics{source}": largest(errors[name] for name in errors.keys() - fractions),
    }
    if "entropy" in exact:
        found[f"entropy{source}"] = worst(stats["entropy"] - exact["entropy"])
    return found


def on_policy_errors(stats: dict[str, Tensor]) -> dict[str, float]:
    """Return errors of a policy against itself, where all ratios are 1 and none is clipped."""

    def named(*starts: str) -> Tensor:
        return torch.stack([x for name, x in stats.items() if name.startswith(starts)])

    return {
        "on-policy ratio - 1": worst(named("ratio_", "effective_sample_size") - 1),
        "on-policy clipped": worst(named("clip_frac_")),
        "on-policy KL": worst(named("approx_kl")),
    }


def ulp_distance(x: Tensor, exact: Tensor) -> float:
    """Return the largest number of steps between x and exact, which is rounded to x's dtype."""
    if torch.isnan(x).any():
        return math.nan

    def ordered(y: Tensor) -> Tensor:
        bits = y.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return worst(ordered(x) - ordered(exact.to(x.dtype)))


def relative(x: Tensor, exact: Tensor) -> float:
    """Return ||x - exact|| / ||exact||, or ||x|| if exact vanishes."""
    error = (x.double() - exact).norm()
    return float(error / exact.norm()) if exact.norm() > 0 else float(error)


def worst(x: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def largest(values: Iterable[float]) -> float:
    """Return the largest value; NaN if there is one, which `max` may pass over."""
    return max(values, key=lambda x: (math.isnan(x), x))


def non_zeros(x: Tensor) -> float:
    return float((x != 0).sum())


def differing(x: Tensor, y: Tensor) -> float:
    return float((x != y).sum())


def ratio_of(stats: dict[str, Tensor]) -> Tensor:
    """Return s_i, or 1 + log(s_i) beyond 1, so that differences of large ones are relative."""
    log_ratio = stats["log_ratio"].double()
    return torch.where(log_ratio > 0, 1 + log_ratio, log_ratio.exp())
