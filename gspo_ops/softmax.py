"""Log-probs of targets: options, inputs and gradients of each row, and its mathematics.

A row is split into its target y and the others, whose probability q = 1 - p_y has log-odds d
against the target's: see `kernels/logits.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_bool, check_number
from .parallel import ProcessGroup, group_name


class Softmax(NamedTuple):
    """Options of a distribution over a vocabulary.

    Attributes:
        temperature: divides the soft-capped logits.
        softcap: soft cap of the logits; None for none.
        return_entropy: whether the entropy is requested as well.
        vocab_group: name of the ranks' group if the vocabulary is sharded; targets are then local.
    """

    temperature: float
    softcap: float | None
    return_entropy: bool
    vocab_group: str | None

    @property
    def scale(self) -> float:
        """The scale of exponents of powers of two."""
        return math.log2(math.e) / self.temperature


def checked_softmax(
    temperature: float,
    softcap: float | None,
    vocab_group: ProcessGroup | None,
    return_entropy: bool,
) -> Softmax:
    """Return the options; refuse a temperature or soft cap out of range, and an invalid group."""
    check_number("temperature", temperature, minimum=0.0, exclusive=True)
    if softcap is not None:
        check_number("softcap", softcap, minimum=0.0, exclusive=True)
    check_bool("return_entropy", return_entropy)
    return Softmax(temperature, softcap, return_entropy, group_name("vocab_group", vocab_group))


class TargetRows(NamedTuple):
    """The token that each row predicts, (N,) or (B, T), and a mask: non-zero where it counts."""

    targets: Tensor
    mask: Tensor | None


class Upstream(NamedTuple):
    """The upstream gradients of each row.

        d loss / d log_prob = log_probs * grad_loss * inv_denominator,  d loss / d entropy = entropy

    Attributes:
        entropy: None if the entropy has no gradient.
        grad_loss, inv_denominator: 0-dim; None for 1.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    grad_loss: Tensor | None = None
    inv_denominator: Tensor | None = None

    def scale(self) -> Tensor | None:
        """Return the factor of log_probs; None for 1."""
        if self.grad_loss is None or self.inv_denominator is None:
            return None
        return self.grad_loss * self.inv_denominator

    def flat(self) -> Upstream:
        """Return the same gradients, flattened to (N,) rows."""
        entropy = None if self.entropy is None else self.entropy.reshape(-1).contiguous()
        return self._replace(log_probs=self.log_probs.reshape(-1).contiguous(), entropy=entropy)


class LogOdds(NamedTuple):
    """Log-odds d + error of all other tokens against the target: a number and its rounding error.

    Attributes:
        error: None if it is unknown.
    """

    d: Tensor
    error: Tensor | None = None

    def log_p(self) -> Tensor:
        """Return the log-probability of the target."""
        return _minus_softplus(self.d, self.error)

    def log_q(self) -> Tensor:
        """Return the log-probability of all others."""
        return _minus_softplus(-self.d, None if self.error is None else -self.error)

    def q(self) -> Tensor:
        """Return the probability of all others.

        On a CPU, the rounding of torch.sigmoid would depend on an element's position.
        """
        return (1.0 + (-self.d).exp()).reciprocal()

    def entropy(self, log_p: Tensor, row_sum: Tensor, mean_log: Tensor) -> Tensor:
        """Return the row's entropy, from the sum of the others' exponentials and their mean log."""
        log_q = self.log_q()
        others = row_sum.log() - mean_log - log_q
        return times_exp(log_q, others) - times_exp(log_p, log_p)


def sum_with_error(a: Tensor, b: Tensor) -> LogOdds:
    """Return a + b, and the rounding error of that sum (Knuth)."""
    d = a + b
    b_part = d - a
    return LogOdds(d, (a - (d - b_part)) + (b - b_part))


def _minus_softplus(d: Tensor, error: Tensor | None) -> Tensor:
    y = d.abs().neg().exp().log1p()
    if error is not None:
        y = y + torch.where((d > 0) & (error.abs() < 1), error, 0.0)
    return 0.0 - (d.clamp(min=0) + y)


def times_exp(log_p: Tensor, x: Tensor) -> Tensor:
    """Return exp(log_p) * x, 0 where log_p is -inf."""
    return (log_p.exp() * x).masked_fill(log_p == -math.inf, 0.0)
