"""Verifiable problems: few-shot prompts, exact checking, disjoint training and held-out sets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import reasoning_gym


@dataclass(frozen=True)
class Problem:
    """One question as the prompt shows it, and its only right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Problems of one kind; none is in two of the three sets, not even mirrored.

    Attributes:
        examples: the solved problems shown in every prompt.
        train: problems to train on.
        held_out: problems to measure accuracy on.
    """

    examples: tuple[Problem, ...]
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    def prompt(self, problem: Problem) -> str:
        """The solved examples, one per line, then `problem`'s question without its answer."""
        solved = [f"{example.question} {example.answer}\n" for example in self.examples]
        return "".join(solved) + problem.question


def parse_answer(response: str) -> str:
    """The answer a response gives: its first line, without surrounding white space."""
    return response.split("\n", 1)[0].strip()


def is_correct(response: str, problem: Problem) -> bool:
    """Whether the answer given is the right one, character for character.

    `reasoning_gym`'s `score_answer` gives partial credit for a wrong answer and full credit
    for odd spellings (`+07`), so it isn't used.
    """
    return parse_answer(response) == problem.answer


def make_task(name: str, *, examples: int, train_size: int, eval_size: int, seed: int) -> Task:
    """Draw distinct problems and divide them.

    Args:
        name: one of `TASKS`.
        examples: solved problems in each prompt.
        train_size: problems to train on.
        eval_size: held-out problems.
        seed: of the draw and the division.

    Returns:
        The task.

    Raises:
        ValueError: the name is unknown, or the task has too few distinct problems.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {sorted(TASKS)}, got {name!r}")
    needed = examples + train_size + eval_size
    problems = _distinct_problems(TASKS[name], needed, seed)
    if len(problems) < needed:
        raise ValueError(
            f"task: {name!r} gave {len(problems)} distinct problems, "
            f"expected examples + train_size + eval_size = {needed}"
        )
    # The draw exhausts the rare short questions first; shuffle, so that all sets are alike.
    random.Random(seed).shuffle(problems)
    return Task(
        examples=tuple(problems[:examples]),
        train=tuple(problems[examples : examples + train_size]),
        held_out=tuple(problems[examples + train_size :]),
    )


@dataclass(frozen=True)
class _Source:
    """Where a task's problems come from: a reasoning-gym dataset and how to ask its questions."""

    dataset: str
    ask: Callable[[dict[str, Any]], str]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _expression(entry: dict[str, Any]) -> str:
    return f"{entry['metadata']['expression']} ="


def _question_and_answer(entry: dict[str, Any]) -> str:
    return f"Q: {entry['question']} A:"


TASKS: Mapping[str, _Source] = MappingProxyType(
    {
        # 155 problems in all
        "digit_sums": _Source("chain_sum", _expression, {"max_terms": 2, "max_digits": 1}),
        "sums": _Source("chain_sum", _expression, {"max_terms": 2, "max_digits": 2}),
        "products": _Source("products", _expression, {"max_digits": 2}),
        "letter_counting": _Source(
            "letter_counting", _question_and_answer, {"min_words": 2, "max_words": 4}
        ),
    }
)


def _distinct_problems(source: _Source, needed: int, seed: int) -> list[Problem]:
    """Up to `needed` different problems, in the order drawn.

    Questions made of the same words, with the same answer, are one problem: who was trained on
    `3 + 4` has not been tested by `4 + 3`.
    """
    # Many draws repeat a question; a source that hasn't given enough by then is too small.
    draws = reasoning_gym.create_dataset(
        source.dataset, seed=seed, size=20 * needed, **source.options
    )
    problems: dict[tuple[str, ...], Problem] = {}
    for entry in draws:
        problem = Problem(source.ask(entry), entry["answer"])
        problems.setdefault((*sorted(problem.question.split()), problem.answer), problem)
        if len(problems) == needed:
            break
    return list(problems.values())
