"""Samples that are read when they are needed, from a torch data set or from files, in the place of a tensor."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.threads import one_thread

SMALL_BYTES = 1 << 30  # up to which samples are kept in memory, and moments are computed at once
PIECE_BYTES = 1 << 24  # that are read at a time where all samples are gone through
_told: ContextVar[Sequence[Any]] = ContextVar("told", default=())
_found: ContextVar[list[Any] | None] = ContextVar("found", default=None)
T = TypeVar("T")


@contextmanager
def reading_later() -> Iterator[list[Any]]:
    """Have all samples that can be read later be left in their files by what is loaded in the block, however few.

    Yields:
        JSON values that come of going through all samples, pass after pass, for `telling` another process.
    """
    found = list[Any]()
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


@contextmanager
def telling(found: Sequence[Any]) -> Iterator[None]:
    """Spare what is loaded in the block, by `reading_later`, the passes that another process has made for the same.

    Args:
        found: what came of them.
    """
    token = _told.set(found)
    try:
        yield
    finally:
        _told.reset(token)


def passed(samples: Samples, find: Callable[[], T]) -> T:
    """Return what `find` does, a JSON value that comes of going through all of `samples`, unless it was told."""
    found, told = _found.get(), _told.get()
    if found is None or isinstance(samples, Tensor):
        return find()
    found.append(told[len(found)] if len(found) < len(told) else find())
    value: T = found[-1]
    return value


def is_kept(num_bytes: int) -> bool:
    """Say whether samples of that many bytes are to be kept in memory."""
    return num_bytes <= SMALL_BYTES and _found.get() is None


class Source(Protocol):
    """Where samples are read from."""

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the samples of these numbers, [len(rows), ...], in memory of their own."""
        ...

    def forget(self) -> None:
        """Give back the memory that is kept for the next `read`."""
        ...


@dataclass(frozen=True, eq=False)
class LazySamples:
    """Samples [N, ...] of which a workload reads those that it needs.

    Attributes:
        source: where they are read from.
        rows: int64 [N], their numbers in the source.
        sample_shape: shape of one.
        dtype: type of all of them.
        digest: digest of what the source holds, see `gossamer.workloads.digests`; "": these are small enough to be
            kept in memory, and are digested as if they were.
    """

    source: Source
    rows: Tensor
    sample_shape: tuple[int, ...]
    dtype: torch.dtype
    digest: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that they would have as a tensor."""
        return len(self), *self.sample_shape

    def dim(self) -> int:
        """Return the number of dimensions that they would have as a tensor."""
        return 1 + len(self.sample_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | Tensor) -> Tensor:
        """Read some samples, by a slice or by their numbers, int64 [b]."""
        return self.source.read(self.rows[part].numpy())

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Read samples by their numbers, int64 [b], along the first dimension, as `torch.index_select` does."""
        assert dim == 0
        return self[index]

    def subset(self, index: Tensor) -> LazySamples:
        """Return the samples of these numbers, int64 [b], to be read later."""
        return replace(self, rows=self.rows[index])

    def holding(self, index: Tensor) -> LazySamples:
        """Return the same samples, of which those of some numbers, int64 [b], are read now and kept in memory.

        If they take more than `SMALL_BYTES`, none are.
        """
        rows = np.unique(self.rows[index].numpy())
        size = len(rows) * int(np.prod(self.sample_shape)) * self.dtype.itemsize
        if not 0 < size <= SMALL_BYTES:
            return self
        held = HeldSource(self.source, rows, self.source.read(rows))
        held.forget()
        return replace(self, source=held)


