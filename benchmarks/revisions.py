"""Whether the code became slower or larger: gossamer's side of README's numbers, at several revisions, interleaved.

Each revision is checked out into a folder of its own (or is such a folder), and its own scripts run on its own sources
by this interpreter. Where rounds are timed, one process of each revision lives, and they take turns round by round, so
that a machine whose speed drifts slows all alike. Other scripts run as a whole, in turn. What others disturb is
measured again, see harness.py. Ratios are those of the first revision to each of the others: above 1 is worse.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from harness import HERE, Gate, Report, end_leftovers, log, machine, spread
from quiet import Usage, descendants, read, usage

ROOT = HERE.parent


class Turns:
    """A process that runs a script and waits before each round, see turns.py."""

    def __init__(self, tree: Path, arguments: Sequence[str]) -> None:
        """Start it, and wait for the end of its first round."""
        go, self._go = os.pipe()
        self._done, done = os.pipe()
        command = [*of_tree(tree), str(HERE / "turns.py"), str(go), str(done), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(
            command, pass_fds=(go, done), env=environment, start_new_session=True, **silent
        )
        os.close(go)
        os.close(done)
        self._seconds = os.fdopen(self._done)
        self.round(first=True)

    def round(self, *, first: bool = False) -> float:
        """Let it do its next round, and return the seconds.

        Raises:
            SystemExit: it failed.
        """
        if not first:
            os.write(self._go, b".")
        line = self._seconds.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} failed with {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        """End it with all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._seconds.close()
        os.close(self._go)


class Rounds(NamedTuple):
    """A script that times rounds, and how many are compared."""

    arguments: Sequence[str]
    number: int

    def compare(self, name: str, trees: Mapping[str, Path], repeats: int, gate: Gate) -> dict[str, Any]:
        """Measure, in `repeats` sets of processes; returns values by figure, revision and round, and the trials."""
        known, starts = set(descendants(os.getpid())), itertools.count()

        def measure() -> tuple[dict[str, list[float]], Usage]:
            """Return the seconds of every round, and what was used."""
            processes: dict[str, Turns] = {}
            names, first = list(trees), next(starts) % len(trees)  # whose memory lies better, it seems
            try:
                for one in names[first:] + names[:first]:
                    processes[one] = Turns(trees[one], self.arguments)
                order, found = list(processes), {one: list[float]() for one in processes}
                before = read()
                for turn in range(WARM_UP + self.number):
                    for one in order[turn % len(order) :] + order[: turn % len(order)]:
                        found[one].append(processes[one].round())
                used = usage(before, read())
            finally:
                for process in processes.values():
                    process.close()
                end_leftovers(known)
            return {one: seconds[WARM_UP:] for one, seconds in found.items()}, used

        trials = gate.interleave({name: measure}, repeats, lambda one: one[1], lambda one: str(medians(one[0])))[name]
        joined = {one: [value for found, _ in trials.results for value in found[one]] for one in trees}
        return {"figures": {"seconds a round": joined}, "trials": trials.report()}


def medians(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {name: statistics.median(of_one) for name, of_one in values.items()}


def federation(number: int, *arguments: str, script: Sequence[str] = ("gossamer_round.py",)) -> Rounds:
    """Return rounds of a federation."""
    return Rounds([*script, *arguments, "--rounds", str(2 * number)], number)


def peers(number: int, model: str, num_peers: int) -> Rounds:
    """Return rounds of peers, of which the script takes as many as it gets shifts of its rivals."""
    options = ["--model", model, "--peers", str(num_peers), "--warmup", "2", "--shifts", *["1"] * (2 * number)]
    return Rounds(["peers.py", "gossamer", *options], number)


class Figures(NamedTuple):
    """A script that prints one JSON object: some of its numbers, by the keys that lead there."""

    paths: Mapping[str, Sequence[str]]
    arguments: Sequence[str]

    def compare(self, name: str, trees: Mapping[str, Path], repeats: int, gate: Gate) -> dict[str, Any]:
        """Run it `repeats` times; returns values by figure, revision and trial, and the trials."""
        measures = {one: lambda tree=tree: self._run(tree) for one, tree in trees.items()}
        trials = gate.interleave(measures, repeats, describe=lambda one: f"{name}: {one}")
        values = {
            figure: {one: [found[figure] for found in of_one.results] for one, of_one in trials.items()}
            for figure in self.paths
        }
        return {"figures": values, "trials": {one: of_one.report() for one, of_one in trials.items()}}

    def _run(self, tree: Path) -> dict[str, float]:
        done = subprocess.run(
            [*of_tree(tree), *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=1800,
        )
        found = {}
        for figure, path in self.paths.items():
            value = json.loads(done.stdout)
            for key in path:
                value = value[int(key) if isinstance(value, list) else key]
            found[figure] = float(value)
        return found


def of_tree(tree: Path) -> list[str]:
    """Return the start of a command that runs the script named next, from that tree."""
    return ["env", f"--chdir={tree / 'benchmarks'}", f"PYTHONPATH={tree / 'src'}", sys.executable]


WARM_UP = 3
MANY = ["--clients", "1000", "--per-round", "100"]
ON_RAY = ["ray_overhead.py", "--engine", "ray"]
CASES: dict[str, Rounds | Figures] = {
    "cnn": federation(40, "--model", "cnn"),
    "softmax": federation(400, "--model", "softmax", *MANY),
    "mlp": federation(80, "--model", "mlp", *MANY),
    "cnn on ray": federation(40, "--model", "cnn", script=ON_RAY),
    "softmax on ray": federation(300, "--model", "softmax", *MANY, script=ON_RAY),
    "10,000 clients on ray": federation(
        100, "--model", "softmax", "--clients", "10000", "--per-round", "500", script=ON_RAY
    ),
    "10,000 peers": peers(40, "softmax", 10_000),
    "1,000 peers, mlp": peers(60, "mlp", 1_000),
    "mixed capacities": Figures(
        {way: ["models", "narrow cnn", "seconds_per_round", way] for way in ("stacked", "one by one")},
        ["mixed_capacities.py", "--models", "narrow cnn", "--rounds", "6"],
    ),
    "sub-models": Figures({"slices": ["seconds", "slices"]}, ["submodel.py", "--repeats", "9"]),
    "mixing": Figures(
        {kind: ["states", "0", "multiples of the copy", kind] for kind in ("shift", "matching", "ten neighbours")},
        ["mixing.py", "--repeats", "3"],
    ),
    "60,000 registered clients": Figures(
        {"peak bytes": ["peak_bytes"]}, ["registered_clients.py", "--child", "fedavg", "60000"]
    ),
    "60,000 registered clients, scaffold": Figures(
        {"peak bytes": ["peak_bytes"]}, ["registered_clients.py", "--child", "scaffold", "60000"]
    ),
}


def compare(case: str, trees: Mapping[str, Path], repeats: int, gate: Gate) -> Report:
    """Measure one case at all revisions, and compare the first with the others."""
    found = CASES[case].compare(case, trees, repeats, gate)
    head, *others = trees
    report: Report = {}
    for figure, values in found["figures"].items():
        middle = medians(values)
        pairs = {one: [a / b for a, b in zip(values[head], values[one], strict=False)] for one in others}
        report[figure] = {
            "medians": middle,
            "ranges": {one: spread(of_one) for one, of_one in values.items()},
            "ratios": {one: middle[head] / middle[one] for one in others},
            "medians of paired ratios": medians(pairs),
            "number": len(values[head]),
        }
    return report | {"trials": found["trials"]}


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
