"""What local steps may have besides an optimizer: groups of parameters, rates, parts of a batch, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from federation import LEVELS, SINGLY, STACKED, assert_same, configure, digest, mixed, modes, relative_error
from gossamer import run
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.engines.local_steps import LocalSchedule
from gossamer.errors import GossamerError
from slow import initial_model, perceptron, sample_order, training_samples

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
ONE = {"clients.per_round": 1, "rounds": 1, "workload.label_mask": "none", "train.epochs": 2}
RAGGED = {"clients.partition": {"name": "n-classes", "n": 3}, "train.batch_size": 4}  # five or six steps an epoch


def trained_slowly(parts: Parts, groups: dict[str, dict[str, float]], factors: list[float] | None = None) -> Any:
    """Return the model after a round of the only participant; `groups` has the options of each parameter in torch."""
    (client,) = parts.planner.plan(0).client.tolist()
    params = {name: value.requires_grad_() for name, value in initial_model(parts).items()}
    given = [{"params": [value], **groups.get(name, {})} for name, value in params.items()]
    optimizer = torch.optim.SGD(given, lr=parts.config.train.lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(sample_order(parts, 0, client)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 if factors is None else factors[step])
        images, labels = training_samples(parts, batch)
        optimizer.zero_grad()
        F.cross_entropy(perceptron(params, images), labels).backward()
        optimizer.step()
    return {name: value.detach() for name, value in params.items()}


@EITHER
def test_groups_are_those_of_torch(tmp_path: Path, mode: dict[str, bool]) -> None:
    given = [{"match": "output.*", "lr": 0.02, "weight_decay": 0.3}, {"match": "*.bias", "lr": 0.5}]
    changes = ONE | {"train.groups": given, "train.lr": 0.05} | modes(**mode)
    output, bias = {"lr": 0.02, "weight_decay": 0.3}, {"lr": 0.5}
    expected = {"output.weight": output, "output.bias": output, "hidden0.bias": bias}
    found = run(configure(changes), out=tmp_path / "run").params
    assert relative_error(found, trained_slowly(build(parse(configure(changes))), expected)) < 1e-6


@EITHER
def test_parameters_at_rate_0_keep_their_bits(tmp_path: Path, mode: dict[str, bool]) -> None:
    """As ``requires_grad=False`` in torch, also beside Adam with weight decay, whose moments go on."""
    given = [{"match": "hidden0.*", "lr": 0}]
    changes = ONE | {"train.groups": given, "train.optimizer": "adamw", "train.lr": 0.01, "rounds": 2} | modes(**mode)
    start, found = initial_model(build(parse(configure(changes)))), run(configure(changes), out=tmp_path / "run").params
    assert [name for name in found if torch.equal(found[name], start[name])] == ["hidden0.weight", "hidden0.bias"]


@EITHER
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_of_a_round(tmp_path: Path, name: str, mode: dict[str, bool]) -> None:
    """Six steps: factors by hand."""
    changes = ONE | {"train.local_schedule": {"name": name, "warmup_steps": 2}, "train.lr": 0.05} | modes(**mode)
    factors = {
        "constant": [0.5, 1, 1, 1, 1, 1],
        "linear": [0.5, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        "cosine": [0.5, 0.9330127, 0.75, 0.5, 0.25, 0.0669873],
    }[name]
    found = run(configure(changes), out=tmp_path / "run").params
    assert relative_error(found, trained_slowly(build(parse(configure(changes))), {}, factors)) < 1e-6


def test_a_schedule_ends_with_each_participants_own_steps(tmp_path: Path) -> None:
    """Stacked participants of unequal length are trained as they are one by one."""
    changes = RAGGED | {"train.local_schedule": "linear", "train.optimizer": "adamw", "train.lr": 0.01}
    stacked, singly = (
        run(configure(changes | modes(**mode)), out=tmp_path / str(mode["stacked"])).params
        for mode in (STACKED, SINGLY)
    )
    assert relative_error(stacked, singly) < 1e-5
    flat = run(configure(changes | modes(**SINGLY) | {"train.local_schedule": "constant"}), out=tmp_path / "flat")
    assert relative_error(flat.params, singly) > 1e-3
    assert [LocalSchedule(name="linear").factor(step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


@EITHER
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parts_of_a_batch_are_one_batch(tmp_path: Path, optimizer: str, mode: dict[str, bool]) -> None:
    """Eleven or so samples of six a step, gone through two at a time, the last part of an epoch short."""
    base = RAGGED | {"train.optimizer": optimizer, "train.lr": 0.01, "train.clip_norm": 1.0} | modes(**mode)
    whole = run(configure(base | {"train.batch_size": 6}), out=tmp_path / "whole")
    parts = run(configure(base | {"train.batch_size": 2, "train.accumulate": 3}), out=tmp_path / "parts")
    assert relative_error(parts.params, whole.params) < 1e-5
    assert parts.metrics[-1]["train_loss"] == pytest.approx(whole.metrics[-1]["train_loss"], rel=1e-5)


def test_parts_of_a_batch_need_less_memory() -> None:
    def memory(**train: int) -> int:
        changes = {f"train.{name}": value for name, value in train.items()}
        return int(build(parse(configure(changes))).planner.costs[0].variants[0].memory_bytes)

    assert memory(batch_size=2, accumulate=8) == memory(batch_size=2) < memory(batch_size=16)


@EITHER
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(tmp_path: Path, precision: str, mode: dict[str, bool]) -> None:
    """Nearly the same model, not the same bits; parameters stay in single precision, and have finer steps than half."""
    base = modes(**mode) | {"rounds": 2}
    usual = run(configure(base), out=tmp_path / "usual").params
    found = run(configure(base | {"train.precision": precision}), out=tmp_path / "half").params
    assert 1e-6 < relative_error(found, usual) < 1e-2
    assert all(value.dtype == torch.float32 for value in found.values())
    assert any(bool((value.to(torch_dtype(precision)).float() != value).any()) for value in found.values())


def torch_dtype(precision: str) -> torch.dtype:
    """Return torch's type."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def test_rates_by_capacity(tmp_path: Path) -> None:
    """If all capacities have the same one, it is that of the run; a capacity's own rate moves its clients alone."""
    base = mixed("heterofl", LEVELS, **SINGLY)
    same = {"train.lr": 0.4, "train.lr_by_capacity": dict.fromkeys(LEVELS, 0.1)}
    whole, each, slower = (
        run(configure(base | changes), out=tmp_path / str(number)).params
        for number, changes in enumerate(({}, same, {"train.lr_by_capacity": {0.25: 1e-20}}))
    )
    assert relative_error(each, whole) < 1e-6
    assert digest(slower) != digest(whole)
    smallest = mixed("heterofl", (0.25,), **SINGLY) | {"train.lr_by_capacity": {0.25: 1e-20}}
    still = run(configure(smallest), out=tmp_path / "still").params
    assert relative_error(still, initial_model(build(parse(configure(smallest))))) < 1e-12


