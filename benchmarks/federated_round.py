"""One round of FedAvg with McMahan's CNN: gossamer, a bare shared-memory loop, pfl and Flower, interleaved.

100 clients, 10 a round, 50 samples of 28 x 28 each, batches of 10, one epoch, no evaluation in the timed part.
Also the first round from the call of `gossamer.run`, and a fleet of 5,000 registered clients with the same ten sampled.
"""

from __future__ import annotations

import argparse
import json
import sys

from harness import HERE, contenders, goal, interleave, machine, ratio, summary


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds a process")
    arguments = parser.parse_args()
    options = ["--model", "cnn", "--rounds", str(arguments.rounds)]
    before = machine()
    commands = contenders(options)
    del commands["hand-loop"]
    ours = [sys.executable, str(HERE / "gossamer_round.py"), *options, "--same-clients", "--clients"]
    commands |= {"gossamer, 100 registered": [*ours, "100"], "gossamer, 5,000 registered": [*ours, "5000"]}
    found = summary(interleave(commands, arguments.repeats))
    fleet = found["gossamer, 5,000 registered"]["seconds_per_round"]
    few = found["gossamer, 100 registered"]["seconds_per_round"]
    goals = {
        "gossamer / bare-loop": goal(ratio(found, "bare-loop"), 0.9),
        "gossamer / pfl": goal(ratio(found, "pfl"), 0.85),
        "gossamer / flower": goal(ratio(found, "flower"), 0.45),
        "first round, seconds": goal(found["gossamer"]["first_round_seconds"], 2.0),
        "5,000 registered / 100 registered": goal(fleet / few, 1.1),
    }
    print(
        json.dumps({"benchmark": "federated_round", "machine": before, "contenders": found, "goals": goals}, indent=1)
    )


if __name__ == "__main__":
    main()
