"""Mixing whole states at about the speed of memory: into another state by rows, or in place by panels of columns.

Columns do not meet in a mixing, and every kernel works through its operations in an order that is the same for each
row and column. So results agree bit for bit with `Mixing.apply`, whatever the panels, blocks and threads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gossamer.errors import ConfigError
from gossamer.topology.base import Mixing

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 512 * 1024  # rows that a kernel works on at a time: a few such blocks fit a core's second-level cache
WALK_BYTES = 16 * 1024 * 1024  # rows that all threads work on together, from a block to the next that needs it
STREAM_BYTES = 32 * 1024 * 1024  # the same where what is read again lies in the last-level cache: long runs pay more
PANEL_BYTES = 8 * 1024 * 1024  # a panel's copy: it and the result stay in the last-level cache
MIN_PANEL_BYTES_PER_ROW = 256  # shorter pieces of rows waste memory bandwidth
CACHE_LINE_BYTES = 64


class Streaming(Mixing):
    """A mixing whose kernel writes into memory that it is given, so that threads can share the work.

    Attributes:
        walks: whether it pays to go through the rows in an order of the kernel's own or in long runs; torch's threads
            then share every step of it, instead of each taking a range of rows.
    """

    walks = False

    @abstractmethod
    def _write_rows(self, x: Tensor, lo: int, hi: int, out: Tensor) -> None:
        """Write the rows of peers lo, ..., hi - 1 of W x.

        Args:
            x: [rows, d], contiguous.
            out: these rows, apart from x; may be a slice of columns of a wider array.
        """

    def _write(self, x: Tensor, out: Tensor, part: int = 0, num_parts: int = 1) -> None:
        """Write one of `num_parts` parts of W x; all parts together write everything once."""
        lo, hi = share(self.n, part, num_parts)
        self._write_rows(x, lo, hi, out[self.rows_per_site * lo : self.rows_per_site * hi])

    def _apply(self, x: Tensor) -> Tensor:
        import torch

        mixed = torch.empty_like(x)
        self._write(x, mixed)
        return mixed

    def _rows(self, x: Tensor, lo: int, hi: int) -> Tensor:
        mixed = x.new_empty(self.rows_per_site * (hi - lo), x.shape[1])
        self._write_rows(x, lo, hi, mixed)
        return mixed


def mix(mixing: Mixing, x: Tensor, out: Tensor, threads: int = 1) -> None:
    """Write W x into `out`, each thread a share of the rows.

    Args:
        x: [n, d] ([n, 2, d] or [2n, d] of a joint mixing), float32 or float64, contiguous, on the CPU.
        out: as x, in other memory; overwritten.
        threads: to compute with.

    Raises:
        ConfigError: x and out do not fit each other or the mixing, or threads is below 1.
    """
    from gossamer.threads import torch_threads

    source, target = _flat(mixing, x), _flat(mixing, out)
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ConfigError(f"cannot mix {tuple(x.shape)} {x.dtype} into {tuple(out.shape)} {out.dtype}: give the like")
    if not (x.is_contiguous() and out.is_contiguous()):
        raise ConfigError(f"cannot mix strides {x.stride()} into {out.stride()}: give contiguous arrays, or use mix_")
    if abs(x.data_ptr() - out.data_ptr()) < x.nbytes:
        raise ConfigError("cannot mix an array into its own memory: use mix_")
    if isinstance(mixing, Streaming) and mixing.walks:
        _check_threads(threads)
        with torch_threads(threads):
            mixing._write(source, target)
        return
    _together(lambda part: _write(mixing, source, target, part, threads), threads)


def mix_(mixing: Mixing, x: Tensor, *, columns: slice | None = None, threads: int = 1) -> None:
    """Replace x by W x in place, panel by panel; each thread needs the memory of one panel more.

    Args:
        x: [n, d] ([n, 2, d] or [2n, d] of a joint mixing), float32 or float64, on the CPU; neighbouring columns lie
            side by side.
        columns: those to mix; None: all. The others stay as they are.
        threads: to compute with.

    Raises:
        ConfigError: x does not fit the mixing, or threads is below 1.
    """
    whole = _flat(mixing, x)[:, columns or slice(None)]
    every = panels(whole.shape[0], whole.shape[1], whole.itemsize)

    def work(part: int) -> None:
        """Mix every panel whose turn is this thread's."""
        buffer = whole.new_empty(whole.shape[0] * max((one.stop - one.start for one in every), default=0))
        for one in every[part::threads]:
            panel = whole[:, one]
            copied = buffer[: panel.numel()].view(panel.shape).copy_(panel)
            _write(mixing, copied, panel)

    _together(work, threads)


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


def share(total: int, part: int, num_parts: int) -> tuple[int, int]:
    """Return the bounds of one of `num_parts` about equal ranges that make up 0, ..., total - 1."""
    return total * part // num_parts, total * (part + 1) // num_parts


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


def _flat(mixing: Mixing, x: Tensor) -> Tensor:
    num_rows = mixing.n * mixing.rows_per_site
    by_peer = x.ndim == 3 and tuple(x.shape[:2]) == (mixing.n, mixing.rows_per_site)
    rows = x.detach().flatten(0, 1) if by_peer else x.detach()
    if rows.ndim != 2 or rows.shape[0] != num_rows or str(x.dtype) not in ("torch.float32", "torch.float64"):
        raise ConfigError(f"cannot mix {tuple(x.shape)} {x.dtype}: give {num_rows} rows of float32 or float64")
    if x.device.type != "cpu" or rows.data_ptr() != x.data_ptr() or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ConfigError(f"cannot mix strides {x.stride()} on {x.device} in place: give rows of one array on the CPU")
    return rows


def _write(mixing: Mixing, x: Tensor, out: Tensor, part: int = 0, num_parts: int = 1) -> None:
    if isinstance(mixing, Streaming):
        mixing._write(x, out, part, num_parts)
        return
    lo, hi = share(mixing.n, part, num_parts)
    out[mixing.rows_per_site * lo : mixing.rows_per_site * hi].copy_(mixing.rows(x, lo, hi))


def _together(work: Callable[[int], None], threads: int) -> None:
    """Call work(0), ..., work(threads - 1), each in a thread of its own with one torch thread."""
    from gossamer.threads import one_thread

    _check_threads(threads)
    with one_thread():
        if threads == 1:
            work(0)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise ConfigError(f"threads = {threads} is below 1: give how many threads to mix with")
