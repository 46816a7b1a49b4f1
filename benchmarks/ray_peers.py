"""Peers on two Ray actors, which hear from each other by Ray's object store, or in one machine's memory.

A round of decentralized SGD: one step of every peer on a batch of 8, and one exchange. Two contenders, interleaved,
each in processes of its own: the Ray engine, and the local engine with two workers, which is the bound. 64 peers with
an MLP of 199,210 parameters on three graphs, and 1,000 peers with softmax. Both must end with the same bits.

Bytes of a round: ``messages``, what peers send along the edges of the graph; ``crossing``, distinct rows that leave the
block that has them; ``loopback``, what everybody on this machine sent through the loopback interface meanwhile, where
Ray's calls go.

With --engine it is one contender by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import HERE, RIVALS, Gate, Report, Trials, interleave, machine, summary

NUM_WORKERS, BATCH = 2, 8
BLOCKS_OF_AN_ACTOR = 2
ENGINES: dict[str, dict[str, Any]] = {
    "object store": {"name": "ray"},
    "local": {"name": "local"},
}
MLP = {"name": "mlp", "hidden": [200, 200]}
CASES: dict[str, dict[str, Any]] = {
    "mlp, static-exp": {"peers": 64, "model": MLP, "topology": "static-exp", "rounds": 15},
    "mlp, ring": {"peers": 64, "model": MLP, "topology": "ring", "rounds": 15},
    "mlp, od-equidyn": {"peers": 64, "model": MLP, "topology": "od-equidyn", "rounds": 15},
    "softmax, od-equidyn": {"peers": 1_000, "model": "softmax", "topology": "od-equidyn", "rounds": 40},
}


def configuration(case: Mapping[str, Any], engine: str, rounds: int) -> dict[str, Any]:
    """Return the experiment; one round more than is timed, because the last one is followed by an evaluation."""
    dataset = {"name": "synthetic", "num_train": case["peers"] * BATCH, "num_test": 10, "shape": [1, 28, 28]}
    mode = {"capacity": 1.0, "stacked": True, "padding": True}
    return {
        "name": "ray-peers",
        "rounds": rounds + 1,
        "workload": {"dataset": dataset, "model": case["model"], "local_evaluation": False},
        "peers": {"num": case["peers"], "topology": case["topology"]},
        "algorithm": "dsgd",
        "train": {"steps": 1, "batch_size": BATCH, "lr": 0.05},
        "evaluation": {"every": rounds + 1, "num_peers": 0},
        "checkpoint": {"every_seconds": 600},
        "engine": {"workers": NUM_WORKERS, "modes": [mode], **ENGINES[engine]},
    }


# ---- one contender


def contend(options: argparse.Namespace) -> None:
    """Run one case with one engine and print one line of JSON."""
    import torch

    sys.path.insert(0, str(RIVALS))
    from common import RoundClock

    import gossamer
    from gossamer.experiment import Hooks

    torch.set_num_threads(1)
    options.total_rounds = options.warmup + options.rounds
    clock = RoundClock(options)
    watch = Watch(clock, (options.warmup, options.total_rounds))
    config = configuration(CASES[options.case], options.engine, options.total_rounds)
    with tempfile.TemporaryDirectory() as directory:
        hooks = Hooks(observer=lambda name, rounds: watch)
        run = gossamer.run(config, out=Path(directory) / "run", hooks=hooks)
    timed = run.metrics[options.warmup : options.total_rounds]
    sent = timed[-1]["total_bytes_up"] - run.metrics[options.warmup - 1]["total_bytes_up"]
    seconds = clock.round_seconds()[: options.total_rounds]
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in run.params.values()))
    line = {
        "round_seconds": seconds[options.warmup :],
        "first_round_seconds": seconds[0],
        "phase_seconds": {name: [one["phase_seconds"][name] for one in timed] for name in ("train", "exchange")},
        "message_bytes": sent / options.rounds,
        "loopback_bytes": (watch.loopback[1] - watch.loopback[0]) / options.rounds,
        "sha256": digest.hexdigest(),
        "versions": versions(),
        "readings": clock.readings,
    }
    print(json.dumps(line), flush=True)


class Watch:
    """Stamps the end of every round, and reads the loopback interface's counter around the timed ones."""

    def __init__(self, clock: Any, read_after: tuple[int, int]) -> None:
        self._clock, self._read_after = clock, read_after
        self.loopback: list[int] = []

    def on_block(self, round: int, done: int, total: int) -> None:
        """Nothing: blocks are not timed."""

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Stamp."""
        self._clock.tick()
        if record["round"] in self._read_after:
            self.loopback.append(loopback_bytes())


def loopback_bytes(table: Path = Path("/proc/net/dev")) -> int:
    """Return how many bytes the loopback interface has carried; 0 where the kernel does not tell."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:")), 0)


