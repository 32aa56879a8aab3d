"""Verifiable problems: prompts, turns, rewards, order, and disjoint training and held-out sets."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import reasoning_gym

from .config import TaskConfig, _nearest


@dataclass(frozen=True)
class Problem:
    """A question as the prompt shows it, and its right answer.

    Attributes:
        question: the question.
        answer: the right answer; empty if none is known.
        also: further answers that are accepted.
        messages: the question as a chat of `{"role": ..., "content": ...}`; empty for a text.
        entry: further data, such as the dataset's entry.
    """

    question: str
    answer: str
    also: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = field(default=(), compare=False)
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer, *self.also)


Reward = Callable[[str, Problem], float]
# Grades of a response's tokens, given as texts: 1 for a token that is right after those before it,
# else 0.
Grades = Callable[[Sequence[str], Problem], list[float]]
# The problem of the next turn, from the present one and the response to it; None after the last.
FollowUp = Callable[[Problem, str], Problem | None]


def parse_answer(response: str) -> str:
    """Return the answer in a response: its first line, without surrounding white space."""
    return response.split("\n", 1)[0].strip()


def is_correct(response: str, problem: Problem) -> bool:
    """Return whether the answer in a response is a right one, character by character."""
    return parse_answer(response) in problem.answers


def reward_fingerprint(reward: Reward) -> str:
    """Hash the source file of a reward function or of an object's class, and a partial's arguments.

    Addresses in memory are left out: another process has others.
    """
    function = inspect.unwrap(getattr(reward, "__func__", reward))
    if isinstance(function, partial):
        arguments = _ADDRESS.sub("", repr((function.args, function.keywords)))
        code = (reward_fingerprint(function.func) + arguments).encode()
    else:
        named = function if hasattr(function, "__qualname__") else type(function)
        try:
            code = Path(inspect.getsourcefile(named) or "").read_bytes()
        except (TypeError, OSError):  # not defined in a file
            code = named.__qualname__.encode()
    return hashlib.sha256(code).hexdigest()


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _no_follow_up(problem: Problem, response: str) -> Problem | None:
    return None


@dataclass(frozen=True)
class Task:
    """Problems of one kind; no problem is in two of the three sets, not even mirrored.

    Attributes:
        examples: solved problems shown in every prompt.
        train: problems to train on.
        held_out: problems to measure accuracy on.
        reward: function that returns the reward of a response to a problem.
        follow_up: function that returns the problem of the next turn.
        turns: number of turns, the same for all problems; each turn has a reward.
        grades: function that returns the grades of a response's tokens, for `task.graded`.
    """

    examples: tuple[Problem, ...]
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    reward: Reward = is_correct
    follow_up: FollowUp = _no_follow_up
    turns: int = 1
    grades: Grades | None = None

    def prompt(self, problem: Problem) -> str:
        """Return the solved examples, one per line, then `problem`'s question, unanswered."""
        return "".join(map(self._solved, self.examples)) + problem.question

    def chat(self, problem: Problem) -> list[Mapping[str, str]]:
        """Return the same as a chat: one message, or the problems' own messages."""
        if not problem.messages:
            return [{"role": "user", "content": self.prompt(problem)}]
        solved = [
            message
            for example in self.examples
            for message in (
                *(example.messages or [{"role": "user", "content": example.question}]),
                {"role": "assistant", "content": example.answer},
            )
        ]
        return [*solved, *problem.messages]

    def fingerprint(self) -> str:
        """Hash the questions and answers of all problems, in their order."""
        sets = [[(p.question, p.answers) for p in of] for of in
                (self.examples, self.train, self.held_out)]  # fmt: skip
        return hashlib.sha256(repr(sets).encode()).hexdigest()

    def _solved(self, problem: Problem | None) -> str:
        text = ""
        while problem is not None:
            text += f"{problem.question} {problem.answer}\n"
            problem = self.follow_up(problem, problem.answer)
        return text


