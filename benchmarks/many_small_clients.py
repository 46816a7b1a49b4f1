"""One round of FedAvg with small models, 100 of 1,000 clients: gossamer, loops by hand, pfl and Flower, interleaved.

Softmax 784 x 10 and an MLP of 199,210 parameters; 50 samples a client, batches of 10, one epoch, no evaluation. Flower,
whose rounds take a second or so, is timed for fewer of them.
"""

from __future__ import annotations

import argparse
import json

from harness import Gate, contenders, interleave, machine, ratio, summary

ROUNDS = {"softmax": 100, "mlp": 25}  # enough to last longer than the steps of the processors' counters
GOALS = {"softmax": {"flower": 1 / 30, "hand-loop": 1 / 6}, "mlp": {"flower": 1 / 9, "pfl": 0.9}}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--rounds", type=int, help=f"timed rounds a process, if not {ROUNDS}")
    parser.add_argument("--flower-rounds", type=int, default=10, help="timed rounds of each of Flower's")
    parser.add_argument("--models", nargs="+", choices=list(ROUNDS), default=list(ROUNDS))
    Gate.add_options(parser)
    arguments = parser.parse_args()
    gate = Gate.of(arguments)
    before, models = machine(), {}
    for model in arguments.models:
        options = ["--model", model, "--clients", "1000", "--per-round", "100", "--rounds"]
        commands = contenders([*options, str(arguments.rounds or ROUNDS[model])])
        commands["flower"] = contenders([*options, str(arguments.flower_rounds)])["flower"]
        models[model] = summary(interleave(commands, arguments.repeats, gate))
    goals = {
        f"{model}: gossamer / {rival}": gate.goal(ratio(models[model], rival), most)
        for model, rivals in GOALS.items()
        for rival, most in rivals.items()
        if model in models
    }
    result = {"benchmark": "many_small_clients", "machine": before, **gate.report(), "models": models, "goals": goals}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
