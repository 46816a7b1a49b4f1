"""Federations over a network that are recorded: each process writes a trace, and its bytes are those of the wire."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import gossamer
from federation import assert_same, configure
from gossamer.engines.network.engine import NetworkEngine
from gossamer.profiling.graphs import messages_of
from gossamer.profiling.trace import Trace, read_trace, stage_totals
from gossamer.reports.profile import examine
from gossamer.transport import Traffic
from traces import unattributed


class Recorded(NamedTuple):
    """A run of two processes of clients and a server, and what the server counted."""

    run: gossamer.Run
    traffic: dict[str, Traffic]

    @property
    def trace(self) -> Trace:
        """What was recorded."""
        return read_trace(self.run.directory)

    def bytes_of(self, kind: str, process: str) -> Counter[str]:
        """Return the bytes of messages that were on the wire, as spans of a kind of process say."""
        found = Counter[str]()
        for path in (self.run.directory / "trace").glob(f"{process}-*.jsonl"):
            for span in map(json.loads, path.read_text().splitlines()[1:]):
                if isinstance(span, list) and span[0] == kind and ":" not in span[7]:
                    found[span[7]] += span[6]
        return found


CONFIG = configure({"engine.workers": 2, "rounds": 4, "workload.model.hidden": [256]})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Run and record, and note what the server counted."""
    noted: dict[str, Traffic] = {}
    close = NetworkEngine.close

    def noting(engine: NetworkEngine) -> None:
        """Close the engine, and note its traffic."""
        close(engine)
        noted.update(engine._server.traffic())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkEngine, "close", noting)
        config = CONFIG | {"engine": CONFIG["engine"] | {"name": "network"}, "profile": True}
        return Recorded(gossamer.run(config, out=tmp_path_factory.mktemp("run") / "run"), noted)


def test_bits(recorded: Recorded, tmp_path: Path) -> None:
    assert_same(recorded.run, gossamer.run(CONFIG, out=tmp_path / "local"))


def test_bytes_are_those_that_the_transport_counts(recorded: Recorded) -> None:
    sent = recorded.bytes_of("send", "driver"), recorded.bytes_of("send", "client")
    received = recorded.bytes_of("receive", "client"), recorded.bytes_of("receive", "driver")
    counted = [sum(one.sent_bytes for one in recorded.traffic.values())]
    counted += [sum(one.received_bytes for one in recorded.traffic.values())]
    for outgoing, incoming, num_bytes in zip(sent, received, counted, strict=True):
        assert outgoing.total() == pytest.approx(num_bytes, rel=0.01)
        both = {
            name for name in outgoing.keys() & incoming.keys() if "<end." not in name
        }  # after which clients hang up
        assert len(both) > 0.9 * len(outgoing)
        assert {name: outgoing[name] for name in both} == {name: incoming[name] for name in both}


def test_processes_are_linked_and_add_up(recorded: Recorded) -> None:
    trace = recorded.trace
    assert [one.number for one in trace.rounds] == [1, 2, 3, 4]
    last = trace.rounds[-1]
    assert {lane.name for lane in last.lanes if lane.is_main} == {"driver", "client-0", "client-1"}
    for segments in last.lanes.values():
        assert sum(segment.seconds for segment in segments) == pytest.approx(last.seconds, rel=1e-3)
    totals = stage_totals(trace.rounds)
    assert {"train", "send", "wait", "receive", "checksum", "serialise", "record"} <= totals.keys()
    _, arrivals = messages_of(last)  # which of them were waited for depends on who was quicker
    assert {arrival.sender.process for arrival in arrivals} == {"driver", "client"}
    linked = {(arrival.sender.process, arrival.lane.process) for arrival in arrivals}
    assert linked == {("driver", "driver"), ("driver", "client"), ("client", "client"), ("client", "driver")}
    assert examine(trace).replay_error < 0.03


def test_little_is_unattributed(recorded: Recorded) -> None:
    assert min(map(unattributed, recorded.trace.rounds)) < 0.2  # a gap between spans would be in every round
