"""The axes of sequences and of tokens in the arguments of a model's layers.

Names and layouts differ between models. The axes are therefore learnt: the model runs on a few
tokens in batches of three sizes, and the sizes that change with the batch reveal them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

# (sequences, tokens) of the batches from which axes are learnt
_SIZES = (2, 5), (3, 5), (2, 7)
PLAIN = type(None), bool, int, float, str  # types of values that all sequences share
BORDERS = "cu_seq_lens_q", "cu_seq_lens_k"  # borders of packed sequences, for FlashAttention


class Axes(NamedTuple):
    """The axes of one tensor. A size may be a multiple, as in (B * S, E).

    Attributes:
        sequences: the axis of sequences, if there is one; its size may nevertheless be 1.
        tokens: the axes of tokens.
        others: further known sizes of each axis.
        is_known: False if an axis changes its size and follows neither.
    """

    sequences: int | None = None
    tokens: tuple[int, ...] = ()
    others: tuple[frozenset[int], ...] = ()
    is_known: bool = True


UNKNOWN = Axes(is_known=False)
# keys: class of the layer, path of the tensor, number of its dimensions
KnownAxes = dict[tuple[str, str, int], Axes]


def leaves_of(tree: Any) -> list[tuple[str, Any]]:
    """Return the path and value of every leaf of nested tuples, lists and dictionaries."""
    return [(keystr(path), x) for path, x in tree_flatten_with_path(tree)[0]]


def class_of(layer: nn.Module) -> str:
    """Return the name of a layer's class, or of the one from which FSDP2 has derived it."""
    names = (kind.__name__ for kind in type(layer).__mro__)
    return next(name for name in names if not name.startswith("FSDP"))


@torch.no_grad()
def learn_axes(model: Any, layers: Sequence[nn.Module]) -> KnownAxes:
    """Learn the axes of all tensors among the arguments and results of a model's layers.

    Args:
        model: a model that takes `input_ids` (B, S), and `attention_mask` if it has this argument.
        layers: layers of the model.

    Returns:
        The axes of arguments, with paths as in (args, kwargs), and of results, with paths as in
        {"output": ...}.
    """
    runs: list[dict[tuple[str, str, int], list[torch.Size]]] = []

    def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for path, x in leaves_of((args, kwargs)) + leaves_of({"output": output}):
            if isinstance(x, Tensor):
                runs[-1].setdefault((class_of(layer), path, x.ndim), []).append(x.shape)

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    device = next(model.parameters()).device
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),  # dropout draws
            torch.compiler.set_stance("force_eager"),
        ):
            for size in _SIZES:
                runs.append({})
                for batch in _batches(model, size, device):
                    model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        key: _agreed([_axes(*shapes) for shapes in zip(*(run[key] for run in runs), strict=True)])
        for key in runs[0]
        if all(len(run.get(key, ())) == len(runs[0][key]) for run in runs)
    }