@pytest.mark.parametrize("workers", [0, 2])
def test_all_at_once_on_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    changes: dict[str, Any] = RAGGED | mixed("fedrolex", LEVELS, **STACKED)
    changes |= {
        "train.optimizer": {"name": "adamw", "state": "keep"},
        "train.groups": [{"match": "*.bias", "weight_decay": 0.0}],
        "train.lr": 0.01,
        "train.lr_by_capacity": {0.25: 0.02},
        "train.accumulate": 2,
        "train.precision": "bfloat16",
        "train.local_schedule": "cosine",
    }
    whole = run(configure(changes | {"engine.block_size": 1}), out=tmp_path / "0")
    assert_same(run(configure(changes | {"engine.workers": workers}), out=tmp_path / "1"), whole)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"train.groups": [{"match": "head.*", "lr": 0.1}]},
        "train.groups[0].match: 'head.*' matches no trained parameter (the model's modules: hidden0, output)",
    ),
    (
        {"train.groups": [{"match": "outptu.bias", "lr": 0.1}]},
        "matches no trained parameter; did you mean 'output'? (the model's modules: hidden0, output)",
    ),
    (
        {"train.groups": [{"match": "*", "lr": 0.1}, {"match": "*.bias", "lr": 0.1}]},
        "train.groups[1].match = '*.bias' has parameters of groups before it only: put it first, or leave it out",
    ),
    (
        {"train.groups": [{"match": "hidden0.*", "lr": 0}, {"match": "output.*", "lr": 0}]},
        "train.groups have the learning rate 0 for all parameters, so that nothing would be trained: give some",
    ),
    ({"train.groups": [{"match": "*"}]}, "has nothing of its own: give lr, weight_decay or optimizer, or leave it"),
    (
        {"train.groups": [{"match": "*", "lr": -1}]},
        "train.groups.0.lr = -1: input should be greater than",
    ),
    (
        {"train.lr_by_capacity": {0.3: 0.1}},
        "train.lr_by_capacity names capacity 0.3, but the run has [1.0]: name",
    ),
    ({"train.lr_by_capacity": {1.0: -1}}, "train.lr_by_capacity.1.0 = -1"),
    ({"train.accumulate": 0}, "train.accumulate = 0: input should be greater than or equal to 1"),
    ({"train.precision": "float8"}, "train.precision = 'float8': input should be 'float32', 'bfloat16',"),
    ({"train.local_schedule": "step"}, "train.local_schedule.name = 'step'"),
    (
        {"algorithm": "scaffold", "train.groups": [{"match": "*.bias", "lr": 1.0}]},
        "'scaffold' does not go with train.",
    ),
    ({"algorithm": "scaffold", "train.local_schedule": "cosine"}, "does not go with train.local_schedule, because its"),
    (
        {"algorithm": "fednova", "train.lr_by_capacity": {1.0: 1.0}},
        "does not go with train.lr_by_capacity, because",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=str)
