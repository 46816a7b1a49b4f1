"""Mixing whole states at about the speed of memory: by blocks of rows, within panels of columns.

Columns do not meet in a mixing, and every kernel works through its operations in an order that is the same for each
row and column. So bits do not depend on panels and blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gossamer.topology.base import Mixing

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 512 * 1024  # rows that a kernel works on at a time: a few such blocks fit a core's second-level cache
WALK_BYTES = 16 * 1024 * 1024  # rows that a kernel works on from a block to the next that needs it
STREAM_BYTES = 32 * 1024 * 1024  # the same where what is read again lies in the last-level cache: long runs pay more
PANEL_BYTES = 8 * 1024 * 1024  # a panel's copy: it and the result stay in the last-level cache
MIN_PANEL_BYTES_PER_ROW = 256  # shorter pieces of rows waste memory bandwidth
CACHE_LINE_BYTES = 64


class Streaming(Mixing):
    """A mixing whose kernel writes into memory that it is given."""

    @abstractmethod
    def _write_rows(self, x: Tensor, lo: int, hi: int, out: Tensor) -> None:
        """Write the rows of peers lo, ..., hi - 1 of W x.

        Args:
            x: [rows, d], contiguous.
            out: these rows, contiguous, apart from x.
        """

    def _write(self, x: Tensor, out: Tensor) -> None:
        """Write all rows of W x, in an order of the kernel's own where that pays."""
        self._write_rows(x, 0, self.n, out)

    def _apply(self, x: Tensor) -> Tensor:
        import torch

        mixed = torch.empty_like(x)
        self._write(x, mixed)
        return mixed

    def _rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        mixed = x.new_empty(self.rows_per_site * (hi - lo), x.shape[1])
        self._write_rows(x, lo, hi, mixed)
        return mixed


def panels(num_rows: int, d: int, itemsize: int) -> list[slice]:
    """Return the slices of columns, whole cache lines wide, that together are 0, ..., d - 1 and each fit the cache.

    Args:
        num_rows: of the state.
        d: its columns.
        itemsize: bytes of an element.
    """
    num_bytes = max(MIN_PANEL_BYTES_PER_ROW, PANEL_BYTES // num_rows)
    width = num_bytes // CACHE_LINE_BYTES * CACHE_LINE_BYTES // itemsize
    return [slice(lo, min(lo + width, d)) for lo in range(0, d, width)]


def block_size(num_bytes: int, block_bytes: int | None = None) -> int:
    """Return how many things of `num_bytes` make up a block of `block_bytes`; None: BLOCK_BYTES."""
    return max(1, (block_bytes or BLOCK_BYTES) // max(1, num_bytes))


def row_blocks(x: Tensor, lo: int, hi: int, block_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut the rows lo, ..., hi - 1 of x [rows, d] into blocks that fit the cache; an accelerator takes them whole."""
    num_rows = block_size(x.shape[1] * x.itemsize, block_bytes) if x.device.type == "cpu" else max(1, hi - lo)
    return ((start, min(start + num_rows, hi)) for start in range(lo, hi, num_rows))


def arrivals(n: int, offset: int, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """Say who hears from whom over an offset: peers a, ..., b - 1 from s, s + 1, ...; yields (a, b, s) for lo..hi."""
    if lo < offset:
        yield lo, min(hi, offset), lo - offset + n
    if hi > offset:
        first = max(lo, offset)
        yield first, hi, first - offset
