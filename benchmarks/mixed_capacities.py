"""A FedRolex round of 100 clients of five capacities: gossamer stacked by width, one by one, and a naive reference.

All in one process and one thread, in turn, on the same data, batches and windows. The naive way does for every client
what the methods' public research code does in spirit: build a module of the client's width, gather its weights with
index arrays, copy a state dict, step with `torch.optim.SGD`; then scatter into a sum and a counter of full size. It is
spared data loaders, and its model is compared with gossamer's.

The share of time outside gradient computation is measured in further rounds, with clocks around the functions that do
the work. Forward pass, `torch.autograd.grad` and the optimizer's steps are inside; what nobody claims is "rest".

Beside it stands the least such share: that of three passes over memory which no way of doing it is spared, each by one
call of torch. Every client's samples are gathered, every client gets its own copy of its sub-model, and the trained
copies are read once to be added up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from building import Parts, engine_of, parts_of
from gossamer import rng
from gossamer.engines.local.engine import LocalEngine
from gossamer.engines.server import STACKED_BLOCK_FLOATS
from gossamer.engines.training import batches, trainer
from gossamer.submodel.layout import AxisSpec, as_dim
from gossamer.submodel.windows import window_length
from harness import Gate, machine, spread

CAPACITIES = (1.0, 0.5, 0.25, 0.125, 0.0625)
NUM_CLIENTS, SAMPLES, BATCH = 100, 50, 10
LR = 0.002  # small, because the Scaler multiplies the activations of the narrowest models by 16 in every layer
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "hidden": [200, 200]},
    "narrow cnn": {"name": "cnn", "width": 0.25},
}
State = dict[str, Tensor]


def configuration(model: Mapping[str, Any], *, stacked: bool) -> dict[str, Any]:
    """Return the federation: everyone takes part, five batches of ten each, no label masks."""
    channels_last = model["name"] == "cnn" and not stacked
    mode = {"stacked": stacked, "channels_last": channels_last, "padding": False}
    return {
        "rounds": 1000,
        "workload": {
            "dataset": {"name": "synthetic", "num_train": NUM_CLIENTS * SAMPLES, "num_test": 10, "shape": [1, 28, 28]},
            "model": dict(model),
            "label_mask": "none",
            "local_evaluation": False,
        },
        "clients": {"num": NUM_CLIENTS, "per_round": NUM_CLIENTS},
        "train": {"epochs": 1, "batch_size": BATCH, "lr": LR},
        "algorithm": "fedrolex",
        "submodel": {"capacities": list(CAPACITIES), "mask_labels": False},
        "engine": {"workers": 0, "modes": [{"capacity": capacity, **mode} for capacity in CAPACITIES]},
    }


class Gossamer:
    """The engine of one machine, without workers, evaluation, logs and commits."""

    def __init__(self, model: Mapping[str, Any], *, stacked: bool) -> None:
        self.parts: Parts = parts_of(configuration(model, stacked=stacked))
        self.engine: LocalEngine = engine_of(self.parts)

    def round(self, number: int) -> None:
        """Train and aggregate."""
        plan = self.parts.planner.plan(number)
        for _ in self.engine.train(plan):
            pass
        self.engine.exchange(plan)

    def read(self) -> State:
        """Return the model."""
        return self.parts.workload.layout.views(self.engine.read()["x"][0])


# ---- the naive reference


class Scaler(nn.Module):
    """Multiplies by 1 / capacity while training."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        self.capacity = capacity

    def forward(self, x: Tensor) -> Tensor:
        """Return x / capacity, or x when evaluating."""
        return x / self.capacity if self.training else x


class Perceptron(nn.Module):
    """Two hidden layers."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        width = window_length(200, capacity)
        self.hidden0, self.hidden1 = nn.Linear(784, width), nn.Linear(width, width)
        self.output, self.scaler = nn.Linear(width, 10), Scaler(capacity)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.relu(self.scaler(self.hidden0(x.flatten(1))))
        return self.output(F.relu(self.scaler(self.hidden1(x))))


class Convolutional(nn.Module):
    """A quarter of McMahan's CNN."""

    def __init__(self, capacity: float) -> None:
        super().__init__()
        first, second, hidden = (window_length(width, capacity) for width in (8, 16, 128))
        self.conv0, self.conv1 = nn.Conv2d(1, first, 5, padding=2), nn.Conv2d(first, second, 5, padding=2)
        self.hidden, self.output = nn.Linear(second * 49, hidden), nn.Linear(hidden, 10)
        self.scaler = Scaler(capacity)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        for layer in (self.conv0, self.conv1):
            x = F.max_pool2d(F.relu(self.scaler(layer(x))), 2)
        return self.output(F.relu(self.scaler(self.hidden(x.flatten(1)))))


