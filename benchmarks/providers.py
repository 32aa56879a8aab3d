"""Ours, eager, compiled and peers behind one signature.

A method maps hidden (B, T, H), weight (V, H) and targets (B, T) to log-probs (B, T); a loss adds
old log-probs and advantages and returns GSPO's loss. Peers are imported when they are called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import gspo_ops
from gspo_ops import GSPO

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Provider(NamedTuple):
    """What computes it, and the distribution that it comes in (None: torch's or ours)."""

    compute: Callable[..., Tensor]
    distribution: str | None = None

    def missing(self) -> str | None:
        """Why it can't run here, or None."""
        if self.distribution is None:
            return None
        try:
            importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        try:
            importlib.import_module(_MODULES[self.distribution])
        except ImportError as error:
            return f"import fails: {error}"
        return None


_MODULES = {"trl": "trl.kernels", "liger-kernel": "liger_kernel.chunked_loss"}


def versions() -> dict[str, str]:
    """Of the peers' distributions."""
    found = {}
    for name in _MODULES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With fp32 logits."""
    return _gathered(hidden.float() @ weight.float().T, targets)


def eager_narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With logits in the inputs' dtype and a softmax in fp32, as most trainers have it."""
    return _gathered((hidden @ weight.T).float(), targets)


def _gathered(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def trl_selective(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden.float() @ weight.float().T, targets)


def trl_selective_narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(hidden @ weight.T, targets)


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
        None, 1.0, ("log_probs",),
    )  # fmt: skip
    return log_probs.view(targets.shape)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What LigerFusedLinearGRPOLoss calls for a chunk's log-probs."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden, weight, targets)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return gspo_ops.log_probs_from_hidden(hidden, weight, targets)


def gspo(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """GSPO as trainers write it, for (B, T) without padding."""
    ratio = (log_probs - old).mean(-1).exp()
    clipped = ratio.clamp(1 - GSPO().clip_low, 1 + GSPO().clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def loss_of(method: Method) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor
    ) -> Tensor:
        return gspo(method(hidden, weight, targets), old, advantages)

    return loss


def liger_loss(chunk_size: int) -> Loss:
    """Liger's fused loss, `chunk_size` sequences at a time.

    Its "grpo" reduction at the level of sequences is GSPO's. On a CPU its compiled form builds the
    loss anew at each call and is slower than the plain one: there it runs the plain one.
    """

    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor
    ) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        fused = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, chunk_size=chunk_size,
            epsilon_low=GSPO().clip_low, epsilon_high=GSPO().clip_high, loss_type="grpo",
            importance_sampling_level="sequence",
        )  # fmt: skip
        mask = torch.ones_like(targets)
        return fused(hidden, weight, targets, mask, advantages, old_per_token_logps=old)[0]

    return loss


def our_loss(plan: str) -> Loss:
    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor
    ) -> Tensor:
        return gspo_ops.policy_loss_from_hidden(
            hidden, weight, targets, old, advantages, plan=plan
        ).loss

    return loss


METHODS: dict[str, Provider] = {
    "eager, bf16 logits": Provider(eager_narrow),
    "TRL selective_log_softmax, bf16 logits": Provider(trl_selective_narrow, "trl"),
    "TRL ChunkedLogProbFunction": Provider(trl_chunked, "trl"),
    "Liger": Provider(liger, "liger-kernel"),
    "eager, fp32 logits": Provider(eager),
    "TRL selective_log_softmax, fp32 logits": Provider(trl_selective, "trl"),
    "gspo_ops": Provider(ours),
}

LOSSES: dict[str, Provider] = {
    "eager": Provider(loss_of(eager)),
    "torch.compile": Provider(torch.compile(loss_of(eager), dynamic=False)),
    "TRL selective_log_softmax": Provider(loss_of(trl_selective), "trl"),
    "TRL ChunkedLogProbFunction": Provider(loss_of(trl_chunked), "trl"),
    "Liger, chunk_size=1": Provider(liger_loss(1), "liger-kernel"),
    "Liger, chunk_size=32": Provider(liger_loss(32), "liger-kernel"),
    "eager, logits as the inputs": Provider(loss_of(eager_narrow)),
    "gspo_ops": Provider(our_loss("auto")),
    "gspo_ops, plan=keep": Provider(our_loss("keep")),
    "gspo_ops, plan=chunk": Provider(our_loss("chunk")),
    "gspo_ops, plan=recompute": Provider(our_loss("recompute")),
}
DEFAULT_LOSSES = tuple(LOSSES)[:8]
