"""Whole runs of peers: what interrupts them, what goes wrong on them, and which configurations are refused."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from federation import LEVELS, SINGLY, STACKED, Injected, assert_same, digest, environment, events, failing, modes
from gossamer import resume, run
from gossamer.cli.main import app
from gossamer.errors import Interrupted, QuorumError
from gossamer.experiment import Hooks, Run
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_metrics
from slow_peers import LEAST_SQUARES, SlowPeers, decentralized

ROUNDS = 4
KINDS: dict[str, dict[str, Any]] = {
    "windows": {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}, "train.momentum": 0.9}
    | modes(LEVELS, **STACKED),
    "choco-sgd": {"algorithm": {"name": "choco-sgd", "compressor": {"name": "random-k", "share": 0.2}}},
    "push-sum": {"algorithm": "push-sum", "peers.topology": "slow_peers:pushing"},
    "quasi-global-momentum": {"algorithm": "quasi-global-momentum", "train.momentum": 0.9},
    "d2": LEAST_SQUARES | {"algorithm": "d2", "train.steps": 1, "peers.topology": {"name": "ring", "lazy": True}},
}
RARE = {"checkpoint.every_seconds": 1000}


def configured(kind: str, **changes: Any) -> dict[str, Any]:
    return decentralized(KINDS[kind] | {"rounds": ROUNDS} | changes)


def last_commit(directory: Path) -> int:
    latest = Checkpoints(directory / "checkpoints").latest()
    assert latest is not None
    return latest.round


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Run each kind once, and return its run."""
    done: dict[str, Run] = {}

    def get(kind: str) -> Run:
        if kind not in done:
            done[kind] = run(configured(kind), out=tmp_path_factory.mktemp(kind))
        return done[kind]

    return get


class Signalling:
    """An observer that raises a signal when the first block of a round is trained."""

    def __init__(self, round: int, number: signal.Signals) -> None:
        self.round, self.number = round, number

    def on_block(self, round: int, done: int, total: int) -> None:
        """Raise the signal once."""
        if round == self.round:
            self.round = -1
            signal.raise_signal(self.number)

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Watch."""


class TestInterrupted:
    @pytest.mark.sweep(keep=0.5, together=("name", "started"))
    @pytest.mark.parametrize("started", [True, False], ids=["start", "end"])
    @pytest.mark.parametrize("name", ["train", "exchange", "evaluate", "commit"])
    @pytest.mark.parametrize("kind", ["windows", "choco-sgd"])
    def test_in_every_phase(
        self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str, name: str, started: bool
    ) -> None:
        with pytest.raises(Injected):
            run(configured(kind), out=tmp_path / "run", hooks=failing(name, started, 3))
        assert last_commit(tmp_path / "run") == 2 - (name == "commit" and started)  # the first is of the initial model
        assert_same(resume(tmp_path / "run"), undisturbed(kind))

    @pytest.mark.parametrize("kind", KINDS)
    def test_half_a_round_is_lost(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        """Models were trained in place, and whatever the algorithm keeps with them."""
        with pytest.raises(Injected):
            run(configured(kind, **RARE), out=tmp_path / "run", hooks=failing("train", False, 3))
        assert last_commit(tmp_path / "run") == 0
        with pytest.raises(Injected):
            resume(tmp_path / "run", failing("exchange", True, 2))
        assert_same(resume(tmp_path / "run"), undisturbed(kind))

    @pytest.mark.parametrize("kind", ["windows", "push-sum"])
    def test_with_other_workers(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        with pytest.raises(Injected):
            run(configured(kind, **{"engine.workers": 2}), out=tmp_path / "run", hooks=failing("exchange", True, 2))
        path = tmp_path / "run/config.yaml"
        path.write_text(path.read_text().replace("workers: 2", "workers: 0"))
        assert_same(resume(tmp_path / "run"), undisturbed(kind))

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_asked_to_stop(
        self, tmp_path: Path, undisturbed: Callable[[str], Run], number: signal.Signals, workers: int
    ) -> None:
        """The round in which that happens is finished and committed."""
        hooks = Hooks(observer=lambda name, num_rounds: Signalling(1, number))
        small_blocks = {"engine.workers": workers, "engine.block_size": 2}
        with pytest.raises(Interrupted, match=r"^stopped after round 2 of 4; resume with: gossamer resume "):
            run(configured("windows", **RARE, **small_blocks), out=tmp_path / "run", hooks=hooks)
        assert last_commit(tmp_path / "run") == len(read_metrics(tmp_path / "run")) == 2
        assert_same(resume(tmp_path / "run"), undisturbed("windows"))

    @pytest.mark.sweep(keep=0.5, at_least=1)
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
    def test_signals_to_all_processes(
        self, tmp_path: Path, undisturbed: Callable[[str], Run], number: signal.Signals
    ) -> None:
        """As Ctrl-C does, or a machine that runs out of memory."""
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(configured("windows", **{"engine.workers": 2})))
        program = """
