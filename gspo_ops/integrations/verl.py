"""GSPO for verl: a policy loss, a backend of its fused forward, and shorter updates.

Written for verl 0.9; `register()` makes loss and backend known. Log-probs are gathered already when
verl calls a policy loss, so that what is fused there is the loss: ratio, clipping, aggregation and
gradient in one kernel, with ratios that stay finite and padding that may hold anything. The fused
forward is where the log-probs come from: hidden states and the head, without logits.
`skip_zero_advantages()` spares both, and the body, the sequences that have no gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import GSPOToken, log_probs_from_hidden, policy_loss_from_log_probs
from ..objective import Aggregation
from .heads import OutputHead, hidden_to, last_layer, unwrapped

NAME = "gspo_ops"  # of the policy loss and of the backend
_KEPT = ("past_key_values", "hidden_states", "attentions")  # of the model's output
_WIDE = 0.01  # a clip range that GSPO's ratios never leave

# verl's aggregation: ours, and which count of the global batch divides
_AGGREGATIONS: dict[str, tuple[Aggregation, str | None]] = {
    "token-mean": ("token-mean", "batch_num_tokens"),
    "token-sum": ("token-sum", None),
    "seq-mean-token-sum": ("seq-mean-token-sum", "global_batch_size"),
    "seq-mean-token-sum-norm": ("seq-mean-token-sum", "global_batch_size"),
    "seq-mean-token-mean": ("seq-mean-token-mean", "global_batch_size"),
}

_ALL_TOKENS = "gspo_ops_batch_num_tokens"  # of the mini-batch before sequences were left out
# Losses in which each sequence is a term of its own, times its advantage. Of verl's others, dro
# adds a square, clip_cov, kl_cov and bypass_mode look at a whole micro-batch, geo_mean averages it.
_PROPORTIONAL = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo", NAME)


def register() -> str:
    """Make the policy loss and the fused forward known to verl.

    The loss goes into verl's registry. verl has none for the backends of the fused forward: its
    `patch_forward_with_backends` is replaced by one that knows this backend too, and that leaves
    all others to verl.

    Returns:
        Their name, for `actor_rollout_ref.actor.policy_loss.loss_mode` and
        `actor_rollout_ref.model.fused_kernel_options.impl_backend`.

    Raises:
        ImportError: verl is not installed, or is not verl 0.9.
    """
    _require_verl()
    from verl.models.transformers import monkey_patch
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss

    if NAME not in POLICY_LOSS_REGISTRY:
        register_policy_loss(NAME)(policy_loss)
    theirs = monkey_patch.patch_forward_with_backends
    if theirs.__module__ != __name__:
        monkey_patch.patch_forward_with_backends = _with_our_backend(theirs)
    return NAME


def fuse_forward(model: Any, *, check_model: bool = True) -> None:
    """Give a causal language model the forward that verl expects of fused kernels.

        z[t]         = logits of hidden[t] / temperature
        log_probs[t] = log_softmax(z[t])[shift_labels[t]]
        entropy[t]   = -sum_v p[t, v] * log p[t, v]

    The body runs, the head is never called. `model(input_ids, temperature=..., shift_labels=...)`
    returns verl's output class with `log_probs` and `entropy`, float32 and of the shape (1, N) or
    (B, S) of `input_ids`, both differentiable. Without `shift_labels` each row predicts the next of
    `labels` or `input_ids`. verl calls this where `impl_backend` is `"gspo_ops"`.

    Args:
        model: a causal language model of transformers, of whose instance `forward` is replaced.
        check_model: whether the head's logits are compared with the model's own at its first use.

    Raises:
        ImportError: verl is not installed, or is not verl 0.9.
        ValueError: the model's head is unknown, or the model takes images.
    """
    _require_verl()
    model = unwrapped(model)
    last_layer(model)  # refuses a model without a head
    if hasattr(model.config, "vision_config"):
        raise ValueError(
            f"model must be a text model, got {type(model).__name__}: use verl's own impl_backend"
        )
    if getattr(model.forward, "func", None) is not _forward:  # once
        model.forward = partial(_forward, model, model.forward, check_model)


def skip_zero_advantages() -> None:
    """Leave sequences whose advantages are all zero out of the actor's updates, exactly.

    They have no gradient. verl has no registry of workers either: the one that trains the actor is
    replaced by one that leaves them out of each mini-batch, before the engine cuts it into
    micro-batches. What divides the loss still counts everyone. Ranks run equally many sequences,
    of which copies of a rank's shortest without an advantage make up for missing ones. Once per
    mini-batch the host waits for two counts of each rank.

    The actor that is built later raises ValueError where a zero advantage may have a gradient or
    a part in that of others: with `use_kl_loss`, `entropy_coeff`, distillation, some `loss_mode`s,
    and a `strategy` other than FSDP, whose engine may have losses of routers.

    Raises:
        ImportError: verl is not installed, or is not verl 0.9.
    """
    _require_verl()
    from verl.workers.engine_workers import ActorRolloutRefWorker

    theirs = ActorRolloutRefWorker.actor_worker_cls
    if theirs.__module__ != __name__:
        ActorRolloutRefWorker.actor_worker_cls = _without_zero_advantages(theirs)


def _require_verl() -> None:
    try:
        import verl
    except ImportError as error:
        raise ImportError(f"gspo_ops.integrations.verl is for verl 0.9: {error}") from None
    if verl.__version__.split(".")[:2] != ["0", "9"]:
        raise ImportError(f"gspo_ops.integrations.verl is for verl 0.9, got {verl.__version__}")


def _with_our_backend(theirs: Callable[..., None]) -> Callable[..., None]:
    """verl's patch_forward_with_backends, and this backend."""

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == NAME:
            fuse_forward(model)
        else:
            theirs(model, use_fused_kernels, fused_kernels_backend)

    return patch_forward_with_backends


