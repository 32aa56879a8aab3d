"""Weights of loss terms, computed from log-probs and entropies, for `rollout_weights`.

All are constants of the loss, in the dtype of their inputs. A weight of 0 drops a token's term and
leaves the denominator unchanged; to exclude the token altogether, put it into the mask.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_choice, check_log_probs, check_number, check_tensor
from .constants import LOG_RATIO_CAP
from .layout import Layout, resolve_layout
from .parallel import ProcessGroup

WeightLevel = Literal["token", "sequence", "geometric"]
Outside = Literal["clip", "zero"]


@torch.no_grad()
def importance_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: WeightLevel = "token",
    low: float = 0.0,
    high: float = math.inf,
    outside: Outside = "clip",
) -> Tensor:
    """Importance weights of the trainer's policy with respect to the rollout engine's.

        w_t = exp(old_log_prob_t - rollout_log_prob_t)      of a token
        w_i = exp(sum_t ...)  or  exp(mean_t ...)           of a sequence, "geometric" for the mean

    Weights outside [low, high] are clipped (truncated importance sampling, TIS) or set to 0 (IcePop
    for tokens, MIS for sequences). A log-ratio beyond +-80 counts as +-80.

    Args:
        old_log_probs: (B, T) padded or (N,) packed, float32 or float64, of the trainer's policy.
        rollout_log_probs: same shape, of the engine that sampled.
        mask: same shape, non-zero where a token counts. Values at other positions are never used.
        cu_seqlens: (B + 1,) first rows of packed sequences, followed by N.
        level: `"token"`, `"sequence"` or `"geometric"`.
        low: least weight, >= 0.
        high: largest weight, >= low, possibly infinite.
        outside: `"clip"` or `"zero"`.

    Returns:
        Weights of tokens in the shape of old_log_probs, 0 where masked, or weights of sequences
            (B,).

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training" (TIS); arXiv 2510.18855 (IcePop).
    """
    check_choice("level", level, get_args(WeightLevel))
    check_choice("outside", outside, get_args(Outside))
    check_number("low", low, minimum=0.0)
    check_number("high", high, minimum=low, may_be_infinite=True)
    layout = _layout("old_log_probs", old_log_probs, mask, cu_seqlens)
    log_ratio = _difference(layout, old_log_probs, "rollout_log_probs", rollout_log_probs)
    if level != "token":
        log_ratio = layout.sequences.sum(log_ratio)
        if level == "geometric":
            log_ratio = log_ratio / _lengths(layout)
    weights = log_ratio.clamp(-LOG_RATIO_CAP, LOG_RATIO_CAP).exp()
    inside = (weights >= low) & (weights <= high) | weights.isnan()
    weights = weights.clamp(low, high) if outside == "clip" else torch.where(inside, weights, 0.0)
    if level == "token":
        weights = layout.sequences.where_valid(weights).view(layout.shape)
    return weights.to(old_log_probs.dtype)


@torch.no_grad()
def off_policy_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """0 for bad responses that the policy has become unlikely to give, 1 for the others.

        w_i = [A_i >= 0 or mean_t (old_log_prob_t - log_prob_t) <= threshold]

    Args:
        log_probs: (B, T) padded or (N,) packed, float32 or float64, of the policy that learns.
        old_log_probs: same shape, of the policy that sampled: the rollout engine's if there is one.
        advantages: (B,), or per token in the shape of log_probs.
        threshold: in nats per token, >= 0.
        mask: same shape as log_probs, non-zero where a token counts.
        cu_seqlens: (B + 1,) first rows of packed sequences, followed by N.

    Returns:
        Weights in the shape of advantages.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: the off-policy sequence mask of DeepSeek-V3.2, arXiv 2512.02556.
    """
    check_number("threshold", threshold, minimum=0.0)
    layout = _layout("log_probs", log_probs, mask, cu_seqlens)
    new_minus_old = _difference(layout, log_probs, "old_log_probs", old_log_probs)
    is_near = -layout.sequences.sum(new_minus_old) / _lengths(layout) <= threshold
    flat, per_token = layout.per_sequence_or_token("advantages", advantages, log_probs.dtype)
    if per_token:
        is_near = is_near[layout.sequences.ids(log_probs.device)]
    return ((flat >= 0) | is_near).to(log_probs.dtype).view(advantages.shape)


@torch.no_grad()
def top_entropy_weights(
    entropy: Tensor,
    fraction: float,
    *,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """1 for the tokens with the highest entropy, 0 for the others.

        w_t = [H_t >= quantile(H, 1 - fraction)]

    Args:
        entropy: in nats, of any shape, padded or packed.
        fraction: share of the tokens that count, in (0, 1].
        mask: same shape, non-zero where a token counts.
        group: ranks over whose tokens the quantile is taken; None for this rank alone.

    Returns:
        Weights in the shape of entropy, 0 where masked.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: arXiv 2506.01939.
    """
    check_tensor("entropy", entropy)
    check_number("fraction", fraction, minimum=0.0, exclusive=True)
    if fraction > 1:
        raise ValueError(f"fraction must be at most 1, got {fraction!r}")
    if mask is not None:
        check_tensor("mask", mask, entropy.device)
        if mask.shape != entropy.shape:
            raise ValueError(
                f"mask must have shape {tuple(entropy.shape)}, got {tuple(mask.shape)}"
            )
    valid = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask != 0
    values = _of_all_ranks(entropy[valid], group).sort().values
    if len(values) == 0:
        return torch.zeros_like(entropy)
    at = (1 - fraction) * (len(values) - 1)
    below, above = values[math.floor(at)], values[math.ceil(at)]
    return (valid & (entropy >= torch.lerp(below, above, at % 1))).to(entropy.dtype)


def _of_all_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the values of all ranks, (n,); ranks may have different numbers of them."""
    if group is None:
        return values
    count = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(count)]
    dist.all_gather(lengths, torch.full_like(lengths[0], len(values)), group=group)
    longest = max(map(int, lengths))
    parts = [values.new_zeros(longest) for _ in range(count)]
    padded = torch.nn.functional.pad(values, (0, longest - len(values)))
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


def _layout(name: str, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    check_log_probs(name, x)
    return resolve_layout(name, x.shape, x.device, mask, cu_seqlens)


def _difference(layout: Layout, new: Tensor, name: str, old: Tensor) -> Tensor:
    """Return new - old in float64, (N,), 0 where a token does not count."""
    check_log_probs(name, old)
    difference = new.reshape(-1).double() - layout.flat(name, old).double()
    return layout.sequences.where_valid(difference)


def _lengths(layout: Layout) -> Tensor:
    ones = torch.ones(layout.sequences.rows, dtype=torch.float64, device=layout.device)
    return layout.sequences.sum(layout.sequences.where_valid(ones)).clamp(min=1)
