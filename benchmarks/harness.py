"""Running contenders in turn, each in a process of its own, and summing up what they report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RIVALS = HERE / "rivals"
Report = dict[str, Any]


def rivals_python() -> str:
    """Return the interpreter of the rivals' environment (`make rivals`); GOSSAMER_RIVALS_PYTHON names another one.

    Raises:
        SystemExit: there is none.
    """
    path = Path(os.environ.get("GOSSAMER_RIVALS_PYTHON", HERE.parent / ".venv-rivals" / "bin" / "python"))
    if not path.exists():
        raise SystemExit(
            f"no interpreter {str(path)!r} for the rivals: run `make rivals`, or set GOSSAMER_RIVALS_PYTHON"
        )
    return str(path)


def contenders(options: Sequence[str]) -> dict[str, list[str]]:
    """Return the command of every contender in the federation that `options` describe."""
    ours, theirs = sys.executable, rivals_python()
    torchrun = [theirs, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return {
        "gossamer": [ours, str(HERE / "gossamer_round.py"), *options],
        "bare-loop": [theirs, str(RIVALS / "bare_loop.py"), *options],
        "hand-loop": [theirs, str(RIVALS / "bare_loop.py"), "--processes", "1", *options],
        "pfl": [*torchrun, str(RIVALS / "pfl_round.py"), *options],
        "flower": [theirs, str(RIVALS / "flower_round.py"), *options],
    }


def measure(command: Sequence[str]) -> Report:
    """Run one contender and return the JSON of its last line.

    Raises:
        SystemExit: it failed, or printed no JSON.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    report: Report = json.loads(lines[-1])
    return report


def interleave(commands: Mapping[str, Sequence[str]], repeats: int) -> dict[str, list[Report]]:
    """Run all contenders in turn, `repeats` times."""
    reports: dict[str, list[Report]] = {name: [] for name in commands}
    for repeat in range(repeats):
        for name, command in commands.items():
            reports[name].append(measure(command))
            seconds = statistics.median(reports[name][-1]["round_seconds"])
            print(f"[{repeat + 1}/{repeats}] {name}: {seconds:.4f} s a round", file=sys.stderr, flush=True)
    return reports


def summary(reports: Mapping[str, list[Report]]) -> dict[str, Report]:
    """Return for each contender the median over processes of its median round, their range, and its versions."""
    found = {}
    for name, runs in reports.items():
        medians = [statistics.median(run["round_seconds"]) for run in runs]
        found[name] = {
            "seconds_per_round": statistics.median(medians),
            "process_medians": medians,
            "first_round_seconds": statistics.median(run["first_round_seconds"] for run in runs),
            "rounds_timed": sum(len(run["round_seconds"]) for run in runs),
            "versions": runs[0]["versions"],
        }
        if "modes" in runs[0]:
            found[name]["modes"] = [run["modes"] for run in runs]
    return found


def ratio(found: Mapping[str, Report], rival: str) -> float:
    """Return gossamer's seconds a round divided by the rival's."""
    ours: float = found["gossamer"]["seconds_per_round"]
    return ours / float(found[rival]["seconds_per_round"])


def goal(value: float, most: float) -> Report:
    """Say whether `value` is at most `most`."""
    return {"value": value, "at_most": most, "met": value <= most}


def machine() -> Report:
    """Describe the machine: processors, and the load before the measurement."""
    return {"processors": os.cpu_count(), "load_average": os.getloadavg(), "system": platform.platform()}
