"""What the runners of peers without a server share: options, models, the graph and the report.

Every runner trains the same peers by decentralized SGD on the data of `common.make_data`, of which each peer has just
one batch. A round is one step of SGD, then every peer takes the mean of its own model and that of the peer that lies
`shift` places before it; every round has a shift of its own. So all runners compute the same numbers: with the same
peers and shifts the `parameter_change` of their merged models agrees to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version

import torch
from common import MIN_CHANGE, RoundClock
from torch import Tensor, nn

BATCH_SIZE = 8
LAYERS = {"softmax": [(784, 10)], "mlp": [(784, 32), (32, 10)]}  # inputs and outputs of each


@dataclass(frozen=True)
class Options:
    """One benchmark.

    `warmup` rounds come first and are not reported, except for the very first; timed ones follow. There are as many
    rounds as `shifts`.
    """

    model: str
    peers: int
    shifts: list[int]
    warmup: int
    threads: int
    seed: int

    @property
    def total_rounds(self) -> int:
        """Rounds to run, warm-up included."""
        return len(self.shifts)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every runner takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=sorted(LAYERS), default="mlp")
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--shifts", type=int, nargs="+", default=[1, 17, 5, 333, 2], help="one a round, below --peers")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones, at least 1")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_options(parser: argparse.ArgumentParser) -> tuple[Options, argparse.Namespace]:
    """Parse the command line; exit with a message if the values contradict.

    Returns the shared options, and the namespace for a runner's own ones.
    """
    namespace = parser.parse_args()
    options = Options(**{field.name: getattr(namespace, field.name) for field in fields(Options)})
    for name in ("warmup", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; give at least 1")
    if options.total_rounds <= options.warmup:
        parser.error(f"--shifts names {options.total_rounds} rounds; give more than --warmup {options.warmup}")
    if not all(0 < shift < options.peers for shift in options.shifts):
        parser.error(f"--shifts {options.shifts}: give numbers in 1 .. {options.peers - 1}")
    return options, namespace


def build_model(name: str, seed: int) -> nn.Sequential:
    """Return the named model, with initial parameters drawn from `seed`.

    Input [batch, 1, 28, 28], output [batch, 10]. `softmax` is one linear layer, `mlp` has one hidden layer of 32.
    """
    torch.manual_seed(seed)
    modules: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in LAYERS[name]:
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


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

    `before` and `after` are the flat parameters of the mean of all peers' models, [d]; `packages` are the installed
    distributions whose versions are told; `details` are added as they are.

    Raises:
        RuntimeError: a round is missing, or the parameters are unchanged, misshapen or not finite.
    """
    seconds = clock.round_seconds()
    if len(seconds) != options.total_rounds:
        raise RuntimeError(f"{rival}: {len(seconds)} rounds ended, not {options.total_rounds}")
    if before.shape != after.shape or not bool(torch.isfinite(after).all()):
        raise RuntimeError(f"{rival}: the final parameters are misshapen or not finite")
    change = (after - before).double().norm().item()
    if change < MIN_CHANGE * before.double().norm().item():
        raise RuntimeError(f"{rival}: the parameters changed by {change:.3g} only: nothing trained")
    line = {
        "rival": rival,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **asdict(options),
        **details,
        "parameters": after.numel(),
        "parameter_change": change,
        "first_round_seconds": seconds[0],
        "round_seconds": seconds[options.warmup :],
        "readings": clock.readings,
    }
    print(json.dumps(line), flush=True)