import os, sys
from gossamer.experiment import Hooks, run
class Observer:
    def on_block(self, round, done, total):
        if (round, done) == (2, total): os.killpg(0, int(sys.argv[3]))
    def on_round(self, record): pass
run(sys.argv[1], out=sys.argv[2], hooks=Hooks(observer=lambda name, num_rounds: Observer()))
"""
        arguments = [str(tmp_path / "e.yaml"), str(tmp_path / "run"), str(int(number))]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
            env=environment(),
            start_new_session=True,
        )
        if number == signal.SIGINT:
            assert "Interrupted: stopped after round 3 of 4" in done.stderr
        else:
            assert done.returncode == -signal.SIGKILL
        assert last_commit(tmp_path / "run") == (3 if number == signal.SIGINT else 2)
        assert_same(resume(tmp_path / "run"), undisturbed("windows"))


def faulty(changes: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return peers with the faulty workload; `options` are those of the plug-in."""
    workload = {"workload.name": "faulty:Faulty"} | {f"workload.{key}": value for key, value in options.items()}
    return decentralized(workload | dict(changes or {}))


class Idling(SlowPeers):
    """Peers of whom one takes no steps."""

    def batches(self, round: int, peer: int) -> list[list[int]]:
        """Return no batches for peer 5."""
        return [] if peer == 5 else super().batches(round, peer)


