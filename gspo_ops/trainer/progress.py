"""How far a run is, what asks it to stop, and how it ends before its time."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor


class Interrupted(Exception):
    """The run was asked to stop; it has saved where it is."""


class Diverged(Exception):
    """Too many updates in a row, or the model itself, have gone beyond all numbers."""


class CannotWrite(Exception):
    """A file of the run could not be written; what was there before is as it was."""


class Progress:
    """How far a run is.

    Attributes:
        step: rollout batches trained on.
        before: (problems, samples) held-out rewards before training.
        accuracy: mean reward of the last evaluation on the way.
        train_seconds: spent in steps, by this start of the run and those before it.
        seconds: spent in all by the starts before this one.
        started: when this one began.
    """

    def __init__(
        self,
        step: int = 0,
        before: Tensor | None = None,
        train_seconds: float = 0.0,
        seconds: float = 0.0,
        accuracy: float = -math.inf,
    ) -> None:
        self.step, self.before, self.accuracy = step, before, accuracy
        self.train_seconds, self.seconds = train_seconds, seconds
        self.started = time.monotonic()


@contextmanager
def stop_signals(*, twice: bool) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come.

    Args:
        twice: whether a second one ends the process as ever. Under torchrun it does not: a Ctrl-C
            comes once from the terminal and again from there.
    """
    came = False

    def stop(number: int, frame: object) -> None:
        nonlocal came
        if not came:
            print("\nstopping after this step" + ("; once more to stop at once" if twice else ""))
        came = True
        if twice:
            signal.signal(number, before[number])

    before: dict[int, Any] = {}
    with suppress(ValueError):  # of another than the main thread, which is told instead
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield lambda: came
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
