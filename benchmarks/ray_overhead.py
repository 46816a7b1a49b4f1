"""What Ray costs: rounds of FedAvg on the Ray engine against the local engine and Flower's Ray simulation, interleaved.

Two actors or workers, 50 samples of 28 x 28 a client, batches of 10, one epoch, no evaluation in the timed part.
McMahan's CNN with 10 of 100 clients; softmax with 100 of 1,000; softmax with 500 of 10,000 (in Flower's simulation ten
at a time share their data; here all have their own, 1.6 GB a process). Also the time from the command to the end of its
first round: imports, data, Ray, actors, and the round. With --engine it is one contender by itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import HERE, RIVALS, Gate, Report, interleave, machine, measure, rivals_python, start, summary

NUM_WORKERS = 2
MAX_FLOWER_SECONDS = 180
ROUNDS = {"cnn": 10, "softmax": 100, "many": 30}  # enough to last longer than the steps of the processors' counters
FLOWER_ROUNDS = 10
FEDERATIONS = {
    "cnn": ["--model", "cnn"],
    "softmax": ["--model", "softmax", "--clients", "1000", "--per-round", "100"],
    "many": ["--model", "softmax", "--clients", "10000", "--per-round", "500"],
}


@functools.cache
def _data(num_clients: int, num_samples: int, seed: int) -> Any:
    from gossamer_round import make_data

    return make_data(num_clients, num_samples, seed)


def dataset(options: Mapping[str, Any]) -> Any:
    """Return the data: in the driver those made before the clock started, in an actor its own."""
    return _data(options["clients"], options["samples"], options["seed"])


def contend() -> None:
    """Run gossamer with one engine and print one line of JSON."""
    sys.path.insert(0, str(RIVALS))
    from common import RoundClock, flatten, make_parser, read_options, report

    import gossamer_round
    from building import initial_model, parts_of, read_config
    from gossamer import experiment

    sys.modules.setdefault("ray_overhead", sys.modules["__main__"])
    parser = make_parser("FedAvg by gossamer, on an engine of choice.")
    parser.add_argument("--engine", choices=("local", "ray"), required=True)
    gossamer_round.add_options(parser)
    options, own = read_options(parser)
    given = {"clients": options.clients, "samples": options.samples, "seed": options.seed}
    dataset(given)
    data = gossamer_round.configuration(options, own)
    data["workload"]["dataset"] = {"name": "ray_overhead:dataset", **given}
    data["engine"] = {"name": own.engine, "workers": NUM_WORKERS}
    with tempfile.TemporaryDirectory() as directory:
        clock = RoundClock(options)
        hooks = experiment.Hooks(observer=lambda name, rounds: gossamer_round.Watch(clock))
        run = experiment.run(data, out=Path(directory) / "run", hooks=hooks)
        clock.ended.pop()
        config = read_config(run.directory)
    report(
        f"gossamer on {own.engine}",
        options,
        clock,
        flatten(initial_model(parts_of(config), options.seed).values()),
        flatten(run.params.values()),
        ("torch", "ray"),
        processes=NUM_WORKERS,
        modes=config["engine"]["modes"],
        phase_seconds=[record["phase_seconds"] for record in run.metrics[options.warmup : -1]][-1],
        command_seconds=_age_seconds() - (time.perf_counter() - clock.ended[0]),
    )


def _age_seconds() -> float:
    """Return for how long this process has existed."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def commands(options: Sequence[str], rounds: int) -> dict[str, list[str]]:
    """Return the command of every contender."""
    ours = [sys.executable, str(HERE / "ray_overhead.py"), *options, "--rounds", str(rounds), "--engine"]
    flower = [rivals_python(), str(RIVALS / "flower_round.py"), *options, "--rounds", str(min(rounds, FLOWER_ROUNDS))]
    return {"gossamer on ray": [*ours, "ray"], "gossamer on local": [*ours, "local"], "flower": flower}


def compare(name: str, rounds: int, repeats: int, gate: Gate) -> dict[str, Report]:
    """Run one federation; Flower is left out, and why is told, where it takes longer than `MAX_FLOWER_SECONDS`."""
    contenders, skipped = commands(FEDERATIONS[name], rounds), ""
    if name == "many":
        try:
            measure(["timeout", str(MAX_FLOWER_SECONDS), *contenders["flower"]])
        except SystemExit as error:
            skipped = f"not done in {MAX_FLOWER_SECONDS} seconds, or failed: {str(error)[-300:]}"
            del contenders["flower"]
    trials = interleave(contenders, repeats, gate)
    found = summary(trials)
    for contender, of_one in trials.items():
        first = of_one.results[0]
        found[contender]["clients_per_second"] = first["per_round"] / found[contender]["seconds_per_round"]
        if "command_seconds" in first:
            found[contender]["command_to_first_round"] = start(of_one, "command_seconds", "command")
    return found | ({"flower": {"skipped": skipped}} if skipped else {})


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--rounds", type=int, help=f"timed rounds a process, if not {ROUNDS}")
    parser.add_argument("--only", choices=sorted(FEDERATIONS), help="one federation only")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    names = [arguments.only] if arguments.only else list(FEDERATIONS)
    found = {name: compare(name, arguments.rounds or ROUNDS[name], arguments.repeats, gate) for name in names}
    goals = {}
    for name, rivals in {
        "cnn": {"gossamer on local": 1.1, "flower": 0.55},
        "softmax": {"flower": 1 / 15},
        "many": {"flower": 1 / 15},
    }.items():
        for rival, most in rivals.items() if name in found else ():
            theirs = found[name][rival].get("seconds_per_round")
            if theirs is not None:
                value = found[name]["gossamer on ray"]["seconds_per_round"] / theirs
                goals[f"{name}: gossamer on ray / {rival}"] = gate.goal(value, most)
    if "cnn" in found:
        first = found["cnn"]["gossamer on ray"]["command_to_first_round"]
        goals["cnn: from the command to the end of the first round, warm, seconds"] = gate.goal(
            first["command_seconds"], 10.0, first["quiet_starts"] > 0
        )
    result = {"benchmark": "ray_overhead", "machine": before, **gate.report(), "federations": found, "goals": goals}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    contend() if "--engine" in sys.argv else main()