class TestNotFinite:
    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize(("workers", "block_size"), [(0, "auto"), (0, 1), (2, 2)])
    @pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
    def test_who_is_dropped_idles_but_mixes(
        self, tmp_path: Path, mode: dict[str, bool], workers: int, block_size: int | str
    ) -> None:
        way = modes(**mode) | {"engine.workers": workers, "engine.block_size": block_size}
        done = run(faulty(way, clients=[5]), out=tmp_path / "run")
        slow = Idling(decentralized(way))
        expected = slow.parts.workload.layout.views(torch.from_numpy(slow.run()[-1].mean(0)))
        for name, value in done.params.items():
            assert float((value - expected[name]).norm()) < 1e-5 * float(expected[name].norm())
        assert events(done.directory, "update-dropped") == [
            {"round": round, "client": 5, "reason": "not finite"} for round in (1, 2, 3)
        ]
        assert [record["num_survivors"] for record in done.metrics] == [7, 7, 7]
        healthy = run(decentralized(way), out=tmp_path / "healthy")
        assert digest(healthy.params) != digest(done.params)

    @pytest.mark.parametrize("kind", ["choco-sgd", "push-sum", "quasi-global-momentum"])
    def test_one_fault_and_what_follows(self, tmp_path: Path, kind: str) -> None:
        """Nothing that is not finite gets into any state, from which it would spread."""
        flag = tmp_path / "flag"
        flag.touch()

        class Recovering:
            """Ends the fault after the first round."""

            def on_block(self, round: int, done: int, total: int) -> None:
                """Watch."""

            def on_round(self, record: Mapping[str, Any]) -> None:
                """Remove the flag."""
                flag.unlink(missing_ok=True)

        config = faulty(KINDS[kind], clients=[0, 5], flag=str(flag))
        done = run(config, out=tmp_path / "run", hooks=Hooks(observer=lambda name, num_rounds: Recovering()))
        assert [record["num_survivors"] for record in done.metrics] == [6, 8, 8]
        latest = Checkpoints(done.directory / "checkpoints").latest()
        assert latest is not None
        assert all(bool(torch.isfinite(value).all()) for value in latest.arrays.values())
        assert done.metrics[-1]["loss"] < done.metrics[0]["loss"]

    @pytest.mark.sweep(keep=0.34)
    @pytest.mark.parametrize(("workers", "block_size"), [(0, "auto"), (0, 1), (2, 2)])
    @pytest.mark.parametrize("kind", ["windows", "choco-sgd", "push-sum", "quasi-global-momentum"])
    def test_too_large_is_as_bad(self, tmp_path: Path, kind: str, workers: int, block_size: int | str) -> None:
        way = KINDS[kind] | {"engine.workers": workers, "engine.block_size": block_size, "train.steps": 1}
        lost = run(faulty(way, clients=[0, 5], fault="nan"), out=tmp_path / "lost")
        done = run(faulty(way, clients=[0, 5], fault="huge"), out=tmp_path / "run")
        assert digest(done.params) == digest(lost.params)
        assert [record["dropped"] for record in done.metrics] == [{"too large": 2}] * 3
        assert [record["train_loss"] for record in done.metrics] == [record["train_loss"] for record in lost.metrics]

    def test_an_infinite_loss_is_logged_as_such(self, tmp_path: Path) -> None:
        done = run(faulty(clients=[5], fault="infinite"), out=tmp_path / "run")
        assert [record["train_loss"] for record in done.metrics] == [math.inf] * 3

    def test_half_trained_models_are_not_committed(self, tmp_path: Path) -> None:
        """Even where the last commit is some rounds back."""
        flag = tmp_path / "flag"
        flag.touch()
        config = faulty(RARE, clients=[0, 1, 2, 4, 7], first_round=2, flag=str(flag))
        with pytest.raises(QuorumError):
            run(config, out=tmp_path / "run")
        flag.unlink()
        assert_same(resume(tmp_path / "run"), run(config, out=tmp_path / "undisturbed"))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_too_many(self, tmp_path: Path, workers: int) -> None:
        """Half a round was trained: it is not committed, and done again when resumed."""
        flag = tmp_path / "flag"
        flag.touch()
        config = faulty({"engine.workers": workers}, clients=[0, 1, 2, 4, 7], first_round=2, flag=str(flag))
        for attempt in (lambda: run(config, out=tmp_path / "run"), lambda: resume(tmp_path / "run")):
            with pytest.raises(QuorumError, match=r"round 3: only 3 of 8 updates are usable and .*quorum asks for 4"):
                attempt()
            assert last_commit(tmp_path / "run") == len(read_metrics(tmp_path / "run")) == 2
        done = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
        assert (done.exit_code, done.stdout) == (2, "")
        *imported, sentence = done.stderr.splitlines()
        assert sentence.startswith("error: round 3: only 3 of 8 updates are usable")
        assert all("importing" in line for line in imported)
        flag.unlink()
        assert_same(resume(tmp_path / "run"), run(config, out=tmp_path / "undisturbed"))

    def test_too_many_between_commits(self, tmp_path: Path) -> None:
        with pytest.raises(QuorumError) as caught:
            run(faulty(RARE, clients=[0, 1, 2, 4, 7], first_round=2), out=tmp_path / "run")
        assert f"round {last_commit(tmp_path / 'run')} is committed" in str(caught.value)
        assert "lower peers.quorum" in str(caught.value)

    @pytest.mark.parametrize(("quorum", "enough"), [(0.5, True), (0.51, False), (0.0, True)])
    def test_quorum(self, tmp_path: Path, quorum: float, enough: bool) -> None:
        config = faulty({"peers.quorum": quorum, "rounds": 1}, clients=[0, 1, 2, 3])
        if enough:
            assert run(config, out=tmp_path / "run").metrics[0]["num_survivors"] == 4
        else:
            with pytest.raises(QuorumError):
                run(config, out=tmp_path / "run")


