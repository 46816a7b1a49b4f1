"""FjORD: ordered dropout and self-distillation, against a loop by hand and against its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import slow
from federation import assert_same, configure, digest, mixed, modes, relative_error
from gossamer import rng, run
from gossamer.algorithms.fjord import FjORD, counted, divergence, prefix
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.engines.training.modes import admissible
from gossamer.errors import ConfigError
from gossamer.submodel import Cutter, Dim, Layout
from gossamer.submodel.strategies import static

WIDTH, LEVELS = 27, (0.3, 0.5, 1.0)
LENGTH = {0.3: 8, 0.5: 13, 1.0: 27}  # 0.3 / 0.5 of 13 channels would be 7
DISTILLING = {"name": "fjord", "distillation": True, "alpha": 0.7}
DISTILLING_OPTIONS = {"distillation": True}
SCARCE = {"clients.partition": {"name": "n-classes", "n": 4}}


def federation(algorithm: Any, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Eight clients of three sizes, whose hidden layers do not divide evenly."""
    model = {"workload.model": {"name": "mlp", "hidden": [WIDTH]}, "clients.per_round": 6}
    return configure(mixed(algorithm, LEVELS) | model | (changes or {}))


# ---- by hand


def masked_logits(parts: Parts, params: Mapping[str, Tensor], images: Tensor, client: int, p: float) -> Tensor:
    scale = 1 / p if parts.config.submodel.scaler else 1.0
    logits = slow.perceptron(params, images, scale)
    if parts.workload.options.label_mask == "zero":
        logits = logits * parts.workload.client_labels(np.array([client])).float()
    return logits


def first_channels(params: Mapping[str, Tensor], p: float) -> dict[str, Tensor]:
    length = LENGTH[p]
    return {
        "hidden0.weight": params["hidden0.weight"][:length],
        "hidden0.bias": params["hidden0.bias"][:length],
        "output.weight": params["output.weight"][:, :length],
        "output.bias": params["output.bias"],
    }


def slow_client(parts: Parts, model: Mapping[str, Tensor], round: int, client: int, limit: float) -> dict[str, Tensor]:
    """Train one client; return its sub-model of `limit`."""
    local = {name: value.clone().requires_grad_() for name, value in first_channels(model, limit).items()}
    options, train = parts.algorithm.options, parts.config.train
    optimizer = torch.optim.SGD(local.values(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    allowed = [level for level in LEVELS if level <= limit]
    for step, numbers in enumerate(slow.sample_order(parts, round, client)):
        images, labels = slow.training_samples(parts, numbers)
        draw = rng.generator(parts.config.seed, "fjord-width", round, 0, client, step).integers(len(allowed))
        p = allowed[draw]
        student = masked_logits(parts, first_channels(local, p), images, client, p)
        if options.distillation:
            teacher = masked_logits(parts, local, images, client, limit)
            target = teacher.detach().log_softmax(1)
            away = F.kl_div(student.log_softmax(1), target, log_target=True, reduction="batchmean")
            loss = F.cross_entropy(teacher, labels) + options.alpha * away
        else:
            loss = F.cross_entropy(student, labels)
        optimizer.zero_grad()
        loss.backward()
        for name, value in local.items():  # what a step does not reach has the gradient 0, not none
            value.grad = torch.zeros_like(local[name]) if value.grad is None else value.grad
        optimizer.step()
    return {name: value.detach() for name, value in local.items()}


def slow_run(parts: Parts) -> dict[str, Tensor]:
    model = slow.initial_model(parts)
    for round in range(parts.config.rounds):
        plan = parts.planner.plan(round)
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.items()}
        weight = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.items()}
        for client, variant in zip(plan.client.tolist(), plan.variant.tolist(), strict=True):
            limit, samples = LEVELS[variant], float(parts.workload.num_samples[client])
            owned = parts.workload.client_labels(np.array([client]))[0].double()
            for name, value in slow_client(parts, model, round, client, limit).items():
                here = tuple(slice(0, size) for size in value.shape)
                held = torch.full(value.shape, samples, dtype=torch.float64)
                if name.startswith("output") and parts.config.submodel.mask_labels:
                    held *= owned.view(-1, *(1,) * (value.dim() - 1))
                total[name][here] += held * value
                weight[name][here] += held
        model = {n: torch.where(weight[n] > 0, total[n] / weight[n], value).float() for n, value in model.items()}
    return model


