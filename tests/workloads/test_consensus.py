"""Average consensus: the contract, the points, and the metric against dense products and theory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gossamer
from gossamer import topology
from gossamer.errors import ConfigError
from gossamer.testing import check_workload
from gossamer.workloads.base import Workload
from gossamer.workloads.consensus import Consensus

NAME = "gossamer.workloads.consensus:Consensus"


def make(num_clients: int = 5, seed: int = 0, partition: Any = "iid", **options: Any) -> Consensus:
    return Consensus(options, num_clients=num_clients, partition=partition, seed=seed)


def run(
    directory: Path, graph: dict[str, Any], rounds: int, num: int, algorithm: str = "dsgd", **options: Any
) -> list[dict[str, Any]]:
    config = {
        "rounds": rounds,
        "workload": {"name": NAME, **options},
        "peers": {"num": num, "topology": graph},
        "algorithm": algorithm,
        "train": {"steps": 1, "lr": 1.0},
        "engine": {"workers": 0},
    }
    return gossamer.run(config, out=directory).metrics


def slow_distance(points: list[list[float]]) -> float:
    """One number at a time."""
    total = 0.0
    for column in zip(*points, strict=True):
        mean = math.fsum(column) / len(column)
        total += math.fsum((value - mean) ** 2 for value in column)
    return math.sqrt(total)


@pytest.mark.parametrize("dim", [1, 10, 21])
def test_it_keeps_the_contract(dim: int) -> None:
    check_workload(make(dim=dim, precision="single"))


def test_it_is_a_workload_in_double_precision() -> None:
    workload: Workload = make()
    row = workload.init(3)
    assert row.dtype == torch.float64
    x = row[:10].requires_grad_()
    loss = workload.loss({"x": x}, {})
    assert loss.dtype == torch.float64
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_points_are_independent_and_normal() -> None:
    rows = make(500, dim=20).peer_init(0)
    points = make(500, dim=20).layout.views(rows)["x"]
    assert rows.dtype == torch.float64
    assert torch.count_nonzero(rows) == points.numel()  # padding is 0
    assert abs(float(points.mean())) < 5 / math.sqrt(points.numel())
    assert abs(float(points.square().mean()) - 1) < 5 * math.sqrt(2 / points.numel())
    assert len(torch.unique(points)) == points.numel()


@given(num=st.integers(1, 40), more=st.integers(0, 40), dim=st.integers(1, 20), seed=st.integers(0, 9))
def test_a_peers_point_depends_on_seed_and_peer_alone(num: int, more: int, dim: int, seed: int) -> None:
    rows = make(num, dim=dim).peer_init(seed)
    assert torch.equal(rows, make(num + more, seed=1, dim=dim).peer_init(seed)[:num])
    assert torch.equal(rows.float(), make(num, dim=dim, precision="single").peer_init(seed))
    assert not torch.equal(rows, make(num, dim=dim).peer_init(seed + 1))


@given(num=st.integers(2, 12), dim=st.integers(1, 5), scale=st.floats(1e-9, 1e9), offset=st.floats(-3, 3))
def test_relative_distance(num: int, dim: int, scale: float, offset: float) -> None:
    """It is 1 at the start, and that of the points' spread, wherever they lie."""
    workload = make(num, seed=4, dim=dim)
    start = workload.peer_init(4)
    assert workload.peer_metrics(start)["relative_distance"] == pytest.approx(1)
    moved = scale * (start + offset)
    slow = slow_distance(workload.layout.views(moved)["x"].tolist())
    slow_start = slow_distance(workload.layout.views(start)["x"].tolist())
    assert workload.peer_metrics(moved)["relative_distance"] == pytest.approx(slow / slow_start, rel=1e-6)


@pytest.mark.parametrize("graph", [{"name": "d-equistatic", "M": 3}, {"name": "od-equidyn", "M": 3}, {"name": "ring"}])
def test_a_round_is_a_product_with_w(tmp_path: Path, graph: dict[str, Any]) -> None:
    parameters = {key: value for key, value in graph.items() if key != "name"}
    built = topology.build(graph["name"], n=12, seed=0, **parameters)
    found = [record["relative_distance"] for record in run(tmp_path / "run", graph, 6, 12)]
    workload = make(12)
    points = workload.layout.views(workload.peer_init(0))["x"].numpy()
    start, expected = slow_distance(points.tolist()), []
    for round in range(6):
        points = np.asarray(built.mixing(round).dense()) @ points
        expected.append(slow_distance(points.tolist()) / start)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("graph", "algorithm", "exact_after"), [("base", "dsgd", 5), ("ceca", "dsgd-ceca", 4), ("one-peer-exp", "dsgd", 4)]
)
def test_finite_time_graphs_are_exact(tmp_path: Path, graph: str, algorithm: str, exact_after: int) -> None:
    """Base for 12 peers: 2 log2(12) + 2 bounds it; CECA: ceil(log2 12); the exponential graph of 16 = 2^4 peers."""
    num = 16 if graph == "one-peer-exp" else 12
    records = run(tmp_path / "run", {"name": graph}, exact_after, num, algorithm)
    distances = [record["relative_distance"] for record in records]
    assert distances[-1] < 1e-14
    assert distances[0] > 1e-3
    assert records[-1]["train_loss"] == records[-1]["loss"] == 0


def test_precision_bounds_what_is_reached(tmp_path: Path) -> None:
    """The mean is not quite kept in float32, but peers agree to its rounding."""
    single = run(tmp_path / "single", {"name": "complete"}, 2, 8, precision="single")[-1]["relative_distance"]
    double = run(tmp_path / "double", {"name": "complete"}, 2, 8)[-1]["relative_distance"]
    assert double < 1e-14
    assert single < 1e-6


@pytest.mark.parametrize(
    ("options", "partition", "message"),
    [
        ({"dim": 0}, "iid", "workload.dim"),
        ({"dims": 3}, "iid", "did you mean 'dim'"),
        ({}, {"name": "dirichlet"}, "this workload has no data to split"),
    ],
)
def test_what_is_refused(options: dict[str, Any], partition: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(partition=partition, **options)
