"""Objectives: which ratio, which clip range, which average. No tensors, no mathematics."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from .checks import check_choice, check_number

RatioLevel = Literal["sequence", "sequence_token", "token"]
Aggregation = Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum"]
KLEstimator = Literal["k1", "k2", "k3"]
RATIO_LEVELS, AGGREGATIONS, KL_ESTIMATORS = map(get_args, (RatioLevel, Aggregation, KLEstimator))


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A clipped policy-gradient objective.

    For each token: `min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`, minus
    `kl_coef` times the KL estimate to the reference, averaged as `aggregation` says.

    Finite inputs have a finite loss and, with a denominator of 1 or more, a finite gradient by the
    log-probs. A log-ratio beyond +-80 counts as +-80 in its ratio, and what the dtype cannot hold
    counts as its largest number: a token's term and its derivative, both divided by the length of
    the sequence for `"seq-mean-token-mean"`, and the loss.

    Args:
        ratio_level: `"sequence"` one length-normalised ratio per sequence (GSPO);
            `"sequence_token"` the same value, with each token's own gradient and advantage
            (GSPO-token); `"token"` one ratio per token (GRPO, PPO).
        clip_low, clip_high: width of the clip range below and above 1, both >= 0.
        aggregation: `"seq-mean-token-mean"` (the paper's), `"token-mean"`, `"seq-mean-token-sum"`
            or `"token-sum"`.
        kl_coef: weight of the KL term, >= 0; needs `ref_log_probs` when positive.
        kl_estimator: with d = log_prob - ref_log_prob: `"k1"` d, `"k2"` d**2 / 2, `"k3"`
            exp(-d) - 1 + d; each is differentiated as written.

    Raises:
        ValueError: an option is outside its range.
    """

    ratio_level: RatioLevel
    clip_low: float
    clip_high: float
    aggregation: Aggregation = "seq-mean-token-mean"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for name in ("clip_low", "clip_high", "kl_coef"):
            check_number(name, getattr(self, name), minimum=0.0)
        weights_by_length = self.ratio_level == "sequence" and self.aggregation.startswith("token")
        if weights_by_length and not torch.compiler.is_compiling():  # which can't trace a warning
            # Python shows one warning per place and message
            warnings.warn(
                f"aggregation={self.aggregation!r} weights sequences by their length; the GSPO "
                "paper's objective is 'seq-mean-token-mean'",
                stacklevel=4,
            )


@dataclass(frozen=True, kw_only=True)
class GSPO(Objective):
    """Group Sequence Policy Optimization, arXiv 2507.18071, with the paper's clip range."""

    ratio_level: RatioLevel = field(default="sequence", init=False)
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass(frozen=True, kw_only=True)
class GSPOToken(Objective):
    """GSPO-token, arXiv 2507.18071 section 4.3: GSPO that takes per-token advantages."""

    ratio_level: RatioLevel = field(default="sequence_token", init=False)
    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclass(frozen=True, kw_only=True)
class GRPO(Objective):
    """Group Relative Policy Optimization with the clip range that the GSPO paper compares to."""

    ratio_level: RatioLevel = field(default="token", init=False)
    clip_low: float = 0.2
    clip_high: float = 0.27
