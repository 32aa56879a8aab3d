"""Objectives: the ratio, its surrogate, further terms and the average, without any tensors."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from .checks import check_choice, check_number

RatioLevel = Literal["sequence", "sequence_token", "sequence_shared", "geometric", "token"]
Surrogate = Literal["clipped", "weighted", "soft"]
Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum"]
KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]
KLWeight = Literal["one", "ratio", "ratio_detached"]
AGGREGATIONS = get_args(Aggregation)
_CHOICES = {
    "ratio_level": get_args(RatioLevel),
    "surrogate": get_args(Surrogate),
    "aggregation": AGGREGATIONS,
    "kl_estimator": get_args(KLEstimator),
    "kl_weight": get_args(KLWeight),
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy-gradient objective: for each token, a surrogate of its ratio r and advantage A.

        loss_t = -surrogate(r_t, A_t) * rollout_weight_t + kl_coef * kl_t - entropy_coef * H_t

    These terms are averaged as `aggregation` says.

    Finite inputs have a finite loss and, with a denominator of 1 or more, a finite gradient with
    respect to the log-probs. A log-ratio beyond +-80 counts as +-80 in its ratio. A value that the
    dtype cannot hold counts as its largest number; this applies to a token's term and to its
    derivative, both divided by the length of the sequence for `"seq-mean-token-mean"`, and to the
    loss.

    Args:
        ratio_level: `"sequence"`: one length-normalised ratio per sequence (GSPO).
            `"sequence_token"`: the same value, with each token's own gradient and advantage
            (GSPO-token). `"sequence_shared"`: the same value, with advantages per token whose
            gradient flows through the one ratio that the tokens share. `"geometric"`: one ratio per
            sequence, from log-ratios that are clipped token by token (GMPO, arXiv 2507.20673).
            `"token"`: one ratio per token (GRPO, PPO).
        surrogate: `"clipped"`: min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) (PPO, arXiv
            1707.06347). `"weighted"`: clip(r, 1 - clip_low, 1 + clip_high) * A * log_prob, with the
            clipped ratio as a constant (CISPO, arXiv 2506.13585; unclipped, REINFORCE with
            importance weights). `"soft"`: 4 / tau * sigmoid(tau * (r - 1)) * A, where the sign of A
            selects tau (SAPO, arXiv 2511.20347).
        clip_low: width of the clip range below 1, >= 0; by default nothing is clipped.
        clip_high: width of the clip range above 1, >= 0; by default nothing is clipped.
        dual_clip: for A < 0, the largest value of r in the `"clipped"` surrogate, with no gradient
            beyond it (dual clip, arXiv 1912.09729); at least 1 + clip_high.
        soft_temperature_pos: tau for A > 0, > 0.
        soft_temperature_neg: tau for the other advantages, > 0.
        aggregation: `"seq-mean-token-mean"` (GSPO's), `"token-mean"`, `"seq-mean-token-sum"`
            or `"token-sum"`.
        kl_coef: weight of the KL term, >= 0; needs `ref_log_probs` when positive.
        kl_estimator: with d = log_prob - ref_log_prob: `"k1"` is d, `"k2"` is d**2 / 2, `"k3"` is
            exp(-d) - 1 + d, `"abs"` is |d|. Each is differentiated as written, except `"k1+"` and
            `"k3+"`, whose derivative is that of k2.
        kl_weight: `"one"`; `"ratio"` multiplies a token's estimate by its unclipped ratio and
            differentiates both (arXiv 2512.02556); `"ratio_detached"` stops the gradient through
            the ratio.
        kl_input_clamp: d is clamped to +- this, with no gradient beyond it, except for `"k1+"` and
            `"k3+"`, whose derivative is not clamped; > 0, by default infinite.
        kl_output_clamp: the same for the estimate.
        entropy_coef: weight of the entropy bonus, >= 0, for losses from logits or hidden states.

    Raises:
        ValueError: an option is outside its range, or cannot be combined with another.
    """

    ratio_level: RatioLevel
    surrogate: Surrogate = "clipped"
    clip_low: float = 1.0
    clip_high: float = math.inf
    dual_clip: float = math.inf
    soft_temperature_pos: float = 1.0
    soft_temperature_neg: float = 1.05
    aggregation: Aggregation = "seq-mean-token-mean"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_weight: KLWeight = "one"
    kl_input_clamp: float = math.inf
    kl_output_clamp: float = math.inf
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("clip_low", "kl_coef", "entropy_coef"):
            check_number(name, getattr(self, name), minimum=0.0)
        check_number("clip_high", self.clip_high, minimum=0.0, may_be_infinite=True)
        for name in ("soft_temperature_pos", "soft_temperature_neg"):
            check_number(name, getattr(self, name), minimum=0.0, exclusive=True)
        for name in ("kl_input_clamp", "kl_output_clamp"):
            check_number(
                name, getattr(self, name), minimum=0.0, exclusive=True, may_be_infinite=True
            )
        check_number("dual_clip", self.dual_clip, minimum=1 + self.clip_high, may_be_infinite=True)
        self._check_combination()
        if (
            self._weights_by_length() and not torch.compiler.is_compiling()
        ):  # torch.compile cannot trace a warning
            # Python shows one warning per place and message
            warnings.warn(
                f"aggregation={self.aggregation!r} weights sequences by their length; the GSPO "
                "paper's objective is 'seq-mean-token-mean'",
                stacklevel=4,
            )

    def _check_combination(self) -> None:
        if self.surrogate != "clipped" and self.dual_clip < math.inf:
            raise ValueError(f"dual_clip has no meaning for surrogate={self.surrogate!r}")
        if self.surrogate == "soft" and (self.clip_low, self.clip_high) != (1.0, math.inf):
            raise ValueError("clip_low and clip_high have no meaning for surrogate='soft'")
        if self.ratio_level == "geometric":
            if self.surrogate != "clipped" or self.dual_clip < math.inf:
                raise ValueError(
                    "ratio_level='geometric' clips each token's log-ratio: surrogate must be "
                    "'clipped', without a dual_clip"
                )
            if self.kl_weight != "one":
                raise ValueError(
                    "kl_weight must be 'one' for ratio_level='geometric', which has no unclipped "
                    f"ratio, got {self.kl_weight!r}"
                )

    def _weights_by_length(self) -> bool:
        is_of_sequence = self.ratio_level in ("sequence", "sequence_shared", "geometric")
        return (
            is_of_sequence and self.surrogate != "weighted" and self.aggregation.startswith("token")
        )

    def needs_advantage(self) -> bool:
        """Return whether a token without an advantage has no gradient."""
        return self.kl_coef == 0 and self.entropy_coef == 0


