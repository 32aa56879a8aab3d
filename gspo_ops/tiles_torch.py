"""Tiles of logits in torch, on a CPU and in float64; small ones stay in the cache of one core."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from operator import itemgetter
from typing import ClassVar

import torch
from torch import Tensor

from .backend import matmul_fp32, rounds_fp32
from .constants import SHIFT_LIMIT
from .rows import Rows
from .softmax import Softmax, times_exp
from .threads import for_each
from .tiles import (
    LN_2,
    Blocks,
    Kept,
    Operands,
    Product,
    RowGrads,
    RowSums,
    Sums,
    Tile,
    Weighting,
    add_rest,
    places,
    slices,
)

BLOCKS = Blocks(
    rows=512,
    columns=1024,
    elements=0,
    sums=1024,
    grad_elements=1 << 22,
    grad_columns=8192,
    align=1,
)
_LEAST_ROWS = 16  # in products that make logits
_LEAST_GRAD_ROWS = 4  # in those that make gradients of rows
_ZERO_EXPONENT = -2048.0  # 2**-2048 is 0 in all dtypes
_VECTORS = 64  # elements: a multiple of every processor's vector width


class TorchTiles:
    """Tiles in torch; see `Tiles`."""

    blocks: ClassVar[Blocks] = BLOCKS

    def __init__(self, operands: Operands) -> None:
        self.of = operands._replace(targets=operands.targets.long())
        self._local = threading.local()

    def target_logits(self) -> Tensor:
        of, softcap = self.of, self.of.options.softmax.softcap
        out = of.x.new_empty(of.n, dtype=of.stats_dtype)
        y = of.targets.clamp(min=0)

        def dot(r: slice) -> None:
            w = of.weight.index_select(0, y[r]).to(of.dtype)
            out[r] = _row_sum(of.x[r].to(of.dtype) * w)

        for_each(dot, slices(of.n, self.blocks.rows), of.x)
        if of.bias is not None:
            out += of.bias[y]
        if of.lora_x is not None and of.lora_b is not None:
            out += (of.lora_x * of.lora_b[y]).sum(1)
        return out if softcap is None else softcap * torch.tanh(out / softcap)

    def fold(
        self, base: Tensor, kept: Kept, keep: Tensor | None, sums: Sums, target_logit: Tensor
    ) -> None:
        def fold_tile(place: tuple[slice, slice]) -> None:
            r, c = place
            z = self._logits(r, c)
            is_kept = c.start < kept.columns
            hit = self._hits(r, c)
            derivative = self._exponents(z, base[r], None, want_derivative=is_kept)
            z[hit] = -math.inf
            _exponentials(z, sums.at(c.start // self.blocks.sums, r))
            if is_kept:
                if derivative is not None:
                    z *= derivative
                e = kept.e[r, c.start : min(c.stop, kept.columns)]
                _keep(z[:, : e.shape[1]], e, None if keep is None else keep[r])

        # oneDNN multiplies some elements beyond a row of bfloat16 by 0: none may be NaN
        kept.e[:, kept.columns :].zero_()
        for_each(fold_tile, places(slice(0, self.of.V), self.of.n, self.blocks), self.of.x)

    def finish(self, sums: Sums, base: Tensor, target_logit: Tensor) -> tuple[Tensor, RowSums]:
        shift, row_sum, log = sums.reduced()
        found = RowSums(base, target_logit, shift, row_sum, row_sum.new_empty(0))
        odds = found.log_odds(self.of.options.softmax.scale)
        log_prob = odds.log_p()
        if log is not None:
            found = found._replace(entropy=odds.entropy(log_prob, row_sum, log / row_sum * LN_2))
        return log_prob, found

    def rescale(self, kept: Kept, sums: Sums, shift: Tensor) -> None:
        width, shrink = self.blocks.sums, sums.shrink(shift)
        for j, row in (shrink < 1).nonzero().tolist():
            c = slice(j * width, min((j + 1) * width, kept.columns))
            kept.e[row, c] *= shrink[j, row]

    def row_grads(self, sums: RowSums, g: Tensor, h: Tensor | None, live: Tensor) -> RowGrads:
        grads = _row_grads(sums, g, h, self.of.options.softmax)
        grads = grads._replace(
            factor=torch.where(live, grads.factor, 0.0),
            at_target=torch.where(live, grads.at_target, 0.0),
        )
        return grads.take(self.of.rows)

    def kept_tile(self, e: Tensor, among: Rows) -> Tile:
        return Tile(e[: self.of.n] if among.index is None else e.index_select(0, among.index), None)

    def weigh(self, columns: slice, weighting: Weighting, out: Tensor) -> None:
        def weigh_tile(place: tuple[slice, slice]) -> None:
            r, c = place
            to = out[r, c.start - columns.start : c.stop - columns.start]
            self._weigh(self._logits(r, c), self._hits(r, c), weighting.map(itemgetter(r)), to)

        for_each(weigh_tile, places(columns, self.of.n, self.blocks), self.of.x)

    def takes_whole(
        self, among: Rows, of_rows: Sequence[Product], of_columns: Sequence[Product]
    ) -> bool:
        # every product waits for the slowest core
        dtypes = {x for product in of_rows for x in (product.factor.dtype, product.dtype)}
        dtypes |= {x for product in of_columns for x in (product.out.dtype, product.dtype)}
        is_direct = among.index is None and dtypes <= {self.of.grad_dtype}
        return is_direct and not rounds_fp32(self.of.x.device)

    def add_to_rows(self, out: Tensor, tile: Tile, w: Tensor, *, add: bool) -> None:
        # with fewer rows, sums go one column after the other, with errors 10 times as large
        least = _LEAST_GRAD_ROWS if w.shape[1] > 1 else 0
        e = _with_rows(tile.e.to(w.dtype), least)
        if out.dtype == w.dtype and len(e) == len(out):
            matmul_fp32(e, w, out=out, add=add)
        else:
            product = torch.mm(e, w) if e.dtype == torch.bfloat16 else matmul_fp32(e, w)
            product = product[: len(out)]
            out.copy_(out + product if add else product)

    def add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool) -> None:
        matmul_fp32(tile.e.mT.to(x.dtype), x, out=out, add=add)

    def scale_rows(self, out: Tensor, w: Tensor, row_grads: RowGrads) -> None:
        out.mul_(row_grads.factor[:, None])
        y = self.of.targets  # -1 where another rank has it
        at_target, y = torch.where(y >= 0, row_grads.at_target, 0.0), y.clamp(min=0)
        for r in slices(len(out), self.blocks.rows):
            out[r] += w.index_select(0, y[r]) * at_target[r, None]

    def add_targets(self, out: Tensor, x: Tensor, at_target: Tensor) -> None:
        y, order = self.of.targets.sort(stable=True)
        order = order[y >= 0]  # the other targets belong to other ranks
        if len(order) == 0:
            return
        y, counts = y[y >= 0].unique_consecutive(return_counts=True)
        for c in slices(x.shape[1], max(self.blocks.grad_elements // 4 // self.of.n, 1)):
            shares = x[:, c].index_select(0, order) * at_target[order, None]
            sums = torch.segment_reduce(shares, "sum", lengths=counts)
            out[y, c] = sums.add_(out[y, c]).to(out.dtype)

    # One tile of logits

    def _logits(self, r: slice, c: slice) -> Tensor:
        """Return the logits of a tile, in this thread's buffer, which its next tile overwrites.

        The libraries behind torch.mm multiply a few rows in an order of their own. With padding, a
        row's logits are the same in most batches, but no library guarantees that for all batches.
        """
        of = self.of
        x, w = _with_rows(of.x[r].to(of.dtype), _LEAST_ROWS), of.weight[c].to(of.dtype)
        out = self._buffer(x, len(x) * len(w)).view(len(x), -1)
        return add_rest(matmul_fp32(x, w.mT, out=out)[: r.stop - r.start], of, r, c)

    def _buffer(self, like: Tensor, size: int) -> Tensor:
        """Return a buffer (size,) of this thread, which `_exp2` may overrun without harm."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < size + _VECTORS:
            self._local.buffer = buffer = like.new_empty(size + _VECTORS)
        return buffer[:size]

    def _hits(self, r: slice, c: slice) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the targets in a tile, counted from its first ones."""
        y = self.of.targets[r]
        rows = ((y >= c.start) & (y < c.stop)).nonzero().squeeze(1)
        return rows, y[rows] - c.start

    def _exponents(
        self, z: Tensor, base: Tensor, shift: Tensor | None, *, want_derivative: bool
    ) -> Tensor | None:
        """Turn z into (softcap(z) - base) * scale - shift; return the derivative of softcap."""
        derivative = None
        softmax = self.of.options.softmax
        if softmax.softcap is not None:
            z.div_(softmax.softcap).tanh_()
            derivative = 1.0 - z.square() if want_derivative else None
            z.mul_(softmax.softcap)
        z.sub_(base[:, None]).mul_(softmax.scale)
        if shift is not None and shift.any():
            z.sub_(shift[:, None])
        return derivative

    def _weigh(
        self, z: Tensor, hit: tuple[Tensor, Tensor], weighting: Weighting, out: Tensor
    ) -> None:
        """Write the values of a tile z of logits under `weighting` to `out`; z is overwritten."""
        base, shift, constant, slope = weighting
        derivative = self._exponents(z, base, shift, want_derivative=True)
        weight = None
        if slope is not None and constant is not None:
            weight = z * slope[:, None] + constant[:, None]
        _exp2(z)
        if weight is not None:
            z.mul_(weight.masked_fill_(z == 0, 0.0))
        z[hit] = 0.0
        out.copy_(z if derivative is None else z.mul_(derivative))


def _row_grads(sums: RowSums, g: Tensor, h: Tensor | None, softmax: Softmax) -> RowGrads:
    """Return d loss / d logits for d loss / d log_prob = g and d loss / d entropy = h."""
    temperature, softcap = softmax.temperature, softmax.softcap
    odds = sums.log_odds(softmax.scale)
    q = odds.q()
    rho = torch.where(sums.row_sum == 0, 0.0, q / sums.row_sum)
    at_target = g * q / temperature
    weighting = Weighting(sums.base, sums.shift, None, None)
    if h is None:
        factor = -g * rho / temperature
    else:
        # -p_v * (g + h * (log p_v + entropy)), with log p_v = a_v * ln 2 + log q - log(row_sum)
        log_p = odds.log_p()
        log_rho = torch.where(sums.row_sum == 0, 0.0, odds.log_q() - sums.row_sum.log())
        constant = rho * (g + h * (log_rho + sums.entropy))
        factor = torch.full_like(g, -1.0 / temperature)
        weighting = weighting._replace(constant=constant, slope=rho * h * LN_2)
        at_target -= h * times_exp(log_p, log_p + sums.entropy) / temperature
    if softcap is not None:
        at_target *= 1.0 - (sums.target_logit / softcap).square()
    return RowGrads(factor, at_target, weighting)


def _exponentials(z: Tensor, sums: Sums) -> None:
    """Turn exponents z into exponentials, and write their sums to `sums`, (n,) each."""
    top = z.amax(1)
    sums.shift.copy_(torch.where(top > SHIFT_LIMIT, top, 0.0))
    if sums.shift.any():
        z -= sums.shift[:, None]
    # 0 * log(0) must be 0
    a = None if sums.log is None else z.clamp(min=_ZERO_EXPONENT)
    _exp2(z)
    sums.total.copy_(_row_sum(z))
    if a is not None and sums.log is not None:
        sums.log.copy_(_row_sum(a.mul_(z)))


def _exp2(z: Tensor) -> None:
    """Compute exp2 in place, for a tile in a thread's buffer.

    torch rounds the last elements differently if they do not fill a vector, so elements beyond the
    tile fill its last one.
    """
    size = -(-z.numel() // _VECTORS) * _VECTORS
    z.as_strided((size,), (1,)).exp2_()


def _keep(z: Tensor, e: Tensor, keep: Tensor | None) -> None:
    if keep is None or keep.all():
        e.copy_(z)
    else:
        e[keep] = z[keep].to(e.dtype)


def _with_rows(x: Tensor, least: int) -> Tensor:
    """Return x, padded to this many rows if it has fewer."""
    return torch.nn.functional.pad(x, (0, 0, 0, least - len(x))) if len(x) < least else x


def _row_sum(x: Tensor) -> Tensor:
    """Return x.sum(1), such that a row's sum does not depend on the number of rows.

    torch sums a single row in a different order from several.
    """
    return x.sum(1) if len(x) > 1 else x.repeat(2, 1).sum(1)[: len(x)]
