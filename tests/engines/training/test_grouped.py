"""Optimizers of groups of parameters, against torch's on the same batches, kept, on windows, and among peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from federation import LEVELS, SINGLY, STACKED, Injected, assert_same, configure, digest, failing, mixed, modes
from federation import relative_error as error_of
from gossamer import run
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import GossamerError
from gossamer.experiment import resume
from gossamer.submodel import extract
from slow import AXES, initial_model, perceptron, sample_order, training_samples
from slow_peers import decentralized

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
SGD = {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
GROUPS: list[dict[str, Any]] = [
    {"match": "output.bias", "lr": 0},
    {"match": "output.*", "optimizer": SGD, "lr": 0.05},
    {"match": "*.bias", "weight_decay": 0.0},
]
TRAIN = {"train.optimizer": {"name": "adamw", "weight_decay": 0.1}, "train.lr": 0.003, "train.groups": GROUPS}
ONE = {"clients.per_round": 1, "workload.label_mask": "none", "submodel.mask_labels": False, "train.epochs": 4}
KEPT = TRAIN | {"train.optimizer": {"name": "adamw", "weight_decay": 0.1, "state": "keep"}}


def of_torch(params: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """Return torch's optimizers of the groups."""
    weight, bias = params["hidden0.weight"], params["hidden0.bias"]
    options = {name: value for name, value in SGD.items() if name != "name"}
    return [
        torch.optim.AdamW([{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0}], lr=0.003),
        torch.optim.SGD([params["output.weight"]], lr=0.05, **options),
    ]


def trained_slowly(parts: Parts, capacity: float, rounds: int) -> dict[str, Tensor]:
    """Return the part of the model that a client of `capacity` holds after rounds that one client trains alone."""
    (client,), sub = parts.planner.plan(0).client.tolist(), parts.config.submodel
    cut = extract(initial_model(parts), AXES, capacity, 0, sub.strategy, parts.config.seed, client, sub.stride)
    params = {key: value.clone().requires_grad_() for key, value in cut.params.items()}
    optimizers = of_torch(params)
    for round in range(rounds):
        for batch in sample_order(parts, round, client):
            images, labels = training_samples(parts, batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(perceptron(params, images, 1 / capacity), labels).backward()
            for optimizer in optimizers:
                optimizer.step()
    return {key: value.detach() for key, value in params.items()}


@EITHER
@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_groups_are_those_of_torch(tmp_path: Path, capacity: float, mode: dict[str, bool]) -> None:
    changes = mixed("fedavg" if capacity == 1.0 else "heterofl", (capacity,), **mode) | TRAIN | ONE | {"rounds": 1}
    parts, found = build(parse(configure(changes))), run(configure(changes), out=tmp_path / "run").params
    expected = trained_slowly(parts, capacity, 1)
    held = {name: found[name][tuple(map(slice, value.shape))] for name, value in expected.items()}
    assert error_of(held, expected) < 1e-6


@EITHER
def test_moments_of_all_groups_are_kept(tmp_path: Path, mode: dict[str, bool]) -> None:
    """Three rounds of the only client are one run of torch's optimizers."""
    changes = ONE | KEPT | {"clients.num": 1, "rounds": 3, "train.epochs": 1} | modes(**mode)
    parts, found = build(parse(configure(changes))), run(configure(changes), out=tmp_path / "run").params
    expected = trained_slowly(parts, 1.0, 3)
    assert error_of(found, expected) < 1e-6
    reset = configure(changes | TRAIN)
    assert error_of(run(reset, out=tmp_path / "reset").params, expected) > 1e-4


@pytest.mark.parametrize(
    "config",
    [configure(mixed("fedrolex", LEVELS, **STACKED) | KEPT), decentralized(KEPT | modes(**STACKED))],
    ids=["windows", "peers"],
)
def test_workers_and_resumes_change_no_bits(tmp_path: Path, config: dict[str, Any]) -> None:
    whole = run(config, out=tmp_path / "0")
    assert_same(run(config | {"engine": config["engine"] | {"workers": 2}}, out=tmp_path / "2"), whole)
    with pytest.raises(Injected):
        run(config, out=tmp_path / "killed", hooks=failing("train", started=False, number=3))
    assert digest(resume(tmp_path / "killed").params) == digest(whole.params)


def test_groups_change_neither_bytes_nor_flops() -> None:
    with_groups, without = (
        build(parse(configure(changes))).planner.costs[0].variants[0]
        for changes in (TRAIN, {**TRAIN, "train.groups": []})
    )
    assert (with_groups.bytes_up, with_groups.bytes_down) == (without.bytes_up, without.bytes_down)
    assert with_groups.flops_per_sample == without.flops_per_sample


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.groups": [{"match": "outptu.*", "lr": 0.1}]}, "no trained parameter; did you mean 'output'"),
        ({"train.groups": [{"match": "*", "optimizer": "adamm"}]}, "unknown optimizer 'adamm'; did you mean 'adam'"),
        (
            {"train.groups": [{"match": "*", "optimizer": {"name": "adam", "beta": 1}}]},
            r"unknown key 'train.groups\[0\].optimizer.beta'; did you mean 'betas'",
        ),
        (
            {"train.groups": [{"match": "*", "optimizer": {"name": "adam", "state": "keep"}}]},
            r"train.groups\[0\].optimizer has a state.*give train.optimizer.state",
        ),
        ({"train.groups": [{"match": "*"}]}, "has nothing of its own: give lr, weight_decay or optimizer"),
        ({"train.groups": [{"match": "*", "lr": 0, "optimizer": "adam"}]}, "is not trained, because its lr is 0"),
        (
            {"train.groups": [{"match": "*", "weight_decay": 0.1, "optimizer": {"name": "sgd", "weight_decay": 0.2}}]},
            "has two weight decays",
        ),
        (
            {
                "train.optimizer": "adagrad",
                "train.groups": [{"match": "*", "optimizer": {"name": "adagrad", "initial_accumulator_value": 0.1}}],
            },
            "two optimizers that begin with other values of 'sum'",
        ),
        (
            {"algorithm": "scaffold", "train.groups": [{"match": "*", "optimizer": "adam"}]},
            "algorithm 'scaffold' does not go with train",
        ),
    ],
)
def test_wrong_groups(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(GossamerError, match=expected):
        build(parse(configure(changes)))