def log_clip_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Return the clip range of the log-ratio, which resolves it better than the ratio does."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def aggregation_of(objective: object) -> Aggregation:
    """Return how an objective, or a function as objective, averages its terms."""
    if isinstance(objective, Objective):
        return objective.aggregation
    if not callable(objective) or isinstance(objective, type):
        got = repr(objective) if isinstance(objective, type) else type(objective).__name__
        raise TypeError(
            "objective must be an Objective, as in GSPO(), or a function of (log_probs, "
            f"old_log_probs, advantages, sequence_ids), got {got}"
        )
    aggregation: Any = getattr(objective, "aggregation", "seq-mean-token-mean")
    check_choice("aggregation", aggregation, AGGREGATIONS)
    return aggregation


@dataclass(frozen=True, kw_only=True)
class GSPO(Objective):
    """Group Sequence Policy Optimization, arXiv 2507.18071, with the paper's clip range."""

    ratio_level: RatioLevel = field(default="sequence", init=False)
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass(frozen=True, kw_only=True)
class GSPOToken(Objective):
    """GSPO-token, arXiv 2507.18071, section 4.3: GSPO with advantages per token."""

    ratio_level: RatioLevel = field(default="sequence_token", init=False)
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass(frozen=True, kw_only=True)
class GRPO(Objective):
    """Group Relative Policy Optimization, with the clip range of the GSPO paper's comparison."""

    ratio_level: RatioLevel = field(default="token", init=False)
    clip_low: float = 0.2
    clip_high: float = 0.27


@dataclass(frozen=True, kw_only=True)
class GMPO(Objective):
    """Geometric-Mean Policy Optimization, arXiv 2507.20673: log-ratios are clipped to +-0.4."""

    ratio_level: RatioLevel = field(default="geometric", init=False)
    clip_low: float = -math.expm1(-0.4)
    clip_high: float = math.expm1(0.4)


@dataclass(frozen=True, kw_only=True)
class CISPO(Objective):
    """CISPO, arXiv 2506.13585: importance weights are clipped to at most 5 (arXiv 2510.13786)."""

    ratio_level: RatioLevel = "token"
    surrogate: Surrogate = field(default="weighted", init=False)
    clip_high: float = 4.0
    aggregation: Aggregation = "token-mean"


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """Soft Adaptive Policy Optimization, arXiv 2511.20347, with the paper's temperatures."""

    ratio_level: RatioLevel = "token"
    surrogate: Surrogate = field(default="soft", init=False)
