"""Decentralized SGD on one machine: gossamer's peers, a loop over peers by hand, gossipy, and bounds, interleaved.

Softmax 784 x 10 and an MLP 784-32-10, batches of 8; a round is its plan, one gradient of every peer and one mixing.
Every contender runs in processes of its own, `--repeats` times. The loop and gossipy have one torch thread and two in
turn, and the quicker counts; they and gossamer must end with the same merged model. They are too slow for 10,000 peers,
so softmax is compared with 1,000; `microseconds_per_peer` tells what a round costs by peer.

`peers.py gossamer` is gossamer's own runner, with the options of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from harness import HERE, RIVALS, Gate, Report, interleave, machine, rivals_python, summary

sys.path.insert(0, str(RIVALS))

import torch
from common import LEARNING_RATE, RoundClock, flatten
from peers_common import BATCH_SIZE, Options, build_model, make_parser, read_options, report

from building import engine_of, parts_of
from gossamer import topology
from gossamer.workloads.datasets import ImageData
from gossamer_round import make_data

MODELS = {"softmax": "softmax", "mlp": {"name": "mlp", "hidden": [32]}}
MANY, FEW = 10_000, 1_000
_data: list[ImageData] = []


def dataset(options: Mapping[str, Any]) -> ImageData:
    """Return the data that was made before."""
    return _data[0]


def graph(name: str, num_peers: int) -> dict[str, Any]:
    """Return a topology; the one-peer one with the step that makes every exchange the mean of two models."""
    own: dict[str, dict[str, Any]] = {
        "od-equidyn": {"eta": num_peers / (2 * (num_peers - 1))},
        "d-equistatic": {"M": 10},
    }
    return {"name": name, **own.get(name, {})}


# ---- gossamer's runner


def configuration(options: Options, topology_name: str, workers: int) -> dict[str, Any]:
    """Return the experiment."""
    return {
        "seed": options.seed,
        "rounds": options.total_rounds,
        "workload": {"dataset": "peers:dataset", "model": MODELS[options.model], "local_evaluation": False},
        "peers": {
            "num": options.peers,
            "topology": graph(topology_name, options.peers),
            "partition": "gossamer_round:in_order",
        },
        "train": {"steps": 1, "batch_size": BATCH_SIZE, "lr": LEARNING_RATE},
        "algorithm": "dsgd",
        "engine": {"workers": workers},
    }


def run_gossamer() -> None:
    """Run the benchmark of the command line and print its JSON."""
    parser = make_parser("Decentralized SGD by gossamer.")
    parser.add_argument("--topology", default="od-equidyn")
    parser.add_argument("--workers", type=int, default=2)
    options, own = read_options(parser)
    sys.modules.setdefault("peers", sys.modules["__main__"])
    torch.set_num_threads(options.threads)
    _data.append(make_data(options.peers, BATCH_SIZE, options.seed))
    parts = parts_of(configuration(options, own.topology, own.workers))
    engine = engine_of(parts)
    layout, model = parts.workload.layout, build_model(options.model, options.seed)
    start = torch.zeros(layout.d)  # has padding, which a module has not
    for value, parameter in zip(layout.views(start).values(), model.parameters(), strict=True):
        value.copy_(parameter.detach())
    engine.write({"x": start.expand(options.peers, -1)})
    phases: dict[str, list[float]] = {"plan": [], "train": [], "mix": []}
    clock = RoundClock(options)
    for number in range(options.total_rounds):
        stamps = [time.perf_counter()]
        plan = parts.planner.plan(number)
        stamps.append(time.perf_counter())
        for _ in engine.train(plan):
            pass
        stamps.append(time.perf_counter())
        engine.exchange(plan)
        stamps.append(time.perf_counter())
        clock.tick()
        for name, began, ended in zip(phases, stamps, stamps[1:], strict=False):
            phases[name].append(ended - began)
    after = flatten(layout.views(engine.model()).values())
    engine.close()
    report(
        "gossamer",
        options,
        clock,
        flatten(model.parameters()),
        after,
        ("torch", "numpy"),
        processes=own.workers,
        topology=own.topology,
        modes=[variant.mode.model_dump() for variant in parts.task.variants],
        phase_seconds={name: seconds[options.warmup :] for name, seconds in phases.items()},
    )


# ---- all contenders


def arguments_of(model: str, num_peers: int, rounds: int, warmup: int) -> list[str]:
    """Return the options of all runners, with the shifts that gossamer's one-peer topology draws."""
    one_peer = topology.build(n=num_peers, seed=0, **graph("od-equidyn", num_peers))
    shifts = [str(one_peer.mixing(number).send_ranks(0)[0]) for number in range(warmup + rounds)]
    return ["--model", model, "--peers", str(num_peers), "--warmup", str(warmup), "--shifts", *shifts]


