"""Tiles of logits on a GPU with TMA: see `kernels/hidden_tma.py`."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import loadable
from .rows import FlaggedRows, Rows
from .tiles import Kept, Operands, Sums, Tile, Weighting
from .tiles_gpu import TritonTiles

_ALIGN = 16  # bytes: rows of an operand start at multiples of it
_ROWS, _COLUMNS, _INNER = 128, 256, 64
_PART = 128  # columns of an epilogue


class LiveBlocks(NamedTuple):
    """Blocks with at least one live row: their list and their number, in int32."""

    listed: Tensor
    number: Tensor


class TmaTiles(TritonTiles):
    """Products in bf16 by persistent kernels; see `Tiles`."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self.of = self.of._replace(x=_aligned(self.of.x), weight=_aligned(self.of.weight))
        # the cap's derivative takes the registers of half the sums
        self.logits_columns = _COLUMNS if self.of.options.softmax.softcap is None else _PART
        rows = operands.rows
        if isinstance(rows, FlaggedRows):
            self.live = loadable(rows.live)

    @cached_property
    def live_rows(self) -> LiveBlocks:
        return self._live_blocks(_ROWS)

    @cached_property
    def live_inner(self) -> LiveBlocks:
        """The live blocks that a product sums over."""
        return self._live_blocks(_INNER)

    def fold(
        self, base: Tensor, kept: Kept, keep: Tensor | None, sums: Sums, target_logit: Tensor
    ) -> None:
        from .kernels.hidden_tma import tma_fwd_kernel

        of = self.of
        if not of.n:
            return
        e = None
        if kept.columns:
            e = _boxes(kept.e[: of.n, : kept.columns], _ROWS, _PART)
        tma_fwd_kernel[(programs(of.x),)](
            x_desc=_boxes(of.x, _ROWS, _INNER),
            weight_desc=_boxes(of.weight, self.logits_columns, _INNER),
            bias_ptr=of.bias,
            targets_ptr=of.targets,
            base_ptr=base,
            keep_ptr=None if keep is None else loadable(keep),
            count_ptr=self.count,
            e_desc=e,
            shift_ptr=sums.shift,
            sum_ptr=sums.total,
            log_sum_ptr=sums.log,
            target_logit_ptr=target_logit,
            n=of.n,
            C=of.V,
            H=of.x.shape[1],
            scale=of.options.softmax.scale,
            softcap=of.options.softmax.softcap,
            **sizes("N", "V", "H", of.x, self.logits_columns),
        )

    def kept_tile(self, e: Tensor, among: Rows) -> Tile:
        return Tile(e[: self.of.n], None)

    def weigh(self, columns: slice, weighting: Weighting, out: Tensor) -> None:
        from .kernels.hidden_tma import tma_weigh_kernel

        of = self.of
        if not of.n:
            return
        tma_weigh_kernel[(programs(of.x),)](
            x_desc=_boxes(of.x, _ROWS, _INNER),
            weight_desc=_boxes(of.weight[columns], self.logits_columns, _INNER),
            bias_ptr=None if of.bias is None else of.bias[columns],
            targets_ptr=of.targets,
            base_ptr=weighting.base,
            shift_ptr=weighting.shift,
            constant_ptr=weighting.constant,
            slope_ptr=weighting.slope,
            live_ptr=self.live,
            blocks_ptr=self.live_rows.listed,
            count_ptr=self.live_rows.number,
            out_desc=_boxes(out, _ROWS, _PART),
            n=of.n,
            C=columns.stop - columns.start,
            H=of.x.shape[1],
            first_col=columns.start,
            scale=of.options.softmax.scale,
            softcap=of.options.softmax.softcap,
            **sizes("N", "V", "H", of.x, self.logits_columns),
        )

    def add_to_rows(self, out: Tensor, tile: Tile, w: Tensor, *, add: bool) -> None:
        from .kernels.hidden_tma import tma_dhidden_kernel

        tma_dhidden_kernel[(programs(w),)](
            e_desc=_boxes(tile.e, _ROWS, _INNER),
            weight_desc=_boxes(w, _INNER, _COLUMNS),
            blocks_ptr=self.live_rows.listed,
            count_ptr=self.live_rows.number,
            out_ptr=out,
            n=len(out),
            C=len(w),
            H=w.shape[1],
            stride_on=out.stride(0),
            ADD=add,
            **sizes("N", "H", "V", w),
        )

    def add_to_columns(self, out: Tensor, tile: Tile, x: Tensor, *, add: bool) -> None:
        from .kernels.hidden_tma import tma_dweight_kernel

        if x.shape[1] == 1:
            super().add_to_columns(out, tile, x, add=add)
            return
        tma_dweight_kernel[(programs(x),)](
            e_desc=_boxes(tile.e, _INNER, _ROWS),
            x_desc=_boxes(x, _INNER, _COLUMNS),
            blocks_ptr=self.live_inner.listed,
            count_ptr=self.live_inner.number,
            out_ptr=out,
            C=len(out),
            H=x.shape[1],
            stride_ov=out.stride(0),
            ADD=add,
            **sizes("V", "H", "N", x),
        )

    def _live_blocks(self, rows: int) -> LiveBlocks:
        from .kernels.hidden_tma import live_blocks_kernel

        listed = self.of.x.new_empty(-(-self.of.n // rows) + 1, dtype=torch.int32)
        number = self.of.x.new_empty((), dtype=torch.int32)
        live_blocks_kernel[(1,)](
            live_ptr=self.live,
            blocks_ptr=listed,
            count_ptr=number,
            n=self.of.n,
            ROWS=rows,
            BLOCKS=64,
        )
        return LiveBlocks(listed, number)


def _aligned(x: Tensor) -> Tensor:
    """Return x with rows that start at multiples of 16 bytes, as boxes require."""
    is_aligned = x.data_ptr() % _ALIGN == 0 and x.stride(0) * x.element_size() % _ALIGN == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _boxes(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def programs(x: Tensor) -> int:
    """Return the number of programs: one for each multiprocessor, or a few without any."""
    if x.device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def sizes(m: str, n: str, k: str, like: Tensor, columns: int = _COLUMNS) -> dict[str, int]:
    """Return the tile sizes of a product, by the letters of its dimensions."""
    return {
        f"BLOCK_{m}": _ROWS,
        f"BLOCK_{n}": columns,
        f"BLOCK_{k}": _INNER,
        "GROUP": 8,
        "PROGRAMS": programs(like),
        "num_warps": 8,
        "num_stages": 4 if columns == _COLUMNS else 6,  # as many as shared memory holds
    }
