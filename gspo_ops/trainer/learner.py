"""From scored responses to model updates: old log-probs, the fused loss, an optimizer step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from .. import (
    PolicyLoss,
    log_probs_from_hidden,
    log_probs_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
    reference,
)
from ..integrations.batches import fractions_of_all
from ..integrations.heads import as_forward, output_head
from ..integrations.transformers import live_checkpointing
from .config import TrainConfig
from .metrics import combine
from .model import add_lora
from .progress import Diverged
from .ranks import Ranks, whole
from .rollout import (
    LARGEST_DISTANCE,
    Rollout,
    RowLayout,
    autocast,
    own_log_probs,
    real_tokens,
    response_hidden,
)
from .routing_replay import RoutingReplay, expert_churn, find_routers

T = TypeVar("T")
# Responses this many times as long as their prompt have rows of their own. Running the prompt once
# for each of them then adds an eighth of the tokens, or less.
_MUCH_LONGER = 8
# The ops by `update.loss_from`.
_LOG_PROBS: dict[str, Callable[..., Tensor]] = {
    "hidden": log_probs_from_hidden,
    "logits": log_probs_from_logits,
    "eager": reference.log_probs_from_logits,
}
_POLICY_LOSS: dict[str, Callable[..., tuple[Tensor, dict[str, Tensor]]]] = {
    "hidden": policy_loss_from_hidden,
    "logits": policy_loss_from_logits,
    "eager": reference.policy_loss_from_logits,
}


# Factors of the learning rate as functions of the fraction of the run that is done.
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class Batch(NamedTuple):
    """A mini-batch or a part of one: sequences, advantages and the log-probs to compare with.

    Attributes:
        rollout: B responses: those of groups with a gradient, or a stand-in if there are none.
        advantages: (B,) fp32, or (N,) with an objective that takes one per token.
        old_log_probs: (N,) fp32, packed.
        ref_log_probs: (N,) log-probs of the model before training, for the KL term.
        rollout_weights: (B,) or (N,) importance weights from sampling to the old log-probs.
        routing: what `RoutingReplay` recorded with the old log-probs.
        lengths: lengths of all responses, over whose number or tokens the loss is averaged; None if
            no response is left out.
        left_out: fraction of all responses that are left out.
    """

    rollout: Rollout
    advantages: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor | None = None
    rollout_weights: Tensor | None = None
    routing: RoutingReplay | None = None
    lengths: Tensor | None = None
    left_out: float = 0.0

    def all_lengths(self) -> Tensor:
        return self.rollout.mask.sum(1) if self.lengths is None else self.lengths


class Learner:
    """A model in training, and its optimizer.

    Attributes:
        adapter: peft's wrapper of the model; None without LoRA.
        reference: the model before training, if there is a KL term and no LoRA.
        bad_updates: number of updates skipped since the last good one.
        layout: layout of the rows that the body runs on.
        compared: the longest row for which the layout was checked against the model's own
            log-probs.
    """

    def __init__(self, config: TrainConfig, model: PreTrainedModel, ranks: Ranks) -> None:
        """Add adapters to the model and shard it over the processes, as the settings ask.

        Args:
            config: the settings.
            model: the model, with fp32 weights on their device; trained in place.
            ranks: the processes of the run.

        Raises:
            ValueError: `update.routing_replay` or `logging.expert_churn` is set, and the model has
                no routers.
            ImportError: peft is needed but not installed.
        """
        for key, is_asked in (
            ("update.routing_replay", config.update.routing_replay),
            ("logging.expert_churn", config.logging.expert_churn),
        ):
            try:
                find_routers(model) if is_asked else None
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        self.config, self.model, self.ranks = config, model, ranks
        output_head(model)  # must be found in the whole model, before it is sharded
        if config.update.gradient_checkpointing:
            if config.update.skip_dead:
                live_checkpointing(model, strict=False)
            else:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        self.objective = config.objective.build()
        rank = config.model.lora_rank
        self.adapter = add_lora(model, rank, config.seed) if rank else None
        self.reference = None
        if self.objective.kl_coef > 0 and self.adapter is None:
            self.reference = copy.deepcopy(model).requires_grad_(False)
            output_head(self.reference)
            ranks.shard(self.reference)
        ranks.shard(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, lr=config.update.learning_rate, weight_decay=config.update.weight_decay,
            betas=(config.update.beta1, config.update.beta2), fused=True,
        )  # fmt: skip
        self.scheduler = self._schedule(updates=0)
        self.bad_updates = 0
        self.layout: RowLayout = "shared"
        self.compared = 0

    def prepare(self, rollout: Rollout, advantages: Tensor) -> tuple[Batch, dict[str, Tensor]]:
        """Prepare a mini-batch, or a part of one, for updates.

        Args:
            rollout: B responses.
            advantages: (B, turns), or (B, T) with `task.graded`.

        Returns:
            The batch, and metrics of how far sampling's log-probs are from training's.

        Raises:
            ValueError: no layout gives training the model's own log-probs.
        """
        self._choose_layout(rollout)
        lengths = rollout.mask.sum(1)
        groups = self._with_gradient(advantages.view(len(rollout.prompts), -1))
        if len(groups):
            advantages = advantages.view(len(rollout.prompts), rollout.group_size, -1)[groups]
            rollout, advantages = rollout.select(groups), advantages.flatten(0, 1)
        else:
            rollout, advantages = rollout.stand_in(), advantages[:1]
        left_out = 1 - len(groups) * rollout.group_size / len(lengths)
        if self.config.task.graded:
            advantages = advantages[:, : rollout.mask.shape[1]][rollout.mask]
        elif advantages.shape[1] == 1:
            advantages = advantages[:, 0]
        else:
            ids = torch.arange(len(advantages), device=advantages.device)
            ids = ids.repeat_interleave(rollout.mask.sum(1))
            advantages = advantages[ids, rollout.turn[rollout.mask]]
        routing = RoutingReplay() if self.config.update.routing_replay else None
        with nullcontext() if routing is None else routing.record(self.model):
            recomputed = self.log_probs(rollout)
        # a stand-in lacks its prompt, so that sampling's log-probs are not comparable
        sampled = rollout.log_probs[rollout.mask] if len(groups) else recomputed
        mismatch = self._mismatch(rollout, advantages, recomputed, sampled)
        mismatch["mismatch_clip_frac"] *= len(sampled) / lengths.sum()
        is_rollout = self.config.update.old_log_probs == "rollout"
        batch = Batch(
            rollout,
            advantages,
            sampled if is_rollout else recomputed,
            self._ref_log_probs(rollout),
            self.rollout_weights(rollout, recomputed - sampled),
            routing,
            lengths,
            left_out,
        )
        return batch, mismatch | {"left_out_frac": torch.tensor(left_out)}

    def _with_gradient(self, advantages: Tensor) -> Tensor:
        """Return the (q,) groups of (Q, ...) advantages that may have a gradient.

        These are all groups without `skip_dead`, or with a term that needs no advantage.
        """
        is_live = (advantages != 0).any(1)
        if not self.config.update.skip_dead or not self.objective.needs_advantage():
            is_live = torch.ones_like(is_live)
        return is_live.nonzero().squeeze(1)

    @torch.no_grad()
    def log_probs(self, rollout: Rollout, model: PreTrainedModel | None = None) -> Tensor:
        """Compute (N,) log-probs before any update, by the very forward that the update will run.

        Sampling's own log-probs would not do: they come from cached decoding, which has other
        shapes, and a bf16 body rounds differently in other shapes. That noise in the ratio is wider
        than GSPO's clip range, and no loss op removes it (the op removes the head's part). With
        the same mini-batches, padding and order, the noise is the same on both sides: before the
        first update s == 1 exactly, and the metric `first_ratio_error` records whether it is.

        Args:
            rollout: B responses with N sampled tokens.
            model: the model to run; None for the one in training.
        """
        model = model or self.model

        def forward() -> Tensor:
            inputs, options = self._distributions(model, rollout)
            return _LOG_PROBS[self.config.update.loss_from](*inputs, rollout.targets(), **options)

        return as_forward(model, forward)

    def churn(self, rollout: Rollout, update: Callable[[], T]) -> tuple[T, float]:
        """Run an update; return its result and the fraction of the experts that it replaces.

        Args:
            rollout: the responses whose experts are compared.
            update: the update to run.
        """

        def routing() -> RoutingReplay:
            with (found := RoutingReplay()).record(self.model):
                self.log_probs(rollout)
            return found

        before, given = routing(), update()
        return given, expert_churn(before, routing(), real_tokens(rollout, self.layout))

    def update(self, *parts: Batch) -> dict[str, Tensor] | None:
        """Take one optimizer step on a mini-batch.

        Args:
            parts: the mini-batch in parts of equally many prompts.

        Returns:
            The statistics of the loss, or None if the step was skipped.

        Raises:
            Diverged: `update.max_bad_updates` steps in a row were skipped.
        """
        denominator = self.ranks.denominator(self.objective, [part.all_lengths() for part in parts])
        found = [self._backward(part, denominator) for part in parts]
        loss = torch.stack([of_part for of_part, _ in found]).sum()
        trained = self.optimizer.param_groups[0]["params"]
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, self.config.update.max_grad_norm))
        if self.ranks.any(not bool(torch.isfinite(loss + norm))):
            self._skip(loss, norm)
            return None
        self.bad_updates = 0
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return _together([stats for _, stats in found]) | {"loss": loss, "grad_norm": norm}

    def _backward(self, part: Batch, denominator: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        replay = nullcontext() if part.routing is None else part.routing.replay(self.model)
        with replay, self._checkpointing():
            loss, stats = self.loss(part, denominator)
            loss.backward()
        return loss.detach(), stats

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Put checkpointed layers into training mode: transformers checkpoints no others.

        Modules inside remain in eval mode, and the layers' own dropout is 0.
        """
        layers = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        owners = layers + [layer.config for layer in layers if hasattr(layer, "config")]
        settings: list[tuple[Any, str, Any]] = [(layer, "training", True) for layer in layers]
        settings += [
            (owner, name, 0.0)
            for owner in owners
            for name, value in vars(owner).items()
            if "drop" in name and isinstance(value, float)
        ]
        with ExitStack() as stack:
            for owner, name, value in settings:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)
            yield

    def loss(self, batch: Batch, denominator: Tensor | None = None) -> PolicyLoss:
        """Compute the loss of a part of a mini-batch.

        Args:
            batch: the part.
            denominator: denominator of the whole mini-batch's mean; None if the part is all that
                this process has of it.

        Returns:
            The part's contribution to the mean loss, and its statistics. Fractions describe all
            responses; the other statistics describe those that are not left out (`left_out_frac`
            is the fraction that is).
        """
        cu_seqlens = batch.rollout.cu_seqlens()
        if denominator is None:
            denominator = self.ranks.denominator(self.objective, [batch.all_lengths()])

        def forward() -> tuple[Tensor, dict[str, Tensor]]:
            inputs, options = self._distributions(self.model, batch.rollout)
            return _POLICY_LOSS[self.config.update.loss_from](
                *inputs, batch.rollout.targets(), batch.old_log_probs, batch.advantages,
                cu_seqlens=cu_seqlens, objective=self.objective, denominator=denominator,
                ref_log_probs=batch.ref_log_probs, rollout_weights=batch.rollout_weights,
                **options,
            )  # fmt: skip

        loss, stats = as_forward(self.model, forward)
        lengths = cu_seqlens.diff() * (batch.left_out < 1)
        all_lengths = batch.all_lengths()
        sequences = [(n > 0).sum() for n in (lengths, all_lengths)]
        stats = fractions_of_all(stats, sequences, [lengths.sum(), all_lengths.sum()])
        return PolicyLoss(loss, stats | {"left_out_frac": loss.new_tensor(batch.left_out)})

    def rollout_weights(self, rollout: Rollout, difference: Tensor) -> Tensor | None:
        """Return min(exp(d), cap) of each token's difference d, or of each sequence's sum of d."""
        cap = self.config.update.rollout_weight_cap
        if cap == 0:
            return None
        if self.objective.ratio_level != "token":
            of_sequence = difference.new_zeros(rollout.mask.shape)
            difference = of_sequence.masked_scatter(rollout.mask, difference).sum(1)
        return difference.clamp(max=math.log(cap)).exp()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is not in the tensors of model and optimizer."""
        return {
            "updates": self.scheduler.last_epoch, "bad_updates": self.bad_updates,
            "layout": self.layout, "compared": self.compared,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, but with the learning rate of the present settings."""
        self.scheduler = self._schedule(state["updates"])
        self.bad_updates = state["bad_updates"]
        self.layout, self.compared = state["layout"], state["compared"]

    def _choose_layout(self, rollout: Rollout) -> None:
        """Choose the layout that reproduces the model's own log-probs, in fp32, on two groups.

        The check is done on the first rollout, and again when rows are longer than before, since
        they may exceed an attention window. Attention in a shared row grows with the square of its
        length, so responses much longer than their prompt get rows of their own.
        """
        sizes = self.ranks.gather((rollout.prompts.shape[1], rollout.responses.shape[1]))
        prompt, response = (max(of) for of in zip(*sizes, strict=True))
        if prompt + response <= self.compared:
            return
        self.compared = prompt + response
        if response >= _MUCH_LONGER * prompt:
            self.layout = "separate"
        lengths = rollout.prompt_mask.sum(1)  # the groups with the most and the least padding
        groups = rollout.select(torch.stack([lengths.argmin(), lengths.argmax()]))
        own = own_log_probs(self.model, groups, 1.0)
        while self.ranks.any(not (distance := self._distance(groups, own)) <= LARGEST_DISTANCE):
            if self.layout == "separate":
                raise ValueError(
                    f"model.name: the log-probs of {type(self.model).__name__} in padded rows are "
                    f"{distance:.2g} nats away from those in unpadded rows"
                )
            self.layout = "separate"

    @torch.no_grad()
    def _distance(self, group: Rollout, own: Tensor) -> float:
        """Return the mean distance from the model's own log-probs; inf if it refuses the masks."""

        def forward() -> Tensor:
            hidden = response_hidden(self.model, group, nullcontext, self.layout)
            head = output_head(self.model)
            return log_probs_from_hidden(
                hidden, head.weight, group.targets(), **head.options(temperature=1.0)
            )

        try:
            return (as_forward(self.model, forward) - own).abs().mean().item()
        except Exception as error:  # the model's code may raise anything
            if self.layout == "separate":
                raise ValueError(
                    f"model.name: {type(self.model).__name__} fails in padded rows: {error}"
                ) from error
            return math.inf

    def _schedule(self, updates: int) -> LambdaLR:
        """Make the learning-rate schedule as it is after a number of updates."""
        update = self.config.update
        last = self.config.steps * update.mini_batches * update.epochs

        def factor(n: int) -> float:
            if n < update.warmup_steps:
                return (n + 1) / (update.warmup_steps + 1)
            done = min((n - update.warmup_steps) / max(last - update.warmup_steps, 1), 1.0)
            return _SCHEDULES[update.schedule](done)

        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = update.learning_rate
        return LambdaLR(self.optimizer, factor, last_epoch=updates - 1)

    def _ref_log_probs(self, rollout: Rollout) -> Tensor | None:
        if self.objective.kl_coef == 0:
            return None
        if self.reference is not None:
            return self.log_probs(rollout, self.reference)
        assert self.adapter is not None
        with self.adapter.disable_adapter():
            return self.log_probs(rollout)

    def _mismatch(
        self, rollout: Rollout, advantages: Tensor, recomputed: Tensor, sampled: Tensor
    ) -> dict[str, Tensor]:
        """Measure log-ratios of training to sampling, and what fraction they alone would clip."""
        stats = policy_loss_from_log_probs(
            recomputed, sampled, advantages, cu_seqlens=rollout.cu_seqlens(),
            objective=replace(self.objective, kl_coef=0.0, entropy_coef=0.0),
        ).stats  # fmt: skip
        tokens = (recomputed - sampled).abs()
        return {
            "mismatch_token_mean": tokens.mean(), "mismatch_token_max": tokens.max(),
            "mismatch_sequence_mean": stats["log_ratio"].abs().mean(),
            "mismatch_sequence_max": stats["log_ratio"].abs().max(),
            "mismatch_clip_frac": stats["clip_frac_tokens"],
        }  # fmt: skip

    def _skip(self, loss: Tensor, norm: Tensor) -> None:
        self.optimizer.zero_grad()
        self.bad_updates += 1
        if self.bad_updates >= self.config.update.max_bad_updates:
            raise Diverged(
                f"{self.bad_updates} updates in a row had a loss or a gradient that is not finite "
                f"(the last: loss {loss.item():g}, gradient norm {norm.item():g}); they were "
                "skipped, so the weights are those before the first of them. --resume continues "
                "from the last checkpoint and accepts a lower update.learning_rate"
            )

    def _distributions(
        self, model: PreTrainedModel, rollout: Rollout
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return the inputs of the ops, hidden states and head or logits, and their options."""
        temperature = self.config.rollout.temperature
        hidden = response_hidden(
            model, rollout, autocast(model.device, self.config.dtype), self.layout
        )
        head = output_head(model)
        if self.config.update.loss_from != "hidden":
            return (head.logits(hidden),), {"temperature": temperature}
        return (hidden, head.weight), head.options(temperature)


def _together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combine the statistics of a mini-batch's parts."""
    if len(parts) == 1:
        return parts[0]
    numbers = [{k: x for k, x in part.items() if x.ndim == 0} for part in parts]
    per_sequence = {k: torch.cat([p[k] for p in parts]) for k, x in parts[0].items() if x.ndim}
    return {k: torch.tensor(x) for k, x in combine(numbers).items()} | per_sequence