def test_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(GossamerError) as caught:
        build(parse(configure(changes)))
    assert expected in str(caught.value)


UNUSED: list[tuple[dict[str, Any], str]] = [
    ({"train.accumulate": 2, "train.batch_size": 100}, "train.accumulate = 2 changes nothing, because nobody has more"),
    ({"train.optimizer": {"name": "sgd", "state": "keep"}}, "train.optimizer.state = 'keep' changes nothing"),
    ({"train.local_schedule": "linear", "train.steps": 1}, "train.local_schedule.name = 'linear' changes nothing"),
    ({"train.local_schedule": {"warmup_steps": 1}}, "train.local_schedule.warmup_steps = 1 changes nothing"),
]


@pytest.mark.parametrize(("changes", "expected"), UNUSED, ids=str)
def test_what_changes_nothing_is_warned_of(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in warning for warning in build(parse(configure(changes))).warnings)


def test_gradients_of_parts_are_weighted_by_their_samples(tmp_path: Path) -> None:
    """One step of five samples in parts of four and one."""
    changes = ONE | {"clients.num": 30, "train.epochs": 1, "train.batch_size": 4, "train.accumulate": 2}
    parts = build(parse(configure(changes)))
    (client,) = parts.planner.plan(0).client.tolist()
    params: dict[str, Tensor] = {name: value.requires_grad_() for name, value in initial_model(parts).items()}
    images, labels = training_samples(parts, parts.workload.partition.of_client(client).tolist())
    assert len(labels) == 5
    F.cross_entropy(perceptron(params, images), labels).backward()
    expected = {name: (value - 0.1 * value.grad).detach() for name, value in params.items()}
    assert relative_error(run(configure(changes), out=tmp_path / "run").params, expected) < 1e-6