def make_task(config: TaskConfig, seed: int) -> Task:
    """Draw distinct problems and divide them into three sets.

    Args:
        config: which problems, how many, and their reward.
        seed: seed of the draw and the division.

    Returns:
        The task.

    Raises:
        ValueError: the task or its reward is unknown, it has too few distinct problems, or their
            answers do not suit the settings.
    """
    source = _source(config)
    needed = config.examples + config.train_size + config.eval_size
    is_file = isinstance(source, JsonLines)
    problems = _distinct(source.problems(seed, needed), needed, to_the_end=is_file)
    if len(problems) < needed:
        raise ValueError(
            f"task.name: {config.name!r} gave {len(problems)} distinct problems, expected "
            f"examples + train_size + eval_size = {needed}"
        )
    # The draw exhausts the rare short questions first; shuffle to make all sets alike.
    random.Random(seed).shuffle(problems)
    first_held_out = config.examples + config.train_size
    examples = problems[: config.examples]
    _check_suitable(config, problems, examples)
    return Task(
        examples=tuple(examples),
        train=tuple(problems[config.examples : first_held_out]),
        held_out=tuple(problems[first_held_out:]),
        reward=_reward(config.reward, source),
        follow_up=source.follow_up,
        turns=source.turns,
        grades=_grades(config, source),
    )


def _check_suitable(
    config: TaskConfig, problems: Sequence[Problem], examples: Sequence[Problem]
) -> None:
    """Check that the settings can do something with the problems and their answers."""
    if any(problem.messages for problem in problems) and not config.chat:
        raise ValueError("task.chat: must be true for prompts that are chat messages")
    if not all(example.answer for example in examples):
        raise ValueError(
            f"task.examples: expected 0 for {config.name!r}, some of whose problems have no answer "
            f"to show, got {config.examples}"
        )
    missed = [(p, x) for p in problems for x in p.answers if not x or not is_correct(x, p)]
    if missed and config.reward == "exact":
        problem, answer = missed[0]
        raise ValueError(
            "task.reward: 'exact' looks for an answer in the first line of a response, without "
            f"white space around it, and never finds {answer!r}, as to {problem.question[:60]!r}: "
            "expected 'score' or a function of your own"
        )


class Deck:
    """Problems drawn in shuffled epochs."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random = size, random.Random(seed)
        self._left: list[int] = []

    def draw(self, problems: tuple[Problem, ...], count: int) -> list[Problem]:
        """Draw `count` problems; a new epoch begins when too few are left in the old one."""
        if len(self._left) < count:
            self._left = list(range(self._size))
            self._random.shuffle(self._left)
        return [problems[self._left.pop()] for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        version, state, gauss = self._random.getstate()
        return {"left": list(self._left), "random": [version, list(state), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._left = list(state["left"])
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))


# Where problems come from


@dataclass(frozen=True)
class Dataset:
    """A reasoning-gym dataset and how to ask its questions."""

    name: str
    ask: Callable[[Mapping[str, Any]], str]
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    follow_up: FollowUp = _no_follow_up
    turns: int = 1

    def problems(self, seed: int, needed: int) -> Iterator[Problem]:
        # Many draws repeat a question; if too few of these are distinct, the dataset is too small.
        try:
            draws = reasoning_gym.create_dataset(
                self.name, seed=seed, size=20 * needed, **self.options
            )
        except (TypeError, AssertionError) as error:
            raise ValueError(f"task.options: {self.name} rejects them: {error}") from None
        for entry in draws:
            answer = "" if entry["answer"] is None else str(entry["answer"])  # several may be right
            yield Problem(self.ask(entry), answer, entry=entry)

    def score(self, response: str, problem: Problem) -> float:
        """Return the score of the dataset's own check, which may give partial credit."""
        dataset = reasoning_gym.create_dataset(self.name, seed=0, size=1, **self.options)
        return float(dataset.score_answer(answer=response.strip(), entry=problem.entry))


@dataclass(frozen=True)
class Recurrence:
    """Digits to continue with x(t) = x(t-1) + x(t-4) mod 10: the answer to `3941` is `4378...`.

    An answer has one token per digit and no stop token, so `rollout.max_new_tokens` must be the
    number of digits.
    """

    digits: int = 32
    follow_up: FollowUp = _no_follow_up
    turns: int = 1

    def problems(self, seed: int, needed: int) -> Iterator[Problem]:
        draw = random.Random(seed)
        for _ in range(20 * needed):
            start = "".join(draw.choices("0123456789", k=_LAG))
            answer = start
            for _ in range(self.digits):
                answer += next_digit(answer)
            yield Problem(start, answer[_LAG:])

    def grades(self, tokens: Sequence[str], problem: Problem) -> list[float]:
        """Return 1 for each digit that is right given the digits written before it, else 0."""
        so_far, found = problem.question, []
        for token in tokens:
            found.append(float(token == next_digit(so_far)))
            so_far += token if len(token) == 1 and token.isdecimal() else ""
        return found


