"""How long a run takes to end after a signal, and what it leaves, for each engine, number of workers and signal.

A federation and peers on made-up images, on the local engine and on Ray, with 0, 1 and 2 workers (of Ray 1 and 2, and 0
for as many as there are CPUs). The second round has steps, or the first evaluation chunks, that take so long together
that nobody would wait for their end. Half a second after the first of them the signal is sent to the driver, or to all
processes of its group, as a terminal does. Then the run must exit with 130 and one line that tells how to resume it,
and there must be a commit. Commits at intervals are off, so it is the signal that commits.

Prints one JSON object; exits with 1 if a run takes longer than GOAL_SECONDS, or leaves something else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_metrics

GOAL_SECONDS = 10.0
START_SECONDS = 120.0
NUM_STEPS, STEP_SECONDS = 300, 0.2
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT")
PLUGINS = Path(__file__).parents[1] / "tests" / "plugins"
SIDES: dict[str, dict[str, Any]] = {
    "clients": {"clients": {"num": 8, "per_round": 8}},
    "peers": {"peers": {"num": 8, "topology": "ring"}},
}


def configuration(engine: str, side: str, workers: int, amid: str, flag: Path) -> dict[str, Any]:
    """Return an experiment that never ends once the file `flag` is there."""
    workload = {"name": "stalling:Stopping", "flag": str(flag), "amid": amid, "seconds": STEP_SECONDS}
    data = {"name": "synthetic", "num_train": 160, "num_test": 1000}
    return {
        "rounds": 3,
        "workload": {**workload, "dataset": data, "model": "softmax", "evaluation_chunk": 1},
        "train": {"lr": 0.1, "batch_size": 4, "steps": NUM_STEPS if amid == "train" else 1},
        "evaluation": {"every": 1 if amid == "evaluate" else 3},
        "checkpoint": {"every_seconds": 10_000},
        "engine": {"name": engine, "workers": workers, "block_size": 4, "modes": {"stacked": False}},
        **SIDES[side],
    }


def trial(engine: str, side: str, workers: int, amid: str, number: signal.Signals, to_group: bool) -> dict[str, Any]:
    """Run, send the signal, and describe what comes of it."""
    with tempfile.TemporaryDirectory(prefix="gossamer stopping ") as folder:
        flag, out, file = Path(folder, "flag"), Path(folder, "out"), Path(folder, "e.yaml")
        flag.touch()
        file.write_text(yaml.safe_dump(configuration(engine, side, workers, amid, flag)))
        command = [sys.executable, "-m", "gossamer", "run", str(file), "--out", str(out)]
        paths = [str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
        surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        run = subprocess.Popen(command, env=surroundings, start_new_session=True, **pipes)
        wait_for_file(run, Path(folder, "flag.sent"))
        time.sleep(0.5)
        began = time.monotonic()
        (os.killpg if to_group else os.kill)(run.pid, number)
        try:
            _, told = run.communicate(timeout=6 * GOAL_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            _, told = run.communicate()
        told = (told.strip().splitlines() or [""])[-1]  # after what says which code the file names
        seconds = time.monotonic() - began
        latest = Checkpoints(out / "checkpoints").latest()
        found = {
            "seconds": round(seconds, 2),
            "exit": run.returncode,
            "told": told.replace(folder, "DIR"),
            "rounds_logged": len(read_metrics(out)),
            "committed": None if latest is None else [latest.round, latest.phase],
        }
    clean = re.fullmatch(r"error: stopped .*; resume with: gossamer resume 'DIR/out'", str(found["told"])) is not None
    return found | {"ok": clean and run.returncode == 130 and latest is not None and seconds <= GOAL_SECONDS}


def wait_for_file(run: subprocess.Popen[str], path: Path) -> None:
    """Wait until a run has made a file."""
    deadline = time.monotonic() + START_SECONDS
    while not path.exists():
        if run.poll() is not None or time.monotonic() > deadline:
            run.kill()
            raise RuntimeError(f"the run did not get to its long round: {run.communicate()}")
        time.sleep(0.05)


def main() -> None:
    """Try all combinations that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--amid", nargs="+", default=["train", "evaluate"])
    parser.add_argument("--signals", nargs="+", default=list(SIGNALS))
    parser.add_argument("--to-group", action="store_true", help="signal all processes of the group")
    asked = parser.parse_args()
    names = ("engine", "side", "workers", "amid", "signal")
    rows = []
    for chosen in product(asked.engines, asked.sides, asked.workers, asked.amid, asked.signals):
        found = trial(*chosen[:4], signal.Signals[chosen[4]], asked.to_group)
        rows.append(dict(zip(names, chosen, strict=True)) | found)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    slowest = max(row["seconds"] for row in rows)
    print(json.dumps({"all_ok": all(row["ok"] for row in rows), "slowest_seconds": slowest, "trials": rows}, indent=1))
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
