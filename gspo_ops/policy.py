"""A policy: the arguments of a loss besides log-probs, checked and flattened for operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_bool, check_constant, check_log_probs, check_number, check_tensor
from .layout import Layout, Sequences
from .objective import (
    Aggregation,
    KLEstimator,
    KLWeight,
    Objective,
    RatioLevel,
    Surrogate,
    log_clip_range,
)
from .operators import scalar
from .parallel import ProcessGroup, group_name


class ObjectiveOptions(NamedTuple):
    """An `Objective` without its checks."""

    ratio_level: RatioLevel
    surrogate: Surrogate
    aggregation: Aggregation
    kl_estimator: KLEstimator
    kl_weight: KLWeight
    clip_low: float
    clip_high: float
    dual_clip: float
    soft_temperature_pos: float
    soft_temperature_neg: float
    kl_coef: float
    kl_input_clamp: float
    kl_output_clamp: float
    entropy_coef: float

    @classmethod
    def of(cls, objective: Objective) -> ObjectiveOptions:
        return cls(*[getattr(objective, name) for name in cls._fields])

    def shares_gradient(self) -> bool:
        """Return whether gradients need a sum over the sequence, which depends on its ratio."""
        through_surrogate = self.ratio_level == "sequence_shared" and self.surrogate != "weighted"
        through_kl = self.ratio_level in ("sequence", "sequence_shared") and (
            self.kl_coef > 0 and self.kl_weight == "ratio"
        )
        return through_surrogate or through_kl

    def needs_advantage(self) -> bool:
        """Return whether a token without an advantage has no gradient."""
        return self.kl_coef == 0 and self.entropy_coef == 0

    def log_clip_range(self) -> tuple[float, float]:
        return log_clip_range(self.clip_low, self.clip_high)


class Policy(NamedTuple):
    """The arguments of a loss besides log-probs, all of one dtype.

    Attributes:
        old_log_probs, ref_log_probs: (N,).
        advantages, rollout_weights: (B,), or (N,) if a flag says that they are per token.
        denominator: 0-dim; None for the count that the aggregation implies.
        context_group: name of the group of ranks that hold other tokens of the same sequences.
        returns_log_probs: whether log-probs are requested besides the loss.
    """

    sequences: Sequences
    objective: ObjectiveOptions
    old_log_probs: Tensor | None
    advantages: Tensor
    ref_log_probs: Tensor | None
    rollout_weights: Tensor | None
    denominator: Tensor | None
    advantage_per_token: bool
    rollout_weight_per_token: bool
    context_group: str | None
    returns_log_probs: bool

    def reads_log_probs(self) -> bool:
        """Return False if on-policy, where every ratio is 1 and g is known beforehand."""
        return (
            self.old_log_probs is not None
            or self.ref_log_probs is not None
            or self.objective.surrogate == "weighted"  # its value contains the log-prob
            or self.returns_log_probs
        )

    def rows_with_gradient(self) -> Tensor | None:
        """Return a mask of the rows that may have a gradient, as far as known; None for all."""
        mask = self.sequences.mask
        is_shared = self.advantage_per_token and self.objective.shares_gradient()
        if is_shared or not self.objective.needs_advantage():
            return mask
        has_advantage = self.advantages != 0
        if not self.advantage_per_token:
            has_advantage = has_advantage[self.sequences.ids(self.advantages.device)]
        return has_advantage if mask is None else has_advantage & (mask != 0)

    def with_advantages(self, advantages: Tensor) -> Policy:
        """Return a copy with other advantages; an older torch.compile cannot trace `_replace`."""
        return Policy(
            self.sequences,
            self.objective,
            self.old_log_probs,
            advantages,
            self.ref_log_probs,
            self.rollout_weights,
            self.denominator,
            self.advantage_per_token,
            self.rollout_weight_per_token,
            self.context_group,
            self.returns_log_probs,
        )

    def part(self, sequences: slice, rows: slice) -> Policy:
        """Return the policy of some sequences, without a denominator, which g does not contain."""

        def of_rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        def either(x: Tensor, per_token: bool) -> Tensor:
            return x[rows if per_token else sequences]

        cu_seqlens, weights = self.sequences.cu_seqlens, self.rollout_weights
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens[sequences.start : sequences.stop + 1] - rows.start
        if weights is not None:
            weights = either(weights, self.rollout_weight_per_token)
        return self._replace(
            sequences=Sequences(
                rows=rows.stop - rows.start,
                batch=sequences.stop - sequences.start,
                cu_seqlens=cu_seqlens,
                mask=of_rows(self.sequences.mask),
            ),
            old_log_probs=of_rows(self.old_log_probs),
            advantages=either(self.advantages, self.advantage_per_token),
            ref_log_probs=of_rows(self.ref_log_probs),
            rollout_weights=weights,
            denominator=None,
        )


class LossAndGrad(NamedTuple):
    """The loss of a policy and log-probs, and its gradients."""

    loss: Tensor  # 0-dim
    stats: Tensor  # (len(STATS),)
    log_ratio: Tensor  # (B,)
    g: Tensor  # (N,) d (loss * D) / d log_prob
    h: Tensor  # (N,) d (loss * D) / d entropy; (0,) without an entropy bonus
    inv_denominator: Tensor  # 0-dim 1 / D


def make_policy(
    layout: Layout,
    dtype: torch.dtype,
    objective: ObjectiveOptions,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    denominator: float | Tensor | None,
    context_group: ProcessGroup | None,
    return_log_probs: bool = False,
) -> Policy:
    """Check and flatten the arguments that all losses share."""
    check_bool("return_log_probs", return_log_probs)
    is_part = context_group is not None
    old = _flat_log_probs("old_log_probs", old_log_probs, layout, dtype)
    ref = _flat_log_probs("ref_log_probs", ref_log_probs, layout, dtype)
    if objective.kl_coef > 0 and ref is None:
        raise ValueError(f"ref_log_probs is needed for kl_coef={objective.kl_coef:g}")
    advantages, per_token = layout.per_sequence_or_token(
        "advantages", advantages, dtype, is_part=is_part
    )
    if per_token and objective.ratio_level in ("sequence", "geometric"):
        raise ValueError(
            f"advantages must have shape {(layout.sequences.batch,)} for ratio_level="
            f"{objective.ratio_level!r}, got one per token: use GSPOToken or "
            "ratio_level='sequence_shared' for these"
        )
    weight_per_token = False
    if rollout_weights is not None:
        rollout_weights, weight_per_token = layout.per_sequence_or_token(
            "rollout_weights", rollout_weights, dtype, is_part=is_part
        )
    return Policy(
        sequences=layout.sequences,
        objective=objective,
        old_log_probs=old,
        advantages=advantages,
        ref_log_probs=ref,
        rollout_weights=rollout_weights,
        denominator=_denominator_tensor(denominator, layout, dtype),
        advantage_per_token=per_token,
        rollout_weight_per_token=weight_per_token,
        context_group=group_name("context_group", context_group),
        returns_log_probs=return_log_probs,
    )


def _flat_log_probs(
    name: str, x: Tensor | None, layout: Layout, dtype: torch.dtype
) -> Tensor | None:
    if x is None:
        return None
    check_log_probs(name, x)
    return layout.flat_float(name, x, dtype)


def _denominator_tensor(
    denominator: float | Tensor | None, layout: Layout, dtype: torch.dtype
) -> Tensor | None:
    if denominator is None:
        return None
    if not isinstance(denominator, Tensor):
        check_number("denominator", denominator, minimum=0.0, exclusive=True)
        return scalar(denominator, dtype, layout.device)
    check_tensor("denominator", denominator, layout.device)
    check_constant("denominator", denominator)
    if denominator.ndim != 0:
        raise ValueError(
            f"denominator must be a number or a 0-dim tensor, got {tuple(denominator.shape)}"
        )
    return denominator.to(dtype)
