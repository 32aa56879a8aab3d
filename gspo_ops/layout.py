"""Padded and packed batches as one thing: sequences that are runs of consecutive rows.

A padded (B, T) tensor, flattened, holds sequence b in rows b * T .. (b + 1) * T; a packed (N,)
tensor holds it in rows cu_seqlens[b] .. cu_seqlens[b + 1]. Nothing is copied or moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # a target that doesn't count


@dataclass(frozen=True)
class Layout:
    """Where the sequences are. Made by `resolve_layout`.

    Attributes:
        shape: (B, T) padded or (N,) packed, the shape of every per-token argument.
        batch: number of sequences B.
        device: where the per-token arguments live.
        cu_seqlens: (B + 1,) first row of each sequence, and N; None when padded.
        mask: (N,) non-zero where a token counts; None when all do.
    """

    shape: torch.Size
    batch: int
    device: torch.device
    cu_seqlens: Tensor | None
    mask: Tensor | None

    @property
    def rows(self) -> int:
        return math.prod(self.shape)  # not numel(), which makes a constant of a symbolic size

    def flat(self, name: str, x: Tensor) -> Tensor:
        """A per-token argument as a contiguous (N,) tensor."""
        check_tensor(name, x, self.device)
        if x.shape != self.shape:
            raise ValueError(f"{name} must have shape {tuple(self.shape)}, got {tuple(x.shape)}")
        return x.reshape(-1).contiguous()

    def flat_float(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A per-token floating-point argument that needs no gradient, as (N,) in `dtype`."""
        check_constant(name, x)
        return self.flat(name, x).to(dtype)

    def per_sequence_or_token(
        self, name: str, x: Tensor, dtype: torch.dtype, *, is_part: bool = False
    ) -> tuple[Tensor, bool]:
        """An argument of shape (B,) or per token, flat, and whether it is per token.

        Of packed sequences whose other tokens are elsewhere (`is_part`), N may be B by chance: per
        token is then (1, N) only, on all ranks alike.
        """
        check_tensor(name, x, self.device)
        check_constant(name, x)
        if x.shape == (self.batch,):
            return x.contiguous().to(dtype), False
        is_packed = len(self.shape) == 1
        shapes = [tuple(self.shape)] if not (is_packed and is_part) else []
        if is_packed:
            shapes.append((1, *self.shape))
        if x.shape in shapes:
            return x.reshape(-1).contiguous().to(dtype), True
        raise ValueError(
            f"{name} must have shape {(self.batch,)} (one per sequence) or "
            f"{' or '.join(map(str, shapes))} (one per token), got {tuple(x.shape)}"
        )


def resolve_layout(
    shape: torch.Size, device: torch.device, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Layout:
    """The layout of per-token tensors of this shape: (B, T) padded, or (N,) with cu_seqlens."""
    if len(shape) == 2 and cu_seqlens is not None:
        raise ValueError(
            f"cu_seqlens is for packed input of shape (N,); this input is padded, {tuple(shape)}: "
            "pass mask instead"
        )
    if len(shape) == 1 and cu_seqlens is None:
        raise ValueError(
            "cu_seqlens is needed for packed input of shape (N,): the (B + 1,) first rows of its "
            "sequences, and N"
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
    layout = Layout(shape, batch, device, cu_seqlens, None)
    if mask is None:
        return layout
    check_tensor("mask", mask, device)
    if mask.dtype.is_complex:
        raise TypeError(f"mask must be bool, integer or float, got {mask.dtype}")
    return Layout(shape, batch, device, cu_seqlens, layout.flat("mask", mask))


def check_tensor(name: str, x: object, device: torch.device | None = None) -> None:
    """Refuse what is not a dense tensor, on this device if one is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if is_dtensor(x):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {tuple(x.placements)}: "  # type: ignore[attr-defined]
            f"pass {name}.full_tensor(), or this rank's part as {name}.to_local()"
        )
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like the input, got {x.device}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {x.layout}")


def is_dtensor(x: object) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def checked_targets(targets: Tensor, V: int, rows: Tensor | None = None) -> Tensor:
    """Targets as int64; one outside [0, V) is refused, with its place in `rows`."""
    targets = targets.long()
    wrong = ((targets < 0) | (targets >= V)).nonzero().squeeze(1)
    if len(wrong):
        first = int(wrong[0])
        row = first if rows is None else int(rows[first])
        raise IndexError(
            f"targets must lie in [0, {V}) where they count, got {int(targets[first])} at row "
            f"{row} ({len(wrong)} such rows); mask rows out, or mark them with {IGNORED}"
        )
    return targets


def check_constant(name: str, x: Tensor) -> None:
    """Refuse a tensor that expects a gradient which nothing computes, or holds no numbers."""
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, but is a constant of the loss: detach it")
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"{name} must hold real numbers, got {x.dtype}")


def segment_sum(x: Tensor, batch: int, cu_seqlens: Tensor | None) -> Tensor:
    """(B,) sum over each sequence's rows of x (N,), in a fixed order and without a host sync."""
    if cu_seqlens is None:
        return x.view(batch, -1).sum(1) if x.numel() else x.new_zeros(batch)
    return torch.segment_reduce(x, "sum", lengths=cu_seqlens.diff().long(), unsafe=True, initial=0)


def sequence_ids(batch: int, rows: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(N,) int64 index of the sequence that each row belongs to."""
    index = torch.arange(rows, device=device)
    if cu_seqlens is None:
        return index // max(rows // max(batch, 1), 1)
    return torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
