"""A batch of a causal language model, and the part of it that holds some of its sequences."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..constants import IGNORED
from .axes import BORDERS, PLAIN, Axes, Place, Units
from .heads import hidden_to, unwrapped

# axes of a model's arguments, by name and number of dimensions
_ANY: frozenset[int] = frozenset()
_ROWS = Axes(sequences=0, tokens=(1,))
_AXES = {
    **{(name, 2): _ROWS for name in (
        "input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids",
        "seq_idx",
    )},
    ("position_ids", 3): Axes(1, (2,), (frozenset([3, 4]), *2 * [_ANY])),  # per axis of images
    ("attention_mask", 4): Axes(0, (2, 3), (_ANY, frozenset([1]), *2 * [_ANY])),
    ("cu_seq_lens_q", 1): Axes(),
    ("cu_seq_lens_k", 1): Axes(),
}  # fmt: skip
# statistics that are fractions of sequences, and of tokens
_OF_SEQUENCES = ("clip_frac_sequences",)
_OF_TOKENS = (
    "clip_frac_tokens",
    "clip_frac_low",
    "clip_frac_high",
    "clip_frac_dual",
    "active_token_frac",
)
_FEW = 4  # tokens per sequence in the test whether packed sequences see each other
_separate: weakref.WeakKeyDictionary[nn.Module, set[object]] = weakref.WeakKeyDictionary()


class Batch(NamedTuple):
    """Sequences that end in responses.

    Attributes:
        arguments: arguments of the model's forward, with `input_ids` (B, S), or (1, S) if packed.
        width: T, the number of tokens at the end of each row that may be responses; None if packed.
        cu_seqlens: (B + 1,) first tokens of packed sequences, followed by S; None if padded.
    """

    arguments: dict[str, Any]
    width: int | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], width: int | None, cu_seqlens: Tensor | None
    ) -> Batch:
        """Check the arguments and make a batch of them.

        Raises:
            ValueError: an argument is invalid; the message names it.
        """
        if "input_ids" not in arguments:
            raise ValueError(f"batch must contain input_ids, got {sorted(arguments)}")
        if "labels" in arguments:
            raise ValueError(
                "batch must not contain labels: the model makes no logits for its own loss"
            )
        ids = arguments["input_ids"]
        if cu_seqlens is None:
            if ids.ndim != 2 or width is None or not 0 < width < ids.shape[1]:
                raise ValueError(
                    f"batch['input_ids'] must have shape (B, S) with S > T={width} response "
                    f"tokens, got {tuple(ids.shape)}"
                )
            return cls(dict(arguments), width, None)
        if ids.ndim != 2 or len(ids) != 1:
            raise ValueError(
                f"batch['input_ids'] must have shape (1, S) with cu_seqlens, got {tuple(ids.shape)}"
            )
        if not {"position_ids", "cu_seq_lens_q"} & arguments.keys():
            raise ValueError(
                "batch must contain position_ids that restart at each sequence, or "
                "cu_seq_lens_q with cu_seqlens: else its sequences attend to each other"
            )
        return cls(dict(arguments), None, cu_seqlens)

    @property
    def ids(self) -> Tensor:
        return self.arguments["input_ids"]

    @property
    def number(self) -> int:
        """The number of sequences."""
        return len(self.ids) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    # Rows of hidden states, each of which predicts a token

    def hidden(self, hidden: Tensor) -> Tensor:
        """Select from (B, S, H) the states that predict tokens; S may include prepended tokens."""
        if self.width is None:
            return hidden[0, -self.ids.shape[1] :]
        return hidden[:, -self.width - 1 : -1]

    def targets(self) -> Tensor:
        """Return the token that each of these hidden states predicts."""
        if self.width is not None:
            return self.ids[:, -self.width :]
        assert self.cu_seqlens is not None
        firsts = self.ids[0].index_fill(0, self.cu_seqlens[:-1].long(), IGNORED)
        return self.of_rows(firsts)

    def of_rows(self, x: Tensor) -> Tensor:
        """Convert values per token to values per row; values per sequence stay."""
        return x if self.width is not None or not self._is_per_token(x) else x.roll(-1, -1)

    def of_tokens(self, x: Tensor) -> Tensor:
        """Convert values per row to values per token."""
        return x if self.width is not None else x.roll(1, -1)

    def _is_per_token(self, x: Tensor) -> bool:
        return x.shape[-1:] == self.ids.shape[1:] and x.shape != (self.number,)

    # Some of the sequences

    def obstacle(self) -> str | None:
        """Return the name of an argument that cannot be split into sequences, if there is one."""
        units = self._units()
        for name, x in self.arguments.items():
            if isinstance(x, Tensor) and x.ndim:
                place = self._place(name, x)
                if place is None or not units.fit(x, place):
                    return name
            elif not isinstance(x, (Tensor, *PLAIN)):
                return name
        return None

    def _place(self, name: str, x: Tensor) -> Place | None:
        axes = _AXES.get((name, x.ndim))
        return None if axes is None else Place(f"['{name}']", axes)

    def _units(self) -> Units:
        if self.cu_seqlens is None:
            return Units(self.number)
        token = torch.arange(self.ids.shape[1], device=self.ids.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:].long(), token, right=True)
        return Units(len(token), sequence)

    def some(self, is_live: Tensor) -> Part:
        """Select the sequences for which this is True, with one host synchronisation."""
        borders = [] if self.cu_seqlens is None else [self.cu_seqlens.long()]
        found = torch.cat([is_live.long(), *borders]).tolist()
        index = [b for b, live in enumerate(found[: self.number]) if live]
        sequences = tokens = torch.tensor(index, dtype=torch.long, device=self.ids.device)
        if not index:
            return Part(self, self.stand_in(), sequences, tokens)
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is not None:
            first = found[self.number :]
            tokens = torch.cat([torch.arange(first[b], first[b + 1]) for b in index])
            tokens = tokens.to(sequences.device)
            lengths = cu_seqlens.diff()[sequences]
            cu_seqlens = pad(lengths.cumsum(0), (1, 0)).to(cu_seqlens.dtype)
        batch = Batch(self._arguments_of(tokens, cu_seqlens), self.width, cu_seqlens)
        return Part(self, batch, sequences, tokens)

    def twice(self) -> Batch:
        """Return a batch that has the first tokens of the first packed sequence twice."""
        assert self.cu_seqlens is not None
        n = min(int(self.cu_seqlens[1]), _FEW)
        tokens = torch.arange(n, device=self.ids.device).repeat(2)
        cu_seqlens = torch.tensor([0, n, 2 * n], device=tokens.device)
        return Batch(self._arguments_of(tokens, cu_seqlens), None, cu_seqlens)

    def _arguments_of(self, index: Tensor, cu_seqlens: Tensor | None) -> dict[str, Any]:
        """Return the arguments of some sequences, or of some tokens if they are packed."""
        units, arguments = self._units(), dict(self.arguments)
        for name, x in self.arguments.items():
            place = self._place(name, x) if isinstance(x, Tensor) else None
            if place is not None and name in BORDERS and cu_seqlens is not None:
                arguments[name] = cu_seqlens.to(x.dtype)
            elif place is not None:
                arguments[name] = units.take(x, place, index)
        return arguments

    def stand_in(self) -> Batch:
        """Return two tokens for a loss with a gradient of 0 in every parameter.

        A rank without a live sequence thus takes part in its model's collectives, and the optimizer
        receives the zeros that it would have received.
        """
        cut = "input_ids", "token_type_ids", "mm_token_type_ids"
        few = {name: x for name, x in self.arguments.items() if not isinstance(x, Tensor)}
        few |= {name: self.arguments[name][:1, :2] for name in cut if name in self.arguments}
        return Batch(few, 1, None)

    def sequences_with(self, tokens: Tensor) -> Tensor:
        """Return (B,) bool: whether any token of the response is True."""
        if self.width is not None:
            return tokens.any(1)
        sequence = self._units().sequence
        assert sequence is not None
        found = sequence.new_zeros(self.number).scatter_reduce(0, sequence, tokens.long(), "amax")
        return found != 0

    def by_token(self, x: Tensor) -> Tensor:
        """Make values per sequence or per token broadcast over tokens."""
        if self.width is not None:
            return x[:, None] if x.ndim == 1 else x
        sequence = self._units().sequence
        assert sequence is not None
        return x.reshape(-1) if self._is_per_token(x) else x[sequence]


class Part(NamedTuple):
    """Some sequences of a batch, or, if there are none, a substitute.

    Attributes:
        whole, batch: all sequences, and the sequences for which the model runs.
        sequences: (b,) indices of the latter.
        tokens: (s,) indices of their tokens if they are packed; otherwise `sequences`.
    """

    whole: Batch
    batch: Batch
    sequences: Tensor
    tokens: Tensor

    @property
    def is_stand_in(self) -> bool:
        return not len(self.sequences)

    def take(self, x: Tensor) -> Tensor:
        """Take the part's values of a tensor with one per token or sequence."""
        if self.whole.width is None and self.whole._is_per_token(x):
            return x[..., self.tokens]
        return x[self.sequences]

    def by_token(self, x: Tensor) -> Tensor:
        """Spread values per token of the part over the tokens of the whole, NaN elsewhere."""
        width = self.whole.width
        tokens = self.whole.ids if width is None else self.whole.ids[:, -width:]
        whole = x.new_full(tokens.shape[width is None :], torch.nan)
        if self.is_stand_in:
            return whole + 0.0 * x.sum()  # so that the gradient reaches the model
        return whole.index_copy(0, self.tokens, x)

    def by_sequence(self, x: Tensor) -> Tensor:
        """Spread values per sequence of the part over those of the whole, NaN elsewhere."""
        whole = x.new_full((self.whole.number,), torch.nan)
        return whole.index_copy(0, self.sequences, x[: len(self.sequences)])


