"""Checkpoints that are either complete or absent.

They are written to a temporary folder, flushed and renamed, and checked when they are read. Model
and optimizer are in the format of torch.distributed.checkpoint, which any number of processes can
read, however many wrote it; everything else is in one small file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import AdamW

from .files import reason, writing
from .progress import CannotWrite
from .ranks import Ranks

_STATE, _WEIGHTS, _MANIFEST = "state.pt", "weights", "manifest.json"
_BLOCK = 1 << 20
# Frozen parameters come from the model's own files.
_OPTIONS = StateDictOptions(
    ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False
)


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: AdamW,
    ranks: Ranks,
    *,
    keep: int,
) -> None:
    """Write the checkpoint `folder/step-NNNNNN`, all or nothing, and remove all but the last ones.

    Args:
        folder: directory of all checkpoints of a run, which all processes see.
        step: number of rollout batches so far.
        state: tensors, numbers and strings, in dicts and lists; the first process's is saved.
        model: the model whose trained weights are saved; each process saves its shard.
        optimizer: the optimizer of these weights.
        ranks: the processes of the run.
        keep: number of checkpoints to keep.

    Raises:
        CannotWrite: the disk is full, for example; the earlier checkpoints are unchanged.
    """
    final = folder / f"step-{step:06d}"
    partial = final.with_suffix(".partial")

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.partial"):  # from a run that was killed
            shutil.rmtree(left_over)
        partial.mkdir()

    def finish() -> None:
        _write(partial / _STATE, lambda file: file.write(_saved(state)))
        files = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        manifest = {"step": step, "optimizer": has_optimizer, "files": files}
        _write(partial / _MANIFEST, lambda file: file.write(json.dumps(manifest).encode()))
        _flush(partial / _WEIGHTS)
        _flush(partial)
        if final.exists():  # damaged: otherwise the run would have resumed from it
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
        # later checkpoints are damaged: otherwise the run would have resumed from them
        kept = [path for path in _all(folder) if _step(path) <= step][-keep:]
        for path in _all(folder):
            if path not in kept:
                shutil.rmtree(path)

    has_optimizer = bool(optimizer.state)  # one that has not taken a step has nothing to save
    if has_optimizer:
        _complete(optimizer)
    tensors = _tensors(model, optimizer, has_optimizer)
    try:
        with writing(final), _alone(ranks) as no_dist:
            ranks.on_first(begin)
            dcp.save(tensors, checkpoint_id=partial / _WEIGHTS, no_dist=no_dist)
            ranks.on_first(finish)
    except CannotWrite:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def last_whole(folder: Path) -> Path | None:
    """Return the last complete checkpoint, or None; warn about damaged ones, which are skipped."""
    for path in reversed(_all(folder)):
        if why := _damage(path):
            warnings.warn(f"{path} is damaged ({why}) and is skipped", stacklevel=2)
            continue
        return path
    return None


def load_state(path: Path) -> tuple[int, dict[str, Any]]:
    """Return a checkpoint's step and the `state` saved in it."""
    state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
    return _manifest(path)["step"], state


def load_weights(path: Path, model: nn.Module, optimizer: AdamW, ranks: Ranks) -> None:
    """Load a model and its optimizer in place; each process loads its shard.

    Raises:
        ValueError: the checkpoint does not fit the model, or can't be read.
    """
    has_optimizer = _manifest(path)["optimizer"]
    tensors = _tensors(model, optimizer, has_optimizer)
    try:
        with _alone(ranks) as no_dist:
            dcp.load(tensors, checkpoint_id=path / _WEIGHTS, no_dist=no_dist)
    except CheckpointException as error:
        raise ValueError(f"out: can't load {path}: {reason(error)}") from error
    set_model_state_dict(model, tensors["model"], options=_OPTIONS)
    if has_optimizer:
        set_optimizer_state_dict(model, optimizer, tensors["optimizer"], options=_OPTIONS)


def _complete(optimizer: AdamW) -> None:
    """Give parameters that no gradient has reached the state with which AdamW begins.

    For loading, torch expects a state of every parameter.
    """
    known = next(iter(optimizer.state.values()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    "step": torch.zeros_like(known["step"]),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _tensors(model: nn.Module, optimizer: AdamW, has_optimizer: bool) -> dict[str, Any]:
    tensors: dict[str, Any] = {"model": get_model_state_dict(model, options=_OPTIONS)}
    if has_optimizer:
        tensors["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return tensors


@contextmanager
def _alone(ranks: Ranks) -> Iterator[bool]:
    """Yield whether there is only one process, and silence torch's warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield ranks.size == 1


def _all(folder: Path) -> list[Path]:
    """Return all checkpoints in the order of their steps; names grow longer from step 10^6 on."""
    found = [path for path in folder.glob("step-*") if path.name[len("step-") :].isdecimal()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name[len("step-") :])


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / _MANIFEST).read_text())


def _damage(path: Path) -> str | None:
    try:
        for name, written in _manifest(path)["files"].items():
            size = (path / name).stat().st_size
            if size != written["bytes"]:
                return f"{name} has {size} bytes, but {written['bytes']} were written"
            if _sha256(path / name) != written["sha256"]:
                return f"the checksum of {name} is wrong"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _saved(state: dict[str, Any]) -> bytes:
    """Serialize in memory: on a full disk, the error of torch.save does not say that it is full."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Flush a directory to disk, which makes a rename in it durable."""
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
