"""The processes of one run, as torchrun starts them, and the model that they share.

A single process is the case of size 1, in which nothing is exchanged.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import pad

from .. import Objective, global_denominator
from ..integrations.heads import as_forward
from .progress import CannotWrite, Diverged

T = TypeVar("T")


class Ranks:
    """Communication between the processes of a run.

    All processes must call each method, in the same order.

    Attributes:
        size: number of processes.
        rank: number of this process, from 0.
    """

    def __init__(self, device: torch.device) -> None:
        """Join the processes that torchrun started, or those of an existing default group.

        Args:
            device: the device that this process computes on.
        """
        self.size, self.rank, self._device = 1, 0, device
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        if dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def gather(self, x: T) -> list[T]:
        """Return the values of all processes, in their order; any picklable value will do."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def share(self, x: T) -> T:
        """Return the first process's value."""
        return self.gather(x)[0]

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on at least one process."""
        return any(self.gather(flag))

    def together(self, function: Callable[[], T]) -> T:
        """Call a function on each process; return its value once it has succeeded on all.

        Raises:
            ValueError, OSError, Diverged, CannotWrite: the function raised it on one process; all
                processes raise it, so that none waits for one that has ended.
        """
        error: Exception | None = None
        try:
            value = function()
        except _SHARED as raised:
            error = raised
        failures = self.gather(error and _plain(error))
        if error is not None:
            raise error
        for failure in failures:
            if failure is not None:
                raise failure
        return value

    def on_first(self, function: Callable[[], T]) -> T | None:
        """Call a function on the first process while the others wait; they return None."""
        return self.together(lambda: function() if self.is_first else None)

    def part(self, items: Sequence[T], counts: Sequence[int] | None = None) -> list[T]:
        """Return this process's part of items that all have: equally many, or as in `counts`."""
        if counts is None:
            counts = [len(items) // self.size] * self.size
        start = sum(counts[: self.rank])
        return list(items[start : start + counts[self.rank]])

    def denominator(self, objective: Objective, parts: Sequence[Tensor]) -> Tensor:
        """Return the denominator with which the parts' losses add up to that of the whole batch.

        Args:
            objective: the objective.
            parts: (B,) lengths of the responses of each part on this process.
        """
        batches: list[Mapping[str, Tensor | None]] = [
            {"cu_seqlens": pad(n.cumsum(0), (1, 0))} for n in parts
        ]
        group = dist.group.WORLD if self.size > 1 else None
        return global_denominator(batches, objective=objective, group=group)

    # The model

    def shard(self, model: nn.Module) -> None:
        """Shard the weights of a model over the processes, layer by layer (FSDP2)."""
        if self.size == 1:
            return
        mesh = init_device_mesh(self._device.type, (self.size,))
        layers = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def with_whole_weights(self, model: nn.Module, function: Callable[[], T]) -> T:
        """Call a function with all weights gathered: each process can run the model on its own."""
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        layers = [part for part in parts if part is not model]
        for layer in layers:
            layer.set_reshard_after_forward(False)
            layer.unshard()
        try:
            return as_forward(model, function)
        finally:
            for layer in layers:
                layer.set_reshard_after_forward(True)
            for part in parts:
                part.reshard()


_SHARED = (ValueError, OSError, Diverged, CannotWrite)


def _plain(error: Exception) -> Exception:
    """Return a copy of the error that can be pickled."""
    return next(kind for kind in _SHARED if isinstance(error, kind))(str(error))


def whole(x: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, and any other tensor unchanged."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
