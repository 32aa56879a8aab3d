"""The measured quantities, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The worst allowed value of each quantity is the contract's, except for loss and entropy, which it
# leaves open. "ulp" counts steps of the gradient's dtype. "allowed" is `ALLOWED` times the error of
# eager with fp32 logits and products; in fp32, for a real model's head, it is twice that error: the
# error of fp32 products depends on the size of hidden states and weight, not on the logits alone.
BOUNDS = {
    "log_prob": 2e-6,
    "entropy": 1e-5,
    "ratio": 1e-6,
    "loss": 4e-6,
    # An error e of log-probs moves ratios by e (relatively), the mean of k1 by e, that of k3 by 3 e
    # at most (as |exp(d) - 1| <= 1 + 2 k3), the effective sample size by 4 e, and estimates of the
    # KL to a reference, at the distances and ratios of the cases, by less. From given log-probs, e
    # is the rounding of a log-ratio and of its exponential, 5e-7.
    "statistics": 4 * 2e-6,
    "statistics of log_probs": 4 * 5e-7,
    "statistics from hidden": 4 * 4e-6,
    "statistics from hidden / allowed": 4,
    "clip and active fractions": 1e-6,  # rounding; with one more or fewer of N, it would be 1 / N
    "clip decisions flipped": 0,
    "on-policy ratio - 1": 0,
    "on-policy clipped": 0,
    "on-policy KL": 0,
    "grad at target, rel L2": 2e-6,
    "grad elsewhere, rel L2": 2e-6,
    "grad row sum / g": 1e-5,
    "grad, ulp": 1,
    "grad of log_probs, rel L2": 2e-6,
    "non-zeros in dead rows": 0,
    "bits that differ on repeat": 0,
    "log_prob from hidden": 4e-6,
    "log_prob from hidden / allowed": 1,
    "entropy from hidden": 2e-5,
    "ratio of a few tokens": 4e-6,  # for one token, the bound of its log_prob
    "ratio of a few tokens / allowed": 1,
    "dhidden, rel L2": 5e-6,
    "dweight, rel L2": 5e-6,
    "dbias, rel L2": 5e-6,
    "dlora_a, rel L2": 5e-6,
    "dlora_b, rel L2": 5e-6,
    "dhidden / allowed": 1,
    "dweight / allowed": 1,
    "dbias / allowed": 1,
    "dlora_a / allowed": 1,
    "dlora_b / allowed": 1,
    "ratio, plans apart": 1e-6,
    "plans apart, rel L2": 5e-6,
    "plans apart / allowed": 1,
    "ratio, logits op apart": 1e-6,
    "logits op apart, rel L2": 5e-6,
    "logits op apart / allowed": 1,
}
# Exponentials or hidden states, the products of a CPU, and the result are each rounded to 16 bits.
# The error is sqrt(3) times that of one rounding, and somewhat more if there are few elements.
ALLOWED = 2.0
# Tensor cores truncate their sums of 16-bit products: the log-prob of a sampled token may be off by
# this much per element of a hidden state.
CUT_OFF = 1.2e-8
FEW = 4  # the errors of log-probs do not average out over fewer tokens


def log_prob_from_hidden(H: int) -> float:
    """Return the bound for a sampled token from H-element 16-bit hidden states, on tensor cores."""
    return max(BOUNDS["log_prob from hidden"], CUT_OFF * H)


@dataclass(frozen=True)
class Measured:
    """One quantity of one op on one case, beside its bound."""

    op: str
    dtype: torch.dtype
    case: str
    quantity: str
    value: float

    @property
    def bound(self) -> float:
        return BOUNDS[self.quantity]

    @property
    def ok(self) -> bool:
        return self.value <= self.bound  # False for NaN
