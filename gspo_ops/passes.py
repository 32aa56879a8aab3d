"""The two passes over tiles of logits: forward to log-probs, and backward to gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .backend import device_guard, matmul_fp32, no_autocast
from .checks import checked_targets
from .head import Head, HeadGrads, HeadOptions, Wanted, on_device
from .parallel import NOWHERE, summed
from .rows import FlaggedRows, Rows, rows_where, rows_with_gradient, where_rows
from .softmax import TargetRows
from .tiles import (
    Kept,
    Operands,
    Product,
    RowGrads,
    RowSums,
    Sums,
    Tile,
    Tiles,
    Weighting,
    finite_or_zero,
    slices,
    slices_of,
)
from .tiles_gpu import MatMulTiles, TritonTiles
from .tiles_tma import TmaTiles
from .tiles_torch import TorchTiles

TILES: dict[str, Callable[[Operands], Tiles]] = {
    "torch": TorchTiles,
    "mm": MatMulTiles,
    "triton": TritonTiles,
    "tma": TmaTiles,
}


def make_tiles(head: Head, targets: Tensor, rows: Rows, options: HeadOptions) -> Tiles:
    """Make tiles of the implementation that the options choose."""
    return TILES[options.products](Operands.of(head, targets, rows, options))


# Forward


def forward(
    head: Head,
    rows: TargetRows,
    grad_mask: Tensor | None,
    options: HeadOptions,
    kept: Kept,
) -> tuple[Tensor, RowSums]:
    """Compute log_probs (N,) and RowSums of the rows with a non-zero mask.

    `kept` receives the exponentials of those rows whose grad_mask is non-zero, too.
    """
    targets, mask = _flat(rows)
    options, softmax = on_device(options, head), options.softmax
    with no_autocast(targets.device), device_guard(head.hidden):
        worked_on = rows_where(mask, options)
        tiles = make_tiles(head, targets, worked_on, options)
        if options.products == "torch" and softmax.vocab_group is None:
            # a GPU would have to synchronise; ranks have checked targets together
            checked_targets(tiles.of.targets, tiles.of.V, worked_on.index)
        keep = None if grad_mask is None else worked_on.take(grad_mask.reshape(-1) != 0)
        target_logit = tiles.target_logits()
        group = softmax.vocab_group if tiles.of.n else None
        if group is None:
            base = finite_or_zero(target_logit)
        else:
            base = finite_or_zero(summed(_of_part(target_logit, tiles), group))
        sums = Sums.empty(tiles.blocks.entries(tiles.of.V), base, softmax.return_entropy)
        tiles.fold(base, kept, keep, sums, target_logit)
        whole = sums
        if group is not None:
            part = _of_part(target_logit, tiles)
            whole, target_logit = sums.over_vocabulary(part, group)
        log_prob, found = tiles.finish(whole, base, target_logit)
        if kept.columns:
            tiles.rescale(kept, sums, found.shift)

        def full(x: Tensor) -> Tensor:
            if x.shape != log_prob.shape:
                return x
            out = x.new_empty(targets.shape)
            worked_on.put(x, out)
            return out

        return full(log_prob), RowSums(*map(full, found))


def _of_part(target_logit: Tensor, tiles: Tiles) -> Tensor:
    """Return a part's contribution (n,) to the targets' logits: 0 if another has the target."""
    targets = tiles.of.targets
    z = torch.where(targets >= 0, target_logit, 0.0)
    return z.masked_fill_(targets == NOWHERE, math.nan)


# Backward


def backward(
    head: Head,
    rows: TargetRows,
    sums: RowSums,
    g: Tensor,
    h: Tensor | None,
    options: HeadOptions,
    kept: Kept,
    out: HeadGrads,
    *,
    add: Wanted,
) -> None:
    """Write gradients for d loss / d log_prob = g and d loss / d entropy = h, (N,), to `out`.

    `add` selects the gradients of weight, bias, lora_a and lora_b that are added to `out`.
    """
    targets, mask = _flat(rows)
    options = on_device(options, head)
    live = g != 0 if h is None else (g != 0) | (h != 0)
    if mask is not None:
        live &= mask
    with no_autocast(targets.device), device_guard(head.hidden):
        worked_on = rows_where(mask, options)
        among = rows_with_gradient(worked_on.take(live), options)
        live_rows = among.within(worked_on)
        tiles = make_tiles(head, targets, live_rows, options)
        row_grads = tiles.row_grads(sums, g, h, live)
        _gradients(tiles, row_grads, kept, among, out, add)


def _flat(rows: TargetRows) -> tuple[Tensor, Tensor | None]:
    mask = None if rows.mask is None else rows.mask.reshape(-1) != 0
    return rows.targets.reshape(-1), mask


def _gradients(
    tiles: Tiles, row_grads: RowGrads, kept: Kept, among: Rows, out: HeadGrads, add: Wanted
) -> None:
    """Compute the products, one range of columns after the other, then the targets' terms."""
    of = tiles.of
    hidden = low_rank = None
    if out.hidden is not None:
        hidden = _of_rows(of.weight, of.grad_dtype, of)
    if of.lora_b is not None and (out.hidden is not None or out.lora_a is not None):
        low_rank = _of_rows(of.lora_b, of.stats_dtype, of)  # small enough for fp32
    of_rows = [x for x in (hidden, low_rank) if x is not None]
    of_columns = list(_of_columns(of, out, add, row_grads.factor))
    if of.n:
        _add_tiles(tiles, row_grads, kept, among, of_rows, of_columns)
        for columns in of_columns:
            tiles.add_targets(columns.out, columns.factor, row_grads.at_target)
    else:
        for columns in of_columns:
            if not columns.add:
                columns.out.zero_()
    for gradient in of_rows:
        _finish(gradient, row_grads, tiles)
    if low_rank is not None:
        _through_lora(tiles, low_rank.out, hidden, out.lora_a, add=add.lora_a)
    if hidden is not None and out.hidden is not None:
        of.rows.put(hidden.out, out.hidden.view(-1, hidden.out.shape[1]))


