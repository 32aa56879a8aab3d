"""GSPO from prompts to a trained model, in one loop.

    prompts -> G sampled responses each -> verifiable rewards -> group advantages
            -> old log-probs -> K mini-batch updates through the fused loss -> metrics

`docs/trainer.md` lists where it deviates from the paper (arXiv 2507.18071).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import (
    group_advantages,
    log_probs_from_hidden,
    log_probs_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_log_probs,
    policy_loss_from_logits,
    reference,
)
from ..integrations.transformers import as_forward, output_head
from . import checkpoint
from .config import TrainConfig, from_tables, to_tables
from .metrics import combine, in_words
from .model import add_lora, load_model
from .progress import Progress, stop_signals
from .ranks import Ranks, whole
from .report import RunFiles, Summary, plot
from .rollout import (
    Autocast,
    Rollout,
    Vocabulary,
    append_turn,
    concatenate,
    generate,
    response_hidden,
)
from .routing_replay import RoutingReplay, find_routers
from .tasks import Deck, Problem, Task, make_task

# Held-out problems answered at once.
_EVAL_BATCH = 64

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
# What a resumed run may change.
_CHANGEABLE = {"out", "steps", "time_limit", "device", "evaluation", "checkpoint", "logging"}


class Interrupted(Exception):
    """The run was asked to stop; it has saved where it is."""


class Diverged(Exception):
    """Too many updates in a row whose loss or gradient was not finite."""


class Batch(NamedTuple):
    """One mini-batch: sequences, their advantages, and the log-probs they are compared with.

    Attributes:
        rollout: B responses.
        advantages: (B,) fp32, or (N,) with an objective that takes one per token.
        old_log_probs: (N,) fp32, packed.
        ref_log_probs: (N,) of the model before training, for the KL term.
        rollout_weights: (B,) or (N,) importance weights from sampling to old log-probs.
        routing: what `RoutingReplay` recorded with the old log-probs.
    """

    rollout: Rollout
    advantages: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor | None = None
    rollout_weights: Tensor | None = None
    routing: RoutingReplay | None = None


def train(config: TrainConfig, *, resume: bool = False) -> Summary:
    """Train a model, measuring held-out accuracy before and after.

    Writes `metrics.jsonl` (one line per step), `samples.jsonl`, `summary.json`, `training.png`,
    checkpoints and the model into `config.out`; what another run left there is moved aside.

    Args:
        config: the settings.
        resume: continue from the last whole checkpoint in `config.out`.

    Returns:
        Held-out accuracies, their standard errors, and the time taken.

    Raises:
        ValueError: the settings do not fit the model, the task, or the run that is resumed.
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
        Diverged: loss or gradient was not finite too often.
    """
    return Trainer.of(config).run(resume=resume)


class Trainer:
    """The state of one run."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
    ) -> None:
        """Put the model on the device, or spread it over those of torchrun's processes.

        Args:
            config: the settings.
            model: fp32 weights; trained in place.
            tokenizer: the model's.
            task: problems to train on and to hold out.
        """
        device = config.torch_device()
        self.ranks = Ranks(device)
        _check_parts(config, self.ranks.size)
        if config.update.routing_replay:
            try:
                find_routers(model)
            except ValueError as error:
                raise ValueError(f"update.routing_replay: {error}") from None
        # what runs, so that a run resumed on another machine is not silently another one
        self.config = config = replace(config, dtype=config.training_dtype)
        self.objective = config.objective.build()
        self.model = model.to(device)
        rank = config.model.lora_rank
        self.adapter = add_lora(model, rank, config.seed) if rank else None
        self.reference = None
        if self.objective.kl_coef > 0 and self.adapter is None:
            self.reference = copy.deepcopy(model).requires_grad_(False)
            self.ranks.shard(self.reference)
        self.ranks.shard(model)
        self.tokenizer = tokenizer
        self.task = task
        newline = config.rollout.stop == "newline"
        self.vocabulary = Vocabulary.of(tokenizer, device, newline=newline)
        self.generator = torch.Generator(device)
        self.deck = Deck(len(task.train), config.seed)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trainable, lr=config.update.learning_rate, weight_decay=0.0, fused=True
        )
        warmup = config.update.warmup_steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: min(1.0, (update + 1) / (warmup + 1))
        )
        self.bad_updates = 0  # in a row
        self.progress = Progress()
        self._seed(self.generator, "training")

    @classmethod
    def of(cls, config: TrainConfig) -> Trainer:
        """Make the task and load the model that `config` names.

        Raises:
            ValueError: the model, the task or the device is unknown, or the task too small.
            ImportError: the package that the model comes in is not installed.
        """
        task = make_task(config.task, config.seed)
        return cls(config, *load_model(config.model.name), task)

    # The run

    def run(self, *, resume: bool = False) -> Summary:
        """Evaluate, train, evaluate again, and write the results; see `train`."""
        config, ranks, start = self.config, self.ranks, time.monotonic()
        files = self._resume() if resume else self._start()
        progress = self.progress
        with files or nullcontext(), stop_signals(twice=ranks.size == 1) as stopped:
            if progress.before is None:
                progress.before = self.evaluate()
            train_start = time.monotonic() - progress.train_seconds
            bar = self._bar(total=config.steps, initial=progress.step, unit="step")
            while progress.step < config.steps and not ranks.any(
                progress.train_seconds >= config.time_limit
            ):
                row = self.step()
                every = config.evaluation.every
                if every and progress.step % every == 0 and progress.step < config.steps:
                    row["accuracy"] = self.evaluate().mean().item()
                if files:
                    files.append({"step": progress.step} | row, self.samples)
                progress.train_seconds = time.monotonic() - train_start
                bar.update()
                bar.set_postfix_str(in_words(row))
                every = config.checkpoint.every
                is_last = progress.step == config.steps
                is_asked = ranks.any(stopped())
                if is_asked or (every and (is_last or progress.step % every == 0)):
                    self._save(files)
                if is_asked:
                    bar.close()
                    raise Interrupted(
                        f"stopped after step {progress.step} of {config.steps}: --resume goes on"
                    )
            bar.close()
            after = self.evaluate()
            summary = Summary.of(
                progress.before, after, seconds=progress.seconds + time.monotonic() - start
            )
            if files:
                files.finish(summary)
                plot({config.out.name: files.rows}, config.out / "training.png", title=str(summary))
        if config.checkpoint.save_model:
            self._save_model()
        return summary

    def step(self) -> dict[str, float]:
        """Sample responses to the next problems and update the model on them.

        Returns:
            The step's metrics, by the names in `metrics.jsonl`, of all processes.
        """
        config, start = self.config, time.monotonic()
        self._seed(self.generator, "training")
        problems, rollout, rewards, refilled = self._sample_groups()
        sampled = time.monotonic()
        advantages = self._advantages(rewards)
        parts = rollout.split(config.update.mini_batches)
        chunks = advantages.chunk(config.update.mini_batches)
        batches, mismatches = [], []
        for part, chunk in zip(parts, chunks, strict=True):
            batch, mismatch = self._prepare(part, chunk)
            batches.append(batch)
            mismatches.append(mismatch)
        prepared = time.monotonic()
        order = [batch for _ in range(config.update.epochs) for batch in batches]
        bar = self._bar(order, desc="updates", leave=False)
        stats = [found for found in map(self._update, bar) if found is not None]
        self.progress.step += 1
        self.samples = self._show(problems, rollout, rewards, advantages)

        tokens, end = int(rollout.mask.sum()), time.monotonic()
        mixed = _is_mixed(rewards, config.rollout.group_size)
        row = (
            combine([{k: v for k, v in s.items() if k != "log_ratio"} for s in stats])
            | ({"first_ratio_error": _ratio_error(stats[0])} if stats else {})
            | combine(mismatches)
            | {
                "reward": rewards.mean().item(),
                "mixed_groups": mixed.float().mean().item(),
                "refilled_groups": refilled,
                "skipped_updates": len(order) - len(stats),
                "response_tokens": tokens / len(rewards),
                "tokens_per_s": tokens / (end - start),
                "rollout_s": sampled - start,
                "old_log_probs_s": prepared - sampled,
                "update_s": end - prepared,
                "step_s": end - start,
            }
        )
        return combine(self.ranks.gather(row))

    def evaluate(self) -> Tensor:
        """(eval_size,) mean reward of the responses sampled to each held-out problem.

        The random numbers are the evaluation's own: how often it is done changes no training.
        """
        ranks, samples = self.ranks, self.config.evaluation.samples
        held_out = self.task.held_out[ranks.rank :: ranks.size]
        generator = torch.Generator(self.model.device)
        self._seed(generator, "evaluation")
        batches = [held_out[i : i + _EVAL_BATCH] for i in range(0, len(held_out), _EVAL_BATCH)]
        bar = self._bar(batches, desc="held-out problems", leave=False)
        rewards = ranks.with_whole_weights(
            self.model,
            lambda: [self._sample(list(b), samples, generator)[1].mean(1) for b in bar],
        )
        mine = torch.cat([torch.empty(0), *(r.cpu() for r in rewards)])
        mine = mine.view(len(held_out), samples).mean(1)
        accuracies = torch.empty(len(self.task.held_out))
        for rank, part in enumerate(ranks.gather(mine)):
            accuracies[rank :: ranks.size] = part
        return accuracies

    def _seed(self, generator: torch.Generator, use: Literal["training", "evaluation"]) -> None:
        """Begin the random numbers of a use in a step: each process has its own."""
        numbers = self.config.seed, self.progress.step, self.ranks.rank, use == "evaluation"
        (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        generator.manual_seed(int(seed))

    def _bar(self, *args: Any, **options: Any) -> tqdm:
        return tqdm(*args, disable=not self.ranks.is_first, **options)

    # Rollouts

    def _sample_groups(self) -> tuple[list[Problem], Rollout, Tensor, int]:
        """Problems, responses and rewards (B, turns) of a step, and how many groups were replaced.

        All processes draw the same problems, and each takes its part.
        """
        problems = self.ranks.part(self.deck.draw(self.task.train, self.config.rollout.prompts))
        return self.ranks.with_whole_weights(self.model, lambda: self._sample_and_refill(problems))

    def _sample_and_refill(
        self, problems: list[Problem]
    ) -> tuple[list[Problem], Rollout, Tensor, int]:
        """`_sample_groups` for these problems.

        A group whose rewards are all equal has no gradient; `rollout.refill` rounds replace such
        groups by others that have one, as far as they turn up.
        """
        group_size = self.config.rollout.group_size
        rollout, rewards = self._sample(problems, group_size, self.generator)
        refilled = 0
        for _ in range(self.config.rollout.refill):
            dead = (~_is_mixed(rewards, group_size)).nonzero().squeeze(1)
            counts = self.ranks.gather(len(dead))
            if not sum(counts):
                break
            others = self.ranks.part(self.deck.draw(self.task.train, sum(counts)), counts)
            if not others:
                continue
            more, their_rewards = self._sample(others, group_size, self.generator)
            live = _is_mixed(their_rewards, group_size).nonzero().squeeze(1)
            # a live newcomer in the place of each dead group, as long as there are some
            places = torch.arange(len(problems), device=live.device)
            places[dead[: len(live)]] = len(problems) + live
            refilled += len(live)
            rollout = concatenate([rollout, more], self.vocabulary.pad_id).select(places)
            both = torch.cat([rewards, their_rewards]).view(-1, group_size, rewards.shape[1])
            rewards = both[places].flatten(0, 1)
            problems = [[*problems, *others][i] for i in places.tolist()]
        return problems, rollout, rewards, refilled

    def _sample(
        self, problems: list[Problem], group_size: int, generator: torch.Generator
    ) -> tuple[Rollout, Tensor]:
        """Responses, in as many turns as the task has, and their rewards (B, turns)."""
        prompts = [self._prompt_tokens(problem) for problem in problems]
        rollout = self._generate(prompts, group_size, generator)
        asked = [problem for problem in problems for _ in range(group_size)]
        answers = self._texts(rollout)
        rewards = [[self.task.reward(a, p) for a, p in zip(answers, asked, strict=True)]]
        for _ in range(self.task.turns - 1):
            following = [self.task.follow_up(p, a) for p, a in zip(asked, answers, strict=True)]
            asked = [problem for problem in following if problem is not None]
            texts = [
                problem.question if answer.endswith("\n") else "\n" + problem.question
                for problem, answer in zip(asked, answers, strict=True)
            ]
            questions = [self._tokens(text) for text in texts]
            so_far = [
                prompts[b // group_size] + rollout.responses[b, rollout.real[b]].tolist() + question
                for b, question in enumerate(questions)
            ]
            turn = self._generate(so_far, 1, generator)
            answers = self._texts(turn)
            rewards.append([self.task.reward(a, p) for a, p in zip(answers, asked, strict=True)])
            rollout = append_turn(rollout, questions, turn, self.vocabulary.pad_id)
        return rollout, torch.tensor(rewards, device=self.model.device).float().mT

    def _generate(
        self, prompts: list[list[int]], group_size: int, generator: torch.Generator
    ) -> Rollout:
        config = self.config.rollout
        return generate(
            self.model, prompts, self.vocabulary, group_size=group_size,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            autocast=self._autocast(self.config.rollout_dtype), generator=generator,
        )  # fmt: skip

    def _prompt_tokens(self, problem: Problem) -> list[int]:
        text = self.task.prompt(problem)
        if not self.config.task.chat:
            return self.tokenizer(text)["input_ids"]
        message = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True
        )["input_ids"]

    def _tokens(self, text: str) -> list[int]:
        """Of a text in the middle of others."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _texts(self, rollout: Rollout) -> list[str]:
        return self.tokenizer.batch_decode(
            [r[m] for r, m in zip(rollout.responses.cpu(), rollout.real.cpu(), strict=True)],
            skip_special_tokens=True,
        )

    def _show(
        self, problems: list[Problem], rollout: Rollout, rewards: Tensor, advantages: Tensor
    ) -> list[dict[str, Any]]:
        """Some responses to look at, spread over the batch."""
        count, texts = self.config.logging.samples, self._texts(rollout)
        places = [i * len(texts) // count for i in range(count)]
        return [
            {
                "prompt": self.task.prompt(problems[i // rollout.group_size]),
                "response": texts[i], "rewards": rewards[i].tolist(),
                "advantages": advantages[i].tolist(),
            }
            for i in places
        ]  # fmt: skip

    # Log-probs and updates

    def _advantages(self, rewards: Tensor) -> Tensor:
        """(B, turns), each turn's rewards compared within the group."""
        size = self.config.rollout.group_size
        return torch.stack([group_advantages(r, group_size=size) for r in rewards.unbind(1)], 1)

    def _prepare(self, rollout: Rollout, advantages: Tensor) -> tuple[Batch, dict[str, Tensor]]:
        """A mini-batch, and how sampling's log-probs differ from those of training."""
        if advantages.shape[1] == 1:
            advantages = advantages[:, 0]
        else:
            ids = torch.arange(len(advantages), device=advantages.device)
            ids = ids.repeat_interleave(rollout.mask.sum(1))
            advantages = advantages[ids, rollout.turn[rollout.mask]]
        routing = RoutingReplay() if self.config.update.routing_replay else None
        with nullcontext() if routing is None else routing.record(self.model):
            recomputed = self._log_probs(self.model, rollout)
        sampled = rollout.log_probs[rollout.mask]
        mismatch = self._mismatch(rollout, advantages, recomputed, sampled)
        is_rollout = self.config.update.old_log_probs == "rollout"
        batch = Batch(
            rollout,
            advantages,
            sampled if is_rollout else recomputed,
            self._ref_log_probs(rollout),
            self._rollout_weights(rollout, recomputed - sampled),
            routing,
        )
        return batch, mismatch

    @torch.no_grad()
    def _log_probs(self, model: PreTrainedModel, rollout: Rollout) -> Tensor:
        """(N,) log-probs before any update, by the very forward that the update will run.

        Sampling's own log-probs would not do: they come from cached decoding, in other shapes, and
        a bf16 body rounds differently in other shapes. That noise in the ratio is wider than
        GSPO's clip range, and no loss op removes it (the op removes the head's share). With the
        same mini-batches, padding and order the noise is the same on both sides: before the first
        update s == 1 exactly, and `first_ratio_error` in the metrics records that it is.
        """

        def forward() -> Tensor:
            inputs, options = self._distributions(model, rollout)
            return _LOG_PROBS[self.config.update.loss_from](*inputs, rollout.targets(), **options)

        return as_forward(model, forward)

    def _ref_log_probs(self, rollout: Rollout) -> Tensor | None:
        if self.objective.kl_coef == 0:
            return None
        if self.reference is not None:
            return self._log_probs(self.reference, rollout)
        assert self.adapter is not None
        with self.adapter.disable_adapter():
            return self._log_probs(self.model, rollout)

    def _rollout_weights(self, rollout: Rollout, difference: Tensor) -> Tensor | None:
        """min(exp(sum of the differences), cap): of a sequence, or of each token for GRPO."""
        cap = self.config.update.rollout_weight_cap
        if cap == 0:
            return None
        if self.objective.ratio_level != "token":
            of_sequence = difference.new_zeros(rollout.mask.shape)
            difference = of_sequence.masked_scatter(rollout.mask, difference).sum(1)
        return difference.clamp(max=math.log(cap)).exp()

    def _mismatch(
        self, rollout: Rollout, advantages: Tensor, recomputed: Tensor, sampled: Tensor
    ) -> dict[str, Tensor]:
        """Log-ratios from sampling's log-probs to training's, and what they alone would clip."""
        stats = policy_loss_from_log_probs(
            recomputed, sampled, advantages, cu_seqlens=rollout.cu_seqlens(),
            objective=replace(self.objective, kl_coef=0.0),
        ).stats  # fmt: skip
        tokens = (recomputed - sampled).abs()
        return {
            "mismatch_token_mean": tokens.mean(), "mismatch_token_max": tokens.max(),
            "mismatch_sequence_mean": stats["log_ratio"].abs().mean(),
            "mismatch_sequence_max": stats["log_ratio"].abs().max(),
            "mismatch_clip_frac": stats["clip_frac_tokens"],
        }  # fmt: skip

    def _update(self, batch: Batch) -> dict[str, Tensor] | None:
        """One optimizer step; returns the loss's stats, or None if it was skipped."""
        replay = nullcontext() if batch.routing is None else batch.routing.replay(self.model)
        with replay:
            loss, stats = self._loss(batch)
            loss.backward()
        trained = self.optimizer.param_groups[0]["params"]
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, self.config.update.max_grad_norm))
        if self.ranks.any(not bool(torch.isfinite(loss.detach() + norm))):
            self._skip(loss, norm)
            return None
        self.bad_updates = 0
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return stats | {"loss": loss.detach(), "grad_norm": norm}

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        cu_seqlens = batch.rollout.cu_seqlens()
        denominator = self.ranks.denominator(self.objective, cu_seqlens)

        def forward() -> tuple[Tensor, dict[str, Tensor]]:
            inputs, options = self._distributions(self.model, batch.rollout)
            return _POLICY_LOSS[self.config.update.loss_from](
                *inputs, batch.rollout.targets(), batch.old_log_probs, batch.advantages,
                cu_seqlens=cu_seqlens, objective=self.objective, denominator=denominator,
                ref_log_probs=batch.ref_log_probs, rollout_weights=batch.rollout_weights,
                **options,
            )  # fmt: skip

        return as_forward(self.model, forward)

    def _skip(self, loss: Tensor, norm: Tensor) -> None:
        self.optimizer.zero_grad()
        self.bad_updates += 1
        if self.bad_updates >= self.config.update.max_bad_updates:
            raise Diverged(
                f"{self.bad_updates} updates in a row had a loss or a gradient that is not finite "
                f"(the last: loss {loss.item():g}, gradient norm {norm.item():g}); they were "
                "skipped, so the weights are those before the first of them. A lower "
                "update.learning_rate, or --resume from the last checkpoint with other settings"
            )

    def _distributions(
        self, model: PreTrainedModel, rollout: Rollout
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the ops make log-probs from: hidden states and head, or logits; and options."""
        temperature = self.config.rollout.temperature
        hidden = response_hidden(model, rollout, self._autocast(self.config.dtype))
        head = output_head(model)
        if self.config.update.loss_from != "hidden":
            return (head.logits(hidden),), {"temperature": temperature}
        return (hidden, head.weight), head.options(temperature)

    def _autocast(self, dtype: str) -> Autocast:
        return lambda: torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )

    # Checkpoints

    def _start(self) -> RunFiles | None:
        """The run's files, which the first process writes."""
        out = self.config.out
        if not self.ranks.is_first:
            return None
        if out.exists() and any(out.iterdir()):
            aside = next(p for i in range(1, 10**6) if not (p := Path(f"{out}-{i}")).exists())
            out.rename(aside)
            print(f"what was in {out} is now in {aside}")
        return RunFiles.create(self.config)

    def _resume(self) -> RunFiles | None:
        """From the last whole checkpoint; from the beginning if there is none."""
        folder, ranks = self.config.out / "checkpoints", self.ranks
        path = ranks.share(checkpoint.last_whole(folder) if ranks.is_first else None)
        if path is None:
            if ranks.is_first:
                print(f"no checkpoint in {self.config.out}: starting from the beginning")
            return self._start()
        step, state = checkpoint.load_state(path)
        self._check_same(state["config"])
        checkpoint.load_weights(path, self.model, self.optimizer, ranks)
        self.scheduler.load_state_dict(state["scheduler"])
        self.deck.load_state_dict(state["deck"])
        self.bad_updates = state["bad_updates"]
        self.progress = Progress(step, state["before"], state["train_seconds"], state["seconds"])
        if not ranks.is_first:
            return None
        print(f"resumed after step {step}")
        return RunFiles.reopen(self.config, state["files"])

    def _check_same(self, saved: dict[str, Any]) -> None:
        """Refuse to go on with another run's settings."""
        now = to_tables(self.config)
        before = to_tables(from_tables(saved))
        changed = [k for k in now if k not in _CHANGEABLE and now[k] != before[k]]
        if changed:
            raise ValueError(
                f"{changed[0]}: the run in {self.config.out} has {before[changed[0]]!r}, which "
                f"--resume can't change to {now[changed[0]]!r}"
            )

    def _save(self, files: RunFiles | None) -> None:
        progress = self.progress
        state = {
            "config": to_tables(self.config), "scheduler": self.scheduler.state_dict(),
            "deck": self.deck.state_dict(), "bad_updates": self.bad_updates,
            "before": progress.before, "train_seconds": progress.train_seconds,
            "seconds": progress.seconds + time.monotonic() - progress.started,
            "files": files.state_dict() if files else None,
        }  # fmt: skip
        checkpoint.save(
            self.config.out / "checkpoints", progress.step, state, self.model, self.optimizer,
            self.ranks, keep=self.config.checkpoint.keep,
        )  # fmt: skip

    def _save_model(self) -> None:
        """As transformers or peft loads it, whole."""
        model, out, weights = self.adapter or self.model, self.config.out / "model", None
        if self.ranks.size > 1:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(model, options=options)
        if self.ranks.is_first:
            model.save_pretrained(out, state_dict=weights)
            if hasattr(self.tokenizer, "save_pretrained"):
                self.tokenizer.save_pretrained(out)


def _check_parts(config: TrainConfig, ranks: int) -> None:
    """Mini-batches are of equally many prompts, on each process."""
    prompts, parts = config.rollout.prompts, config.update.mini_batches
    if prompts % (parts * ranks):
        raise ValueError(
            f"update.mini_batches: expected mini_batches * {ranks} processes to divide "
            f"rollout.prompts={prompts}, got {parts}"
        )


def _is_mixed(rewards: Tensor, group_size: int) -> Tensor:
    """(Q,) which groups have different rewards, (B, turns), in some turn."""
    groups = rewards.view(-1, group_size, rewards.shape[1])
    return (groups.amin(1) != groups.amax(1)).any(1)


def _ratio_error(stats: dict[str, Tensor]) -> float:
    """How far the ratios of a mini-batch are from 1."""
    return stats["log_ratio"].expm1().abs().max().item()
