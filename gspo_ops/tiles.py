"""Tiles of logits: the interface between the two passes in `passes.py` and an implementation.

The implementations are in `tiles_torch.py`, `tiles_gpu.py` and `tiles_tma.py`. Their common
derivation is in `kernels/hidden.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .backend import compute_dtype, matmul_fp32
from .head import Head, HeadOptions, grad_product_dtype, product_dtype
from .parallel import gathered
from .rows import Rows
from .softmax import LogOdds

LN_2 = math.log(2.0)


class Blocks(NamedTuple):
    """Sizes of tiles; the number of columns summed at a time never depends on the rows."""

    rows: int  # largest number of rows of a tile of logits
    columns: int  # smallest number of its columns, a multiple of `sums`
    elements: int  # size to which tiles with fewer rows are widened
    sums: int  # columns of an entry of `Sums`
    grad_elements: int  # size of a tile for the products of the backward
    grad_columns: int  # largest number of its columns
    align: int  # alignment of its rows in memory, in elements

    def entries(self, vocabulary: int) -> int:
        """Return the number of entries of `Sums`."""
        return -(-vocabulary // self.sums)

    def width(self, rows: int) -> int:
        """Return the number of columns of a tile of logits for this number of rows."""
        fit = self.elements // max(min(rows, self.rows), 1) // self.columns
        return max(fit, 1) * self.columns

    def grad_width(self, rows: int) -> int:
        """Return the number of columns of a tile for the products of the backward."""
        width = min(self.grad_elements // max(rows, 1), self.grad_columns)
        return max(width // 128 * 128, 128)


class Operands(NamedTuple):
    """The operands of the logits, for the rows that are processed."""

    x: Tensor  # (n, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_x: Tensor | None  # (n, r) scale * x @ a^T
    lora_a: Tensor | None  # (r, H)
    lora_b: Tensor | None  # (V, r)
    targets: Tensor  # (n,)
    rows: Rows
    options: HeadOptions
    dtype: torch.dtype  # for products that make logits
    stats_dtype: torch.dtype  # for all per-row values
    grad_dtype: torch.dtype  # for exponentials and products that make gradients

    @classmethod
    def of(cls, head: Head, targets: Tensor, rows: Rows, options: HeadOptions) -> Operands:
        hidden, weight, bias, lora_a, lora_b = head
        x = rows.take(hidden.reshape(-1, hidden.shape[-1]))
        dtype = product_dtype(hidden, weight)
        lora_x = None
        if lora_a is not None:
            common = torch.promote_types(hidden.dtype, lora_a.dtype)
            lora_x = matmul_fp32(x.to(common), lora_a.mT.to(common)) * options.lora_scale
            lora_x = lora_x.to(compute_dtype(dtype))
        return cls(
            x=x,
            weight=weight,
            bias=bias,
            lora_x=lora_x,
            lora_a=lora_a,
            lora_b=lora_b,
            targets=rows.take(targets),
            rows=rows,
            options=options,
            dtype=dtype,
            stats_dtype=compute_dtype(dtype),
            grad_dtype=grad_product_dtype(hidden, weight),
        )

    @property
    def n(self) -> int:
        return len(self.targets)

    @property
    def V(self) -> int:
        return self.weight.shape[0]


class RowSums(NamedTuple):
    """The numbers that the forward keeps of each row, (N,) each; 0 in rows that are left out."""

    base: Tensor  # the target's logit from a dot product, or 0 if that is not finite
    target_logit: Tensor  # rounded like the others; after the soft cap, before the temperature
    shift: Tensor  # exponent of two
    row_sum: Tensor  # sum of the others' exp2((z - base) * scale - shift)
    entropy: Tensor  # (0,) unless requested

    def log_odds(self, scale: float) -> LogOdds:
        """Return the log-odds against the target."""
        moved = (self.base - self.target_logit) * scale + self.shift
        return LogOdds(moved * LN_2 + self.row_sum.log())


class Sums(NamedTuple):
    """Sums of each row's exponentials in each tile of the vocabulary, (J, n) each."""

    shift: Tensor
    total: Tensor
    log: Tensor | None  # sum of e * log2(e), for the entropy

    @classmethod
    def empty(cls, entries: int, base: Tensor, wants_log: bool) -> Sums:
        shift = base.new_zeros(entries, len(base))
        log = torch.zeros_like(shift) if wants_log else None
        return cls(shift, torch.zeros_like(shift), log)

    def at(self, entry: int, rows: slice) -> Sums:
        """Return the sums of some rows in one tile, (n,) each, as views."""
        log = None if self.log is None else self.log[entry, rows]
        return Sums(self.shift[entry, rows], self.total[entry, rows], log)

    def reduced(self) -> Sums:
        """Add up each row's tiles, to (n,) each."""
        shift = self.shift.amax(0)
        shrink = self.shrink(shift)
        log = None
        if self.log is not None:
            log = _pairwise_sum(shrink * (self.log + self.total * (self.shift - shift)))
        return Sums(shift, _pairwise_sum(shrink * self.total), log)

    def shrink(self, shift: Tensor) -> Tensor:
        """Return the factor by which each tile's exponentials shrink under this shift."""
        return torch.exp2(self.shift - shift)

    def over_vocabulary(self, target_logit: Tensor, group: str) -> tuple[Sums, Tensor]:
        """Return the sums of every rank's part of the vocabulary, and the target's logit.

        One part has the target's logit, and the others have 0.
        """
        own = torch.stack([target_logit, *[x for x in self.reduced() if x is not None]])
        target_logits, *parts = gathered(own, group).transpose(0, 1).contiguous().unbind(0)
        whole = Sums(parts[0], parts[1], None if self.log is None else parts[2])
        return whole, target_logits.sum(0)


