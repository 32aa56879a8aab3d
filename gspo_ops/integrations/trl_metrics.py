"""The metrics of a loss step, under TRL's names and as `gspo_ops/...`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import nanmax, nanmin

from .trl_settings import BY_ITEMS, CLIPPED

if TYPE_CHECKING:
    from trl import GRPOTrainer

# our statistics, and how they are combined over ranks; a rank that has computed nothing has NaN
_OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "ratio_mean": Tensor.nanmean, "ratio_min": nanmin, "ratio_max": nanmax,
    "effective_sample_size": Tensor.nanmean,
}  # fmt: skip


class Step(NamedTuple):
    """The values of a loss step, all without a gradient.

    Attributes:
        stats: statistics of the loss, with `computed`, and `router_loss` if there is one.
        mask, advantages: (B, T), and (B, T) or (B, 1).
        log_probs, old_log_probs: (B, T); None for old ones that equal the new ones.
        ref_log_probs: (B, T), or None without a KL term.
        entropy: (B, T), or 0-dim, the mean over the computed sequences.
        phi: weights of VESPO, (B, 1) or (B, T); None for other losses.
        policy_loss: 0-dim, without router loss and entropy bonus; None without a bonus.
    """

    stats: dict[str, Tensor]
    mask: Tensor
    advantages: Tensor
    log_probs: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    entropy: Tensor
    phi: Tensor | None = None
    policy_loss: Tensor | None = None

    def ratio(self, level: str) -> Tensor:
        """Return ratios (B, T), or (B, 1) if they are per sequence; NaN where not computed."""
        if level != "token":
            of_sequence = self.stats["log_ratio"].exp()[:, None]
            return of_sequence if level == "sequence" else of_sequence.expand(self.mask.shape)
        if self.old_log_probs is None:
            return torch.ones_like(self.log_probs)
        return (self.log_probs - self.old_log_probs).exp()

    def mask_of(self, x: Tensor) -> Tensor:
        """Return which values of x count: those in the mask of (B, T), or all of (B, 1)."""
        return self.mask if x.shape == self.mask.shape else torch.ones_like(x)


@torch.no_grad()
def log_step(trainer: GRPOTrainer, step: Step, steps: int) -> None:
    """Append the metrics of a step to the trainer's.

    They are defined as in TRL, with one exception. If responses have room for only one token, TRL
    treats its values as values of sequences, with or without a token; here only tokens in the mask
    count. A sequence that is left out counts as not clipped.

    Args:
        steps: number of calls whose gradients are summed; the loss is already divided by it.
    """
    is_training = trainer.model.training
    metrics = trainer._metrics["train" if is_training else "eval"]
    gather, over_ranks = trainer.accelerator.gather, trainer.accelerator.reduce

    def mean(x: Tensor) -> float:
        """Return the mean over sequences if each has one value, otherwise over tokens."""
        return mean_of(x, step.mask_of(x))

    def mean_of(x: Tensor, mask: Tensor) -> float:
        totals = torch.stack([torch.where(mask != 0, x, 0.0).sum(), mask.sum().float()])
        total, count = over_ranks(totals, reduction="sum").unbind()
        return (total / count.clamp(min=1.0)).item()

    found: dict[str, float] = {}
    if trainer.aux_loss_enabled:
        found["aux_loss"] = gather(step.stats["router_loss"]).mean().item()
    if step.policy_loss is not None:
        policy_loss = step.policy_loss * (1 if trainer.loss_type in BY_ITEMS else steps)
        found["policy_loss"] = gather(policy_loss).nanmean().item()
        if is_training and trainer.accelerator.sync_gradients:
            found["entropy_coef"] = trainer.entropy_coef
    ratio = step.ratio(trainer.importance_sampling_level)
    if step.ref_log_probs is not None:
        difference = step.ref_log_probs - step.log_probs
        kl = torch.expm1(difference) - difference
        found["kl"] = mean(kl * ratio if trainer.args.use_bias_correction_kl else kl)
    found["entropy"] = mean_of(step.entropy, step.mask * step.stats["computed"][:, None])
    if trainer.loss_type in CLIPPED:
        found |= _clip_ratios(trainer, step, ratio, mean)
    elif trainer.loss_type == "cispo":
        is_clipped = (ratio > trainer.epsilon_high) & (step.advantages > 0)
        found["cispo_clip_ratio"] = mean(is_clipped.float())
    elif step.phi is not None:
        found["vespo/phi_seq_mean"] = mean(step.phi)
    for name, value in (found | _ours(step, gather)).items():
        metrics[name].append(value)


def _clip_ratios(
    trainer: Any, step: Step, ratio: Tensor, mean: Callable[[Tensor], float]
) -> dict[str, float]:
    """Return clip ratios over sequences with one ratio and one advantage each, or over tokens."""
    if trainer.args.delta is not None:
        ratio = ratio.clamp(max=trainer.args.delta)
    is_low = ((ratio < 1 - trainer.epsilon_low) & (step.advantages < 0)).float()
    is_high = ((ratio > 1 + trainer.epsilon_high) & (step.advantages > 0)).float()

    def by_sequence(x: Tensor) -> Tensor:  # with values per token, NaN if empty
        mask = step.mask_of(x)
        return trainer.accelerator.gather((x * mask).sum(1) / mask.sum(1))

    return {
        "clip_ratio/low_mean": mean(is_low),
        "clip_ratio/high_mean": mean(is_high),
        "clip_ratio/region_mean": mean(is_low + is_high),
        "clip_ratio/low_min": nanmin(by_sequence(is_low)).item(),
        "clip_ratio/high_max": nanmax(by_sequence(is_high)).item(),
    }


def _ours(step: Step, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    computed = step.stats["computed"]
    found = {}
    for name, over_ranks in _OURS.items():
        of_rank = torch.where(computed.any(), step.stats[name], torch.nan)
        found[name] = over_ranks(gather(of_rank)).item()
    found["computed_frac"] = gather(computed.float()).mean().item()
    found["active_token_frac"] = gather(step.stats["active_token_frac"]).mean().item()
    return {f"gspo_ops/{name}": value for name, value in found.items()}
