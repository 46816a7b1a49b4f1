"""Running contenders in turn, throwing away the trials that others disturbed, and summing up what is left.

Every trial of ours and of the rivals goes through a `Gate`: one in which others used more than a small share of a core
(see quiet.py) is discarded and measured again, a few times at most. Figures are medians of the trials that count, with
their range. If a trial was disturbed every time, the JSON says ``"quiet": false``, and whether goals are met is null.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from quiet import MAX_SHARE, ROOT, Reading, Usage, descendants, is_quiet, read, usage, wait_until_quiet

HERE = Path(__file__).parent
RIVALS = HERE / "rivals"
SHORTEST_SECONDS = 0.5  # of timed rounds that are judged by themselves, without the start
LEFTOVER_SECONDS = 15.0  # in which whatever a trial started must have ended
_PR_SET_CHILD_SUBREAPER = 36
Report = dict[str, Any]
Result = TypeVar("Result")


# ---- the gate


@dataclass
class Trials(Generic[Result]):
    """The trials of one contender.

    Attributes:
        asked: how many should count.
        max_share: of a core that others may use in one that counts.
        accepted: what was measured while others were quiet, or while nothing was known about them.
        discarded: what was measured while they were not.
        shares: of a core that others used during the accepted trials; None: nothing is known.
        discarded_shares: during the discarded ones.
    """

    asked: int
    max_share: float = MAX_SHARE
    accepted: list[Result] = field(default_factory=list)
    discarded: list[Result] = field(default_factory=list)
    shares: list[float | None] = field(default_factory=list)
    discarded_shares: list[float | None] = field(default_factory=list)

    def add(self, result: Result, used: Usage) -> bool:
        """Take a trial; returns False if it is discarded."""
        counts = is_quiet(used, self.max_share) is not False
        (self.accepted if counts else self.discarded).append(result)
        (self.shares if counts else self.discarded_shares).append(used.share)
        return counts

    @property
    def quiet(self) -> bool | None:
        """Whether as many trials count as were asked for; None: nothing is known of some of them."""
        if len(self.accepted) < self.asked:
            return False
        return None if None in self.shares else True

    @property
    def results(self) -> list[Result]:
        """The accepted trials; where there is none, the discarded ones."""
        return self.accepted or self.discarded

    def report(self) -> Report:
        """Return how many trials count and how many do not."""
        return {"accepted": len(self.accepted), "discarded": len(self.discarded), "quiet": self.quiet}


class Gate:
    """Measures trials until they count, and keeps account of those that do not."""

    def __init__(
        self,
        attempts: int = 3,
        patience: float = 20.0,
        max_share: float = MAX_SHARE,
        *,
        reader: Callable[[], Reading | None] = read,
        wait: Callable[[float, float], object] = wait_until_quiet,
    ) -> None:
        """Set the bounds.

        Args:
            attempts: how often a trial is measured at most.
            patience: seconds to wait at most, after a discarded trial, until others are quiet.
            max_share: of one core that others may use on average.
            reader, wait: for tests.
        """
        self.attempts, self.patience, self.max_share = attempts, patience, max_share
        self._read, self._wait = reader, wait
        self._trials: list[Trials[Any]] = []

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the options that set the bounds."""
        parser.add_argument("--attempts", type=int, default=3, help="times that a disturbed trial is measured at most")
        parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for quiet before it is again")
        parser.add_argument("--max-share", type=float, default=MAX_SHARE, help="of a core that others may use")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Gate:
        """Return the gate that the options describe."""
        return cls(max(1, arguments.attempts), arguments.patience, arguments.max_share)

    def gated(
        self,
        measure: Callable[[], Result],
        repeats: int = 1,
        used: Callable[[Result], Usage] | None = None,
        name: str = "trial",
    ) -> Trials[Result]:
        """Measure until `repeats` trials count, each at most `attempts` times.

        Args:
            measure: one trial; what it times should take half a second at least.
            repeats: trials that should count.
            used: what a trial says of the processors while it was timed; None: it is read before and after.
            name: for messages.
        """
        return self.interleave({name: measure}, repeats, used)[name]

    def interleave(
        self,
        measures: Mapping[str, Callable[[], Result]],
        repeats: int,
        used: Callable[[Result], Usage] | None = None,
        describe: Callable[[Result], str] | None = None,
    ) -> dict[str, Trials[Result]]:
        """Measure several contenders in turn, until each has `repeats` trials that count, or had its attempts.

        A discarded trial is repeated before the next contender's, so that they stay interleaved.
        """
        found = {name: Trials[Result](repeats, self.max_share) for name in measures}
        self._trials += found.values()
        for repeat in range(repeats):
            for name, measure in measures.items():
                for attempt in range(self.attempts):
                    before = self._read() if used is None else None
                    result = measure()
                    what = usage(before, self._read()) if used is None else used(result)
                    counts = found[name].add(result, what)
                    if describe is not None:
                        label = f"[{repeat + 1}/{repeats}] {name}: {describe(result)}"
                        log(label if counts else f"{label}, discarded: others used {what.share:.2f} cores")
                    if counts:
                        break
                    if attempt + 1 < self.attempts:
                        self._wait(self.patience, self.max_share)
        return found

    @property
    def quiet(self) -> bool | None:
        """Whether all trials so far could be made to count; None: nothing is known of some of them."""
        return all_quiet(one.quiet for one in self._trials)

    def goal(self, value: float, most: float, quiet: bool | None = True) -> Report:
        """Say whether `value` is at most `most`, unless trials so far, or it itself, were not quiet."""
        return {"value": value, "at_most": most, "met": None if False in (self.quiet, quiet) else value <= most}

    def report(self) -> Report:
        """Return what belongs into every benchmark's JSON."""
        shares = [share for one in self._trials for share in one.shares if share is not None]
        discarded = [share for one in self._trials for share in one.discarded_shares if share is not None]
        return {
            "quiet": self.quiet,
            "gate": {
                "most_share_of_a_core_by_others": self.max_share,
                "attempts_at_most": self.attempts,
                "asked": sum(one.asked for one in self._trials),
                "accepted": sum(len(one.accepted) for one in self._trials),
                "discarded": sum(len(one.discarded) for one in self._trials),
                "shares_accepted": spread(shares),
                "shares_discarded": spread(discarded),
            },
        }