class Weighting(NamedTuple):
    """The map from logits z of a recomputed tile to exp2(a) * (constant + slope * a), (n,) each.

        a = (softcap(z) - base) * scale - shift

    Attributes:
        constant, slope: None for 1 and 0.
    """

    base: Tensor
    shift: Tensor
    constant: Tensor | None
    slope: Tensor | None

    def map(self, f: Callable[[Tensor], Tensor]) -> Weighting:
        constant = None if self.constant is None else f(self.constant)
        slope = None if self.slope is None else f(self.slope)
        return Weighting(f(self.base), f(self.shift), constant, slope)


class RowGrads(NamedTuple):
    """d loss / d logits of each row.

    Attributes:
        factor: (n,) factor of the value of `Weighting`, for all tokens except the target.
        at_target: (n,) number at the target, by far the largest of its row and so never rounded.
    """

    factor: Tensor
    at_target: Tensor
    weighting: Weighting

    def take(self, rows: Rows) -> RowGrads:
        return RowGrads(
            rows.take(self.factor), rows.take(self.at_target), self.weighting.map(rows.take)
        )


class Kept(NamedTuple):
    """Exponentials kept from forward to backward, one row for each processed row.

    Attributes:
        e: (N, `columns` or more), 0 at the targets. The caller owns it; the forward fills it.
        columns: number of tokens of the vocabulary that they cover.
    """

    e: Tensor
    columns: int

    def stride(self) -> int:
        """Return the stride of rows; 0 without columns: Triton makes a stride of 1 a constant."""
        return self.e.stride(0) if self.columns else 0


class Tile(NamedTuple):
    """Columns of values that, times their row's factor, are d loss / d logits.

    Attributes:
        e: (n, columns), or more rows.
        rows: (n,) rows of `e` that are used, live ones first; None for the first n.
    """

    e: Tensor
    rows: Tensor | None


class Product(NamedTuple):
    """A gradient that is a sum over tiles.

    For a gradient of rows, `out` (n, ...) receives the tiles times `factor` (V, ...). For one of
    columns, `out` (V, ...) receives the transposed tiles times `factor` (n, ...).
    """

    out: Tensor
    factor: Tensor
    dtype: torch.dtype  # of the product
    add: bool