def contenders(options: list[str]) -> dict[str, list[str]]:
    """Return the command of every contender with few peers."""
    commands = {"gossamer": [sys.executable, str(HERE / "peers.py"), "gossamer", *options]}
    for rival in ("loop", "gossipy"):
        for threads in ("1", "2"):
            runner = str(RIVALS / f"peers_{rival}.py")
            commands[f"{rival}, threads {threads}"] = [rivals_python(), runner, *options, "--threads", threads]
    return commands | {"bound": bound(options)}


def graphs(options: list[str]) -> dict[str, list[str]]:
    """Return the command of gossamer on each graph, and of the bound, with many peers."""
    ours = [sys.executable, str(HERE / "peers.py"), "gossamer", *options, "--topology"]
    others = {f"gossamer, {name}": [*ours, name] for name in ("d-equistatic", "random-match")}
    return {"gossamer": [*ours, "od-equidyn"], **others, "bound": bound(options)}


def bound(options: list[str]) -> list[str]:
    """Return the command of the bound."""
    return [sys.executable, str(RIVALS / "peers_bound.py"), *options, "--threads", "2"]


def measured(commands: Mapping[str, list[str]], repeats: int, num_peers: int, gate: Gate) -> dict[str, Report]:
    """Run all contenders in turn and sum up."""
    trials = interleave(commands, repeats, gate)
    found = summary(trials)
    for name, of_one in trials.items():
        runs = of_one.results
        found[name]["microseconds_per_peer"] = found[name]["seconds_per_round"] / num_peers * 1e6
        for detail in ("parameter_change", "flops", "copied_bytes"):
            if detail in runs[0]:
                found[name][detail] = runs[0][detail]
        if "phase_seconds" in runs[0]:
            found[name]["phase_seconds"] = {
                phase: statistics.median(statistics.median(run["phase_seconds"][phase]) for run in runs)
                for phase in runs[0]["phase_seconds"]
            }
    return found


def check_same(found: Mapping[str, Report]) -> None:
    """Check that all contenders trained the same model.

    Raises:
        SystemExit: one did not.
    """
    changes = {name: one["parameter_change"] for name, one in found.items() if "parameter_change" in one}
    if max(changes.values()) > min(changes.values()) * (1 + 1e-4):
        raise SystemExit(f"the contenders' merged models differ: {changes}")


def ratio(found: Mapping[str, Report], rival: str) -> float:
    """Return gossamer's seconds a round divided by those of the quicker runs of a rival."""
    theirs: float = min(one["seconds_per_round"] for name, one in found.items() if name.split(",")[0] == rival)
    return float(found["gossamer"]["seconds_per_round"]) / theirs


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each contender")
    parser.add_argument("--rounds", type=int, default=8, help="timed rounds a process")
    parser.add_argument("--many", type=int, default=MANY, help="peers of the largest case")
    parser.add_argument("--few", type=int, default=FEW, help="peers of the comparisons")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, repeats, gate = machine(), arguments.repeats, Gate.of(arguments)
    many = measured(graphs(arguments_of("softmax", arguments.many, arguments.rounds, 2)), repeats, arguments.many, gate)
    cases = {f"softmax, {arguments.many:,} peers": many}
    for model in MODELS:
        options = arguments_of(model, arguments.few, arguments.rounds, 2)
        found = cases[f"{model}, {arguments.few:,} peers"] = measured(contenders(options), repeats, arguments.few, gate)
        check_same(found)  # in the end, those of the MLP
    ratios = {
        f"{case}: gossamer / {rival}": ratio(found, rival)
        for case, found in cases.items()
        for rival in dict.fromkeys(name.split(",")[0] for name in found if not name.startswith("gossamer"))
    }
    goals = {
        f"softmax, {arguments.many:,} peers, seconds a round": gate.goal(many["gossamer"]["seconds_per_round"], 0.8),
        f"mlp, {arguments.few:,} peers, gossamer / loop": gate.goal(ratio(found, "loop"), 1 / 3),
    }
    result = {"benchmark": "peers", "machine": before, **gate.report(), "cases": cases, "ratios": ratios}
    print(json.dumps(result | {"goals": goals}, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["gossamer"]:
        del sys.argv[1]
        run_gossamer()
    else:
        main()
