"""An actor of peers holds no rows between calls: neither in cycles, nor in memory that its allocator would keep."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import STACKED, modes
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.peers import mix_message
from gossamer.engines.ray import peer_actor
from gossamer.engines.training.mixing import sparse_zeros
from gossamer.engines.training.peer_worker import PeerState
from gossamer.memory import keep_freed_memory
from slow_peers import decentralized

BOUNDS = [[0, 4], [4, 8]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], Any]]]:
    """What an actor is asked in a round, while nobody collects garbage."""
    parts = build(parse(decentralized({"algorithm": "dsgt", "peers.topology": "random-match"} | modes(**STACKED))))
    monkeypatch.setattr(peer_actor, "prepare", lambda *arguments: parts.task)
    actor = peer_actor.PeerActor("", [])
    plan = parts.planner.phases(0, 0.0)[0].plan
    described = mix_message(plan) | {"bounds": BOUNDS, "block": 0}
    job = {"kind": "train", "round": 0, "phase": 0, "variant": 0, "first": 0, "peers": [0, 1, 2, 3], "lr": plan.lr}
    job |= {"steps": plan.steps[:4].tolist(), "max_norm": None}
    state = actor.init(0, 4)[1]
    question = {"kind": "evaluate", "peers": [0], "variant": -1, "round": 0, "statistics": [{}], "chunk": 0}
    train = json.dumps(described | {"jobs": [job]})
    block = actor.train(train, state)[1]
    mix = json.dumps(described)
    gc.collect()
    gc.disable()
    yield [
        lambda: actor.train(train, state),
        lambda: actor.mix(mix, block, None, None),
        lambda: actor.evaluate(json.dumps(question), state["x"][:1]),
    ]
    gc.enable()


def num_states() -> int:
    """Return how many sets of peers' rows there are in memory."""
    return sum(type(one) is PeerState for one in gc.get_objects())


def test_no_call_leaves_rows_in_a_cycle(calls: list[Callable[[], Any]]) -> None:
    before = num_states()
    for call in calls:
        call()
        assert num_states() == before


def test_zeros_take_the_memory_of_what_is_written_and_give_it_back() -> None:
    def private_mb() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    keep_freed_memory()  # as in an actor
    before = private_mb()
    rows = sparse_zeros((1 << 10, 1 << 16), torch.float32)  # 256 MiB
    rows[:128] = 1.0
    assert 24 < private_mb() - before < 48
    assert not rows[128].any()
    del rows
    assert private_mb() - before < 16
