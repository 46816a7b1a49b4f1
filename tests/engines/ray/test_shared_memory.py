"""Memory that a driver shares with actors of its own machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from gossamer.engines.memory import Mappable, attach
from gossamer.engines.ray.shared_memory import Attached, Nearby
from gossamer.engines.slots import write_arrays

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="maps memory by /proc"), pytest.mark.timeout(60)]

CHILD = """
import json, sys
from gossamer.engines.memory import attach
tensor = attach(json.loads(sys.argv[1]))
print(tensor.tolist(), flush=True)
tensor[1] = 5.0
"""


def state() -> dict[str, Tensor]:
    return {"x": torch.arange(4.0)[None], "velocity": torch.full((1, 4), 7.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_another_process_reads_and_writes(dtype: torch.dtype) -> None:
    memory = Mappable(3, dtype)
    memory.tensor[0] = 2.5
    address = str(memory.address).replace("'", '"')
    done = subprocess.run(
        [sys.executable, "-c", CHILD, address], capture_output=True, text=True, timeout=50, check=True
    )
    assert done.stdout.strip() == "[2.5, 0.0, 0.0]"
    assert memory.tensor.tolist() == [2.5, 5.0, 0.0]
    memory.close()
    with pytest.raises(OSError, match="No such file"):
        attach(memory.address)
    assert memory.tensor.tolist() == [2.5, 5.0, 0.0]  # who has it keeps it


def test_state_and_slots() -> None:
    nearby, attached = Nearby(state(), 2, 32), Attached()
    assert all(torch.equal(nearby.state[name], value) for name, value in state().items())
    nearby.state["x"].mul_(2)
    assert attached.state(nearby.address)["x"].tolist() == [[0.0, 2.0, 4.0, 6.0]]
    nearby.begin(())
    number = nearby.slots.take()
    assert number is not None
    places = write_arrays(attached.slot(nearby.address, number), [torch.ones(1, 3), torch.full((1, 1), 2.0)])
    first, second = nearby.take_back({"slot": number, "places": places})
    assert (first.tolist(), second.tolist()) == ([[1.0, 1.0, 1.0]], [[2.0]])
    assert nearby.slots.holds(first)
    assert not nearby.slots.holds(torch.ones(3))
    nearby.close()


def test_a_slot_that_does_not_come_back_is_never_used_again() -> None:
    """Whoever has it may still write to it, when the next round has begun."""
    nearby, straggler, punctual = Nearby(state(), 3, 8), Attached(), Attached()
    nearby.begin(())
    kept, lost = nearby.slots.take(), nearby.slots.take()
    assert kept is not None
    assert lost is not None
    nearby.take_back({"slot": kept, "places": []})
    late, before = straggler.slot(nearby.address, lost), nearby.address["slots"]
    nearby.begin(())
    assert nearby.address["slots"] != before
    taken = [nearby.slots.take() for _ in range(4)]
    assert sorted(number for number in taken if number is not None) == [0, 1, 2]
    late.fill_(float("nan"))
    assert not nearby.slots.memory.isnan().any()
    punctual.slot(nearby.address, 0).fill_(1.0)
    assert nearby.slots.memory[0].tolist() == [1.0] * 8
    nearby.close()
