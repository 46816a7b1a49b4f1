"""Clients of unequal modalities and sizes: what travels, what is averaged, and who changes what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from federation import configure, digest
from gossamer.build import build
from gossamer.config.loading import load, parse
from gossamer.errors import ConfigError
from video_language import MODELS, SMALL

SENSES = {"video+text": 0.5, "text": 0.25, "video": 0.25}
TRAIN = {"lr": 1e-3, "batch_size": 8, "steps": 2, "optimizer": {"name": "adam"}}


def config(**changes: Any) -> dict[str, Any]:
    """Return a federation of eight clients, two of them of text alone and two of video."""
    workload = {"name": "video-language", **SMALL, "modalities": SENSES, **changes.pop("workload", {})}
    return {
        "rounds": 2,
        "workload": workload,
        "clients": {"num": 8, "per_round": 8},
        "train": TRAIN,
        "algorithm": "fedavg",
        "engine": {"name": "local", "workers": 0},
    } | changes


def initial(given: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the workload of a configuration, and its initial parameters."""
    made = build(parse(given)).workload
    return made, made.layout.views(made.init(0))


@pytest.mark.parametrize("capacities", [[1.0], [0.5, 1.0]])
def test_workers_change_no_bits(tmp_path: Path, capacities: list[float]) -> None:
    given = config(submodel={"capacities": capacities, "strategy": "rolling"})
    runs = [
        gossamer.run(given | {"engine": {"name": "local", "workers": workers}}, out=tmp_path / str(workers))
        for workers in (0, 2)
    ]
    assert len({digest(run.params) for run in runs}) == 1
    assert runs[0].metrics[-1]["total_bytes_up"] == runs[1].metrics[-1]["total_bytes_up"]


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("model", ["mplug-2", "tw-bert", "hitea"])
@pytest.mark.parametrize(("sense", "own"), [("text", {"text"}), ("video", {"vision", "recognition"})])
def test_a_unimodal_client_changes_no_other_modality(tmp_path: Path, model: str, sense: str, own: set[str]) -> None:
    """With weight decay, momentum and Adam: what a client does not hold keeps every bit."""
    given = config(workload={"modalities": {sense: 1.0}, "model": MODELS[model]}, rounds=1)
    given["train"] = TRAIN | {"optimizer": {"name": "adamw", "weight_decay": 0.1}}
    made, before = initial(given)
    after = gossamer.run(given, out=tmp_path / "run").params
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert own | ({"universal"} if model == "mplug-2" else set()) <= changed <= made.holdings[0].modules
    assert not changed & ({"vision", "latents"} if sense == "text" else {"text"})


def test_modules_are_trained_at_rates_and_by_optimizers_of_their_own(tmp_path: Path) -> None:
    """Vision stays as it is; SGD at a rate of nearly nothing moves the text encoder less than Adam does the rest."""
    given = config(rounds=1)
    slow = {"match": "text.*", "lr": 1e-6, "optimizer": {"name": "sgd", "momentum": 0.5}}
    given["train"] = TRAIN | {"groups": [{"match": "vision.*", "lr": 0}, slow]}
    _, before = initial(given)
    after = gossamer.run(given, out=tmp_path / "run").params
    moved = dict[str, float]()
    for name, value in before.items():
        module, distance = name.partition(".")[0], float((after[name] - value).abs().max())
        moved[module] = max(moved.get(module, 0.0), distance)
    assert moved["vision"] == 0
    assert 0 < moved["text"] < 1e-4 < moved["universal"]


