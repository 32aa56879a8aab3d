"""Tiles of logits on a GPU: torch.mm with Triton epilogues, or Triton products.

The kernels are in `kernels/hidden.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .backend import loadable, matmul_fp32
from .rows import FlaggedRows, OrderedRows, Rows
from .tiles import (
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

SUMS = 4096  # columns of a folding program, which holds them in registers
# elements of a tile of logits in fp32, or of a part of a product: an L2 cache holds 32 MiB
_CACHED = 1 << 23
BLOCKS = Blocks(
    rows=2048,
    columns=SUMS,
    elements=_CACHED,
    sums=SUMS,
    grad_elements=1 << 26,
    grad_columns=8192,
    align=64,
)
TRITON_BLOCKS = BLOCKS._replace(sums=128)  # columns of a program
EPILOGUE = 1024  # columns of the other epilogues' programs


def product_columns(width: int) -> int:
    """Return how many columns of a gradient, each of this size, one product computes."""
    return max(_CACHED // width // 128 * 128, 128)


class KernelTiles:
    """The part that all implementations on a GPU share: everything per row."""

    blocks: ClassVar[Blocks]
    of: Operands
    live: Tensor | None  # (n,), if only the device knows which rows count
    count: Tensor | None  # 0-dim number of rows that count, which come first

    def target_logits(self) -> Tensor:
        from .kernels.hidden import target_logits_kernel

        of = self.of
        out = of.x.new_empty(of.n, dtype=of.stats_dtype)
        low_rank = None
        if of.lora_x is not None and of.lora_b is not None:
            rows = of.lora_b.index_select(0, of.targets.clamp(0, of.V - 1))
            low_rank = (of.lora_x * rows).sum(1)
        if of.n:
            target_logits_kernel[(of.n,)](
                hidden_ptr=of.x,
                weight_ptr=of.weight,
                bias_ptr=of.bias,
                lora_ptr=low_rank,
                targets_ptr=of.targets,
                live_ptr=self.live,
                target_logits_ptr=out,
                H=of.x.shape[1],
                V=of.V,
                stride_hn=of.x.stride(0),
                stride_wv=of.weight.stride(0),
                softcap=of.options.softmax.softcap,
                BLOCK_H=1024,
            )
        return out

    def finish(self, sums: Sums, base: Tensor, target_logit: Tensor) -> tuple[Tensor, RowSums]:
        from .kernels.hidden import row_sums_kernel

        log_probs, shift, row_sum = (torch.empty_like(base) for _ in range(3))
        entropy = base.new_empty(0 if sums.log is None else len(base))
        rows, entries = 64, 32
        if len(base):
            row_sums_kernel[(-(-len(base) // rows),)](
                shift_ptr=sums.shift,
                sum_ptr=sums.total,
                log_sum_ptr=sums.log,
                base_ptr=base,
                target_logit_ptr=target_logit,
                log_probs_ptr=log_probs,
                row_shift_ptr=shift,
                row_sum_ptr=row_sum,
                entropy_ptr=entropy,
                J=len(sums.shift),
                N=len(base),
                scale=self.of.options.softmax.scale,
                BLOCK_J=entries,
                BLOCK_N=rows,
            )
        return log_probs, RowSums(base, target_logit, shift, row_sum, entropy)

    def rescale(self, kept: Kept, sums: Sums, shift: Tensor) -> None:
        from .kernels.hidden import rescale_kernel

        if self.of.n:
            rescale_kernel[(self.of.n,)](
                e_ptr=kept.e,
                shift_ptr=sums.shift,
                row_shift_ptr=shift,
                n=self.of.n,
                columns=kept.columns,
                stride_en=kept.stride(),
                TILE=self.blocks.sums,
                BLOCK=min(self.blocks.sums, EPILOGUE),
            )

    def row_grads(self, sums: RowSums, g: Tensor, h: Tensor | None, live: Tensor) -> RowGrads:
        from .kernels.hidden import row_grads_kernel

        n, softmax, block = self.of.n, self.of.options.softmax, 128
        factor, at_target, base, shift = (g.new_empty(n) for _ in range(4))
        constant, slope = (None if h is None else g.new_empty(n) for _ in range(2))
        if n:
            row_grads_kernel[(-(-n // block),)](
                base_ptr=sums.base,
                target_logit_ptr=sums.target_logit,
                shift_ptr=sums.shift,
                row_sum_ptr=sums.row_sum,
                entropy_ptr=None if h is None else sums.entropy,
                g_ptr=g.contiguous(),
                h_ptr=None if h is None else h.contiguous(),
                live_ptr=loadable(live),
                index_ptr=self.of.rows.index,
                factor_ptr=factor,
                at_target_ptr=at_target,
                row_base_ptr=base,
                row_shift_ptr=shift,
                constant_ptr=constant,
                slope_ptr=slope,
                n=n,
                temperature=softmax.temperature,
                scale=softmax.scale,
                softcap=softmax.softcap,
                BLOCK=block,
            )
        return RowGrads(factor, at_target, Weighting(base, shift, constant, slope))

    def scale_rows(self, out: Tensor, w: Tensor, row_grads: RowGrads) -> None:
        from .kernels.hidden import scale_rows_kernel

        block = EPILOGUE
        if self.of.n:
            scale_rows_kernel[(self.of.n * -(-out.shape[1] // block),)](
                out_ptr=out,
                weight_ptr=w,
                factor_ptr=row_grads.factor,
                at_target_ptr=row_grads.at_target,
                targets_ptr=self.of.targets,
                H=out.shape[1],
                V=len(w),
                stride_on=out.stride(0),
                stride_wv=w.stride(0),
                BLOCK=block,
            )

    def _add_column_sums(self, out: Tensor, tile: Tile, factor: Tensor, *, add: bool) -> None:
        """Set out (C, 1) to the sum of the tile's rows times their factors (n, 1), or add it."""
        from .kernels.hidden import column_sums_kernel

        columns = 128
        column_sums_kernel[(-(-len(out) // columns),)](
            e_ptr=tile.e,
            rows_ptr=tile.rows,
            count_ptr=self.count,
            factor_ptr=factor,
            out_ptr=out,
            n=len(factor),
            C=len(out),
            stride_en=tile.e.stride(0),
            stride_o=out.stride(0),
            ADD=add,
            ROWS=32,
            COLS=columns,
        )

    def add_targets(self, out: Tensor, x: Tensor, at_target: Tensor) -> None:
        from .kernels.hidden import add_targets_kernel

        y, order = self.of.targets.sort(stable=True)
        width = x.shape[1]
        block = min(1 << (width - 1).bit_length(), EPILOGUE // 2)
        add_targets_kernel[(len(y) * -(-width // block),)](
            x_ptr=x,
            at_target_ptr=at_target,
            targets_ptr=y,
            order_ptr=order,
            ends_ptr=torch.searchsorted(y, y, right=True),
            out_ptr=out,
            H=width,
            V=len(out),
            stride_xn=x.stride(0),
            stride_ov=out.stride(0),
            ROWS=8,
            COLS=block,
        )


class MatMulTiles(KernelTiles):
    """torch.mm with fp32 results, and Triton epilogues; see `Tiles`."""

    blocks: ClassVar[Blocks] = BLOCKS

    def __init__(self, operands: Operands) -> None:
        self.of = _for_kernels(operands)
        rows = operands.rows
        self.live = loadable(rows.live) if isinstance(rows, FlaggedRows) else None
        self.count = None

    def fold(
        self, base: Tensor, kept: Kept, keep: Tensor | None, sums: Sums, target_logit: Tensor
    ) -> None:
        from .kernels.hidden import fold_kernel

        n = self.of.n
        for r, c, z in self._logits(slice(0, self.of.V)):
            fold_kernel[(len(z) * -(-z.shape[1] // SUMS),)](
                z_ptr=z,
                targets_ptr=self.of.targets,
                base_ptr=base,
                live_ptr=self.live,
                e_ptr=kept.e,
                shift_ptr=sums.shift,
                sum_ptr=sums.total,
                log_sum_ptr=sums.log,
                target_logit_ptr=target_logit,
                C=z.shape[1],
                N=n,
                kept=kept.columns,
                stride_en=kept.stride(),
                first_row=r.start,
                first_col=c.start,
                scale=self.of.options.softmax.scale,
                softcap=self.of.options.softmax.softcap,
                BLOCK=SUMS,
            )

    def kept_tile(self, e: Tensor, among: Rows) -> Tile:
        return Tile(e[: self.of.n] if among.index is None else e.index_select(0, among.index), None)

    def weigh(self, columns: slice, weighting: Weighting, out: Tensor) -> None:
        from .kernels.hidden import weigh_kernel

        for r, c, z in self._logits(columns):
            weigh_kernel[(len(z) * -(-z.shape[1] // EPILOGUE),)](
                z_ptr=z,
                targets_ptr=self.of.targets,
                base_ptr=weighting.base,
                shift_ptr=weighting.shift,
                constant_ptr=weighting.constant,
                slope_ptr=weighting.slope,
                live_ptr=self.live,
                out_ptr=out,
                C=z.shape[1],
                stride_on=out.stride(0),
                first_row=r.start,
                first_col=c.start,
                first_out=columns.start,
                scale=self.of.options.softmax.scale,
                softcap=self.of.options.softmax.softcap,
                BLOCK=EPILOGUE,
            )

    def takes_whole(
        self, among: Rows, of_rows: Sequence[Product], of_columns: Sequence[Product]
    ) -> bool:
        return among.index is None and _are_direct(of_rows, of_columns, self.of.grad_dtype)

    def add_to_rows(self, out: Tensor, tile: Tile, w: Tensor, *, add: bool) -> None:
        matmul_fp32(tile.e.to(w.dtype), w, out=out, add=add)

    def add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool) -> None:
        width = x.shape[1]
        if width == 1:
            self._add_column_sums(out, tile, x, add=add)
            return
        for c in slices(len(out), product_columns(width)):
            matmul_fp32(tile.e[:, c].mT.to(x.dtype), x, out=out[c], add=add)

    def _logits(self, columns: slice) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, columns and logits of each tile, in a buffer that the next one overwrites."""
        of, blocks = self.of, self.blocks
        rows = min(of.n, blocks.rows)
        width = min(blocks.width(of.n), columns.stop - columns.start)
        buffer = of.x.new_empty(rows * width, dtype=of.stats_dtype)
        for r, c in places(columns, of.n, blocks):
            x, w = of.x[r].to(of.dtype), of.weight[c].to(of.dtype)
            z = buffer[: len(x) * len(w)].view(len(x), len(w))
            yield r, c, add_rest(matmul_fp32(x, w.mT, out=z), of, r, c)


class TritonTiles(KernelTiles):
    """Products in Triton, which look up live rows on the device; see `Tiles`."""

    blocks: ClassVar[Blocks] = TRITON_BLOCKS

    def __init__(self, operands: Operands) -> None:
        of = _for_kernels(operands)
        self.of = of._replace(x=of.x.to(of.dtype), weight=of.weight.to(of.dtype))
        self.live = None
        if isinstance(operands.rows, OrderedRows):
            self.count = operands.rows.count
        else:
            self.count = torch.full((), self.of.n, dtype=torch.int32, device=self.of.x.device)

    def fold(
        self, base: Tensor, kept: Kept, keep: Tensor | None, sums: Sums, target_logit: Tensor
    ) -> None:
        from .kernels.hidden import hidden_fwd_kernel

        of, is_capped = self.of, self.of.options.softmax.softcap is not None
        if of.n:
            hidden_fwd_kernel[programs(of.n, of.V, of.dtype, is_capped)](
                x_ptr=of.x,
                weight_ptr=of.weight,
                bias_ptr=of.bias,
                targets_ptr=of.targets,
                base_ptr=base,
                keep_ptr=None if keep is None else loadable(keep),
                count_ptr=self.count,
                e_ptr=kept.e,
                shift_ptr=sums.shift,
                sum_ptr=sums.total,
                log_sum_ptr=sums.log,
                target_logit_ptr=target_logit,
                n=of.n,
                C=of.V,
                H=of.x.shape[1],
                kept=kept.columns,
                stride_xn=of.x.stride(0),
                stride_wv=of.weight.stride(0),
                stride_en=kept.stride(),
                scale=of.options.softmax.scale,
                softcap=of.options.softmax.softcap,
                **product_blocks("N", "V", "H", of.dtype, is_capped),
            )

    def kept_tile(self, e: Tensor, among: Rows) -> Tile:
        return Tile(e, among.index)

    def weigh(self, columns: slice, weighting: Weighting, out: Tensor) -> None:
        from .kernels.hidden import hidden_weigh_kernel

        of, C = self.of, columns.stop - columns.start
        is_capped = of.options.softmax.softcap is not None
        if of.n:
            hidden_weigh_kernel[programs(of.n, C, of.dtype, is_capped)](
                x_ptr=of.x,
                weight_ptr=of.weight[columns],
                bias_ptr=None if of.bias is None else of.bias[columns],
                targets_ptr=of.targets,
                base_ptr=weighting.base,
                shift_ptr=weighting.shift,
                constant_ptr=weighting.constant,
                slope_ptr=weighting.slope,
                count_ptr=self.count,
                out_ptr=out,
                n=of.n,
                C=C,
                H=of.x.shape[1],
                first_col=columns.start,
                stride_xn=of.x.stride(0),
                stride_wv=of.weight.stride(0),
                stride_on=out.stride(0),
                scale=of.options.softmax.scale,
                softcap=of.options.softmax.softcap,
                **product_blocks("N", "V", "H", of.dtype, is_capped),
            )

    def takes_whole(
        self, among: Rows, of_rows: Sequence[Product], of_columns: Sequence[Product]
    ) -> bool:
        return _are_direct(of_rows, of_columns, self.of.grad_dtype)

    def add_to_rows(self, out: Tensor, tile: Tile, w: Tensor, *, add: bool) -> None:
        from .kernels.hidden import dhidden_kernel

        if self.of.n:
            dhidden_kernel[programs(self.of.n, w.shape[1], w.dtype)](
                e_ptr=tile.e,
                rows_ptr=tile.rows,
                count_ptr=self.count,
                weight_ptr=w,
                out_ptr=out,
                n=self.of.n,
                C=w.shape[0],
                H=w.shape[1],
                stride_en=tile.e.stride(0),
                stride_wv=w.stride(0),
                stride_on=out.stride(0),
                ADD=add,
                **product_blocks("N", "H", "V", w.dtype),
            )

    def add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool) -> None:
        from .kernels.hidden import dweight_kernel

        if x.shape[1] == 1:
            self._add_column_sums(out, tile, x, add=add)
            return
        dweight_kernel[programs(out.shape[0], out.shape[1], x.dtype)](
            e_ptr=tile.e,
            rows_ptr=tile.rows,
            count_ptr=self.count,
            x_ptr=x,
            out_ptr=out,
            C=out.shape[0],
            H=out.shape[1],
            stride_en=tile.e.stride(0),
            stride_xn=x.stride(0),
            stride_ov=out.stride(0),
            ADD=add,
            **product_blocks("V", "H", "N", x.dtype),
        )


# Helpers for both


def _are_direct(
    of_rows: Sequence[Product], of_columns: Sequence[Product], dtype: torch.dtype
) -> bool:
    """Return whether no operand has to be copied to the dtype of the exponentials."""
    operands = {x for product in of_rows for x in (product.factor.dtype, product.dtype)}
    operands |= {product.dtype for product in of_columns if product.factor.shape[1] > 1}
    return operands <= {dtype}


def _for_kernels(operands: Operands) -> Operands:
    """Return the operands with contiguous rows.

    A target outside [0, V) gives NaN, because refusing it would take a synchronisation.
    """
    return operands._replace(
        x=_with_contiguous_rows(operands.x),
        weight=_with_contiguous_rows(operands.weight),
        bias=None if operands.bias is None else operands.bias.contiguous(),
        lora_b=None if operands.lora_b is None else operands.lora_b.contiguous(),
        targets=operands.targets.contiguous(),
    )


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# Sizes of Triton products, which never depend on the number of rows


def programs(rows: int, columns: int, dtype: torch.dtype, is_large: bool = False) -> tuple[int]:
    m, n = _block_shape(dtype, is_large)
    return (-(-rows // m) * -(-columns // n),)


def product_blocks(
    m: str, n: str, k: str, dtype: torch.dtype, is_large: bool = False
) -> dict[str, int]:
    """Return the tile sizes of a product, by the letters of its dimensions.

    Args:
        is_large: whether the epilogue needs many registers, as with a soft cap.
    """
    rows, columns = _block_shape(dtype, is_large)
    return {
        f"BLOCK_{m}": rows,
        f"BLOCK_{n}": columns,
        f"BLOCK_{k}": 128 // dtype.itemsize,
        "GROUP": 8,
        "num_warps": 8,
        "num_stages": 2 if torch.version.hip else 3,
    }


def _block_shape(dtype: torch.dtype, is_large: bool) -> tuple[int, int]:
    # without tensor cores, fp32 sums of 128 x 128 spill
    return (64 if is_large or dtype == torch.float32 else 128), 128