_LAG = 4


def next_digit(digits: str) -> str:
    """Return the next digit of a `Recurrence`."""
    return str((int(digits[-1]) + int(digits[-_LAG])) % 10)


@dataclass(frozen=True)
class JsonLines:
    """A file with one `{"prompt": ..., "answer": ...}` per line."""

    path: Path
    follow_up: FollowUp = _no_follow_up
    turns: int = 1

    def problems(self, seed: int, needed: int) -> Iterator[Problem]:
        try:
            text = self.path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"task.name: {self.path} is not UTF-8: {error}") from None
        # read it all: even the last line may have a further answer to an earlier question
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                messages = _messages(entry["prompt"])
                question = _as_text(messages) if messages else entry["prompt"]
                answer, *also = _answers(entry["answer"])
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f'task.name: line {number} of {self.path} is not {{"prompt": ..., '
                    f'"answer": ...}} ({error}): {line[:60]!r}'
                ) from None
            yield Problem(question, answer, tuple(also), messages, entry)


def _messages(prompt: Any) -> tuple[Mapping[str, str], ...]:
    """Return the messages of a chat; none for a text."""
    if isinstance(prompt, str) and prompt.strip():
        return ()
    keys = {"role", "content"}
    if isinstance(prompt, list) and prompt and all(
        isinstance(m, dict) and m.keys() == keys and all(isinstance(x, str) for x in m.values())
        for m in prompt
    ):  # fmt: skip
        return tuple(prompt)
    raise ValueError("a prompt must be a non-empty text or a list of chat messages")