@pytest.mark.parametrize("algorithm", ["fjord", DISTILLING], ids=["plain", "distilling"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"submodel.scaler": False, "workload.label_mask": "none", "submodel.mask_labels": False},
        {"train.momentum": 0.9, "train.weight_decay": 0.01, "train.lr": 0.02, "train.epochs": 2},
    ],
    ids=["as it comes", "bare", "momentum"],
)
def test_equals_a_slow_version(tmp_path: Path, algorithm: Any, changes: dict[str, Any]) -> None:
    config = federation(algorithm, SCARCE | changes)
    done = run(config, out=tmp_path / "run")
    expected = slow_run(build(parse(config)))
    assert relative_error(done.params, expected) < 1e-5
    assert relative_error(expected, slow.initial_model(build(parse(config)))) > 1e-2


# ---- beside its neighbours


def final(tmp_path: Path, algorithm: Any, changes: Mapping[str, Any] | None = None, name: str = "") -> str:
    where = tmp_path / (name or str(len(list(tmp_path.iterdir()))))
    return digest(run(federation(algorithm, changes), out=where).params)


def test_is_neither_heterofl_nor_without_distillation(tmp_path: Path) -> None:
    algorithms = ["heterofl", "fjord", {"name": "fjord", "distillation": True}, DISTILLING]
    assert len({final(tmp_path, algorithm) for algorithm in algorithms}) == 4


def test_another_seed_draws_other_widths() -> None:
    parts = build(parse(federation("fjord")))
    first, again, second = (widths(FjORD({}), parts.task, 1.0, seed) for seed in (0, 0, 1))
    assert first == again != second


@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_one_level_is_federated_averaging(tmp_path: Path, capacity: float) -> None:
    """Every step then trains the whole sub-model, and not a bit differs."""
    same = {"submodel": {"capacities": [capacity], "strategy": "static", "mask_labels": False, "scaler": True}}
    same |= {"workload.label_mask": "none"} | modes((capacity,))
    plain, ordered = (run(configure({"algorithm": a} | same), out=tmp_path / a) for a in ("fedavg", "fjord"))
    assert_same(plain, ordered)


def test_distillation_of_no_weight_is_heterofl(tmp_path: Path) -> None:
    nothing = {"name": "fjord", "distillation": True, "alpha": 0.0}
    scaled = {"submodel.scaler": True}
    methods = (("heterofl", "a"), (nothing, "b"))
    plain, weightless = (run(federation(a, scaled), out=tmp_path / name) for a, name in methods)
    assert relative_error(weightless.params, plain.params) < 1e-6


@pytest.mark.parametrize("algorithm", ["fjord", DISTILLING], ids=["plain", "distilling"])
def test_workers_and_blocks_change_no_bits(tmp_path: Path, algorithm: Any) -> None:
    ways = [{"engine.workers": w, "engine.block_size": b} for w, b in ((0, "auto"), (0, 1), (1, 2), (2, "auto"))]
    assert len({final(tmp_path, algorithm, way) for way in ways}) == 1


def test_convolutions(tmp_path: Path) -> None:
    """The same run in either order of memory: a prefix of a convolution is cut from strided leaves."""
    cnn = {"workload.model": {"name": "cnn", "width": 0.25}, "rounds": 1}
    plain, last = (
        run(federation(DISTILLING, cnn | modes(LEVELS, channels_last=last)), out=tmp_path / str(last))
        for last in (False, True)
    )
    assert relative_error(last.params, plain.params) < 1e-5


def test_small_sub_models_learn(tmp_path: Path) -> None:
    """On digits, prefixes that every client trains are better than those that only small clients train."""
    levels = (0.125, 0.5, 1.0)
    changes = {
        "workload": {"dataset": "digits", "model": {"name": "mlp", "hidden": [64]}},
        "clients": {"num": 20, "per_round": 10},
        "rounds": 30,
        "train.lr": 0.05,
        "submodel.shares": [1, 1, 3],
        "submodel.scaler": False,
        "evaluation": {"every": 30, "by_capacity": True},
        "checkpoint.every_seconds": 1000,
    }
    last = {}
    for name, algorithm in {"plain": "fjord", "distilling": {**DISTILLING, "alpha": 1}, "heterofl": "heterofl"}.items():
        last[name] = run(configure(mixed(algorithm, levels) | changes), out=tmp_path / name).metrics[-1]
    for name in ("plain", "distilling"):
        assert last[name]["accuracy"] > last["heterofl"]["accuracy"] - 0.05
        accuracy, other = (last[one]["accuracy_by_capacity"]["0.125"] for one in (name, "heterofl"))
        assert accuracy > max(0.7, other)


