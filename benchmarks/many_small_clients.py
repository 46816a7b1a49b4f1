"""One round of FedAvg with small models, 100 of 1,000 clients: gossamer, loops by hand, pfl and Flower, interleaved.

Softmax 784 x 10 and an MLP of 199,210 parameters; 50 samples a client, batches of 10, one epoch, no evaluation.
"""

from __future__ import annotations

import argparse
import json

from harness import contenders, goal, interleave, machine, ratio, summary


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds a process")
    arguments = parser.parse_args()
    before, models = machine(), {}
    for model in ("softmax", "mlp"):
        options = ["--model", model, "--clients", "1000", "--per-round", "100", "--rounds", str(arguments.rounds)]
        models[model] = summary(interleave(contenders(options), arguments.repeats))
    softmax, mlp = models["softmax"], models["mlp"]
    goals = {
        "softmax: gossamer / flower": goal(ratio(softmax, "flower"), 1 / 30),
        "softmax: gossamer / hand-loop": goal(ratio(softmax, "hand-loop"), 1 / 6),
        "mlp: gossamer / flower": goal(ratio(mlp, "flower"), 1 / 9),
        "mlp: gossamer / pfl": goal(ratio(mlp, "pfl"), 0.9),
    }
    print(
        json.dumps({"benchmark": "many_small_clients", "machine": before, "models": models, "goals": goals}, indent=1)
    )


if __name__ == "__main__":
    main()
