"""What a side-car and the processes that use it share: how long work and links take, and memory that both map."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.profiling.offload import Costs
from gossamer.shared_memory import Mappable, attach

AHEAD = 16  # pieces that are handed over before the answer to the first of them is read
ALIGNMENT = 64  # bytes


# ---- time


class Link:
    """One direction of a link, as whoever sends by it knows it."""

    def __init__(self, costs: Costs) -> None:
        self._seconds_per_byte, self._latency = costs.link_seconds_per_byte, costs.link_latency
        self._free = 0.0

    def arrival(self, num_bytes: float) -> float:
        """Return when what is sent now has crossed, seconds of the monotonic clock."""
        self._free = max(self._free, time.monotonic()) + num_bytes * self._seconds_per_byte
        return self._free + self._latency


def sleep_until(moment: float) -> None:
    """Sleep until a moment of the monotonic clock, if it has not passed."""
    if (left := moment - time.monotonic()) > 0:
        time.sleep(left)


def queued_seconds() -> float:
    """Return how long this thread has waited for a processor so far; 0 where the system does not tell."""
    with suppress(OSError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def device_seconds(costs: Costs, cpu: float, idle: float, num_bytes: int) -> float:
    """Return how long a piece takes on the device.

    Args:
        costs: of the device.
        cpu: seconds of processor time here.
        idle: seconds that it waited here, such as for a disk, but not for a processor.
        num_bytes: that it works on.
    """
    if costs.engine is not None:
        latency, seconds_per_byte = costs.engine
        return latency + num_bytes * seconds_per_byte
    return max(costs.slowdown * cpu, num_bytes * costs.memory_seconds_per_byte) + idle


# ---- memory


class Places:
    """Which places in memory are free; that which was freed last is taken first, since its pages are there already."""

    def __init__(self) -> None:
        self._free, self._taken = list(range(AHEAD))[::-1], deque[int]()

    def take(self) -> int:
        """Take a free place; there must be one."""
        self._taken.append(self._free.pop())
        return self._taken[-1]

    def free(self) -> None:
        """Free the place that has been taken for longest."""
        self._free.append(self._taken.popleft())


class Outbox:
    """Memory from which the process at the other end reads arrays, a place for each piece under way."""

    def __init__(self) -> None:
        self._places: list[Mappable | None] = [None] * AHEAD

    def write(self, number: int, arrays: Sequence[Tensor]) -> list[Any]:
        """Copy arrays to a place, by its number; return JSON values from which `Inbox.read` finds them."""
        begins = list(itertools.accumulate((_padded(value.nbytes) for value in arrays), initial=0))
        place = self._places[number]
        if arrays and (place is None or place.tensor.nbytes < begins[-1]):
            if place is not None:
                place.close()
            place = Mappable(1 << max(12, math.ceil(math.log2(begins[-1] + 1))), torch.uint8)
            self._places[number] = place
        extents = []
        for value, begin in zip(arrays, begins, strict=False):
            assert place is not None
            target = place.tensor[begin : begin + value.nbytes].view(value.dtype).view(value.shape)
            target.copy_(value)
            extents.append([begin, list(value.shape), str(value.dtype).removeprefix("torch.")])
        return [] if place is None or not arrays else [place.address, extents]


class Inbox:
    """The memory of an `Outbox` of another process."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, ...], Tensor] = {}

    def read(self, described: Sequence[Any]) -> list[Tensor]:
        """Return copies of what `Outbox.write` has described."""
        if not described:
            return []
        address, extents = described
        key = (address[1], address[2])  # of the open file
        if key not in self._mapped:
            if len(self._mapped) >= 2 * AHEAD:  # most of which were replaced by larger ones
                self._mapped.clear()
            self._mapped[key] = attach(address)
        found = []
        for begin, shape, name in extents:
            dtype: torch.dtype = vars(torch)[name]
            size = math.prod(shape) * dtype.itemsize
            found.append(self._mapped[key][begin : begin + size].view(dtype).view(shape).clone())
        return found


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
