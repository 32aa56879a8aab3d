"""Checkpoints that are whole or not there: written aside, flushed, renamed; checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

_STATE, _MANIFEST = "state.pt", "manifest.json"
_BLOCK = 1 << 20


class Checkpoint(NamedTuple):
    """What was read.

    Attributes:
        step: rollout batches that it contains.
        state: what was saved.
    """

    step: int
    state: dict[str, Any]


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, all or nothing, and drop all but the last ones.

    Args:
        folder: of all checkpoints of a run.
        step: rollout batches so far.
        state: tensors, numbers, strings, in dicts and lists.
        keep: checkpoints that stay.

    Returns:
        Its directory, `folder/step-NNNNNN`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("*.partial"):  # of a process that was killed
        shutil.rmtree(left_over)
    final = folder / f"step-{step:06d}"
    partial = final.with_suffix(".partial")
    partial.mkdir()
    _write(partial / _STATE, lambda file: torch.save(state, file))
    manifest = {
        "step": step, "bytes": (partial / _STATE).stat().st_size,
        "sha256": _sha256(partial / _STATE),
    }  # fmt: skip
    _write(partial / _MANIFEST, lambda file: file.write(json.dumps(manifest).encode()))
    _flush(partial)
    if final.exists():  # damaged, or it would have been continued from
        shutil.rmtree(final)
    partial.rename(final)
    _flush(folder)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_last(folder: Path) -> Checkpoint | None:
    """The last checkpoint that is whole; None without one. Damaged ones are passed over, aloud."""
    for path in reversed(_all(folder)):
        if why := _damage(path):
            warnings.warn(f"{path} is damaged ({why}) and is passed over", stacklevel=2)
            continue
        manifest = json.loads((path / _MANIFEST).read_text())
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        return Checkpoint(manifest["step"], state)
    return None


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".partial")


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        size = (path / _STATE).stat().st_size
        if size != manifest["bytes"]:
            return f"{size} bytes, {manifest['bytes']} were written"
        if _sha256(path / _STATE) != manifest["sha256"]:
            return "its checksum is wrong"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write(path: Path, write: Any) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """A rename lasts when its directory has reached the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
