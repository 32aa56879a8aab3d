"""Logits one tile at a time: their exponentials, their sums, and the products of the backward.

Three ways to the same numbers: `TorchTiles` (CPU, and float64), `MatMulTiles` (torch.mm with Triton
epilogues) and `TritonTiles` (Triton products). The derivation stands in
`kernels/linear_log_probs.py`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import compute_dtype, device_guard, matmul_fp32, no_autocast, rounds_fp32
from .head import Wanted, grad_product_dtype, product_dtype
from .layout import checked_targets
from .log_probs import entropy_of, loadable, minus_softplus, sigmoid, times_exp
from .parallel import NOWHERE, gathered, summed
from .threads import for_each

SHIFT_LIMIT = 64.0  # exponents beyond it, in powers of two, are shifted; as in the kernels
LN_2 = math.log(2.0)


class Head(NamedTuple):
    """The operands of logits = hidden @ weight^T + bias + lora_x @ lora_b^T."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_x: Tensor | None  # (N, r) scale * hidden @ a^T
    lora_b: Tensor | None  # (V, r)


class HeadGrads(NamedTuple):
    """Where the gradients of the operands go; None where one is not wanted."""

    hidden: Tensor | None  # (..., H)
    weight: Tensor | None
    bias: Tensor | None
    lora_x: Tensor | None
    lora_b: Tensor | None


class Options(NamedTuple):
    temperature: float
    softcap: float | None
    return_entropy: bool
    products: str  # torch, mm or triton
    allow_sync: bool
    vocab_group: str | None  # with it, targets are local ones

    @property
    def scale(self) -> float:
        """Of exponents, which are powers of two."""
        return math.log2(math.e) / self.temperature


class RowStats(NamedTuple):
    """What the forward keeps of each row, all (N,); 0 in rows that are left out."""

    target_logit: Tensor  # after the soft cap, before the temperature
    shift: Tensor  # powers of two
    row_sum: Tensor  # of the others' exp2((z - target_logit) * scale - shift)
    entropy: Tensor  # (0,) unless asked for

    def base(self) -> Tensor:
        return _finite_or_zero(self.target_logit)

    def log_odds(self, scale: float) -> Tensor:
        """Against the target."""
        moved = (self.base() - self.target_logit) * scale + self.shift
        return moved * LN_2 + self.row_sum.log()


@dataclass(frozen=True)
class Rows:
    """The rows that are worked on.

    Attributes:
        index: (n,) where they stand among all; None for all, in place.
        count: 0-dim int32: only the first so many of `index` count; None for all of them.
        live: (N,) bool, which ones count, where they could not be sorted out; None for all.
    """

    index: Tensor | None
    count: Tensor | None
    live: Tensor | None

    @classmethod
    def of(cls, live: Tensor | None, options: Options) -> Rows:
        if live is None:
            return cls(None, None, None)
        if options.products == "triton":
            order = torch.argsort(live.logical_not().byte(), stable=True)
            return cls(order, live.sum(dtype=torch.int32), None)
        if options.products == "torch" or options.allow_sync:
            index = live.nonzero().squeeze(1)
            return cls(None if len(index) == len(live) else index, None, None)
        return cls(None, None, live)

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor, out: Tensor) -> None:
        """x to the places of these rows in out, 0 to the others."""
        if self.live is not None:
            x = torch.where(_like(self.live, x), x, 0.0)
        if self.count is not None:
            x = torch.where(_like(torch.arange(len(x), device=x.device) < self.count, x), x, 0.0)
        if self.index is None:
            out.copy_(x)
        else:
            out.zero_().index_copy_(0, self.index, x.to(out.dtype))


def _like(flags: Tensor, x: Tensor) -> Tensor:
    return flags.view(-1, *(1 for _ in x.shape[1:]))


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < math.inf, x, 0.0)


