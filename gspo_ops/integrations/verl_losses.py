"""verl's policy losses as objectives, in one kernel.

When verl calls a policy loss, it has gathered the log-probs already. What is fused is the rest:
ratio, clipping, aggregation and gradient. Ratios stay finite, and padding may hold anything.
"""

from __future__ import annotations

import logging
import math
import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import GMPO, SAPO, GSPOToken, Objective, policy_loss_from_log_probs
from ..objective import Aggregation, log_clip_range

NAME = "gspo_ops"
"""The name of the policy loss for GSPO and of the backend, and the prefix of the other losses."""
_WIDE = 0.01  # a clip range that GSPO's ratios never leave
_logger = logging.getLogger(__name__)

# for each aggregation of verl, ours and the count of the global batch that divides the loss
AGGREGATIONS: dict[str, tuple[Aggregation, str | None]] = {
    "token-mean": ("token-mean", "batch_num_tokens"),
    "token-sum": ("token-sum", None),
    "seq-mean-token-sum": ("seq-mean-token-sum", "global_batch_size"),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum", "global_batch_size"),
    "seq-mean-token-mean": ("seq-mean-token-mean", "global_batch_size"),
}
_OF_PAPER = "seq-mean-token-mean"  # that of GSPO's paper; sapo ignores loss_agg_mode and uses it


def require_verl() -> None:
    try:
        import verl
    except ImportError as error:
        raise ImportError(f"gspo_ops.integrations.verl is for verl 0.9: {error}") from None
    if verl.__version__.split(".")[:2] != ["0", "9"]:
        raise ImportError(f"gspo_ops.integrations.verl is for verl 0.9, got {verl.__version__}")


