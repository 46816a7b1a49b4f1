"""Local training against a slow, obvious version, and against itself where two configurations mean the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from federation import (
    LEVELS,
    MLP,
    SINGLY,
    STACKED,
    SYNTHETIC,
    assert_same,
    configure,
    digest,
    mixed,
    modes,
    relative_error,
)
from gossamer import run
from gossamer.algorithms.federated import FedAvg
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.engines.training import steps
from gossamer.errors import ConfigError
from gossamer.planning.schedule import learning_rate
from gossamer.registry import BUILTIN
from gossamer.storage.runlog import read_config
from gossamer.submodel import extract
from gossamer.workloads import models
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.partitions import Partition
from slow import AXES, initial_model, perceptron, sample_order, training_samples
from slow_peers import decentralized

SUB_MODEL_METHODS = {"fedrolex": "rolling", "heterofl": "static", "federated-dropout": "random"}
# No client holds all labels, and they differ in size: five or six batches, the last one short.
SKEWED = {"clients.partition": {"name": "n-classes", "n": 3}, "train.batch_size": 4}
EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


# ---- the slow version: one client, one sample order, one torch.optim.SGD at a time


def train_slowly(parts: Parts, round: int, client: int, start: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Train one client's sub-model with torch's own optimizer."""
    options, data = parts.config.train, parts.workload.data
    params = {name: value.clone().requires_grad_() for name, value in start.items()}
    rate = learning_rate(options.lr, options.schedule, round, parts.config.rounds)
    optimizer = torch.optim.SGD(params.values(), rate, momentum=options.momentum, weight_decay=options.weight_decay)
    held = set(data.train_labels[parts.workload.partition.of_client(client)].tolist())
    masked = [] if parts.workload.options.label_mask == "none" else [k for k in range(data.num_labels) if k not in held]
    for batch in sample_order(parts, round, client):
        images, labels = training_samples(parts, batch)
        logits = perceptron(params, images, scale)
        for label in masked:
            logits = logits.index_fill(1, torch.tensor([label]), 0.0)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        if options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), options.clip_norm)
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}


def average_slowly(old: dict[str, Tensor], sent: list[tuple[Any, dict[str, Tensor], float, set[int]]]) -> None:
    """Replace every coordinate of `old` by the weighted mean over those who hold it (labels: who own the label)."""
    totals = {name: np.zeros(value.shape) for name, value in old.items()}
    weights = {name: np.zeros(value.shape) for name, value in old.items()}
    for windows, params, weight, labels in sent:
        for name, value in params.items():
            where = [
                windows[axis].indices if axis in windows else np.arange(size)
                for axis, size in zip(AXES[name], old[name].shape, strict=True)
            ]
            share = np.full(value.shape, weight)
            if AXES[name][0] == "label":
                share[[label not in labels for label in range(len(share))]] = 0.0
            totals[name][np.ix_(*where)] += share * value.double().numpy()
            weights[name][np.ix_(*where)] += share
    for name, value in old.items():
        mean = torch.from_numpy(totals[name] / np.maximum(weights[name], 1e-300)).float()
        value.copy_(torch.where(torch.from_numpy(weights[name] > 0), mean, value))


def slow_federation(config: dict[str, Any]) -> dict[str, Tensor]:
    """Run a whole federation slowly and return its final model."""
    parts = build(parse(config))
    workload, sub = parts.workload, parts.config.submodel
    model = initial_model(parts)
    for round in range(parts.config.rounds):
        plan, sent = parts.planner.plan(round), []
        for client, variant in zip(plan.client.tolist(), plan.variant.tolist(), strict=True):
            capacity = parts.task.capacities[variant]
            cut = extract(model, AXES, capacity, round, sub.strategy, parts.config.seed, client, sub.stride)
            scale = 1 / capacity if sub.scaler else 1.0
            trained = train_slowly(parts, round, client, cut.params, scale)
            mine = workload.partition.of_client(client)
            labels = set(workload.data.train_labels[mine].tolist()) if sub.mask_labels else set(range(10))
            weight = float(len(mine)) if parts.config.clients.weighting == "samples" else 1.0
            sent.append((cut.windows, trained, weight, labels))
        average_slowly(model, sent)
    return model