# ---- how it is trained


def test_is_trained_one_by_one() -> None:
    assert {mode.stacked for mode in admissible(build(parse(federation("heterofl"))).task)} == {False, True}
    assert {mode.stacked for mode in admissible(build(parse(federation("fjord"))).task)} == {False}


def test_stacking_is_refused() -> None:
    config = federation("fjord", modes(LEVELS, stacked=True, padding=True))
    with pytest.raises(
        ConfigError, match=r"engine.modes stacks capacity 0.3, but algorithm 'fjord' trains .* use auto"
    ):
        build(parse(config))


def test_padding_is_left_out(tmp_path: Path) -> None:
    """Short batches may be padded, though nothing is stacked: the padded samples count nowhere."""
    padded = run(federation(DISTILLING, modes(LEVELS, padding=True)), out=tmp_path / "padded")
    short = run(federation(DISTILLING), out=tmp_path / "short")
    assert relative_error(padded.params, short.params) < 1e-5


@pytest.mark.parametrize("mask", ["none", "zero", "minus-inf"])
def test_label_masks(tmp_path: Path, mask: str) -> None:
    """Distillation stays finite where the logits of absent classes are minus infinity."""
    done = run(
        federation(DISTILLING, SCARCE | {"workload.label_mask": mask, "clients.quorum": 1}), out=tmp_path / "run"
    )
    assert all(bool(torch.isfinite(value).all()) for value in done.params.values())


