"""The engine of peers: against a slow simulator, and against itself for every number of workers and size of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from federation import LEVELS, SINGLY, STACKED, digest, modes
from gossamer import run
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.engines import peers as every_engine
from gossamer.engines.base import EngineSetup
from gossamer.engines.local import peers
from gossamer.engines.local.peers import LocalPeerEngine
from gossamer.engines.task import WHOLE
from gossamer.engines.training.peer_worker import _consecutive
from slow_peers import LEAST_SQUARES, SlowPeers, decentralized, error

RANDOM_K = {"name": "random-k", "share": 0.2}
METHODS: dict[str, dict[str, Any]] = {
    "dsgd": {},
    "momentum": {"train.momentum": 0.9, "train.weight_decay": 0.01},
    "quasi-global-momentum": {"algorithm": "quasi-global-momentum", "train.momentum": 0.9},
    "dsgt": {"algorithm": "dsgt"},
    "push-sum": {"algorithm": "push-sum", "peers.topology": "slow_peers:pushing"},
    "choco-sgd": {"algorithm": {"name": "choco-sgd", "compressor": RANDOM_K, "gamma": 0.1}},
    "dsgd-ceca": {"algorithm": "dsgd-ceca", "peers.topology": "ceca"},
}
OTHER_METHODS: dict[str, dict[str, Any]] = {
    "overlapping": {"algorithm": {"name": "dsgd", "order": "combine-while-adapt"}},
    "mixed-momentum": {"algorithm": {"name": "dsgd", "mix_momentum": True}, "train.momentum": 0.9},
    "gossip-pga": {"algorithm": {"name": "gossip-pga", "period": 3}},
    "d2": {"algorithm": "d2", "train.steps": 1, "peers.topology": {"name": "ring", "lazy": True}},
    "exact-diffusion": {"algorithm": "exact-diffusion", "train.steps": 1},
    "top-k": {"algorithm": {"name": "choco-sgd", "compressor": {"name": "top-k", "k": 2}, "gamma": 0.2}},
}
MERGING = [name for name in [*METHODS, "gossip-pga", "mixed-momentum"] if name != "choco-sgd"]
TOPOLOGIES: dict[str, Any] = {
    "shift": "od-equidyn",
    "shifts": "static-exp",
    "matching": "random-match",
    "block": {"name": "hyper-hypercube", "k": 1},
    "sparse": "star",
    "row-stochastic": {"name": "el-local", "degree": 2},
}
UNEQUAL = {"peers.partition": {"name": "dirichlet", "alpha": 0.3}, "train.batch_size": 4}
WORKLOADS: dict[str, dict[str, Any]] = {
    "softmax-stacked": {"workload.model": "softmax"} | modes(**STACKED) | UNEQUAL,
    "mlp-stacked": modes(**STACKED) | UNEQUAL,
    "mlp-one-by-one": modes(**SINGLY) | UNEQUAL,
    "least-squares": LEAST_SQUARES,
}


class Outcome(NamedTuple):
    """What is left after all rounds: state, each round's losses by peer, measurements, sums of the evaluation."""

    state: dict[str, Tensor]
    losses: list[dict[int, float]]
    measured: dict[str, Any]
    sums: dict[str, list[float]]


def drive(parts: Parts, workers: int = 0, block_size: int | None = None) -> Outcome:
    """Run all rounds on an engine of peers."""
    x = parts.workload.init(parts.config.seed)
    engine = LocalPeerEngine(parts.task, x, EngineSetup(workers=workers, block_size=block_size))
    try:
        losses = []
        for round in range(parts.config.rounds):
            plan, found = parts.planner.plan(round), {}
            for result in engine.train(plan):
                assert result.finite == [True] * len(result.loss)
                found |= dict(zip(plan.client[result.rows].tolist(), result.loss, strict=True))
            engine.exchange(plan)
            losses.append(dict(sorted(found.items())))
        state = {name: value.clone() for name, value in engine.read().items()}
        sums = {name: value.tolist() for name, value in engine.evaluate(WHOLE, 0).items()}
        return Outcome(state, losses, engine.measure(parts.planner.own_models(0, 3)), sums)
    finally:
        engine.close()