# ---- against the slow version


@EITHER
@pytest.mark.parametrize("algorithm", ["fedavg", *SUB_MODEL_METHODS])
def test_slow_version(tmp_path: Path, algorithm: str, mode: dict[str, bool]) -> None:
    levels = LEVELS if algorithm in SUB_MODEL_METHODS else (1.0,)
    config = configure(mixed(algorithm, levels, **mode) | SKEWED)
    assert relative_error(run(config, out=tmp_path / "run").params, slow_federation(config)) < 1e-5


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize(
    "changes",
    [
        {"train.clip_norm": 0.3},
        {"train.clip_norm": 3.0},  # which half of the gradients keep to
        {"train.momentum": 0.9, "train.weight_decay": 0.05},
        {"train.epochs": 2, "train.schedule": {"name": "cosine", "warmup_rounds": 2}},
        {"submodel.scaler": False, "submodel.mask_labels": False, "workload.label_mask": "none"},
        {"clients.weighting": "equal", "submodel.assignment": "dynamic", "submodel.stride": 3},
        {"submodel.capacities": (0.25, 0.5), "clients.per_round": 2},
    ],
    ids=lambda changes: "{}={}".format(*next(iter(changes.items()))),
)
def test_slow_version_with_options(tmp_path: Path, changes: dict[str, Any], mode: dict[str, bool]) -> None:
    """The last one leaves coordinates that nobody holds."""
    config = configure(mixed("fedrolex", changes.get("submodel.capacities", LEVELS), **mode) | SKEWED | changes)
    assert relative_error(run(config, out=tmp_path / "run").params, slow_federation(config)) < 1e-5


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("large", [1, models.LARGE_WEIGHT])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedrolex"])
def test_gradients_that_are_never_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, large: int, mode: dict[str, bool]
) -> None:
    """Where steps are plain, a step of a matrix is taken by the two factors of its gradient."""
    levels = LEVELS if algorithm == "fedrolex" else (1.0,)
    config = configure(mixed(algorithm, levels, **mode) | SKEWED | {"engine.workers": 1})
    slow = slow_federation(config)
    monkeypatch.setattr(models, "LARGE_WEIGHT", large)
    monkeypatch.setattr(models, "FEW_SAMPLES", range(1, 99))
    with monkeypatch.context() as context:
        context.setattr(FedAvg, "is_plain_sgd", False)
        usual = run(config, out=tmp_path / "usual").params
    monkeypatch.setattr(steps, "step_in_place", only_biases(steps.step_in_place))
    factored = run(config, out=tmp_path / "factored").params
    assert relative_error(factored, slow) < 1e-5
    assert relative_error(factored, usual) < 1e-5


def only_biases(step: Callable[..., None]) -> Callable[..., None]:
    """Forbid steps by the gradient of a matrix."""

    def checked(algorithm: Any, carry: dict[str, Tensor], grad: Tensor, lr: float) -> None:
        assert grad.dim() == 2
        step(algorithm, carry, grad, lr)

    return checked


def test_server_options(tmp_path: Path) -> None:
    """A server step of 1/2 goes half the way; with momentum 1/2, half of the first change is added to the second."""
    initial = initial_model(build(parse(configure())))

    def after(rounds: int, **options: float) -> dict[str, Tensor]:
        config = configure({"rounds": rounds, "algorithm": {"name": "fedavg", **options}})
        return run(config, out=tmp_path / f"{rounds}-{options}").params

    one, two = after(1), after(2)
    half = {name: initial[name] + (one[name] - initial[name]) / 2 for name in one}
    assert relative_error(after(1, server_lr=0.5), half) < 1e-6
    assert digest(after(1, server_momentum=0.5)) == digest(one)
    faster = {name: two[name] + (one[name] - initial[name]) / 2 for name in one}
    assert relative_error(after(2, server_momentum=0.5), faster) < 1e-6


