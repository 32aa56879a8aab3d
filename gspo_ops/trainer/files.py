"""Files of a run: one run at a time in a directory, JSON that every reader takes, clear errors."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from .progress import CannotWrite

_LOCK = "lock"


class Lock:
    """That no other run writes into a directory: until `__exit__`, or the death of the process."""

    def __init__(self, out: Path) -> None:
        """Make the directory if it isn't there, and lock it.

        Raises:
            ValueError: another run has it, or it can't be written to.
        """
        self._out = out
        with _naming(out):
            self._file = self._take()

    def _take(self) -> TextIO:
        self._out.mkdir(parents=True, exist_ok=True)
        path = self._out / _LOCK
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another may have ended, or moved the directory aside, since the file was opened
            is_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            is_there = False
        if not is_there:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"out: a run is going on in {self._out} (process {owner}): wait until it has "
                "ended, stop it, or give another out"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file

    def move_aside(self) -> Path | None:
        """What an earlier run left in the directory; returns where it is now."""
        with _naming(self._out):
            if all(path.name == _LOCK for path in self._out.iterdir()):
                return None
            numbered = (Path(f"{self._out}-{i}") for i in range(1, 10**6))
            aside = next(path for path in numbered if not path.exists())
            self._out.rename(aside)
            (aside / _LOCK).unlink()
            self._file.close()
            self._file = self._take()
        return aside

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            (self._out / _LOCK).unlink()
        self._file.close()


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"out: can't write to {out}: {_reason(error)}") from error


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Say what could not be written, and why.

    Raises:
        CannotWrite: the disk is full, the directory read-only, or the like.
    """
    try:
        yield
    except (OSError, CheckpointException, SafetensorError) as error:
        raise CannotWrite(
            f"can't write {what}: {_reason(error)}. Checkpoints written before are whole: --resume "
            "goes on from the last one"
        ) from error


def _reason(error: BaseException) -> str:
    """What the system said, which torch covers up with what failed in turn."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def write(path: Path, text: str) -> None:
    """All or nothing."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def to_json(x: Any, indent: int | None = None) -> str:
    """With null for what is not finite: NaN and Infinity are not JSON."""
    return json.dumps(_finite(x), allow_nan=False, indent=indent)


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def numbers_of(text: str | bytes) -> dict[str, float]:
    """Of a JSON object of numbers, nan where it has null.

    Raises:
        ValueError: it is none.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {text[:60]!r}")
    return {name: math.nan if value is None else value for name, value in found.items()}
