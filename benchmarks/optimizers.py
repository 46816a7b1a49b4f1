"""What optimizers of local steps cost: a round of FedAvg with McMahan's CNN by each, against plain SGD, interleaved.

The federation of federated_round.py: 100 clients, 10 a round, 50 samples of 28 x 28 each, batches of 10, one epoch. SGD
without momentum never makes the gradients of large linear layers; "sgd, momentum" does, as all others must.
"""

from __future__ import annotations

import argparse
import json
import sys

from harness import HERE, Gate, interleave, machine, summary

OPTIMIZERS = {
    "sgd": "sgd",
    "sgd, momentum": {"name": "sgd", "momentum": 0.9},
    "adamw": "adamw",
    "adamw, kept": {"name": "adamw", "state": "keep"},
    "muon": "muon",
}
LEARNING_RATE = 1e-3
GOALS = {"adamw": 1.35}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each optimizer")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds a process")
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    Gate.add_options(parser)
    arguments = parser.parse_args()
    gate, before = Gate.of(arguments), machine()
    ours = [sys.executable, str(HERE / "gossamer_round.py"), "--model", "cnn", "--rounds", str(arguments.rounds)]
    commands = {
        name: [*ours, "--lr", str(LEARNING_RATE), "--optimizer", json.dumps(OPTIMIZERS[name])]
        for name in ["sgd", *(name for name in arguments.optimizers if name != "sgd")]
    }
    found = summary(interleave(commands, arguments.repeats, gate))
    ratios = {name: one["seconds_per_round"] / found["sgd"]["seconds_per_round"] for name, one in found.items()}
    goals = {f"{name} / sgd": gate.goal(ratios[name], most) for name, most in GOALS.items() if name in ratios}
    result = {"benchmark": "optimizers", "machine": before, **gate.report(), "optimizers": found, "ratios": ratios}
    print(json.dumps({**result, "goals": goals}, indent=1))


if __name__ == "__main__":
    main()
