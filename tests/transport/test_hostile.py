"""Bad messages are dropped, whatever they are; the good ones before and after them are taken."""

from __future__ import annotations

from collections import Counter

import torch

from gossamer.transport import Joined, Received, Server
from hostile_messages import EXPECTED, KINDS, LIMITS, ROW, TAKEN, Attacker, cases, expectations, good

NUMBER = 7 * len(KINDS)


def test_bad_messages() -> None:
    with Server("127.0.0.1:0", limits=LIMITS, accept=expectations()) as server:
        attacker = Attacker(server.address)
        assert isinstance(server.receive(20), Joined)
        assert attacker.send(good(TAKEN)) == "taken"
        assert isinstance(server.receive(20), Received)
        answers = Counter((name, attacker.send(frames)) for name, frames in cases(NUMBER, "test"))
        assert {name for name, _ in answers} == set(KINDS)
        assert [case for case in answers if case[1] == "taken"] == []
        assert [case for case in answers if case[1] in ("failed: INTERNAL", "failed: UNKNOWN")] == []
        assert server.receive(0.0) is None
        assert attacker.send(good(EXPECTED)) == "taken"
        found = server.receive(20)
        assert isinstance(found, Received)
        assert torch.equal(found.message.arrays["row"], ROW)
        attacker.close()