MODULES: dict[str, Callable[[float], nn.Module]] = {"mlp": Perceptron, "narrow cnn": Convolutional}


def rolled_mesh(shape: Sequence[int], axes: Sequence[AxisSpec], capacity: float, number: int) -> tuple[Tensor, ...]:
    """Return the open mesh of index arrays of a round's rolled window of one parameter."""
    indices = []
    for size, spec in zip(shape, axes, strict=True):
        dim = as_dim(spec)
        index = np.arange(size)
        if dim.cuttable:
            width = size // dim.inner
            channels = np.roll(np.arange(width), -number)[: window_length(width, capacity)]
            index = (channels[:, None] * dim.inner + np.arange(dim.inner)).reshape(-1)
        indices.append(index)
    return tuple(torch.from_numpy(index) for index in np.ix_(*indices))


class Naive:
    """One module, one state dict and two full-size accumulators a client."""

    def __init__(self, name: str, parts: Parts) -> None:
        self.parts, self.make_module = parts, MODULES[name]
        layout = parts.workload.layout
        self.axes = dict(zip(layout.names, layout.axes, strict=True))
        self.state = {name: value.clone() for name, value in layout.views(parts.workload.init(0)).items()}
        data = parts.workload.data
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
        self.images, self.labels = (data.train_images - mean) / std, data.train_labels

    def orders(self, number: int) -> list[np.ndarray[Any, Any]]:
        """Return the samples of every client in the order of the round, int64 [clients][samples]."""
        sizes = self.parts.workload.num_samples
        clients, partition = np.arange(NUM_CLIENTS), self.parts.workload.partition
        shuffled = rng.permutations(self.parts.config.seed, "shuffle", number, 0, clients, sizes)
        return [partition.of_client(client)[order] for client, order in enumerate(shuffled)]

    def round(self, number: int) -> None:
        """Train everyone and average."""
        orders = self.orders(number)
        variants = self.parts.planner.capacities.variants(np.arange(NUM_CLIENTS), number)
        returned = []
        for client in range(NUM_CLIENTS):
            capacity = self.parts.task.capacities[variants[client]]
            meshes = {n: rolled_mesh(v.shape, self.axes[n], capacity, number) for n, v in self.state.items()}
            module = self.make_module(capacity)
            module.load_state_dict({name: value[meshes[name]].clone() for name, value in self.state.items()})
            self.train(module, orders[client])
            returned.append((meshes, {name: value.clone() for name, value in module.state_dict().items()}))
        for name, value in self.state.items():
            total, count = torch.zeros_like(value), torch.zeros_like(value)
            for meshes, trained in returned:
                total[meshes[name]] += trained[name]
                count[meshes[name]] += 1
            held = count > 0
            value[held] = total[held] / count[held]

    def train(self, module: nn.Module, order: np.ndarray[Any, Any]) -> None:
        """Take one epoch of SGD."""
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        for start in range(0, len(order), BATCH):
            rows = torch.from_numpy(order[start : start + BATCH])
            optimizer.zero_grad()
            F.cross_entropy(module(self.images[rows]), self.labels[rows]).backward()
            optimizer.step()

    def read(self) -> State:
        """Return the model."""
        return self.state


# ---- where time goes


