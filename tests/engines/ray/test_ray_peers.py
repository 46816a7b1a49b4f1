"""Peers on Ray: the bits of the local engine, whatever is sent between blocks."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from federation import LEVELS, STACKED, assert_same, events, modes
from gossamer import resume, run
from gossamer.engines.collective.group import INTERFACE, LOOPBACK, Meeting
from gossamer.engines.ray.peers import RayPeerEngine
from gossamer.engines.ray.together import meeting_host
from gossamer.errors import ConfigError, RoundAborted
from gossamer.experiment import Hooks
from gossamer.records import RoundPlan
from gossamer.spans import Spans
from slow_peers import LEAST_SQUARES, decentralized

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(300), pytest.mark.usefixtures("one_ray")]

RAY = {"engine.name": "ray", "engine.workers": 3}
GLOO = {"engine.collective": "gloo"}
CASES: dict[str, dict[str, Any]] = {
    "a shift, epochs of unequal lengths": {"peers.num": 9, "peers.topology": {"name": "d-equistatic", "M": 3}},
    "a matching, mixed and merged": {
        "algorithm": "dsgt",
        "peers.topology": "random-match",
        "peers.merge_every": 2,
    }
    | LEAST_SQUARES,
    "codecs": {"algorithm": {"name": "choco-sgd", "compressor": {"name": "random-k", "share": 0.2}}},
    "scalars": {"algorithm": "push-sum", "peers.topology": {"name": "el-local", "degree": 2, "averaging": "sender"}},
    "two rows a peer": {"algorithm": "dsgd-ceca", "peers.num": 11, "peers.topology": "ceca"},
    "windows of three widths": {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}}
    | modes(LEVELS, **STACKED),
    "a payload of its own": {"algorithm": "quasi-global-momentum", "train.momentum": 0.9, "peers.topology": "base"},
}


def own_actors() -> list[int]:
    """Return the processes of the hosts that belong to this process's Ray."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            pid = int(path.parent.name)
            if path.read_bytes().startswith(b"ray::PeerHost") and parent(parent(pid)) == os.getpid():
                found.append(pid)
    return sorted(found)


@pytest.mark.parametrize("case", CASES)
def test_bits_of_the_local_engine(tmp_path: Path, case: str) -> None:
    changes = CASES[case]
    here = run(decentralized(changes), out=tmp_path / "local")
    there = run(decentralized(changes | RAY), out=tmp_path / "ray")
    assert_same(there, here)
    together = run(decentralized(changes | RAY | GLOO), out=tmp_path / "gloo")
    assert_same(together, here)
    assert not events(together.directory, "retry")


@pytest.mark.parametrize("collective", [{}, GLOO], ids=["store", "gloo"])
def test_a_killed_actor_costs_no_bits(tmp_path: Path, collective: dict[str, str]) -> None:
    """One is killed when the second exchange begins, and has other blocks to mix then, or a group that misses it."""
    fired = []
    begun = []

    def listen(span: str, starts: bool) -> None:
        if (span, starts) == ("exchange", True):
            begun.append(span)
            if len(begun) == 2:
                fired.append(own_actors()[0])
                os.kill(fired[0], signal.SIGKILL)

    def spans() -> Spans:
        made = Spans()
        made.listeners.append(listen)
        return made

    changes = CASES["a matching, mixed and merged"]
    here = run(decentralized(changes), out=tmp_path / "local")
    there = run(decentralized(changes | RAY | collective), out=tmp_path / "ray", hooks=Hooks(spans=spans))
    assert fired
    assert events(there.directory, "actor-replaced")
    broken = [event for event in events(there.directory, "retry") if event["reason"] == "group-broken"]
    assert len(broken) == (1 if collective else 0)
    assert_same(there, here)


def test_groups_that_break_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round is given up in one sentence, and what was committed goes on without a group."""
    monkeypatch.setattr(Meeting, "places", lambda self, size, backend: [None] * size)
    changes = CASES["codecs"]
    with pytest.raises(RoundAborted, match=r"5 groups of Ray actors in a row broke \(a member was replaced\)"):
        run(decentralized(changes | RAY | GLOO), out=tmp_path / "ray")
    path = tmp_path / "ray" / "config.yaml"
    path.write_text(path.read_text().replace("collective: gloo", "collective: null"))
    assert_same(resume(tmp_path / "ray"), run(decentralized(changes), out=tmp_path / "local"))


def test_a_gpu_for_each_actor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes a GPU for each of 3 actors, but the cluster has 0"):
        run(decentralized(RAY | {"engine.collective": "nccl"}), out=tmp_path / "ray")


def test_several_machines_need_the_name_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    nodes = [{"NodeManagerAddress": f"10.0.0.{number}", "Alive": True} for number in (1, 2)]
    monkeypatch.delenv(INTERFACE, raising=False)
    assert meeting_host() == LOOPBACK
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(ConfigError, match=f"name the interface of a private network by the variable {INTERFACE}"):
        meeting_host()
    monkeypatch.setenv(INTERFACE, "eth1")
    assert meeting_host() == ray.util.get_node_ip_address()
    nodes[1]["Alive"] = False
    assert meeting_host() == LOOPBACK


def test_resumed_on_the_other_engine(tmp_path: Path) -> None:
    changes = CASES["codecs"]
    whole = run(decentralized(changes | {"rounds": 4}), out=tmp_path / "whole")
    started = run(decentralized(changes | {"rounds": 2} | RAY), out=tmp_path / "part")
    path = started.directory / "config.yaml"
    path.write_text(path.read_text().replace("rounds: 2", "rounds: 4").replace("name: ray", "name: local"))
    assert_same(resume(started.directory), whole)


@pytest.mark.filterwarnings("ignore:`free` is a deprecated")
def test_rows_that_are_lost_with_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on from the last commit, with actors that have to be given everything anew."""
    from ray._private.internal_api import free

    lost = list[int]()
    train = RayPeerEngine.train

    def forgetful(self: RayPeerEngine, plan: RoundPlan) -> Any:
        if plan.round == 2 and not lost:
            lost.append(len(self._state))
            free(self._state)
        return train(self, plan)

    monkeypatch.setattr(RayPeerEngine, "train", forgetful)
    changes = {"rounds": 4, "checkpoint.every_seconds": 0}
    there = run(decentralized(changes | RAY), out=tmp_path / "ray")
    assert lost
    assert [(event["round"], event["back_to"]) for event in events(there.directory, "state-lost")] == [(2, 2)]
    assert_same(there, run(decentralized(changes), out=tmp_path / "local"))
