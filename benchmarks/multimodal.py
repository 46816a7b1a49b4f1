"""A FedRolex round of 50 clients of five capacities that train mPLUG-2, or another model, on captioned moving digits.

Three ways, all in one process and one thread, in turn, on the same clips, batches and windows: gossamer stacked by
width, gossamer one by one, and a loop in plain PyTorch. For every client the loop does what a researcher would write:
it cuts the weights with index arrays, makes them leaves, and takes `backward` and an optimizer of `torch.optim` through
the client's batches; then it scatters the trained weights into a sum and a counter of full size. Batches and the
forward pass are those of gossamer's workload, which works on a dictionary of plain tensors, so that the loop has no
modules to call and nothing to load; models are compared after every round.

The smaller the batches, the more is gained by stacking: a few clips are too few to keep a processor's units busy. The
share of time outside gradient computation is measured in further rounds, see mixed_capacities.py. Beside the
seconds stand those that all products of matrices of a round would take at the rate of one product of large ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from building import Parts, engine_of, parts_of
from gossamer import rng
from gossamer.engines.local.engine import LocalEngine
from harness import Gate, Report, machine, spread
from mixed_capacities import Gossamer, State, clocked, rolled_mesh

CAPACITIES = (1.0, 0.75, 0.5, 0.25, 0.125)
NUM_CLIENTS, SAMPLES = 50, 48
LR = 0.002
OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
LARGE = 1024  # rows and columns of the product that shows the processor's rate


def configuration(model: str, batch: int, optimizer: str, *, stacked: bool) -> dict[str, Any]:
    """Return the federation: everyone sees and reads, takes part, and does all tasks of the model."""
    return {
        "rounds": 1000,
        "workload": {
            "name": "video-language",
            "dataset": {"name": "moving-digits", "num_train": NUM_CLIENTS * SAMPLES, "num_pools": 1},
            "model": model,
        },
        "clients": {"num": NUM_CLIENTS, "per_round": NUM_CLIENTS},
        "train": {"epochs": 1, "batch_size": batch, "lr": LR, "optimizer": {"name": optimizer}},
        "algorithm": "fedrolex",
        "submodel": {"capacities": list(CAPACITIES), "scaler": False},
        "engine": {"workers": 0, "modes": {"stacked": stacked, "padding": False}},
    }


class Federation(Gossamer):
    """The engine of one machine, without workers, evaluation, logs and commits."""

    def __init__(self, model: str, batch: int, optimizer: str, *, stacked: bool) -> None:
        self.parts: Parts = parts_of(configuration(model, batch, optimizer, stacked=stacked))
        self.engine: LocalEngine = engine_of(self.parts)


class Loop:
    """One client after another in plain PyTorch."""

    def __init__(self, parts: Parts, batch: int, optimizer: str) -> None:
        self.parts, self.batch, self.make_optimizer = parts, batch, OPTIMIZERS[optimizer]
        layout = parts.workload.layout
        self.axes = dict(zip(layout.names, layout.axes, strict=True))
        self.state = {name: value.clone() for name, value in layout.views(parts.workload.init(0)).items()}

    def round(self, number: int) -> None:
        """Train everyone and average."""
        clients, seed = np.arange(NUM_CLIENTS), self.parts.config.seed
        variants = self.parts.planner.capacities.variants(clients, number)
        orders = rng.permutations(seed, "shuffle", number, 0, clients, self.parts.workload.num_samples)
        keys = rng.bits(seed, "step-key", number, 0, clients, -(-SAMPLES // self.batch)).view(np.int64)
        total = {name: torch.zeros_like(value) for name, value in self.state.items()}
        count = {name: torch.zeros_like(value) for name, value in self.state.items()}
        for client in range(NUM_CLIENTS):
            capacity = self.parts.task.variants[variants[client]].capacity
            meshes = {n: rolled_mesh(v.shape, self.axes[n], capacity, number) for n, v in self.state.items()}
            params = {name: value[meshes[name]].requires_grad_() for name, value in self.state.items()}
            self.train(params, client, orders[client], keys[client], number)
            for name, trained in params.items():
                total[name][meshes[name]] += trained.detach()
                count[name][meshes[name]] += 1
        for name, value in self.state.items():
            held = count[name] > 0
            value[held] = total[name][held] / count[name][held]

    def train(self, params: State, client: int, order: NDArray[Any], keys: NDArray[np.int64], number: int) -> None:
        """Take one epoch of steps on leaves of autograd."""
        workload, optimizer = self.parts.workload, self.make_optimizer(params.values(), lr=LR)
        samples, constants = workload.batch(np.array([client]), order[None], number)
        own = {name: value[0] for name, value in samples.items()}
        fixed: dict[str, Tensor] = {name: value[0] for name, value in constants.items()}
        for step, start in enumerate(range(0, len(order), self.batch)):
            batch = {name: value[start : start + self.batch] for name, value in own.items()}
            optimizer.zero_grad()
            workload.loss(params, {**batch, **fixed, "key": torch.tensor(keys[step])}).backward()
            optimizer.step()

    def read(self) -> State:
        """Return the model."""
        return self.state


def distance(found: State, expected: State) -> float:
    """Return the distance of a model from the expected one, relative to the latter's norm.

    Over all parameters together, because some have no gradient but rounding: a softmax ignores the bias of its keys.
    """
    flat, wanted = (torch.cat([state[name].flatten() for name in expected]) for state in (found, expected))
    return float((flat - wanted).norm() / wanted.norm())


def outside_gradients(contender: Federation, rounds: range, gate: Gate) -> Report:
    """Return where the time of some rounds goes, as shares of 1."""

    def trial() -> dict[str, float]:
        """Return the seconds of every stretch."""
        with clocked(contender) as clock:
            clock.switch()
            clock.seconds.clear()
            for number in rounds:
                contender.round(number)
        return clock.seconds

    seconds = gate.gated(trial).results[0]
    total = sum(seconds.values())
    found = {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1])}
    return {"outside gradients": gate.goal(1 - found["gradients"], 0.1), "shares": found}


def products(loop: Loop, number: int) -> dict[str, float]:
    """Return the FLOPs of all products of matrices of a round, and how many a second the processor does at best."""
    with FlopCounterMode(display=False) as counter:
        loop.round(number)
    left, right = torch.rand(LARGE, LARGE), torch.rand(LARGE, LARGE)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    rate, flops = 2 * LARGE**3 / min(seconds), float(counter.get_total_flops())
    return {"FLOPs of a round": flops, "FLOPs a second of a large product": rate, "seconds at that rate": flops / rate}


def measure(model: str, batch: int, optimizer: str, num_rounds: int, gate: Gate) -> Report:
    """Time all ways in turn, and return their medians, factors and shares.

    Raises:
        SystemExit: their models differ.
    """
    stacked, singly = (Federation(model, batch, optimizer, stacked=way) for way in (True, False))
    loop = Loop(singly.parts, batch, optimizer)
    ways: dict[str, Federation | Loop] = {"stacked": stacked, "one by one": singly, "loop": loop}
    differences: list[float] = []

    def one_round() -> dict[str, float]:
        """Return the seconds of every way."""
        number, seconds = len(differences), {}
        for way, contender in ways.items():
            began = time.perf_counter()
            contender.round(number)
            seconds[way] = time.perf_counter() - began
        difference = max(distance(contender.read(), loop.read()) for contender in (stacked, singly))
        differences.append(difference)
        if number == 0 and not difference < 1e-3:  # later on rounding grows, by Adam above all
            raise SystemExit(f"the ways differ by {difference} after the first round")
        return seconds

    one_round()  # warms up
    rounds = gate.gated(one_round, num_rounds).results
    seconds = {way: [one[way] for one in rounds] for way in ways}
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    extra = range(len(differences), len(differences) + max(2, num_rounds // 3))
    return {
        "seconds_per_round": medians,
        "ranges": {way: spread(values) for way, values in seconds.items()},
        "stacked / loop": gate.goal(medians["stacked"] / medians["loop"], 0.5),
        "loop / one by one": medians["loop"] / medians["one by one"],
        "largest relative difference of the models": {"first round": differences[0], "last round": differences[-1]},
        "where time goes": {
            "stacked": outside_gradients(stacked, extra, gate),
            "one by one": outside_gradients(singly, extra, gate),
        },
        "products of matrices": products(loop, extra.stop),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each way")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="clips of a batch")
    parser.add_argument("--model", default="mplug-2", help="name of a model of videos and texts")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="sgd")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    torch.set_num_threads(1)
    result = {
        "benchmark": "multimodal",
        "machine": before,
        "versions": {"torch": version("torch"), "numpy": version("numpy"), "threads": torch.get_num_threads()},
        "clients": {"number": NUM_CLIENTS, "capacities": CAPACITIES, "samples": SAMPLES},
        "model": arguments.model,
        "optimizer": arguments.optimizer,
        "batches": {
            size: measure(arguments.model, size, arguments.optimizer, arguments.rounds, gate)
            for size in arguments.batches
        },
    }
    result |= gate.report()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