@pytest.mark.parametrize("strategy", ["static", "rolling"])
def test_a_coordinate_is_averaged_over_its_holders(tmp_path: Path, strategy: str) -> None:
    """One step of SGD on all samples of each client, against the mean taken coordinate by coordinate."""
    model = {**SMALL["model"], "mask_rate": 1.0}  # so that no loss is random
    given = config(workload={"model": model}, rounds=1, submodel={"capacities": [0.5, 1.0], "strategy": strategy})
    given["train"] = {"lr": 0.5, "batch_size": 15, "steps": 1}
    given["submodel"]["scaler"] = False
    parts = build(parse(given))
    made, plan = parts.workload, parts.planner.plan(0)
    layout, row = made.layout, made.init(0)
    total, weights = torch.zeros(layout.d), torch.zeros(layout.d)
    for client, number in zip(plan.client.tolist(), plan.variant.tolist(), strict=True):
        cut = parts.task.cut(parts.task.variants[number], 0)
        held = cut.read(row, torch.zeros(cut.sub.d))
        leaves = {name: view.clone().requires_grad_() for name, view in cut.sub.views(held).items()}
        count = int(made.num_samples[client])
        batch = made.batch(np.array([client]), np.arange(count)[None])
        made.loss(leaves, {key: value[0] for part in batch for key, value in part.items()}).backward()
        stepped = {name: leaf.detach() - 0.5 * leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        assert stepped.keys() == leaves.keys()
        cut.add_(total, cut.sub.flatten(stepped), count)
        cut.add_(weights, cut.sub.flatten({name: torch.ones_like(one) for name, one in stepped.items()}), count)
    expected = layout.views(torch.where(weights > 0, total / weights.clamp_min(1), row))
    found = gossamer.run(given, out=tmp_path / "run").params
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_what_is_lacking_is_neither_sent_nor_counted() -> None:
    parts = build(parse(config(submodel={"capacities": [0.5, 1.0], "strategy": "rolling"})))
    layout, made = parts.workload.layout, parts.workload
    costs = {(one.capacity, one.holding): one for one in parts.planner.costs[0].variants}
    assert len(costs) == 6
    for holding in made.holdings:
        names = {name for name in layout.names if name.partition(".")[0] in holding.modules}
        sizes = [
            torch.Size(shape).numel() for name, shape in zip(layout.names, layout.shapes, strict=True) if name in names
        ]
        assert costs[1.0, holding.name].bytes_up == 4 * sum(sizes) == costs[1.0, holding.name].bytes_down
        assert costs[0.5, holding.name].bytes_up < costs[1.0, holding.name].bytes_up
    whole, text, video = (costs[1.0, name] for name in SENSES)
    assert text.flops_per_sample < video.flops_per_sample < whole.flops_per_sample
    assert max(text.memory_bytes, video.memory_bytes) < whole.memory_bytes


def test_the_round_counts_the_bytes_of_each_kind(tmp_path: Path) -> None:
    given = config(rounds=1)
    parts = build(parse(given))
    sizes = [one.bytes_up for one in parts.planner.costs[0].variants]
    kinds = parts.workload.client_holdings(np.arange(8))
    record = gossamer.run(given, out=tmp_path / "run").metrics[-1]
    assert record["total_bytes_up"] == sum(sizes[kind] for kind in kinds)


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [("fjord", "cuts sub-models of its own"), ("fiarse", "cuts sub-models"), ("scaffold", "whole models only")],
)
def test_algorithms_of_whole_models_are_refused(algorithm: str, reason: str) -> None:
    sub = {"capacities": [0.5, 1.0]} if algorithm != "scaffold" else {}
    given = config(algorithm=algorithm, submodel=sub)
    given["train"] = {"lr": 0.1, "batch_size": 8, "steps": 1}
    with pytest.raises(ConfigError, match=f"lack the modules.*{reason}"):
        build(parse(given))


def test_capacities_are_evaluated_with_all_modules(tmp_path: Path) -> None:
    given = config(
        submodel={"capacities": [0.5, 1.0], "strategy": "rolling"}, evaluation={"by_capacity": True}, rounds=1
    )
    record = gossamer.run(given, out=tmp_path / "run").metrics[-1]
    assert record["recall_at_10_by_capacity"].keys() == {"0.5", "1"}
    assert record["question_accuracy_by_capacity"].keys() == {"0.5", "1"}


def test_peers_of_unequal_modalities(tmp_path: Path) -> None:
    """They mix over a graph, each trains the modules that it has, and workers change no bits."""
    small = {"dataset": SMALL["dataset"], "model": SMALL["model"]}
    given = config(algorithm="dsgd", peers={"num": 4, "topology": "od-equidyn"}, workload=small, rounds=1)
    del given["clients"]
    given["train"] = {"lr": 0.01, "batch_size": 8, "steps": 1}
    runs = [
        gossamer.run(given | {"engine": {"name": "local", "workers": workers}}, out=tmp_path / str(workers))
        for workers in (0, 2)
    ]
    assert len({digest(run.params) for run in runs}) == 1
    assert math.isfinite(runs[0].metrics[-1]["loss"])


@pytest.mark.parametrize("workers", [0, 2])
def test_metrics_are_divided_by_what_clients_hold(tmp_path: Path, workers: int) -> None:
    """Against sub-models cut by hand, of each capacity and set of modules; a kind has what its tasks measure alone."""
    given = config(
        submodel={"capacities": [0.5, 1.0], "strategy": "static"},
        evaluation={"by_holding": True, "by_capacity": True},
        engine={"name": "local", "workers": workers},
    )
    done, made = gossamer.run(given, out=tmp_path / "a"), build(parse(given)).workload
    last = done.metrics[-1]
    both = {"video+text 0.5", "video+text 1"}
    assert {*last["motion_accuracy_by_holding"]} == both | {"video 0.5", "video 1"}
    assert {*last["loss_masked_language_by_holding"]} == both | {"text 0.5", "text 1"}
    assert {*last["recall_at_1_by_holding"]} == both
    for capacity in (0.5, 1.0):
        for holding in made.holdings:
            layout = made.layout.of_modules(holding.modules).cut(capacity)
            shapes = zip(layout.names, layout.shapes, strict=True)
            part = {name: done.params[name][tuple(map(slice, shape))] for name, shape in shapes}
            for name, value in made.metrics(made.evaluate(part, {}, 0)).items():
                assert last[f"{name}_by_holding"][f"{holding.name} {capacity:g}"] == pytest.approx(value, rel=1e-5)
    assert last["loss_by_holding"]["video+text 1"] == pytest.approx(last["loss"])
    plain = gossamer.run({**given, "evaluation": {}}, out=tmp_path / "b")
    assert digest(plain.params) == digest(done.params)


def test_what_all_hold_is_not_divided() -> None:
    given = configure({"evaluation": {"by_holding": True}})
    with pytest.raises(
        ConfigError, match=r"by_holding divides nothing, because all participants hold the same modules"
    ):
        build(parse(load(given)))
