"""The accuracy checks behind the tests, the benchmarks and `gspo-ops verify`.

Inputs are realistic: targets are sampled from the logits, and old log-probs are so close to the new
ones that the ratios straddle both clip edges, a few 1e-6 to either side. Everything is compared
with `gspo_ops.reference` in float64 on identical inputs. The ops from hidden states are measured
with every plan, and their 16-bit gradients against those of eager PyTorch with fp32 logits.
"""

from .bounds import ALLOWED, BOUNDS, Measured
from .cases import (
    FURTHER_OBJECTIVES,
    OBJECTIVES,
    Case,
    HeadTensors,
    log_ratios,
    make_case,
    said,
    sample,
    synthetic_head,
    synthetic_logits,
)
from .errors import differing, grad_errors, largest, non_zeros, relative, ulp_distance, worst
from .interpreter import patch_interpreter
from .verification import measure, table, verify, worst_of

__all__ = [
    "ALLOWED",
    "BOUNDS",
    "FURTHER_OBJECTIVES",
    "OBJECTIVES",
    "Case",
    "HeadTensors",
    "Measured",
    "differing",
    "grad_errors",
    "largest",
    "log_ratios",
    "make_case",
    "measure",
    "non_zeros",
    "patch_interpreter",
    "relative",
    "said",
    "sample",
    "synthetic_head",
    "synthetic_logits",
    "table",
    "ulp_distance",
    "verify",
    "worst",
    "worst_of",
]
