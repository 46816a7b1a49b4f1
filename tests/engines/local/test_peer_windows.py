"""Peers of different capacities: what is mixed where windows differ, and what is preserved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from federation import LEVELS, SINGLY, STACKED, events, modes
from gossamer import run, topology
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.base import EngineSetup
from gossamer.engines.local.peers import LocalPeerEngine
from gossamer.engines.task import Task
from gossamer.engines.training.mixing import Mixer
from gossamer.errors import ConfigError
from gossamer.topology import Topology
from slow_peers import SlowPeers, decentralized, error, mix_held

TOPOLOGIES: list[tuple[str, dict[str, Any]]] = [
    ("ring", {}),
    ("star", {}),
    ("complete", {}),
    ("static-exp", {}),
    ("od-equidyn", {"eta": 0.5}),
    ("random-match", {}),
    ("base", {}),
    ("el-local", {"degree": 2}),
]
METHODS: dict[str, dict[str, Any]] = {
    "dsgd": {},
    "momentum": {"train.momentum": 0.9, "train.weight_decay": 0.01},
    "mixed-momentum": {"algorithm": {"name": "dsgd", "mix_momentum": True}, "train.momentum": 0.9},
    "gossip-pga": {"algorithm": {"name": "gossip-pga", "period": 2}},
    "quasi-global-momentum": {"algorithm": "quasi-global-momentum", "train.momentum": 0.9},
}


def windowed(strategy: str, levels: tuple[float, ...] = LEVELS, **mode: bool) -> dict[str, Any]:
    """Return the changes that make peers train windows of these capacities."""
    return {"submodel": {"capacities": list(levels), "strategy": strategy}} | modes(levels, **(mode or STACKED))


def models(config: dict[str, Any]) -> Tensor:
    """Return the models of all peers after all rounds, [n, d]."""
    parts = build(parse(config))
    engine = LocalPeerEngine(parts.task, parts.workload.init(parts.config.seed), EngineSetup(workers=0))
    for round in range(parts.config.rounds):
        plan = parts.planner.plan(round)
        for _ in engine.train(plan):
            pass
        engine.exchange(plan)
    engine.close()
    return engine.read()["x"].clone()


class TestSlowSimulator:
    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("strategy", ["rolling", "static", "random"])
    @pytest.mark.parametrize("method", METHODS)
    def test_methods(self, method: str, strategy: str) -> None:
        changes = {"workload.model.hidden": [8], "peers.num": 6} | windowed(strategy) | METHODS[method]
        slow = SlowPeers(decentralized(changes))
        expected = slow.run()[-1]
        assert not slow.held.all()
        assert error(models(decentralized(changes)), expected) < 1e-5

    @pytest.mark.parametrize("name", ["od-equidyn", "random-match", "star", "el-local", "base"])
    def test_topologies(self, name: str) -> None:
        changes = {"workload.model.hidden": [8], "peers.topology": name} | windowed("random", **SINGLY)
        slow = SlowPeers(decentralized(changes))
        expected = slow.run()[-1]
        assert error(models(decentralized(changes)), expected) < 1e-5

    def test_momentum_rests_while_nobody_holds_its_coordinates(self) -> None:
        """Windows of 2 of 8 channels, which move by 4: each comes back after two rounds."""
        changes = {"workload.model.hidden": [8], "peers.num": 3, "rounds": 5, "submodel.stride": 4}
        config = decentralized(windowed("rolling", (0.25,)) | METHODS["quasi-global-momentum"] | changes)
        slow = SlowPeers(config)
        assert error(models(config), slow.run()[-1]) < 1e-5

    def test_drawn_anew(self) -> None:
        changes = {"workload.model.hidden": [8], "peers.num": 6} | windowed("rolling") | {"submodel.stride": 3}
        slow = SlowPeers(decentralized(changes | {"submodel.assignment": "dynamic", "submodel.scaler": False}))
        expected = slow.run()[-1]
        found = models(decentralized(changes | {"submodel.assignment": "dynamic", "submodel.scaler": False}))
        assert error(found, expected) < 1e-5


class Example(NamedTuple):
    """A round of a graph, rows that are mixed, and who holds what: [n, w] each."""

    graph: Topology
    round: int
    rows: Tensor
    held: Tensor


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """Draw a mixing, and coordinates: everybody holds the first, nobody the second, and all agree on the third."""
    name, parameters = draw(st.sampled_from(TOPOLOGIES))
    n, seed = draw(st.integers(3, 9)), draw(st.integers(0, 999))
    graph = topology.build(name, n, seed, **parameters)
    source = np.random.default_rng(seed)
    rows = torch.from_numpy(source.normal(0.0, 10.0 ** draw(st.integers(-3, 3)), (n, 16))).float()
    held = torch.from_numpy(source.random((n, 16)) < draw(st.sampled_from([0.1, 0.5, 0.9])))
    held[:, 0], held[:, 1] = True, False
    rows[:, 2] = rows[0, 2].clone()
    return Example(graph, draw(st.integers(0, 20)), rows, held)


@pytest.fixture(scope="module")
def task() -> Task:
    return build(parse(decentralized(windowed("rolling")))).task


def mixed(task: Task, example: Example, held: Tensor | None, rows: slice | None = None) -> Tensor:
    """Mix models as a worker does; return those of all peers, or of `rows`."""
    graph, round, x, _ = example
    holders = None if held is None else held.to(torch.uint8)
    message = {"round": round, "mixing": "topology", "lr": 0.1}
    wanted = rows or slice(0, graph.n)
    return Mixer(replace(task, topology=graph)).update(message, {"x": x}, holders, {"x": x[wanted]}, wanted)["x"]


class TestMixing:
    @given(example=examples())
    def test_what_is_preserved(self, task: Task, example: Example) -> None:
        graph, round, rows, held = example
        before, heard = rows.clone(), graph.mixing(round).dense() > 0  # the peer itself included
        new = mixed(task, example, held)
        assert torch.equal(rows, before)
        expected = mix_held(graph.mixing(round).dense(), rows.double().numpy(), held.numpy())
        bound = 1e-6 * float(rows.abs().max())
        assert np.allclose(new, expected, rtol=1e-5, atol=bound)
        for i in range(graph.n):
            there = held[heard[i]]
            near = there.any(0)
            assert torch.equal(new[i, ~near], rows[i, ~near])  # nobody holds it: the same bits
            low = torch.where(there, rows[heard[i]], torch.inf).amin(0)
            high = torch.where(there, rows[heard[i]], -torch.inf).amax(0)
            assert (new[i] >= low - bound)[near].all()
            assert (new[i] <= high + bound)[near].all()
        assert torch.allclose(new[:, 2], rows[:, 2], rtol=1e-6, atol=0.0)  # all agree: it stays

    @given(example=examples(), ends=st.tuples(st.integers(0, 8), st.integers(1, 9)))
    def test_some_of_the_peers(self, task: Task, example: Example, ends: tuple[int, int]) -> None:
        """They get the same bits as in the company of all."""
        part = slice(min(ends[0], example.graph.n - 1), min(max(ends[0] + 1, ends[1]), example.graph.n))
        assert torch.equal(mixed(task, example, example.held, part), mixed(task, example, example.held)[part])

    @given(example=examples())
    def test_who_all_hold_everything_mix_by_w(self, task: Task, example: Example) -> None:
        new, plain = mixed(task, example, torch.ones_like(example.held)), mixed(task, example, None)
        assert torch.equal(plain, example.graph.mixing(example.round).apply(example.rows))
        assert torch.allclose(new, plain, rtol=1e-5, atol=1e-6 * float(example.rows.abs().max()))

    @given(example=examples(), seed=st.integers(0, 99))
    def test_order_does_not_matter_to_a_complete_graph(self, task: Task, example: Example, seed: int) -> None:
        complete = example._replace(graph=topology.build("complete", example.graph.n))
        order = np.random.default_rng(seed).permutation(example.graph.n)
        shuffled = complete._replace(rows=example.rows[order].contiguous(), held=example.held[order])
        found, expected = mixed(task, shuffled, shuffled.held), mixed(task, complete, complete.held)[order]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(example.rows.abs().max()))

    def test_sums_and_scalars(self) -> None:
        """A sum is not divided by the holders' weights, and a number of each peer is mixed by W alone."""
        task = build(parse(decentralized({"algorithm": "push-sum", "peers": {"num": 3, "topology": "complete"}}))).task
        rows, held = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([[1, 0], [0, 1], [1, 1]])
        sent = {"x": rows, "weight": torch.tensor([[1.0], [2.0], [6.0]])}
        message = {"round": 0, "mixing": "topology", "lr": 0.1}
        new = Mixer(task).update(message, sent, held.to(torch.uint8), dict(sent), slice(0, 3))
        assert torch.allclose(new["weight"], torch.full((3, 1), 3.0))
        assert torch.allclose(new["x"], torch.tensor([[2.0, 10 / 3]]).expand(3, 2) / 3.0)


