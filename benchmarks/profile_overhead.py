"""What recording a run costs: nothing measurable while it is off, and below 1 % at 1,000 spans a second.

Measures in turns, in one process: a span that is recorded, a span while nothing is recorded, and rounds of computation
with a span every millisecond against the same rounds without; the median of paired ratios counts. Prints one JSON
object: `python benchmarks/profile_overhead.py --rounds 60`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from gossamer.profiling import recorder

SPANS_PER_SECOND = 1000


def seconds_of_a_span(number: int) -> float:
    """Return the time that an empty span takes, recorded or not."""
    began = time.thread_time()
    for _ in range(number):
        with recorder.span("train", 10, "a<1"):
            pass
    return (time.thread_time() - began) / number


def count_work(steps: int, per_span: int, *, recorded: bool) -> float:
    """Return processor seconds of `steps` additions, with a span around each `per_span` of them, or with none."""
    began, total = time.thread_time(), 0
    for first in range(0, steps, per_span):
        if recorded:
            with recorder.span("train", 10):
                for number in range(first, first + per_span):
                    total += number
        else:
            for number in range(first, first + per_span):
                total += number
    recorder.flush()
    return time.thread_time() - began


def paired(num_pairs: int, steps: int, per_span: int) -> tuple[list[float], float]:
    """Return by which share rounds with spans take longer than rounds without, in turns; and spans a second."""
    ratios, seconds = [], []
    for number in range(num_pairs):
        order = (True, False) if number % 2 else (False, True)
        pair = {spans: count_work(steps, per_span, recorded=spans) for spans in order}
        ratios.append(pair[True] / pair[False] - 1)
        seconds.append(pair[False])
    return ratios, steps / per_span / median(seconds)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="pairs of rounds")
    parser.add_argument("--steps", type=int, default=1_000_000, help="additions of a round")
    given = parser.parse_args()
    speed = given.steps / min(count_work(given.steps, given.steps, recorded=False) for _ in range(5))
    per_span = int(speed / SPANS_PER_SECOND)
    count_work(given.steps, per_span, recorded=True)  # warms up
    off, (ratios_off, _) = seconds_of_a_span(100_000), paired(given.rounds, given.steps, per_span)
    with tempfile.TemporaryDirectory() as directory, recorder.recording(Path(directory) / "trace"):
        on, (ratios_on, rate) = seconds_of_a_span(20_000), paired(given.rounds, given.steps, per_span)
    report = {
        "span_recorded_us": 1e6 * on,
        "span_off_us": 1e6 * off,
        "spans_per_second": rate,
        "overhead_by_span": on * rate,
        "overhead": median(ratios_on),
        "overhead_off": median(ratios_off),
        "pairs": given.rounds,
    }
    print(json.dumps(report))
    return 0 if report["overhead"] < 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