def _forward(
    model: Any,
    own: Callable[..., Any],
    check_model: bool,
    input_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float = 1.0,
    **arguments: Any,
) -> Any:
    from verl.models.transformers.dense_common import CausalLMOutputForPPO

    if shift_labels is None:  # verl gives them where tokens are packed, or spread over ranks
        tokens = input_ids if labels is None else labels
        if tokens is None:
            raise ValueError("one of input_ids, labels and shift_labels must be given")
        shift_labels = tokens.roll(-1, dims=-1)

    def at_head(head: OutputHead, hidden: Tensor, output: Any) -> Any:
        log_probs, entropy = log_probs_from_hidden(
            hidden, head.weight, shift_labels, **head.options(temperature), return_entropy=True
        )
        kept = {name: output.get(name) for name in _KEPT}
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy, **kept)

    batch = {"input_ids": input_ids} | arguments | {"return_dict": True}
    return hidden_to(model, batch, at_head, check_model, within=own)


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GSPO with verl's signature; the counterpart of its own `"gspo"`.

        s_it = stop_grad(s_i) * pi_t / stop_grad(pi_t)
        loss = -agg(min(s_it A_it, clip(s_it) A_it))

    Args:
        old_log_prob: (B, T) float32 of the policy that sampled.
        log_prob: (B, T) of the policy that is trained.
        advantages: (B, T), one per token as verl has them, constant in a sequence or not.
        response_mask: (B, T) of 0 and 1.
        loss_agg_mode: one of verl's; `"seq-mean-token-mean"` is the paper's.
        config: verl's ActorConfig: `clip_ratio_low`, `clip_ratio_high`, `clip_ratio`, and
            `global_batch_info`, whose counts divide the loss as in verl.
        rollout_is_weights: (B, T) importance weights, detached.

    Returns:
        The loss, and metrics under verl's names and, with `gspo_ops/`, ours.

    Raises:
        ValueError: the aggregation is unknown, or its global count is missing.
    """
    if loss_agg_mode not in _AGGREGATIONS:
        known = ", ".join(map(repr, _AGGREGATIONS))
        raise ValueError(f"loss_agg_mode must be one of {known}, got {loss_agg_mode!r}")
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    low, high = (
        config.clip_ratio if of_side is None else of_side
        for of_side in (config.clip_ratio_low, config.clip_ratio_high)
    )
    if low > _WIDE:
        warnings.warn(
            f"clip_ratio_low={low:g} never clips a ratio of GSPO, whose paper has 3e-4 and 4e-4: "
            "set clip_ratio_low and clip_ratio_high",
            stacklevel=2,
        )
    aggregation, count = _AGGREGATIONS[loss_agg_mode]
    loss, stats = policy_loss_from_log_probs(
        log_prob,
        old_log_prob,
        advantages,
        mask=response_mask,
        objective=GSPOToken(clip_low=low, clip_high=high, aggregation=aggregation),
        rollout_weights=rollout_is_weights,
        denominator=_denominator(count, loss_agg_mode, config.global_batch_info, response_mask),
    )
    metrics = {
        "actor/pg_clipfrac": stats["clip_frac_tokens"].item(),
        "actor/ppo_kl": stats["approx_kl"].item(),
        "actor/pg_clipfrac_lower": 0.0,
    }
    ours = {f"gspo_ops/{name}": x.item() for name, x in stats.items() if x.ndim == 0}
    return loss, metrics | ours


def _denominator(
    count: str | None, mode: str, info: dict[str, Any], mask: Tensor
) -> float | Tensor | None:
    """What verl divides by: counts of the global batch, per data-parallel rank."""
    ranks = info.get("dp_size", 1)
    given = info.get(count) if count else 1
    if given is None and ranks > 1:
        raise ValueError(f"global_batch_info must have {count} with dp_size={ranks}")
    norm = 1
    if mode == "seq-mean-token-sum-norm":
        norm = info.get("loss_scale_factor") or mask.shape[-1]
    if given is None:  # counted here
        return None if norm == 1 else norm * (mask.sum(-1) > 0).sum().float().clamp(min=1)
    return given * norm / ranks


def _without_zero_advantages(theirs: Any) -> Any:
    """verl's TrainingWorker, for an actor."""

    class SkippingWorker(theirs):
        def set_loss_fn(self, loss_fn: Any) -> None:
            _require_proportional(loss_fn)
            super().set_loss_fn(partial(_loss_of_all, loss_fn))

        def train_batch(self, data: Any) -> Any:
            return super().train_batch(_with_advantages(data, self.engine, self.engine_config))

    return SkippingWorker


