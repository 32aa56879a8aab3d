"""From log-probs to a loss in torch: on a CPU, in float64, and over a context_group.

Everything is computed in float64: it is only N numbers. The kernel that does the same on a GPU is
in `kernels/policy_loss.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_cu_seqlens
from .constants import ESS_RATIO_CAP, LOG_RATIO_CAP, STATS
from .parallel import gathered
from .policy import LossAndGrad, ObjectiveOptions, Policy


def torch_policy_loss(
    log_probs: Tensor | None, entropy: Tensor | None, policy: Policy
) -> LossAndGrad:
    """Compute loss, statistics, g and h from (N,) log-probs and entropies."""
    dtype = policy.advantages.dtype
    tokens = _tokens(log_probs, policy)
    terms = _loss_terms(log_probs, entropy, tokens, policy)
    totals = _totals(tokens, terms, policy)
    denominator = _denominator(policy, tokens.n)
    stats = _stats(tokens, totals)
    return LossAndGrad(
        loss=_saturated(totals.loss / denominator, dtype).to(dtype),
        stats=torch.stack([stats[name] for name in STATS]).to(dtype),
        log_ratio=tokens.of_sequence(tokens.new_minus_old_sum).to(dtype),
        g=terms.g.to(dtype),
        h=terms.h.to(dtype),
        inv_denominator=(1.0 / denominator).to(dtype),
    )


class _Tokens(NamedTuple):
    """Values of tokens (N,), and of sequences (B,), which may have tokens on several ranks."""

    valid: Tensor
    ids: Tensor  # the tokens' sequences
    advantages: Tensor
    new_minus_old: Tensor
    log_ratio: Tensor  # as the ratio level defines it
    decisive: Tensor  # the log-ratio that is clipped
    weights: Tensor
    n: Tensor  # (B,) tokens that count
    new_minus_old_sum: Tensor  # (B,)
    log_ratio_sum: Tensor  # (B,) the same, but of clipped log-ratios for "geometric"
    weight_sum: Tensor  # (B,)

    def of_sequence(self, sums: Tensor) -> Tensor:
        """Return (B,) means from sums."""
        return sums / self.n.clamp(min=1)


def _tokens(log_probs: Tensor | None, policy: Policy) -> _Tokens:
    sequences, objective = policy.sequences, policy.objective
    valid = checked_mask(policy)
    ids = sequences.ids(valid.device)
    advantages = policy.advantages.double()
    if not policy.advantage_per_token:
        advantages = advantages[ids]
    advantages = _nan_if_infinite(torch.where(valid, advantages, 0.0))
    new_minus_old = _difference(log_probs, policy.old_log_probs, valid)
    log_ratio = decisive = new_minus_old
    weights = _rollout_weights(policy, ids, valid)
    of_tokens = [valid.double(), weights, new_minus_old]
    if objective.ratio_level == "geometric":
        log_low, log_high = objective.log_clip_range()
        log_ratio = torch.where(advantages > 0, log_ratio.clamp(max=log_high), log_ratio)
        log_ratio = torch.where(advantages < 0, log_ratio.clamp(min=log_low), log_ratio)
        of_tokens.append(log_ratio)
    sums = _over_ranks(torch.stack([sequences.sum(x) for x in of_tokens]), policy)
    n, weight_sum, new_minus_old_sum, log_ratio_sum = *sums[:3], sums[-1]
    if objective.ratio_level != "token":
        log_ratio = (log_ratio_sum / n.clamp(min=1))[ids]
    if objective.ratio_level != "geometric":
        decisive = log_ratio
    return _Tokens(
        valid, ids, advantages, new_minus_old, log_ratio, decisive, weights, n, new_minus_old_sum,
        log_ratio_sum, weight_sum,
    )  # fmt: skip


def _over_ranks(sums: Tensor, policy: Policy) -> Tensor:
    if policy.context_group is None:
        return sums
    return gathered(sums, policy.context_group).sum(0)


class _Surrogates(NamedTuple):
    """Surrogates of tokens per unit of advantage, (N,) each."""

    value: Tensor
    slope: Tensor  # d value / d log r, or / d log_prob where the ratio has no gradient
    is_low: Tensor
    is_high: Tensor
    is_dual: Tensor

    def has_stopped(self) -> Tensor:
        return self.is_low | self.is_high | self.is_dual


def _surrogates(tokens: _Tokens, ratio: Tensor, objective: ObjectiveOptions) -> _Surrogates:
    advantages = tokens.advantages
    log_low, log_high = objective.log_clip_range()
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    is_high = (advantages > 0) & (tokens.decisive > log_high)
    is_low = (advantages < 0) & (tokens.decisive < log_low)
    is_dual = (advantages < 0) & (tokens.decisive > math.log(objective.dual_clip))
    value = slope = ratio
    if objective.surrogate == "weighted":
        value = slope = ratio.clamp(low, high)
    elif objective.surrogate == "soft":
        tau = torch.full_like(ratio, objective.soft_temperature_neg)
        tau = tau.masked_fill(advantages > 0, objective.soft_temperature_pos)
        x = tau * (ratio - 1)
        value, slope = 4 / tau * x.sigmoid(), 4 * x.sigmoid() * (-x).sigmoid() * ratio
    elif objective.ratio_level != "geometric":
        value = torch.where(is_high, high, torch.where(is_low, low, ratio))
        value = torch.where(is_dual, objective.dual_clip, value)
    return _Surrogates(value, slope, is_low, is_high, is_dual)


class _Terms(NamedTuple):
    """Loss terms of tokens before the division by D, and the values behind them, (N,) each."""

    loss: Tensor
    g: Tensor
    h: Tensor  # (0,) without an entropy bonus
    ratio: Tensor
    is_low: Tensor
    is_high: Tensor
    is_dual: Tensor
    ref_kl: Tensor


def _loss_terms(
    log_probs: Tensor | None, entropy: Tensor | None, tokens: _Tokens, policy: Policy
) -> _Terms:
    objective, valid = policy.objective, tokens.valid
    dtype = policy.advantages.dtype
    ratio = _capped_exp(tokens.log_ratio)
    found = _surrogates(tokens, ratio, objective)
    loss = -found.value * tokens.advantages * tokens.weights
    g, shared = _surrogate_grads(found, tokens, objective), torch.zeros_like(loss)
    if objective.surrogate == "weighted":
        assert log_probs is not None
        loss = torch.where(loss == 0, 0.0, loss * torch.where(valid, log_probs.double(), 0.0))
    elif objective.ratio_level == "sequence_shared":
        g, shared = shared, g

    delta = _difference(log_probs, policy.ref_log_probs, valid)
    ref_kl, ref_kl_grad = (_saturated(x, dtype) for x in _kl(objective, delta))
    if objective.kl_weight != "one":
        ref_kl, ref_kl_grad = (_saturated(ratio * x, dtype) for x in (ref_kl, ref_kl_grad))
    loss = loss + objective.kl_coef * ref_kl
    g = g + objective.kl_coef * ref_kl_grad
    if objective.kl_weight == "ratio":
        by_log_ratio = objective.kl_coef * ref_kl
        if objective.ratio_level in ("token", "sequence_token"):
            g = g + by_log_ratio
        else:
            shared = shared + by_log_ratio
    if objective.shares_gradient():
        sums = policy.sequences.sum(torch.where(valid, _saturated(shared, dtype), 0.0))
        g = g + tokens.of_sequence(_over_ranks(sums, policy))[tokens.ids]
    h = -objective.entropy_coef * valid.double()
    if entropy is not None:
        loss = loss + h * torch.where(valid, entropy.double(), 0.0)
    if objective.aggregation == "seq-mean-token-mean":
        loss, g, h = (x / tokens.n.clamp(min=1)[tokens.ids] for x in (loss, g, h))
    return _Terms(
        loss=_saturated(loss, dtype),
        g=torch.where(valid, _saturated(g, dtype), 0.0),
        h=h[:0] if entropy is None else h,
        ratio=ratio,
        is_low=found.is_low,
        is_high=found.is_high,
        is_dual=found.is_dual,
        ref_kl=ref_kl,
    )


def _surrogate_grads(found: _Surrogates, tokens: _Tokens, objective: ObjectiveOptions) -> Tensor:
    """Return d loss term / d log r, or / d log_prob where the ratio has no gradient."""
    weights = tokens.weights
    if objective.surrogate != "weighted" and objective.ratio_level in ("sequence", "geometric"):
        # every token's rollout weight reaches every token through the sequence's one ratio
        weights = tokens.of_sequence(tokens.weight_sum)[tokens.ids]
    g = -found.slope * tokens.advantages * weights
    return torch.where(found.has_stopped(), 0.0, g) if objective.surrogate == "clipped" else g


class _Totals(NamedTuple):
    """Sums over the tokens of all ranks."""

    loss: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor
    k3: Tensor
    active: Tensor
    ref_kl: Tensor
    clipped: Tensor  # (B,)
    ratios: Tensor  # as `_ratio_sums` returns them
    extremes: Tensor


def _totals(tokens: _Tokens, terms: _Terms, policy: Policy) -> _Totals:
    of_tokens = (
        terms.loss, terms.is_low, terms.is_high, terms.is_dual, _k3(tokens.new_minus_old),
        _has_gradient(terms), terms.ref_kl,
    )  # fmt: skip
    totals = torch.stack([torch.where(tokens.valid, x, 0.0).sum() for x in of_tokens])
    clipped = policy.sequences.sum((terms.is_high | terms.is_low).double())
    ratios, extremes = _ratio_sums(terms.ratio, tokens.valid)
    if policy.context_group is not None:
        parts = (totals, clipped, ratios, extremes)
        everyone = gathered(torch.cat(parts), policy.context_group)
        *sums, maxima = everyone.split([len(x) for x in parts], dim=1)
        (totals, clipped, ratios), extremes = (x.sum(0) for x in sums), maxima.amax(0)
    if policy.objective.ratio_level != "token":  # one ratio per sequence, which every rank knows
        ratios, extremes = _ratio_sums(
            _capped_exp(tokens.of_sequence(tokens.log_ratio_sum)), tokens.n > 0
        )
    loss, low, high, dual, k3, active, ref_kl = totals
    return _Totals(loss, low, high, dual, k3, active, ref_kl, clipped, ratios, extremes)


def _has_gradient(terms: _Terms) -> Tensor:
    return terms.g != 0 if len(terms.h) == 0 else (terms.g != 0) | (terms.h != 0)


def _ratio_sums(ratio: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Return count and sums of ratios, capped ratios and their squares; maxima of -ratio, ratio."""
    capped = ratio.clamp(1 / ESS_RATIO_CAP, ESS_RATIO_CAP)
    values = torch.ones_like(ratio), ratio, capped, capped.square()
    sums = torch.stack([torch.where(some, x, 0.0).sum() for x in values])
    extremes = torch.stack([-ratio, ratio]).masked_fill(~some, -math.inf)
    return sums, torch.nn.functional.pad(extremes, (0, 1), value=-math.inf).amax(1)