def register_losses() -> None:
    """Add our losses to verl's registry: GSPO as `NAME`, and `NAME_x` for each loss x of verl."""
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    if NAME in POLICY_LOSS_REGISTRY:
        return
    for mode in [*POLICY_LOSS_REGISTRY]:
        register_policy_loss(f"{NAME}_{mode}")(partial(policy_loss, mode=mode))
    register_policy_loss(NAME)(policy_loss)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = _OF_PAPER,
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    mode: str = "gspo",
) -> tuple[Tensor, dict[str, Any]]:
    """One of verl's policy losses, with verl's signature; GSPO unless `mode` is given.

        s_it = stop_grad(s_i) * pi_t / stop_grad(pi_t)
        loss = -agg(min(s_it A_it, clip(s_it) A_it))

    `"vanilla"` with its dual clip, `"gspo"`, `"sapo"`, `"geo_mean"`, `"cispo"` and `"gpg"` are
    objectives. Other losses, and settings that no objective expresses, are left to verl's own
    function, and the log says so once.

    Args:
        old_log_prob: (B, T) float32 of the policy that sampled.
        log_prob: (B, T) of the policy that is trained.
        advantages: (B, T), one per token as in verl, constant in a sequence or not.
        response_mask: (B, T) of 0 and 1.
        loss_agg_mode: one of verl's modes; `"seq-mean-token-mean"` is that of the GSPO paper. As in
            verl, sapo and geo_mean have averages of their own.
        config: verl's ActorConfig, with the same meaning. Its `global_batch_info` has the counts
            that divide the loss.
        rollout_is_weights: (B, T) importance weights, detached.
        mode: the `loss_mode` of verl's own function.

    Returns:
        The loss, and metrics under verl's names and, with the prefix `gspo_ops/`, under ours.

    Raises:
        ValueError: config is None, or lacks the global count that its average needs.
    """
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    batch = _Batch(old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
    average = _OF_PAPER if mode in ("sapo", "geo_mean") else loss_agg_mode
    try:
        objective = _objective(mode, config, average)
        if mode == "geo_mean":
            batch = _of_sequences(batch)
    except ValueError as error:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn

        say_once(f"loss_mode={NAME}_{mode} is verl's own {mode}: {error}")
        return get_policy_loss_fn(mode)(*batch[:4], loss_agg_mode, config, rollout_is_weights)
    if mode == "geo_mean":  # its mean is over this micro-batch, with empty sequences
        denominator: float | Tensor | None = float(len(response_mask))
    else:
        denominator = _denominator(average, config.global_batch_info, response_mask)
    loss, stats = policy_loss_from_log_probs(
        log_prob,
        None if mode == "gpg" else old_log_prob,
        batch.advantages,
        mask=response_mask,
        objective=objective,
        rollout_weights=batch.weights,
        denominator=denominator,
    )
    ours = {f"{NAME}/{name}": x.item() for name, x in stats.items() if x.ndim == 0}
    return loss, _metrics(mode, objective, batch, stats) | ours


class _Batch(NamedTuple):
    """The tensors that verl passes, (B, T) each; (B,) where a loss has one value per sequence."""

    old_log_probs: Tensor
    log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor | None


def _objective(mode: str, config: Any, average: str) -> Objective:
    """Return the objective that a mode means with one of verl's averages.

    Raises:
        ValueError: no objective expresses it.
    """
    if average not in AGGREGATIONS:
        raise ValueError(f"no objective expresses loss_agg_mode={average!r}")
    aggregation, _ = AGGREGATIONS[average]
    low, high = (
        config.clip_ratio if of_side is None else of_side
        for of_side in (config.clip_ratio_low, config.clip_ratio_high)
    )
    if mode == "gspo":
        _warn_if_wide(low)
        return GSPOToken(clip_low=low, clip_high=high, aggregation=aggregation)
    if mode == "geo_mean":  # its range is that of log-ratios
        return GMPO(clip_low=-math.expm1(-low), clip_high=math.expm1(high))
    if mode == "sapo":
        return SAPO(soft_temperature_pos=config.tau_pos, soft_temperature_neg=config.tau_neg)
    options: dict[str, dict[str, Any]] = {
        "vanilla": {"clip_low": low, "clip_high": high, "dual_clip": config.clip_ratio_c},
        "cispo": {"surrogate": "weighted", "clip_low": low, "clip_high": high},
        "gpg": {"surrogate": "weighted"},  # on-policy: every ratio is 1
    }
    if mode not in options:
        raise ValueError("no objective expresses it")
    return Objective(ratio_level="token", aggregation=aggregation, **options[mode])


def _warn_if_wide(low: float) -> None:
    if low > _WIDE:
        warnings.warn(
            f"clip_ratio_low={low:g} never clips a ratio of GSPO, whose paper uses 3e-4 and 4e-4: "
            "set clip_ratio_low and clip_ratio_high",
            stacklevel=4,
        )


def _of_sequences(batch: _Batch) -> _Batch:
    """Give each sequence one advantage, and one weight: the geometric mean, as in verl.

    Raises:
        ValueError: the advantages of a sequence differ.
    """
    valid = batch.mask != 0
    largest = batch.advantages.masked_fill(~valid, -math.inf).amax(1)
    if not ((batch.advantages == largest[:, None]) | ~valid).all():
        raise ValueError("the advantages differ within a sequence")
    weights = batch.weights
    if weights is not None:
        logs = (weights + 1e-10).log().masked_fill(~valid, 0.0)
        weights = (logs.sum(1) / valid.sum(1).clamp(min=1)).exp()
    advantages = torch.where(valid.any(1), largest, 0.0)
    return batch._replace(advantages=advantages, weights=weights)


@cache
def say_once(message: str) -> None:
    _logger.warning(message)


def _denominator(average: str, info: dict[str, Any], mask: Tensor) -> float | Tensor | None:
    """Return what verl divides by: counts of the global batch, per data-parallel rank."""
    _, count = AGGREGATIONS[average]
    ranks = info.get("dp_size", 1)
    given = info.get(count) if count else 1
    if given is None and ranks > 1:
        raise ValueError(f"global_batch_info must have {count} with dp_size={ranks}")
    norm = 1
    if average == "seq-mean-token-sum-norm":
        norm = info.get("loss_scale_factor") or mask.shape[-1]
    if given is None:  # count here
        return None if norm == 1 else norm * (mask.sum(-1) > 0).sum().float().clamp(min=1)
    return given * norm / ranks


def _metrics(
    mode: str, objective: Objective, batch: _Batch, stats: dict[str, Tensor]
) -> dict[str, float]:
    """Return verl's metrics, under its names and as it defines them."""
    if mode == "gpg":
        return {}
    clipped, lower = stats["clip_frac_tokens"], stats.get("clip_frac_dual", torch.zeros(()))
    # these two count ratios outside the range on either side, clipped or not
    if mode == "cispo":
        clipped = _token_fraction(_is_outside(objective, batch), batch.mask)
    elif mode == "geo_mean":
        is_outside, of_token = _is_outside(objective, batch), batch.advantages[:, None]
        clipped = _token_fraction(is_outside & (of_token > 0), batch.mask)
        lower = _token_fraction(is_outside & (of_token < 0), batch.mask)
    return {
        "actor/pg_clipfrac": clipped.item(),
        "actor/ppo_kl": stats["approx_kl"].item(),
        "actor/pg_clipfrac_lower": lower.item(),
    }


def _is_outside(objective: Objective, batch: _Batch) -> Tensor:
    """Return (B, T) bool: whether a token's ratio leaves the clip range."""
    low, high = log_clip_range(objective.clip_low, objective.clip_high)
    log_ratio = batch.log_probs.detach() - batch.old_log_probs
    return (log_ratio < low) | (log_ratio > high)


def _token_fraction(of_tokens: Tensor, mask: Tensor) -> Tensor:
    return (of_tokens & (mask != 0)).sum() / (mask != 0).sum().clamp(min=1)
