"""The federation of benchmarks/rivals, run by gossamer: the same options, data and report.

The clock starts at the call of `gossamer.run`, with imports done and data in memory, as for the rivals. With --ranks N
the engine is collective, on N ranks that torchrun starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

import numpy as np
import torch
from common import LEARNING_RATE, Options, RoundClock, flatten, make_parser, read_options, report

from building import initial_model, parts_of, read_config
from gossamer import experiment
from gossamer.engines.collective.environment import is_leader, is_rank
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.partitions import Partition

MODELS = {"softmax": "softmax", "mlp": {"name": "mlp", "hidden": [200, 200]}, "cnn": "cnn"}
_data: list[ImageData] = []


def make_data(num_clients: int, num_samples: int, seed: int) -> ImageData:
    """Draw what `common.make_data` draws, every client with data of its own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num_clients * num_samples, 1, 28, 28, generator=generator).mul_(0.25)
    labels = torch.randint(10, (num_clients * num_samples,), generator=generator)
    return ImageData("benchmark", images, labels, images[:10].clone(), labels[:10], 10, (0.0,), (1.0,))


def dataset(options: Mapping[str, Any]) -> ImageData:
    """Return the data that was made before the clock started."""
    return _data[0]


def in_order(labels: np.ndarray[Any, Any], num_clients: int, num_labels: int, seed: int, owner: Any) -> Partition:
    """Give every client an equal, contiguous stretch of the data."""
    return Partition(np.arange(len(labels)), np.linspace(0, len(labels), num_clients + 1).astype(np.int64))


def first_clients(seed: int, round: int, num_clients: int, count: int) -> np.ndarray[Any, Any]:
    """Choose the same clients whatever their number: 0 .. count-1."""
    return np.arange(count)


def configuration(options: Options, own: argparse.Namespace) -> dict[str, Any]:
    """Return the experiment; one round more than is timed, because the last one is followed by an evaluation."""
    return {
        "name": "benchmark",
        "seed": options.seed,
        "rounds": options.total_rounds + 1,
        "workload": {
            "dataset": "gossamer_round:dataset",
            "model": MODELS[options.model],
            "local_evaluation": False,
        },
        "clients": {
            "num": options.clients,
            "per_round": options.per_round,
            "partition": "gossamer_round:in_order",
            "sampler": "gossamer_round:first_clients" if own.same_clients else "uniform",
        },
        "train": {"epochs": 1, "batch_size": options.batch_size, "lr": own.lr, "optimizer": json.loads(own.optimizer)},
        "evaluation": {"every": options.total_rounds + 1},
        "checkpoint": {"every_seconds": 600},
        "engine": {"name": "collective"} if own.ranks else {"workers": own.workers},
    }


class Watch:
    """Stamps the end of every round."""

    def __init__(self, clock: RoundClock) -> None:
        self.clock = clock

    def on_block(self, round: int, done: int, total: int) -> None:
        """Nothing: blocks are not timed."""

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Stamp."""
        self.clock.tick()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `configuration` reads."""
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=0, help="ranks of engine collective, instead of workers")
    parser.add_argument("--same-clients", action="store_true", help="sample clients 0..per_round-1 in every round")
    parser.add_argument("--optimizer", default='"sgd"', help="train.optimizer, as JSON")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)


def main() -> None:
    """Run the benchmark of the command line and print its JSON."""
    parser = make_parser("FedAvg by gossamer.")
    add_options(parser)
    options, own = read_options(parser)
    if own.ranks and not is_rank():
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(own.ranks), "--rdzv-backend", "c10d"]
        command = [sys.executable, *launcher, "--rdzv-endpoint", "127.0.0.1:0", __file__, *sys.argv[1:]]
        os.execv(sys.executable, command)
    sys.modules.setdefault("gossamer_round", sys.modules["__main__"])
    _data.append(make_data(options.clients, options.samples, options.seed))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        clock = RoundClock(options)
        hooks = experiment.Hooks(observer=lambda name, rounds: Watch(clock))
        run = experiment.run(configuration(options, own), out=Path(directory) / "run", hooks=hooks)
        if not is_leader():
            return
        clock.ended.pop()
        config = read_config(run.directory)
        before = flatten(initial_model(parts_of(config), options.seed).values())
    report(
        "gossamer",
        options,
        clock,
        before,
        flatten(run.params.values()),
        ("torch", "numpy"),
        processes=own.ranks or own.workers,
        modes=config["engine"]["modes"],
        phase_seconds=[record["phase_seconds"] for record in run.metrics[options.warmup : -1]][-1],
    )


if __name__ == "__main__":
    main()
