"""Whether the code became slower or larger: gossamer's side of README's numbers, at several revisions, interleaved.

Each revision is checked out into a folder of its own (or is such a folder), and its own scripts run on its own sources
by this interpreter. Contenders take turns, trial by trial, through the gate of harness.py. Ratios are those of the
first revision to each of the others: above 1 is worse.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import Gate, Report, log, machine, measure, median_round, spread, timed
from quiet import Usage, read, usage

ROOT = Path(__file__).parent.parent


class Trial(NamedTuple):
    """What one process of one revision measured."""

    values: dict[str, float]
    used: Usage


def rounds(*arguments: str) -> Callable[[Path], Trial]:
    """Return the trial of a script that times rounds and prints one line."""

    def trial(tree: Path) -> Trial:
        found = measure([*of_tree(tree), *arguments])
        return Trial({"seconds a round": median_round(found)}, timed(found))

    return trial


def peers(model: str, num_peers: int, num_rounds: int) -> Callable[[Path], Trial]:
    """Return the trial of rounds of peers; the shifts are for rivals."""
    options = ["--model", model, "--peers", str(num_peers), "--warmup", "2", "--rounds", str(num_rounds)]
    return rounds("peers.py", "gossamer", *options, "--shifts", *["1"] * (num_rounds + 2))


def figures(paths: Mapping[str, Sequence[str]], *arguments: str) -> Callable[[Path], Trial]:
    """Return the trial of a script that prints one JSON object: some of its numbers, by the keys that lead there."""

    def trial(tree: Path) -> Trial:
        before = read()
        script = [*of_tree(tree), *arguments]
        done = subprocess.run(script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=1800)
        found, after = json.loads(done.stdout), read()
        values = {}
        for name, path in paths.items():
            value = found
            for key in path:
                value = value[int(key) if isinstance(value, list) else key]
            values[name] = float(value)
        return Trial(values, usage(before, after))

    return trial


def of_tree(tree: Path) -> list[str]:
    """Return the start of a command that runs the script named next, from that tree."""
    return ["env", f"--chdir={tree / 'benchmarks'}", f"PYTHONPATH={tree / 'src'}", sys.executable]


MANY = ["--clients", "1000", "--per-round", "100"]
CASES: dict[str, Callable[[Path], Trial]] = {
    "cnn": rounds("gossamer_round.py", "--model", "cnn", "--rounds", "10"),
    "softmax": rounds("gossamer_round.py", "--model", "softmax", *MANY, "--rounds", "300"),
    "mlp": rounds("gossamer_round.py", "--model", "mlp", *MANY, "--rounds", "25"),
    "cnn on ray": rounds("ray_overhead.py", "--engine", "ray", "--model", "cnn", "--rounds", "10"),
    "softmax on ray": rounds("ray_overhead.py", "--engine", "ray", "--model", "softmax", *MANY, "--rounds", "200"),
    "10,000 clients on ray": rounds(
        "ray_overhead.py", "--engine", "ray", "--model", "softmax", "--clients", "10000", "--per-round", "500",
        "--rounds", "60",
    ),
    "10,000 peers": peers("softmax", 10_000, 8),
    "1,000 peers, mlp": peers("mlp", 1_000, 20),
    "mixed capacities": figures(
        {
            "stacked": ["models", "cnn", "seconds_per_round", "stacked"],
            "one by one": ["models", "cnn", "seconds_per_round", "one by one"],
        },
        "mixed_capacities.py", "--models", "cnn", "--rounds", "6",
    ),
    "sub-models": figures({"slices": ["seconds", "slices"]}, "submodel.py", "--repeats", "9"),
    "mixing": figures(
        {kind: ["states", "0", "multiples of the copy", kind] for kind in ("shift", "matching", "ten neighbours")},
        "mixing.py", "--repeats", "3",
    ),
    "60,000 registered clients": figures(
        {"peak bytes": ["peak_bytes"]}, "registered_clients.py", "--child", "fedavg", "60000"
    ),
    "60,000 registered clients, scaffold": figures(
        {"peak bytes": ["peak_bytes"]}, "registered_clients.py", "--child", "scaffold", "60000"
    ),
}  # fmt: skip


def compare(case: str, trees: Mapping[str, Path], repeats: int, gate: Gate) -> Report:
    """Measure one case at all revisions in turn."""
    measures = {name: lambda tree=tree: CASES[case](tree) for name, tree in trees.items()}
    trials = gate.interleave(measures, repeats, lambda one: one.used, lambda one: f"{case}: {one.values}")
    found: Report = {}
    head, *others = trees
    for figure in trials[head].results[0].values:
        values = {name: [one.values[figure] for one in of_one.results] for name, of_one in trials.items()}
        medians = {name: statistics.median(of_one) for name, of_one in values.items()}
        found[figure] = {
            "medians": medians,
            "ranges": {name: spread(of_one) for name, of_one in values.items()},
            "ratios": {name: medians[head] / medians[name] for name in others},
            "ratios of pairs": {
                name: [a / b for a, b in zip(values[head], values[name], strict=False)] for name in others
            },
        }
    return found | {"trials": {name: of_one.report() for name, of_one in trials.items()}}


def checked_out(revision: str, folder: Path) -> Path:
    """Return the tree of a revision: the folder that it names, or a new one below `folder`."""
    if Path(revision).is_dir():
        return Path(revision).resolve()
    tree = folder / revision.replace("/", "-")
    tree.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="+", help="commits or folders: the one to judge, then others")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="processes of each revision")
    Gate.add_options(parser)
    arguments = parser.parse_args()
    if len(arguments.revisions) < 2:
        parser.error(f"revisions {arguments.revisions}: give at least two, the one to judge first")
    before, gate, found = machine(), Gate.of(arguments), {}
    with tempfile.TemporaryDirectory() as folder:
        trees = {one: checked_out(one, Path(folder)) for one in arguments.revisions}
        for case in arguments.cases:
            found[case] = compare(case, trees, arguments.repeats, gate)
            log(json.dumps({case: {figure: one["ratios"] for figure, one in found[case].items() if "ratios" in one}}))
    result = {"benchmark": "revisions", "machine": before, **gate.report(), "cases": found}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
