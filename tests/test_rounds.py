"""The loop: what a round costs and measures, and what is logged of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from federation import LEVELS, assert_same, configure, digest, events, failing, mixed, modes, without_clocks
from gossamer import resume, run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.base import EngineHooks
from gossamer.engines.local.engine import LocalEngine
from gossamer.errors import ConfigError, RoundAborted, StateLost
from gossamer.experiment import Hooks
from gossamer.profiling.spans import Spans
from gossamer.reports.curves import main_metric
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.client_store import ClientStore
from gossamer.storage.runlog import RunLog
from gossamer.submodel import extract
from gossamer.workloads.images import ImageClassification
from slow import AXES, evaluation_samples, initial_model, perceptron, training_samples
from slow_peers import decentralized

ALL_EIGHT = {"workload.dataset.num_train": 160, "clients": {"num": 8, "per_round": 8}}  # 20 samples each
COSTS = ("total_bytes_up", "total_bytes_down", "total_client_flops", "total_samples", "simulated_seconds")


def num_parameters(hidden: int) -> int:
    """Count those of a perceptron 64 - hidden - 10, biases included."""
    return 64 * hidden + hidden + hidden * 10 + 10


def flops_per_sample(hidden: int) -> int:
    """Count multiplications and additions: each matrix forward and for its gradient, the second for its input too."""
    return 2 * (2 * 64 * hidden + 3 * hidden * 10)


class TestCosts:
    """Bytes, FLOPs and simulated seconds, counted by hand for a perceptron of 32 hidden units."""

    def test_mixed_capacities(self, tmp_path: Path) -> None:
        """Of eight clients two have 8 hidden units, two have 16 and four have 32."""
        device = {"flops_per_second": 1e6, "download_bytes_per_second": 1e4, "upload_bytes_per_second": 1e3}
        changes = mixed("fedrolex") | {"submodel.shares": [1, 1, 2], "device": device, "train.epochs": 2}
        done = run(configure(changes | ALL_EIGHT), out=tmp_path / "run")
        size = 4 * (2 * num_parameters(8) + 2 * num_parameters(16) + 4 * num_parameters(32))
        flops = 2 * 20 * (2 * flops_per_sample(8) + 2 * flops_per_sample(16) + 4 * flops_per_sample(32))
        slowest = 4 * num_parameters(32) * (1e-4 + 1e-3) + 2 * 20 * flops_per_sample(32) / 1e6
        for rounds, record in enumerate(done.metrics, start=1):
            assert record["total_bytes_up"] == record["total_bytes_down"] == rounds * size
            assert record["total_client_flops"] == rounds * flops
            assert record["total_samples"] == rounds * 2 * 20 * 8
            assert "total_tokens" not in record
            assert record["simulated_seconds"] == pytest.approx(rounds * slowest)

    def test_partial_participation(self, tmp_path: Path) -> None:
        """Every round counts those who take part: here, all clients of one drawn capacity in turn."""
        changes = mixed("heterofl", (0.25, 1.0)) | {"submodel.assignment": "dynamic", "clients.per_round": 3}
        config = configure(changes)
        planner = build(parse(config)).planner
        expected = 0
        for record in run(config, out=tmp_path / "run").metrics:
            variants = planner.plan(record["round"] - 1).variant
            assert len(variants) == record["num_participants"] == record["num_survivors"] == 3
            expected += 4 * sum(num_parameters((8, 32)[variant]) for variant in variants)
            assert record["total_bytes_up"] == expected

    def test_two_arrays_cost_twice_as_much(self, tmp_path: Path) -> None:
        done = run(configure({"algorithm": "scaffold"}), out=tmp_path / "run")
        assert done.metrics[0]["total_bytes_up"] == 2 * 5 * 4 * num_parameters(32)
        assert done.metrics[0]["total_bytes_down"] == 2 * 5 * 4 * num_parameters(32)


class TestRecords:
    def test_fields(self, tmp_path: Path) -> None:
        done = run(configure({"train.schedule": {"name": "multistep", "milestones": [1]}}), out=tmp_path / "run")
        logged = (done.directory / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) | {"digest": ""} for line in logged] == [one | {"digest": ""} for one in done.metrics]
        assert [record["round"] for record in done.metrics] == [1, 2, 3]
        assert [record["lr"] for record in done.metrics] == pytest.approx([0.1, 0.01, 0.01])
        for record, next_one in zip(done.metrics, done.metrics[1:], strict=False):
            assert record["wall_seconds"] < next_one["wall_seconds"]
            assert all(record[name] < next_one[name] for name in COSTS)
        for record in done.metrics:
            seconds = record["phase_seconds"]
            assert {"train", "exchange", "evaluate"} <= set(seconds)
            assert seconds["train"] + seconds["exchange"] + seconds["evaluate"] <= record["round_seconds"]
            assert 0 <= record["accuracy"] <= 1
            assert record["train_loss"] > 0
        assert list(done.metrics[0]["phase_seconds"]) == ["commit", "train", "exchange", "evaluate"]

    @pytest.mark.parametrize("weighting", ["samples", "equal"])
    def test_training_loss_is_weighted_as_updates_are(self, tmp_path: Path, weighting: str) -> None:
        """With one step on all of a client's samples it is the loss of the model that was sent out."""
        changes = {"train.batch_size": 150, "rounds": 1, "clients.weighting": weighting} | modes()
        config = configure(ALL_EIGHT | changes | {"clients.partition": {"name": "dirichlet", "alpha": 0.3}})
        parts, losses = build(parse(config)), []
        for client in range(8):
            images, labels = training_samples(parts, parts.workload.partition.of_client(client).tolist())
            losses.append(float(F.cross_entropy(perceptron(initial_model(parts), images), labels)))
        samples = parts.workload.num_samples
        expected = np.average(losses, weights=samples if weighting == "samples" else np.ones(8))
        assert abs(np.mean(losses) - np.average(losses, weights=samples)) > 1e-3  # the comparison could fail
        assert run(config, out=tmp_path / "run").metrics[0]["train_loss"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("name", ["round", "train_loss", "consensus_distance", "loss_peers", "run"])
    def test_a_metric_with_the_name_of_something_else(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured = ImageClassification.measured
        monkeypatch.setattr(ImageClassification, "measured", lambda *given: measured(*given) | {name: 0.0})
        with pytest.raises(ConfigError, match=f"the workload has a metric '{name}', but .* taken: rename the metric"):
            run(decentralized({"evaluation.num_peers": 2}), out=tmp_path / "run")

    def test_validation_takes_the_place_of_the_test_data(self, tmp_path: Path) -> None:
        changes = {"workload.validation": 0.2, "rounds": 1, "evaluation.by_capacity": True}
        done = run(configure(mixed("fedrolex") | changes), out=tmp_path / "run")
        measured = {"validation_accuracy", "validation_loss", "validation_accuracy_by_capacity"}
        assert measured <= done.metrics[0].keys()
        assert not {"accuracy", "loss", "accuracy_by_capacity"} & done.metrics[0].keys()
        assert main_metric(done.metrics[0]) == "validation_accuracy"
        peers = run(decentralized({"workload.validation": 0.2, "rounds": 1}), out=tmp_path / "peers")
        assert "validation_loss_peers" in peers.metrics[0]

    def test_an_observer_is_told(self, tmp_path: Path) -> None:
        seen: list[Any] = []

        class Watch:
            def on_block(self, round: int, done: int, total: int) -> None:
                seen.append((round, done, total))

            def on_round(self, record: Mapping[str, Any]) -> None:
                seen.append(record["round"])

        config = configure({"rounds": 2, "engine.block_size": 2, "name": "observed"})
        names: list[Any] = []
        hooks = Hooks(observer=lambda name, rounds: (names.append((name, rounds)), Watch())[1])
        run(config, out=tmp_path / "run", hooks=hooks)
        assert names == [("observed", 2)]
        assert seen == [(0, 2, 5), (0, 4, 5), (0, 5, 5), 1, (1, 2, 5), (1, 4, 5), (1, 5, 5), 2]


class TestMissing:
    """Participants that trained, but return nothing."""

    def test_every_row_is_reported(self, tmp_path: Path) -> None:
        parts = build(parse(configure({"engine.block_size": 2})))
        reported: list[Any] = []
        engine, _ = parts.start_engine(tmp_path, EngineHooks(stop_requested=lambda: bool(reported)))
        reports = engine.train(parts.planner.plan(0))
        first = next(reports)
        reported.append(first)
        missing = list(reports)
        assert (first.missing, first.finite) == (None, [True, True])
        assert [report.missing for report in missing] == ["stopped", "stopped"]
        assert [report.finite for report in missing] == [[False, False], [False]]
        assert [report.rows for report in (first, *missing)] == [slice(0, 2), slice(2, 4), slice(4, 5)]

    def test_lost(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They count as dropped, and the others' changes are averaged."""
        original = LocalEngine._train_blocks, LocalEngine.train
        monkeypatch.setattr(
            LocalEngine, "_train_blocks", lambda self, plan, blocks: original[0](self, plan, blocks[1:])
        )
        monkeypatch.setattr(
            LocalEngine,
            "train",
            lambda self, plan: (one._replace(missing=one.missing and "lost") for one in original[1](self, plan)),
        )
        config = configure({"engine.block_size": 2, "rounds": 1, "clients.quorum": 0.5})
        plan, done = build(parse(config)).planner.plan(0), run(config, out=tmp_path / "run")
        assert events(done.directory, "update-dropped") == [
            {"round": 1, "client": client, "reason": "lost"} for client in plan.client[:2].tolist()
        ]
        assert (done.metrics[0]["num_participants"], done.metrics[0]["num_survivors"]) == (5, 3)


class TestEvaluation:
    def accuracy(self, params: Mapping[str, torch.Tensor]) -> float:
        """Compute the accuracy on all test data with plain operations."""
        images, labels = evaluation_samples(build(parse(configure())))
        return float((perceptron(params, images).argmax(1) == labels).float().mean())

    @pytest.mark.parametrize(("every", "rounds", "expected"), [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 3, [3])])
    def test_every(self, tmp_path: Path, every: int, rounds: int, expected: list[int]) -> None:
        done = run(configure({"evaluation.every": every, "rounds": rounds}), out=tmp_path / "run")
        assert [record["round"] for record in done.metrics if "accuracy" in record] == expected
        assert done.metrics[-1]["accuracy"] == pytest.approx(self.accuracy(done.params))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_by_capacity(self, tmp_path: Path, workers: int) -> None:
        """Sub-models are those of the round's windows, evaluated without the scaler."""
        changes = mixed("fedrolex") | {"evaluation.by_capacity": True, "engine.workers": workers}
        done = run(configure(changes | {"workload.evaluation_chunk": 7}), out=tmp_path / "run")
        last = done.metrics[-1]
        assert list(last["accuracy_by_capacity"]) == list(last["loss_by_capacity"]) == ["0.25", "0.5", "1"]
        for level in LEVELS:
            sub = extract(done.params, AXES, level, round=2)
            assert last["accuracy_by_capacity"][f"{level:g}"] == pytest.approx(self.accuracy(sub.params))
        for name in ("accuracy", "loss", "local_accuracy", "worst_client_accuracy"):
            assert last[f"{name}_by_capacity"]["1"] == last[name]
            assert list(last[f"{name}_by_capacity"]) == ["0.25", "0.5", "1"]

    def test_evaluation_changes_no_training(self, tmp_path: Path) -> None:
        often = run(configure(mixed("fedrolex") | {"evaluation.by_capacity": True}), out=tmp_path / "often")
        once = run(configure(mixed("fedrolex") | {"evaluation.every": 3}), out=tmp_path / "once")
        assert digest(often.params) == digest(once.params)

    def test_local_evaluation(self, tmp_path: Path) -> None:
        changes = {"clients.partition": {"name": "n-classes", "n": 2}, "rounds": 1}
        record = run(configure(changes), out=tmp_path / "on").metrics[0]
        assert record["worst_client_accuracy"] <= record["local_accuracy"] <= 1
        assert record["accuracy"] < record["local_accuracy"]  # two classes are easier to tell apart than ten
        off = run(configure(changes | {"workload.local_evaluation": False}), out=tmp_path / "off").metrics[0]
        assert set(record) - set(off) == {"local_accuracy", "worst_client_accuracy"}


class TestLostState:
    """An engine whose sites lose what they hold goes on from the last commit."""

    @pytest.mark.sweep(keep=0.5, together=("span", "started", "back_to"))
    @pytest.mark.parametrize("make", [configure, decentralized])
    @pytest.mark.parametrize(("every_seconds", "back_to"), [(0, 2), (1000, 0)])
    @pytest.mark.parametrize(("span", "started"), [("train", True), ("exchange", True), ("exchange", False)])
    def test_same_bits(
        self, tmp_path: Path, make: Callable[..., Any], every_seconds: float, back_to: int, span: str, started: bool
    ) -> None:
        config = make({"rounds": 4, "checkpoint.every_seconds": every_seconds})
        whole = run(config, out=tmp_path / "whole")
        lossy = run(config, out=tmp_path / "lossy", hooks=failing(span, started, 3, StateLost))
        assert_same(lossy, whole)
        assert events(lossy.directory, "state-lost") == [
            {"round": 2, "back_to": back_to, "times": 1, "reason": f"{span} 3"}
        ]
        assert [record["round"] for record in lossy.metrics] == [1, 2, 3, 4]

    def test_again_and_again(self, tmp_path: Path) -> None:
        """Three losses without a commit in between are borne, the fourth is told."""

        def spans() -> Spans:
            def listen(span: str, starts: bool) -> None:
                if span == "exchange" and (losses or Checkpoints(path).latest().round == 2):  # type: ignore[union-attr]
                    losses.append(span)
                    raise StateLost("all gone")

            made = Spans()
            made.listeners.append(listen)
            return made

        losses, path = list[str](), tmp_path / "run" / "checkpoints"
        with pytest.raises(StateLost, match=r"^all gone$"):
            run(configure({"rounds": 5}), out=tmp_path / "run", hooks=Hooks(spans=spans))
        assert len(losses) == 4
        assert [event["times"] for event in events(tmp_path / "run", "state-lost")] == [3]  # the log goes back, too
        assert_same(resume(tmp_path / "run"), run(configure({"rounds": 5}), out=tmp_path / "whole"))


class TestCommits:
    def test_a_round_that_was_not_evaluated_is_not_committed(self, tmp_path: Path) -> None:
        """Its state is not that of the round before."""
        config = configure({"checkpoint.every_seconds": 1000})
        whole = run(config, out=tmp_path / "whole")
        with pytest.raises(RoundAborted):
            run(config, out=tmp_path / "run", hooks=failing("evaluate", True, 2, RoundAborted))
        assert_same(resume(tmp_path / "run"), whole)

    @pytest.mark.parametrize(("keep", "kept"), [(2, [4, 5]), (4, [2, 3, 4, 5])])
    def test_after_every_round(self, tmp_path: Path, keep: int, kept: list[int]) -> None:
        done = run(configure({"rounds": 5, "checkpoint.keep": keep}), out=tmp_path / "run")
        assert sorted(int(path.name) for path in (done.directory / "checkpoints").iterdir()) == kept

    def test_seldom(self, tmp_path: Path) -> None:
        """The first and the last state are always committed, and no state twice."""
        done = run(configure({"rounds": 5, "checkpoint.every_seconds": 1000}), out=tmp_path / "run")
        assert sorted(int(path.name) for path in (done.directory / "checkpoints").iterdir()) == [0, 5]

    def test_content(self, tmp_path: Path) -> None:
        done = run(configure({"algorithm.server_momentum": 0.5}), out=tmp_path / "run")
        latest = Checkpoints(done.directory / "checkpoints").latest()
        assert latest is not None
        assert set(latest.arrays) == {"state.x", "state.velocity"}
        workload = build(parse(configure())).workload
        assert digest(workload.layout.views(latest.arrays["state.x"][0])) == digest(done.params)
        last = {name: done.metrics[-1][name] for name in ("round", "wall_seconds", *COSTS)}
        unstopped = {"best_value": None, "num_stale": 0, "stop_reason": ""}
        assert latest.progress == last | unstopped | {"phase": 0, "phases": []}
        assert latest.logs["metrics.jsonl"].num_bytes == (done.directory / "metrics.jsonl").stat().st_size

    def test_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Logs and private rows are on the disk before a commit refers to them; what is old goes afterwards."""
        calls: list[str] = []

        def watch(owner: type, name: str) -> None:
            original = getattr(owner, name)

            def called(*arguments: Any, **options: Any) -> Any:
                calls.append(name)
                return original(*arguments, **options)

            monkeypatch.setattr(owner, name, called)

        for owner, name in (
            (ClientStore, "index"),
            (RunLog, "sync"),
            (Checkpoints, "commit"),
            (ClientStore, "release"),
        ):
            watch(owner, name)
        run(configure({"algorithm": "scaffold", "rounds": 2}), out=tmp_path / "run")
        assert len(calls) == 3 * 4
        for number in range(3):
            one = calls[4 * number : 4 * number + 4]
            assert (set(one[:2]), one[2:]) == ({"index", "sync"}, ["commit", "release"])

    def test_rarity_changes_nothing(self, tmp_path: Path) -> None:
        seldom = run(configure({"checkpoint.every_seconds": 1000}), out=tmp_path / "seldom")
        often = run(configure({"checkpoint.every_seconds": 0}), out=tmp_path / "often")
        assert digest(seldom.params) == digest(often.params)
        assert without_clocks(seldom.metrics) == without_clocks(often.metrics)


def test_one_pass_of_each_capacity_serves_all_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model, all clients' views of their own classes and the worst of them come from the same logits."""
    passes: dict[tuple[str, int], int] = {}
    for name in ("statistics", "evaluate"):
        original = getattr(ImageClassification, name)

        def counted(self: Any, params: Any, *rest: Any, name: str = name, original: Any = original) -> Any:
            key = name, sum(value.numel() for value in params.values())
            passes[key] = passes.get(key, 0) + 1
            return original(self, params, *rest)

        monkeypatch.setattr(ImageClassification, name, counted)
    resnet = {"model": {"name": "preact-resnet18", "width": 0.0625}, "evaluation_chunk": 20, "statistics_chunk": 30}
    data = {"name": "synthetic", "num_train": 90, "num_test": 40, "shape": [3, 8, 8]}
    changes = mixed("fedrolex", (0.5, 1.0)) | {"workload": {"dataset": data, **resnet}, "rounds": 1}
    changes |= {"evaluation": {"by_capacity": True}, "clients.partition": {"name": "n-classes", "n": 3}}
    done = run(configure(changes), out=tmp_path / "run")
    assert {"accuracy", "local_accuracy", "worst_client_accuracy"} <= set(done.metrics[-1])
    assert sorted(passes.values()) == [2, 2, 3, 3]  # chunks of test data, of training data; each of two capacities
