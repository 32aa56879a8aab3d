"""The settings of TRL's `GRPOConfig`, and the objective or other route that each takes."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from .. import Objective
from ..objective import Aggregation

if TYPE_CHECKING:
    from trl import GRPOTrainer

# for each `loss_type` of TRL, the aggregation of the tokens' terms, before a denominator
_AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "bnpo": "token-sum",
    "dr_grpo": "token-sum",
    "dapo": "token-sum",
    "cispo": "token-sum",
    "vespo": "token-sum",
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
BY_ITEMS = ("dapo", "cispo", "vespo")  # divided by the tokens of all accumulated batches


class Route(Enum):
    """The way in which the loss step treats a setting."""

    OP = "fused in one op"
    LOG_PROBS = "log-probs fused, then the loss"
    TRL = "log-probs fused, then TRL's own loss"
    MODEL = "concerns the model, which runs as in TRL"
    NONE = "no effect on the loss step"


_ANY = "any"
# by setting and value
ROUTES: dict[str, dict[str, Route]] = {
    "loss_type": {
        "grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo": Route.OP,
        "vespo": Route.LOG_PROBS,
        "any other": Route.TRL,
    },
    "importance_sampling_level": {"token, sequence, sequence_token": Route.OP},
    "epsilon_high": {"below 1 with cispo, which the default is": Route.TRL, "any other": Route.OP},
    "delta": {"below 1": Route.TRL, "any other": Route.OP},
    "beta": {"below 0": Route.TRL, "any other": Route.OP},
    "entropy_coef": {"0": Route.OP, "any other": Route.LOG_PROBS},
    "use_adaptive_entropy": {"False": Route.OP, "True": Route.TRL},
    "top_entropy_quantile": {"1": Route.OP, "below 1": Route.LOG_PROBS},
    "off_policy_mask_threshold": {"None": Route.OP, "any other": Route.LOG_PROBS},
    **{name: {_ANY: Route.OP} for name in (
        "epsilon", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg",
        "temperature", "max_completion_length", "num_iterations", "steps_per_generation",
        "use_vllm", "vllm_importance_sampling_correction", "router_aux_loss_coef",
        # of TrainingArguments
        "gradient_accumulation_steps", "bf16", "fp16", "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
    )},
    **{name: {_ANY: Route.LOG_PROBS} for name in (
        "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    )},
    **{name: {_ANY: Route.TRL} for name in (
        "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
    )},
    **{name: {_ANY: Route.MODEL} for name in (
        "model_init_kwargs", "trust_remote_code", "disable_dropout", "cast_lm_head_to_fp32",
        # of TrainingArguments
        "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
        "liger_kernel_config",
    )},
    **{name: {_ANY: Route.NONE} for name in (
        # rollouts
        "num_generations", "num_generations_eval", "ds3_gather_for_generation", "shuffle_dataset",
        "pad_to_multiple_of", "generation_batch_size", "top_p", "top_k", "min_p",
        "generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation",
        "max_tool_calling_iterations", "use_transformers_continuous_batching",
        "transformers_continuous_batching_config", "use_transformers_paged", "vllm_mode",
        "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
        "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        # what goes into advantages, masks, weights and reference log-probs before the step
        "reward_weights", "multi_objective_aggregation", "scale_rewards",
        "mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "vllm_importance_sampling_mode",
        "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        "vllm_importance_sampling_cap",
        # logs
        "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
        "log_completions_hub_repo",
    )},
}  # fmt: skip


def objective_of(trainer: GRPOTrainer, advantage_per_token: bool) -> Objective:
    """Return the objective that a trainer's settings describe.

    Raises:
        ValueError: no objective expresses them.
    """
    if trainer.use_adaptive_entropy:
        raise ValueError("use_adaptive_entropy=True needs TRL's own controller")
    if trainer.loss_type not in _AGGREGATIONS:
        raise ValueError(f"gspo_ops does not know loss_type={trainer.loss_type!r}")
    level: Any = trainer.importance_sampling_level
    if level == "sequence" and advantage_per_token:
        level = "sequence_shared"
    return Objective(
        ratio_level=level, aggregation=_AGGREGATIONS[trainer.loss_type], kl_coef=trainer.beta,
        kl_weight="ratio" if trainer.args.use_bias_correction_kl else "one", **_surrogate(trainer),
    )  # fmt: skip


def _surrogate(trainer: GRPOTrainer) -> dict[str, Any]:
    config, high = trainer.args, trainer.epsilon_high
    if trainer.loss_type == "cispo":  # epsilon_high is the largest weight itself
        if high < 1:
            raise ValueError(f"epsilon_high={high!r} is below 1, and so is every weight of cispo")
        return {"surrogate": "weighted", "clip_low": 1.0, "clip_high": high - 1.0}
    if trainer.loss_type == "vespo":  # no ratio: phi is passed as rollout weights
        return {"surrogate": "weighted", "clip_low": 0.0, "clip_high": 0.0}
    if trainer.loss_type == "sapo":
        return {
            "surrogate": "soft",
            "soft_temperature_pos": config.sapo_temperature_pos,
            "soft_temperature_neg": config.sapo_temperature_neg,
        }
    clip_range = {"clip_low": trainer.epsilon_low, "clip_high": high}
    if config.delta is None:
        return clip_range
    if config.delta < 1:
        raise ValueError(f"delta={config.delta!r} is below 1")
    # in min(min(r, delta) A, clip(r) A), the lower bound limits A > 0, and the upper limits A < 0
    bounds = sorted((config.delta, 1.0 + high))
    return clip_range | {"clip_high": bounds[0] - 1.0, "dual_clip": bounds[1]}


def needs_log_probs(trainer: GRPOTrainer) -> bool:
    """Return whether weights or terms of the loss depend on the new log-probs or entropies."""
    return (
        trainer.loss_type == "vespo"
        or trainer.top_entropy_quantile < 1.0
        or trainer.off_policy_mask_threshold is not None
        or trainer._entropy_bonus_enabled
    )


def table() -> str:
    """Return `ROUTES` as Markdown; settings whose value does not matter are grouped by route."""
    lines = ["| setting | value | the loss step |", "|---|---|---|"]
    alike: dict[Route, list[str]] = {}
    for setting, routes in ROUTES.items():
        if set(routes) == {_ANY}:
            alike.setdefault(routes[_ANY], []).append(f"`{setting}`")
            continue
        lines += [f"| `{setting}` | {value} | {route.value} |" for value, route in routes.items()]
    lines += [f"| {', '.join(found)} | {_ANY} | {route.value} |" for route, found in alike.items()]
    return "\n".join(lines)
