"""Ours, eager, compiled and peers behind one signature.

A method maps operands (logits, or hidden states and the head's weight) and targets (B, T) to
log-probs (B, T); a loss maps operands and a batch to GSPO's loss. Peers are imported when they are
called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gspo_ops
from gspo_ops import GSPO

from .workloads import Batch

Method = Callable[..., Tensor]
Loss = Callable[[tuple[Tensor, ...], Batch], Tensor]


class Provider(NamedTuple):
    """Attributes:
    compute: the method or loss.
    module: module that it needs, and after a colon a name that the module must have; None if it
        needs no peer.
    gpu: whether it needs a GPU.
    capability: the only compute capability of NVIDIA GPUs on which it runs, or None for any.
    """

    compute: Callable[..., Tensor]
    module: str | None = None
    gpu: bool = False
    capability: tuple[int, int] | None = None

    def missing(self, device: torch.device) -> str | None:
        """Return the reason why it cannot run on the device, or None."""
        if self.gpu and device.type != "cuda":
            return "needs a GPU"
        if self.capability is not None and _capability(device) != self.capability:
            return f"needs sm_{self.capability[0]}{self.capability[1]}"
        if self.module is None:
            return None
        module, _, attribute = self.module.partition(":")
        if installed(DISTRIBUTIONS.get(module.split(".")[0], "torch")) is None:
            return "not installed"
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            return f"import fails: {error}"
        return None if not attribute or hasattr(found, attribute) else f"not in {module}"


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


DISTRIBUTIONS = {
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    "verl": "verl",
    "cut_cross_entropy": "cut-cross-entropy",
}


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of the peers' distributions."""
    return {name: installed(name) or "not installed" for name in DISTRIBUTIONS.values()}


# Log-probs from logits


def gathered(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probs in the logits' dtype."""
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def gathered_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    return gathered(logits.float(), targets)


def trl_selective(logits: Tensor, targets: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, targets)


# Log-probs from hidden states


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probs from fp32 logits."""
    return gathered(hidden.float() @ weight.float().T, targets)


def eager_narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute log-probs with logits in the inputs' dtype and a softmax in fp32, as trainers do."""
    return gathered_fp32(hidden @ weight.T, targets)


def trl_selective_fp32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return trl_selective(hidden.float() @ weight.float().T, targets)


def trl_selective_narrow(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return trl_selective(hidden @ weight.T, targets)


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE,
        None, 1.0, ("log_probs",),
    )  # fmt: skip
    return log_probs.view(targets.shape)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call what LigerFusedLinearGRPOLoss calls for a chunk's log-probs."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden, weight, targets)


def liger_sm90(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden.flatten(0, 1), weight, targets.flatten()
    )
    return -nll.view(targets.shape)


def verl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call verl's Triton kernels on a GPU, and its chunks of 512 tokens elsewhere."""
    if hidden.is_cuda:
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0].view(targets.shape)
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(hidden, weight, targets)[0]


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)


def torch_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    nll = torch.nn.functional.linear_cross_entropy(  # torch >= 2.13
        hidden.flatten(0, 1), weight, targets.flatten(), reduction="none"
    )
    return -nll.view(targets.shape)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return gspo_ops.log_probs_from_hidden(hidden, weight, targets)


# Losses


def gspo(log_probs: Tensor, batch: Batch) -> Tensor:
    """Compute GSPO's loss as trainers write it."""
    log_ratio = torch.where(batch.mask, log_probs - batch.old, 0.0).sum(-1) / batch.mask.sum(-1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - GSPO().clip_low, 1 + GSPO().clip_high)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()