def _stats(tokens: _Tokens, totals: _Totals) -> dict[str, Tensor]:
    count, ratio_sum, capped, squares = totals.ratios
    minus_min, ratio_max = totals.extremes
    n, sequences = tokens.n.sum().clamp(min=1), (tokens.n > 0).sum().clamp(min=1)

    def or_1(x: Tensor) -> Tensor:
        """Return 1 for an empty batch, as for an on-policy one."""
        return torch.where(count > 0, x, 1.0)

    return {
        "ratio_mean": or_1(ratio_sum / count.clamp(min=1)),
        "ratio_min": or_1(-minus_min),
        "ratio_max": or_1(ratio_max),
        "clip_frac_sequences": (totals.clipped > 0).double().sum() / sequences,
        "clip_frac_tokens": (totals.low + totals.high) / n,
        "clip_frac_low": totals.low / n,
        "clip_frac_high": totals.high / n,
        "approx_kl": -tokens.new_minus_old_sum.sum() / n,
        "approx_kl_k3": totals.k3 / n,
        "effective_sample_size": or_1(capped / squares * (capped / count.clamp(min=1))),
        "active_token_frac": totals.active / n,
        "ref_kl": totals.ref_kl / n,
        "clip_frac_dual": totals.dual / n,
    }


def _denominator(policy: Policy, n: Tensor) -> Tensor:
    """Return D, from the lengths of the sequences unless it is given."""
    D = policy.denominator
    if D is None:
        counts = {"token-mean": n.sum(), "token-sum": n.new_ones(())}
        count = counts.get(policy.objective.aggregation, (n > 0).sum())
        return count.clamp(min=1).double()
    _check_denominator(D)
    return torch.where(D > 0, D, math.nan).double()


