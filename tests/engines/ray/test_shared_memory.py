"""Memory that a driver shares with actors of its own machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from gossamer.engines.ray.shared_memory import AttachedMemory, SharedMemory
from gossamer.engines.slots import write_arrays
from gossamer.shared_memory import Mappable, attach

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory by /proc")

CHILD = """
import json, sys
from gossamer.shared_memory import attach
tensor = attach(json.loads(sys.argv[1]))
print(tensor.tolist(), flush=True)
tensor[1] = 5.0
"""


def state() -> dict[str, Tensor]:
    return {"x": torch.arange(4.0)[None], "velocity": torch.full((1, 4), 7.0)}


@pytest.mark.sweep(keep=0.5, at_least=1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_another_process_reads_and_writes(dtype: torch.dtype) -> None:
    memory = Mappable(3, dtype)
    memory.tensor[0] = 2.5
    address = str(memory.address).replace("'", '"')
    done = subprocess.run(
        [sys.executable, "-c", CHILD, address], capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.strip() == "[2.5, 0.0, 0.0]"
    assert memory.tensor.tolist() == [2.5, 5.0, 0.0]
    memory.close()
    with pytest.raises(OSError, match="No such file"):
        attach(memory.address)
    assert memory.tensor.tolist() == [2.5, 5.0, 0.0]  # who has it keeps it


def test_state_and_slots() -> None:
    shared, attached = SharedMemory(state(), 2, 32), AttachedMemory()
    assert all(torch.equal(shared.state[name], value) for name, value in state().items())
    shared.state["x"].mul_(2)
    assert attached.state(shared.address)["x"].tolist() == [[0.0, 2.0, 4.0, 6.0]]
    shared.begin(())
    number = shared.slots.take()
    assert number is not None
    extents = write_arrays(attached.slot(shared.address, number), [torch.ones(1, 3), torch.full((1, 1), 2.0)])
    first, second = shared.take_back({"slot": number, "extents": extents})
    assert (first.tolist(), second.tolist()) == ([[1.0, 1.0, 1.0]], [[2.0]])
    assert shared.slots.holds(first)
    assert not shared.slots.holds(torch.ones(3))
    shared.close()


def test_a_slot_that_does_not_come_back_is_never_used_again() -> None:
    """Whoever has it may still write to it, when the next round has begun."""
    shared, straggler, punctual = SharedMemory(state(), 3, 8), AttachedMemory(), AttachedMemory()
    shared.begin(())
    kept, lost = shared.slots.take(), shared.slots.take()
    assert kept is not None
    assert lost is not None
    shared.take_back({"slot": kept, "extents": []})
    late, before = straggler.slot(shared.address, lost), shared.address["slots"]
    shared.begin(())
    assert shared.address["slots"] != before
    taken = [shared.slots.take() for _ in range(4)]
    assert sorted(number for number in taken if number is not None) == [0, 1, 2]
    late.fill_(float("nan"))
    assert not shared.slots.memory.isnan().any()
    punctual.slot(shared.address, 0).fill_(1.0)
    assert shared.slots.memory[0].tolist() == [1.0] * 8
    shared.close()
