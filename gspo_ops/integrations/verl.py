"""GSPO for verl, as one of its policy losses: `register()`, then `loss_mode: gspo_ops`.

Written for verl 0.9. Log-probs are gathered already when verl calls a policy loss, so that what is
fused here is the loss: ratio, clipping, aggregation and gradient in one kernel, with ratios that
stay finite and padding that may hold anything.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from .. import GSPOToken, policy_loss_from_log_probs
from ..objective import Aggregation

LOSS_MODE = "gspo_ops"
_WIDE = 0.01  # a clip range that GSPO's ratios never leave

# verl's aggregation: ours, and which count of the global batch divides
_AGGREGATIONS: dict[str, tuple[Aggregation, str | None]] = {
    "token-mean": ("token-mean", "batch_num_tokens"),
    "token-sum": ("token-sum", None),
    "seq-mean-token-sum": ("seq-mean-token-sum", "global_batch_size"),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum", "global_batch_size"),
    "seq-mean-token-mean": ("seq-mean-token-mean", "global_batch_size"),
}


def register() -> str:
    """Make the loss known to verl.

    Returns:
        Its name, for `actor_rollout_ref.actor.policy_loss.loss_mode`.

    Raises:
        ImportError: verl is not installed, or of a version without policy losses.
    """
    try:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
    except ImportError as error:
        raise ImportError(f"gspo_ops.integrations.verl is for verl 0.9: {error}") from None
    if LOSS_MODE not in POLICY_LOSS_REGISTRY:
        register_policy_loss(LOSS_MODE)(policy_loss)
    return LOSS_MODE


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GSPO with verl's signature; the counterpart of its own `"gspo"`.

        s_it = stop_grad(s_i) * pi_t / stop_grad(pi_t)
        loss = -agg(min(s_it A_it, clip(s_it) A_it))

    Args:
        old_log_prob: (B, T) float32 of the policy that sampled.
        log_prob: (B, T) of the policy that is trained.
        advantages: (B, T), one per token as verl has them, constant in a sequence or not.
        response_mask: (B, T) of 0 and 1.
        loss_agg_mode: one of verl's; `"seq-mean-token-mean"` is the paper's.
        config: verl's ActorConfig: `clip_ratio_low`, `clip_ratio_high`, `clip_ratio`, and
            `global_batch_info`, whose counts divide the loss as in verl.
        rollout_is_weights: (B, T) importance weights, detached.

    Returns:
        The loss, and metrics under verl's names and, with `gspo_ops/`, ours.

    Raises:
        ValueError: the aggregation is unknown, or its global count is missing.
    """
    if loss_agg_mode not in _AGGREGATIONS:
        known = ", ".join(map(repr, _AGGREGATIONS))
        raise ValueError(f"loss_agg_mode must be one of {known}, got {loss_agg_mode!r}")
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    low, high = (
        config.clip_ratio if of_side is None else of_side
        for of_side in (config.clip_ratio_low, config.clip_ratio_high)
    )
    if low > _WIDE:
        warnings.warn(
            f"clip_ratio_low={low:g} never clips a ratio of GSPO, whose paper has 3e-4 and 4e-4: "
            "set clip_ratio_low and clip_ratio_high",
            stacklevel=2,
        )
    aggregation, count = _AGGREGATIONS[loss_agg_mode]
    loss, stats = policy_loss_from_log_probs(
        log_prob,
        old_log_prob,
        advantages,
        mask=response_mask,
        objective=GSPOToken(clip_low=low, clip_high=high, aggregation=aggregation),
        rollout_weights=rollout_is_weights,
        denominator=_denominator(count, loss_agg_mode, config.global_batch_info, response_mask),
    )
    metrics = {
        "actor/pg_clipfrac": stats["clip_frac_tokens"].item(),
        "actor/ppo_kl": stats["approx_kl"].item(),
        "actor/pg_clipfrac_lower": 0.0,
    }
    ours = {f"gspo_ops/{name}": x.item() for name, x in stats.items() if x.ndim == 0}
    return loss, metrics | ours


def _denominator(
    count: str | None, mode: str, info: dict[str, Any], mask: Tensor
) -> float | Tensor | None:
    """What verl divides by: counts of the global batch, per data-parallel rank."""
    ranks = info.get("dp_size", 1)
    given = info.get(count) if count else 1
    if given is None and ranks > 1:
        raise ValueError(f"global_batch_info must have {count} with dp_size={ranks}")
    norm = 1
    if mode == "seq-mean-token-sum-norm":
        norm = info.get("loss_scale_factor") or mask.shape[-1]
    if given is None:  # counted here
        return None if norm == 1 else norm * (mask.sum(-1) > 0).sum().float().clamp(min=1)
    return given * norm / ranks
