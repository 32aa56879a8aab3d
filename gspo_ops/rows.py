"""Rows that are processed: their positions, and whether the host or the device knows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .head import HeadOptions


class Rows(Protocol):
    """Some of N rows.

    Attributes:
        index: (n,) their positions; None for all rows, in place.
    """

    @property
    def index(self) -> Tensor | None: ...

    def take(self, x: Tensor) -> Tensor:
        """Return x (N, ...) at these rows, (n, ...)."""

    def put(self, x: Tensor, out: Tensor) -> None:
        """Write x to these rows of out, and 0 to the others."""

    def within(self, outer: Rows) -> Rows:
        """Return these rows, which are relative to `outer`, as rows of the whole batch."""


@dataclass(frozen=True)
class AllRows:
    """All rows, every one of which counts."""

    @property
    def index(self) -> None:
        return None

    def take(self, x: Tensor) -> Tensor:
        return x

    def put(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x)

    def within(self, outer: Rows) -> Rows:
        return outer


@dataclass(frozen=True)
class ListedRows:
    """Rows that count, listed on the host."""

    index: Tensor

    def take(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.index)

    def put(self, x: Tensor, out: Tensor) -> None:
        out.zero_().index_copy_(0, self.index, x.to(out.dtype))

    def within(self, outer: Rows) -> Rows:
        return self if outer.index is None else ListedRows(self.take(outer.index))


@dataclass(frozen=True)
class OrderedRows:
    """All rows, those that count first; only the device knows how many."""

    index: Tensor
    count: Tensor  # 0-dim int32

    def take(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.index)

    def put(self, x: Tensor, out: Tensor) -> None:
        counts = torch.arange(len(x), device=x.device) < self.count
        out.index_copy_(0, self.index, where_rows(counts, x).to(out.dtype))

    def within(self, outer: Rows) -> Rows:
        return self if outer.index is None else replace(self, index=self.take(outer.index))


@dataclass(frozen=True)
class FlaggedRows:
    """All rows, in place or in an order; only the device knows which ones count."""

    live: Tensor  # (N,) bool, in that order
    index: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor, out: Tensor) -> None:
        x = where_rows(self.live, x)
        if self.index is None:
            out.copy_(x)
        else:
            out.index_copy_(0, self.index, x.to(out.dtype))

    def within(self, outer: Rows) -> Rows:
        return replace(self, index=outer.index)


def rows_where(live: Tensor | None, options: HeadOptions) -> Rows:
    """Return the rows where live (N,) is True, as far as the host may know; live=None means all."""
    if live is None:
        return AllRows()
    if options.products in ("triton", "tma"):
        order = torch.argsort(live.logical_not().byte(), stable=True)
        return OrderedRows(order, live.sum(dtype=torch.int32))
    if options.products == "torch" or options.allow_sync:
        index = live.nonzero().squeeze(1)
        return AllRows() if len(index) == len(live) else ListedRows(index)
    return FlaggedRows(live)


def rows_with_gradient(live: Tensor, options: HeadOptions) -> Rows:
    """Return the rows where live (N,) is True, among those that the forward processed."""
    if options.products == "tma":
        return FlaggedRows(live)  # a box holds neighbouring rows, so rows stay where they are
    return rows_where(live, options)


def where_rows(flags: Tensor, x: Tensor) -> Tensor:
    """Return x (n, ...) in flagged rows and 0 in the others, whatever their values."""
    return torch.where(flags.view(-1, *[1] * (x.ndim - 1)), x, 0.0)
