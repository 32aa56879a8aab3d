"""Fused kernels for sequence-level policy-gradient losses: GSPO, GSPO-token, GRPO."""

from . import reference
from .advantages import group_advantages
from .head import LoRA
from .log_probs import log_probs_from_hidden, log_probs_from_logits
from .losses import (
    PolicyLoss,
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
)
from .objective import GRPO, GSPO, GSPOToken, Objective
from .parallel import global_denominator
from .plan import Plan, plan_from_hidden

__version__ = "0.1.0"

__all__ = [
    "GRPO",
    "GSPO",
    "GSPOToken",
    "LoRA",
    "Objective",
    "Plan",
    "PolicyLoss",
    "global_denominator",
    "group_advantages",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "plan_from_hidden",
    "policy_loss_from_hidden",
    "policy_loss_from_log_probs",
    "policy_loss_from_logits",
    "reference",
]
