"""Compute rewards: in threads if asked, each within its time limit, and all finite numbers."""

from __future__ import annotations

import reprlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from numbers import Real
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor
from tqdm import tqdm

from .config import LARGEST_REWARD, TaskConfig
from .tasks import Problem, Reward

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class _Failure(NamedTuple):
    why: str
    cause: BaseException | None = None


def rewards_of(
    config: TaskConfig,
    reward: Reward,
    responses: Sequence[str],
    problems: Sequence[Problem],
    *,
    bar: bool = False,
) -> tuple[list[float], int]:
    """Return the reward of each response to its problem.

    Args:
        config: settings of how many rewards to compute at once, how long one may take, and what a
            failed one counts.
        reward: the reward function, called with a response and its problem.
        responses: B responses.
        problems: the problem of each response.
        bar: show a progress bar if the rewards take longer than a second.

    Returns:
        B finite numbers, and how many of them are `task.failed_reward`.

    Raises:
        ValueError: a reward is not a finite number, raised an exception or took too long, and there
            is no `task.failed_reward`.
    """

    def call(i: int) -> float | _Failure:
        return _call(reward, responses[i], problems[i])

    count, failed = len(responses), 0
    if config.reward_workers > 1 or config.reward_seconds:
        found = _in_threads(call, count, config.reward_workers, config.reward_seconds)
    else:
        found = ((i, call(i)) for i in range(count))
    rewards = [0.0] * count
    options = {"delay": 1, "leave": False, "disable": not bar}
    with tqdm(found, total=count, desc="rewards", **options) as shown:
        for i, outcome in shown:
            if isinstance(outcome, _Failure):
                if config.failed_reward is None:
                    raise _error(config, outcome, responses[i], problems[i]) from outcome.cause
                outcome, failed = config.failed_reward, failed + 1
            rewards[i] = outcome
    return rewards, failed


def _call(reward: Reward, response: str, problem: Problem) -> float | _Failure:
    try:
        given: Any = reward(response, problem)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a check may well call sys.exit
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        return _Failure(f"raised {type(error).__name__}: {error} ({where})", error)
    scalar = isinstance(given, (np.generic, np.ndarray, Tensor)) and given.ndim == 0
    number = given.item() if scalar else given
    if isinstance(number, Real) and abs(cast(float, number)) <= LARGEST_REWARD:
        return float(number)
    return _Failure(f"returned {_SHORT.repr(given)}, not a finite float32 number,")


def _error(config: TaskConfig, failure: _Failure, response: str, problem: Problem) -> ValueError:
    return ValueError(
        f"task.reward: {config.reward!r} {failure.why} for the question "
        f"{_SHORT.repr(problem.question)} of the task {config.name!r} and the response "
        f"{_SHORT.repr(response)}. Set task.failed_reward to give such responses that reward"
    )


def _in_threads(
    call: Callable[[int], float | _Failure], count: int, workers: int, seconds: float
) -> Iterator[tuple[int, float | _Failure]]:
    """Yield call(0) to call(count - 1) as they end; calls that take too long are abandoned.

    The threads are daemons: one that hangs doesn't keep the process from ending.
    """
    done: SimpleQueue[tuple[int, float | _Failure]] = SimpleQueue()
    waiting, running = iter(range(count)), dict[int, float]()
    limit = seconds or float("inf")

    def run(i: int) -> None:
        done.put((i, call(i)))

    while True:
        for i in islice(waiting, workers - len(running)):
            running[i] = time.monotonic() + limit
            Thread(target=run, args=(i,), daemon=True).start()
        if not running:
            return
        left = min(running.values()) - time.monotonic()
        try:
            i, outcome = done.get(timeout=min(max(left, 0), 60))
        except Empty:
            now = time.monotonic()
            for i in [i for i, end in running.items() if end <= now]:
                del running[i]
                yield i, _Failure(f"took longer than task.reward_seconds={seconds:g}")
        else:
            if running.pop(i, None) is not None:  # not an abandoned call
                yield i, outcome