# ---- against itself


@pytest.mark.parametrize("algorithm", ["fedavg", *SUB_MODEL_METHODS])
@pytest.mark.parametrize("changes", [{}, {"train.clip_norm": 0.3, "train.momentum": 0.9}], ids=["plain", "clipped"])
def test_stacked_equals_one_by_one(tmp_path: Path, algorithm: str, changes: dict[str, Any]) -> None:
    levels = LEVELS if algorithm in SUB_MODEL_METHODS else (1.0,)
    stacked = run(configure(mixed(algorithm, levels, **STACKED) | SKEWED | changes), out=tmp_path / "stacked")
    singly = run(configure(mixed(algorithm, levels, **SINGLY) | SKEWED | changes), out=tmp_path / "singly")
    assert relative_error(stacked.params, singly.params) < 1e-5
    for record, other in zip(stacked.metrics, singly.metrics, strict=True):
        assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def test_one_mode_for_all_capacities(tmp_path: Path) -> None:
    config = configure(mixed("fedrolex", **STACKED) | SKEWED)
    listed = run(config, out=tmp_path / "listed")
    one = run(configure(mixed("fedrolex") | SKEWED | {"engine.modes": STACKED}), out=tmp_path / "one")
    assert digest(one.params) == digest(listed.params)
    assert read_config(one.directory)["engine"] == read_config(listed.directory)["engine"]
    with pytest.raises(ConfigError, match=r"engine\.modes"):
        parse(configure({"engine.modes": {"stack": True}}))


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("algorithm", ["fedrolex", "federated-dropout", "scaffold"])
def test_channels_last_changes_rounding_only(tmp_path: Path, algorithm: str, mode: dict[str, bool]) -> None:
    """Models sent, kept and received are in the one order, whatever the order in which they are trained."""
    images = {"workload.model": {"name": "cnn", "width": 0.125}, "workload.dataset.shape": [3, 8, 8]}
    levels = (1.0,) if algorithm.startswith("scaffold") else (0.5, 1.0)
    found = [
        run(configure(mixed(algorithm, levels, **way) | images | SKEWED), out=tmp_path / str(len(way))).params
        for way in (mode, mode | {"channels_last": True})
    ]
    assert relative_error(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("num", [8, 10], ids=["ragged", "even"])
def test_padding_and_formats_change_rounding_only(tmp_path: Path, num: int) -> None:
    changes = {"clients": {"num": num, "per_round": 5}, "workload.dataset.num_train": 160 + (num == 8)}
    cnn = {"workload.model": {"name": "cnn", "width": 0.125}}
    ways = [{"padding": True}, {"stacked": True, "padding": True}]
    if num == 10:  # 16 samples each: whole batches
        ways.append({"stacked": True})
    for model in ({}, cnn):
        reference = run(configure(modes() | changes | model), out=tmp_path / f"{len(model)}").params
        formats = ways + ([{"channels_last": True}, {"channels_last": True, **STACKED}] if model else [])
        for number, way in enumerate(formats):
            other = run(configure(modes(**way) | changes | model), out=tmp_path / f"{len(model)}-{number}").params
            assert relative_error(other, reference) < 1e-5, way


@pytest.mark.sweep(keep=0.34)
@EITHER
@pytest.mark.parametrize("algorithm", SUB_MODEL_METHODS)
@pytest.mark.parametrize("per_label", [False, True], ids=["plain-mean", "mean-per-label"])
def test_whole_models_are_fedavg(tmp_path: Path, algorithm: str, per_label: bool, mode: dict[str, bool]) -> None:
    """Clients of capacity 1 that hold all labels: every sub-model method is FedAvg, bit for bit."""
    changes = modes(**mode) | {"workload.dataset.num_train": 800, "workload.label_mask": "none"}
    plain = run(configure(changes), out=tmp_path / "fedavg")
    labels = build(parse(configure(changes))).workload.client_labels(np.arange(8))
    assert bool(labels.all())
    sub = {"algorithm": algorithm, "submodel.capacities": [1.0], "submodel.mask_labels": per_label}
    assert digest(run(configure(changes | sub), out=tmp_path / "sub").params) == digest(plain.params)


@EITHER
@pytest.mark.parametrize(("baseline", "hidden"), [("all-smallest", 16), ("all-largest", 32)])
def test_baselines_are_fedavg_of_another_width(
    tmp_path: Path, baseline: str, hidden: int, mode: dict[str, bool]
) -> None:
    levels = {"submodel": {"capacities": [0.5, 1.0], "shares": [1, 3]}}
    found = run(configure(modes(**mode) | {"algorithm": baseline} | levels | SKEWED), out=tmp_path / "baseline")
    model = {"workload.model": MLP | {"hidden": [hidden]}, "workload.label_mask": "zero"}
    plain = configure(modes(**mode) | model | {"submodel.mask_labels": True} | SKEWED)
    assert found.params["hidden0.weight"].shape == (hidden, 64)
    assert digest(found.params) == digest(run(plain, out=tmp_path / "fedavg").params)


def test_nothing_outside_the_windows_changes(tmp_path: Path) -> None:
    config = configure(mixed("heterofl", (0.25, 0.5), **STACKED))
    before = initial_model(build(parse(config)))
    after = run(config, out=tmp_path / "run").params
    assert torch.equal(after["hidden0.weight"][16:], before["hidden0.weight"][16:])
    assert torch.equal(after["output.weight"][:, 16:], before["output.weight"][:, 16:])
    assert not torch.isclose(after["hidden0.weight"][:16], before["hidden0.weight"][:16]).all(1).any()


# ---- batches larger than what a client has


@pytest.mark.parametrize("make", [configure, decentralized])
@pytest.mark.parametrize("mode", [STACKED, SINGLY])
def test_a_batch_ends_where_the_data_end(
    make: Callable[..., dict[str, Any]], mode: dict[str, bool], tmp_path: Path
) -> None:
    """The largest client's samples are as many as anybody needs, and nothing is made of those beyond."""
    given = modes(**mode) | {
        "workload.dataset": SYNTHETIC,
        "workload.model": MLP,
        "train.steps": 2,
        "train.epochs": None,
    }
    whole, huge = (make(given | {"train.batch_size": size}) for size in (19, 10**18))
    assert build(parse(huge)).task.batch_size == int(build(parse(huge)).workload.num_samples.max()) <= 19
    assert_same(run(whole, out=tmp_path / "whole"), run(huge, out=tmp_path / "huge"))


def test_no_sample_is_fetched_that_is_not_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One client has 136 of 150 samples; the others, with theirs, are not padded to as many."""
    monkeypatch.setitem(BUILTIN["partition"], "one-large", f"{__name__}:one_large")
    fetched: list[Any] = []
    batch = ImageClassification.batch

    def watched(self: Any, clients: Any, positions: Any, round: int = 0, phase: int = 0) -> Any:
        fetched.append(positions)
        return batch(self, clients, positions, round, phase)

    monkeypatch.setattr(ImageClassification, "batch", watched)
    changes = modes(**SINGLY) | {"clients.partition": "one-large", "train.batch_size": 1000, "clients.per_round": 8}
    run(configure(changes | {"rounds": 1}), out=tmp_path / "run")
    sizes = sorted(positions.shape[1] for positions in fetched if positions.shape[1] > 1)
    assert sizes == [2] * 7 + [136] * 2  # twice, because costs are counted by a batch of the largest client


def one_large(labels: Any, num_clients: int, num_labels: int, seed: int, owner: Any) -> Partition:
    """Two samples for every client but the first, which gets all others."""
    return Partition.of_clients(np.maximum(np.arange(len(labels)) // 2 - 67, 0), num_clients)
