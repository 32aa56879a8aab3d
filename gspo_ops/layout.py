"""Padded and packed batches in one form: sequences that are runs of consecutive rows.

A padded (B, T) tensor, flattened, holds sequence b in rows b * T .. (b + 1) * T; a packed (N,)
tensor holds it in rows cu_seqlens[b] .. cu_seqlens[b + 1]. Nothing is copied or moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_constant, check_tensor


class Sequences(NamedTuple):
    """The sequences to which (N,) rows belong, and the rows that count.

    Attributes:
        rows: N.
        batch: number of sequences B.
        cu_seqlens: (B + 1,) first row of each sequence, followed by N; None if all have the same
            length.
        mask: (N,) non-zero where a token counts; None if all count.
    """

    rows: int
    batch: int
    cu_seqlens: Tensor | None
    mask: Tensor | None

    def sum(self, x: Tensor) -> Tensor:
        """Sum x (N,) over each sequence's rows to (B,), in a fixed order, without a host sync."""
        if self.cu_seqlens is None:
            return x.view(self.batch, -1).sum(1) if x.numel() else x.new_zeros(self.batch)
        lengths = self.cu_seqlens.diff().long()
        return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True, initial=0)

    def ids(self, device: torch.device) -> Tensor:
        """Return the index of each row's sequence, (N,) int64."""
        index = torch.arange(self.rows, device=device)
        if self.cu_seqlens is None:
            return index // max(self.rows // max(self.batch, 1), 1)
        return torch.searchsorted(self.cu_seqlens[1:].long(), index, right=True)

    def tokens(self) -> Tensor | int:
        """Return the number of tokens that count, at least 1."""
        return max(self.rows, 1) if self.mask is None else (self.mask != 0).sum().clamp(min=1)

    def where_valid(self, x: Tensor) -> Tensor:
        """Return x (N,), with 0 where a token does not count."""
        return x if self.mask is None else torch.where(self.mask != 0, x, 0.0)


@dataclass(frozen=True)
class Layout:
    """The layout of the sequences in the arguments of a call, made by `resolve_layout`.

    Attributes:
        shape: (B, T) padded or (N,) packed, the shape of every per-token argument.
        device: the device of the per-token arguments.
        sequences: the layout of the flat (N,) rows.
    """

    shape: torch.Size
    device: torch.device
    sequences: Sequences

    def flat(self, name: str, x: Tensor) -> Tensor:
        """Return a per-token argument as a contiguous (N,) tensor."""
        check_tensor(name, x, self.device)
        if x.shape != self.shape:
            raise ValueError(f"{name} must have shape {tuple(self.shape)}, got {tuple(x.shape)}")
        return x.reshape(-1).contiguous()

    def flat_float(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a per-token floating-point argument without a gradient, as (N,) in `dtype`."""
        check_constant(name, x)
        return self.flat(name, x).to(dtype)

    def per_sequence_or_token(
        self, name: str, x: Tensor, dtype: torch.dtype, *, is_part: bool = False
    ) -> tuple[Tensor, bool]:
        """Return an argument of shape (B,) or per token, flattened, and whether it is per token.

        If other ranks hold tokens of the packed sequences (`is_part`), N may equal B by chance. On
        all ranks, an argument per token must then have the shape (1, N).
        """
        check_tensor(name, x, self.device)
        check_constant(name, x)
        batch = self.sequences.batch
        if x.shape == (batch,):
            return x.contiguous().to(dtype), False
        is_packed = len(self.shape) == 1
        shapes = [tuple(self.shape)] if not (is_packed and is_part) else []
        if is_packed:
            shapes.append((1, *self.shape))
        if x.shape in shapes:
            return x.reshape(-1).contiguous().to(dtype), True
        raise ValueError(
            f"{name} must have shape {(batch,)} (one per sequence) or "
            f"{' or '.join(map(str, shapes))} (one per token), got {tuple(x.shape)}"
        )


def resolve_layout(
    name: str,
    shape: torch.Size,
    device: torch.device,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Layout:
    """Return the layout of an argument's tokens: (B, T) padded, or (N,) with cu_seqlens."""
    if len(shape) not in (1, 2):
        raise ValueError(f"{name} must be padded (B, T) or packed (N,) tokens, got {tuple(shape)}")
    if len(shape) == 2 and cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens is for packed input of shape (N,); this input is padded, {tuple(shape)}: "
            "pass mask instead"
        )
    if len(shape) == 1 and cu_seqlens is None:
        raise ValueError(
            "cu_seqlens is needed for packed input of shape (N,): the (B + 1,) first rows of its "
            "sequences, followed by N"
        )
    batch = shape[0]
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, device)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(cu_seqlens.shape)}")
        batch = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
    rows = math.prod(shape)  # not numel(), which turns a symbolic size into a constant
    if mask is not None:
        check_tensor("mask", mask, device)
        if mask.dtype.is_complex:
            raise TypeError(f"mask must be bool, integer or float, got {mask.dtype}")
        if mask.shape != shape:
            raise ValueError(f"mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
        mask = mask.reshape(-1).contiguous()
    return Layout(shape, device, Sequences(rows, batch, cu_seqlens, mask))
