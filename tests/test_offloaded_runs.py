"""Runs of which a side-car does one stage: the same bits, whatever happens to it, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from federation import LEVELS, SCAFFOLD, SINGLY, STACKED, assert_same, configure, mixed, modes
from gossamer import resume, run
from gossamer.errors import ConfigError, EngineError
from gossamer.experiment import Hooks
from gossamer.profiling.trace import read_trace
from gossamer.round_record import Observer
from slow_peers import LEAST_SQUARES, decentralized

CLIENTS = {
    "whole": {},
    "windows": mixed("fedrolex", **STACKED),
    "own-windows": mixed("federated-dropout", **STACKED),
    "scalars": {"algorithm": "fednova"},
    "rows": mixed("hetlora", **SINGLY)
    | {"workload.model": "user_modules:Tokens", "workload.lora": {"rank": 4, "targets": ["hidden"]}},
    "private-state": SCAFFOLD | {"clients.num": 4},
}
PEERS: dict[str, dict[str, Any]] = {
    "ring": {},
    "scalars": {"algorithm": "push-sum", "peers.topology": "slow_peers:pushing"},
    "two-rows": {"algorithm": "dsgd-ceca", "peers.topology": "ceca"},
    "windows": {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}} | modes(LEVELS, **STACKED),
    "d2": LEAST_SQUARES | {"algorithm": "d2", "train.steps": 1, "peers.topology": {"name": "ring", "lazy": True}},
}

CODED: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "top-k": (configure, {"communication.uplink": {"name": "top-k", "share": 0.1}}),
    "unbiased": (configure, {"communication.uplink": {"name": "int8", "rounding": "stochastic"}}),
    "windows": (configure, mixed("fedrolex", **STACKED) | {"communication.uplink": {"name": "low-rank", "rank": 2}}),
    "feedback": (configure, {"communication.uplink": "sign"}),
    "peers": (decentralized, {"algorithm": "choco-sgd"}),
}

RAY = {"engine.name": "ray", "engine.workers": 2}


def offload(stage: str, device: str = "emulated", **options: str) -> dict[str, Any]:
    """Return the change that moves a stage."""
    return {"offload": {"stage": stage, "device": device, **options}}


class Killer(Observer):
    """Kills the side-car, the only child of a run without workers, after some rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def on_round(self, record: dict[str, Any]) -> None:
        """Kill it in time."""
        if record["round"] == self.rounds:
            (process,) = multiprocessing.active_children()
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()

    def on_block(self, round: int, done: int, total: int) -> None:
        """Do nothing."""


def killed(config: dict[str, Any], directory: Path) -> None:
    """Run an experiment the side-car of which is killed after two rounds."""
    with pytest.raises(
        EngineError, match=r"the side-car process \d+, which does \w+, ended( with exit code -9)?: resume"
    ):
        run(config, out=directory, hooks=Hooks(observer=lambda name, number: Killer(2)))
    assert not multiprocessing.active_children()


class TestSameBits:
    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("kind", CLIENTS)
    def test_aggregate(self, tmp_path: Path, kind: str, workers: int) -> None:
        changes = CLIENTS[kind] | {"engine.workers": workers}
        found = run(configure(changes | offload("aggregate")), out=tmp_path / "a")
        assert_same(found, run(configure(CLIENTS[kind]), out=tmp_path / "b"))

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("kind", PEERS)
    def test_mix(self, tmp_path: Path, kind: str, workers: int) -> None:
        changes = PEERS[kind] | {"engine.workers": workers}
        found = run(decentralized(changes | offload("mix")), out=tmp_path / "a")
        assert_same(found, run(decentralized(PEERS[kind]), out=tmp_path / "b"))

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("kind", CODED)
    def test_compress(self, tmp_path: Path, kind: str, workers: int) -> None:
        make, changes = CODED[kind]
        found = run(make(changes | {"engine.workers": workers} | offload("compress")), out=tmp_path / "a")
        assert_same(found, run(make(changes), out=tmp_path / "b"))

    @pytest.mark.parametrize("stage", ["checkpoint", "checksum", "log"])
    @pytest.mark.parametrize("make", [configure, decentralized])
    def test_stored(self, tmp_path: Path, stage: str, make: Callable[..., dict[str, Any]]) -> None:
        found, plain = run(make(offload(stage)), out=tmp_path / "a"), run(make(), out=tmp_path / "b")
        assert_same(found, plain)
        commits = [sorted(path.name for path in (one.directory / "checkpoints").iterdir()) for one in (found, plain)]
        assert commits[0] == commits[1]
        assert_same(resume(found.directory), plain)

    @pytest.mark.timeout(300)
    @pytest.mark.usefixtures("one_ray")
    @pytest.mark.sweep(keep=0.4)
    @pytest.mark.parametrize(
        ("stage", "kind"),
        [
            ("aggregate", "rows"),
            ("aggregate", "private-state"),
            ("checkpoint", "peers"),
            ("checksum", "windows"),
            ("log", "peers"),
        ],
    )
    def test_on_ray(self, tmp_path: Path, stage: str, kind: str) -> None:
        make, changes = (decentralized, {}) if kind == "peers" else (configure, CLIENTS[kind])
        found = run(make(changes | RAY | offload(stage)), out=tmp_path / "a")
        assert_same(found, run(make(changes), out=tmp_path / "b"))

    @pytest.mark.timeout(300)
    def test_on_a_ray_that_is_started_for_the_run(self, tmp_path: Path) -> None:
        changes = CLIENTS["windows"]
        found = run(configure(changes | RAY | offload("aggregate")), out=tmp_path / "a")
        assert_same(found, run(configure(changes), out=tmp_path / "b"))
        assert not multiprocessing.active_children()