def loss_of(method: Method) -> Loss:
    def loss(operands: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return gspo(method(*operands, batch.targets), batch)

    return loss


def compiled(loss: Loss) -> Loss:
    return torch.compile(loss, dynamic=False)


def liger_triton(operands: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """Call Liger's Triton kernels, which take one more row of logits than there are targets."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(
        torch.nn.functional.pad(operands[0], (0, 0, 0, 1)), batch.old, None, batch.targets,
        batch.advantages, batch.mask, temperature=1.0, beta=0.0, eps_low=GSPO().clip_low,
        eps_high=GSPO().clip_high, inplace=False, loss_type="grpo",
        importance_sampling_level="sequence", reduce=True,
    )[0]  # fmt: skip


def liger_chunked(chunk_size: int) -> Loss:
    """Return Liger's fused loss, which takes `chunk_size` sequences at a time.

    Its "grpo" reduction at the level of sequences is GSPO's. On a CPU, the plain form is run: the
    compiled one is rebuilt at each call and is slower.
    """

    def loss(operands: tuple[Tensor, ...], batch: Batch) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        hidden, weight = operands
        fused = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, chunk_size=chunk_size,
            epsilon_low=GSPO().clip_low, epsilon_high=GSPO().clip_high, loss_type="grpo",
            importance_sampling_level="sequence",
        )  # fmt: skip
        return fused(
            hidden, weight, batch.targets, batch.mask.long(), batch.advantages,
            old_per_token_logps=batch.old,
        )[0]  # fmt: skip

    return loss


def our_loss(operands: tuple[Tensor, ...], batch: Batch) -> Tensor:
    (logits,) = operands
    return gspo_ops.policy_loss_from_logits(
        logits, batch.targets, batch.old, batch.advantages, mask=batch.mask
    ).loss


def our_loss_from_hidden(**options: Any) -> Loss:
    def loss(operands: tuple[Tensor, ...], batch: Batch) -> Tensor:
        hidden, weight = operands
        return gspo_ops.policy_loss_from_hidden(
            hidden, weight, batch.targets, batch.old, batch.advantages, mask=batch.mask, **options
        ).loss

    return loss


BASELINE, OURS = "eager", "gspo_ops"
_SM90 = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"

METHODS: dict[str, Provider] = {
    "eager, bf16 logits": Provider(eager_narrow),
    "TRL selective_log_softmax, bf16 logits": Provider(trl_selective_narrow, "trl.trainer.utils"),
    "TRL ChunkedLogProbFunction": Provider(trl_chunked, "trl.kernels"),
    "Liger": Provider(liger, "liger_kernel.chunked_loss"),
    "eager, fp32 logits": Provider(eager),
    "TRL selective_log_softmax, fp32 logits": Provider(trl_selective_fp32, "trl.trainer.utils"),
    "gspo_ops": Provider(ours),
}

# The first provider is the baseline of the others.
LOSSES: dict[str, dict[str, Provider]] = {
    "logits": {
        BASELINE: Provider(loss_of(gathered_fp32)),
        "torch.compile": Provider(compiled(loss_of(gathered_fp32))),
        "eager, softmax in input dtype": Provider(loss_of(gathered)),
        "TRL selective_log_softmax": Provider(loss_of(trl_selective), "trl.trainer.utils"),
        "Liger Triton GRPO": Provider(
            liger_triton, "liger_kernel.transformers.grpo_loss", gpu=True
        ),
        OURS: Provider(our_loss),
    },
    "hidden": {
        BASELINE: Provider(loss_of(eager)),
        "torch.compile": Provider(compiled(loss_of(eager))),
        "eager, logits in input dtype": Provider(loss_of(eager_narrow)),
        "TRL selective_log_softmax": Provider(loss_of(trl_selective_fp32), "trl.trainer.utils"),
        "TRL ChunkedLogProbFunction": Provider(loss_of(trl_chunked), "trl.kernels"),
        "Liger, chunk_size=1": Provider(liger_chunked(1), "liger_kernel.chunked_loss"),
        "Liger, chunk_size=32": Provider(liger_chunked(32), "liger_kernel.chunked_loss"),
        "Liger SM90": Provider(loss_of(liger_sm90), _SM90, gpu=True, capability=(9, 0)),
        "verl fused linear": Provider(loss_of(verl), "verl.utils.experimental.torch_functional"),
        "cut-cross-entropy": Provider(loss_of(cut_cross_entropy), "cut_cross_entropy"),
        "torch linear_cross_entropy": Provider(
            loss_of(torch_linear), "torch.nn.functional:linear_cross_entropy"
        ),
        OURS: Provider(our_loss_from_hidden()),
        f"{OURS}, plan=keep": Provider(our_loss_from_hidden(plan="keep")),
        f"{OURS}, plan=chunk": Provider(our_loss_from_hidden(plan="chunk")),
        f"{OURS}, plan=recompute": Provider(our_loss_from_hidden(plan="recompute")),
        f"{OURS}, products=triton": Provider(our_loss_from_hidden(products="triton"), gpu=True),
    },
}


def select(path: str, wanted: list[str] | None) -> dict[str, Provider]:
    """Return the baseline, ours, and every provider with a wanted word in its name.

    Args:
        path: a key of `LOSSES`.
        wanted: words in any case; None for all providers but named plans of ours.

    Raises:
        ValueError: no provider has one of the words in its name.
    """
    table = LOSSES[path]
    everywhere = [name for of in LOSSES.values() for name in of]
    for word in wanted or ():
        if not any(word.lower() in name.lower() for name in everywhere):
            raise ValueError(f"no provider has {word!r} in its name; there are {set(everywhere)}")

    def is_wanted(name: str) -> bool:
        if name in (BASELINE, OURS):
            return True
        if wanted is None:
            return not name.startswith(OURS)
        return any(word.lower() in name.lower() for word in wanted)

    return {name: provider for name, provider in table.items() if is_wanted(name)}