class Clock:
    """Exclusive seconds of nested stretches of time; "rest" is what no stretch claims."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = ["rest"]
        self._since = time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch on the innermost stretch."""
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time booked on `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            """Call and book."""
            self.switch()
            self._open.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self._open.pop()

        return timed


@contextmanager
def clocked(contender: Gossamer) -> Iterator[Clock]:
    """Put clocks around the engine's parts for as long as the context lasts."""
    clock, task, vmap = Clock(), contender.parts.task, torch.vmap
    engine = contender.engine
    places: list[tuple[Any, str, str]] = [
        (task.workload, "loss", "gradients"),
        (trainer, "differentiate", "gradients"),
        (trainer, "take_step", "gradients"),
        (trainer, "add_product_", "gradients"),
        (task.workload, "batch", "assemble batches"),
        (batches, "as_format", "assemble batches"),
        (trainer, "local_positions", "shuffle"),
        (trainer.Trainer, "_receive", "extract"),
        (task.algorithm, "begin", "copy the model"),
        (task.algorithm, "end", "subtract the model"),
        (trainer, "stack_rows", "copy the model"),
        (trainer, "row_norms", "check for NaN"),
        (trainer.Trainer, "_weighted", "weight and add up"),
        (engine, "exchange", "aggregate"),
    ]
    patches = [patch.object(owner, name, clock.around(label, getattr(owner, name))) for owner, name, label in places]
    patches.append(patch.object(torch, "vmap", lambda function: clock.around("gradients", vmap(function))))
    for one in patches:
        one.start()
    try:
        yield clock
    finally:
        clock.switch()
        for one in patches:
            one.stop()


def shares(contender: Gossamer, rounds: range, gate: Gate) -> dict[str, Any]:
    """Return where the time of some rounds goes, as shares of 1."""

    def trial() -> tuple[dict[str, float], float]:
        """Return the seconds of every stretch, and the least that is outside gradients."""
        with clocked(contender) as clock:
            clock.switch()
            clock.seconds.clear()
            for number in rounds:
                contender.round(number)
        return clock.seconds, len(rounds) * unavoidable_seconds(contender, rounds)

    seconds, least = gate.gated(trial).results[0]
    total = sum(seconds.values())
    found = {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return {
        "outside gradients": gate.goal(1 - found["gradients"], 0.1),
        "least possible": least / (least + seconds["gradients"]),
        "shares": found,
    }


def unavoidable_seconds(contender: Gossamer, rounds: range) -> float:
    """Return the median seconds a round of gathering samples, copying sub-models and adding them up, and no more."""
    parts = contender.parts
    images, layout = parts.workload.data.train_images, parts.workload.layout
    variants = parts.planner.capacities.variants(np.arange(NUM_CLIENTS), rounds.start)
    counts = np.bincount(variants, minlength=len(CAPACITIES)).tolist()
    sizes = [parts.task.cutter.sub_layout(capacity).d for capacity in parts.task.capacities]
    cuts = [torch.zeros(1, size) for size in sizes]
    assert max(sizes) == layout.d
    order, seconds = torch.randperm(len(images)), []
    for _ in rounds:
        began = time.perf_counter()
        for cut, count in zip(cuts, counts, strict=True):
            per_block = max(2, STACKED_BLOCK_FLOATS // cut.shape[1])  # what the engine keeps in the cache
            for first in range(0, count, per_block):
                num_rows = min(per_block, count - first)
                images.index_select(0, order[: num_rows * SAMPLES])
                trained = cut.expand(num_rows, -1).clone()
                torch.full((num_rows,), 1 / count) @ trained
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def distance(found: State, expected: State) -> float:
    """Return the largest distance of a parameter from the expected one, relative to the latter's norm."""
    return max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())


def measure(name: str, num_rounds: int, gate: Gate) -> dict[str, Any]:
    """Time all ways of one model in turn, and return their medians, factors and shares.

    A trial is one round of each way; all train on from there, whether it counts or not.

    Raises:
        SystemExit: their models differ.
    """
    stacked, singly = (Gossamer(MODELS[name], stacked=way) for way in (True, False))
    naive = Naive(name, singly.parts)
    ways: dict[str, Gossamer | Naive] = {"stacked": stacked, "one by one": singly, "naive": naive}
    differences: list[float] = []

    def one_round() -> dict[str, float]:
        """Return the seconds of every way."""
        number, seconds = len(differences), {}
        for way, contender in ways.items():
            began = time.perf_counter()
            contender.round(number)
            seconds[way] = time.perf_counter() - began
        difference = max(distance(contender.read(), naive.read()) for contender in (stacked, singly))
        differences.append(difference)
        if not difference < (1e-5 if number == 0 else 1e-2):  # rounding grows from round to round
            raise SystemExit(f"{name}: the ways differ by {difference} after {1 + number} rounds")
        return seconds

    one_round()  # warms up
    rounds = gate.gated(one_round, num_rounds).results
    seconds = {way: [one[way] for one in rounds] for way in ways}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    extra = range(len(differences), len(differences) + max(3, num_rounds // 3))
    return {
        "seconds_per_round": medians,
        "ranges": {way: spread(values) for way, values in seconds.items()},
        "naive / stacked": medians["naive"] / medians["stacked"],
        "naive / one by one": medians["naive"] / medians["one by one"],
        "largest relative difference of a parameter": {"first round": differences[0], "last round": differences[-1]},
        "where time goes": {"stacked": shares(stacked, extra, gate), "one by one": shares(singly, extra, gate)},
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each way")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    torch.set_num_threads(1)
    result = {
        "benchmark": "mixed_capacities",
        "machine": before,
        "versions": {"torch": version("torch"), "numpy": version("numpy"), "threads": torch.get_num_threads()},
        "clients": {"number": NUM_CLIENTS, "capacities": CAPACITIES, "samples": SAMPLES, "batch": BATCH},
        "models": {name: measure(name, arguments.rounds, gate) for name in arguments.models},
    }
    result |= gate.report()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
