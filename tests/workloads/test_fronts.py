"""Clients of unequal shapes: fronts never travel, the deep block is averaged, and what is counted is what is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from federation import assert_same, configure
from gossamer import load, run
from gossamer.errors import ConfigError
from gossamer.testing import check_workload
from gossamer.workloads.fronts import FrontedMLP, ShapeGroups, resized

SHAPES = {"8x8": 0.5, "6x10": 0.5}
SET = {"name": "synthetic", "num_train": 96, "num_test": 30, "noise": 2.0}
MODEL = {"name": "fronted", "front": 6, "hidden": [10]}
WORKLOAD = {"name": "shape-groups", "dataset": SET, "model": MODEL, "shapes": SHAPES}
BASE = {"workload": WORKLOAD, "rounds": 2, "clients": {"num": 4, "per_round": 4}, "train.lr": 0.1}


def made(**options: Any) -> ShapeGroups:
    """Return the workload for four clients, with options."""
    given = {name: value for name, value in WORKLOAD.items() if name != "name"} | options
    return ShapeGroups(given, num_clients=4, partition="iid", seed=0)


def federation(out: Path, changes: dict[str, Any] | None = None) -> Any:
    """Run two rounds of four clients, two of each size."""
    return run(configure(BASE | {"engine.modes": "auto"} | (changes or {})), out=out)


def slow_round(workload: ShapeGroups, lr: float) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return what one local step of each client on all its samples makes of the deep block, and each client's own."""
    start = workload.layout.views(workload.init(0))
    total, own = {name: torch.zeros_like(v) for name, v in start.items() if name.startswith("deep")}, []
    for client in range(4):
        samples = int(workload.num_samples[client])
        batch = workload.batch(np.array([client]), np.arange(samples)[None]).samples
        size = "x".join(map(str, batch["x"].shape[-2:]))
        held = {n: v.clone().requires_grad_() for n, v in start.items() if n.startswith(("deep", f"front{size}."))}
        hidden = (
            batch["x"][0].flatten(1) @ held[f"front{size}.layer.weight"].T + held[f"front{size}.layer.bias"]
        ).relu()
        hidden = (hidden @ held["deep.hidden0.weight"].T + held["deep.hidden0.bias"]).relu()
        logits = hidden @ held["deep.output.weight"].T + held["deep.output.bias"]
        F.cross_entropy(logits, batch["y"][0]).backward()
        after = {name: (value - lr * value.grad).detach() for name, value in held.items() if value.grad is not None}
        own.append(after)
        for name in total:
            total[name] += samples / int(workload.num_samples.sum()) * after[name]
    return total, own


def test_against_a_loop(tmp_path: Path) -> None:
    """The deep block is the mean of all clients of whatever size; each front is what its client made of it."""
    done = federation(tmp_path / "a", {"rounds": 1, "train": {"lr": 0.1, "batch_size": 24, "steps": 1}})
    deep, own = slow_round(made(), 0.1)
    for name, value in deep.items():
        assert torch.allclose(done.params[name], value, atol=1e-5)
    found = load(done.directory)
    for client, expected in enumerate(own):
        state = found.state_dict(client=client)
        for name in expected:
            if name.startswith("front"):
                assert torch.allclose(state[name], expected[name], atol=1e-5)


def test_fronts_never_travel_and_differ_between_clients(tmp_path: Path) -> None:
    done = federation(tmp_path / "a")
    workload = made()
    start = workload.layout.views(workload.init(0))
    kind, found = workload.client_holdings(np.arange(4)), load(done.directory)
    assert sorted(kind.tolist()) == [0, 0, 1, 1]
    for name in start:
        assert torch.equal(done.params[name], start[name]) == name.startswith("front")  # the server's are untrained
    for number, size in enumerate(SHAPES):
        first, second = (found.state_dict(client=client) for client in np.flatnonzero(kind == number).tolist())
        name = f"front{size}.layer.weight"
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], start[name])
    deep = sum(value.numel() for name, value in start.items() if name.startswith("deep"))
    assert done.metrics[-1]["total_bytes_up"] == done.metrics[-1]["total_bytes_down"] == 2 * 4 * 4 * deep
    assert {"mean", "min", "max"} == {*done.metrics[-1]["accuracy_personal"]}


@pytest.mark.parametrize("capacities", [[1.0], [0.5, 1.0]], ids=["whole", "rolling"])
def test_workers_change_no_bits(tmp_path: Path, capacities: list[float]) -> None:
    changes = {} if capacities == [1.0] else {"submodel": {"capacities": capacities}, "algorithm": "fedrolex"}
    one, two = (federation(tmp_path / str(w), changes | {"engine.workers": w}) for w in (0, 2))
    assert_same(two, one)


@pytest.mark.filterwarnings("ignore:the run learned nothing")  # of the server, whose fronts are untrained
def test_the_shared_block_is_learnt_on_digits(tmp_path: Path) -> None:
    """Real digits in three sizes: fronts before a shared block that stays as it started are worse."""
    shapes = {"8x8": 0.5, "12x12": 0.25, "5x9": 0.25}
    workload = {"name": "shape-groups", "dataset": "digits", "shapes": shapes}
    clients = {"num": 8, "per_round": 8}
    given = {"workload": workload, "clients": clients, "train": {"lr": 0.1, "batch_size": 16, "epochs": 2}}
    learnt = federation(tmp_path / "learnt", given | {"rounds": 3})
    start = federation(tmp_path / "start", given | {"rounds": 3, "algorithm": {"name": "fedavg", "server_lr": 1e-9}})
    better, worse = (one.metrics[-1]["accuracy_personal"]["mean"] for one in (learnt, start))
    assert better > 0.7
    assert better > worse


def test_contract_and_a_single_shape() -> None:
    check_workload(made())
    model = FrontedMLP((1, 4, 5), 3, hidden=[4], front=2)
    assert [*model.shapes_of_samples] == ["4x5"]
    images = torch.randn(2, 3, 1, 8, 8)
    assert resized(images, (1, 8, 8)) is images
    assert resized(images, (1, 6, 10)).shape == (2, 3, 1, 6, 10)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"workload.model": "mlp"}, r"no fronts for samples of different shapes: take fronted"),
        ({"workload.shapes": {"8by8": 1.0}}, r"names '8by8', which is no size: give height and width"),
        ({"workload.shapes": {"8x8": 0.0}}, r"give sizes, each with a share above 0"),
        ({"workload.frozen": ["deep.*"]}, r"frozen and workload\.lora do not go with shape-groups"),
        ({"workload.local_evaluation": True}, r"workload\.local_evaluation = True: input should be False"),
        ({"algorithm": "scaffold"}, r"'scaffold' trains whole models only"),
        ({"algorithm": "hetlora"}, r"its server combines the rows of all participants"),
        ({"algorithm": "scaffold", "workload.shapes": {"8x8": 1.0}}, r"because it sends more than one mean"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        federation(tmp_path / "a", changes)
