"""What a peer takes of others: rows of its own phase, of the sender's own number, in the declared shapes."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from gossamer.engines.network.gate import ASK, Gate
from gossamer.errors import Dropped
from gossamer.transport import Address, Header
from gossamer.transport.messages import Spec

ROW: Mapping[str, Spec] = {"x": (torch.float32, (1, 4))}
HEADER = Header("peer-1", "row", Address("run", 3, 0, 1), {}, ROW, 16)


@pytest.fixture
def gate() -> Gate:
    """Return a gate that is open for a row of peer 1 in round 3."""
    made = Gate("run", "row", {"peer-1": 1, "peer-2": 2}.get, threading.Condition())
    made.open((3, 0), {1: ROW})
    return made


def test_the_row_of_the_phase_is_taken(gate: Gate) -> None:
    gate(HEADER)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (replace(HEADER, address=Address("run", 2, 0, 1)), "stale"),
        (replace(HEADER, address=Address("other", 3, 0, 1)), "unexpected"),
        (replace(HEADER, kind="state"), "unexpected"),
        (replace(HEADER, node="peer-2"), "another sender"),
        (replace(HEADER, node="stranger"), "another sender"),
        (replace(HEADER, node="peer-2", address=Address("run", 3, 0, 2)), "unexpected"),
        (replace(HEADER, specs={"x": (torch.float32, (1, 5))}), "wrong arrays"),
        (replace(HEADER, specs={"x": (torch.float64, (1, 4))}), "wrong arrays"),
        (replace(HEADER, specs={}), "wrong arrays"),
        (replace(HEADER, kind=ASK), "wrong arrays"),
    ],
)
def test_others_are_dropped(gate: Gate, header: Header, reason: str) -> None:
    with pytest.raises(Dropped) as caught:
        gate(header)
    assert caught.value.reason == reason


def test_who_goes_on_after_its_row_was_taken_is_not_past(gate: Gate) -> None:
    gate(HEADER)
    early = threading.Thread(target=gate, args=(replace(HEADER, address=Address("run", 4, 0, 1)),))
    early.start()
    while gate.rounds_ahead(1) < 1:
        time.sleep(0.001)
    assert not gate.is_past(1, (3, 0))
    gate.open((4, 0), {1: ROW})
    early.join(60)
    assert not early.is_alive()


def test_what_comes_early_waits(gate: Gate) -> None:
    taken = threading.Event()

    def give() -> None:
        """Send the row of the next round."""
        gate(replace(HEADER, address=Address("run", 4, 0, 1)))
        taken.set()

    thread = threading.Thread(target=give)
    thread.start()
    while not gate.is_past(1, (3, 0)):
        time.sleep(0.001)
    assert gate.rounds_ahead(1) == 1
    assert not taken.wait(0.05)
    gate.open((4, 0), {1: ROW})
    assert taken.wait(60)
    thread.join()