def bits(outcome: Outcome) -> tuple[Any, ...]:
    return digest(outcome.state), *outcome[1:]


def built(*changes: Mapping[str, Any]) -> Parts:
    merged: dict[str, Any] = {}
    for one in changes:
        merged |= one
    return build(parse(decentralized(merged)))


class TestBits:
    @pytest.mark.sweep(keep=0.25)
    @pytest.mark.parametrize("workload", WORKLOADS)
    @pytest.mark.parametrize("method", METHODS)
    def test_workers_and_blocks(self, monkeypatch: pytest.MonkeyPatch, workload: str, method: str) -> None:
        """Of unequal clients, the blocks are not consecutive peers: steps sort them."""
        monkeypatch.setattr(peers, "SMALL_FLOATS", 0)  # workers mix, too
        parts = built({"rounds": 2, "peers.num": 11}, WORKLOADS[workload], METHODS[method])
        plan = parts.planner.plan(0)
        assert (plan.client.tolist() == list(range(11))) == (workload == "least-squares")
        reference = bits(drive(parts))
        for way in [(0, 1), (0, 2), (0, 8), (1, None), (2, 4), (2, 1)]:
            assert bits(drive(parts, *way)) == reference, f"workers and block size {way} change the result"

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("method", METHODS)
    def test_panels(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        """Panels of 16 columns, mixed by workers at once, give the state of a single panel."""
        parts = built({"rounds": 2, "peers.num": 5}, WORKLOADS["mlp-stacked"], METHODS[method])
        whole = drive(parts)
        monkeypatch.setattr(peers, "SMALL_FLOATS", 0)
        monkeypatch.setattr(every_engine, "panels", lambda n, d, size: [slice(lo, lo + 16) for lo in range(0, d, 16)])
        for workers in (0, 2):
            narrow = drive(parts, workers)
            assert digest(narrow.state) == digest(whole.state)
            near = pytest.approx(whole.measured["consensus_distance"], rel=1e-6)
            assert narrow.measured["consensus_distance"] == near

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("strategy", ["rolling", "static", "random"])
    @pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
    def test_windows(self, strategy: str, mode: dict[str, bool]) -> None:
        levels = {"submodel": {"capacities": list(LEVELS), "strategy": strategy}} | modes(LEVELS, **mode)
        parts = built({"rounds": 2, "peers.num": 11}, UNEQUAL, levels, METHODS["momentum"])
        reference = bits(drive(parts))
        for way in [(0, 1), (0, 4), (2, 2)]:
            assert bits(drive(parts, *way)) == reference

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_convolutions(self, channels_last: bool) -> None:
        changes = {"rounds": 1, "workload.model": {"name": "cnn", "width": 0.125}, "peers.num": 5}
        parts = built(changes, modes(channels_last=channels_last), METHODS["quasi-global-momentum"])
        reference = bits(drive(parts))
        for way in [(0, 1), (2, 2)]:
            assert bits(drive(parts, *way)) == reference

    def test_whole_runs(self, tmp_path: Path) -> None:
        models = [
            run(decentralized({"engine.workers": workers, "engine.block_size": size}), out=tmp_path / str(workers))
            for workers, size in ((0, "auto"), (1, 4), (2, 2))
        ]
        assert len({digest(one.params) for one in models}) == 1

    def test_seeds_differ(self) -> None:
        """The comparisons above could fail."""
        assert len({digest(drive(built({"seed": seed})).state) for seed in range(3)}) == 3


class TestPlaces:
    @given(peers_of_block=st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True))
    @example(peers_of_block=[0, 2, 1, 3])
    def test_rows_of_a_block(self, peers_of_block: list[int]) -> None:
        """Whether they are a slice or an index, they are those of the block, in its order."""
        wanted = np.array(peers_of_block)
        assert torch.arange(9)[_consecutive(wanted)].tolist() == peers_of_block
        assert isinstance(_consecutive(np.arange(min(peers_of_block), 9)), slice)


