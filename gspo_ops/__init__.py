"""Fused kernels for policy-gradient losses of language models: GSPO and its relatives."""

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
from .objective import CISPO, GMPO, GRPO, GSPO, SAPO, GSPOToken, Objective
from .parallel import global_denominator
from .plan import Plan, plan_from_hidden
from .weights import importance_weights, off_policy_weights, top_entropy_weights

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "SAPO",
    "GSPOToken",
    "LoRA",
    "Objective",
    "Plan",
    "PolicyLoss",
    "global_denominator",
    "group_advantages",
    "importance_weights",
    "log_probs_from_hidden",
    "log_probs_from_logits",
    "off_policy_weights",
    "plan_from_hidden",
    "policy_loss_from_hidden",
    "policy_loss_from_log_probs",
    "policy_loss_from_logits",
    "reference",
    "top_entropy_weights",
]
