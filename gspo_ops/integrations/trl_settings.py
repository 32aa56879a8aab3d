"""What GSPOTrainer makes of the settings of TRL's `GRPOConfig`: an objective, or another route.

    python -m gspo_ops.integrations.trl_settings    # the table of docs/integrations.md
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from .. import Objective
from ..objective import Aggregation

if TYPE_CHECKING:
    from trl import GRPOTrainer

# TRL's `loss_type`: the aggregation of the tokens' terms, before a denominator
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
    """How a loss is made."""

    OP = "fused in one op"
    LOG_PROBS = "log-probs fused, then the loss"
    TRL = "log-probs fused, then TRL's own loss"
    BODY = "of the model, which runs as in TRL"
    NONE = "no effect on the loss step"


# by setting and value; `None` stands for any other value
ROUTES: dict[str, dict[str | None, Route]] = {
    "loss_type": {
        "grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo": Route.OP,
        "vespo": Route.LOG_PROBS,
        None: Route.TRL,
    },
    "importance_sampling_level": {"token, sequence, sequence_token": Route.OP, None: Route.TRL},
    "epsilon": {None: Route.OP},
    "epsilon_high": {"below 1 with cispo": Route.TRL, None: Route.OP},
    "delta": {"below 1": Route.TRL, None: Route.OP},
    "sapo_temperature_pos": {None: Route.OP},
    "sapo_temperature_neg": {None: Route.OP},
    **{f"vespo_{name}": {None: Route.LOG_PROBS} for name in (
        "k_pos", "lambda_pos", "k_neg", "lambda_neg",
    )},
    "beta": {"below 0": Route.TRL, None: Route.OP},
    "use_bias_correction_kl": {None: Route.OP},
    "temperature": {None: Route.OP},
    "max_completion_length": {None: Route.OP},
    "num_iterations": {None: Route.OP},
    "steps_per_generation": {None: Route.OP},
    "use_vllm": {None: Route.OP},
    "vllm_importance_sampling_correction": {None: Route.OP},
    "router_aux_loss_coef": {None: Route.OP},
    "top_entropy_quantile": {"below 1": Route.LOG_PROBS, None: Route.OP},
    "off_policy_mask_threshold": {"None": Route.OP, None: Route.LOG_PROBS},
    "entropy_coef": {"0": Route.OP, None: Route.LOG_PROBS},
    **{name: {None: Route.TRL} for name in (
        "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
        "entropy_target",
    )},
    # of TrainingArguments
    **{name: {None: Route.OP} for name in (
        "gradient_accumulation_steps", "bf16", "fp16", "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
    )},
    **{name: {None: Route.BODY} for name in (
        "model_init_kwargs", "trust_remote_code", "disable_dropout", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config",
    )},
    "cast_lm_head_to_fp32": {None: Route.BODY},
    **{name: {None: Route.NONE} for name in (
        # rollouts
        "num_generations", "num_generations_eval", "ds3_gather_for_generation", "shuffle_dataset",
        "pad_to_multiple_of", "generation_batch_size", "top_p", "top_k", "min_p",
        "generation_kwargs", "chat_template_kwargs", "repetition_penalty", "cache_implementation",
        "max_tool_calling_iterations", "use_transformers_continuous_batching",
        "transformers_continuous_batching_config", "use_transformers_paged",
        *(f"vllm_{of}" for of in (
            "mode", "model_impl", "enable_sleep_mode", "structured_outputs_regex",
            "server_base_url", "server_host", "server_port", "server_timeout", "group_port",
            "gpu_memory_utilization", "max_model_length", "tensor_parallel_size",
        )),
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
    """The loss of a trainer's settings.

    Raises:
        ValueError: no objective says what they mean.
    """
    if trainer.use_adaptive_entropy:
        raise ValueError("use_adaptive_entropy=True has a controller, which is TRL's")
    if trainer.loss_type not in _AGGREGATIONS:
        raise ValueError(f"loss_type={trainer.loss_type!r} is none that gspo_ops knows")
    level: Any = trainer.importance_sampling_level
    if level == "sequence" and advantage_per_token:
        level = "sequence_shared"
    return Objective(
        ratio_level=level, aggregation=_AGGREGATIONS[trainer.loss_type], kl_coef=trainer.beta,
        kl_weight="ratio" if trainer.args.use_bias_correction_kl else "one", **_surrogate(trainer),
    )  # fmt: skip


def _surrogate(trainer: GRPOTrainer) -> dict[str, Any]:
    config, high = trainer.args, trainer.epsilon_high
    if trainer.loss_type == "cispo":  # the largest weight itself
        return {"surrogate": "weighted", "clip_low": 1.0, "clip_high": high - 1.0}
    if trainer.loss_type == "vespo":  # no ratio: its weights are those of the rollout
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
    # min(min(r, delta) A, clip(r) A): the lower bound is where A > 0 stops, the upper where A < 0
    bounds = sorted((config.delta, 1.0 + high))
    return clip_range | {"clip_high": bounds[0] - 1.0, "dual_clip": bounds[1]}


def needs_log_probs(trainer: GRPOTrainer) -> bool:
    """Whether the loss has weights or terms that depend on the new log-probs or entropies."""
    return (
        trainer.loss_type == "vespo"
        or trainer.top_entropy_quantile < 1.0
        or trainer.off_policy_mask_threshold is not None
        or trainer._entropy_bonus_enabled
    )


def table() -> str:
    """`ROUTES` as Markdown: what has an effect one by one, the rest in a row."""
    lines = ["| setting | value | the loss step |", "|---|---|---|"]
    without: list[str] = []
    for setting, routes in ROUTES.items():
        if set(routes.values()) == {Route.NONE}:
            without.append(f"`{setting}`")
            continue
        for value, route in routes.items():
            other = "any other" if len(routes) > 1 else "any"
            lines.append(f"| `{setting}` | {value or other} | {route.value} |")
    lines.append(f"| {', '.join(without)} | any | {Route.NONE.value} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
