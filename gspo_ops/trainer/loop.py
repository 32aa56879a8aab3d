"""GSPO from prompts to a trained model, in one loop.

    prompts -> G sampled responses each -> verifiable rewards -> group advantages
            -> K mini-batch updates through the fused loss -> metrics

Deviations from the paper (arXiv 2507.18071): short answers, a constant learning rate, and no KL
term.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import (
    PolicyLoss,
    group_advantages,
    log_probs_from_hidden,
    log_probs_from_logits,
    policy_loss_from_hidden,
    policy_loss_from_logits,
)
from .config import TrainConfig
from .model import load_model
from .report import MetricsFile, Summary, plot, write_summary
from .rollout import (
    Autocast,
    Rollout,
    Vocabulary,
    generate,
    head_logits,
    logit_softcap,
    response_hidden,
)
from .tasks import Problem, Task, is_correct, make_task

# Held-out problems answered at once.
_EVAL_BATCH = 64

# The ops by `TrainConfig.loss_from`.
_LOG_PROBS: dict[str, Callable[..., Tensor]] = {
    "hidden": log_probs_from_hidden,
    "logits": log_probs_from_logits,
}
_POLICY_LOSS: dict[str, Callable[..., PolicyLoss]] = {
    "hidden": policy_loss_from_hidden,
    "logits": policy_loss_from_logits,
}


class Batch(NamedTuple):
    """One mini-batch: sequences, their advantages, and the log-probs they are compared with.

    Attributes:
        rollout: B responses.
        advantages: (B,) fp32.
        old_log_probs: (N,) fp32, packed.
    """

    rollout: Rollout
    advantages: Tensor
    old_log_probs: Tensor


def train(config: TrainConfig) -> Summary:
    """Train a model, measuring held-out accuracy before and after.

    Writes `metrics.jsonl` (one line per step), `summary.json` and `training.png` into
    `config.out`.

    Args:
        config: the settings.

    Returns:
        Held-out accuracies, their standard errors, and the time taken.
    """
    return Trainer.of(config).run()


class Trainer:
    """The state of one run."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
    ) -> None:
        """Put the model on the device, with an optimizer.

        Args:
            config: the settings.
            model: fp32 weights; trained in place.
            tokenizer: the model's.
            task: problems to train on and to hold out.
        """
        device = config.torch_device()
        self.config = config
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.task = task
        self.vocabulary = Vocabulary.of(tokenizer, device)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )

    @classmethod
    def of(cls, config: TrainConfig) -> Trainer:
        """Make the task and load the model that `config` names.

        Raises:
            ValueError: the model, the task or the device is unknown, or the task too small.
            ImportError: the package that the model comes in is not installed.
        """
        task = make_task(
            config.task,
            examples=config.examples,
            train_size=config.train_size,
            eval_size=config.eval_size,
            seed=config.seed,
        )
        return cls(config, *load_model(config.model), task)

    def run(self) -> Summary:
        """Evaluate, train, evaluate again, and write the results."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        before = self.evaluate()
        with MetricsFile(config.out / "metrics.jsonl") as metrics:
            train_start = time.monotonic()
            bar = tqdm(self._problem_batches(), total=config.steps, unit="step")
            for problems in bar:
                metrics.append(self.step(problems))
                bar.set_postfix_str(_progress(metrics.rows[-1]))
                elapsed = time.monotonic() - train_start
                if config.time_limit is not None and elapsed > config.time_limit:
                    break
        after = self.evaluate()
        summary = Summary.of(before, after, seconds=time.monotonic() - start)
        write_summary(summary, config.out / "summary.json")
        plot(metrics.rows, summary, config.out / "training.png")
        return summary

    def step(self, problems: list[Problem]) -> dict[str, float]:
        """Sample responses to `problems` and update the model K times on them.

        Args:
            problems: `prompts_per_step` problems.

        Returns:
            The step's metrics, by the names in `metrics.jsonl`.
        """
        config = self.config
        start = time.monotonic()
        rollout = self._sample(problems, config.group_size, config.temperature)
        rewards = self._rewards(problems, rollout)
        sampled = time.monotonic()

        advantages = group_advantages(rewards, group_size=config.group_size)
        parts = zip(
            rollout.split(config.mini_batches), advantages.chunk(config.mini_batches), strict=True
        )
        batches = [Batch(part, a, self._old_log_probs(part)) for part, a in parts]
        stats = [self._update(batch) for batch in batches]

        groups = rewards.view(-1, config.group_size)
        tokens = int(rollout.mask.sum())
        seconds = time.monotonic() - start
        return _merge(stats) | {
            "reward": rewards.mean().item(),
            "mixed_groups": (groups.amin(1) != groups.amax(1)).float().mean().item(),
            "response_tokens": tokens / len(rewards),
            "tokens_per_s": tokens / seconds,
            "rollout_s": sampled - start,
            "step_s": seconds,
        }

    def evaluate(self) -> Tensor:
        """(eval_size,) fraction of right answers among those sampled to each held-out problem."""
        held_out = self.task.held_out
        samples, temperature = self.config.eval_samples, self.config.temperature
        batches = [held_out[i : i + _EVAL_BATCH] for i in range(0, len(held_out), _EVAL_BATCH)]
        bar = tqdm(batches, desc="held-out problems", leave=False)
        rewards = [self._rewards(b, self._sample(b, samples, temperature)) for b in bar]
        return torch.cat(rewards).view(-1, samples).mean(1).cpu()

    def _problem_batches(self) -> Iterator[list[Problem]]:
        """`steps` batches, through the training problems in shuffled epochs."""
        order = random.Random(self.config.seed)
        queue: list[Problem] = []
        for _ in range(self.config.steps):
            if len(queue) < self.config.prompts_per_step:
                queue = list(self.task.train)
                order.shuffle(queue)
            yield [queue.pop() for _ in range(self.config.prompts_per_step)]

    def _sample(self, problems: list[Problem], group_size: int, temperature: float) -> Rollout:
        prompts = [self.tokenizer(self.task.prompt(problem))["input_ids"] for problem in problems]
        return generate(
            self.model,
            prompts,
            self.vocabulary,
            group_size=group_size,
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            autocast=self._autocast,
            generator=self.generator,
        )

    def _rewards(self, problems: list[Problem], rollout: Rollout) -> Tensor:
        """(B,) fp32: 1 for a right answer, 0 for a wrong one."""
        group_size = len(rollout.responses) // len(problems)
        lengths = rollout.mask.sum(1).tolist()
        answers = self.tokenizer.batch_decode(rollout.targets().cpu().split(lengths))
        right = [is_correct(a, problems[i // group_size]) for i, a in enumerate(answers)]
        return torch.tensor(right, dtype=torch.float32, device=self.model.device)

    @torch.no_grad()
    def _old_log_probs(self, rollout: Rollout) -> Tensor:
        """(N,) log-probs before any update, by the very forward that the update will run.

        Sampling's own log-probs would not do: they come from cached decoding, in other shapes, and
        a bf16 body rounds differently in other shapes. That noise in the ratio is wider than
        GSPO's clip range, and no loss op removes it (the op removes the head's share). With the
        same mini-batches, padding and order the noise is the same on both sides: before the first
        update s == 1 exactly, and `first_ratio_error` in the metrics records that it is.
        """
        inputs, options = self._distributions(rollout)
        return _LOG_PROBS[self.config.loss_from](*inputs, rollout.targets(), **options)

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step; returns the loss's stats."""
        inputs, options = self._distributions(batch.rollout)
        loss, stats = _POLICY_LOSS[self.config.loss_from](
            *inputs,
            batch.rollout.targets(),
            batch.old_log_probs,
            batch.advantages,
            cu_seqlens=batch.rollout.cu_seqlens(),
            objective=self.config.objective,
            **options,
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return stats | {"loss": loss.detach(), "grad_norm": norm}

    def _distributions(self, rollout: Rollout) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the ops make log-probs from: hidden states and head, or logits; and options."""
        temperature = self.config.temperature
        hidden = response_hidden(self.model, rollout, self._autocast)
        if self.config.loss_from == "logits":
            return (head_logits(self.model, hidden),), {"temperature": temperature}
        head, softcap = self.model.get_output_embeddings(), logit_softcap(self.model)
        options = {"bias": head.bias, "softcap": softcap, "temperature": temperature}
        return (hidden, head.weight), options

    @property
    def _autocast(self) -> Autocast:
        return lambda: torch.autocast(
            self.model.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"
        )


def _merge(stats: list[dict[str, Tensor]]) -> dict[str, float]:
    """A step's stats from its mini-batches': extremes of the extremes, means of the rest."""
    first_ratio_error = stats[0]["log_ratio"].expm1().abs().max().item()
    scalars = {
        name: torch.stack([s[name] for s in stats]).float()
        for name in stats[0]
        if name != "log_ratio"
    }
    merged = {name: values.mean().item() for name, values in scalars.items()}
    return merged | {
        "ratio_min": scalars["ratio_min"].min().item(),
        "ratio_max": scalars["ratio_max"].max().item(),
        "first_ratio_error": first_ratio_error,
    }


def _progress(row: dict[str, float]) -> str:
    return (
        f"reward {row['reward']:.2f}, clip {row['clip_frac_sequences']:.0%}, "
        f"s {row['ratio_min']:.3f}..{row['ratio_max']:.3f}, {row['tokens_per_s']:.0f} tokens/s"
    )
