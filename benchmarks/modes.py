"""What `engine.modes: auto`, a rule of shapes, costs against `measured`, on the federations and peers of the README.

Each case is one experiment, built twice: its modes by the rule, and as measured here. Rounds of both alternate in this
process; their workers wait meanwhile. Where both choose the same modes, they run the same program, so the ratio shows
what the comparison itself is worth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from harness import RIVALS, Gate, machine, spread

sys.path.insert(0, str(RIVALS))

import torch

import mixed_capacities
import peers
from building import engine_of, parts_of

CHOICES = ("auto", "measured")
MOST = 1.05  # times as long
MLP = {"name": "mlp", "hidden": [200, 200]}


def federation(model: Any, num_clients: int, per_round: int, **changes: Any) -> dict[str, Any]:
    """Return clients of 50 images of 28 x 28 each, in batches of ten."""
    images = {"name": "synthetic", "num_train": 50 * num_clients, "num_test": 10, "shape": [1, 28, 28]}
    return {
        "rounds": 100_000,
        "workload": {"dataset": images, "model": model, "local_evaluation": False},
        "clients": {"num": num_clients, "per_round": per_round},
        "train": {"epochs": 1, "batch_size": 10, "lr": 0.002},
        "engine": {"workers": 2},
    } | changes


def decentralized(model: Any, num_peers: int) -> dict[str, Any]:
    """Return peers on a one-peer graph, one batch of eight each."""
    images = {"name": "synthetic", "num_train": 8 * num_peers, "num_test": 10, "shape": [1, 28, 28]}
    return {
        "rounds": 100_000,
        "workload": {"dataset": images, "model": model, "local_evaluation": False},
        "peers": {"num": num_peers, "topology": peers.graph("od-equidyn", num_peers)},
        "train": {"steps": 1, "batch_size": 8, "lr": 0.002},
        "engine": {"workers": 2},
    }


def five_sizes(name: str) -> dict[str, Any]:
    """Return the federation of benchmarks/mixed_capacities.py."""
    config = mixed_capacities.configuration(mixed_capacities.MODELS[name], stacked=True)
    return config | {"rounds": 100_000, "engine": {"workers": 0}}


CASES: dict[str, dict[str, Any]] = {
    "softmax, 100 of 1,000 clients": federation("softmax", 1000, 100),
    "MLP of 199,210 parameters, 100 of 1,000 clients": federation(MLP, 1000, 100),
    "CNN, 10 of 100 clients": federation("cnn", 100, 10),
    "CNN of five capacities, 100 clients": five_sizes("narrow cnn"),
    "MLP of five capacities, 100 clients": five_sizes("mlp"),
    "softmax, 10,000 peers": decentralized("softmax", 10_000),
    "MLP 784-32-10, 1,000 peers": decentralized(peers.MODELS["mlp"], 1_000),
}


class Contender:
    """An experiment in the modes of one choice."""

    def __init__(self, config: Mapping[str, Any], choice: str) -> None:
        self.parts = parts_of({**config, "engine": {**config["engine"], "modes": choice}})
        self.modes = [variant.mode.model_dump() for variant in self.parts.task.variants]
        self.engine = engine_of(self.parts)
        self.done = 0

    def rounds(self, number: int) -> float:
        """Train and exchange; return the seconds a round."""
        began = time.perf_counter()
        for round in range(self.done, self.done + number):
            plan = self.parts.planner.plan(round)
            for _ in self.engine.train(plan):
                pass
            self.engine.exchange(plan)
        self.done += number
        return (time.perf_counter() - began) / number


def compare(name: str, trials: int, seconds: float, gate: Gate) -> dict[str, Any]:
    """Time both choices in turn, and return their medians and what the rule costs.

    Args:
        name: of the case.
        trials: how many of each.
        seconds: least length of a trial.
        gate: gate of the trials.
    """
    contenders = {choice: Contender(CASES[name], choice) for choice in CHOICES}
    for contender in contenders.values():
        contender.rounds(1)
    longest = max(contender.rounds(1) for contender in contenders.values())
    number = max(1, round(seconds / longest))
    measures = {choice: lambda one=contender: one.rounds(number) for choice, contender in contenders.items()}
    found = gate.interleave(measures, trials)
    medians = {choice: statistics.median(one.results) for choice, one in found.items()}
    for contender in contenders.values():
        contender.engine.close()
    return {
        "modes": {choice: contender.modes for choice, contender in contenders.items()},
        "same_modes": contenders["auto"].modes == contenders["measured"].modes,
        "seconds_per_round": medians,
        "ranges": {choice: spread(one.results) for choice, one in found.items()},
        "auto / measured": gate.goal(medians["auto"] / medians["measured"], MOST),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=7, help="timed trials of each choice")
    parser.add_argument("--seconds", type=float, default=1.0, help="least length of a trial")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    torch.set_num_threads(1)
    names = [name for name in CASES if arguments.only in name]
    cases = {name: compare(name, arguments.trials, arguments.seconds, gate) for name in names}
    result = {
        "benchmark": "modes",
        "machine": before,
        "versions": {"torch": version("torch"), "numpy": version("numpy")},
        "cases": cases,
        **gate.report(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