class TestSlowSimulator:
    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
    @pytest.mark.parametrize("method", METHODS)
    def test_images(self, method: str, mode: dict[str, bool]) -> None:
        changes = {"rounds": 5, "peers.num": 6, "train.lr": 0.05} | UNEQUAL | modes(**mode) | METHODS[method]
        slow = SlowPeers(decentralized(changes))
        assert error(drive(slow.parts).state["x"], slow.run()[-1]) < 1e-5

    @pytest.mark.parametrize("method", METHODS | OTHER_METHODS)
    def test_least_squares(self, method: str) -> None:
        changes = LEAST_SQUARES | {"rounds": 5, "peers.num": 7} | (METHODS | OTHER_METHODS)[method]
        slow = SlowPeers(decentralized(changes))
        assert error(drive(slow.parts).state["x"], slow.run()[-1]) < 1e-12

    @pytest.mark.sweep(keep=0.25)
    @pytest.mark.parametrize(
        ("name", "method"),
        [
            (name, method)
            for name in TOPOLOGIES
            for method in ("dsgd", "momentum", "quasi-global-momentum", "dsgt", "push-sum")
            if name != "row-stochastic" or method not in ("dsgt", "push-sum")
        ],
    )
    def test_topologies(self, name: str, method: str) -> None:
        changes = LEAST_SQUARES | {"rounds": 5} | METHODS[method] | {"peers.topology": TOPOLOGIES[name]}
        slow = SlowPeers(decentralized(changes))
        assert error(drive(slow.parts).state["x"], slow.run()[-1]) < 1e-12

    @pytest.mark.parametrize("changes", [{"train.clip_norm": 0.3}, {"train.epochs": 2}, {"train.steps": 5}], ids=str)
    def test_options_of_training(self, changes: dict[str, Any]) -> None:
        slow = SlowPeers(decentralized({"rounds": 3} | UNEQUAL | modes(**STACKED) | changes))
        assert error(drive(slow.parts).state["x"], slow.run()[-1]) < 1e-5

    @pytest.mark.parametrize("method", ["dsgd", "d2", "choco-sgd"])
    def test_peers_that_start_apart(self, method: str) -> None:
        apart = {"workload.name": "slow_peers:Scattered", "rounds": 3}
        slow = SlowPeers(decentralized(LEAST_SQUARES | (METHODS | OTHER_METHODS)[method] | apart))
        assert len(np.unique(slow.x, axis=0)) == 8
        assert error(drive(slow.parts).state["x"], slow.run()[-1]) < 1e-12

    def test_two_peers(self) -> None:
        for method in ("dsgd", "dsgt", "push-sum", "choco-sgd"):
            changes = LEAST_SQUARES | {"rounds": 3} | METHODS[method] | {"peers": {"num": 2, "topology": "complete"}}
            slow = SlowPeers(decentralized(changes))
            assert error(drive(slow.parts).state["x"], slow.run()[-1]) < 1e-12


class TestMerges:
    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("method", MERGING)
    @pytest.mark.parametrize("changes", [{"peers.merge_every": 2}, {"peers.final_merge": True}], ids=str)
    def test_slow_simulator(self, method: str, changes: dict[str, Any]) -> None:
        options = LEAST_SQUARES | {"rounds": 4, "peers.num": 7} | (METHODS | OTHER_METHODS)[method]
        slow = SlowPeers(decentralized(options | changes))
        found = drive(slow.parts)
        assert error(found.state["x"], slow.run()[-1]) < 1e-12
        assert found.measured["consensus_distance"] < 1e-12

    def test_the_merged_model_is_not_changed(self, tmp_path: Path) -> None:
        """W keeps the mean, and so does a merge; peers that never merge stay apart."""
        changes = LEAST_SQUARES | {"rounds": 1}
        for topology in ("ring", "od-equidyn", "random-match"):
            models = []
            for merge in (False, True):
                peers_of_run = {"peers.topology": topology, "peers.final_merge": merge}
                done = run(decentralized(changes | peers_of_run), out=tmp_path / f"{topology}-{merge}")
                models.append(done.params["x"])
                assert (done.metrics[-1]["consensus_distance"] < 1e-12) == merge
            assert error(models[0], models[1].numpy()) < 1e-12


