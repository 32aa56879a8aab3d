"""Files of a run: one run at a time per directory, JSON that every parser reads, clear errors."""

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
_FIRST = "metrics.jsonl"  # the first file that a run creates


class Lock:
    """A lock that keeps other runs out of a directory until `__exit__` or the process's death."""

    def __init__(self, out: Path) -> None:
        """Make the directory if it doesn't exist, and lock it.

        Raises:
            ValueError: another run holds the lock, or the directory can't be written to.
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
            # another run may have ended, or moved the directory aside, since the file was opened
            is_there = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            is_there = False
        if not is_there:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"out: a run is going on in {self._out} (process {owner}): wait until it ends, "
                "stop it, or choose another out"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file

    def move_aside(self) -> Path | None:
        """Move aside what an earlier run left in the directory; return where it is now, if any.

        Raises:
            ValueError: the directory has files of its own, but no run.
        """
        with _naming(self._out):
            found = {path.name for path in self._out.iterdir()} - {_LOCK}
            if not found:
                return None
            if _FIRST not in found:
                raise ValueError(
                    f"out: {self._out} has files, but none of a run ({_FIRST} is missing): choose "
                    "another out"
                )
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
        raise ValueError(f"out: can't write to {out}: {reason(error)}") from error


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Turn a failure to write into an error that names the file and the reason.

    Raises:
        CannotWrite: the disk is full or the directory read-only, for example.
    """
    try:
        yield
    except (OSError, CheckpointException, SafetensorError) as error:
        raise CannotWrite(f"can't write {what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """Return the system's own message, which torch hides behind the errors that follow from it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def write(path: Path, text: str) -> None:
    """Write a file, all or nothing; make its directory if it doesn't exist."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def to_json(x: Any, indent: int | None = None) -> str:
    """Return JSON with null in place of non-finite numbers: NaN and Infinity are not JSON."""
    return json.dumps(_finite(x), allow_nan=False, indent=indent)


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def numbers_of(text: str | bytes) -> dict[str, float]:
    """Read a JSON object of numbers, with nan in place of null.

    Raises:
        ValueError: the text is not a JSON object.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {text[:60]!r}")
    return {name: math.nan if value is None else value for name, value in found.items()}
