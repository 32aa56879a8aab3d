"""A function as objective: autograd differentiates its N terms.

The code of the built-in objectives averages the terms and computes the statistics of the ratios.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from .constants import STATS
from .objective import Objective, aggregation_of
from .policy import ObjectiveOptions, Policy
from .policy_loss import (
    clip_fractions,
    policy_loss_fwd,
    sequence_lengths,
    sum_over_context,
    token_mean,
)

TokenLoss = Callable[..., Tensor | tuple[Tensor, Tensor]]

_RATIO_STATS = (
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "approx_kl",
    "approx_kl_k3",
    "effective_sample_size",
)
_CLIP_STATS = ("clip_frac_sequences", "clip_frac_tokens", "clip_frac_low", "clip_frac_high")


def options_of(objective: Objective | TokenLoss) -> ObjectiveOptions:
    """Return the options for operators; a function has one ratio per token, which nothing clips."""
    if not isinstance(objective, Objective):
        objective = Objective(ratio_level="token", aggregation=aggregation_of(objective))
    return ObjectiveOptions.of(objective)


def custom_loss(
    objective: TokenLoss, log_probs: Tensor, policy: Policy, entropy: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a function's loss and statistics from (N,) log-probs, with entropies as constants."""
    sequences, where_valid = policy.sequences, policy.sequences.where_valid
    ids = sequences.ids(log_probs.device)
    lengths = sequence_lengths(policy.advantages, sequences, policy.context_group)
    terms, clipped = _terms(objective, log_probs, policy, ids, lengths)
    weights = policy.rollout_weights
    if weights is not None:
        terms = terms * where_valid(weights if policy.rollout_weight_per_token else weights[ids])
    out = policy_loss_fwd(log_probs.detach(), None, policy)
    terms = where_valid(terms)
    if policy.objective.aggregation == "seq-mean-token-mean":
        terms = terms / lengths.clamp(min=1)[ids]
    loss = (terms * out.inv_denominator).sum()  # summed first, large terms could overflow
    if policy.context_group is not None:
        # exactly the value of all ranks, with the gradient of this one
        loss = loss - loss.detach() + sum_over_context(loss.detach(), policy.context_group)

    seen = dict(zip(STATS, out.stats.unbind(), strict=True))
    stats = {name: seen[name] for name in _RATIO_STATS}
    stats["log_ratio"] = out.log_ratio
    if policy.ref_log_probs is not None:
        stats["ref_kl"] = seen["ref_kl"]
    if clipped is not None:
        stats.update(_clip_stats(clipped, policy, ids))
    if entropy is not None:
        stats["entropy"] = token_mean(entropy, sequences, policy.context_group)
    return loss, stats


def _terms(
    objective: TokenLoss, log_probs: Tensor, policy: Policy, ids: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Call the function on tokens that count; return loss terms, and which ones it clipped."""
    where_valid = policy.sequences.where_valid
    live = where_valid(log_probs)
    old = live.detach() if policy.old_log_probs is None else where_valid(policy.old_log_probs)
    ref, mask = policy.ref_log_probs, policy.sequences.mask
    by_name = {
        "mask": torch.ones_like(live, dtype=torch.bool) if mask is None else mask != 0,
        "lengths": lengths,
        "ref_log_probs": None if ref is None else where_valid(ref),
    }
    asked = inspect.signature(objective).parameters
    if ref is not None and "ref_log_probs" not in asked:
        raise ValueError(
            "ref_log_probs is given, but the function as objective has no parameter of this name"
        )
    given = {name: x for name, x in by_name.items() if name in asked}
    out = objective(live, old, where_valid(_token_advantages(policy, ids)), ids, **given)
    terms, clipped = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    shape = tuple(log_probs.shape)
    if not isinstance(terms, Tensor) or terms.shape != log_probs.shape:
        raise ValueError(
            f"objective must return one loss term per token, shape {shape}, got {_kind(terms)}"
        )
    if clipped is not None and (
        not isinstance(clipped, Tensor)
        or clipped.shape != log_probs.shape
        or clipped.dtype != torch.bool
    ):
        raise ValueError(
            "objective must return loss terms, or a pair of them and a bool tensor of shape "
            f"{shape} that marks the clipped ones, got {_kind(clipped, dtype=True)} as the second"
        )
    return terms, clipped


def _kind(x: object, dtype: bool = False) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{x.dtype} {tuple(x.shape)}" if dtype else str(tuple(x.shape))


def _token_advantages(policy: Policy, ids: Tensor) -> Tensor:
    return policy.advantages if policy.advantage_per_token else policy.advantages[ids]


def _clip_stats(clipped: Tensor, policy: Policy, ids: Tensor) -> dict[str, Tensor]:
    fractions = clip_fractions(
        clipped,
        policy.sequences.where_valid(_token_advantages(policy, ids)),
        policy.sequences,
        policy.context_group,
    )
    return dict(zip(_CLIP_STATS, fractions.unbind(), strict=True))
