"""Rounds of other sizes, extrapolated from a recorded run, against real ones on the local engine.

Records rounds of `--recorded` clients, extrapolates to each of `--sizes`, and runs these, in turns, `--repeats` times;
medians count. Nothing is tuned between. Prints one JSON object: `python benchmarks/scale_accuracy.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import gossamer
from gossamer.profiling.trace import read_trace
from gossamer.reports.scaling import scale
from harness import log, machine


def configured(per_round: int, num: int, rounds: int, workers: int) -> dict[str, Any]:
    """Return an experiment: a small convolution on images that are made here."""
    return {
        "rounds": rounds,
        "profile": True,
        "workload": {
            "name": "image-classification",
            "dataset": {"name": "synthetic", "num_train": 40 * num, "num_test": 200},
            "model": "cnn",
        },
        "clients": {"num": num, "per_round": per_round},
        "algorithm": "fedavg",
        "train": {"lr": 0.1, "batch_size": 20, "epochs": 1},
        "evaluation": {"every": rounds},
        "engine": {"workers": workers, "modes": {"stacked": True}},
        "log": {"sinks": []},
    }


def recorded(directory: Path, config: dict[str, Any]) -> tuple[Path, float]:
    """Run, and return the directory and the median seconds of a round, without the first."""
    gossamer.run(config, out=directory)
    return directory, median(one.seconds for one in read_trace(directory).rounds[1:])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=int, default=50, help="clients of the recorded rounds")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200, 400], help="clients to extrapolate to")
    parser.add_argument("--rounds", type=int, default=8, help="of each run")
    parser.add_argument("--workers", type=int, default=2, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size")
    given = parser.parse_args()
    measured: dict[int, list[float]] = {size: [] for size in given.sizes}
    predicted: dict[int, list[float]] = {size: [] for size in given.sizes}
    num = max(given.sizes)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats):
            for size in (given.recorded, *given.sizes):
                where = Path(folder) / f"{repeat}-{size}"
                directory, seconds = recorded(where, configured(size, num, given.rounds, given.workers))
                log(f"{size} clients: {seconds:.3f} s a round")
                if size == given.recorded:
                    for one in scale(directory, read_trace(directory), given.sizes, given.workers):
                        predicted[one.participants].append(one.seconds.mean)
                else:
                    measured[size].append(seconds)
    errors = {size: median(predicted[size]) / median(measured[size]) - 1 for size in given.sizes}
    report = {
        "recorded": given.recorded,
        "workers": given.workers,
        "measured_seconds": {size: median(values) for size, values in measured.items()},
        "predicted_seconds": {size: median(values) for size, values in predicted.items()},
        "errors": errors,
        "mean_error": sum(map(abs, errors.values())) / len(errors),
        "versions": {"gossamer": gossamer.__version__, "python": sys.version.split()[0]},
        "machine": machine(),
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
