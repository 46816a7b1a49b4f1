"""What the rival runners share: options, models, data, the clock and the report.

Every runner trains the same federation: FedAvg, plain SGD, one local epoch in the
order of the data, equal client sizes, no evaluation. Apart from the sampling of
clients, which each framework does in its own way, all of them compute the same
numbers: with --per-round equal to --clients their `parameter_change` agrees to 1e-5.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parent.parent))

from quiet import Reading, read

LEARNING_RATE = 0.05
NUM_CLASSES = 10
NUM_PARAMETERS = {"softmax": 7_850, "mlp": 199_210, "cnn": 1_663_370}
MIN_CHANGE = 1e-5  # of the parameters' norm: less is rounding, not training
MAX_SHARDS = 1_000  # distinct client data sets kept in memory, 157 MB at 50 samples


@dataclass(frozen=True)
class Options:
    """One benchmark: the federation's size and the rounds to run.

    `warmup` rounds come first and are not reported, except for the very first;
    `rounds` timed ones follow.
    """

    model: str
    clients: int
    per_round: int
    rounds: int
    warmup: int
    samples: int
    batch_size: int
    seed: int

    @property
    def total_rounds(self) -> int:
        """Rounds to run, warm-up included."""
        return self.warmup + self.rounds


def make_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every runner takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=sorted(NUM_PARAMETERS), default="cnn")
    parser.add_argument("--clients", type=int, default=100, help="registered clients")
    parser.add_argument("--per-round", type=int, default=10, help="clients a round")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones, at least 1")
    parser.add_argument("--samples", type=int, default=50, help="samples a client")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_options(
    parser: argparse.ArgumentParser,
) -> tuple[Options, argparse.Namespace]:
    """Parse the command line; exit with a message if the values contradict.

    Returns the shared options, and the namespace for a runner's own ones.
    """
    namespace = parser.parse_args()
    options = Options(**{f.name: getattr(namespace, f.name) for f in fields(Options)})
    for name, value in asdict(options).items():
        if name not in ("model", "seed") and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if options.per_round > options.clients:
        parser.error(f"--per-round {options.per_round} exceeds --clients {options.clients}")
    return options, namespace


def build_model(name: str, seed: int) -> nn.Sequential:
    """Return the named model, with initial parameters drawn from `seed`.

    Input [batch, 1, 28, 28], output [batch, 10]. `softmax` is one linear layer,
    `mlp` has two hidden layers of 200, `cnn` is the MNIST network of McMahan et al.,
    "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.

    Raises:
        RuntimeError: the model has not the number of parameters that it should.
    """
    torch.manual_seed(seed)
    if name == "softmax":
        layers = [nn.Flatten(), nn.Linear(784, NUM_CLASSES)]
    elif name == "mlp":
        layers = [nn.Flatten(), nn.Linear(784, 200), nn.ReLU()]
        layers += [nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, NUM_CLASSES)]
    else:
        layers = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU()]
        layers += [nn.Linear(512, NUM_CLASSES)]
    model = nn.Sequential(*layers)
    count = sum(p.numel() for p in model.parameters())
    if count != NUM_PARAMETERS[name]:
        raise RuntimeError(f"{name} has {count} parameters, not {NUM_PARAMETERS[name]}")
    return model


class ClientData(NamedTuple):
    """Synthetic data of all clients, in memory.

    `images`: float32 [shards, samples, 1, 28, 28]; `labels`: int64 [shards, samples].
    """

    images: Tensor
    labels: Tensor

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """Return one client's images and labels, as views."""
        shard = client % len(self.images)
        return self.images[shard], self.labels[shard]


def make_data(clients: int, samples: int, seed: int) -> ClientData:
    """Draw the data of `clients` clients; beyond MAX_SHARDS they share shards.

    Pixels are uniform in [0, 0.25): with brighter ones SGD at this learning rate is
    unstable, and rounding errors grow until the runners no longer agree.
    """
    shards = min(clients, MAX_SHARDS)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(shards, samples, 1, 28, 28, generator=generator).mul_(0.25)
    labels = torch.randint(NUM_CLASSES, (shards, samples), generator=generator)
    return ClientData(images, labels)


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
) -> None:
    """Pass once over one client's data in batches, in order."""
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return a copy of the tensors as one flat vector, [d]."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def settle() -> None:
    """Put what imports and set-up left behind out of the garbage collector's reach.

    Otherwise one full collection, a quarter of a second with torch imported, falls
    into some round of a runner that makes many objects.
    """
    gc.collect()
    gc.freeze()


class Rounds(Protocol):
    """What a clock must know."""

    @property
    def warmup(self) -> int:
        """Rounds that come before the timed ones."""
        ...

    @property
    def total_rounds(self) -> int:
        """Rounds to run, warm-up included."""
        ...


class RoundClock:
    """Wall-clock stamps of all rounds, and the processors' counters around the timed ones.

    A runner makes it when imports, data and initial model are ready, just before
    the framework starts its workers. The counters are read at the start, after the
    warm-up and after the last round, which takes milliseconds that no round is charged.
    """

    def __init__(self, options: Rounds) -> None:
        settle()
        self._read_after = (options.warmup, options.total_rounds)
        self.readings: list[Reading | None] = [read()]
        self.began = [time.perf_counter()]
        self.ended: list[float] = []

    def tick(self) -> None:
        """Note that a round has ended: the global model is updated."""
        self.ended.append(time.perf_counter())
        if len(self.ended) in self._read_after:
            self.readings.append(read())
        self.began.append(time.perf_counter())

    def round_seconds(self) -> list[float]:
        """Return the seconds of each round; the first one includes the start."""
        return [b - a for a, b in zip(self.began, self.ended, strict=False)]


def report(
    rival: str,
    options: Options,
    clock: RoundClock,
    before: Tensor,
    after: Tensor,
    packages: tuple[str, ...],
    **details: object,
) -> None:
    """Check that training took place and print one line of JSON.

    `before` and `after` are the flat global parameters, [d]; `packages` are the
    installed distributions whose versions are told; `details` are added as they are.

    Raises:
        RuntimeError: a round is missing, or the parameters are unchanged, misshapen
            or not finite.
    """
    seconds = clock.round_seconds()
    if len(seconds) != options.total_rounds:
        raise RuntimeError(f"{rival}: {len(seconds)} rounds ended, not {options.total_rounds}")
    if before.shape != after.shape or not bool(torch.isfinite(after).all()):
        raise RuntimeError(f"{rival}: the final parameters are misshapen or not finite")
    change = (after - before).double().norm().item()
    if change < MIN_CHANGE * before.double().norm().item():
        raise RuntimeError(f"{rival}: the parameters changed by {change:.3g} only: nothing trained")
    versions = {name: version(name) for name in packages}
    line = {
        "rival": rival,
        "versions": {"python": platform.python_version(), **versions},
        **asdict(options),
        **details,
        "parameters": after.numel(),
        "parameter_change": change,
        "first_round_seconds": seconds[0],
        "round_seconds": seconds[options.warmup :],
        "readings": clock.readings,
    }
    print(json.dumps(line), flush=True)