def _as_text(messages: tuple[Mapping[str, str], ...]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _answers(given: Any) -> list[str]:
    """Return the accepted answers as texts; numbers keep their notation."""
    several = given if isinstance(given, list) and given else [given]
    for answer in several:
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
        if not isinstance(answer, str) and not (is_number and math.isfinite(answer)):
            raise ValueError(f"an answer must be a text, a number or a list of these: {answer!r}")
    return [str(answer) for answer in several]


def _expression(entry: Mapping[str, Any]) -> str:
    return f"{entry['metadata']['expression']} ="


def _question_and_answer(entry: Mapping[str, Any]) -> str:
    return f"Q: {entry['question']} A:"


def _first_step(entry: Mapping[str, Any]) -> str:
    return _expression(entry).rsplit(" ", 3)[0] + " ="


def _second_step(problem: Problem, response: str) -> Problem | None:
    """Return the second step of a + b + c, which uses the first one's result, right or wrong."""
    if "second" in problem.entry:
        return None
    operator, operand = problem.entry["metadata"]["expression"].split()[-2:]
    try:
        given = int(parse_answer(response))
    except ValueError:
        given = int(problem.answer)
    answer = given + int(operand) if operator == "+" else given - int(operand)
    return Problem(f"{given} {operator} {operand} =", str(answer), entry={"second": True})


@dataclass(frozen=True)
class TwoStep(Dataset):
    """Sums of three numbers, in two turns; each turn has its own reward."""

    follow_up: FollowUp = _second_step
    turns: int = 2

    def problems(self, seed: int, needed: int) -> Iterator[Problem]:
        for problem in super().problems(seed, needed):
            a, operator, b = problem.question.removesuffix(" =").split()
            first = int(a) + int(b) if operator == "+" else int(a) - int(b)
            yield Problem(problem.question, str(first), entry=problem.entry)


TASKS: Mapping[str, Dataset] = MappingProxyType(
    {
        # 155 distinct problems
        "digit_sums": Dataset("chain_sum", _expression, {"max_terms": 2, "max_digits": 1}),
        "sums": Dataset("chain_sum", _expression, {"max_terms": 2, "max_digits": 2}),
        "products": Dataset("products", _expression, {"max_digits": 2}),
        "letter_counting": Dataset(
            "letter_counting", _question_and_answer, {"min_words": 2, "max_words": 4}
        ),
        "two_step": TwoStep(
            "chain_sum", _first_step, {"min_terms": 3, "max_terms": 3, "max_digits": 1}
        ),
    }
)


Source = Dataset | Recurrence | JsonLines
_RECURRENCE = "recurrence"


def _source(config: TaskConfig) -> Source:
    if config.name == _RECURRENCE:
        digits = config.options.get("digits", Recurrence.digits)
        if config.options.keys() - {"digits"} or type(digits) is not int or digits < 1:
            raise ValueError(
                f"task.options: expected only digits, an integer of at least 1, for "
                f"{_RECURRENCE!r}, got {dict(config.options)}"
            )
        return Recurrence(digits)
    if config.name in TASKS:
        if config.options:
            raise ValueError(
                f"task.options: {config.name!r} has fixed options; only datasets of reasoning-gym "
                "take others"
            )
        return TASKS[config.name]
    if config.name.endswith(".jsonl"):
        path = Path(config.name)
        if not path.is_file():
            raise ValueError(f"task.name: no such file: {path}")
        return JsonLines(path)
    known = [*TASKS, _RECURRENCE, *reasoning_gym.factory.DATASETS]
    if config.name not in known:
        close = _nearest(config.name, known)
        hint = (
            close if "did you mean" in close else f"; tasks are {', '.join([*TASKS, _RECURRENCE])}"
        )
        raise ValueError(
            f"task.name: expected a task, a dataset of reasoning-gym or a .jsonl file, got "
            f"{config.name!r}{hint}"
        )
    ask = itemgetter("question") if config.chat else _question_and_answer
    return Dataset(config.name, ask, config.options)


def _grades(config: TaskConfig, source: Source) -> Grades | None:
    if not config.graded:
        return None
    if not isinstance(source, Recurrence):
        raise ValueError(f"task.graded: expected false for {config.name!r}, which has no grades")
    return source.grades


def _reward(name: str, source: Source) -> Reward:
    if name == "exact":
        # reasoning-gym's own check gives partial credit for wrong answers and full credit for odd
        # notations (`+07`)
        return is_correct
    if name == "score":
        if not isinstance(source, Dataset) or source.turns > 1:
            raise ValueError("task.reward: 'score' needs a task that is one reasoning-gym dataset")
        return source.score
    module, _, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # as in `python -m`; a console script has its own folder here
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the code of the module may raise anything
        raise ValueError(
            f"task.reward: can't import {name!r} with {here} and PYTHONPATH searched: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"task.reward: {name!r} is not a function of (response, problem)")
    return cast(Reward, found)


def _distinct(problems: Iterator[Problem], needed: int, *, to_the_end: bool) -> list[Problem]:
    """Return up to `needed` distinct problems, in the order drawn.

    A question is one problem, whatever its white space, and all its answers are accepted. Questions
    of the same words with an answer in common are one problem, too: for a model trained on `3 + 4`,
    `4 + 3` is not a held-out problem. A file may have further answers up to its end.
    """
    found: dict[str, Problem] = {}
    left_out: set[str] = set()  # for good: a later line would not bring their first answers back
    by_words: dict[tuple[str, ...], list[str]] = {}
    for problem in problems:
        words = problem.question.split()
        key, mirrored = " ".join(words), by_words.setdefault(tuple(sorted(words)), [])
        if key in left_out:
            continue
        known = found.get(key)
        if known is not None:
            more = [answer for answer in problem.answers if answer not in known.answers]
            problem = replace(known, also=(*known.also, *more))
        twins = [k for k in mirrored if k != key and {*found[k].answers} & {*problem.answers}]
        if known is None and (twins or len(found) == needed):
            left_out.add(key)
            continue
        left_out.update(twins)
        for twin in twins:  # because of an answer that came later
            mirrored.remove(twin)
            del found[twin]
        if known is None:
            mirrored.append(key)
        found[key] = problem
        if len(found) == needed and not to_the_end:
            break
    return list(found.values())