def _batches(model: Any, size: tuple[int, int], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield text with the model's own positions and, if it takes them, with those of all rows."""
    mask = torch.ones(size, dtype=torch.long, device=device)
    mask[0, 0] = 0  # without padding, some models make no mask
    parameters = inspect.signature(type(model).forward).parameters.values()
    known = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known.add("use_cache")
    batch = {"input_ids": mask.cumsum(1), "attention_mask": mask, "use_cache": False}
    own = {name: x for name, x in batch.items() if name in known}
    yield own
    if "position_ids" in known:
        yield own | {"position_ids": mask.cumsum(1)}


def _axes(shape: torch.Size, more_sequences: torch.Size, more_tokens: torch.Size) -> Axes:
    """Return the axes of a tensor that has these shapes in the three batches."""
    (b, s), (more_b, _), (_, more_s) = _SIZES
    follows_b = [i for i, n in enumerate(shape) if more_sequences[i] != n]
    follows_s = [i for i, n in enumerate(shape) if more_tokens[i] != n]
    if len(follows_b) > 1 or any(shape[i] * more_b != more_sequences[i] * b for i in follows_b):
        return UNKNOWN
    if any(shape[i] * more_s != more_tokens[i] * s for i in follows_s):
        return UNKNOWN
    others = [frozenset([n] if i not in follows_b + follows_s else []) for i, n in enumerate(shape)]
    return Axes(follows_b[0] if follows_b else None, tuple(follows_s), tuple(others))


def _agreed(found: list[Axes]) -> Axes:
    """Return a tensor's axes in several calls; in some, the axis of sequences may have size 1."""
    sequences = {axes.sequences for axes in found} - {None}
    tokens = {axes.tokens for axes in found}
    if any(not axes.is_known for axes in found) or len(sequences) > 1 or len(tokens) > 1:
        return UNKNOWN
    by_axis = zip(*(axes.others for axes in found), strict=True)
    others = tuple(frozenset().union(*sizes) for sizes in by_axis)
    return Axes(sequences.pop() if sequences else None, tokens.pop(), others)


class Place(NamedTuple):
    """The place of a tensor among the arguments or results of a layer."""

    path: str
    axes: Axes

    def is_called(self, *names: str) -> bool:
        return any(self.path.endswith(f"['{name}']") for name in names)


class Units(NamedTuple):
    """The units into which a batch is split: sequences if it is padded, tokens if it is packed.

    Attributes:
        number: number of units.
        sequence: (number,) the sequence of each token, if sequences are packed in one row.
    """

    number: int
    sequence: Tensor | None = None

    @property
    def are_packed(self) -> bool:
        return self.sequence is not None

    @classmethod
    def of(cls, given: Sequence[tuple[Place, Tensor]]) -> Units:
        """Return the units of a call with these arguments."""
        rows = (
            (x.shape[of.axes.sequences], x.shape[of.axes.tokens[0]])
            for of, x in given
            if of.axes.sequences is not None and of.axes.tokens
        )
        sequences, tokens = next(rows, (1, 0))
        if sequences > 1:
            return cls(sequences)
        for of, x in given:
            if of.is_called(*BORDERS):
                place = torch.arange(tokens, device=x.device)
                return cls(tokens, torch.searchsorted(x[1:].long(), place, right=True))
            if of.is_called("position_ids"):
                return cls(tokens, _sequence_of(x.reshape(-1, tokens)))
        return cls(sequences)

    def axes(self, of: Place) -> tuple[int, ...]:
        """Return the axes along which a tensor is split."""
        if self.sequence is not None:
            return of.axes.tokens
        return () if of.axes.sequences is None else (of.axes.sequences,)

    def fit(self, x: Tensor, of: Place) -> bool:
        """Return whether the tensor can be split, or belongs to all units."""
        if of.is_called(*BORDERS):
            return True
        axes, (sequences, tokens, others, is_known) = self.axes(of), of.axes
        follow = {sequences, *tokens}
        return is_known and all(
            n == 1 or n % self.number == 0 if i in axes else i in follow or n in others[i]
            for i, n in enumerate(x.shape)
        )

    def take(self, x: Tensor, of: Place, index: Tensor) -> Tensor:
        """Return the part of the units in `index`."""
        if self.sequence is not None and of.is_called(*BORDERS):
            lengths = torch.zeros_like(x[1:], dtype=torch.long)
            lengths.scatter_add_(0, self.sequence[index], torch.ones_like(index))
            return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(x.dtype)
        for axis in self.axes(of):
            if x.shape[axis] >= self.number:
                x = x.unflatten(axis, (self.number, -1)).index_select(axis, index)
                x = x.flatten(axis, axis + 1)
        return x

    def put(self, part: Tensor, of: Place, index: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of this shape with that part, and 0 elsewhere."""
        for axis in self.axes(of):
            if shape[axis] >= self.number:
                part = part.unflatten(axis, (len(index), -1))
                size = [*part.shape[:axis], self.number, *part.shape[axis + 1 :]]
                part = part.new_zeros(size).index_copy_(axis, index, part).flatten(axis, axis + 1)
        return part

    def are_live(self, gradient: Tensor, of: Place) -> Tensor:
        """Return (number,) bool: whether the gradient is non-zero anywhere in a unit's sequence."""
        live, axes = gradient != 0, self.axes(of)
        if not axes or live.shape[axes[0]] < self.number:
            return live.any().expand(self.number)
        live = live.movedim(axes[0], 0).reshape(self.number, -1).any(1)
        if self.sequence is None:
            return live
        of_sequence = torch.zeros_like(self.sequence)
        of_sequence.scatter_reduce_(0, self.sequence, live.to(of_sequence.dtype), "amax")
        return of_sequence[self.sequence] != 0


def _sequence_of(positions: Tensor) -> Tensor:
    """Return the sequence (S,) of each token in one row, given the row's positions (n, S).

    Positions are 0, 1, 2, ... in each sequence. Where they are not, as in a tree of responses to
    one prompt, or around images, all tokens are one sequence.
    """
    starts = positions[0] == 0
    sequence = starts.cumsum(0).sub(1).clamp(min=0)
    place = torch.arange(len(sequence), device=positions.device)
    first = torch.where(starts, place, 0).cummax(0).values
    return torch.where((positions == place - first).all(), sequence, 0)