class TestRuns:
    def test_nothing_outside_the_windows_changes(self) -> None:
        """Of static windows the first half is held by somebody; of a peer's neighbours nobody may hold its second."""
        config = decentralized(windowed("static", (0.25, 0.5)))
        parts = build(parse(config))
        before = parts.workload.layout.views(parts.workload.init(0))["hidden0.weight"]
        after = parts.workload.layout.views(models(config))["hidden0.weight"]
        assert torch.equal(after[:, 16:], before[16:].expand(8, -1, -1))
        assert not torch.isclose(after[:, :8], before[:8]).all(2).any()
        small = parts.planner.plan(0).client[parts.planner.plan(0).variant == 0].tolist()
        alone = [i for i in small if {(i + 1) % 8, (i - 1) % 8} <= set(small)]
        for i in range(8):
            assert torch.equal(after[i, 8:16], before[8:16]) == (i in alone)

    def test_one_capacity_below_1(self) -> None:
        """All peers hold the same window: it is mixed by W, and the rest stays."""
        config = decentralized(windowed("rolling", (0.5,)) | {"rounds": 1})
        slow = SlowPeers(config)
        expected = slow.run()[-1]
        assert error(models(config), expected) < 1e-6

    def test_all_of_capacity_1_are_the_homogeneous_run(self) -> None:
        """A level that has no share leaves peers that hold everything, mixed through the other path."""
        alone = models(decentralized(modes(**STACKED)))
        changes = windowed("rolling", (0.5, 1.0)) | {"submodel.shares": [0, 1]}
        assert torch.allclose(models(decentralized(changes)), alone, rtol=1e-5, atol=1e-6)

    def test_costs_are_those_of_windows(self, tmp_path: Path) -> None:
        done = run(decentralized(windowed("rolling") | {"rounds": 1}), out=tmp_path / "run")
        parts = build(parse(decentralized(windowed("rolling"))))
        plan, sizes = parts.planner.plan(0), [64 * w + w + 10 * w + 10 for w in (8, 16, 32)]
        assert done.metrics[0]["total_bytes_up"] == sum(2 * 4 * sizes[variant] for variant in plan.variant.tolist())

    @pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
    def test_one_that_is_not_finite(self, tmp_path: Path, mode: dict[str, bool]) -> None:
        faulty = {"workload.name": "faulty:Faulty", "workload.clients": [3], "rounds": 2}
        done = run(decentralized(windowed("rolling", **mode) | faulty), out=tmp_path / "run")
        assert [event["client"] for event in events(done.directory, "update-dropped")] == [3, 3]
        assert all(bool(torch.isfinite(value).all()) for value in done.params.values())

    @pytest.mark.parametrize("strategy", [None, "rolling"])
    @pytest.mark.parametrize(
        ("algorithm", "reason"),
        [
            ("dsgt", "the trackers' sum must stay"),
            ("d2", "the correction belongs to coordinates"),
            ("exact-diffusion", "the correction belongs to coordinates"),
            ("push-sum", "a peer's weight is the same for all coordinates"),
            ("choco-sgd", "neighbours know a peer by the sum"),
            ("dsgd-ceca", "its mixings need all coordinates"),
            ({"name": "dsgd", "order": "combine-while-adapt"}, "peers add their own change"),
        ],
        ids=str,
    )
    def test_who_cannot(self, tmp_path: Path, algorithm: Any, reason: str, strategy: str | None) -> None:
        changes = {"algorithm": algorithm, "submodel": {"capacities": [0.5, 1.0], "strategy": strategy}}
        with pytest.raises(ConfigError, match=f"trains whole models only, because {reason}"):
            run(decentralized(changes), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