# Values, which are checked on a CPU only: on a GPU, that would take a synchronisation


def check_values(policy: Policy) -> None:
    """Refuse a mask, cu_seqlens or a denominator with invalid values."""
    checked_mask(policy)
    if policy.denominator is not None:
        _check_denominator(policy.denominator)


def _check_denominator(D: Tensor) -> None:
    if D.device.type == "cpu" and not D > 0:
        raise ValueError(f"denominator must be > 0, got {D.item():g}")


def checked_mask(policy: Policy) -> Tensor:
    """Return the mask, (N,) bool; on a CPU, refuse invalid values of it and of cu_seqlens."""
    device = policy.advantages.device
    rows, _, cu, mask = policy.sequences
    if cu is not None and device.type == "cpu":
        check_cu_seqlens(cu.tolist(), rows)
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=device)
    valid = mask != 0
    if device.type == "cpu" and bool((valid & (mask != 1)).any()):
        raise ValueError(
            "mask must contain only 0 and 1; weights belong in advantages or rollout_weights"
        )
    return valid


# Terms


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp x to the finite range of a dtype."""
    return x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)


def _difference(new: Tensor | None, old: Tensor | None, valid: Tensor) -> Tensor:
    if new is None or old is None:
        return torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    return torch.where(valid, new.double() - old.double(), 0.0)


def _capped_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP).exp()


def _k3(x: Tensor) -> Tensor:
    return torch.expm1(x.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP)) - x.clamp(max=LOG_RATIO_CAP)


def _kl(objective: ObjectiveOptions, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL estimates, and derivatives with respect to delta = log_prob - ref_log_prob."""
    kind = objective.kl_estimator
    d = delta.clamp(-objective.kl_input_clamp, objective.kl_input_clamp)
    if kind.startswith("k1"):
        value, grad = d, torch.ones_like(d)
    elif kind == "k2":
        value, grad = 0.5 * d.square(), d
    elif kind == "abs":
        value, grad = d.abs(), d.sign()
    else:
        value, grad = _k3(-d), -torch.expm1((-d).clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP))
    is_free = (delta == d) & (value.abs() <= objective.kl_output_clamp)
    value = value.clamp(-objective.kl_output_clamp, objective.kl_output_clamp)
    if kind.endswith("+"):
        return value, delta
    return value, torch.where(is_free | delta.isnan(), grad, 0.0)


def _rollout_weights(policy: Policy, ids: Tensor, valid: Tensor) -> Tensor:
    if policy.rollout_weights is None:
        return valid.double()
    weights = policy.rollout_weights.double()
    if not policy.rollout_weight_per_token:
        weights = weights[ids]
    return _nan_if_infinite(torch.where(valid, weights, 0.0))


def _nan_if_infinite(x: Tensor) -> Tensor:
    """Replace infinite factors of loss terms, which must not pass for saturated ones, by NaN."""
    return x.masked_fill(x.isinf(), math.nan)