class TestMeasures:
    def test_by_hand(self, tmp_path: Path) -> None:
        done = run(decentralized({"evaluation": {"num_peers": 3}}), out=tmp_path / "run")
        parts = build(parse(decentralized()))
        rows = drive(parts).state["x"]
        record, mean = done.metrics[-1], rows.double().numpy().mean(0)
        distance = np.sqrt(np.square(rows.double().numpy() - mean).sum(1).mean())
        assert record["consensus_distance"] == pytest.approx(float(distance), rel=1e-6)
        layout = parts.workload.layout
        merged = layout.views(torch.from_numpy(mean).float())
        assert all(torch.equal(value, merged[name]) for name, value in done.params.items())

        def metrics_of(row: Tensor) -> dict[str, float]:
            """Evaluate one model."""
            chunks = range(parts.workload.num_evaluation_chunks)
            parts_of = [parts.workload.evaluate(layout.views(row), {}, chunk) for chunk in chunks]
            return parts.workload.metrics({name: sum(one[name] for one in parts_of) for name in parts_of[0]})

        whole, each = metrics_of(torch.from_numpy(mean).float()), [metrics_of(rows[i]) for i in (0, 2, 5)]
        for name in ("accuracy", "loss"):
            assert record[name] == pytest.approx(whole[name], rel=1e-12)
            values = [one[name] for one in each]
            expected = {"mean": np.mean(values), "min": min(values), "max": max(values)}
            assert record[f"{name}_peers"] == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("workload", ["least-squares", "mlp-stacked"])
    def test_merged_metrics_are_those_of_the_final_model(self, tmp_path: Path, workload: str) -> None:
        done = run(decentralized(WORKLOADS[workload]), out=tmp_path / "run")
        loaded = built(WORKLOADS[workload]).workload
        parts_of = [loaded.evaluate(done.params, {}, chunk) for chunk in range(loaded.num_evaluation_chunks)]
        for name, value in loaded.metrics({key: sum(one[key] for one in parts_of) for key in parts_of[0]}).items():
            assert done.metrics[-1][name] == pytest.approx(value, rel=1e-12)

    def test_number_of_peers(self) -> None:
        parts = built({"rounds": 1, "peers.num": 4})
        engine = LocalPeerEngine(parts.task, parts.workload.init(0), EngineSetup(workers=0))

        def measured(count: int) -> dict[str, Any]:
            return engine.measure(parts.planner.own_models(0, count))

        assert list(measured(0)) == ["consensus_distance"]
        assert measured(0)["consensus_distance"] < 1e-6
        list(engine.train(parts.planner.plan(0)))
        engine.exchange(parts.planner.plan(0))
        assert measured(4) == measured(400)
        assert measured(4)["loss_peers"]["min"] < measured(4)["loss_peers"]["max"]
        engine.close()

    def test_what_a_workload_measures_itself(self, tmp_path: Path) -> None:
        done = run(decentralized(LEAST_SQUARES), out=tmp_path / "run")
        slow = SlowPeers(decentralized(LEAST_SQUARES))
        optimum = slow.parts.workload.optimum.x.numpy()
        errors = slow.run()[-1][:, : len(optimum)] - optimum
        assert done.metrics[-1]["peers_squared_distance"] == pytest.approx(np.square(errors).sum(1).mean(), rel=1e-10)

    def test_the_merged_model_by_capacity(self, tmp_path: Path) -> None:
        levels = {"submodel": {"capacities": list(LEVELS), "strategy": "rolling"}} | modes(LEVELS, **STACKED)
        done = run(decentralized(levels | {"evaluation": {"by_capacity": True}}), out=tmp_path / "run")
        record = done.metrics[-1]
        assert set(record["accuracy_by_capacity"]) == {"0.25", "0.5", "1"}
        assert record["accuracy_by_capacity"]["1"] == record["accuracy"]
        assert record["loss_by_capacity"]["0.25"] != record["loss"]
