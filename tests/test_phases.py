"""Rounds of several phases: against slow versions, on every engine, and killed in between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from two_phases import FedLin, LinSteps, MimeLite, TwoGossips

from federation import (
    SINGLY,
    STACKED,
    Injected,
    assert_same,
    configure,
    environment,
    events,
    failing,
    mixed,
    modes,
    relative_error,
)
from gossamer import resume, run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError, Interrupted, QuorumError, StateLost
from gossamer.experiment import Hooks, Run
from gossamer.profiling.spans import Spans
from gossamer.storage.checkpoint import Checkpoints
from gossamer.testing import check_algorithm
from slow import initial_model
from slow_federated import UNEQUAL, Params, add, gradients_of
from slow_peers import LEAST_SQUARES, SlowPeers, decentralized, error, mix

KINDS: dict[str, dict[str, Any]] = {
    "private state": configure({"algorithm": "two_phases:FedLin"}),
    "sub-models": configure(mixed("two_phases:MimeLite", **STACKED)),
    "peers": decentralized({"algorithm": "two_phases:TwoGossips", "peers.topology": "od-equidyn", "train.steps": 1}),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
ROUNDS = 3  # of two phases each


def configured(kind: str, **changes: Any) -> dict[str, Any]:
    config = KINDS[kind]
    return config | {"engine": config["engine"] | changes}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Run each kind of experiment once, and return its run."""
    done: dict[str, Run] = {}

    def get(kind: str) -> Run:
        if kind not in done:
            done[kind] = run(configured(kind), out=tmp_path_factory.mktemp("run") / "undisturbed")
        return done[kind]

    return get


@pytest.mark.parametrize("algorithm", [FedLin({}), MimeLite({}), TwoGossips({})], ids=lambda made: type(made).__name__)
def test_contract(algorithm: Any) -> None:
    check_algorithm(algorithm)


# ---- against the slow version


def slow_fedlin(config: dict[str, Any]) -> Params:
    """Run FedLin by hand in float64, one client and one step at a time."""
    parts = build(parse(config))
    model = {name: value.double() for name, value in initial_model(parts).items()}
    rate = parts.config.train.lr
    for round in range(parts.config.rounds):
        own, changes, (first, second) = {}, [], (parts.planner.plan(round, phase=phase) for phase in range(2))
        for client in first.client.tolist():
            gradients = gradients_of(parts, round, client, 1.0, phase=0)
            own[client] = add(*((1 / len(gradients), gradient(model)) for gradient in gradients))
        shares = first.weight / first.weight.sum()
        mean = add(*((share, own[client]) for share, client in zip(shares, first.client.tolist(), strict=True)))
        for client in second.client.tolist():
            x = add((1.0, model))
            for gradient in gradients_of(parts, round, client, 1.0, phase=1):
                x = add((1.0, x), (-rate, gradient(x)), (rate, own[client]), (-rate, mean))
            changes.append(add((1.0, x), (-1.0, model)))
        model = add((1.0, model), *zip(second.weight / second.weight.sum(), changes, strict=True))
    return model


@pytest.mark.parametrize("mode", [SINGLY, STACKED], ids=["one-by-one", "stacked"])
def test_fedlin(tmp_path: Path, mode: dict[str, bool]) -> None:
    config = configure(UNEQUAL | {"algorithm": "two_phases:FedLin"} | modes(**mode))
    assert relative_error(run(config, out=tmp_path / "run").params, slow_fedlin(config)) < 1e-5


def test_peers(tmp_path: Path) -> None:
    """Both phases mix by the round's W."""
    config = decentralized(LEAST_SQUARES | {"peers.topology": "random-match", "train.steps": 1, "rounds": 4})
    slow = SlowPeers(config)
    for round in range(4):
        matrix = slow.topology.mixing(round).dense()
        rows = np.stack([slow.gradients(round, peer)[0](slow.x[peer]) for peer in range(8)])
        slow.x = mix(matrix, slow.x - slow.rate(round) * mix(matrix, rows))
    config["algorithm"] = "two_phases:TwoGossips"
    done = run(config, out=tmp_path / "run")
    latest = Checkpoints(done.directory / "checkpoints").latest()
    assert latest is not None
    assert error(latest.arrays["state.x"], slow.x) < 1e-9


