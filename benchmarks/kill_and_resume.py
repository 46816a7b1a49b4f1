"""Kill a run again and again, resume it each time, and compare what comes out with a run that nobody touched.

Two federations on scikit-learn's digits, two workers each, a commit after every round: FedRolex with mixed capacities,
and SCAFFOLD, whose clients keep private state. A child process reports the start and end of every span, and
every step of a commit, through a pipe. The parent sends it SIGKILL after a random delay that begins with the first
report, or a random moment after a commit began. A kill counts as inside a commit only if the last thing that the dead
child had reported was within one. The next child resumes the directory; when a run ends, its final model's hash and its
metrics (all but the fields that a clock fills) must equal those of the undisturbed run, and the next run starts.

Prints one JSON object; exits with 1 if anything differs or too few kills hit a commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gossamer
from gossamer.experiment import Hooks
from gossamer.profiling.spans import Spans
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_config, read_metrics

CLOCKS = ("wall_seconds", "round_seconds", "phase_seconds")
AFTERWARDS = "after the last phase"
PATIENCE = 120.0  # seconds without a report after which something is badly wrong
FEDERATIONS: dict[str, dict[str, Any]] = {
    "fedrolex": {"algorithm": "fedrolex", "submodel": {"capacities": [0.25, 0.5, 1.0]}},
    "scaffold": {"algorithm": "scaffold"},
}


def configuration(name: str, rounds: int, seed: int) -> dict[str, Any]:
    """Return one of the two experiments."""
    return {
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "workload": {"dataset": "digits", "model": {"name": "mlp", "hidden": [32]}},
        "clients": {"num": 40, "per_round": 10},
        "train": {"lr": 0.1},
        "checkpoint": {"every_seconds": 0},
        "engine": {"workers": 2},
        **FEDERATIONS[name],
    }


# ---- the child: runs or resumes, and reports


def child(directory: Path, config: Path, reports: int) -> None:
    """Run, or resume what is there; report ``+span``, ``-span``, ``.step of a commit`` and ``=hash`` as lines."""

    def report(line: str) -> None:
        """Write a line."""
        os.write(reports, f"{line}\n".encode())

    def spans() -> Spans:
        """Return spans that are reported."""
        made = Spans()
        made.listeners.append(lambda name, starts: report(("+" if starts else "-") + name))
        return made

    Checkpoints.commit = partialmethod(Checkpoints.commit, on_step=lambda step: report(f".{step}"))  # type: ignore
    hooks = Hooks(spans=spans)
    begun = (directory / "config.yaml").exists()
    run = gossamer.resume(directory, hooks) if begun else gossamer.run(config, out=directory, hooks=hooks)
    digest = hashlib.sha256()
    for tensor in run.params.values():
        digest.update(tensor.numpy().tobytes())
    report(f"={digest.hexdigest()}")


class Child:
    """A child process and what it has reported so far."""

    def __init__(self, directory: Path, config: Path) -> None:
        self._reports, theirs = os.pipe()
        command = [sys.executable, __file__, "--child", str(directory), str(config), str(theirs)]
        self.process = subprocess.Popen(command, pass_fds=[theirs])
        os.close(theirs)
        self.lines: list[str] = []
        self._rest = b""

    def read(self) -> bool:
        """Wait for reports; returns False when child and workers are all gone.

        Raises:
            TimeoutError: nothing comes, as when workers outlive their killed parent.
        """
        if not select.select([self._reports], [], [], PATIENCE)[0]:
            raise TimeoutError(f"no report and no end within {PATIENCE} s; the last ones were {self.lines[-5:]}")
        content = os.read(self._reports, 1 << 16)
        *lines, self._rest = (self._rest + content).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return bool(content)

    def read_until(self, condition: Callable[[], bool]) -> bool:
        """Read until `condition` holds; returns False if the child ends first."""
        while not condition():
            if not self.read():
                return False
        return True

    def finish(self) -> None:
        """Read all that is left, until no process holds the pipe any more."""
        while self.read():
            pass
        os.close(self._reports)
        self.process.wait()

    def phase(self) -> str:
        """Name what the child was in at its last report; inside a commit also the last step that was done."""
        last = self.lines[-1] if self.lines else ""
        names = {"": "before the first phase", "-": "between phases", "=": AFTERWARDS}
        if last[:1] in names:
            return names[last[:1]]
        if last[0] == ".":
            return f"commit, after {last[1:]}"
        return "commit, just begun" if last == "+commit" else last[1:]


# ---- the parent: kills and compares


class Trial:
    """One federation, killed many times."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        """Run the federation undisturbed; what follows takes its resolved configuration."""
        self.name, self.folder, self.random = name, folder, random.Random(f"{options.seed} {name}")
        config = folder / f"{name}.json"  # JSON is YAML
        config.write_text(json.dumps(configuration(name, options.rounds, options.seed)))
        self.expected = self._outcome(folder / f"{name}-undisturbed", config)
        metrics = read_metrics(folder / f"{name}-undisturbed")
        self.commit_seconds = statistics.median(record["phase_seconds"]["commit"] for record in metrics[1:])
        self.round_seconds = statistics.median(record["round_seconds"] for record in metrics) + self.commit_seconds
        self.config = folder / f"{name}-resolved.json"
        self.config.write_text(json.dumps(read_config(folder / f"{name}-undisturbed")))
        self.rounds = options.rounds
        self.phases: Counter[str] = Counter()
        self.num_runs, self.all_equal = 0, True

    @property
    def inside_commit(self) -> int:
        """Kills so far that hit a commit."""
        return sum(count for phase, count in self.phases.items() if phase.startswith("commit"))

    def kill(self, kills: int, inside_commit: int) -> None:
        """Kill until there are `kills`, `inside_commit` of them within commits; give up after three times as many."""
        directory = self._next_directory()
        while self.phases.total() < kills or self.inside_commit < inside_commit:
            if self.phases.total() >= 3 * kills:
                break
            process = Child(directory, self.config)
            killed = self._strike(process, in_commit=self.phases.total() % 2 == 0)
            if killed and process.phase() != AFTERWARDS:
                self.phases[process.phase()] += 1
            else:  # it was done before the blow fell
                self._compare(directory)
                directory = self._next_directory()
        self._compare(directory)

    def _strike(self, process: Child, in_commit: bool) -> bool:
        """Kill a child at a random instant; returns False if it came to its end before."""
        commits = 1 + self.random.randrange(self.rounds // 3) if in_commit else 0
        if process.read_until(lambda: len(process.lines) > 0 and process.lines.count("+commit") >= commits):
            longest = 1.2 * self.commit_seconds if in_commit else self.round_seconds * self.rounds / 3
            time.sleep(self.random.uniform(0, longest))
            process.process.kill()
        process.finish()
        if process.process.returncode not in (0, -9):
            raise RuntimeError(f"a child ended with exit code {process.process.returncode}: see its message above")
        return process.process.returncode == -9

    def _compare(self, directory: Path) -> None:
        """Let a run come to its end and compare it with the undisturbed one."""
        outcome = self._outcome(directory, self.config)
        if outcome != self.expected:
            self.all_equal = False
            what = "parameters" if outcome[0] != self.expected[0] else "metrics"
            print(f"{directory.name}: the {what} differ from those of the undisturbed run", file=sys.stderr)

    def _outcome(self, directory: Path, config: Path) -> tuple[str, list[dict[str, Any]]]:
        process = Child(directory, config)
        process.finish()
        if process.process.returncode != 0:
            raise RuntimeError(f"{directory} failed with exit code {process.process.returncode}")
        metrics = [{k: v for k, v in record.items() if k not in CLOCKS} for record in read_metrics(directory)]
        return process.lines[-1].removeprefix("="), metrics

    def _next_directory(self) -> Path:
        self.num_runs += 1
        return self.folder / f"{self.name}-{self.num_runs}"

    def report(self) -> dict[str, Any]:
        """Return what this federation adds to the JSON."""
        return {
            "rounds": self.rounds,
            "runs": self.num_runs,
            "kills": self.phases.total(),
            "inside_commit": self.inside_commit,
            "kills_by_phase": dict(sorted(self.phases.items())),
            "commit_seconds": round(self.commit_seconds, 5),
            "model_sha256": self.expected[0],
            "final_accuracy": self.expected[1][-1]["accuracy"],
            "all_equal": self.all_equal,
        }


def versions() -> Mapping[str, str]:
    """Return the versions that matter."""
    return {
        "gossamer": gossamer.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
    }


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each federation")
    parser.add_argument("--inside-commit", type=int, default=5, help="how many of them must hit a commit")
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0, help="of federations and delays; when a blow falls is chance")
    parser.add_argument("--child", nargs=3, metavar=("DIR", "CONFIG", "DESCRIPTOR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), Path(options.child[1]), int(options.child[2]))
        return
    began, reports, good = time.monotonic(), {}, True
    with tempfile.TemporaryDirectory() as folder:
        for name in FEDERATIONS:
            trial = Trial(name, options, Path(folder))
            trial.kill(options.kills, options.inside_commit)
            reports[name] = trial.report()
            good &= trial.all_equal and trial.inside_commit >= options.inside_commit
    print(
        json.dumps(
            {
                "benchmark": "kill_and_resume",
                "federations": reports,
                "all_equal": all(report["all_equal"] for report in reports.values()),
                "enough_inside_commits": all(r["inside_commit"] >= options.inside_commit for r in reports.values()),
                "versions": versions(),
                "num_cpus": os.cpu_count(),
                "seconds": round(time.monotonic() - began, 1),
            },
            indent=2,
        )
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