class TestMeasuredModes:
    """Whatever is trained can be timed, too."""

    @pytest.mark.parametrize("algorithm", ["dsgd", "dsgt", "push-sum", "choco-sgd"])
    def test_convolutions(self, tmp_path: Path, algorithm: str) -> None:
        changes = {"workload.model": {"name": "cnn", "width": 0.125}, "engine.modes": "auto", "rounds": 1}
        assert len(run(decentralized(changes | {"algorithm": algorithm}), out=tmp_path / "run").metrics) == 1

    @pytest.mark.parametrize("changes", [{"workload.model": {"name": "cnn", "width": 0.125}}, KINDS["windows"]])
    def test_numbers_of_a_peer(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        config = changes | {"rounds": 1, "engine.modes": "auto"} | KINDS["quasi-global-momentum"]
        assert len(run(decentralized(config), out=tmp_path / "run").metrics) == 1


DISCONNECTED = "<graphml><graph edgedefault='undirected'>{}<edge source='a' target='b'/></graph></graphml>"


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"clients": {"num": 8, "per_round": 2}}, "clients and peers are given: give clients .* or peers"),
            ({"peers": None}, "neither clients nor peers are given: give clients .* or peers"),
            ({"algorithm": "fedavg"}, "algorithm 'fedavg' needs a server: give clients instead of peers, or"),
            (
                {"peers": None, "clients": {"num": 8, "per_round": 2}},
                "algorithm 'dsgd' has no server: give peers and their topology instead of clients, or",
            ),
            ({"submodel.mask_labels": True}, "submodel.mask_labels = True needs a server .*: leave it out for peers"),
            ({"peers.topology": "rnig"}, r"unknown topology 'rnig'; did you mean 'ring'\? "),
            ({"peers.topology": {"name": "ring", "M": 3}}, "unknown key 'ring.M' "),
            ({"peers.topology": None}, r"peers\.topology = None: give a name"),
            ({"peers.num": 2}, "topology 'ring' with n = 2: n must be a whole number, 3 or more"),
            ({"peers.num": 1}, r"peers\.num = 1: "),
            ({"peers": {"topology": "ring"}}, "topology 'ring' needs the number of peers: give n"),
            ({"peers.num": 7, "peers.topology": "grid"}, "'grid' cannot arrange n = 7 peers in a rectangle"),
            ({"peers.num": 7, "peers.topology": "hypercube"}, "'hypercube' .*7"),
            ({"peers.merge_every": 0}, r"peers\.merge_every = 0: "),
            ({"peers.quorum": 2}, r"peers\.quorum = 2: "),
            ({"peers.per_round": 2}, r"unknown key 'peers\.per_round'"),
            ({"evaluation.num_peers": -1}, r"evaluation\.num_peers = -1: "),
            (
                {"device": "phone-mid"},
                "device 'phone-mid' is not always available, but all peers train .*: set its availability to always",
            ),
            ({"devices": [{"profile": {"availability": {"trace": [[1, 1]]}}}]}, "device 'device' is not always avail"),
            ({"peers.deadline_seconds": 1.0}, "unknown key 'peers.deadline_seconds'"),
            ({"peers.topology": "no.txt"}, r"cannot read the graph 'no\.txt' "),
            ({"peers.topology": "no.yaml"}, r"cannot read topology 'no\.yaml' "),
            (
                {"algorithm": "d2"},
                "algorithm 'd2' takes one local step a round, because .*: set train.steps to 1 instead",
            ),
            ({"algorithm": "exact-diffusion", "train.steps": 2}, "set train.steps to 1 instead of train.steps = 2"),
            ({"algorithm": "dsgt", "train.momentum": 0.5}, "DSGT does not go with train.momentum = 0.5, because"),
            (
                {"algorithm": "dsgd-ceca"},
                "DSGDCECA does not go with topology 'ring', because .*: choose topology 'ceca'",
            ),
            (
                {"peers.topology": "ceca"},
                "DSGD does not go with topology 'ceca', because .*: take algorithm 'dsgd-ceca'",
            ),
            ({"workload.dataset.num_train": 5}, "5 training samples cannot give 8 clients 1 or more each"),
        ],
        ids=str,
    )
    def test_one_sentence(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        self.refuse(tmp_path, decentralized(changes), message)

    def test_a_disconnected_network(self, tmp_path: Path) -> None:
        path = tmp_path / "network.graphml"
        path.write_text(DISCONNECTED.format("".join(f"<node id='{name}'/>" for name in "abc")))
        section = {"topology": {"name": "file", "path": str(path)}}
        message = r"'.*network\.graphml' is not connected: peers of different parts never agree; give"
        self.refuse(tmp_path, decentralized({"peers": section}), message)

    def test_a_network_of_another_size(self, tmp_path: Path) -> None:
        path = tmp_path / "network.graphml"
        path.write_text(DISCONNECTED.format("".join(f"<node id='{name}'/>" for name in "ab")))
        section = {"num": 8, "topology": {"name": "file", "path": str(path)}}
        self.refuse(tmp_path, decentralized({"peers": section}), "has 2 peers, but n = 8 was asked for: leave n out")

    @pytest.mark.parametrize("merge", ["merge_every = 2", "final_merge = True"])
    @pytest.mark.parametrize("kind", ["choco-sgd", "d2"])
    def test_merges_that_would_break_the_method(self, tmp_path: Path, kind: str, merge: str) -> None:
        option, _, value = merge.partition(" = ")
        config = configured(kind, **{f"peers.{option}": yaml.safe_load(value)})
        self.refuse(tmp_path, config, rf"algorithm '{kind}' does not go with peers\.{merge}, because .*: leave it out")

    def test_a_final_merge_that_is_none(self, tmp_path: Path) -> None:
        changes = {"algorithm": {"name": "dsgd", "order": "combine-while-adapt"}, "peers.final_merge": True}
        self.refuse(tmp_path, decentralized(changes), r"does not go with peers\.final_merge = True, because")

    def test_windows_and_negative_weights(self, tmp_path: Path) -> None:
        path = tmp_path / "star.graphml"
        links = "".join(f"<node id='{i}'/><edge source='0' target='{i}'/>" for i in range(1, 7))
        path.write_text(f"<graphml><graph edgedefault='undirected'><node id='0'/>{links}</graph></graphml>")
        section = {"topology": {"name": "file", "path": str(path), "weights": "fastest"}}
        self.refuse(tmp_path, decentralized(KINDS["windows"] | {"peers": section}), "negative")

    def test_windows_by_rank(self, tmp_path: Path) -> None:
        changes = KINDS["windows"] | {"submodel.strategy": "magnitude"}
        self.refuse(tmp_path, decentralized(changes), "submodel.strategy = 'magnitude' .*server")

    def refuse(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        """Run the command line, and look at its only line."""
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(config))
        done = CliRunner().invoke(app, ["run", str(tmp_path / "e.yaml"), "--out", str(tmp_path / "run")])
        assert (done.exit_code, done.stdout) == (2, ""), done.stderr or done.exception
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert re.search(message, done.stderr), done.stderr
        assert not os.path.exists(tmp_path / "run")


def test_a_topology_of_a_relative_path_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "graph.yaml").write_text("{topology: ring, source: of this test}\n")
    monkeypatch.chdir(tmp_path)
    found = run(decentralized({"peers.topology": "graph.yaml"}), out=tmp_path / "run")
    resolved = found.directory / "config.yaml"
    assert str(tmp_path / "graph.yaml") in resolved.read_text()
