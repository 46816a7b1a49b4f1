"""Costs: FLOPs by hand, bytes by capacity, and the simulated time of the slowest participant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gossamer.algorithms.federated import FedAvg
from gossamer.profiling.costs import Costs, DeviceOptions, RoundCosts, training_flops_per_sample
from gossamer.records import RoundPlan
from gossamer.submodel import Cutter
from gossamer.submodel.windows import random, rolling
from gossamer.workloads.images import ImageClassification

INPUTS, LABELS, HIDDEN = 2 * 8 * 8, 5, 16
CAPACITIES = (0.25, 0.5, 1.0)
FLOPS_PER_SECOND, DOWN, UP = 1e6, 1e4, 1e3


def workload(model: Any, num_train: int = 60) -> ImageClassification:
    data = {"name": "synthetic", "num_train": num_train, "num_test": 5, "num_labels": LABELS, "shape": [2, 8, 8]}
    return ImageClassification({"dataset": data, "model": model}, num_clients=4, partition="iid", seed=0)


@pytest.fixture(scope="module")
def perceptron() -> ImageClassification:
    return workload({"name": "mlp", "hidden": [HIDDEN]})


def mlp_flops(hidden: int) -> int:
    """A multiply-add is two: forward and weights' gradients of both layers, the input's gradient of the second."""
    return 2 * (2 * INPUTS * hidden + 3 * hidden * LABELS)


def mlp_parameters(hidden: int) -> int:
    return (INPUTS + 1) * hidden + (hidden + 1) * LABELS


class Talkative(FedAvg):
    """Sends three arrays and receives two."""

    uplink = {"x": "mean", "y": "sum", "z": "sum"}
    downlink = ("x", "y")


def plan_of(*variants: int) -> RoundPlan:
    whole = np.arange(len(variants), dtype=np.int64)
    return RoundPlan(
        round=0,
        phase=0,
        client=whole,
        site=whole * 0,
        weight=np.ones(len(variants)),
        steps=np.ones(len(variants), dtype=np.int32),
        variant=np.array(variants, dtype=np.int16),
        base=whole * 0,
        capacities=CAPACITIES,
        lr=0.1,
    )


def costs_of(of: ImageClassification, plan: RoundPlan, samples: list[int], **changes: Any) -> RoundCosts:
    device = {
        "flops_per_second": FLOPS_PER_SECOND,
        "download_bytes_per_second": DOWN,
        "upload_bytes_per_second": UP,
    } | {name: value for name, value in changes.items() if name != "algorithm"}
    algorithm = changes.get("algorithm", FedAvg({}))
    costs = Costs(of, algorithm, Cutter(of.layout, rolling, 1, 0), CAPACITIES, 10, DeviceOptions(**device))
    trained: NDArray[np.int64] = np.array(samples, dtype=np.int64)
    return costs.of_round(plan, trained)


class TestFlops:
    @pytest.mark.parametrize("batch_size", [1, 4, 1000])
    def test_softmax(self, batch_size: int) -> None:
        model = workload("softmax")
        assert training_flops_per_sample(model, model.layout, batch_size) == 2 * 2 * INPUTS * LABELS

    @pytest.mark.parametrize("capacity", [1.0, 0.5, 0.25, 0.01])
    @pytest.mark.parametrize("strategy", [rolling, random])
    def test_perceptron_by_capacity(self, perceptron: ImageClassification, capacity: float, strategy: Any) -> None:
        layout = Cutter(perceptron.layout, strategy, 1, 0).sub_layout(capacity)
        expected = mlp_flops(max(1, int(HIDDEN * capacity)))
        assert training_flops_per_sample(perceptron, layout, 8) == expected

    def test_convolutions(self) -> None:
        model = workload({"name": "cnn", "width": 0.0625})
        first = 2 * 2 * 25 * 8 * 8  # multiply-adds: 2 channels in, 2 out, 5 x 5, 8 x 8 pixels
        second = 2 * 4 * 25 * 4 * 4
        dense = 4 * 2 * 2 * 32 + 32 * LABELS
        expected = 2 * (2 * first + 3 * (second + dense))
        assert training_flops_per_sample(model, model.layout, 4) == expected


class TestBytes:
    def test_by_capacity(self, perceptron: ImageClassification) -> None:
        found = costs_of(perceptron, plan_of(0, 1, 1, 2), [1, 1, 1, 1])
        expected = 4 * (mlp_parameters(4) + 2 * mlp_parameters(8) + mlp_parameters(16))
        assert (found.bytes_up, found.bytes_down) == (expected, expected)

    def test_by_arrays_that_travel(self, perceptron: ImageClassification) -> None:
        class AtHome(FedAvg):
            downlink = None

        found = costs_of(perceptron, plan_of(2), [1], algorithm=Talkative({}))
        assert (found.bytes_up, found.bytes_down) == (12 * mlp_parameters(16), 8 * mlp_parameters(16))
        assert costs_of(perceptron, plan_of(2), [1], algorithm=AtHome({})).bytes_down == 0


class TestSeconds:
    def seconds(self, hidden: int, samples: int, down: float = DOWN, up: float = UP) -> float:
        size = 4 * mlp_parameters(hidden)
        return size / down + samples * mlp_flops(hidden) / FLOPS_PER_SECOND + size / up

    def test_of_the_slowest(self, perceptron: ImageClassification) -> None:
        """A small model with much data may take longer than the whole one with little."""
        small, large = self.seconds(4, 9000), self.seconds(16, 10)
        assert small > large
        found = costs_of(perceptron, plan_of(0, 2), [9000, 10])
        assert found.simulated_seconds == pytest.approx(small)
        assert costs_of(perceptron, plan_of(0, 2), [90, 10]).simulated_seconds == pytest.approx(large)
        assert found.client_flops == 9000 * mlp_flops(4) + 10 * mlp_flops(16)

    def test_half_the_bandwidth_takes_twice_as_long(self, perceptron: ImageClassification) -> None:
        size = 4 * mlp_parameters(16)
        before = costs_of(perceptron, plan_of(2), [10]).simulated_seconds
        slow_up = costs_of(perceptron, plan_of(2), [10], upload_bytes_per_second=UP / 2).simulated_seconds
        slow_down = costs_of(perceptron, plan_of(2), [10], download_bytes_per_second=DOWN / 2).simulated_seconds
        assert slow_up - before == pytest.approx(size / UP)
        assert slow_down - before == pytest.approx(size / DOWN)

    def test_each_way_at_its_own_bandwidth(self, perceptron: ImageClassification) -> None:
        size = 4 * mlp_parameters(16)
        found = costs_of(perceptron, plan_of(2), [0], algorithm=Talkative({}))
        assert found.simulated_seconds == pytest.approx(2 * size / DOWN + 3 * size / UP)

    def test_half_the_speed(self, perceptron: ImageClassification) -> None:
        before = costs_of(perceptron, plan_of(2), [10]).simulated_seconds
        slow = costs_of(perceptron, plan_of(2), [10], flops_per_second=FLOPS_PER_SECOND / 2).simulated_seconds
        assert slow - before == pytest.approx(10 * mlp_flops(16) / FLOPS_PER_SECOND)

    def test_nobody(self, perceptron: ImageClassification) -> None:
        assert costs_of(perceptron, plan_of(), []) == RoundCosts(0, 0, 0.0, 0.0)