# ---- the same bits, whoever trains


@pytest.mark.sweep(keep=0.5)
@EACH_KIND
@pytest.mark.parametrize("way", [{"workers": 2}, {"workers": 2, "block_size": 1}, {"block_size": 2}], ids=str)
def test_workers_and_blocks(tmp_path: Path, undisturbed: Callable[[str], Run], kind: str, way: dict[str, Any]) -> None:
    assert_same(run(configured(kind, **way), out=tmp_path / "run"), undisturbed(kind))


# ---- what is planned, counted and logged


class TestRecords:
    def test_costs_are_added_up(self, undisturbed: Callable[[str], Run]) -> None:
        """One array goes up in either phase, one and then two come down, and every sample is used twice."""
        phases = undisturbed("private state")
        plain = run(configure({"rounds": 1}), out=phases.directory.parent / "plain").metrics[0]
        record = phases.metrics[0]
        assert record["total_bytes_up"] == 2 * plain["total_bytes_up"]
        assert record["total_bytes_down"] == 3 * plain["total_bytes_down"]
        assert record["total_client_flops"] == 2 * plain["total_client_flops"]
        assert record["simulated_compute_seconds"] == pytest.approx(2 * plain["simulated_compute_seconds"])
        assert (record["num_participants"], record["num_survivors"]) == (5, 5)
        assert list(record) == list(plain)

    def test_events_name_the_phase(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        assert [event["phase"] for event in events(undisturbed("sub-models").directory, "variant")] == [1] * 3 + [2] * 3
        config = configure({"algorithm": "two_phases:FedLin", "rounds": 1, "clients.per_round": 8})
        config["workload"] = config["workload"] | {"name": "faulty:Faulty", "clients": [2]}
        done = run(config, out=tmp_path / "faulty")
        dropped = events(done.directory, "update-dropped")
        assert dropped == [{"round": 1, "phase": phase, "client": 2, "reason": "not finite"} for phase in (1, 2)]
        assert done.metrics[0]["num_survivors"] == 7

    def test_who_is_late_in_one_phase_is_not_in_the_next(self, tmp_path: Path) -> None:
        slow, quick = ({"profile": {"flops_per_second": speed}} for speed in (1e3, 1e12))
        changes = {
            "devices": [slow, quick],
            "clients": {"num": 8, "per_round": 8, "deadline_seconds": 1.0, "quorum": 0.5},
        }
        config = configure(changes | {"algorithm": "two_phases:FedLin", "rounds": 1})
        first, second = (timed.plan for timed in build(parse(config)).planner.phases(0, 0.0))
        assert (len(first.dropped), len(second.dropped)) == (4, 0)
        assert first.client.tolist() == second.client.tolist()
        done = run(config, out=tmp_path / "run")
        assert [event["phase"] for event in events(done.directory, "dropped")] == [1]
        assert (done.metrics[0]["num_participants"], done.metrics[0]["num_dropped"]) == (4, 4)

    def test_too_few(self, tmp_path: Path) -> None:
        config = configure({"algorithm": "two_phases:FedLin"})
        config["workload"] = config["workload"] | {"name": "faulty:Faulty", "clients": list(range(8))}
        with pytest.raises(QuorumError, match=r"^round 1, phase 1: only 0 of 5 .*; round 0 is committed$"):
            run(config, out=tmp_path / "run")


# ---- interrupted


class TestInterrupted:
    @pytest.mark.sweep(keep=0.34, together=("name", "number", "started"))
    @EACH_KIND
    @pytest.mark.parametrize("started", [True, False], ids=["start", "end"])
    @pytest.mark.parametrize("number", [3, 4])
    @pytest.mark.parametrize("name", ["train", "exchange", "commit"])
    def test_same_bits(
        self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str, name: str, number: int, started: bool
    ) -> None:
        with pytest.raises(Injected):
            run(configured(kind), out=tmp_path / "run", hooks=failing(name, started, number))
        assert_same(resume(tmp_path / "run", overrides=["engine.workers=2"]), undisturbed(kind))

    @EACH_KIND
    def test_commits(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        """After every phase, with what the round has cost so far."""
        with pytest.raises(Injected):
            run(configured(kind), out=tmp_path / "run", hooks=failing("train", True, 4))
        folder = tmp_path / "run" / "checkpoints"
        assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000001-1"]
        latest = Checkpoints(folder).latest()
        assert latest is not None
        assert (latest.round, latest.phase) == (latest.progress["round"], latest.progress["phase"]) == (1, 1)
        assert len(latest.progress["phases"]) == 1
        assert latest.progress["total_bytes_up"] == undisturbed(kind).metrics[0]["total_bytes_up"]
        done = sorted(path.name for path in (undisturbed(kind).directory / "checkpoints").iterdir())
        assert done == ["00000002-1", "00000003"]

    @EACH_KIND
    def test_the_state_is_lost(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        lossy = run(configured(kind), out=tmp_path / "run", hooks=failing("train", True, 4, StateLost))
        assert_same(lossy, undisturbed(kind))
        assert len(events(lossy.directory, "state-lost")) == 1

    def test_a_request_to_stop(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        seen = list[str]()

        def listen(span: str, starts: bool) -> None:
            seen.extend([span] * starts)
            if starts and span == "exchange" and seen.count(span) == 3:
                os.kill(os.getpid(), signal.SIGINT)

        def spans() -> Spans:
            made = Spans()
            made.listeners.append(listen)
            return made

        with pytest.raises(Interrupted, match=r"^stopped after phase 1 of round 2 of 3; resume with"):
            run(configured("private state"), out=tmp_path / "run", hooks=Hooks(spans=spans))
        assert_same(resume(tmp_path / "run"), undisturbed("private state"))

    def test_killed_between_phases(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        """By SIGKILL, before the first phase of round 2 is committed and after."""
        for started in (True, False):
            folder = tmp_path / str(started)
            program = (
                "import os, signal, federation, test_phases, gossamer\n"
                "kill = lambda message: os.kill(os.getpid(), signal.SIGKILL)\n"
                f"hooks = federation.failing('commit', {started}, 4, kill)\n"
                f"gossamer.run(test_phases.configured('private state', workers=2), out={str(folder)!r}, hooks=hooks)"
            )
            killed = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=200, check=False)
            assert killed.returncode == -signal.SIGKILL
            phase = getattr(Checkpoints(folder / "checkpoints").latest(), "phase", None)
            assert phase == (0 if started else 1)
            assert_same(resume(folder), undisturbed("private state"))


# ---- refused


class ForPeers(FedLin):
    def of_phase(self, phase: int) -> Any:
        return TwoGossips({}).of_phase(phase)


class Undeclared(FedLin):
    traits = replace(FedLin.traits, client_arrays=())


class Unfinished(FedLin):
    def of_phase(self, phase: int) -> Any:
        return LinSteps({}) if phase else object()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ForPeers", "phase 0 of algorithm 'test_phases:ForPeers' has downlink = None, but the whole has"),
        ("Undeclared", "phase 0 of algorithm 'test_phases:Undeclared' has client_arrays .'gradient'., which the whole"),
        ("Unfinished", "phase 0 of algorithm 'test_phases:Unfinished' is a object without traits, optimizer, init,"),
    ],
)
def test_phases_that_contradict_the_whole(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse(configure({"algorithm": f"test_phases:{name}"})))
