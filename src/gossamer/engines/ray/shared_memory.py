"""Memory that a driver shares with actors of its own machine: what the object store would hold and copy once more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.algorithms.base import Arrays
from gossamer.engines.slots import Slots, read_arrays
from gossamer.shared_memory import Mappable, attach


class SharedMemory:
    """The driver's side: the state, and slots for results.

    A slot that was given to an actor and did not come back is not used again, nor are the others after the round: the
    actor may be a straggler that still writes.

    Attributes:
        state: the state arrays, on shared memory.
    """

    def __init__(self, state: Mapping[str, Tensor], num_slots: int, floats_of_a_slot: int) -> None:
        """Extent `state` ({name: [1, d]}, all of the dtype of ``x``) in shared memory, and reserve slots."""
        self._dtype = state["x"].dtype
        self._shapes = [[name, list(value.shape)] for name, value in state.items()]
        self._state_memory = Mappable(sum(value.numel() for value in state.values()), self._dtype)
        self.state = _views(self._state_memory.tensor, self._shapes)
        for name, value in state.items():
            self.state[name].copy_(value)
        self._shape = (num_slots, floats_of_a_slot)
        self._reserve()

    def _reserve(self) -> None:
        self._slot_memory = Mappable(math.prod(self._shape), self._dtype)
        self.slots = Slots(self._slot_memory.tensor.view(self._shape))
        self.address = {
            "state": self._state_memory.address,
            "shapes": self._shapes,
            "slots": self._slot_memory.address,
            "floats_of_a_slot": self._shape[1],
        }

    def begin(self, trees: Iterable[TreeSum]) -> None:
        """Begin a round, whose partial sums will be in `trees`."""
        self.slots.begin(trees)
        if self.slots.num_lost:
            self._slot_memory.close()
            self._reserve()
            self.slots.begin(trees)

    def take_back(self, reply: Mapping[str, Any]) -> list[Tensor]:
        """Return the arrays that an actor wrote into its slot."""
        arrays = read_arrays(self.slots.memory[reply["slot"]], reply["extents"])
        self.slots.give_back(reply["slot"])
        return arrays

    def close(self) -> None:
        """Give the memory back, once nobody has it mapped any more."""
        self._state_memory.close()
        self._slot_memory.close()


class AttachedMemory:
    """An actor's side: maps what an address says, once."""

    def __init__(self) -> None:
        self._mapped: dict[str, tuple[Any, Tensor]] = {}

    def state(self, address: Mapping[str, Any]) -> Arrays:
        """Return the state arrays as they are now."""
        return _views(self._map("state", address["state"]), address["shapes"])

    def slot(self, address: Mapping[str, Any], number: int) -> Tensor:
        """Return one slot."""
        return self._map("slots", address["slots"]).view(-1, address["floats_of_a_slot"])[number]

    def _map(self, what: str, address: Sequence[Any]) -> Tensor:
        if what not in self._mapped or self._mapped[what][0] != address:
            self._mapped[what] = (address, attach(address))
        return self._mapped[what][1]


def _views(memory: Tensor, shapes: Iterable[Any]) -> Arrays:
    views, taken = {}, 0
    for name, shape in shapes:
        views[name] = memory[taken : taken + math.prod(shape)].view(shape)
        taken += math.prod(shape)
    return views
