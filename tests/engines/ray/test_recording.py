"""Runs on Ray that are recorded: actors write traces of their own, linked to the driver's, and bits stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gossamer import run
from gossamer.profiling.graphs import messages_of
from gossamer.profiling.trace import read_trace
from gossamer.reports.profile import examine

pytestmark = pytest.mark.usefixtures("one_ray")

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 300}, "model": "softmax"}
CLIENTS: dict[str, Any] = {"clients": {"num": 8, "per_round": 6}}
PEERS: dict[str, Any] = {"peers": {"num": 8, "topology": "ring"}}


@pytest.mark.parametrize("config", [CLIENTS, PEERS], ids=["clients", "peers"])
def test_actors_are_recorded(tmp_path: Path, config: dict[str, Any]) -> None:
    config = config | {"rounds": 3, "workload": IMAGES, "train": {"lr": 0.1, "epochs": 2}}
    plain = run(config | {"engine": {"name": "local", "workers": 0}}, out=tmp_path / "plain")
    found = run(config | {"engine": {"name": "ray", "workers": 2}, "profile": True}, out=tmp_path / "ray")
    for name, value in plain.params.items():
        assert value.allclose(found.params[name], rtol=1e-5)
    trace = read_trace(found.directory)
    assert [one.number for one in trace.rounds] == [1, 2, 3]
    last = trace.rounds[-1]
    assert {lane.process for lane in last.lanes} == {"actor", "driver"}
    _, arrivals = messages_of(last)  # whether a wait is among them depends on who was quicker
    assert {(arrival.sender.process, arrival.lane.process) for arrival in arrivals} == {
        ("actor", "driver"),
        ("driver", "actor"),
    }
    assert examine(trace).replay_error < 0.03