class TestInterrupted:
    @pytest.mark.parametrize("stage", ["aggregate", "compress", "checksum", "checkpoint", "log"])
    def test_a_killed_side_car_ends_the_run_and_a_resume_ends_as_if_nothing_had_happened(
        self, tmp_path: Path, stage: str
    ) -> None:
        changes = {"rounds": 4} | CODED["unbiased"][1]
        plain = run(configure(changes), out=tmp_path / "plain")
        killed(configure(changes | offload(stage)), tmp_path / "a")
        assert_same(resume(tmp_path / "a"), plain)

    def test_a_resume_may_take_the_stage_back(self, tmp_path: Path) -> None:
        changes = {"rounds": 4}
        killed(decentralized(changes | offload("mix")), tmp_path / "a")
        assert_same(
            resume(tmp_path / "a", overrides=["offload=null"]), run(decentralized(changes), out=tmp_path / "plain")
        )


@pytest.mark.parametrize(("stage", "kind"), [("aggregate", "aggregate"), ("checkpoint", "checkpoint"), ("log", "log")])
def test_the_side_car_records_its_stage(tmp_path: Path, stage: str, kind: str) -> None:
    found = run(configure({"profile": True} | offload(stage)), out=tmp_path / "a")
    spans = [
        segment.kind
        for one in read_trace(found.directory).rounds
        for lane, segments in one.lanes.items()
        for segment in segments
        if lane.process == "side-car"
    ]
    assert kind in spans


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            (offload("agregate"), "offload.stage"),
            (offload("aggregate", "bluefield-9"), "unknown device 'bluefield-9'"),
            (offload("aggregate", engine="deflate"), "has no such engine for aggregate (it has no engines)"),
            (offload("aggregate", "bluefield-2", engine="deflat"), "did you mean 'deflate'"),
            (offload("mix"), "clients of a server do not mix"),
            (SCAFFOLD | offload("checkpoint"), "clients keep private state"),
            (RAY | CODED["top-k"][1] | offload("compress"), "engine 'ray' hands it to no side-car, because actors"),
            ({"engine.name": "network"} | offload("log"), "engine 'network' hands nothing to a side-car"),
            (offload("compress"), "through a codec: its stages are aggregate, checkpoint, checksum, log"),
            ({"offload": {"stage": "log"}}, "offload.device"),
        ],
    )
    def test_of_clients_is_one_sentence(self, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigError) as caught:
            run(configure(changes), out=tmp_path / "a")
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_of_peers_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="peers have no server that aggregates"):
            run(decentralized(offload("aggregate")), out=tmp_path / "a")

    def test_rows_of_actors_are_not_mixed_elsewhere(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"engine 'ray' hands it to no side-car, .* one of checkpoint"):
            run(decentralized(RAY | offload("mix")), out=tmp_path / "a")

    def test_a_device_quicker_than_this_machine_is_refused(self, tmp_path: Path) -> None:
        text = Path("src/gossamer/profiling/profiles/emulated.yaml").read_text()
        (tmp_path / "quick.yaml").write_text(text.replace("value: 3, lo: 3", "value: 0.5, lo: 0.5"))
        with pytest.raises(ConfigError, match=r"2 times as quickly as this machine .* cannot emulate"):
            run(configure(offload("aggregate", str(tmp_path / "quick.yaml"))), out=tmp_path / "a")