class Sums(NamedTuple):
    """Of the exponentials of each row in each tile of the vocabulary, all (J, n)."""

    shift: Tensor
    total: Tensor
    log: Tensor | None  # sum of e * log2(e), for the entropy

    def reduced(self) -> Sums:
        """Those of the rows, (n,) each."""
        shift = self.shift.amax(0)
        shrink = self.shrink(shift)
        log = None
        if self.log is not None:
            log = _pairwise_sum(shrink * (self.log + self.total * (self.shift - shift)))
        return Sums(shift, _pairwise_sum(shrink * self.total), log)

    def shrink(self, shift: Tensor) -> Tensor:
        """By how much each tile's exponentials shrink when they are shifted so much."""
        return torch.exp2(self.shift - shift)

    def over_vocabulary(self, group: str) -> Sums:
        """Those of whole rows, (n,) each, from those of each part of the vocabulary."""
        own = torch.stack([x for x in self if x is not None])
        parts = gathered(own, group).unbind(1)
        return Sums(parts[0], parts[1], None if self.log is None else parts[2]).reduced()


class Exponentials(NamedTuple):
    """What a recomputed tile makes of exponents a: exp2(a) * (constant + slope * a), all (n,).

    Attributes:
        constant, slope: None for 1 and 0.
    """

    shift: Tensor
    constant: Tensor | None
    slope: Tensor | None

    def map(self, f: Callable[[Tensor], Tensor]) -> Exponentials:
        constant = None if self.constant is None else f(self.constant)
        slope = None if self.slope is None else f(self.slope)
        return Exponentials(f(self.shift), constant, slope)


class RowGrads(NamedTuple):
    """d loss / d logits of each row, (n,) each.

    Attributes:
        factor: times what `Exponentials` says, for all tokens but the target.
        at_target: for the target: by far the largest of its row, so that it is never rounded.
    """

    factor: Tensor
    at_target: Tensor


class Tile(NamedTuple):
    """Columns of exponentials.

    Attributes:
        e: (n, columns), or more rows.
        rows: (n,) which rows of `e` are meant, live ones first; None for the first n.
    """

    e: Tensor
    rows: Tensor | None


class Kept(NamedTuple):
    """Exponentials kept from forward to backward, a row for each row worked on.

    Attributes:
        e: (N, `columns` or more), 0 at the targets.
        columns: how many tokens of the vocabulary they cover.
    """

    e: Tensor
    columns: int


def forward(
    head: Head,
    targets: Tensor,
    mask: Tensor | None,
    grad_mask: Tensor | None,
    options: Options,
    kept: Kept,
) -> tuple[Tensor, RowStats]:
    """log_probs (N,) and RowStats of the rows where mask is non-zero.

    `kept` receives the exponentials of those where grad_mask is non-zero, too.
    """
    targets = targets.reshape(-1)
    with no_autocast(targets.device), device_guard(head.hidden):
        rows = Rows.of(None if mask is None else mask.reshape(-1) != 0, options)
        tiles = make_tiles(head, targets, rows, options)
        keep = None if grad_mask is None else rows.take(grad_mask.reshape(-1) != 0)
        target_logit = tiles.target_logits()
        base = _finite_or_zero(target_logit)
        sums = tiles.exponentials(base, kept, keep)
        row_sums = sums.reduced()
        if options.vocab_group is not None and tiles.n:
            row_sums = row_sums.over_vocabulary(options.vocab_group)
        shift, row_sum, log = row_sums
        entropy = row_sum.new_empty(0)
        found = RowStats(target_logit, shift, row_sum, entropy)
        d = found.log_odds(options.scale)
        log_prob = minus_softplus(d)
        if log is not None:
            entropy = entropy_of(d, log_prob, row_sum, log)
        if kept.columns:
            tiles.rescale(kept, sums.shrink(shift))

        def full(x: Tensor) -> Tensor:
            if x.shape != row_sum.shape:
                return x
            out = x.new_empty(targets.shape)
            rows.put(x, out)
            return out

        return full(log_prob), RowStats(*map(full, found._replace(entropy=entropy)))


def backward(
    head: Head,
    targets: Tensor,
    mask: Tensor | None,
    stats: RowStats,
    g: Tensor,
    h: Tensor | None,
    options: Options,
    kept: Kept,
    out: HeadGrads,
    *,
    add: Wanted,
) -> None:
    """Gradients for d loss / d log_prob = g and d loss / d entropy = h, (N,) each, into `out`.

    `add` tells which of those of weight, bias and lora_b are added to what stands there.
    """
    targets = targets.reshape(-1)
    mask = None if mask is None else mask.reshape(-1) != 0
    live = g != 0 if h is None else (g != 0) | (h != 0)
    if mask is not None:
        live &= mask
    with no_autocast(targets.device), device_guard(head.hidden):
        row_grads, wanted = _row_grads(stats, g, h, options)
        row_grads = RowGrads(*(torch.where(live, x, 0.0) for x in row_grads))
        worked_on = Rows.of(mask, options)
        among = Rows.of(worked_on.take(live), options)  # places of live rows among those
        index = among.index if worked_on.index is None else among.take(worked_on.index)
        rows = Rows(index, among.count, among.live)
        tiles = make_tiles(head, targets, rows, options)
        tiles.gradients(
            RowGrads(*map(rows.take, row_grads)), rows.take(stats.base()),
            wanted.map(rows.take),
            kept, among, rows, out, add,
        )  # fmt: skip


