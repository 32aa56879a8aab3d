"""The surroundings of a layer's run, autocast and random numbers, in which it can run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode

from .axes import Units


class Surroundings:
    """The surroundings of the first run.

    Attributes:
        is_random: whether this run has drawn random numbers.
    """

    def __init__(self, device: torch.device) -> None:
        """Record the present surroundings, for a run on this device."""
        self.device, self.is_random = device, True
        self.autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in dict.fromkeys(["cpu", device.type])
        ]
        self.before = self.after = self._random_state()

    def is_narrow(self) -> bool:
        """Return whether autocast rounds products to 16 bits, whatever their operands."""
        return any(is_enabled for kind, _, is_enabled in self.autocasts if kind == self.device.type)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Provide the context of the first run."""
        with self._autocast():
            yield
        self.after = self._random_state()
        self.is_random = not _are_equal(self.before, self.after)

    @contextmanager
    def again(self, units: Units | None = None, index: Tensor | None = None) -> Iterator[Replay]:
        """Provide the context of another run.

        Args:
            units: the units of the first run.
            index: indices of those that run again; None for all.
        """
        replay = Replay()
        with ExitStack() as stack:
            stack.enter_context(self._autocast())
            if self.is_random:
                has_own = self.device.type != "cpu"
                stack.enter_context(torch.random.fork_rng([self.device] if has_own else []))
                self._set_random_state(self.before)
                if units is not None and index is not None:
                    stack.enter_context(_Dropout(units, index))
            yield replay
            replay.is_same = not self.is_random or _are_equal(self._random_state(), self.after)

    def _autocast(self) -> ExitStack:
        stack = ExitStack()
        for kind, dtype, is_enabled in self.autocasts:
            # a run with a graph must not get weights from the cache that were cast without one
            stack.enter_context(torch.autocast(kind, dtype, is_enabled, cache_enabled=False))
        return stack

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)


class Replay:
    """Another run.

    Attributes:
        is_same: whether it has drawn the random numbers of the first run, and no others.
    """

    is_same = True


class _Dropout(TorchFunctionMode):
    """Dropout that draws for all sequences, and takes the draws of those that run again."""

    def __init__(self, units: Units, index: Tensor) -> None:
        super().__init__()
        self.units, self.index = units, index

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not dropout or not kwargs.get("training", True) or kwargs.get("inplace"):
            return func(*args, **kwargs)
        (x,), p = args, kwargs.get("p", 0.5)
        if self.units.sequence is not None or x.shape[0] % len(self.index) or not 0 < p < 1:
            return func(*args, **kwargs)
        per_sequence = x.unflatten(0, (len(self.index), -1))
        all_of_them = x.new_ones(self.units.number, *per_sequence.shape[1:])
        is_kept = dropout(all_of_them.flatten(0, 1), p) != 0
        is_kept = is_kept.view(all_of_them.shape)[self.index]
        return torch.where(is_kept, per_sequence * (1 / (1 - p)), 0.0).to(x.dtype).flatten(0, 1)


def _are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
