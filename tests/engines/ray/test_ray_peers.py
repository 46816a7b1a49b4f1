"""Peers on Ray: the bits of the local engine, whatever is sent between blocks."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import LEVELS, STACKED, Injected, assert_same, events, failing, modes
from gossamer import load, resume, run
from gossamer.engines.ray.peers import RayPeerEngine
from gossamer.experiment import Hooks
from gossamer.plan import RoundPlan
from gossamer.profiling.spans import Spans
from slow_peers import LEAST_SQUARES, decentralized

pytestmark = pytest.mark.usefixtures("one_ray")

RAY = {"engine.name": "ray", "engine.workers": 2}
CASES: dict[str, dict[str, Any]] = {
    "a shift, epochs of unequal lengths": {"peers.num": 9, "peers.topology": {"name": "d-equistatic", "M": 3}},
    "a matching, mixed and merged": {
        "algorithm": "dsgt",
        "peers.topology": "random-match",
        "peers.merge_every": 2,
    }
    | LEAST_SQUARES,
    "one too large": {
        "workload.name": "faulty:Faulty",
        "workload.clients": [3],
        "workload.fault": "huge",
        "train.steps": 1,
    },
    "codecs": {"algorithm": {"name": "choco-sgd", "compressor": {"name": "random-k", "share": 0.2}}},
    "scalars": {"algorithm": "push-sum", "peers.topology": {"name": "el-local", "degree": 2, "averaging": "sender"}},
    "moments": {"train.optimizer": "adamw", "train.lr": 0.01},
    "two rows a peer": {"algorithm": "dsgd-ceca", "peers.num": 11, "peers.topology": "ceca"},
    "windows of three widths": {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}}
    | modes(LEVELS, **STACKED),
    "two phases": {"algorithm": "two_phases:TwoGossips", "peers.topology": "base", "train.steps": 1},
    "a payload of its own": {"algorithm": "quasi-global-momentum", "train.momentum": 0.9, "peers.topology": "base"},
}


def test_moments_of_batch_norm_are_committed(tmp_path: Path) -> None:
    changes = {"workload.model": {"name": "user_modules:ResNet", "width": 4}, "rounds": 1, "peers.num": 4}
    for name, engine in (("local", {}), ("ray", RAY | {"engine.workers": 2})):
        run(decentralized(changes | {"train.steps": 1} | engine), out=tmp_path / name)
    local, remote = (load(tmp_path / name).state_dict(peer=1) for name in ("local", "ray"))
    assert "bn1.running_var" in local
    assert all(torch.equal(value, remote[name]) for name, value in local.items())


def own_actors() -> list[int]:
    """Return the processes of the actors that belong to this process's Ray."""

    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            pid = int(path.parent.name)
            if path.read_bytes().startswith(b"ray::PeerActor") and parent(parent(pid)) == os.getpid():
                found.append(pid)
    return sorted(found)


class Strike:
    """Sends a signal to an actor when the exchange of that number begins."""

    def __init__(self, exchange: int, number: signal.Signals) -> None:
        self._exchange, self._number, self._begun, self.fired = exchange, number, 0, list[int]()

    def hooks(self) -> Hooks:
        """What a run takes to be struck."""

        def spans() -> Spans:
            made = Spans()
            made.listeners.append(self._listen)
            return made

        return Hooks(spans=spans)

    def _listen(self, span: str, starts: bool) -> None:
        if (span, starts) == ("exchange", True):
            self._begun += 1
            if self._begun == self._exchange:
                self.fired.append(own_actors()[0])
                os.kill(self.fired[0], self._number)


@pytest.mark.sweep(keep=0.25)
@pytest.mark.parametrize("case", CASES)
def test_bits_of_the_local_engine(tmp_path: Path, case: str) -> None:
    changes = CASES[case]
    here = run(decentralized(changes), out=tmp_path / "local")
    there = run(decentralized(changes | RAY), out=tmp_path / "ray")
    assert_same(there, here)
    assert not events(there.directory, "retry")


@pytest.mark.sweep(keep=0.5, at_least=1)
@pytest.mark.parametrize("exchange", [1, 2])
def test_a_killed_actor_costs_no_bits(tmp_path: Path, exchange: int) -> None:
    """One is killed when an exchange begins, and has other blocks to mix then."""
    strike = Strike(exchange, signal.SIGKILL)
    changes = CASES["a matching, mixed and merged"]
    here = run(decentralized(changes), out=tmp_path / "local")
    there = run(decentralized(changes | RAY), out=tmp_path / "ray", hooks=strike.hooks())
    assert strike.fired
    assert events(there.directory, "actor-replaced")
    assert_same(there, here)


def test_resumed_on_the_other_engine(tmp_path: Path) -> None:
    changes = CASES["codecs"]
    whole = run(decentralized(changes | {"rounds": 4}), out=tmp_path / "whole")
    with pytest.raises(Injected):
        run(decentralized(changes | {"rounds": 4} | RAY), out=tmp_path / "part", hooks=failing("train", True, 3))
    assert_same(resume(tmp_path / "part", overrides=["engine.name=local"]), whole)


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
