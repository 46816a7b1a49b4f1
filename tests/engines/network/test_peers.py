"""Peers that dial each other have the bits of the local engine, whatever happens to them; nobody serves."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from federation import LEVELS, STACKED, assert_same, events, modes, wait_for
from gossamer.engines.network import peer_links
from gossamer.engines.network.outbox import is_awaited
from gossamer.engines.network.peer_links import PeerLinks
from gossamer.engines.network.roster import versions
from gossamer.errors import ConfigError, Disconnected, Refused
from gossamer.experiment import Hooks, resume, run
from gossamer.storage.jsonl import read
from gossamer.storage.runlog import read_metrics
from gossamer.transport import Client
from gossamer.transport.authentication import load_kit
from gossamer.transport.provisioning import provision
from nodes import free_port
from peer_threads import Peers, Watch, committed_rows, ended_after
from slow_peers import LEAST_SQUARES, decentralized

NUM_PEERS = 4
RUNS: dict[str, dict[str, Any]] = {
    "dsgd": {"peers.topology": "od-equidyn"},
    "dsgt": {"algorithm": "dsgt", "peers.topology": "one-peer-exp"},
    "push-sum": {"algorithm": "push-sum", "peers.topology": "slow_peers:pushing"},
    "d2": LEAST_SQUARES | {"algorithm": "d2", "train.steps": 1, "peers.topology": {"name": "ring", "lazy": True}},
    "two rows": {"algorithm": "dsgd-ceca", "peers.topology": "ceca"},
    "windows": {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}} | modes(LEVELS, **STACKED),
    "codes": {"algorithm": {"name": "choco-sgd", "compressor": {"name": "random-k", "share": 0.2}}},
    "merges": {"peers.merge_every": 2},
}


def configured(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment of as many peers as its topology has."""
    number = 8 if changes.get("peers.topology") == "slow_peers:pushing" else NUM_PEERS
    return decentralized({"peers.num": number, **changes})


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("name", RUNS)
def test_bits(name: str, tmp_path: Path) -> None:
    config = configured(RUNS[name])
    peers = Peers(tmp_path, config)
    for peer in (None, *range(config["peers"]["num"])):
        peers.start(peer)
    peers.join()
    assert not peers.errors
    assert_same(peers.runs[None], run(config, out=tmp_path / "local"))


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"submodel": {"capacities": list(LEVELS), "strategy": name}} | modes(LEVELS)
            for name in ("rolling", "random")
        ),
        {"algorithm": {"name": "choco-sgd", "compressor": {"name": "top-k", "share": 0.1}}},
    ],
    ids=["rolling windows", "random windows", "codes"],
)
def test_what_is_sent_is_what_is_counted(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of windows the coordinates that they hold travel, and nothing besides."""
    received, lock = list[int](), threading.Lock()
    collect = PeerLinks.collected

    def counted(links: PeerLinks, at: tuple[int, int]) -> dict[int, Any]:
        """Count the bytes of what has come in a phase."""
        found = collect(links, at)
        with lock:
            received.append(sum(row.nbytes for one in found.values() for row in one.arrays.values()))
        return found

    monkeypatch.setattr(PeerLinks, "collected", counted)
    config = configured(changes)
    peers = Peers(tmp_path, config)
    for peer in range(NUM_PEERS):
        peers.start(peer)
    peers.join()
    assert not peers.errors
    local = run(config, out=tmp_path / "local")
    assert len(received) == NUM_PEERS * config["rounds"]
    assert sum(received) == local.metrics[-1]["total_bytes_up"]
    for peer, row in enumerate(committed_rows(tmp_path / "local")):
        assert torch.equal(committed_rows(peers.where(peer))[0], row)


def test_each_has_its_own_row_and_log(tmp_path: Path) -> None:
    config = configured(RUNS["dsgd"])
    peers = Peers(tmp_path, config)
    for peer in range(NUM_PEERS):  # and nobody observes them
        peers.start(peer)
    peers.join()
    assert not peers.errors
    run(config, out=tmp_path / "local")
    for name, expected in gossamer.load(tmp_path / "local").params.items():
        mean = torch.stack([peers.runs[peer].params[name] for peer in range(NUM_PEERS)]).mean(0)
        assert torch.allclose(mean, expected, atol=1e-6)
    losses = [read_metrics(peers.where(peer))[-1]["train_loss"] for peer in range(NUM_PEERS)]
    assert len(set(losses)) == NUM_PEERS
    expected_loss = read_metrics(tmp_path / "local")[-1]["train_loss"]
    assert sum(losses) / NUM_PEERS == pytest.approx(expected_loss, rel=1e-6)


def test_who_stops_goes_on_from_its_own_commit(tmp_path: Path) -> None:
    config = configured(RUNS["dsgt"] | {"rounds": 8})
    peers = Peers(tmp_path, config)
    peers.start(None, ended_after(2))
    for peer in (0, 1, 3):
        peers.start(peer)
    peers.start(2, ended_after(4))
    for who in (None, 2):
        peers.join(who)
        peers.start(who)
    peers.join()
    assert not peers.errors
    assert_same(peers.runs[None], run(config, out=tmp_path / "local"))


def test_who_is_started_again_after_its_last_commit_tells_its_neighbours_that_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, falls = PeerLinks.finish, threading.Event()

    def fallen(links: PeerLinks, *arguments: Any, **options: Any) -> bool:
        """Let the first that has finished leave without a word, as if it were killed."""
        if not falls.is_set():
            falls.set()
            return False
        return finish(links, *arguments, **options)

    monkeypatch.setattr(PeerLinks, "finish", fallen)
    monkeypatch.setattr(peer_links, "LINGER_SECONDS", 600.0)
    monkeypatch.setattr(peer_links, "AGAIN_SECONDS", 1.0)
    peers = Peers(tmp_path, configured({"peers.num": 2, "peers.topology": "complete"}))
    for peer in range(2):
        peers.start(peer)
    wait_for(lambda: bool(peers.runs))
    first = next(iter(peers.runs))
    peers.start(first)
    peers.join()
    assert not peers.errors
    assert not is_awaited(peers.where(1 - first), peers.config["rounds"])
    assert len(read_metrics(peers.where(first))) == peers.config["rounds"]


def test_who_renormalises_goes_on_and_who_comes_back_takes_up_a_state(tmp_path: Path) -> None:
    changes = {"rounds": 40, "peers.absent_neighbour": "renormalise", "peers.patience_seconds": 0.4}
    peers = Peers(tmp_path, configured(changes))
    is_back = threading.Event()
    watch = Watch(lambda round: is_back.wait(30) if round == 20 else None)  # those who are left would be too quick
    for peer in range(3):
        peers.start(peer, Hooks(observer=lambda name, num_rounds: watch))
    peers.start(3, ended_after(2))
    peers.join(3)
    peers.errors.clear()
    wait_for(lambda: len(read_metrics(peers.where(0))) >= 20)
    peers.start(3)
    wait_for(lambda: bool(events(peers.where(3), "state-lost")))
    is_back.set()
    peers.join()
    assert not peers.errors
    assert [3] in [one["peers"] for one in events(peers.where(0), "neighbours-absent")]
    assert [one for one in events(peers.where(3), "state-lost") if "its state is taken up" in one["reason"]]
    assert {read_metrics(peers.where(peer))[-1]["round"] for peer in range(4)} == {40}
    assert events(peers.where(3), "state-lost")[0]["taken_from"] in range(3)
    for workers in (0, 2):
        replayed = tmp_path / f"replayed-{workers}"
        run(
            {**peers.config, "replay": str(tmp_path), "engine": {**peers.config["engine"], "workers": workers}},
            out=replayed,
        )
        rows = committed_rows(replayed)
        for peer in range(NUM_PEERS):
            assert torch.equal(committed_rows(peers.where(peer))[0], rows[peer])


def test_runs_of_peers_that_cannot_be_replayed(tmp_path: Path) -> None:
    config = configured({"rounds": 1})
    peers = Peers(tmp_path, config)
    for peer in range(NUM_PEERS):
        peers.start(peer)
    peers.join()
    again = {**config, "replay": str(tmp_path)}
    run(again, out=tmp_path / "replayed")
    for changes, told in (
        ({"engine": {**config["engine"], "name": "ray", "workers": 1}}, "cannot leave out neighbours"),
        ({"replay": str(tmp_path / "none")}, "is no folder"),
        ({"seed": 5}, "of another experiment, in which seed = "),
    ):
        with pytest.raises(ConfigError, match=told):
            run({**again, **changes}, out=tmp_path / "refused")
    shutil.copytree(peers.where(1), tmp_path / "node-copy")
    with pytest.raises(ConfigError, match="holds two runs of peer 1"):
        run(again, out=tmp_path / "refused")
    for directory in (tmp_path / "node-copy", peers.where(1)):
        shutil.rmtree(directory)
    with pytest.raises(ConfigError, match="holds no run directory of peer 1: collect those of all 4 peers"):
        run(again, out=tmp_path / "refused")


def test_a_peer_whose_disk_is_lost_takes_up_a_neighbours_state(tmp_path: Path) -> None:
    peers = Peers(tmp_path, configured({"rounds": 8}))
    for peer in range(3):
        peers.start(peer)
    peers.start(3, ended_after(3))
    peers.join(3)
    shutil.rmtree(peers.where(3))
    peers.start(3)
    peers.join()
    assert not peers.errors
    lost = events(peers.where(3), "state-lost")
    assert [one["back_to"] for one in lost] == [3]
    assert "its state is taken up" in lost[0]["reason"]
    assert [one["round"] for one in read_metrics(peers.where(3))] == [4, 5, 6, 7, 8]
    for peer in range(3):
        assert not events(peers.where(peer), "state-lost")
        assert len(read_metrics(peers.where(peer))) == 8


def test_processes_that_are_killed_are_started_again_and_a_run_is_resumed(tmp_path: Path) -> None:
    config = configured({"peers.num": 2, "peers.topology": "complete", "rounds": 30})
    killed, over = threading.Event(), threading.Event()

    def watch(round: int) -> None:
        """Kill a peer, once, and end the run later."""
        if round == 5:
            killed.set()
            os.kill(process_of(tmp_path / "network" / "nodes" / "peer-1"), signal.SIGKILL)
        if round == 12:
            over.set()

    hooks = Hooks(observer=lambda name, num_rounds: Watch(watch), is_ended=over.is_set)
    run({**config, "engine": {**config["engine"], "name": "network"}}, (), tmp_path / "network", hooks)
    assert killed.is_set()
    assert [one["peers"] for one in events(tmp_path / "network", "worker-restarted")] == [[1]]
    assert len(read_metrics(tmp_path / "network")) == 12
    assert_same(resume(tmp_path / "network"), run(config, out=tmp_path / "local"))


def process_of(directory: Path) -> int:
    """Return the process whose command line names a folder."""
    for found in Path("/proc").iterdir():
        if found.name.isdigit() and int(found.name) != os.getpid():
            try:
                command = (found / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(directory).encode() in command:
                return int(found.name)
    raise AssertionError(f"no process works in {directory}")


class TestSentences:
    def test_a_neighbour_that_never_comes(self, tmp_path: Path) -> None:
        peers, over, lines = (
            Peers(tmp_path, configured({"peers.num": 2, "peers.topology": "complete"})),
            threading.Event(),
            list[str](),
        )
        (peers.book / "peer-1").write_text(f"127.0.0.1:{free_port()}")
        peers.start(0, Hooks(is_ended=over.is_set, tell=lines.append))
        wait_for(lambda: any(line.startswith("peer 1 is away; waiting for it (could not join") for line in list(lines)))
        over.set()
        peers.join()
        assert len([line for line in lines if "is away" in line]) == 1

    def test_another_experiment(self, tmp_path: Path) -> None:
        peers = Peers(tmp_path, configured(RUNS["dsgd"] | {"peers.topology": "complete"}))
        over, lines = threading.Event(), list[str]()
        hooks = Hooks(is_ended=over.is_set, tell=lines.append)
        peers.start(0, hooks)
        peers.config = {**peers.config, "seed": 7}
        peers.start(1, hooks)
        wait_for(lambda: any(isinstance(error, Refused) for error in list(peers.errors.values())))
        over.set()
        peers.join(0, 1)
        refused = [str(error) for error in peers.errors.values() if isinstance(error, Refused)]
        assert "have other experiments, or data: give both the same FILE" in refused[0]
        assert any(line.startswith("refused: peer-") for line in lines)

    @pytest.mark.parametrize(
        ("changes", "engine", "sentence"),
        [
            ({}, {"peer": 4}, r"--id 4: the run has the peers 0\.\.3: give one of them"),
            ({}, {"peer": 0, "address": "0.0.0.0:0"}, "without mutual TLS and a token is refused"),
            ({}, {"peer": 0, "peers_file": None}, "the addresses of all: give --peers"),
            (
                RUNS["codes"] | {"peers.absent_neighbour": "renormalise"},
                {"peer": 0},
                "does not go with an algorithm that sends changes",
            ),
            (
                RUNS["two rows"] | {"peers.absent_neighbour": "renormalise"},
                {"peer": 0},
                "does not go with a topology that mixes two rows",
            ),
            ({"peers.num": 65}, {"address": None}, "starts a process for each of 65 peers, and 64 at most"),
        ],
    )
    def test_refused(self, changes: dict[str, Any], engine: dict[str, Any], sentence: str, tmp_path: Path) -> None:
        config = configured(changes)
        (tmp_path / "book").mkdir()
        given = {"name": "network", "address": "127.0.0.1:0"}
        given |= {} if "address" in engine and engine["address"] is None else {"peers_file": str(tmp_path / "book")}
        with pytest.raises(ConfigError, match=sentence):
            run({**config, "engine": {**config["engine"], **given, **engine}}, out=tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the kits of two peers and an observer."""
    root = tmp_path_factory.mktemp("federation")
    nodes = ", ".join(f"{{name: {name}, hosts: [127.0.0.1]}}" for name in ("berlin", "paris", "watcher"))
    (root / "FEDERATION.yaml").write_text(f"name: f\nnodes: [{nodes}]\n")
    provision(root / "FEDERATION.yaml", root / "made")
    return root / "made" / "kits"


class TestKits:
    def test_bits_over_tls(self, kits: Path, tmp_path: Path) -> None:
        config = configured({"peers.num": 2, "peers.topology": "complete"})
        peers = Peers(tmp_path, config)
        for peer, name in ((None, "watcher"), (0, "berlin"), (1, "paris")):
            peers.start(peer, kit=str(kits / name))
        peers.join()
        assert not peers.errors
        assert_same(peers.runs[None], run(config, out=tmp_path / "local"))
        audit = [one["kind"] for one in read(peers.where(0) / "audit.jsonl")]
        assert {"joined", "sent", "received"} <= set(audit)

    def test_who_has_no_kit_or_another_ones_is_kept_out(self, kits: Path, tmp_path: Path) -> None:
        peers = Peers(tmp_path, configured({"peers.num": 2, "peers.topology": "complete"}))
        over = threading.Event()
        peers.start(0, Hooks(is_ended=over.is_set), kit=str(kits / "berlin"))
        peers.start(1, kit=str(kits / "berlin"))
        peers.join(1)
        assert "is that of peer 0: leave it out" in str(peers.errors[1])
        wait_for((peers.book / "peer-0").exists)
        address = (peers.book / "peer-0").read_text().strip()
        with pytest.raises(Disconnected):
            Client(address, name="paris", timeout_seconds=0.5)
        watcher = load_kit(kits / "watcher").credentials()
        hello = {"peer": 1, "versions": versions()}
        with pytest.raises(Refused, match="says that it is peer 1, which it is not"):
            Client(address, name="watcher", hello=hello, credentials=watcher, timeout_seconds=5.0)
        over.set()
        peers.join(0)
