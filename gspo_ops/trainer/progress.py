"""The progress of a run, requests to stop it, and the errors that end it early."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint."""


class Diverged(Exception):
    """Too many updates in a row, or the model's own logits, were not finite."""


class CannotWrite(Exception):
    """A file of the run could not be written; earlier files are unchanged."""


class Progress:
    """The progress of a run.

    Attributes:
        step: number of rollout batches trained on.
        before: (problems, samples) held-out rewards before training.
        accuracy: mean reward of the last evaluation during training.
        train_seconds: time spent in steps since the run first started.
        seconds: total time spent before the run was last resumed.
        started: when the run was started or last resumed.
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
    """Yield a function that returns whether SIGINT or SIGTERM has arrived.

    Args:
        twice: whether a second signal, of either kind, ends the process as usual. Under torchrun
            it must not: a Ctrl-C arrives from the terminal and once more from torchrun.
    """
    came = False

    def stop(number: int, frame: object) -> None:
        nonlocal came
        if not came:
            print("\nstopping after this step" + ("; repeat to stop at once" if twice else ""))
        came = True
        if twice:
            restore()

    def restore() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # only the main thread may handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    try:
        yield lambda: came
    finally:
        restore()
