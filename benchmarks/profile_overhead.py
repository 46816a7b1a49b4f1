"""What recording a run costs: nothing measurable while it is off, and below 1 % at 1,000 spans a second.

Two measurements in one process, each of short trials in turn, so that whatever else the machine does falls on all:

- ``loop``: 200 ms of additions, with a span around each millisecond that is recorded, with the same spans while nothing
  is recorded, and without any;
- ``run``: the rounds of a federation in one process, every other of which is recorded.

A trial is compared with its neighbours, in an order that reverses (ABCCBA), so that drifts cancel. What counts is the
median of the pairs' ratios, with its 95 % interval, which follows from order statistics alone: by processor time, of
all pairs; and by wall-clock time, of those in which neither trial waited for a processor for more than 1 % of its time.
Prints one JSON object; exits with 1 if a bound is not met. `python benchmarks/profile_overhead.py` takes four minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import gossamer
from gossamer.experiment import Hooks
from gossamer.profiling import recorder
from gossamer.profiling.spans import Spans
from harness import Report, machine
from quiet import read, usage

SPANS_PER_SECOND = 1000
TRIAL_SECONDS = 0.2
MAX_DELAY = 0.01  # share of a trial that waited for a processor, beyond which its wall-clock time says nothing
LEAST_PAIRS = 20
MOST = 0.01  # that recording may cost
UNMEASURABLE = 0.001  # what the lower bound may be while nothing is recorded
RECORDED, OFF, NONE = "recorded", "off", "none"
FEDERATION = {
    "workload": {"name": "image-classification", "dataset": {"name": "digits", "limit": 600}, "model": "softmax"},
    "clients": {"num": 8, "per_round": 8},
    "train": {"lr": 0.1, "batch_size": 16, "epochs": 2},
    "checkpoint": {"every_seconds": 1e9},
    "engine": {"workers": 0, "modes": "auto"},
}


class Trial(NamedTuple):
    """Seconds of processor time of this thread, of wall-clock time, and of waiting for a processor."""

    cpu: float
    wall: float
    delay: float


@contextmanager
def measured(into: list[Trial]) -> Iterator[None]:
    """Append what the block takes."""
    delay, cpu, wall = delay_seconds(), time.thread_time(), time.perf_counter()
    yield
    into.append(Trial(time.thread_time() - cpu, time.perf_counter() - wall, delay_seconds() - delay))


def delay_seconds() -> float:
    """Return for how long this thread has waited for a processor so far; 0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def seconds_of_a_span(number: int) -> float:
    """Return the processor time that an empty span takes, recorded or not."""
    began = time.thread_time()
    for _ in range(number):
        with recorder.span("train", 10, "a<1"):
            pass
    return (time.thread_time() - began) / number


class Switch:
    """A recorder of this process that is switched on and off, and whose file stays open meanwhile."""

    def __init__(self, trace: Path) -> None:
        """Record into a folder, but not yet."""
        recorder.start(trace, "driver")
        self._recorder = recorder._current
        recorder.mark("start")
        recorder.flush()  # opens the file
        self.turn(False)

    def turn(self, on: bool) -> None:
        """Record from now on, or not."""
        recorder._current = self._recorder if on else None

    def close(self) -> None:
        """Close the file."""
        self.turn(True)
        recorder.stop()


def add_up(steps: int, per_span: int, *, spans: bool) -> None:
    """Do `steps` additions, with a span around each `per_span` of them, or with none; then write what was recorded."""
    total = 0
    for first in range(0, steps, per_span):
        if spans:
            with recorder.span("train", 10):
                for number in range(first, first + per_span):
                    total += number
        else:
            for number in range(first, first + per_span):
                total += number
    if spans:
        recorder.flush()


def loops(num_pairs: int, trace: Path) -> tuple[dict[str, list[Trial]], float]:
    """Measure additions in the three ways, in turn; return the trials of each, and recorded spans a second."""
    steps = 1_000_000
    seconds = min(_seconds(lambda: add_up(steps, steps, spans=False)) for _ in range(5))
    per_span = int(steps / seconds / SPANS_PER_SECOND)
    steps = per_span * int(TRIAL_SECONDS * SPANS_PER_SECOND)
    found: dict[str, list[Trial]] = {RECORDED: [], OFF: [], NONE: []}
    switch = Switch(trace)
    for number in range(-2, num_pairs):  # the first two warm up
        for way in list(found)[:: -1 if number % 2 else 1]:
            switch.turn(way == RECORDED)
            with measured(found[way]):
                add_up(steps, per_span, spans=way != NONE)
    switch.close()
    kept = {way: trials[2:] for way, trials in found.items()}
    return kept, steps / per_span / median(one.cpu for one in kept[NONE])