def _of_rows(w: Tensor, dtype: torch.dtype, of: Operands) -> Product:
    total = of.x.new_empty(of.n, w.shape[1], dtype=of.stats_dtype)
    return Product(total, w, dtype, add=False)


def _finish(gradient: Product, row_grads: RowGrads, tiles: Tiles) -> None:
    """Apply the factors, and add the targets' terms and the sums of other ranks."""
    group = tiles.of.options.softmax.vocab_group
    tiles.scale_rows(gradient.out, gradient.factor, row_grads)
    if group is not None:
        summed(gradient.out, group)  # in fp32, then rounded once


def _through_lora(
    tiles: Tiles, low: Tensor, hidden: Product | None, out: Tensor | None, *, add: bool
) -> None:
    """Add the low-rank part to dhidden, and compute da, from low = d loss / d lora_x (n, r).

    dhidden is rounded only afterwards.
    """
    of = tiles.of
    assert of.lora_a is not None
    low = low * of.options.lora_scale
    if hidden is not None:
        matmul_fp32(low, of.lora_a.to(low.dtype), out=hidden.out, add=True)
    if out is not None:
        total = low.new_zeros(of.lora_a.shape)
        for r in slices(of.n, tiles.blocks.rows):  # a copy of all rows in fp32 would be large
            x = of.x[r].to(low.dtype)
            if isinstance(of.rows, FlaggedRows):
                x = where_rows(of.rows.live[r], x)  # a dead row may hold NaN
            matmul_fp32(low[r].mT, x, out=total, add=True)
        out.copy_(out + total if add else total)


def _of_columns(of: Operands, out: HeadGrads, add: Wanted, factor: Tensor) -> Iterator[Product]:
    ones = torch.ones_like(factor)[:, None]
    for to, x, dtype, adds in (
        (out.weight, of.x, of.grad_dtype, add.weight),
        (out.bias, ones, of.stats_dtype, add.bias),
        (out.lora_b, of.lora_x, of.stats_dtype, add.lora_b),
    ):
        if to is not None and x is not None:
            yield Product(to.view(len(to), -1), x, dtype, adds)


def _add_tiles(
    tiles: Tiles,
    row_grads: RowGrads,
    kept: Kept,
    among: Rows,
    of_rows: list[Product],
    of_columns: list[Product],
) -> None:
    """Add up the products of all tiles. The scaled factors are freed when this returns."""
    scaled = [_scaled(product, row_grads.factor, tiles) for product in of_columns]
    is_whole = tiles.takes_whole(among, of_rows, of_columns)
    for c in _grad_columns(tiles, kept.columns, is_whole):
        tile = _tile(tiles, c, row_grads.weighting, kept, among)
        for total, w, dtype, _ in of_rows:
            tiles.add_to_rows(total, tile, w[c].to(dtype), add=c.start > 0)
        for to, x, _, adds in scaled:
            tiles.add_to_columns(to[c], tile, x, add=adds)
        del tile  # free it before the next one is made


def _grad_columns(tiles: Tiles, kept_columns: int, is_whole: bool) -> list[slice]:
    """Return ranges of columns, each of which is either kept as a whole or not at all."""
    width = tiles.blocks.grad_width(tiles.of.n)
    kept, others = slice(0, kept_columns), slice(kept_columns, tiles.of.V)
    kept_width = max(kept_columns, 1) if is_whole else width
    return [*slices_of(kept, kept_width), *slices_of(others, width)]


def _tile(tiles: Tiles, c: slice, weighting: Weighting, kept: Kept, among: Rows) -> Tile:
    """Return a kept tile, or recompute one in a buffer of its own."""
    if c.stop <= kept.columns:
        return tiles.kept_tile(kept.e[:, c], among)
    width, align = c.stop - c.start, tiles.blocks.align
    padded = tiles.of.x.new_empty(tiles.of.n, -(-width // align) * align, dtype=tiles.of.grad_dtype)
    out = padded[:, :width]
    tiles.weigh(c, weighting, out)
    return Tile(out, None)


def _scaled(product: Product, factor: Tensor, tiles: Tiles) -> Product:
    """Multiply the factor of a product by the factor of each row."""
    x = product.factor
    out = torch.empty_like(x, dtype=product.dtype)
    for r in slices(len(x), tiles.blocks.rows):
        torch.mul(x[r], factor[r, None], out=out[r])
    if isinstance(tiles.of.rows, FlaggedRows):
        # a dead row may hold NaN
        out.masked_fill_((factor == 0)[:, None], 0.0)
    return product._replace(factor=out)
