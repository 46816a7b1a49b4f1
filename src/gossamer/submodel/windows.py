"""Which channels of an axis a participant trains: windows as ascending segments.

A window keeps its channels in ascending order, so that a full window is the identity and a rolled one is at most two
slices. Length: ``max(1, floor(capacity * width))`` (FedRolex, arXiv 2212.01548, section 3; the floor is never 0 here).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """Some of an axis's `width` channels, as ascending, disjoint ``[start, stop)`` segments with gaps between."""

    width: int
    segments: Segments

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.segments)

    @property
    def is_full(self) -> bool:
        """Whether every channel is in the window."""
        return self.segments == ((0, self.width),)

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """The channels in ascending order, int64 [L]."""
        return np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in self.segments])

    @classmethod
    def of_indices(cls, width: int, indices: Sequence[int] | NDArray[np.int64]) -> Window:
        """Build a window from ascending, distinct channel numbers."""
        channels = np.asarray(indices, dtype=np.int64)
        breaks = np.flatnonzero(np.diff(channels) != 1) + 1
        runs = np.split(channels, breaks)
        return cls(width, tuple((int(run[0]), int(run[-1]) + 1) for run in runs))


def check_capacity(capacity: float) -> float:
    """Return `capacity` if it lies in (0, 1].

    Raises:
        ConfigError: it does not.
    """
    if not (isinstance(capacity, int | float) and 0 < capacity <= 1):
        raise ConfigError(
            f"capacity {capacity!r} is outside (0, 1]: give the share of each width that the client can hold"
        )
    return float(capacity)


def window_length(width: int, capacity: float) -> int:
    """Return ``max(1, floor(capacity * width))``, safe against the rounding of products such as 0.29 * 100.

    Raises:
        ConfigError: the capacity is outside (0, 1].
    """
    return max(1, math.floor(check_capacity(capacity) * width + 1e-9))


def wrapped(width: int, start: int, length: int) -> Window:
    """Return the window of `length` channels from `start` on, going on at 0 after the last one."""
    if length == width:
        return Window(width, ((0, width),))
    start %= width
    stop = start + length
    if stop <= width:
        return Window(width, ((start, stop),))
    return Window(width, ((0, stop - width), (start, width)))
