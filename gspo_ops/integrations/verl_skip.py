"""Updates of verl's actor without the sequences whose advantages are zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .verl_losses import NAME, require_verl, say_once

_ALL_TOKENS = "gspo_ops_batch_num_tokens"  # in the mini-batch before sequences are left out
# In these losses, each sequence is a separate term, times its advantage. Among verl's others, dro
# adds a square, clip_cov, kl_cov and bypass_mode look at a whole micro-batch, and geo_mean averages
# over it.
PROPORTIONAL = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "cispo", NAME)


def skip_zero_advantages() -> None:
    """Leave sequences whose advantages are all zero out of the actor's updates, exactly.

    Such sequences have no gradient. verl has no registry of workers, so the worker that trains the
    actor is replaced by one that leaves them out of each mini-batch, before the engine splits it
    into micro-batches. The denominators of the loss still count all sequences. All ranks run the
    same number of sequences; a rank with fewer repeats its shortest sequence without an advantage.
    Once per mini-batch, the host waits for two counts from each rank.

    All sequences are trained, and the log says so once, if a sequence with a zero advantage may
    have a gradient or contribute to that of others: with `use_kl_loss`, `entropy_coeff`,
    distillation, some `loss_mode`s, and a `strategy` other than FSDP, whose engine may add router
    losses.

    Raises:
        ImportError: verl is not installed, or is not verl 0.9.
    """
    require_verl()
    from verl.workers.engine_workers import ActorRolloutRefWorker

    theirs = ActorRolloutRefWorker.actor_worker_cls
    if theirs.__module__ != __name__:
        ActorRolloutRefWorker.actor_worker_cls = _without_zero_advantages(theirs)


def _without_zero_advantages(theirs: Any) -> Any:
    """Derive from verl's worker for actors a class that leaves sequences out."""

    class SkippingWorker(theirs):
        _skips = False  # until the loss is known

        def set_loss_fn(self, loss_fn: Any) -> None:
            found = _obstacles(loss_fn)
            self._skips = not found
            for obstacle in found:
                say_once(f"skip_zero_advantages() leaves no sequence out: {obstacle}")
            super().set_loss_fn(loss_fn if found else partial(_loss_of_all, loss_fn))

        def train_batch(self, data: Any) -> Any:
            if self._skips:
                data = _with_advantages(data, self.engine, self.engine_config)
            return super().train_batch(data)

    return SkippingWorker


def _obstacles(loss_fn: Any) -> list[str]:
    """Return the settings with which a sequence without an advantage makes a difference."""
    from verl.workers.utils.losses import ppo_loss

    if getattr(loss_fn, "func", None) is not ppo_loss:
        return [f"the loss is not verl's ppo_loss, but {loss_fn} (distillation?)"]
    config = loss_fn.keywords["config"]
    mode, aggregation = config.policy_loss.loss_mode, config.loss_agg_mode
    scaled = aggregation != "seq-mean-token-sum-norm" or config.loss_scale_factor is not None
    allowed = {
        f"strategy={config.strategy!r}": config.strategy in ("fsdp", "fsdp2"),
        f"use_kl_loss={config.use_kl_loss}": not config.use_kl_loss,
        f"entropy_coeff={config.entropy_coeff:g}": config.entropy_coeff == 0,
        f"policy_loss.loss_mode={mode!r}": mode.removeprefix(f"{NAME}_") in PROPORTIONAL,
        # verl would divide by the longest response that is left in a micro-batch
        f"loss_agg_mode={aggregation!r} without loss_scale_factor": scaled,
    }
    return [
        f"its gradient may change with {setting}"
        for setting, is_allowed in allowed.items()
        if not is_allowed
    ]


def _with_advantages(data: Any, engine: Any, settings: Any) -> Any:
    """Select the sequences with an advantage, filled up to the same number on every rank."""
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
    """Round `rows` up to a multiple of the micro-batches into which verl splits mini-batches."""
    from verl.utils.tensordict_utils import get

    if get(data, "use_dynamic_bsz", settings.use_dynamic_bsz):
        return rows
    size = get(data, "micro_batch_size_per_gpu", settings.micro_batch_size_per_gpu)
    return -(-rows // size) * size


def _loss_of_all(loss_fn: Callable[..., Any], *, data: Any, **arguments: Any) -> Any:
    """Call verl's loss, but divide by all tokens of the batch: its engine counts those left."""
    from verl.utils import tensordict_utils

    num_tokens = tensordict_utils.get(data, _ALL_TOKENS)
    if num_tokens is not None:  # None in inference
        tensordict_utils.assign_non_tensor(data, batch_num_tokens=num_tokens)
    return loss_fn(data=data, **arguments)
