"""GSPOTrainer: TRL's GRPOTrainer with the loss of its config fused, from hidden states.

This module is for TRL 1.16 to 1.x. Config, rollouts, rewards and logs are TRL's; only the loss step
is replaced. Logits never exist, log-probs are exact to fp32, and responses without a gradient cost
nothing in the backward.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from transformers.utils import logging
from trl import GRPOTrainer

from .. import Objective, policy_loss_from_log_probs
from ..checks import check_choice
from ..constants import IGNORED
from .transformers import Skip, live_checkpointing, log_probs_from_model, loss_from_model
from .trl_metrics import Step, log_step
from .trl_settings import BY_ITEMS, needs_log_probs, objective_of

if not Version("1.16") <= Version(trl.__version__) < Version("2"):
    raise ImportError(f"gspo_ops.integrations.trl is for TRL 1.16 to 1.x, got {trl.__version__}")

__all__ = ["GSPOTrainer"]

_logger = logging.get_logger(__name__)


class GSPOTrainer(GRPOTrainer):
    """GRPOTrainer whose loss comes from `gspo_ops`.

    For GSPO as in the paper, set `importance_sampling_level="sequence"`, `loss_type="grpo"`,
    `epsilon=3e-4` and `epsilon_high=4e-4`. `"sequence_token"` selects GSPO-token. All settings of
    `GRPOConfig` keep their meaning. Most losses are one op. The weights of VESPO, masks and the
    entropy bonus are computed from fused log-probs and entropies. If gspo_ops does not know the
    meaning of a setting, the loss is TRL's own, from the same log-probs, and the log says so once.
    TRL's metrics are kept; the statistics of gspo_ops are logged as `gspo_ops/...`, except with
    TRL's own loss.

    With one op, the model runs only for the sequences that can have a gradient, and
    `gradient_checkpointing` recomputes only those that have one. `entropy` and ratios then describe
    the sequences that ran, whose fraction is `gspo_ops/computed_frac`. All sequences run with a KL
    term, an entropy bonus, a router loss or images. They also run if a 16-bit model is given old
    log-probs, because it would round differently in batches of another size.

    Args:
        *args, **kwargs: arguments of GRPOTrainer.
        check_model: whether the head's logits are compared with the model's own at its first use.
        skip: `"auto"` leaves out sequences without a gradient if the result is exact. `"dead"` does
            so also with old log-probs in 16 bit, and refuses arguments that cannot be split into
            sequences. `"none"` leaves nothing out.
    """

    def __init__(
        self, *args: Any, check_model: bool = True, skip: Skip = "auto", **kwargs: Any
    ) -> None:
        check_choice("skip", skip, ("auto", "dead", "none"))
        super().__init__(*args, **kwargs)
        self._check_model, self._skip = check_model, skip
        config = self.args
        # torch.compile can trace ordinary checkpointing, but not this
        is_wanted = skip == "dead" or (skip == "auto" and not config.torch_compile)
        if config.gradient_checkpointing and is_wanted:
            live_checkpointing(self.model, strict=skip == "dead")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        try:
            objective = objective_of(self, inputs["advantages"].ndim == 2)
        except ValueError as error:
            _logger.warning_once(f"log-probs are fused, but the loss is TRL's own: {error}")
            return super()._compute_loss(model, inputs)
        of_settings = self._loss_of_log_probs if needs_log_probs(self) else self._loss_of_model
        loss, step = of_settings(model, inputs, mask, objective)
        log_step(self, step, self._steps())
        return loss

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int,
        batch_size: int | None = None, compute_entropy: bool = False,
        compute_aux_loss: bool = False, **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Compute new, old and reference log-probs in the same way as the loss in one op.

        Otherwise, in bf16, the ratio of a policy to itself would leave GSPO's clip range.
        """

        def scored(*, labels: Tensor, fused_lm_head: bool, **batch: Any) -> Any:
            log_probs, entropy, *router_loss = log_probs_from_model(
                model, batch, logits_to_keep, temperature=self.temperature, return_entropy=True,
                return_router_loss=compute_aux_loss, check_model=self._check_model,
            )  # fmt: skip
            is_padding = labels[:, -logits_to_keep:] == IGNORED
            return SimpleNamespace(
                log_probs=log_probs.masked_fill(is_padding, 0.0),
                entropy=entropy.masked_fill(is_padding, 0.0),
                aux_loss=router_loss[0] if router_loss else None,
            )

        return super()._get_per_token_logps_and_entropies(
            scored, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy,
            compute_aux_loss, **images,
        )  # fmt: skip

    def _arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `_get_per_token_logps_and_entropies` for a loss."""
        known = inspect.signature(super()._get_per_token_logps_and_entropies).parameters
        ids, mask = (
            torch.cat([inputs[f"prompt_{of}"], inputs[f"completion_{of}"]], 1)
            for of in ("ids", "mask")
        )
        return {name: x for name, x in inputs.items() if name in known} | {
            "input_ids": ids,
            "attention_mask": mask,
            "logits_to_keep": inputs["completion_ids"].shape[1],
            "compute_aux_loss": self.aux_loss_enabled,
        }

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that TRL gives the model: it knows the images of each model."""
        batch = {}

        def take(*, labels: Tensor, fused_lm_head: bool, **found: Any) -> Any:
            batch.update(found)
            return SimpleNamespace(log_probs=labels, aux_loss=labels.float())

        super()._get_per_token_logps_and_entropies(take, **self._arguments(inputs))
        return batch

    def _options(
        self, inputs: dict[str, Any], mask: Tensor, objective: Objective
    ) -> dict[str, Any]:
        """Return the options that both losses take."""
        return {
            "mask": mask, "objective": objective, "denominator": self._denominator(inputs, mask),
            "ref_log_probs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
        }  # fmt: skip

    def _loss_of_model(
        self, model: Any, inputs: dict[str, Any], mask: Tensor, objective: Objective
    ) -> tuple[Tensor, Step]:
        """Compute the loss in one op."""
        advantages, old = inputs["advantages"].float(), inputs.get("old_per_token_logps")
        options, weights = self._options(inputs, mask, objective), self._rollout_weights(inputs)
        with self.accelerator.autocast():
            loss, stats = loss_from_model(
                model, self._model_inputs(inputs), old, advantages,
                rollout_weights=None if weights is None else _per_sequence_or_token(weights),
                temperature=self.temperature, router_loss_coef=self._router_loss_coef(),
                return_entropy=True, return_log_probs=True, check_model=self._check_model,
                skip=self._skip_of(inputs), **options,
            )  # fmt: skip
        return loss, Step(
            stats, mask, _by_token(advantages), stats["log_probs"], old, options["ref_log_probs"],
            stats["entropy"],
        )  # fmt: skip

    def _loss_of_log_probs(
        self, model: Any, inputs: dict[str, Any], mask: Tensor, objective: Objective
    ) -> tuple[Tensor, Step]:
        """Compute the loss from log-probs and entropies, on which weights and a bonus depend."""
        log_probs, entropy, router_loss = self._get_per_token_logps_and_entropies(
            model, compute_entropy=True, **self._arguments(inputs)
        )
        assert entropy is not None
        old, seen = inputs.get("old_per_token_logps"), log_probs.detach()
        weights, phi = self._weights(seen, inputs, mask)
        bonus_mask = mask
        if self.top_entropy_quantile < 1.0:
            is_high = self.get_high_entropy_mask(
                entropy.detach(), mask, 1 - self.top_entropy_quantile
            )
            weights, bonus_mask = weights * is_high, mask * is_high
        advantages, options = inputs["advantages"].float(), self._options(inputs, mask, objective)
        loss, stats = policy_loss_from_log_probs(
            log_probs, old, advantages, rollout_weights=_per_sequence_or_token(weights), **options
        )
        stats["computed"] = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        step = Step(
            stats, mask, _by_token(advantages), seen, old, options["ref_log_probs"],
            entropy.detach(), phi, loss.detach() if self._entropy_bonus_enabled else None,
        )  # fmt: skip
        if self._entropy_bonus_enabled:
            total = torch.where(bonus_mask != 0, entropy, 0.0).sum()
            mean = total / bonus_mask.sum().clamp(min=1.0)
            loss = loss - self.entropy_coef / self._steps() * mean
        if router_loss is not None:
            stats["router_loss"] = router_loss.detach()
            loss = loss + self._router_loss_coef() * router_loss
        return loss, step

    def _rollout_weights(self, inputs: dict[str, Any]) -> Tensor | None:
        """Return (B, 1) or (B, T) weights from the rollout engine's log-probs, or None."""
        is_used = self.use_vllm and self.vllm_importance_sampling_correction
        return inputs["importance_sampling_ratio"].float() if is_used else None

    def _weights(
        self, log_probs: Tensor, inputs: dict[str, Any], mask: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return TRL's weights of tokens, (B, T), or of sequences, (B, 1); and VESPO's phi."""
        advantages = _by_token(inputs["advantages"])
        old = inputs.get("old_per_token_logps")
        old = log_probs if old is None else old
        weights, phi = self._rollout_weights(inputs), None
        if self.loss_type == "vespo":  # phi contains the rollout weights
            weights = phi = self.get_gamma_weights(
                advantages, log_probs - old, mask, inputs.get("importance_sampling_ratio"),
                **{name: getattr(self.args, f"vespo_{name}")
                   for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
            )  # fmt: skip
        if weights is None:
            weights = log_probs.new_ones(len(mask), 1)
        if self.off_policy_mask_threshold is not None:
            weights = weights * self.get_off_policy_mask(
                advantages, log_probs, inputs.get("sampling_per_token_logps", old), mask,
                self.off_policy_mask_threshold,
            )  # fmt: skip
        return weights, phi

    def _skip_of(self, inputs: dict[str, Any]) -> Skip:
        """Return `skip`, where "auto" becomes "none" for a 16-bit model with old log-probs.

        A batch of all sequences rounds them differently from a batch of some.
        """
        is_narrow = self.accelerator.mixed_precision != "no" or self.model.dtype != torch.float32
        has_old = inputs.get("old_per_token_logps") is not None
        return "none" if self._skip == "auto" and is_narrow and has_old else self._skip

    def _steps(self) -> int:
        """Return the number of calls whose gradients are added up."""
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _router_loss_coef(self) -> float:
        return self.router_aux_loss_coef / self._steps() if self.aux_loss_enabled else 0.0

    def _denominator(self, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
        """Return what TRL divides by, accumulation included; it counts empty responses as well."""
        steps = self._steps()
        if self.loss_type == "bnpo":
            return mask.sum().float().clamp(min=1.0) * float(steps)
        if self.loss_type == "dr_grpo":
            return float(len(mask) * self.max_completion_length * steps)
        if self.loss_type in BY_ITEMS:
            items = inputs["num_items_in_batch"].float().clamp(min=1.0)
            items = items / self.accelerator.num_processes  # gradients are averaged
            return (
                items * (steps / self.args.steps_per_generation) if self.model.training else items
            )
        return float(len(mask) * steps)


def _by_token(advantages: Tensor) -> Tensor:
    return advantages if advantages.ndim == 2 else advantages[:, None]


def _per_sequence_or_token(weights: Tensor) -> Tensor:
    """Return weights as the ops take them, (B,) or (B, T)."""
    return weights.squeeze(1) if weights.shape[1] == 1 else weights
