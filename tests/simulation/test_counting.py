"""Costs: FLOPs and memory by hand, bytes by capacity, and the simulated time of each participant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from federation import configure, events
from gossamer.algorithms.decentralized.ceca import DSGDCECA
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.algorithms.federated import FedAvg
from gossamer.engines.local_steps import LocalSteps
from gossamer.engines.task import Variant, VariantMode
from gossamer.errors import ConfigError
from gossamer.experiment import run
from gossamer.planning.assignment import assign_devices
from gossamer.round_record import RoundCosts
from gossamer.simulation.costs import Costs, VariantCosts, add_up
from gossamer.simulation.counting import FlopCounter, count_step, count_variants, memory_bytes
from gossamer.simulation.devices import DeviceProfile, Devices, DeviceShare
from gossamer.submodel import Cutter
from gossamer.submodel.strategies import random, rolling
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

    traits = replace(FedAvg.traits, uplink={"x": "mean", "y": "sum", "z": "sum"}, downlink=("x", "y"))

    def init(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x, "y": x.clone()}


def variants_of(algorithm: FedAvg, cutter: Cutter) -> list[Variant]:
    return [Variant.bind(i, c, algorithm, cutter, LocalSteps(), VariantMode()) for i, c in enumerate(CAPACITIES)]


def costs_of(of: ImageClassification, variants: list[int], samples: list[int], **changes: Any) -> RoundCosts:
    """Return the costs of participants of the given variants, all of them in time."""
    device = {
        "flops_per_second": FLOPS_PER_SECOND,
        "download_bytes_per_second": DOWN,
        "upload_bytes_per_second": UP,
    } | {name: value for name, value in changes.items() if name != "algorithm"}
    algorithm, cutter = changes.get("algorithm", FedAvg({})), Cutter(of.layout, rolling, 1, 0)
    counted = count_variants(of, algorithm, variants_of(algorithm, cutter), batch_size=10, scaler=True)
    count = len(variants)
    costs = Costs(counted, Devices([DeviceProfile(**device)], None, count, 0))
    efforts = costs.efforts(np.arange(count), np.array(variants, dtype=np.int16), np.array(samples, dtype=np.int64), 0)
    return add_up(efforts, np.ones(count, dtype=bool), float(efforts.seconds.max(initial=0.0)), 0.0)


class TestFlops:
    @pytest.mark.parametrize("batch_size", [1, 4, 1000])
    def test_softmax(self, batch_size: int) -> None:
        model = workload("softmax")
        assert count_step(model, model.layout, batch_size).flops_per_sample == 2 * 2 * INPUTS * LABELS

    @pytest.mark.parametrize("capacity", [1.0, 0.5, 0.25, 0.01])
    @pytest.mark.parametrize("strategy", [rolling, random])
    def test_perceptron_by_capacity(self, perceptron: ImageClassification, capacity: float, strategy: Any) -> None:
        layout = Cutter(perceptron.layout, strategy, 1, 0).sub_layout(capacity)
        expected = mlp_flops(max(1, int(HIDDEN * capacity)))
        assert count_step(perceptron, layout, 8).flops_per_sample == expected

    def test_convolutions(self) -> None:
        model = workload({"name": "cnn", "width": 0.0625})
        first = 2 * 2 * 25 * 8 * 8  # multiply-adds: 2 channels in, 2 out, 5 x 5, 8 x 8 pixels
        second = 2 * 4 * 25 * 4 * 4
        dense = 4 * 2 * 2 * 32 + 32 * LABELS
        expected = 2 * (2 * first + 3 * (second + dense))
        assert count_step(model, model.layout, 4).flops_per_sample == expected


def user_workload(name: str, **options: Any) -> ImageClassification:
    data = {"name": "synthetic", "num_train": 60, "num_test": 5, "num_labels": LABELS, "shape": [1, 8, 8]}
    model = {"name": f"user_modules:{name}", **options}
    made = {"dataset": data, "model": model}
    return ImageClassification(made, num_clients=4, partition="iid", seed=0, whole_models=True)


class TestFusedKernels:
    """What PyTorch computes in one operation counts as what it consists of."""

    @pytest.mark.parametrize(("kind", "num_gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    def test_recurrent_layers(self, kind: str, num_gates: int) -> None:
        """Eight steps of 8 -> 16: both products forward and for the weights, that with the state also for the state."""
        model = user_workload("Recurrent", kind=kind, hidden=16)
        own, state = num_gates * 16 * 8, num_gates * 16 * 16
        expected = 2 * (2 * 8 * own + 2 * 8 * state + 7 * state + 3 * 16 * LABELS)
        found = count_step(model, model.layout, 4)
        assert found.flops_per_sample == pytest.approx(expected, rel=0.01)
        assert found.uncounted == ()

    @pytest.mark.parametrize("fused", [False, True])
    def test_attention(self, fused: bool) -> None:
        """Eight tokens of 16 in four heads; two products, and a backward pass by both factors of each."""
        model = user_workload("Attentive", fused=fused, stream=16)
        projections, products = 8 * 4 * 16 * 16, 2 * 8 * 8 * 16
        expected = 2 * (2 * 8 * 8 * 16 + 3 * projections + 3 * products + 3 * 16 * LABELS)
        found = count_step(model, model.layout, 4)
        assert found.flops_per_sample == pytest.approx(expected, rel=0.01)
        assert found.uncounted == ()

    @pytest.mark.parametrize("name", ["ResNet", "Instances", "Encoder", "Tied", "Adapted"])
    def test_usual_modules_are_complete(self, name: str) -> None:
        model = user_workload(name)
        assert count_step(model, model.layout, 4).uncounted == ()

    def test_products_with_vectors(self) -> None:
        matrix, vector = torch.randn(3, 5), torch.randn(5)
        with FlopCounter() as counter:
            _ = matrix @ vector, vector @ vector, torch.addmv(torch.zeros(3), matrix, vector)
        assert (counter.total, counter.uncounted) == (2 * (15 + 5 + 15), set())

    def test_what_has_no_formula_is_named(self, tmp_path: Path) -> None:
        changes = {"workload.model": "user_modules:Distances", "rounds": 1}
        done = run(configure(changes), out=tmp_path / "run")
        names = "aten::_cdist_backward, aten::_cdist_forward"
        assert [event["message"] for event in events(done.directory, "warning")] == [
            f"client FLOPs, and simulated seconds of computation, leave out {names}, for which there is no formula"
        ]
        assert [event["uncounted"] for event in events(done.directory, "variant")] == [names.split(", ")]
        assert done.metrics[0]["num_uncounted_operations"] == 2
        known = run(configure({"rounds": 1}), out=tmp_path / "known")
        assert "num_uncounted_operations" not in known.metrics[0]


class TestBytes:
    def test_by_capacity(self, perceptron: ImageClassification) -> None:
        found = costs_of(perceptron, [0, 1, 1, 2], [1, 1, 1, 1])
        expected = 4 * (mlp_parameters(4) + 2 * mlp_parameters(8) + mlp_parameters(16))
        assert (found.bytes_up, found.bytes_down) == (expected, expected)

    def test_by_arrays_that_travel(self, perceptron: ImageClassification) -> None:
        class AtHome(FedAvg):
            traits = replace(FedAvg.traits, downlink=None)

        found = costs_of(perceptron, [2], [1], algorithm=Talkative({}))
        assert (found.bytes_up, found.bytes_down) == (12 * mlp_parameters(16), 8 * mlp_parameters(16))
        found = costs_of(perceptron, [2], [1], algorithm=AtHome({}))  # a peer: one message each way
        assert (found.bytes_up, found.bytes_down) == (4 * mlp_parameters(16), 4 * mlp_parameters(16))


class TestSeconds:
    def seconds(self, hidden: int, samples: int, down: float = DOWN, up: float = UP) -> float:
        size = 4 * mlp_parameters(hidden)
        return size / down + samples * mlp_flops(hidden) / FLOPS_PER_SECOND + size / up

    def test_of_the_slowest(self, perceptron: ImageClassification) -> None:
        """A small model with much data may take longer than the whole one with little."""
        small, large = self.seconds(4, 9000), self.seconds(16, 10)
        assert small > large
        found = costs_of(perceptron, [0, 2], [9000, 10])
        assert found.simulated_seconds == pytest.approx(small)
        assert costs_of(perceptron, [0, 2], [90, 10]).simulated_seconds == pytest.approx(large)
        assert found.client_flops == 9000 * mlp_flops(4) + 10 * mlp_flops(16)

    def test_half_the_bandwidth_takes_twice_as_long(self, perceptron: ImageClassification) -> None:
        size = 4 * mlp_parameters(16)
        before = costs_of(perceptron, [2], [10]).simulated_seconds
        slow_up = costs_of(perceptron, [2], [10], upload_bytes_per_second=UP / 2).simulated_seconds
        slow_down = costs_of(perceptron, [2], [10], download_bytes_per_second=DOWN / 2).simulated_seconds
        assert slow_up - before == pytest.approx(size / UP)
        assert slow_down - before == pytest.approx(size / DOWN)

    def test_each_way_at_its_own_bandwidth(self, perceptron: ImageClassification) -> None:
        size = 4 * mlp_parameters(16)
        found = costs_of(perceptron, [2], [0], algorithm=Talkative({}))
        assert found.simulated_seconds == pytest.approx(2 * size / DOWN + 3 * size / UP)

    def test_half_the_speed(self, perceptron: ImageClassification) -> None:
        before = costs_of(perceptron, [2], [10]).simulated_seconds
        slow = costs_of(perceptron, [2], [10], flops_per_second=FLOPS_PER_SECOND / 2).simulated_seconds
        assert slow - before == pytest.approx(10 * mlp_flops(16) / FLOPS_PER_SECOND)

    def test_nobody(self, perceptron: ImageClassification) -> None:
        assert costs_of(perceptron, [], []) == RoundCosts(0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def test_latency(self, perceptron: ImageClassification) -> None:
        before = costs_of(perceptron, [2], [10])
        later = costs_of(perceptron, [2], [10], latency_seconds=0.5)
        assert later.simulated_seconds - before.simulated_seconds == pytest.approx(0.5)
        parts = (later.download_seconds, later.compute_seconds, later.upload_seconds)
        assert parts == (before.download_seconds, before.compute_seconds, before.upload_seconds)
        assert sum(parts) + 0.5 == pytest.approx(later.simulated_seconds)

    def test_parts_are_added_up(self, perceptron: ImageClassification) -> None:
        found = costs_of(perceptron, [0, 2], [30, 10])
        sizes = 4 * (mlp_parameters(4) + mlp_parameters(16))
        assert found.download_seconds == pytest.approx(sizes / DOWN)
        assert found.upload_seconds == pytest.approx(sizes / UP)
        assert found.compute_seconds == pytest.approx((30 * mlp_flops(4) + 10 * mlp_flops(16)) / FLOPS_PER_SECOND)

    def test_every_device_at_its_own_speed(self) -> None:
        profiles = [DeviceProfile(flops_per_second=speed, latency_seconds=speed) for speed in (1.0, 10.0)]
        devices = assign_devices([DeviceShare(profile=profile) for profile in profiles], "fixed", 6, 0)
        costs = Costs([VariantCosts(1.0, 1, 2, 3, 100.0, 0)], devices)
        efforts = costs.efforts(np.arange(6), np.zeros(6, dtype=np.int16), np.arange(6), 0)
        own = devices.of(np.arange(6), 0)
        assert efforts.compute_seconds.tolist() == [100 * i / (1, 10)[own[i]] for i in range(6)]
        assert efforts.latency_seconds.tolist() == [(1, 10)[index] for index in own]
        assert set(own) == {0, 1}


class Reporting(FedAvg):
    """Sends a number beside the model."""

    traits = replace(FedAvg.traits, uplink={"x": "mean", "loss": "sum"}, scalars=("loss",))


class Drawing(FedAvg):
    """Trains, at each step, one of all smaller widths, and the whole sub-model too."""

    def mean_passes(self, capacities: Any, capacity: float) -> dict[float, float]:
        smaller = [level for level in capacities if level < capacity]
        return {capacity: 1.0} | {level: 1.0 / (len(smaller) + 1) for level in smaller}


class TestVariants:
    def of(self, workload: ImageClassification, algorithm: FedAvg, **changes: Any) -> list[VariantCosts]:
        options = {"batch_size": 8, "scaler": False} | changes
        held = variants_of(algorithm, Cutter(workload.layout, rolling, 1, 0))
        return count_variants(workload, algorithm, held, **options)

    def test_a_number_takes_four_bytes(self, perceptron: ImageClassification) -> None:
        plain, reporting = self.of(perceptron, FedAvg({})), self.of(perceptron, Reporting({}))
        assert [one.bytes_up + 4 for one in plain] == [one.bytes_up for one in reporting]
        assert [one.bytes_down for one in plain] == [one.bytes_down for one in reporting]

    def test_facts(self, perceptron: ImageClassification) -> None:
        for level, one in zip(CAPACITIES, self.of(perceptron, FedAvg({})), strict=True):
            hidden = int(HIDDEN * level)
            size = mlp_parameters(hidden)
            assert (one.capacity, one.num_parameters, one.bytes_up, one.bytes_down) == (level, size, 4 * size, 4 * size)
            assert one.flops_per_sample == mlp_flops(hidden)

    def test_several_passes_a_step(self, perceptron: ImageClassification) -> None:
        plain, drawing = self.of(perceptron, FedAvg({})), self.of(perceptron, Drawing({}))
        flops = [one.flops_per_sample for one in plain]
        expected = [flops[0], flops[1] + flops[0] / 2, flops[2] + flops[1] / 3 + flops[0] / 3]
        assert [one.flops_per_sample for one in drawing] == pytest.approx(expected)
        saved = [count_step(perceptron, perceptron.layout.cut(level), 8).saved_bytes for level in CAPACITIES]
        more = [after.memory_bytes - before.memory_bytes for before, after in zip(plain, drawing, strict=True)]
        assert more == [0, saved[0], saved[1]]


class TestMemory:
    def test_softmax_by_hand(self) -> None:
        """A linear layer keeps its input; the cross entropy keeps log-probabilities and labels."""
        model = workload("softmax")
        one, many = (count_step(model, model.layout, size).saved_bytes for size in (1, 11))
        per_sample = 4 * INPUTS + 4 * LABELS + 8
        assert many - one == 10 * per_sample

    def test_perceptron_by_hand(self, perceptron: ImageClassification) -> None:
        """Hidden activations are kept once, though both the activation and the next layer need them."""
        for level in CAPACITIES:
            hidden = int(HIDDEN * level)
            layout = perceptron.layout.cut(level)
            one, many = (count_step(perceptron, layout, size).saved_bytes for size in (1, 11))
            assert many - one == 10 * (4 * INPUTS + 4 * hidden + 4 * LABELS + 8)

    def test_as_the_machine_sees_it(self) -> None:
        """Whatever is saved for the backward pass is let go with the graph."""
        model = workload({"name": "cnn", "width": 0.0625})
        seen: dict[int, int] = {}
        alive: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        merged = self.batch(model, 4)
        leaves = {name: torch.zeros(shape, requires_grad=True) for name, shape in model.model.shapes.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.loss(leaves, merged)
        parameters = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
        expected = sum(size for address, size in seen.items() if address not in parameters)
        assert count_step(model, model.layout, 4).saved_bytes == expected > 0

    def batch(self, model: ImageClassification, count: int) -> Mapping[str, Any]:
        largest = np.array([int(np.argmax(model.num_samples))])
        batch = model.batch(largest, np.arange(count)[None])
        return {key: value[0] for key, value in (batch.samples | batch.client).items()}

    @pytest.mark.parametrize(("momentum", "arrays"), [(0.0, 1), (0.9, 2)])
    def test_carried(self, perceptron: ImageClassification, momentum: float, arrays: int) -> None:
        found = memory_bytes(FedAvg({}, momentum=momentum), perceptron.layout, perceptron.layout.cut(0.5), 100)
        assert found == (1 + arrays) * 4 * mlp_parameters(8) + 100

    @pytest.mark.parametrize("saved", [0, 10**6])
    @pytest.mark.parametrize(
        ("algorithm", "stored", "worked_on", "received"),
        [(DSGD({}), 1, 1, 1), (DSGD({}, momentum=0.9), 2, 2, 1), (DSGT({}), 3, 3, 2), (DSGDCECA({}), 2, 1, 1)],
        ids=["dsgd", "momentum", "dsgt", "ceca"],
    )
    def test_peers_store_and_receive_whole_models(
        self, perceptron: ImageClassification, algorithm: Any, stored: int, worked_on: int, received: int, saved: int
    ) -> None:
        """However small a sub-model they train; whoever trains all of it does so in place."""
        whole, small = 4 * mlp_parameters(HIDDEN), 4 * mlp_parameters(8)
        found = [memory_bytes(algorithm, perceptron.layout, perceptron.layout.cut(level), saved) for level in (0.5, 1)]
        training = [(1 + worked_on) * small + saved, whole + saved]
        assert found == [stored * whole + max(one, received * whole) for one in training]

    def test_total(self, perceptron: ImageClassification) -> None:
        cutter = Cutter(perceptron.layout, rolling, 1, 0)
        algorithm = FedAvg({}, momentum=0.9)
        found = count_variants(perceptron, algorithm, variants_of(algorithm, cutter), batch_size=8, scaler=False)
        for level, one in zip(CAPACITIES, found, strict=True):
            saved = count_step(perceptron, perceptron.layout.cut(level), 8).saved_bytes
            assert one.memory_bytes == 3 * 4 * mlp_parameters(int(HIDDEN * level)) + saved

    def test_no_larger_batch_than_there_are_samples(self, perceptron: ImageClassification) -> None:
        few, many = (count_step(perceptron, perceptron.layout, size) for size in (15, 1000))
        assert few == many

    def test_what_does_not_fit_is_refused(self) -> None:
        profiles = [DeviceProfile(name="tiny", memory_bytes=1000), DeviceProfile(name="endless")]
        devices = assign_devices([DeviceShare(profile=profile) for profile in profiles], "fixed", 6, 0)
        variant = VariantCosts(0.5, 1, 2, 3, 100.0, 1001)
        costs = Costs([variant, replace(variant, capacity=1.0, memory_bytes=10**9)], devices)
        costs.check_memory([(1, 0), (1, 1)])
        with pytest.raises(ConfigError) as caught:
            costs.check_memory([(1, 1), (0, 0)])
        message = (
            "device 'tiny' has memory_bytes = 1000, but training capacity 0.5 needs 1001: give this device a smaller"
        )
        assert str(caught.value).startswith(message)
        Costs([replace(variant, memory_bytes=1000)], devices).check_memory([(0, 0)])
