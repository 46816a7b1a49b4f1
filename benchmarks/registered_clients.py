"""What memory registered clients cost when only a few of them take part in a round.

One data set of 60,000 grey images of 28 x 28 pixels (random bytes, 47 MB) is shared by 100, 1,000, 10,000 or 60,000
registered clients; 10 of them train a perceptron in each round, under FedAvg and under SCAFFOLD, whose
clients keep private state on disk. Every number of clients is run in a fresh process, whose peak resident memory the
kernel tells (``ru_maxrss``: code, torch, data, model and everything about clients). What each worker adds is its
proportional set size, which divides shared pages among those who share them. Figures are medians. ``spread`` is the
largest difference between the peaks of equal runs, which for SCAFFOLD lie in a commit: growth below it is noise.

Below that no implementation goes that keeps who owns which sample as lists of 64-bit numbers: 8 bytes a sample,
whatever the number of clients, and 8 bytes a client for where its list begins. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gossamer
from gossamer.experiment import Hooks
from gossamer.workloads.datasets import ImageData

NUM_SAMPLES, NUM_TEST = 60_000, 1_000
ALGORITHMS = {"fedavg": "fedavg", "scaffold": "scaffold"}


def dataset(options: Mapping[str, Any]) -> ImageData:
    """Return random bytes as images; mean and deviation are given, so that nothing is computed from all pixels."""
    source = np.random.default_rng(0)
    images = torch.from_numpy(source.integers(256, size=(NUM_SAMPLES + NUM_TEST, 1, 28, 28), dtype=np.uint8))
    labels = torch.arange(NUM_SAMPLES + NUM_TEST) % 10
    train, test = slice(NUM_SAMPLES), slice(NUM_SAMPLES, None)
    return ImageData("bytes", images[train], labels[train], images[test], labels[test], 10, (127.5,), (73.9,))


def configuration(algorithm: str, num_clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the experiment."""
    return {
        "name": "registered-clients",
        "rounds": options.rounds,
        "workload": {"dataset": "registered_clients:dataset", "model": {"name": "mlp", "hidden": [200, 200]}},
        "clients": {"num": num_clients, "per_round": 10},
        "train": {"lr": 0.05, "steps": 5},
        "algorithm": ALGORITHMS[algorithm],
        "evaluation": {"every": options.rounds},
        "checkpoint": {"every_seconds": 0},
        "engine": {"workers": options.workers, "modes": [{"capacity": 1.0}]},
    }


def proportional_set_size(pid: int | None) -> int:
    """Return the bytes of a process, with each shared page divided by the number of its users."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup names no proportional set size")


class Watch:
    """Looks at the workers after every round."""

    def __init__(self) -> None:
        self.worker_bytes: list[int] = []

    def on_block(self, round: int, done: int, total: int) -> None:
        """Nothing."""

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Note the largest worker."""
        self.worker_bytes.append(max((proportional_set_size(child.pid) for child in active_children()), default=0))


def measure(algorithm: str, num_clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one federation in this process and return what it took."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(algorithm, num_clients, options)
        run = gossamer.run(config, out=Path(folder) / "run", hooks=Hooks(observer=lambda name, rounds: watch))
        rows = [path.stat().st_size for path in (run.directory / "clients").glob("*.rows")]
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "worker_bytes": max(watch.worker_bytes),
        "client_state_on_disk_bytes": sum(rows),
    }


def in_fresh_process(algorithm: str, num_clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--child", algorithm, str(num_clients)]
    command += ["--rounds", str(options.rounds), "--workers", str(options.workers)]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def repeated(algorithm: str, num_clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return medians over several processes, and how far their peaks lie apart."""
    found = [in_fresh_process(algorithm, num_clients, options) for _ in range(options.repeats)]
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    peaks = [one["peak_bytes"] for one in found]
    return medians | {"spread_bytes": max(peaks) - min(peaks)}


def summary(measured: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Put one algorithm's figures into MB, and work out what a registered client adds."""
    fewest, most = min(measured), max(measured)
    by_clients = {
        str(num_clients): {
            "peak_mb": round(found["peak_bytes"] / 1e6, 1),
            "largest_worker_pss_mb": round(found["worker_bytes"] / 1e6, 1),
            "client_state_on_disk_mb": round(found["client_state_on_disk_bytes"] / 1e6, 1),
            "index_lists_mb": round(8 * (NUM_SAMPLES + num_clients + 1) / 1e6, 2),
        }
        for num_clients, found in measured.items()
    }

    added = measured[most]["peak_bytes"] - measured[fewest]["peak_bytes"]
    spread = max(found["spread_bytes"] for found in measured.values())
    return {
        "by_registered_clients": by_clients,
        "spread_mb": round(spread / 1e6, 1),
        "growth_bytes_per_registered_client": round(added / (most - fewest), 1),
        "spread_bytes_per_registered_client": round(spread / (most - fewest), 1),
    }


def main() -> None:
    """Run the benchmark of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1_000, 10_000, 60_000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("ALGORITHM", "CLIENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child[0], int(options.child[1]), options)))
        return
    if len(set(options.clients)) < 2:
        parser.error(f"--clients {options.clients}: give at least two different numbers")
    began, results = time.monotonic(), {}
    for algorithm in ALGORITHMS:
        results[algorithm] = summary({n: repeated(algorithm, n, options) for n in options.clients})
    print(
        json.dumps(
            {
                "benchmark": "registered_clients",
                "samples": NUM_SAMPLES,
                "participants_per_round": 10,
                "rounds": options.rounds,
                "workers": options.workers,
                "repeats": options.repeats,
                "algorithms": results,
                "lower_bound": {"bytes_per_sample": 8, "bytes_per_registered_client": 8},
                "versions": {
                    "gossamer": gossamer.__version__,
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "numpy": np.__version__,
                },
                "seconds": round(time.monotonic() - began, 1),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