def fractions_of_all(
    stats: Mapping[str, Tensor], sequences: Sequence[Tensor], tokens: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Convert fractions among the statistics of some sequences to those of all sequences.

    A sequence that is left out is not clipped and has no gradient.

    Args:
        stats: statistics of a loss.
        sequences, tokens: their numbers in these sequences, and in all.
    """
    found = dict(stats)
    for counts, names in ((sequences, _OF_SEQUENCES), (tokens, _OF_TOKENS)):
        some, every = counts
        for name in stats.keys() & set(names):
            found[name] = stats[name] * (some / every.clamp(min=1))
    return found


@torch.no_grad()
def require_separate(model: Any, batch: Batch) -> None:
    """Refuse a model whose packed sequences see each other; checked on a few tokens.

    It is checked once for each set of arguments and attention implementation.

    Raises:
        ValueError: hidden states of a sequence change when another sequence precedes it.
    """
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    key = attention, *sorted(name for name, x in batch.arguments.items() if x is not None)
    if batch.cu_seqlens is None or key in _separate.get(inner, ()) or batch.obstacle():
        return
    both = batch.twice()
    alone = both.some(torch.tensor([False, True], device=batch.ids.device)).batch

    def last(of: Batch) -> Tensor:
        return hidden_to(model, of.arguments, lambda _, x, __: x[0, -alone.ids.shape[1] :].double())

    training = [part for part in inner.modules() if part.training]
    for part in training:
        part.training = False  # dropout would differ
    try:
        together, expected = last(both), last(alone)
    finally:
        for part in training:
            part.training = True
    if not (together - expected).norm() <= 0.05 * expected.norm():
        raise ValueError(
            f"{type(inner).__name__} lets packed sequences see each other, given "
            f"{', '.join(sorted(batch.arguments))}: pad them"
        )
    _separate.setdefault(inner, set()).add(key)
