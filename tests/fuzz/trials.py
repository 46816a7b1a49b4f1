"""Tries bad configurations at the command line: ``python tests/fuzz/trials.py --number 2000 --seed NAME``.

Each ends with a sentence, without a traceback, within `MAX_SECONDS`, and leaves no directory but that of a run that can
be resumed. A run that trains is asked to stop after the first of `PATIENCE_SECONDS`, and interrupted after the second.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from typer.testing import CliRunner

from fuzz.configurations import FILES, GOOD, bad
from gossamer.cli.main import app

MAX_SECONDS = 30.0
PATIENCE_SECONDS = (4.0, 19.0)
CHUNK = 50  # trials of one process


@dataclass(frozen=True)
class Outcome:
    """How one trial ended; `problem` is None where that is as it should be."""

    seed: str
    command: str
    exit_code: int
    seconds: float
    problem: str | None
    output: str


def warm_up(folder: Path) -> None:
    """Run what is good, because a signal that interrupts an import leaves half a module behind."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    before = os.getcwd()
    os.chdir(folder)
    for number, config in enumerate(GOOD):
        (folder / "e.yaml").write_text(yaml.safe_dump(config))
        done = CliRunner().invoke(app, ["run", "e.yaml", "--out", str(number)])
        assert done.exit_code == 0, done.output
    drawn = CliRunner().invoke(app, ["plot", "0", "-o", "a.png"])
    assert drawn.exit_code == 0, drawn.output
    os.chdir(before)


def commands(seed: str) -> list[str]:
    """Return the command of a trial, most often ``run``."""
    chosen = Counter(seed.encode())[ord("7")] + len(seed) + sum(seed.encode())
    if chosen % 8 == 0:
        return ["coverage", "e.yaml", "--rounds", "2"]
    if chosen % 8 == 1:
        return ["topology", "show", ["graph.yaml", "graph.txt"][chosen % 16 // 8]]
    if chosen % 8 == 2:
        return ["plot", ".", "--spec", "e.yaml", "-o", "a.png"]
    return ["run", "e.yaml", "--out", "out"]


def try_one(seed: str, folder: Path) -> Outcome:
    """Try one configuration in an empty folder, which is the working folder meanwhile."""
    for name, text in (files := bad(seed)).items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    before, began, command, is_running = os.getcwd(), time.monotonic(), commands(seed), True

    def interrupt(number: int, frame: Any) -> None:
        """Interrupt the trial, unless it has ended."""
        if is_running:
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGINT, interrupt)
    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)) for after in PATIENCE_SECONDS]
    os.chdir(folder)
    try:
        for timer in timers:
            timer.start()
        done = CliRunner().invoke(app, command)
    finally:
        is_running = False
        for timer in timers:
            timer.cancel()
            timer.join()
        signal.signal(signal.SIGINT, handler)
        os.chdir(before)
    seconds = time.monotonic() - began
    return Outcome(
        seed,
        " ".join(command),
        done.exit_code,
        seconds,
        problem_of(done, seconds, folder, set(files)),
        done.output[-600:],
    )


def problem_of(done: Any, seconds: float, folder: Path, files: set[str]) -> str | None:
    """Say what is wrong with how a command ended."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return "".join(traceback.format_exception(done.exception)[-6:])
    if done.exit_code not in (0, 2, 130):
        return f"exit code {done.exit_code}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.exit_code and (len(errors) != 1 or len(done.stderr.splitlines()[-1]) > 2000):
        return f"no sentence: {done.stderr[-300:]!r}"
    if seconds > MAX_SECONDS:
        return f"{seconds:.0f} s"
    left = {path.name for path in folder.iterdir()} - files
    if done.exit_code == 2 and left and not any(folder.glob("out/**/checkpoints/0*/manifest.json")):
        return f"left {sorted(left)}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Try many, in processes of `CHUNK` trials each; print what is wrong, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--seed", default="by hand")
    parser.add_argument("--only", nargs="*", help="try these seeds in this process, and print JSON")
    given = parser.parse_args(arguments)
    if given.only:
        warm_up(Path(tempfile.mkdtemp(prefix="fuzz-")))
        for seed in given.only:
            faulthandler.dump_traceback_later(2 * MAX_SECONDS, exit=True)
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            print(json.dumps(asdict(try_one(seed, folder))), flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        return 0
    waiting, codes, problems = [f"{given.seed}-{number}" for number in range(given.number)], Counter[int](), 0
    slowest = 0.0
    while waiting:
        chunk = waiting[:CHUNK]
        command = [sys.executable, __file__, "--only", *chunk]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        outcomes = [Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"seed"')]
        waiting = waiting[len(outcomes) :]
        if "in warm_up" in done.stderr:
            raise SystemExit(done.stderr)
        if len(outcomes) < len(chunk):  # the next one has killed or blocked its process
            outcomes.append(Outcome(waiting.pop(0), "", -1, 0.0, f"process ended: {done.stderr[-3000:]}", ""))
        for one in outcomes:
            codes[one.exit_code] += 1
            slowest = max(slowest, one.seconds)
            if one.problem is not None:
                problems += 1
                print(f"---- {one.seed}: {one.command}\n{one.problem}\n{one.output[-300:]}", flush=True)
    print(json.dumps({"trials": given.number, "exit_codes": codes, "problems": problems, "slowest_seconds": slowest}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