def _require_proportional(loss_fn: Any) -> None:
    """Refuse a loss to which a sequence without an advantage makes a difference."""
    from verl.workers.utils.losses import ppo_loss

    if getattr(loss_fn, "func", None) is not ppo_loss:
        raise ValueError(
            f"skip_zero_advantages() needs verl's ppo_loss, got {loss_fn} (distillation?)"
        )
    config = loss_fn.keywords["config"]
    mode, aggregation = config.policy_loss.loss_mode, config.loss_agg_mode
    scaled = aggregation != "seq-mean-token-sum-norm" or config.loss_scale_factor is not None
    allowed = {
        f"strategy={config.strategy!r}": config.strategy in ("fsdp", "fsdp2"),
        f"use_kl_loss={config.use_kl_loss}": not config.use_kl_loss,
        f"entropy_coeff={config.entropy_coeff:g}": config.entropy_coeff == 0,
        f"policy_loss.loss_mode={mode!r}": mode in _PROPORTIONAL,
        # verl would divide by the longest response that is left in a micro-batch
        f"loss_agg_mode={aggregation!r} without loss_scale_factor": scaled,
    }
    for setting, is_allowed in allowed.items():
        if not is_allowed:
            raise ValueError(f"skip_zero_advantages() changes the gradient with {setting}")


def _with_advantages(data: Any, engine: Any, settings: Any) -> Any:
    """A mini-batch's sequences with an advantage, filled up to as many on every rank."""
    from verl.utils import tensordict_utils
    from verl.utils.device import get_device_name

    tokens = data.select("advantages", "response_mask").to_padded_tensor()
    live = ((tokens["advantages"] != 0) & (tokens["response_mask"] != 0)).any(dim=1)
    counts = torch.stack([live.sum(), data["loss_mask"].sum().long()]).to(get_device_name())
    of_ranks = counts.repeat(engine.get_data_parallel_size())
    dist.all_gather_into_tensor(of_ranks, counts, group=engine.get_data_parallel_group())
    rows, num_tokens = of_ranks.view(-1, 2).T.tolist()

    index = live.nonzero().squeeze(1)
    lengths = data["input_ids"].offsets().diff()
    shortest = lengths.masked_fill(live, lengths.max() + 1).argmin()
    missing = _whole_micro_batches(max(1, *rows), data, settings) - len(index)
    kept = tensordict_utils.index_select_tensor_dict(
        data, torch.cat([index, shortest.expand(missing)])
    )
    tensordict_utils.assign_non_tensor(kept, **{_ALL_TOKENS: sum(num_tokens)})
    return kept


def _whole_micro_batches(rows: int, data: Any, settings: Any) -> int:
    """`rows`, rounded up to a multiple of what verl cuts mini-batches into."""
    from verl.utils.tensordict_utils import get

    if get(data, "use_dynamic_bsz", settings.use_dynamic_bsz):
        return rows
    size = get(data, "micro_batch_size_per_gpu", settings.micro_batch_size_per_gpu)
    return -(-rows // size) * size


def _loss_of_all(loss_fn: Callable[..., Any], *, data: Any, **arguments: Any) -> Any:
    """verl's loss, divided by the tokens of the whole batch: its engine counts what it is given."""
    from verl.utils import tensordict_utils

    num_tokens = tensordict_utils.get(data, _ALL_TOKENS)
    if num_tokens is not None:  # it is None in inference
        tensordict_utils.assign_non_tensor(data, batch_num_tokens=num_tokens)
    return loss_fn(data=data, **arguments)