def all_quiet(judged: Iterable[bool | None]) -> bool | None:
    """Return False if any is False, else None if any is None, else True."""
    found = list(judged)
    return False if False in found else None if None in found else True


def spread(values: Sequence[float]) -> list[float] | None:
    """Return least, median and largest, or None."""
    return [min(values), statistics.median(values), max(values)] if values else None


# ---- contenders in processes of their own


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
    """Run one contender and return the JSON of its last line, with what the processors did meanwhile.

    Adds ``usage``: "timed", of the timed rounds, and of those before if they are too short to be judged; "first", from
    the start of the framework to the end of the warm-up; "command", from the start of the process to there. A contender
    that reports no readings has only "timed", from the start of the process to its end.

    Raises:
        SystemExit: it failed, or printed no JSON.
    """
    adopt_orphans()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", ROOT: str(os.getpid())}
    known, before = set(descendants(os.getpid())), read()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
        after = read()
    finally:
        end_leftovers(known)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-4000:]}")
    report: Report = json.loads(lines[-1])
    readings = [Reading(*one) if one else None for one in report.pop("readings", ())]
    if len(readings) == 3:
        began, warm, end = readings
        rounds = usage(warm, end)
        rounds = rounds if rounds.seconds >= SHORTEST_SECONDS else usage(began, end)
        report["usage"] = {"timed": rounds, "first": usage(began, warm), "command": usage(before, warm)}
    else:
        report["usage"] = {"timed": usage(before, after)}
    return report


def adopt_orphans() -> None:
    """Become the parent of what outlives its own, so that all of a trial stays below this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_leftovers(known: set[int], seconds: float = LEFTOVER_SECONDS) -> None:
    """Wait for the descendants of this process, but for the `known` ones, and kill those that stay.

    A trial's daemons would otherwise disturb the next one.
    """
    if sys.platform != "linux":
        return
    deadline = time.monotonic() + seconds
    while left := set(descendants(os.getpid())) - known:
        for process in left:
            with suppress(OSError):  # a grandchild's parent waits for it, not we
                os.waitpid(process, os.WNOHANG)
            if time.monotonic() > deadline:
                with suppress(OSError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def timed(report: Report) -> Usage:
    """Return what the processors did during a contender's timed part."""
    found: Usage = report["usage"]["timed"]
    return found


def interleave(commands: Mapping[str, Sequence[str]], repeats: int, gate: Gate) -> dict[str, Trials[Report]]:
    """Run all contenders in turn, until each has `repeats` trials that count, or had its attempts."""
    measures = {name: lambda command=command: measure(command) for name, command in commands.items()}
    return gate.interleave(measures, repeats, timed, lambda one: f"{median_round(one):.4f} s a round")


def median_round(report: Report) -> float:
    """Return the median seconds of the timed rounds of one process."""
    return float(statistics.median(report["round_seconds"]))


def summary(trials: Mapping[str, Trials[Report]]) -> dict[str, Report]:
    """Return for each contender the median over processes of its median round, their range, and its versions."""
    found = {}
    for name, of_one in trials.items():
        runs = of_one.results
        medians = [median_round(run) for run in runs]
        found[name] = {
            "seconds_per_round": statistics.median(medians),
            "range": [min(medians), max(medians)],
            "process_medians": medians,
            **start(of_one),
            "rounds_timed": sum(len(run["round_seconds"]) for run in runs),
            **of_one.report(),
            "versions": runs[0]["versions"],
        }
        if "modes" in runs[0]:
            found[name]["modes"] = [run["modes"] for run in runs]
    return found


def start(trials: Trials[Report], figure: str = "first_round_seconds", window: str = "first") -> Report:
    """Return the median of a figure of the start, over the runs whose start was quiet, or over all where none was."""
    runs = trials.results
    quiet = [run for run in runs if is_quiet(run["usage"].get(window, timed(run)), trials.max_share) is not False]
    values = [run[figure] for run in quiet or runs]
    return {
        figure: statistics.median(values),
        f"{figure}_range": [min(values), max(values)],
        "quiet_starts": len(quiet),
    }


def ratio(found: Mapping[str, Report], rival: str) -> float:
    """Return gossamer's seconds a round divided by the rival's."""
    ours: float = found["gossamer"]["seconds_per_round"]
    return ours / float(found[rival]["seconds_per_round"])


def log(line: str) -> None:
    """Say how far it is."""
    print(line, file=sys.stderr, flush=True)


def machine() -> Report:
    """Describe the machine: processors, and the load before the measurement."""
    return {"processors": os.cpu_count(), "load_average": os.getloadavg(), "system": platform.platform()}
