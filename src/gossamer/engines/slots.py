"""Stretches of shared memory in which trained blocks come back to the server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.submodel.layout import ALIGNMENT

SPARE_SLOTS = 16  # beyond those that can be under way, so that partial sums need not move at once
Extent = tuple[int, Sequence[int]]  # where an array begins in its slot, and its shape


class Slots:
    """Slots that are given out and come back; partial sums rest in those that came back until they are needed.

    Attributes:
        memory: [number of slots, floats of each].
        num_lost: slots that were given out and did not come back in their round: a worker may still write to them.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.num_lost = memory, 0
        self._free, self._used, self._out = list(range(len(memory))), list[int](), set[int]()
        self._trees: Iterable[TreeSum] = ()

    def begin(self, trees: Iterable[TreeSum]) -> None:
        """Begin a round, whose partial sums will be in `trees`."""
        self.num_lost += len(self._out)
        self._out.clear()
        self._free += self._used
        self._used, self._trees = [], trees

    def take(self) -> int | None:
        """Return the number of a free slot; if there is none, move partial sums out of those that came back."""
        if not self._free:
            for number in self._used:
                for tree in self._trees:
                    tree.move_out(self.memory[number])
            self._free, self._used = self._used, []
        if not self._free:
            return None
        number = self._free.pop()
        self._out.add(number)
        return number

    def give_back(self, number: int) -> None:
        """Take a slot back; what stands in it stays until another one is taken."""
        self._out.discard(number)
        self._used.append(number)

    def holds(self, value: Tensor) -> bool:
        """Say whether a tensor lies in a slot."""
        low: int = self.memory.data_ptr()
        return low <= value.data_ptr() < low + self.memory.nbytes


def write_arrays(slot: Tensor, arrays: Iterable[Tensor]) -> list[Extent]:
    """Write arrays into a slot, those aside that are where they belong, and return their extents."""
    extents: list[Extent] = []
    taken = 0
    for value in arrays:
        target = slot[taken : taken + value.numel()].view(value.shape)
        if target.data_ptr() != value.data_ptr():
            target.copy_(value)
        extents.append((taken, list(value.shape)))
        taken += -(-value.numel() // ALIGNMENT) * ALIGNMENT  # after a scalar, rows still start aligned
    return extents


def read_arrays(slot: Tensor, extents: Iterable[Any]) -> list[Tensor]:
    """Return the arrays of a slot, on its memory."""
    return [slot[start : start + math.prod(shape)].view(shape) for start, shape in extents]
