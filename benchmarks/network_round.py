"""A round of FedAvg with McMahan's CNN on ten machines: gossamer against Flower's SuperLink and SuperNodes.

Every client is a process of its own, and talks to the server over loopback without TLS. 50 samples of 28 x 28 a client,
batches of 10, one epoch, no evaluation. Flower runs an app by its own `flwr run`; its SuperNodes start a process for
each message, which imports torch. With --eager a third contender: Flower whose SuperNodes look for tasks 20 times as
often as by themselves.
"""

from __future__ import annotations

import argparse
import json
import sys

from harness import HERE, RIVALS, Gate, interleave, machine, ratio, rivals_python, summary

GOAL = 0.5  # of Flower's time, at most


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="federations of each contender")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of a federation")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--samples", type=int, default=50, help="of a client")
    parser.add_argument("--eager", action="store_true", help="also Flower with shorter pauses")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    gate, before = Gate.of(arguments), machine()
    options = ["--model", "cnn"]
    for name in ("rounds", "warmup", "clients", "samples"):
        options += [f"--{name}", str(getattr(arguments, name))]
    options += ["--per-round", str(arguments.clients)]
    flower = [rivals_python(), str(RIVALS / "flower_network.py"), *options]
    commands = {"gossamer": [sys.executable, str(HERE / "gossamer_network.py"), *options], "flower": flower}
    if arguments.eager:
        commands["flower-eager"] = [*flower, "--poll-interval", "0.05"]
    found = summary(interleave(commands, arguments.repeats, gate))
    goals = {"gossamer / flower": gate.goal(ratio(found, "flower"), GOAL)}
    result = {"benchmark": "network_round", "machine": before, **gate.report(), "contenders": found, "goals": goals}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
