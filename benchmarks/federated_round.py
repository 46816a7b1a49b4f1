"""One round of FedAvg with McMahan's CNN: gossamer, a bare shared-memory loop, pfl and Flower, interleaved.

100 clients, 10 a round, 50 samples of 28 x 28 each, batches of 10, one epoch, no evaluation in the timed part.
Also the first round from the call of `gossamer.run`, and a fleet of 5,000 registered clients with the same ten sampled.
"""

from __future__ import annotations

import argparse
import json
import sys

from harness import HERE, Gate, contenders, interleave, machine, ratio, summary


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds a process")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    gate = Gate.of(arguments)
    options = ["--model", "cnn", "--rounds", str(arguments.rounds)]
    before = machine()
    commands = contenders(options)
    del commands["hand-loop"]
    ours = [sys.executable, str(HERE / "gossamer_round.py"), *options, "--same-clients", "--clients"]
    commands |= {"gossamer, 100 registered": [*ours, "100"], "gossamer, 5,000 registered": [*ours, "5000"]}
    found = summary(interleave(commands, arguments.repeats, gate))
    fleet = found["gossamer, 5,000 registered"]["seconds_per_round"]
    few = found["gossamer, 100 registered"]["seconds_per_round"]
    first = found["gossamer"]
    goals = {
        "gossamer / bare-loop": gate.goal(ratio(found, "bare-loop"), 0.9),
        "gossamer / pfl": gate.goal(ratio(found, "pfl"), 0.85),
        "gossamer / flower": gate.goal(ratio(found, "flower"), 0.45),
        "first round, seconds": gate.goal(first["first_round_seconds"], 2.0, first["quiet_starts"] > 0),
        "5,000 registered / 100 registered": gate.goal(fleet / few, 1.1),
    }
    result = {"benchmark": "federated_round", "machine": before, **gate.report(), "contenders": found, "goals": goals}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