def versions() -> dict[str, str]:
    """Return the versions that matter."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "ray", "numpy")}}


# ---- all contenders


def crossing_bytes(case: Mapping[str, Any], num_floats: int, rounds: range) -> float:
    """Return how many bytes of distinct rows leave their block, in a round on average."""
    from gossamer import topology

    n, size = case["peers"], 1
    while size * BLOCKS_OF_AN_ACTOR * NUM_WORKERS < n:
        size *= 2
    graph = topology.build(case["topology"], n=n, seed=0)
    count = 0
    for number in rounds:
        edges = graph.mixing(number).edges()
        pairs = zip((edges.receiver // size).tolist(), edges.sender.tolist(), strict=True)
        count += sum(sender // size != group for group, sender in set(pairs))
    return 4 * num_floats * count / len(rounds)


def compare(name: str, arguments: argparse.Namespace, gate: Gate) -> Report:
    """Run one case with all engines in turn, and sum up.

    Raises:
        SystemExit: they trained different models.
    """
    case = CASES[name]
    rounds = arguments.rounds or case["rounds"]
    ours = [sys.executable, str(HERE / "ray_peers.py"), "--case", name, "--rounds", str(rounds), "--engine"]
    trials = interleave({engine: [*ours, engine] for engine in ENGINES}, arguments.repeats, gate)
    found = summary(trials)
    first: Mapping[str, Report] = {engine: of_one.results[0] for engine, of_one in trials.items()}
    if len({one["sha256"] for one in first.values()}) != 1:
        raise SystemExit(f"{name}: the engines' models differ")
    messages = first["local"]["message_bytes"]
    num_floats = round(messages / 4 / num_messages(case, range(arguments.warmup, arguments.warmup + rounds)))
    crossing = crossing_bytes(case, num_floats, range(arguments.warmup, arguments.warmup + rounds))
    for engine, of_one in trials.items():
        found[engine]["phase_seconds"] = phases(of_one)
        loopback = statistics.median(run["loopback_bytes"] for run in of_one.results)
        found[engine]["bytes_per_round"] = {"crossing": crossing if engine != "local" else 0.0, "loopback": loopback}
    seconds = {engine: one["seconds_per_round"] for engine, one in found.items()}
    return {
        "peers": case["peers"],
        "parameters": num_floats,
        "message_bytes_per_round": messages,
        "engines": found,
        "object store / local": seconds["object store"] / seconds["local"],
    }


def num_messages(case: Mapping[str, Any], rounds: range) -> float:
    """Return how many messages peers send in a round on average."""
    from gossamer import topology

    graph = topology.build(case["topology"], n=case["peers"], seed=0)
    return statistics.mean(len(graph.mixing(number).edges().sender) for number in rounds)


def phases(trials: Trials[Report]) -> Report:
    """Return the medians of training and exchanging."""
    runs = trials.results
    return {
        phase: statistics.median(statistics.median(run["phase_seconds"][phase]) for run in runs)
        for phase in runs[0]["phase_seconds"]
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--rounds", type=int, help="timed rounds a process, if not the case's own")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before the timed ones, at least 1")
    parser.add_argument("--case", choices=list(CASES), help="one case only")
    parser.add_argument("--engine", choices=list(ENGINES), help="be one contender, of --case")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    if arguments.engine:
        contend(arguments)
        return
    before, gate = machine(), Gate.of(arguments)
    cases = {name: compare(name, arguments, gate) for name in ([arguments.case] if arguments.case else CASES)}
    result = {"benchmark": "ray_peers", "machine": before, "actors": NUM_WORKERS, **gate.report(), "cases": cases}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
