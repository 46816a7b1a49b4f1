"""FIARSE: masks of single weights, against a loop by hand and against its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import slow
from federation import STACKED, configure, digest, events, mixed, modes, relative_error
from gossamer import run
from gossamer.algorithms.fiarse import FIARSE
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.reports.window_coverage import examine
from gossamer.submodel import Layout

WIDTH, LEVELS = 27, (0.3, 0.5, 1.0)
LENGTH = {0.3: 8, 0.5: 13, 1.0: 27}
MASKED = ("hidden0.weight", "output.weight")
SQUARE = Layout.of({"a": (4, 4)}, {"a": ("rows", "columns")})
SCARCE = {"clients.partition": {"name": "n-classes", "n": 4}}


def federation(changes: Mapping[str, Any] | None = None, **mode: bool) -> dict[str, Any]:
    """Eight clients of three sizes, whose hidden layers do not divide evenly."""
    model = {"workload.model": {"name": "mlp", "hidden": [WIDTH]}, "clients.per_round": 6}
    return configure(mixed("fiarse", LEVELS, **mode) | model | (changes or {}))


# ---- by hand


def thresholds(model: Mapping[str, Tensor], capacity: float) -> dict[str, float]:
    """Sort every matrix, and take the least of its largest weights."""
    found = dict.fromkeys(model, 0.0)
    for name in MASKED:
        rows, columns = model[name].shape
        kept = LENGTH[capacity] * (columns if name == "hidden0.weight" else rows)
        if capacity < 1:
            found[name] = sorted(model[name].abs().flatten().tolist(), reverse=True)[kept - 1]
    return found


def slow_client(
    parts: Parts, model: Mapping[str, Tensor], theta: Mapping[str, float], round: int, client: int
) -> dict[str, Tensor]:
    """Train one client, one weight formula at a time."""
    train, local = parts.config.train, {name: value.clone() for name, value in model.items()}
    velocity = {name: torch.zeros_like(value) for name, value in model.items()}
    labels_held = parts.workload.client_labels(np.array([client])).float()
    for numbers in slow.sample_order(parts, round, client):
        images, labels = slow.training_samples(parts, numbers)
        active = {name: (value.abs() >= theta[name]).float() for name, value in local.items()}
        used = {name: (value * active[name]).requires_grad_() for name, value in local.items()}
        logits = slow.perceptron(used, images)
        if parts.workload.options.label_mask == "zero":
            logits = logits * labels_held
        grads = dict(zip(used, torch.autograd.grad(F.cross_entropy(logits, labels), list(used.values())), strict=True))
        for name, weight in local.items():
            size, least = weight.abs(), theta[name]
            gain = 1 + 2 * least * size / (size + least) ** 2 if least else torch.ones_like(size)
            grads[name] = grads[name] * gain * active[name]
        if train.clip_norm is not None:
            norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
            grads = {name: grad * min(1.0, train.clip_norm / float(norm)) for name, grad in grads.items()}
        for name in local:
            step = grads[name] + train.weight_decay * local[name] * active[name]
            velocity[name] = train.momentum * velocity[name] + step
            local[name] = local[name] - train.lr * velocity[name]
    return local


def slow_run(parts: Parts) -> dict[str, Tensor]:
    model = slow.initial_model(parts)
    for round in range(parts.config.rounds):
        plan = parts.planner.plan(round)
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.items()}
        weight = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.items()}
        for client, variant in zip(plan.client.tolist(), plan.variant.tolist(), strict=True):
            theta = thresholds(model, LEVELS[variant])
            owned = parts.workload.client_labels(np.array([client]))[0].double()
            for name, value in slow_client(parts, model, theta, round, client).items():
                counts = float(parts.workload.num_samples[client]) * (model[name].abs() >= theta[name]).double()
                if name.startswith("output") and parts.config.submodel.mask_labels:
                    counts *= owned.view(-1, *(1,) * (value.dim() - 1))
                total[name] += counts * (value - model[name])
                weight[name] += counts
        model = {
            name: torch.where(weight[name] > 0, value + total[name] / weight[name].clamp_min(1e-9), value).float()
            for name, value in model.items()
        }
    return model


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workload.label_mask": "none", "submodel.mask_labels": False},
        {"train.momentum": 0.9, "train.weight_decay": 0.01, "train.lr": 0.05, "train.epochs": 2},
        {"train.clip_norm": 0.5},
    ],
    ids=["as it comes", "no label masks", "momentum", "clipped"],
)
def test_equals_a_slow_version(tmp_path: Path, changes: dict[str, Any], stacked: bool) -> None:
    config = federation(SCARCE | changes, **(STACKED if stacked else {}))
    done = run(config, out=tmp_path / "run")
    parts = build(parse(config))
    expected = slow_run(parts)
    assert relative_error(done.params, expected) < 1e-5
    assert relative_error(expected, slow.initial_model(parts)) > 1e-2


# ---- beside its neighbours


def test_capacity_one_is_federated_averaging(tmp_path: Path) -> None:
    same = {"submodel": {"capacities": [1.0], "mask_labels": False}, "workload.label_mask": "none"}
    plain = run(configure({"algorithm": "fedavg"} | modes()), out=tmp_path / "fedavg")
    whole = run(configure({"algorithm": "fiarse"} | same | modes()), out=tmp_path / "fiarse")
    assert relative_error(whole.params, plain.params) < 1e-6


def test_differs_from_other_methods(tmp_path: Path) -> None:
    found = {digest(run(federation({"algorithm": a}), out=tmp_path / a).params) for a in ("fiarse", "heterofl")}
    assert len(found) == 2


def test_workers_and_blocks_change_no_bits(tmp_path: Path) -> None:
    ways = [(0, "auto"), (0, 1), (1, 2), (2, "auto")]
    for mode in ({}, STACKED):
        found = set()
        for workers, block in ways:
            config = federation({"engine.workers": workers, "engine.block_size": block}, **mode)
            found.add(digest(run(config, out=tmp_path / f"{len(mode)}-{workers}-{block}").params))
        assert len(found) == 1


def test_convolutions_and_batch_normalisation(tmp_path: Path) -> None:
    """The same run in either order of memory."""
    resnet = {"workload.model": {"name": "preact-resnet18", "width": 0.0625}, "rounds": 1, "clients.per_round": 3}
    resnet |= {"workload.dataset": {"name": "synthetic", "num_train": 64, "num_test": 10, "shape": [3, 16, 16]}}
    plain, last = (
        run(federation(resnet | modes(LEVELS, channels_last=last)), out=tmp_path / str(last)) for last in (False, True)
    )
    assert relative_error(last.params, plain.params) < 1e-4


# ---- what is trained


def test_what_nobody_got_keeps_its_bits(tmp_path: Path) -> None:
    small = {"submodel.capacities": [0.3], "rounds": 1} | modes((0.3,))
    config = federation(small)
    parts, done = build(parse(config)), run(config, out=tmp_path / "run")
    before = slow.initial_model(parts)
    for name, least in thresholds(before, 0.3).items():
        masked = before[name].abs() < least
        assert torch.equal(done.params[name][masked], before[name][masked])
        assert not torch.equal(done.params[name][~masked], before[name][~masked])
        if name in MASKED:
            assert 0.2 < float((~masked).float().mean()) < 0.4


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.02, 1.0), st.integers(0, 99))
def test_masks_hold_what_a_window_would(rows: int, columns: int, capacity: float, seed: int) -> None:
    """Of every matrix as many weights as the sub-model of that capacity has, the largest ones; vectors whole."""
    layout = Layout.of({"a": (rows, columns), "bias": (rows,)}, {"a": ("rows", "columns"), "bias": ("rows",)})
    x = layout.flatten(layout.views(torch.randn(layout.d, generator=torch.Generator().manual_seed(seed))))
    bound = FIARSE({}).of_capacity(layout, capacity)
    found, model = layout.views(bound.evaluated(x)), layout.views(x)
    size = layout.cut(capacity).shapes[0]
    assert int((found["a"] != 0).sum()) == size[0] * size[1]
    assert torch.equal(found["bias"], model["bias"])
    kept = found["a"] != 0
    assert torch.equal(found["a"][kept], model["a"][kept])
    assert bool((model["a"][~kept].abs()[:, None] <= model["a"][kept].abs()).all())


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20), st.floats(0, 2, width=32), st.floats(-2, 2))
def test_the_biased_gradient(weights: list[float], theta: float, arriving: float) -> None:
    x = torch.tensor(weights, dtype=torch.float64).requires_grad_()
    threshold = torch.full_like(x, theta)
    shown = FIARSE({}).of_capacity(SQUARE, 0.5).forward(x, {"threshold": threshold})
    (grad,) = torch.autograd.grad(shown, x, torch.full_like(x, arriving))
    for weight, value, found in zip(weights, shown.tolist(), grad.tolist(), strict=True):
        size = abs(weight)
        assert value == (weight if size >= theta else 0.0)
        gain = 1 + 2 * theta * size / (size + theta) ** 2 if theta else 1.0
        assert found == pytest.approx(arriving * gain if size >= theta else 0.0, rel=1e-6)


def test_sub_models_are_evaluated_masked(tmp_path: Path) -> None:
    config = federation({"evaluation": {"every": 3, "by_capacity": True}})
    done, parts = run(config, out=tmp_path / "run"), build(parse(config))
    images, labels = slow.evaluation_samples(parts)
    found = done.metrics[-1]["accuracy_by_capacity"]
    for capacity in LEVELS:
        theta = thresholds(done.params, capacity)
        masked = {name: value * (value.abs() >= theta[name]) for name, value in done.params.items()}
        right = slow.perceptron(masked, images).argmax(1) == labels
        assert found[f"{capacity:g}"] == pytest.approx(float(right.float().mean()))
    assert done.metrics[-1]["accuracy"] == found["1"]


def test_costs_are_those_of_the_whole_model(tmp_path: Path) -> None:
    done = run(federation({"rounds": 1}), out=tmp_path / "run")
    variants = events(done.directory, "variant")
    assert len(variants) == len(LEVELS)
    parameters = sum(value.numel() for value in done.params.values())
    assert {event["num_parameters"] for event in variants} == {parameters}
    assert {event["bytes_down"] for event in variants} == {4 * parameters}
    assert {event["bytes_up"] for event in variants} == {4 * parameters + -(-parameters // 8)}
    # The masked weights of the layer whose input has a gradient are kept for the backward pass besides.
    memory = {event["capacity"]: event["memory_bytes"] for event in variants}
    assert memory[0.3] - memory[1.0] == memory[0.5] - memory[1.0] == 4 * done.params["output.weight"].numel()


def test_momentum_of_the_server_moves_what_was_reached_only(tmp_path: Path) -> None:
    small = {"submodel.capacities": [0.3], "rounds": 2, "algorithm": {"name": "fiarse", "server_momentum": 0.9}}
    config = federation(small | modes((0.3,)))
    before = slow.initial_model(build(parse(config)))
    first = run(config | {"rounds": 1}, out=tmp_path / "first").params
    second = run(config, out=tmp_path / "second").params
    for name in MASKED:
        out = before[name].abs() < thresholds(before, 0.3)[name]
        out &= first[name].abs() < thresholds(first, 0.3)[name]
        left = first[name].abs() < thresholds(first, 0.3)[name]
        assert bool(out.any())
        assert torch.equal(second[name][out], before[name][out])
        assert torch.equal(second[name][left], first[name][left])


def test_binding_leaves_the_algorithm_alone() -> None:
    algorithm = FIARSE({"server_lr": 0.5}, momentum=0.9)
    bound = algorithm.of_capacity(SQUARE, 0.5)
    assert (algorithm.layers, len(bound.layers)) == ((), 1)
    assert (bound.options, bound.momentum) == (algorithm.options, 0.9)


def test_its_coverage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'fiarse' masks single weights by the model as it is trained"):
        examine(write(tmp_path, federation()))


def write(tmp_path: Path, config: Mapping[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(dict(config)))
    return path


def test_what_is_not_a_number_is_not_hidden() -> None:
    x = torch.full((16,), torch.nan)
    for capacity in (0.5, 1.0):
        assert bool(FIARSE({}).of_capacity(SQUARE, capacity).evaluated(x).isnan().all())
