"""GSPO from prompts to a trained model, in one loop.

    prompts -> G sampled responses each -> verifiable rewards -> group advantages
            -> old log-probs -> K mini-batch updates through the fused loss -> metrics

`docs/trainer.md` lists the deviations from the paper (arXiv 2507.18071).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..backend import device_exists
from . import checkpoint
from .config import TrainConfig, from_tables, to_tables
from .files import Lock, writing
from .learner import Batch, Learner
from .metrics import Row, combine, in_words
from .model import fingerprint, load_model
from .progress import Interrupted, Progress, stop_signals
from .ranks import Ranks
from .report import RunFiles, Summary, pass_at_k, plot
from .rollout import Rollout, check_sampling
from .sampling import Sampler
from .tasks import Task, make_task, reward_fingerprint

# Keys, or their beginnings, that a resumed run may change.
_CHANGEABLE = (
    "out", "steps", "time_limit", "device", "evaluation.", "checkpoint.", "logging.",
    "update.learning_rate", "task.reward_", "task.failed_reward",
)  # fmt: skip
# Keys on which the result of an evaluation depends, besides the model.
_MEASURED_WITH = {
    "evaluation.samples", "evaluation.temperature", "task.reward", "task.reward_seconds",
    "task.failed_reward",
}  # fmt: skip


def train(config: TrainConfig, *, resume: bool = False) -> Summary:
    """Train a model, and measure held-out accuracy before and after.

    `metrics.jsonl` (one line per step), `samples.jsonl`, `summary.json`, `training.png`,
    checkpoints and the model are written to `config.out`; files that another run left there are
    moved aside.

    Args:
        config: the settings.
        resume: continue from the last whole checkpoint in `config.out`.

    Returns:
        Held-out accuracies, their standard errors, and the time taken.

    Raises:
        ValueError: the settings do not fit the model, the task or the run that is resumed; another
            run is going on in `config.out`, or files of something else are there; or a reward
            failed.
        CannotWrite: the disk is full, for example; the last checkpoint is intact.
        Interrupted: SIGINT or SIGTERM arrived; the step was finished and a checkpoint was written.
        Diverged: the loss or gradient was not finite too many times in a row, or the model's logits
            were not finite.
    """
    return Trainer.of(config).run(resume=resume)


def trained(out: Path) -> Sampler:
    """Load the model of a finished run, to answer the run's problems or others.

    Args:
        out: directory of the run.

    Raises:
        ValueError: there is no run, or it has not saved its model.
    """
    config_file, model = out / "config.json", out / "model"
    if not config_file.is_file():
        raise ValueError(f"no run in {out}: {config_file.name} is missing")
    if not model.is_dir():
        raise ValueError(f"{model} is missing: the run is not over, or did not save its model")
    # JSON can't represent an infinite time limit, which is the default
    text = config_file.read_text(encoding="utf-8")
    tables = json.loads(text, object_hook=_without_nulls)
    if not device_exists(tables.get("device", "auto")):
        tables["device"] = "auto"  # the run was on another machine
    config = from_tables(tables)
    is_adapter = (model / "adapter_config.json").is_file()
    loaded, tokenizer = load_model(config.model.name if is_adapter else str(model))
    if is_adapter:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, model).merge_and_unload()
    device = config.torch_device()
    task = make_task(config.task, config.seed)
    return Sampler(config, loaded.to(device).eval(), tokenizer, task, Ranks(device))


class Trainer:
    """The state of one run."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
    ) -> None:
        """Move the model to the device, or shard it over those of torchrun's processes.

        Args:
            config: the settings.
            model: the model, with fp32 weights; trained in place.
            tokenizer: the model's tokenizer.
            task: problems to train on and held-out problems.
        """
        device = config.torch_device()
        self.ranks = Ranks(device)
        _check_parts(config, self.ranks.size)
        # record the dtype in use, so that a run resumed on another machine does not change it
        self.config = config = replace(config, dtype=config.training_dtype)
        self.model, self.tokenizer = model.to(device), tokenizer
        check_sampling(self.model)
        self.fingerprints = {  # what these settings name may change under the same name
            "model.name": fingerprint(model), "task.name": task.fingerprint(),
            "task.reward": reward_fingerprint(task.reward),
        }  # fmt: skip
        self.learner = Learner(config, model, self.ranks)
        self.sampler = Sampler(config, model, tokenizer, task, self.ranks)
        self.progress = Progress()
        self.lock: Lock | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Trainer:
        """Make the task and load the model that `config` names.

        Raises:
            ValueError: the model, the task or the device is unknown, or the task is too small.
            ImportError: the package that contains the model is not installed.
        """
        task = make_task(config.task, config.seed)
        return cls(config, *load_model(config.model.name), task)

    # The run

    def run(self, *, resume: bool = False) -> Summary:
        """Evaluate, train, evaluate again, and write the results; see `train`."""
        self.lock = self.ranks.on_first(lambda: Lock(self.config.out))
        with self.lock or nullcontext():
            return self._run(resume)

    def _run(self, resume: bool) -> Summary:
        config, start = self.config, time.monotonic()
        files = self._resume() if resume else self.ranks.on_first(self._start)
        progress = self.progress
        with files or nullcontext(), stop_signals(twice=self.ranks.size == 1) as stopped:
            if progress.before is None:
                progress.before = self.evaluate()
            self._train(files, stopped)
            after = self.evaluate()
            summary = Summary.of(
                progress.before, after, pass_at=config.evaluation.pass_at,
                seconds=progress.seconds + time.monotonic() - start,
            )  # fmt: skip
            self.ranks.on_first(lambda: files.finish(summary) if files else None)
        if config.checkpoint.save_model:
            self._save_model()
        self.ranks.on_first(lambda: self._plot(files, summary))
        return summary

    def _plot(self, files: RunFiles | None, summary: Summary) -> None:
        assert files is not None
        out = self.config.out
        plot({out.name: files.rows}, out / "training.png", title=str(summary))

    def _train(self, files: RunFiles | None, stopped: Callable[[], bool]) -> None:
        config, ranks, progress = self.config, self.ranks, self.progress
        start = time.monotonic() - progress.train_seconds
        with self._bar(total=config.steps, initial=progress.step, unit="step") as bar:
            while not ranks.any(self._is_over()):
                row = self.step()
                every = config.evaluation.every
                if every and progress.step % every == 0 and progress.step < config.steps:
                    row |= self._evaluated()
                self._append(files, {"step": progress.step} | row)
                progress.train_seconds = time.monotonic() - start
                bar.update()
                bar.set_postfix_str(in_words(row))
                every = config.checkpoint.every
                is_last = ranks.any(self._is_over())
                is_asked = ranks.any(stopped())
                if is_asked or (every and (is_last or progress.step % every == 0)):
                    self._save(files)
                if is_asked:
                    raise Interrupted(
                        f"stopped after step {progress.step} of {config.steps}: --resume continues"
                    )

    def _is_over(self) -> bool:
        config, progress = self.config, self.progress
        return (
            progress.step >= config.steps
            or progress.train_seconds >= config.time_limit
            or 0 < config.evaluation.target <= progress.accuracy
        )

    def _append(self, files: RunFiles | None, row: Row) -> None:
        self.ranks.together(lambda: files.append(row, self.samples) if files else None)

    def step(self) -> dict[str, float]:
        """Sample responses to the next problems and update the model on them.

        Returns:
            The step's metrics over all processes, by their names in `metrics.jsonl`.
        """
        config, start = self.config, time.monotonic()
        groups = self.sampler.groups(self.random_numbers("training"))
        sampled = time.monotonic()
        rollout, advantages = groups.rollout, groups.advantages()
        count = config.update.mini_batches * _micro_batches(config, self.ranks.size)
        parts, chunks = rollout.split(count), advantages.chunk(count)
        prepared = [self.learner.prepare(*pair) for pair in zip(parts, chunks, strict=True)]
        ready = time.monotonic()
        batches = [batch for batch, _ in prepared]
        size = count // config.update.mini_batches
        order = [batches[i : i + size] for i in range(0, count, size)] * config.update.epochs
        churn: Row = {}
        with self._bar(order, desc="updates", leave=False) as bar:
            found = [self._update(batch, parts[0], churn) for batch in bar]
        stats = [of_update for of_update in found if of_update is not None]
        self.progress.step += 1
        self.samples = self.sampler.show(groups, advantages)

        tokens, end = int(rollout.mask.sum()), time.monotonic()
        row = (
            combine([_numbers(s) for s in stats])
            | churn
            | ({"first_ratio_error": _ratio_error(stats[0])} if stats else {})
            | combine([mismatch for _, mismatch in prepared])
            | {
                "reward": groups.rewards.mean().item(),
                "mixed_groups": groups.are_mixed.float().mean().item(),
                "refilled_groups": groups.refilled,
                "failed_rewards": groups.failed,
                "skipped_updates": len(order) - len(stats),
                "response_tokens": tokens / len(groups.rewards),
                "tokens_per_s": tokens / (end - start),
                "rollout_s": sampled - start,
                "old_log_probs_s": ready - sampled,
                "update_s": end - ready,
                "step_s": end - start,
            }
        )
        return combine(self.ranks.gather(row))

    def _update(self, batch: list[Batch], watched: Rollout, churn: Row) -> dict[str, Tensor] | None:
        """Take one optimizer step; `logging.expert_churn` measures the first, on `watched`."""
        if churn or not self.config.logging.expert_churn:
            return self.learner.update(*batch)
        found, churn["expert_churn"] = self.learner.churn(
            watched, lambda: self.learner.update(*batch)
        )
        return found

    def evaluate(self) -> Tensor:
        """Return (eval_size, samples) rewards of responses sampled for each held-out problem.

        Evaluation has its own random numbers: how often it runs does not change training.
        """
        return self.sampler.evaluate(self.random_numbers("evaluation"))

    def _evaluated(self) -> dict[str, float]:
        """Evaluate the model during training; return the metrics."""
        rewards, k = self.evaluate(), self.config.evaluation.pass_at
        self.progress.accuracy = rewards.mean().item()
        return {"accuracy": self.progress.accuracy} | (
            {f"pass_at_{k}": pass_at_k(rewards, k)} if k else {}
        )

    def random_numbers(self, use: Literal["training", "evaluation"]) -> torch.Generator:
        """Return a generator for one use in the present step; each process has its own numbers."""
        numbers = self.config.seed, self.progress.step, self.ranks.rank, use == "evaluation"
        (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        return torch.Generator(self.model.device).manual_seed(int(seed))

    def _bar(self, *args: Any, **options: Any) -> tqdm:
        return tqdm(*args, disable=not self.ranks.is_first, **options)

    # Checkpoints

    def _start(self) -> RunFiles:
        """Create the run's files, which the first process writes."""
        assert self.lock is not None
        if aside := self.lock.move_aside():
            print(f"earlier files of {self.config.out} are now in {aside}")
        return RunFiles.create(self.config)

    def _resume(self) -> RunFiles | None:
        """Resume from the last complete checkpoint; start from the beginning if there is none."""
        folder, ranks = self.config.out / "checkpoints", self.ranks
        path = ranks.share(checkpoint.last_whole(folder) if ranks.is_first else None)
        if path is None:
            if ranks.is_first:
                print(f"no checkpoint in {self.config.out}: starting from the beginning")
            return ranks.on_first(self._start)
        step, state = checkpoint.load_state(path)
        if "fingerprints" not in state:
            raise ValueError(f"out: {path} was written by an earlier version and can't be resumed")
        changed = self._changed(state["config"], state["fingerprints"])
        kept = {name: state[name] for name in ("before", "train_seconds", "seconds", "accuracy")}
        if changed & _MEASURED_WITH:
            del kept["accuracy"]
            kept["before"] = self.evaluate()  # again: the weights are those before training
        checkpoint.load_weights(path, self.model, self.learner.optimizer, ranks)
        self.learner.load_state_dict(state["learner"])
        self.sampler.deck.load_state_dict(state["deck"])
        self.progress = Progress(step, **kept)
        if ranks.is_first:
            print(f"resumed after step {step}")
        return ranks.on_first(lambda: RunFiles.reopen(self.config, state["files"], step))

    def _changed(self, saved: dict[str, Any], fingerprints: dict[str, str]) -> set[str]:
        """Return the keys that have changed, or what they name, since the run was saved.

        Raises:
            ValueError: the change would make it another run.
        """
        saved = saved | {"device": self.config.device}  # this machine may not have that of the run
        now, before = _flat(to_tables(self.config)), _flat(to_tables(from_tables(saved)))
        changed = [key for key in now | before if now.get(key) != before.get(key)]
        for key in changed:
            if not key.startswith(_CHANGEABLE):
                raise ValueError(
                    f"{key}: the run in {self.config.out} has {before.get(key)!r}, which --resume "
                    f"can't change to {now.get(key)!r}"
                )
        renewed = [key for key, found in self.fingerprints.items() if fingerprints[key] != found]
        for key in renewed:
            if key != "task.reward":
                raise ValueError(
                    f"{key}: what {now[key]!r} names has changed since the run in "
                    f"{self.config.out} began: --resume needs the original"
                )
            if self.ranks.is_first:
                print(f"{key}: {now[key]!r} has changed; the run goes on with the new function")
        return {*changed, *renewed}

    def _save(self, files: RunFiles | None) -> None:
        progress = self.progress
        sizes = self.ranks.on_first(lambda: files.state_dict() if files else None)
        state = {
            "config": to_tables(self.config), "fingerprints": self.fingerprints,
            "learner": self.learner.state_dict(), "deck": self.sampler.deck.state_dict(),
            "before": progress.before, "train_seconds": progress.train_seconds,
            "accuracy": progress.accuracy,
            "seconds": progress.seconds + time.monotonic() - progress.started,
            "files": sizes,
        }  # fmt: skip
        checkpoint.save(
            self.config.out / "checkpoints", progress.step, state, self.model,
            self.learner.optimizer, self.ranks, keep=self.config.checkpoint.keep,
        )  # fmt: skip

    def _save_model(self) -> None:
        """Save the model in the format of transformers or peft, all or nothing."""
        model = self.learner.adapter or self.model
        weights = None
        if self.ranks.size > 1:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(model, options=options)
        self.ranks.on_first(lambda: self._write_model(model, weights))

    def _write_model(self, model: Any, weights: dict[str, Any] | None) -> None:
        final = self.config.out / "model"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # from a run that was killed
        try:
            with writing(final):
                model.save_pretrained(partial, state_dict=weights)
                if hasattr(self.tokenizer, "save_pretrained"):
                    self.tokenizer.save_pretrained(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if value is not None}


def _check_parts(config: TrainConfig, ranks: int) -> None:
    """Check that mini-batches and their parts have equally many prompts on each process."""
    prompts, parts = config.rollout.prompts, config.update.mini_batches
    if prompts % (parts * ranks):
        raise ValueError(
            f"update.mini_batches: expected mini_batches * {ranks} processes to divide "
            f"rollout.prompts={prompts}, got {parts}"
        )
    of_each, micro = prompts // (parts * ranks), config.update.micro_batch
    if micro and of_each % micro:
        raise ValueError(
            f"update.micro_batch: expected a divisor of the {of_each} prompts of a mini-batch on "
            f"each process, got {micro}"
        )


def _micro_batches(config: TrainConfig, ranks: int) -> int:
    """Return the number of parts of a mini-batch on each process."""
    of_each = config.rollout.prompts // (config.update.mini_batches * ranks)
    return of_each // (config.update.micro_batch or of_each)


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def _numbers(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an update's scalar statistics, and the root mean square of its log-ratios."""
    numbers = {name: x for name, x in stats.items() if name != "log_ratio"}
    return numbers | {"log_ratio_rms": stats["log_ratio"].square().mean().sqrt()}


def _ratio_error(stats: dict[str, Tensor]) -> float:
    """Return the largest distance of a mini-batch's ratios from 1."""
    return stats["log_ratio"].expm1().abs().max().item()