class Tiles(Protocol):
    """An implementation, for the operands of some rows. The caller owns all buffers."""

    blocks: ClassVar[Blocks]
    of: Operands

    def target_logits(self) -> Tensor:
        """Return the targets' logits (n,) after the soft cap, where this rank holds the target."""

    def fold(
        self, base: Tensor, kept: Kept, keep: Tensor | None, sums: Sums, target_logit: Tensor
    ) -> None:
        """Write sums of each row's exponentials, except for its target's, to `sums`.

        `kept` receives the exponentials of rows where `keep` is True, or of all rows if it is None.
        `target_logit` (n,) receives the target's logit if a tile's product rounds it differently.
        """

    def finish(self, sums: Sums, base: Tensor, target_logit: Tensor) -> tuple[Tensor, RowSums]:
        """Return the log-probs (n,) and the sums of complete rows."""

    def rescale(self, kept: Kept, sums: Sums, shift: Tensor) -> None:
        """Rescale the tiles of each row of `kept` to a common shift (n,)."""

    def row_grads(self, sums: RowSums, g: Tensor, h: Tensor | None, live: Tensor) -> RowGrads:
        """Return `RowGrads` of these rows, for d loss / d log_prob = g and d loss / d entropy = h.

        g, h and `live` (N,) are those of all rows. Where `live` is False, there is no gradient.
        """

    def kept_tile(self, e: Tensor, among: Rows) -> Tile:
        """Return columns of kept exponentials, for the live rows `among` those that are kept."""

    def weigh(self, columns: slice, weighting: Weighting, out: Tensor) -> None:
        """Recompute logits, and write their values under `weighting` to `out`."""

    def takes_whole(
        self, among: Rows, of_rows: Sequence[Product], of_columns: Sequence[Product]
    ) -> bool:
        """Return whether products need no large copies, so that one takes all kept columns."""

    def add_to_rows(self, out: Tensor, tile: Tile, w: Tensor, *, add: bool) -> None:
        """Set out (n, ...) to tile @ w, or add it to `out`."""

    def add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool) -> None:
        """Set out to tile^T @ x, or add it to `out`."""

    def scale_rows(self, out: Tensor, w: Tensor, row_grads: RowGrads) -> None:
        """Set out[i] (n, ...) to factor[i] * out[i] + at_target[i] * w[y_i], 0 in dead rows."""

    def add_targets(self, out: Tensor, x: Tensor, at_target: Tensor) -> None:
        """Add to out[v] the sum of at_target[i] * x[i] over rows i with target v, in order."""


def slices(stop: int, step: int) -> list[slice]:
    return slices_of(slice(0, stop), step)


def slices_of(whole: slice, step: int) -> list[slice]:
    return [slice(i, min(i + step, whole.stop)) for i in range(whole.start, whole.stop, step)]


def places(columns: slice, rows: int, blocks: Blocks) -> list[tuple[slice, slice]]:
    """Return rows and columns of the tiles of logits."""
    width = blocks.width(rows)
    return [(r, c) for c in slices_of(columns, width) for r in slices(rows, blocks.rows)]


def add_rest(z: Tensor, of: Operands, r: slice, c: slice) -> Tensor:
    """Add the low-rank part and the bias to a product z, in place."""
    if of.lora_x is not None and of.lora_b is not None:
        matmul_fp32(of.lora_x[r], of.lora_b[c].to(of.stats_dtype).mT, out=z, add=True)
    return z if of.bias is None else z.add_(of.bias[c])


def finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < math.inf, x, 0.0)


def _pairwise_sum(x: Tensor) -> Tensor:
    """Return x.sum(0), in one order for every element, whatever the number of columns."""
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat([x[:half] + x[half : 2 * half], x[2 * half :]])
    return x[0]