def test_a_workload_without_logits_is_refused() -> None:
    task = SimpleNamespace(workload=object(), capacities=LEVELS)
    with pytest.raises(ConfigError, match="needs logits, but workload 'object' has no methods 'logits'"):
        FjORD(DISTILLING_OPTIONS).local_loss(task, 0.5, {}, {}, lambda purpose: np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"destillation": True}, "unknown key 'algorithm.destillation'; did you mean 'distillation'?"),
        ({"alpha": -1}, "algorithm.alpha = -1: input should be greater than or equal to 0"),
        ({"server_lr": 0}, "algorithm.server_lr = 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FjORD(options)
    assert expected in str(caught.value)


def test_what_it_fixes() -> None:
    traits = FjORD.traits
    assert (traits.strategy, traits.capacities, traits.default_label_mask) == ("static", "given", "zero")
    algorithm = FjORD({"server_momentum": 0.5}, momentum=0.9, weight_decay=0.1)
    assert (algorithm.options.server_momentum, algorithm.momentum, algorithm.weight_decay) == (0.5, 0.9, 0.1)


# ---- widths


def widths(
    algorithm: FjORD, task: Any, capacity: float, seed: int = 0, num_steps: int = 300
) -> list[tuple[int, float]]:
    """Return the hidden width and the scale that each of many steps trains."""
    seen: list[tuple[int, float]] = []

    def loss(params: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        seen.append((len(params["hidden0.bias"]), batch["scale"]))
        return torch.zeros(())

    recording = SimpleNamespace(
        workload=SimpleNamespace(loss=loss), cutter=task.cutter, capacities=task.capacities, scaler=task.scaler
    )
    sub = task.cutter.sub_layout(capacity)
    params = sub.views(torch.zeros(sub.d))
    for step in range(num_steps):
        batch = {"scale": 1 / capacity if task.scaler else 1.0}
        algorithm.local_loss(
            recording, capacity, params, batch, lambda purpose, step=step: rng.generator(seed, purpose, extra=step)
        )
    return seen


@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("capacity", LEVELS)
def test_widths_are_uniform_up_to_the_limit(capacity: float, scaler: bool) -> None:
    task = build(parse(federation("fjord", {"submodel.scaler": scaler}))).task
    allowed = [level for level in LEVELS if level <= capacity]
    seen = widths(FjORD({}), task, capacity)
    assert set(seen) == {(LENGTH[level], 1 / level if scaler else 1.0) for level in allowed}
    expected = FjORD({}).mean_passes(LEVELS, capacity)
    for level in allowed:
        share = sum(length == LENGTH[level] for length, _ in seen) / len(seen)
        assert share == pytest.approx(expected[level], abs=0.1)


def test_mean_passes() -> None:
    third = pytest.approx(1 / 3)
    assert FjORD({}).mean_passes((1.0, 0.25, 0.5), 1.0) == {0.25: third, 0.5: third, 1.0: third}
    assert FjORD({}).mean_passes((0.25, 0.5, 1.0), 0.25) == {0.25: 1.0}
    assert FjORD(DISTILLING_OPTIONS).mean_passes((0.25, 0.5, 1.0), 1.0) == {0.25: third, 0.5: third, 1.0: 1.0}
    assert FjORD(DISTILLING_OPTIONS).mean_passes((0.25, 0.5, 1.0), 0.5) == {0.25: 0.5, 0.5: 1.0}


@given(st.data(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3))
def test_a_prefix_of_a_sub_model_is_a_smaller_one(data: Any, a: int, b: int, outer: int, inner: int) -> None:
    """Cut from a sub-model or from the whole model, the first channels are the same ones."""
    few, many = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=2, max_size=2)))
    axes = {
        "conv": ("a", None, None, None),
        "flat": ("b", Dim("a", inner=inner)),
        "fused": (Dim("b", outer=outer), "a"),
        "out": ("label", Dim("b", outer=outer, inner=inner)),
    }
    shapes = {"conv": (a, 2, 3, 3), "flat": (b, a * inner), "fused": (outer * b, a), "out": (5, outer * b * inner)}
    layout = Layout.of(shapes, axes)
    cutter = Cutter(layout, static, 1, 0)
    x = torch.randn(layout.d, generator=torch.Generator().manual_seed(a))
    models = []
    for capacity in (few, many):
        cut = cutter.cut(capacity, 0, 0)
        models.append(cut.sub.views(cut.read(x, torch.zeros(cut.sub.d))))
    found = prefix(models[1], layout, cutter.sub_layout(few))
    assert list(found) == list(models[0])
    for name, value in found.items():
        assert torch.equal(value, models[0][name]), name


# ---- divergence


def two_logits(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second


@pytest.mark.parametrize("shape", [(6,), (3, 2)], ids=["images", "texts"])
def test_divergence_is_that_of_torch(shape: tuple[int, ...]) -> None:
    teacher, student = two_logits(*shape, 4)
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    everything = torch.ones(shape, dtype=torch.bool)
    assert float(divergence(teacher, student, everything)) == pytest.approx(float(expected.mean()))
    some = torch.tensor([True, False, True, True, False, False]).view(shape)
    assert float(divergence(teacher, student, some)) == pytest.approx(float(expected[some].mean()))
    assert float(divergence(teacher, teacher, everything)) == 0
    assert float(divergence(teacher, student, ~everything)) == 0


def test_divergence_leaves_out_absent_classes() -> None:
    teacher, student = two_logits(6, 4)
    present, everything = torch.tensor([True, False, True, True]), torch.ones(6, dtype=torch.bool)
    masked = torch.where(present, student, -torch.inf).requires_grad_()
    found = divergence(torch.where(present, teacher, -torch.inf), masked, everything)
    expected = divergence(teacher[:, present], student[:, present], everything)
    assert float(found.detach()) == pytest.approx(float(expected))
    (grad,) = torch.autograd.grad(found, masked)
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[:, ~present] == 0).all())


def test_what_counts() -> None:
    """Padded samples count nothing, and neither do negative labels, which stand beyond the end of a text."""
    assert counted({"y": torch.tensor([0, 3, 1])}).tolist() == [True, True, True]
    assert counted({"y": torch.tensor([0, 3, 0]), "mask": torch.tensor([1.0, 1, 0])}).tolist() == [True, True, False]
    texts = {"y": torch.tensor([[0, 3], [2, -1], [1, 1]]), "mask": torch.tensor([1.0, 1, 0])}
    assert counted(texts).tolist() == [[True, True], [True, False], [False, False]]
