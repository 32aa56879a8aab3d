"""GSPOTrainer: TRL's GRPOTrainer with the loss of its config fused, from hidden states.

Written for TRL 1.16 to 1.x. Same config, same rollouts, rewards and logs; only the loss step is
ours: logits never exist, log-probs are exact to fp32, and responses without a gradient cost nothing
in the backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from .. import Objective, PolicyLoss
from ..checks import check_choice
from ..objective import Aggregation
from .transformers import Skip, live_checkpointing, log_probs_from_model, loss_from_model

if not Version("1.16") <= Version(trl.__version__) < Version("2"):
    raise ImportError(f"gspo_ops.integrations.trl is for TRL 1.16 to 1.x, got {trl.__version__}")

# TRL's `loss_type`: the aggregation of the tokens' terms, before a denominator
_AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-sum",
    "dr_grpo": "token-sum",
    "dapo": "token-sum",
    "luspo": "seq-mean-token-sum",
}
# our statistics, and how they are put together over ranks, NaN on one that has computed nothing
_OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "ratio_mean": Tensor.nanmean, "ratio_min": nanmin, "ratio_max": nanmax,
    "effective_sample_size": Tensor.nanmean,
}  # fmt: skip


class GSPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss comes from `gspo_ops`.

    For GSPO as in the paper: `importance_sampling_level="sequence"`, `loss_type="grpo"`,
    `epsilon=3e-4`, `epsilon_high=4e-4`. `"sequence_token"` is GSPO-token. All other settings of
    `GRPOConfig` that change the loss either do the same as in TRL or are refused. TRL's metrics are
    kept, but for `clip_ratio/low_min` and `clip_ratio/high_max` of ratios per token; ours are
    logged as `gspo_ops/...`.

    The model runs for the sequences alone that can have a gradient, and with
    `gradient_checkpointing` runs again for those alone that have one; `entropy` and ratios are of
    the sequences that it ran for, whose fraction is `gspo_ops/computed_frac`. All run for a KL
    term, a router loss or images, and where old log-probs are given to a model in 16 bit: in
    batches of another size it would round them in another way.

    Raises:
        ValueError: a setting is not supported; the message names it.
    """

    def __init__(
        self, *args: Any, check_model: bool = True, skip: Skip = "auto", **kwargs: Any
    ) -> None:
        """Args:
        args, kwargs: those of GRPOTrainer.
        check_model: whether the head's logits are compared with the model's own at its first use.
        skip: `"auto"` leaves out what has no gradient where that is exact, `"dead"` also with old
            log-probs in 16 bit, and refuses what can't be cut into sequences; `"none"` nothing.
        """
        check_choice("skip", skip, ("auto", "dead", "none"))
        super().__init__(*args, **kwargs)
        self._check_model, self._skip = check_model, skip
        config = self.args
        refused = {
            "loss_type": self.loss_type not in _AGGREGATIONS,
            "top_entropy_quantile": self.top_entropy_quantile < 1.0,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "delta": config.delta is not None,
            "use_bias_correction_kl": self.beta != 0.0 and config.use_bias_correction_kl,
            "entropy_coef": self._entropy_bonus_enabled,
        }
        for name in (name for name, is_refused in refused.items() if is_refused):
            raise ValueError(
                f"{name}={getattr(config, name, None)!r} is not supported by GSPOTrainer: "
                "use GRPOTrainer for it"
            )
        # what torch.compile makes of ordinary checkpointing it can't make of this
        is_wanted = skip == "dead" or (skip == "auto" and not config.torch_compile)
        if config.gradient_checkpointing and is_wanted:
            live_checkpointing(self.model, strict=skip == "dead")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        found = self._fused_loss(model, inputs, mask)
        self._log_stats(found.stats, inputs, mask)
        return found.loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, compute_entropy: bool = False,
        compute_aux_loss: bool = False, **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Old and reference log-probs, by the same way as the loss's: else, in bf16, the ratio of a
        policy to itself would leave GSPO's clip range."""

        def scored(*, labels: Tensor, fused_lm_head: bool, **batch: Any) -> Any:
            log_probs, entropy = log_probs_from_model(
                model, batch, logits_to_keep, temperature=self.temperature, return_entropy=True,
                check_model=self._check_model,
            )  # fmt: skip
            return SimpleNamespace(log_probs=log_probs, entropy=entropy)

        return super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **images
        )

    def _model_inputs(self, inputs: dict[str, Any], count: int) -> dict[str, Any]:
        """What TRL calls the model with: it knows what the images of each model are."""
        batch = {}

        def take(*, labels: Tensor, fused_lm_head: bool, **found: Any) -> Any:
            batch.update(found)
            return SimpleNamespace(log_probs=labels, aux_loss=labels.float())

        theirs = super()._get_per_token_logps_and_entropies
        known = inspect.signature(theirs).parameters
        theirs(
            take,
            *(torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], 1)
              for of in ("ids", "mask")),
            count,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: x for name, x in inputs.items() if name in known},
        )  # fmt: skip
        return batch

    def _fused_loss(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> PolicyLoss:
        advantages = inputs["advantages"]
        level = self.importance_sampling_level
        if level == "sequence" and advantages.ndim == 2:
            level = "sequence_token"  # whose gradient is right for an advantage per token
        weights = None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weights = inputs["importance_sampling_ratio"].float()
            weights = weights.squeeze(1) if weights.shape[1] == 1 else weights
        with self.accelerator.autocast():
            return loss_from_model(
                model, self._model_inputs(inputs, mask.shape[1]),
                inputs.get("old_per_token_logps"), advantages.float(), mask=mask,
                temperature=self.temperature, objective=self._objective(level),
                ref_log_probs=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
                rollout_weights=weights, denominator=self._denominator(inputs, mask),
                router_loss_coef=self._router_loss_coef(), return_entropy=True,
                check_model=self._check_model, skip=self._skip_of(inputs),
            )  # fmt: skip

    def _skip_of(self, inputs: dict[str, Any]) -> Skip:
        """In 16 bit, old log-probs of all sequences are rounded otherwise than those of some."""
        is_narrow = self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32
        has_old = inputs.get("old_per_token_logps") is not None
        return "none" if self._skip == "auto" and is_narrow and has_old else self._skip

    def _steps(self) -> int:
        """Calls whose gradients are added up."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _router_loss_coef(self) -> float:
        return self.router_aux_loss_coef / self._steps() if self.aux_loss_enabled else 0.0

    def _objective(self, level: Any) -> Objective:
        aggregation = _AGGREGATIONS[self.loss_type]
        return Objective(
            ratio_level=level, clip_low=self.epsilon_low, clip_high=self.epsilon_high,
            aggregation=aggregation, kl_coef=self.beta,
        )  # fmt: skip

    def _denominator(self, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
        """What TRL divides by, accumulation included; it counts empty responses as well."""
        steps = self._steps()
        if self.loss_type == "bnpo":
            return mask.sum().float().clamp(min=1.0) * float(steps)
        if self.loss_type == "dr_grpo":
            return float(len(mask) * self.max_completion_length * steps)
        if self.loss_type == "dapo":
            items = inputs["num_items_in_batch"].float().clamp(min=1.0)
            items = items / self.accelerator.num_processes  # which average their gradients
            return (
                items * (steps / self.args.steps_per_generation) if self.model.training else items
            )
        return float(len(mask) * steps)

    def _log_stats(self, stats: dict[str, Tensor], inputs: dict[str, Any], mask: Tensor) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        gather, computed = self.accelerator.gather, stats["computed"]

        def mean_of_tokens(x: Tensor, mask: Tensor = mask) -> float:
            tokens = mask.sum().float()
            totals = self.accelerator.reduce(torch.stack([x * tokens, tokens]), reduction="sum")
            return (totals[0] / totals[1].clamp(min=1.0)).item()

        if self.aux_loss_enabled:
            metrics["aux_loss"].append(gather(stats["router_loss"]).mean().item())
        if self.beta != 0.0:
            metrics["kl"].append(mean_of_tokens(stats["ref_kl"]))
        metrics["entropy"].append(mean_of_tokens(stats["entropy"], mask * computed[:, None]))
        low, high = (mean_of_tokens(stats[f"clip_frac_{side}"]) for side in ("low", "high"))
        if self.importance_sampling_level == "sequence" and inputs["advantages"].ndim == 1:
            # of sequences, each counting once, as TRL has it
            ratio = stats["log_ratio"].exp()
            is_low = (ratio < 1 - self.epsilon_low) & (inputs["advantages"] < 0)
            is_high = (ratio > 1 + self.epsilon_high) & (inputs["advantages"] > 0)
            of_low, of_high = gather(is_low.float()), gather(is_high.float())
            low, high = of_low.mean().item(), of_high.mean().item()
            metrics["clip_ratio/low_min"].append(of_low.min().item())
            metrics["clip_ratio/high_max"].append(of_high.max().item())
        metrics["clip_ratio/low_mean"].append(low)
        metrics["clip_ratio/high_mean"].append(high)
        metrics["clip_ratio/region_mean"].append(low + high)
        for name, over_ranks in _OURS.items():
            of_rank = torch.where(computed.any(), stats[name], torch.nan)
            metrics[f"gspo_ops/{name}"].append(over_ranks(gather(of_rank)).item())
        for name, x in (
            ("computed", computed.float()),
            ("active_token", stats["active_token_frac"]),
        ):
            metrics[f"gspo_ops/{name}_frac"].append(gather(x).mean().item())