def _row_grads(
    stats: RowStats, g: Tensor, h: Tensor | None, options: Options
) -> tuple[RowGrads, Exponentials]:
    """d loss / d logits for d loss / d log_prob = g and d loss / d entropy = h."""
    d = stats.log_odds(options.scale)
    q = sigmoid(d)
    rho = torch.where(stats.row_sum == 0, 0.0, q / stats.row_sum)
    at_target = g * q / options.temperature
    if h is None:
        factor, wanted = -g * rho / options.temperature, Exponentials(stats.shift, None, None)
    else:
        # -p_v * (g + h * (log p_v + entropy)), with log p_v = a_v * ln 2 + log q - log(row_sum)
        log_p, log_q = minus_softplus(d), minus_softplus(-d)
        log_rho = torch.where(stats.row_sum == 0, 0.0, log_q - stats.row_sum.log())
        constant = rho * (g + h * (log_rho + stats.entropy))
        factor = torch.full_like(g, -1.0 / options.temperature)
        wanted = Exponentials(stats.shift, constant, rho * h * LN_2)
        at_target -= h * times_exp(log_p, log_p + stats.entropy) / options.temperature
    if options.softcap is not None:
        at_target *= 1.0 - (stats.target_logit / options.softcap).square()
    return RowGrads(factor, at_target), wanted


def make_tiles(head: Head, targets: Tensor, rows: Rows, options: Options) -> TorchTiles:
    kind = {"torch": TorchTiles, "mm": MatMulTiles, "triton": TritonTiles}[options.products]
    return kind(head, targets, rows, options)