def _seconds(work: Callable[[], None]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


class Alternating(Spans):
    """Records rounds in the order yes, no, no, yes, and measures all of them."""

    def __init__(self, trace: Path) -> None:
        """Record into a folder."""
        super().__init__()
        self.switch = Switch(trace)
        self.trials: dict[str, list[Trial]] = {RECORDED: [], OFF: []}

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Measure a round, and record it or not."""
        is_recorded = number % 4 in (0, 1)
        self.switch.turn(is_recorded)
        with measured(self.trials[RECORDED if is_recorded else OFF]), super().round(number):
            yield
        self.switch.turn(False)


def rounds(num_pairs: int, directory: Path) -> tuple[dict[str, list[Trial]], float]:
    """Measure the rounds of a federation; return the trials, and recorded spans a second."""
    made: list[Alternating] = []

    def spans() -> Spans:
        """Return what measures the run."""
        made.append(Alternating(directory / "rounds"))
        return made[-1]

    gossamer.run({**FEDERATION, "rounds": 2 * num_pairs + 4}, out=directory / "run", hooks=Hooks(spans=spans))
    made[0].switch.close()
    kept = {way: trials[2:] for way, trials in made[0].trials.items()}
    (file,) = (directory / "rounds").iterdir()
    num_spans = sum(line.startswith("[") for line in file.read_text().splitlines())
    return kept, num_spans / len(made[0].trials[RECORDED]) / median(one.wall for one in kept[OFF])


class Ratio(NamedTuple):
    """Median of the pairs' ratios less 1, with its 95 % interval, and how many pairs count; None: too few do."""

    median: float | None
    lo: float | None
    hi: float | None
    pairs: int
    left_out: int


def compare(tried: Sequence[Trial], base: Sequence[Trial], clock: str) -> Ratio:
    """Return by which share trials take longer than their neighbours, by a clock: ``cpu`` or ``wall``."""
    pairs = list(zip(tried, base, strict=False))
    kept = [pair for pair in pairs if clock == "cpu" or all(one.delay <= MAX_DELAY * one.wall for one in pair)]
    ratios = sorted(a[clock == "wall"] / b[clock == "wall"] - 1 for a, b in kept)
    left_out = len(pairs) - len(ratios)
    if len(ratios) < LEAST_PAIRS:
        return Ratio(None, None, None, len(ratios), left_out)
    half = 1.96 * math.sqrt(len(ratios)) / 2  # of ranks around the median, by the normal limit of a binomial
    lo, hi = int(len(ratios) / 2 - half), min(len(ratios) - 1, math.ceil(len(ratios) / 2 + half))
    return Ratio(median(ratios), ratios[lo], ratios[hi], len(ratios), left_out)


def compared(trials: dict[str, list[Trial]], way: str, base: str) -> Report:
    """Return the comparison by both clocks."""
    return {clock: compare(trials[way], trials[base], clock)._asdict() for clock in ("cpu", "wall")}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, default=300, help="trials of each way of the loop")
    parser.add_argument("--rounds", type=int, default=800, help="pairs of rounds of the federation")
    given = parser.parse_args()
    if min(given.loops, given.rounds) < LEAST_PAIRS:
        parser.error(f"--loops and --rounds: give {LEAST_PAIRS} at least")
    torch.set_num_threads(1)
    before, report = read(), Report(benchmark="profile_overhead", machine=machine())
    with tempfile.TemporaryDirectory() as directory:
        off = seconds_of_a_span(100_000)
        with recorder.recording(Path(directory) / "spans"):
            on = seconds_of_a_span(20_000)
        looped, rate = loops(given.loops, Path(directory) / "loops")
        ran, rate_of_run = rounds(given.rounds, Path(directory))
    report["span_us"] = {"recorded": 1e6 * on, "off": 1e6 * off}
    report["loop"] = {
        "spans_per_second": rate,
        "by_spans": on * rate,
        "recorded": compared(looped, RECORDED, NONE),
        "off": compared(looped, OFF, NONE),
    }
    report["run"] = {"spans_per_second": rate_of_run, "recorded": compared(ran, RECORDED, OFF)}
    report["goals"] = {
        "recorded_below_1_percent": report["loop"]["recorded"]["cpu"]["hi"] < MOST,
        "off_unmeasurable": report["loop"]["off"]["cpu"]["lo"] <= UNMEASURABLE,
    }
    report["cores_used_by_others"] = usage(before, read()).share
    report["versions"] = {"python": platform.python_version(), "torch": version("torch")}
    print(json.dumps(report, indent=1))
    return 0 if all(report["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