@dataclass(frozen=True, eq=False)
class HeldSource:
    """Has some samples of a source in memory.

    Attributes:
        source: where the others are read from.
        rows: int64 [k], the numbers of those in memory, ascending.
        samples: [k, ...], these.
    """

    source: Source
    rows: NDArray[np.int64]
    samples: Tensor

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return some samples, see `Source`."""
        places = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        are_here = self.rows[places] == rows
        found = self.samples[torch.from_numpy(places)]
        if not are_here.all():
            found[torch.from_numpy(np.flatnonzero(~are_here))] = self.source.read(rows[~are_here])
        return found

    def forget(self) -> None:
        """Give back the memory that is kept for others, see `Source`."""
        self.source.forget()


Samples = Tensor | LazySamples


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Reads samples from an array in a file that is mapped into memory.

    Attributes:
        array: the array, uint8, float32 or int64 [N, ...].
    """

    array: NDArray[Any]

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return some samples, see `Source`."""
        found = torch.from_numpy(np.ascontiguousarray(self.array[rows]))
        if num_bytes(found) >= PIECE_BYTES // 2:  # of a pass over all of them
            self.forget()
        return found

    def forget(self) -> None:
        """Give back the pages that were touched, see `Source`; those that only this process has changed must stay."""
        if not isinstance(self.array, np.memmap) or self.array.mode not in ("r", "r+"):
            return
        base = self.array.base
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def take(samples: Samples, index: Tensor) -> Samples:
    """Return the samples of these numbers, int64 [b]: a copy in memory, or nothing read yet."""
    return samples.subset(index) if isinstance(samples, LazySamples) else samples[index]


def with_digest(samples: LazySamples, digest: Callable[[], str]) -> LazySamples:
    """Return samples with the digest of their source, where there are too many to be digested as a tensor is."""
    return samples if num_bytes(samples) <= SMALL_BYTES else replace(samples, digest=passed(samples, digest))


def num_bytes(samples: Samples) -> int:
    """Return the bytes that samples take, or would take, in memory."""
    return int(np.prod(samples.shape)) * samples.dtype.itemsize


def pieces(samples: Samples) -> Iterator[Tensor]:
    """Go through samples in pieces of about `PIECE_BYTES`."""
    step = max(1, PIECE_BYTES // max(1, num_bytes(samples) // max(1, len(samples))))
    for start in range(0, len(samples), step):
        yield samples[start : start + step]


def are_finite(samples: Samples) -> bool:
    """Say whether all numbers of samples are finite."""
    return all(bool(torch.isfinite(piece).all()) for piece in pieces(samples))


def channel_moments(samples: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel (or feature) of uint8 or float32 samples [N, C, ...].

    A channel of one value only gets the standard deviation 1, so that dividing by it is harmless. Floats beyond
    `SMALL_BYTES` are gone through in pieces whose moments are merged (Chan, Golub and LeVeque, 1979).
    """
    if samples.dtype == torch.uint8:
        return _as_moments(passed(samples, lambda: _moments_of_bytes(samples)))
    if isinstance(samples, Tensor) and num_bytes(samples) <= SMALL_BYTES:
        with one_thread():  # because the bits of a long sum depend on their number
            each = [torch.var_mean(_channel(samples, c).double(), correction=0) for c in range(samples.shape[1])]
        variance, mean = (torch.stack(list(values)) for values in zip(*each, strict=True))
    else:
        return moments_in_pieces(samples)
    return tuple(map(float, mean)), tuple(float(one) or 1.0 for one in variance.sqrt())


def moments_in_pieces(samples: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what `channel_moments` does of floats, always in pieces: the same bits in memory or read while needed."""

    def find() -> tuple[list[float], list[float]]:
        """Go through all samples."""
        with one_thread():
            variance, mean = _moments_of_pieces(samples)
        return mean.tolist(), [float(one) or 1.0 for one in variance.sqrt()]

    return _as_moments(passed(samples, find))


def _as_moments(found: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = found
    return tuple(mean), tuple(std)


def _channel(samples: Tensor, channel: int) -> Tensor:
    return samples[:, channel].reshape(-1)


def _moments_of_bytes(samples: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    counts = torch.zeros(samples.shape[1], 256, dtype=torch.int64)
    for piece in pieces(samples):
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(_channel(piece, channel), minlength=256)
    means, stds, level = [], [], torch.arange(256, dtype=torch.float64)
    for of_channel in counts:
        weight = of_channel.to(torch.float64) / int(of_channel.sum())
        mean = (weight * level).sum()
        means.append(float(mean))
        stds.append(float((weight * (level - mean) ** 2).sum().sqrt()) or 1.0)
    return tuple(means), tuple(stds)


def _moments_of_pieces(samples: Samples) -> tuple[Tensor, Tensor]:
    """Return variance and mean of each channel, float64 [C]."""
    count, mean = 0, torch.zeros(samples.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for piece in pieces(samples):
        values = piece.transpose(0, 1).flatten(1).to(torch.float64)
        variance, mean_here = torch.var_mean(values, dim=1, correction=0)
        more, total = values.shape[1], count + values.shape[1]
        apart = mean_here - mean
        squares += variance * more + apart**2 * (count * more / total)
        mean += apart * (more / total)
        count = total
    return squares / count, mean


def digest_of_samples(samples: Samples) -> str:
    """Return a digest of type, shape and bytes of samples, gone through in pieces."""
    digest = hashlib.blake2b(f"{samples.dtype} {samples.shape};".encode(), digest_size=16)
    for piece in pieces(samples):
        digest.update(piece.contiguous().numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
