"""From problems to scored responses: in turns, in groups, with dead groups replaced."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import group_advantages
from .config import TrainConfig
from .progress import Diverged
from .ranks import Ranks
from .rewards import rewards_of
from .rollout import Rollout, append_turn, autocast, concatenate, generate, stop_ids
from .tasks import Deck, Problem, Task

# Number of held-out problems answered at once.
_EVAL_BATCH = 64


class Groups(NamedTuple):
    """G responses to each of Q problems, B = Q * G in all.

    Attributes:
        problems: the Q problems.
        rollout: the responses.
        rewards: (B, turns) fp32.
        refilled: number of groups that replaced one without a gradient.
        failed: number of rewards that are `task.failed_reward`, including those of replaced groups.
        grades: (B, T) fp32 grades of the tokens, with `task.graded`.
    """

    problems: list[Problem]
    rollout: Rollout
    rewards: Tensor
    refilled: int = 0
    failed: int = 0
    grades: Tensor | None = None

    @property
    def are_mixed(self) -> Tensor:
        """(Q,) bool: which groups have different rewards in some turn, and thus a gradient."""
        turns = self.rewards.shape[1]
        groups = self.rewards.view(-1, self.rollout.group_size, turns)
        return (groups.amin(1) != groups.amax(1)).any(1)

    def advantages(self) -> Tensor:
        """Compute advantages within each group: (B, turns), or (B, T) from grades, by place."""
        size, scored = self.rollout.group_size, self.rewards if self.grades is None else self.grades
        return torch.stack([group_advantages(x, group_size=size) for x in scored.unbind(1)], 1)

    def replace_dead(self, others: Groups) -> Groups:
        """Replace groups without a gradient by mixed groups of the others, as far as they go."""
        dead = (~self.are_mixed).nonzero().squeeze(1)
        live = others.are_mixed.nonzero().squeeze(1)[: len(dead)]
        places = torch.arange(len(self.problems), device=live.device)
        places[dead[: len(live)]] = len(self.problems) + live
        rewards = torch.cat([self.rewards, others.rewards])
        rewards = rewards.view(-1, self.rollout.group_size, rewards.shape[1])[places]
        return Groups(
            [[*self.problems, *others.problems][i] for i in places.tolist()],
            concatenate([self.rollout, others.rollout]).select(places),
            rewards.flatten(0, 1),
            self.refilled + len(live),
            self.failed + others.failed,
        )


class Sampler:
    """The part of a run that draws problems, has the model respond, and scores the responses."""

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        ranks: Ranks,
    ) -> None:
        """Set up the sampler without drawing problems yet.

        Args:
            config: the settings.
            model: the model, on its device.
            tokenizer: the model's tokenizer.
            task: problems to train on and held-out problems.
            ranks: the processes among which the problems are divided.
        """
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.task, self.ranks = task, ranks
        self.stops = stop_ids(
            tokenizer, model, newline=config.rollout.stop == "newline", chat=config.task.chat
        )
        self.deck = Deck(len(task.train), config.seed)

    def groups(self, generator: torch.Generator) -> Groups:
        """Sample the groups of a step; all processes draw the same problems, and each takes a part.

        A group whose rewards are all equal has no gradient; up to `rollout.refill` rounds replace
        such groups by others that have one, as far as any turn up.
        """
        drawn = self.deck.draw(self.task.train, self.config.rollout.prompts)
        problems = self.ranks.part(drawn)

        def sample() -> Groups:
            groups = self.ranks.together(lambda: self._groups_of(problems, generator))
            return self._refill(groups, generator)

        return self.ranks.with_whole_weights(self.model, sample)

    def evaluate(self, generator: torch.Generator) -> Tensor:
        """Return (eval_size, samples) rewards of responses to each held-out problem."""
        ranks, samples = self.ranks, self.config.evaluation.samples
        temperature = self.config.evaluation.temperature
        held_out = self.task.held_out[ranks.rank :: ranks.size]
        batches = [held_out[i : i + _EVAL_BATCH] for i in range(0, len(held_out), _EVAL_BATCH)]
        options: dict[str, Any] = {"leave": False, "disable": not ranks.is_first}
        with tqdm(batches, desc="held-out problems", **options) as bar:

            def answer() -> list[Tensor]:
                return [
                    self.respond(list(b), samples, generator, temperature).rewards.mean(1)
                    for b in bar
                ]

            rewards = ranks.with_whole_weights(self.model, lambda: ranks.together(answer))
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        mine = torch.cat([none, *(r.cpu() for r in rewards)])
        mine = mine.view(len(held_out), samples)
        found = none.new_empty(len(self.task.held_out), samples)
        for rank, part in enumerate(ranks.gather(mine)):
            found[rank :: ranks.size] = part
        return found

    def respond(
        self,
        problems: list[Problem],
        group_size: int,
        generator: torch.Generator,
        temperature: float | None = None,
        *,
        bar: bool = False,
    ) -> Groups:
        """Sample responses in as many turns as the task has, and compute their rewards.

        Args:
            problems: Q problems.
            group_size: number of responses to each.
            generator: generator of the random numbers.
            temperature: sampling temperature; None for that of training.
            bar: show a progress bar.

        Raises:
            Diverged: the model's logits are not finite.
            ValueError: a reward failed; see `rewards_of`.
        """
        prompts = [self.prompt_tokens(problem) for problem in problems]
        rollout = self._generate(prompts, group_size, generator, temperature, bar)
        asked = [problem for problem in problems for _ in range(group_size)]
        answers = self.texts(rollout)
        scores, failed = self._rewards(answers, asked)
        rewards = [scores]
        for _ in range(self.task.turns - 1):
            following = [self.task.follow_up(p, a) for p, a in zip(asked, answers, strict=True)]
            asked = [problem for problem in following if problem is not None]
            texts = [
                problem.question if answer.endswith("\n") else "\n" + problem.question
                for problem, answer in zip(asked, answers, strict=True)
            ]
            questions = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            so_far = [
                prompts[b // group_size] + rollout.responses[b, rollout.real[b]].tolist() + question
                for b, question in enumerate(questions)
            ]
            turn = self._generate(so_far, 1, generator, temperature, bar)
            answers = self.texts(turn)
            scores, failed_now = self._rewards(answers, asked)
            rewards.append(scores)
            failed += failed_now
            rollout = append_turn(rollout, questions, turn)
        scored = torch.tensor(rewards, dtype=torch.float32, device=self.model.device).mT
        grades = self._grades(rollout, asked) if self.task.grades else None
        return Groups(problems, rollout, scored, failed=failed, grades=grades)

    def answers(
        self,
        problems: list[Problem],
        count: int,
        generator: torch.Generator,
        temperature: float | None = None,
    ) -> list[list[str]]:
        """Sample `count` responses to each problem, as texts, without rewards."""
        prompts = [self.prompt_tokens(problem) for problem in problems]
        texts = self.texts(self._generate(prompts, count, generator, temperature, bar=False))
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def prompt_tokens(self, problem: Problem) -> list[int]:
        """Return the tokens of a problem's prompt."""
        if not self.config.task.chat:
            return self.tokenizer(self.task.prompt(problem))["input_ids"]
        return self.tokenizer.apply_chat_template(
            self.task.chat(problem), add_generation_prompt=True, return_dict=True
        )["input_ids"]

    def texts(self, rollout: Rollout) -> list[str]:
        """Return the texts of the responses, including the questions of later turns."""
        return self.tokenizer.batch_decode(
            [r[m] for r, m in zip(rollout.responses.cpu(), rollout.real.cpu(), strict=True)],
            skip_special_tokens=True,
        )

    def show(self, groups: Groups, advantages: Tensor) -> list[dict[str, Any]]:
        """Return some responses for `samples.jsonl`, spread over the batch."""
        count, texts = self.config.logging.samples, self.texts(groups.rollout)
        places = [i * len(texts) // count for i in range(count)]
        return [
            {
                "prompt": self.task.prompt(groups.problems[i // groups.rollout.group_size]),
                "response": texts[i], "rewards": groups.rewards[i].tolist(),
                "advantages": advantages[i].tolist(),
            }
            for i in places
        ]  # fmt: skip

    def _groups_of(self, problems: list[Problem], generator: torch.Generator) -> Groups:
        size = self.config.rollout.group_size
        return self.respond(problems, size, generator, bar=self.ranks.is_first)

    def _refill(self, groups: Groups, generator: torch.Generator) -> Groups:
        for _ in range(self.config.rollout.refill):
            counts = self.ranks.gather(int((~groups.are_mixed).sum()))
            if not sum(counts):
                break
            others = self.ranks.part(self.deck.draw(self.task.train, sum(counts)), counts)
            sample = partial(self._groups_of, others, generator) if others else lambda: None
            more = self.ranks.together(sample)
            if more is not None:
                groups = groups.replace_dead(more)
        return groups

    def _generate(
        self,
        prompts: list[list[int]],
        group_size: int,
        generator: torch.Generator,
        temperature: float | None,
        bar: bool,
    ) -> Rollout:
        config, device = self.config.rollout, self.model.device
        if temperature is None:
            temperature = config.temperature
        try:
            return generate(
                self.model, prompts, self.stops, group_size=group_size,
                max_new_tokens=config.max_new_tokens, temperature=temperature,
                autocast=autocast(device, self.config.rollout_dtype), generator=generator, bar=bar,
            )  # fmt: skip
        except FloatingPointError as error:
            raise Diverged(
                f"{error}: the model was broken when it was loaded, or the last updates were too "
                "large. Remove the checkpoints written since then and lower update.learning_rate; "
                "--resume then continues from before these updates"
            ) from None

    def _grades(self, rollout: Rollout, asked: list[Problem]) -> Tensor:
        """Return (B, T) grades of the tokens, 0 after the end of a response."""
        assert self.task.grades is not None
        found = torch.zeros(rollout.responses.shape, device=self.model.device)
        for row, (response, real) in enumerate(zip(rollout.responses, rollout.real, strict=True)):
            texts = self.tokenizer.batch_decode(response[real, None].tolist())
            found[row, : len(texts)] = torch.tensor(self.task.grades(texts, asked[row]))
        return found

    def _rewards(self, answers: list[str], asked: list[Problem]) -> tuple[list[float], int]:
        config, reward = self.config.task, self.task.reward
        return rewards_of(config, reward, answers, asked, bar=self.ranks.is_first)