class TorchTiles:
    """Tiles of logits of some rows, in torch; small ones, that stay in the cache of one core."""

    ROWS = 512
    LEAST_ROWS = 16  # of products that make logits
    LEAST_GRAD_ROWS = 4  # of those that make gradients of rows
    COLUMNS = SUMS = 1024  # of a tile, and of an entry of `Sums`
    GRAD_ELEMENTS = 1 << 22  # of a tile for the products of the backward
    GRAD_WIDTH = 8192
    HAS_WIDE_PRODUCTS = True  # over all kept columns at once: each one waits for a slower core
    VECTORS = 64  # a number of elements that fills those of every processor

    def __init__(self, head: Head, targets: Tensor, rows: Rows, options: Options) -> None:
        self.weight, self.bias = head.weight, head.bias
        self.V, self.H = head.weight.shape
        self.options = options
        self.dtype = product_dtype(head.hidden, head.weight)
        self.stats_dtype = compute_dtype(self.dtype)
        self.grad_dtype = grad_product_dtype(head.hidden, head.weight)
        self.x = rows.take(head.hidden.reshape(-1, self.H))  # (n, H)
        self.lora = None  # (n, r) and (V, r)
        if head.lora_x is not None and head.lora_b is not None:
            self.lora = rows.take(head.lora_x), head.lora_b
        self.targets = self._targets(rows.take(targets), rows.index)  # (n,)
        self.live = rows.live
        self.count = rows.count
        self.local = threading.local()  # a buffer for each thread

    @property
    def n(self) -> int:
        return len(self.targets)

    def _targets(self, targets: Tensor, places: Tensor | None) -> Tensor:
        if self.options.vocab_group is not None:
            return targets  # checked by all ranks together
        return checked_targets(targets, self.V, places)

    # Forward

    def target_logits(self) -> Tensor:
        """(n,) after the soft cap; exchanged where the vocabulary is shared."""
        z = self._target_logits()
        if self.options.vocab_group is None or not self.n:
            return z
        # one part has the target's logit, the others add 0
        z = torch.where(self.targets >= 0, z, 0.0)
        return summed(z.masked_fill_(self.targets == NOWHERE, math.nan), self.options.vocab_group)

    def _target_logits(self) -> Tensor:
        """The same where the target is among this rank's columns."""
        out = self.x.new_empty(self.n, dtype=self.stats_dtype)
        y = self.targets.clamp(min=0)

        def dot(r: slice) -> None:
            w = self.weight.index_select(0, y[r]).to(self.dtype)
            out[r] = _row_sum(self.x[r].to(self.dtype) * w)

        for_each(dot, slices(self.n, self.ROWS), self.x)
        if self.bias is not None:
            out += self.bias[y]
        if self.lora is not None:
            out += (self.lora[0] * self.lora[1][y]).sum(1)
        softcap = self.options.softcap
        return out if softcap is None else softcap * torch.tanh(out / softcap)

    def exponentials(self, base: Tensor, kept: Kept, keep: Tensor | None) -> Sums:
        """Sums over each row's exponentials but for its target's; `kept` receives them."""
        sums = self._empty_sums(base)

        def fold(place: tuple[slice, slice]) -> None:
            r, c = place
            e = kept.e[r, c.start : min(c.stop, kept.columns)]
            self._fold(
                self._logits(r, c), r, c, base[r],
                e if c.start < kept.columns else None, None if keep is None else keep[r],
                *(None if x is None else x[c.start // self.COLUMNS, r] for x in sums),
            )  # fmt: skip

        for_each(fold, self._places(slice(0, self.V)), self.x)
        return sums

    def _places(self, columns: slice) -> list[tuple[slice, slice]]:
        """Rows and columns of the tiles of logits."""
        columns_of_tiles = _slices_of(columns, self.COLUMNS)
        return [(r, c) for c in columns_of_tiles for r in slices(self.n, self.ROWS)]

    def _empty_sums(self, base: Tensor) -> Sums:
        shift = base.new_zeros(-(-self.V // self.SUMS), self.n)
        log = torch.zeros_like(shift) if self.options.return_entropy else None
        return Sums(shift, torch.zeros_like(shift), log)

    def _logits(self, r: slice, c: slice) -> Tensor:
        z = self._product(self.x[r].to(self.dtype), self.weight[c].to(self.dtype).mT)
        if self.lora is not None:
            x, b = self.lora[0][r], self.lora[1][c].to(self.stats_dtype)
            matmul_fp32(x, b.mT, out=z, add=True)
        return z if self.bias is None else z.add_(self.bias[c])

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        """In a buffer, which the next one overwrites.

        The libraries behind torch.mm multiply a few rows in an order of their own. Padded, a row's
        logits are the same in most batches; that they are in all, no library promises.
        """
        n = len(x)
        x = _with_rows(x, self.LEAST_ROWS)
        size = len(x) * w.shape[1]
        buffer = getattr(self.local, "buffer", None)
        if buffer is None or buffer.numel() < size + self.VECTORS:
            self.local.buffer = buffer = x.new_empty(size + self.VECTORS)
        return matmul_fp32(x, w, out=buffer[:size].view(len(x), -1))[:n]

    def _hits(self, r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns of the targets that lie in a tile, counted from its first ones."""
        y = self.targets[r]
        rows = ((y >= c.start) & (y < c.stop)).nonzero().squeeze(1)
        return rows, y[rows] - c.start

    def _fold(self, z, r, c, base, e, keep, shift, total, log) -> None:
        """Exponentials of a tile z of logits, which is overwritten; sums, and what is kept."""
        hit = self._hits(r, c)
        derivative = self._exponents(z, base, None, want_derivative=e is not None)
        z[hit] = -math.inf
        top = z.amax(1)
        shift.copy_(torch.where(top > SHIFT_LIMIT, top, 0.0))
        if shift.any():
            z -= shift[:, None]
        a = None if log is None else z.clone()
        self._exp2(z)
        total.copy_(_row_sum(z))
        if a is not None:
            log.copy_(_row_sum(a.mul_(z).masked_fill_(z == 0, 0.0)))
        if e is not None:
            if derivative is not None:
                z *= derivative
            z = z[:, : e.shape[1]]
            if keep is None or keep.all():
                e.copy_(z)
            else:
                e[keep] = z[keep].to(e.dtype)

    def _exponents(self, z, base, shift, *, want_derivative: bool) -> Tensor | None:
        """z becomes (softcap(z) - base) * scale - shift; returns softcap's derivative."""
        derivative = None
        softcap = self.options.softcap
        if softcap is not None:
            z.div_(softcap).tanh_()
            derivative = 1.0 - z.square() if want_derivative else None
            z.mul_(softcap)
        z.sub_(base[:, None]).mul_(self.options.scale)
        if shift is not None and shift.any():
            z.sub_(shift[:, None])
        return derivative

    def _exp2(self, z: Tensor) -> None:
        """In place, for a tile of this thread's buffer.

        torch rounds the last elements, which fill no vector, in another way: none of a tile's are
        among them.
        """
        size = -(-z.numel() // self.VECTORS) * self.VECTORS
        z.as_strided((size,), (1,)).exp2_()

    def rescale(self, kept: Kept, shrink: Tensor) -> None:
        """Bring the tiles of each row to its one shift."""
        for j, row in (shrink < 1).nonzero().tolist():
            c = slice(j * self.SUMS, min((j + 1) * self.SUMS, kept.columns))
            kept.e[row, c] *= shrink[j, row]

    # Backward

    def gradients(
        self,
        row_grads: RowGrads,
        base: Tensor,
        wanted: Exponentials,
        kept: Kept,
        among: Rows,
        rows: Rows,
        out: HeadGrads,
        add: Wanted,
    ) -> None:
        """The two products, one range of columns after the other, then the targets' share."""
        factor, at_target = row_grads
        lora_x, lora_b = self.lora or (None, None)
        # gradients of rows, their sums, and what tiles are multiplied with for them; the low-rank
        # part is small enough for fp32
        to_rows = [
            (to, self.x.new_zeros(self.n, w.shape[1], dtype=self.stats_dtype), w, dtype)
            for to, w, dtype in (
                (out.hidden, self.weight, self.grad_dtype),
                (out.lora_x, lora_b, self.stats_dtype),
            )
            if to is not None and w is not None
        ]
        # gradients of columns, what the tiles are multiplied with for them, and whether to add
        ones = torch.ones_like(factor)[:, None]
        to_columns = [
            (to, x, dtype, adds)
            for to, x, dtype, adds in (
                (out.weight, self.x, self.grad_dtype, add.weight),
                (out.bias, ones, self.stats_dtype, add.bias),
                (out.lora_b, lora_x, self.stats_dtype, add.lora_b),
            )
            if to is not None and x is not None
        ]
        scaled = [self._scaled(x, factor, dtype) for _, x, dtype, _ in to_columns]
        if self.n == 0:
            for to, *_, adds in to_columns:
                if not adds:
                    to.zero_()
        dtypes = {x for _, _, w, dtype in to_rows for x in (w.dtype, dtype)}
        dtypes |= {x for to, _, dtype, _ in to_columns for x in (to.dtype, dtype)}
        # whether the products take and write what there is, without a copy
        is_direct = among.index is None and dtypes <= {self.grad_dtype}
        for c in self._grad_columns(kept.columns, is_direct) if self.n else []:
            tile = self._tile(c, base, wanted, kept, among)
            for _, total, w, dtype in to_rows:
                self._add_to_rows(total, tile, w[c].to(dtype))
            for (to, *_, adds), x in zip(to_columns, scaled, strict=True):
                self._add_to_columns(to[c].view(len(to[c]), -1), tile, x, adds)
            del tile  # before the next one is made
        del scaled
        for to, x, *_ in to_columns if self.n else []:
            self._add_targets_to_columns(to.view(len(to), -1), x, at_target)
        for to, total, w, _ in to_rows:
            self._add_targets_to_rows(total.mul_(factor[:, None]), w, at_target)
            if self.options.vocab_group is not None:
                summed(total, self.options.vocab_group)  # in fp32, then rounded once
            if self.live is not None:
                total.masked_fill_((factor == 0)[:, None], 0.0)
            rows.put(total, to.view(-1, total.shape[1]))

    def _add_targets_to_rows(self, out: Tensor, w: Tensor, at_target: Tensor) -> None:
        """out[i] += at_target[i] * w[y_i], where the target is among this rank's columns."""
        y = self.targets
        known = (y >= 0) & (y < self.V)
        at_target, y = torch.where(known, at_target, 0.0), torch.where(known, y, 0)
        for r in slices(self.n, self.ROWS):
            out[r] += w.index_select(0, y[r]) * at_target[r, None]

    def _add_targets_to_columns(self, out: Tensor, x: Tensor, at_target: Tensor) -> None:
        """out[v] += sum of at_target[i] * x[i] over the rows i with target v, in their order."""
        y, order = self.targets.sort(stable=True)
        order = order[y >= 0]  # the others' columns are another rank's
        if len(order) == 0:
            return
        y, counts = y[y >= 0].unique_consecutive(return_counts=True)
        for c in slices(x.shape[1], max(self.GRAD_ELEMENTS // 4 // self.n, 1)):
            shares = x[:, c].index_select(0, order) * at_target[order, None]
            sums = torch.segment_reduce(shares, "sum", lengths=counts)
            out[y, c] = sums.add_(out[y, c]).to(out.dtype)

    def _scaled(self, x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(x, dtype=dtype)
        for r in slices(self.n, self.ROWS):
            out[r] = x[r] * factor[r, None]
        if self.live is not None:
            # a dead row may hold NaN
            out.masked_fill_((factor == 0)[:, None], 0.0)
        return out

    def _grad_columns(self, kept_columns: int, is_direct: bool) -> list[slice]:
        """Ranges of columns, each on one side of the last kept one."""
        width = kept_width = self.grad_width(self.n)
        if is_direct and self.HAS_WIDE_PRODUCTS and not rounds_fp32(self.x.device):
            kept_width = max(kept_columns, 1)
        kept, others = slice(0, kept_columns), slice(kept_columns, self.V)
        return [*_slices_of(kept, kept_width), *_slices_of(others, width)]

    @classmethod
    def grad_width(cls, rows: int) -> int:
        """Columns of a tile for the products of the backward."""
        width = min(cls.GRAD_ELEMENTS // max(rows, 1), cls.GRAD_WIDTH)
        return max(width // 128 * 128, 128)

    def _tile(self, c: slice, base: Tensor, wanted: Exponentials, kept: Kept, among: Rows) -> Tile:
        """What the factor of its row turns into d loss / d logits."""
        if c.stop <= kept.columns:
            return self._kept_tile(kept.e[:, c], among)
        out = self.x.new_empty(self.n, c.stop - c.start, dtype=self.grad_dtype)

        self._recompute(c, base, wanted, out)
        return Tile(out, None)

    def _kept_tile(self, e: Tensor, among: Rows) -> Tile:
        return Tile(e[: self.n] if among.index is None else e.index_select(0, among.index), None)

    def _recompute(self, c: slice, base: Tensor, wanted: Exponentials, out: Tensor) -> None:
        def recompute(place: tuple[slice, slice]) -> None:
            r, part = place
            self._weigh(
                self._logits(r, part), r, part, base[r], wanted.map(itemgetter(r)),
                out[r, part.start - c.start : part.stop - c.start],
            )  # fmt: skip

        for_each(recompute, self._places(c), self.x)

    def _weigh(self, z, r, c, base, wanted: Exponentials, out: Tensor) -> None:
        """A tile z of logits, which is overwritten, to what `Exponentials` says."""
        hit = self._hits(r, c)
        derivative = self._exponents(z, base, wanted.shift, want_derivative=True)
        weight = None
        if wanted.slope is not None and wanted.constant is not None:
            weight = z * wanted.slope[:, None] + wanted.constant[:, None]
        self._exp2(z)
        if weight is not None:
            z.mul_(weight.masked_fill_(z == 0, 0.0))
        z[hit] = 0.0
        out.copy_(z if derivative is None else z.mul_(derivative))

    def _add_to_rows(self, out: Tensor, tile: Tile, w: Tensor) -> None:
        # fewer rows are summed one column after the other, with errors 10 times as large
        least = self.LEAST_GRAD_ROWS if w.shape[1] > 1 else 0
        e = _with_rows(tile.e.to(w.dtype), least)
        if out.dtype == w.dtype and len(e) == len(out):
            matmul_fp32(e, w, out=out, add=True)
        else:
            out.add_(self._grad_product(e, w)[: len(out)])

    def _add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, add: bool) -> None:
        matmul_fp32(tile.e.mT.to(x.dtype), x, out=out, add=add)

    def _grad_product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b) if a.dtype == torch.bfloat16 else matmul_fp32(a, b)


def _with_rows(x: Tensor, least: int) -> Tensor:
    """x, padded to so many rows if it has fewer."""
    return torch.nn.functional.pad(x, (0, 0, 0, least - len(x))) if len(x) < least else x


def _pairwise_sum(x: Tensor) -> Tensor:
    """x.sum(0), element by element in one order, whatever the number of columns."""
    while len(x) > 1:
        half = len(x) // 2
        x = torch.cat([x[:half] + x[half : 2 * half], x[2 * half :]])
    return x[0]


def _row_sum(x: Tensor) -> Tensor:
    """x.sum(1), where a row's sum does not depend on how many stand beside it.

    A single row is summed in another order than several.
    """
    return x.sum(1) if len(x) > 1 else x.repeat(2, 1).sum(1)[: len(x)]


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def slices(stop: int, step: int) -> list[slice]:
    return _slices_of(slice(0, stop), step)


def _slices_of(whole: slice, step: int) -> list[slice]:
    return [slice(i, min(i + step, whole.stop)) for i in range(whole.start, whole.stop, step)]


class MatMulTiles(TorchTiles):
    """torch.mm with fp32 results, and Triton epilogues."""

    ROWS = 4096
    LEAST_GRAD_ROWS = 0
    COLUMNS = SUMS = 8192
    GRAD_ELEMENTS = 1 << 26
    HAS_WIDE_PRODUCTS = False

    def __init__(self, head: Head, targets: Tensor, rows: Rows, options: Options) -> None:
        super().__init__(head, targets, rows, options)
        self.x, self.weight = _with_contiguous_rows(self.x), _with_contiguous_rows(self.weight)

    def _targets(self, targets: Tensor, places: Tensor | None) -> Tensor:
        return targets.contiguous()  # one outside [0, V) gives NaN: to refuse it, one has to look

    def _target_logits(self) -> Tensor:
        from .kernels.linear_log_probs import target_logits_kernel

        out = self.x.new_empty(self.n, dtype=self.stats_dtype)
        lora = None
        if self.lora is not None:
            x, b = self.lora
            lora = (x * b.index_select(0, self.targets.clamp(0, self.V - 1))).sum(1)
        if self.n:
            target_logits_kernel[(self.n,)](
                self.x, self.weight, self.bias, lora, self.targets,
                self._flags_of(slice(None)), out,
                self.H, self.V, self.x.stride(0), self.weight.stride(0), self.options.softcap,
                BLOCK_H=1024,
            )  # fmt: skip
        return out

    def _product(self, x: Tensor, w: Tensor) -> Tensor:
        return matmul_fp32(x, w)

    def _grad_product(self, a: Tensor, b: Tensor) -> Tensor:
        return matmul_fp32(a, b)

    def _fold(self, z, r, c, base, e, keep, shift, total, log) -> None:
        from .kernels.linear_log_probs import fold_kernel

        fold_kernel[(len(z),)](
            z, self.targets[r] - c.start, base, self._flags_of(r), e, shift, total, log,
            z.shape[1], 0 if e is None else e.shape[1], 0 if e is None else e.stride(0),
            self.options.scale, self.options.softcap, BLOCK=EPILOGUE,
        )  # fmt: skip

    def _flags_of(self, r: slice) -> Tensor | None:
        return None if self.live is None else loadable(self.live[r])

    def _weigh(self, z, r, c, base, wanted: Exponentials, out: Tensor) -> None:
        from .kernels.linear_log_probs import weigh_kernel

        C = z.shape[1]
        weigh_kernel[(len(z) * -(-C // EPILOGUE),)](
            z, self.targets[r] - c.start, base, *wanted, self._flags_of(r), out,
            C, out.stride(0), self.options.scale, self.options.softcap, BLOCK=EPILOGUE,
        )  # fmt: skip

    def _add_targets_to_columns(self, out: Tensor, x: Tensor, at_target: Tensor) -> None:
        from .kernels.linear_log_probs import add_targets_kernel

        y, order = self.targets.sort(stable=True)
        ends = torch.searchsorted(y, y, right=True)
        width = x.shape[1]
        block = min(1 << (width - 1).bit_length(), EPILOGUE // 2)
        add_targets_kernel[(self.n * -(-width // block),)](
            x, at_target, y, order, ends, out,
            width, len(out), x.stride(0), out.stride(0),
            ROWS=8, COLS=block,
        )  # fmt: skip

    def rescale(self, kept: Kept, shrink: Tensor) -> None:
        from .kernels.linear_log_probs import rescale_kernel

        if self.n:
            rescale_kernel[(self.n,)](
                kept.e, shrink.contiguous(), self.n, kept.columns, kept.e.stride(0),
                TILE=self.SUMS, BLOCK=min(self.SUMS, EPILOGUE),
            )  # fmt: skip


class TritonTiles(MatMulTiles):
    """Products in Triton, which know on the device which rows are live."""

    SUMS = 128  # columns of a program

    def __init__(self, head: Head, targets: Tensor, rows: Rows, options: Options) -> None:
        super().__init__(head, targets, rows, options)
        self.x, self.weight = self.x.to(self.dtype), self.weight.to(self.dtype)
        if self.count is None:
            self.count = torch.full((), self.n, dtype=torch.int32, device=self.x.device)

    def exponentials(self, base: Tensor, kept: Kept, keep: Tensor | None) -> Sums:
        from .kernels.linear_log_probs import linear_log_probs_fwd_kernel

        sums = self._empty_sums(base)
        if self.n:
            linear_log_probs_fwd_kernel[programs(self.n, self.V, self.dtype)](
                self.x, self.weight, self.bias, self.targets, base,
                None if keep is None else loadable(keep), self.count,
                kept.e if kept.columns else None, *sums,
                self.n, self.V, self.H, kept.columns,
                self.x.stride(0), self.weight.stride(0), kept.e.stride(0),
                self.options.scale, self.options.softcap,
                **product_blocks("N", "V", "H", self.dtype),
            )  # fmt: skip
        return sums

    def _kept_tile(self, e: Tensor, among: Rows) -> Tile:
        return Tile(e, among.index)

    def _recompute(self, c: slice, base: Tensor, wanted: Exponentials, out: Tensor) -> None:
        from .kernels.linear_log_probs import linear_weigh_kernel

        C = c.stop - c.start
        if self.n:
            linear_weigh_kernel[programs(self.n, C, self.dtype)](
                self.x, self.weight[c], None if self.bias is None else self.bias[c], self.targets,
                base, *wanted, self.count, out,
                self.n, C, self.H, c.start,
                self.x.stride(0), self.weight.stride(0), out.stride(0),
                self.options.scale, self.options.softcap,
                **product_blocks("N", "V", "H", self.dtype),
            )  # fmt: skip

    def _add_to_rows(self, out: Tensor, tile: Tile, w: Tensor) -> None:
        from .kernels.linear_log_probs import dhidden_kernel

        if self.n:
            dhidden_kernel[programs(self.n, w.shape[1], w.dtype)](
                tile.e, tile.rows, self.count, w, out,
                self.n, w.shape[0], w.shape[1], tile.e.stride(0), w.stride(0), out.stride(0),
                **product_blocks("N", "H", "V", w.dtype),
            )  # fmt: skip

    def _add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, add: bool) -> None:
        from .kernels.linear_log_probs import dweight_kernel

        x = x.to(tile.e.dtype)
        dweight_kernel[programs(out.shape[0], out.shape[1], x.dtype)](
            tile.e, tile.rows, self.count, x, out,
            out.shape[0], out.shape[1], tile.e.stride(0), x.stride(0), out.stride(0),
            ADD=add, **product_blocks("V", "H", "N", x.dtype),
        )  # fmt: skip


EPILOGUE = 1024  # columns of an epilogue's program


def programs(rows: int, columns: int, dtype: torch.dtype) -> tuple[int]:
    m, n = _block_shape(dtype)
    return (-(-rows // m) * -(-columns // n),)


def product_blocks(m: str, n: str, k: str, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of a product, by the letters of its dimensions. They depend on the dtype alone."""
    rows, columns = _block_shape(dtype)
    return {
        f"BLOCK_{m}": rows, f"BLOCK_{n}": columns, f"BLOCK_{k}": 128 // dtype.itemsize, "GROUP": 8,
        "num_warps": 8, "num_stages": 2 if torch.version.hip else 3,
    }  # fmt: skip


def _block_shape(dtype: torch.dtype) -> tuple[int, int]:
    # without tensor cores, fp32 sums of 128 x 128 spill
    return (64 if dtype == torch.float32 else 128), 128
