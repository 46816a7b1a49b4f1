"""SHA-256 of eight small runs on an engine: equal before and after a change that should alter no bits.

FedAvg, FedRolex, SCAFFOLD and FIARSE by clients; DSGD, DSGT, push-sum and CHOCO-SGD by peers. A hash covers the names
and bytes of the final model and every metric but those of clocks. Prints one JSON object; with --compare FILE it exits
with 1 where a hash differs from that of an earlier output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import gossamer

CLOCKS = ("wall_seconds", "round_seconds", "phase_seconds")
LEVELS = [0.25, 0.5, 1.0]
SYNTHETIC = {"name": "synthetic", "num_train": 150, "num_test": 40, "noise": 2.0}
MLP = {"name": "mlp", "hidden": [32]}
LEAST_SQUARES = {"name": "least-squares", "dim": 5, "num_samples": 12, "heterogeneity": 1.0}


def modes(levels: list[float], stacked: bool) -> list[dict[str, Any]]:
    """Return how each capacity is trained, pinned."""
    return [{"capacity": level, "stacked": stacked, "padding": stacked} for level in levels]


def federated(algorithm: Any, levels: list[float], stacked: bool, **train: Any) -> dict[str, Any]:
    """Return a federation of eight clients, five a round."""
    return {
        "name": "golden",
        "rounds": 4,
        "workload": {"name": "image-classification", "dataset": SYNTHETIC, "model": MLP},
        "clients": {"num": 8, "per_round": 5},
        "train": {"lr": 0.1, "batch_size": 8} | train,
        "algorithm": algorithm,
        "submodel": {"capacities": levels},
        "evaluation": {"by_capacity": len(levels) > 1},
        "engine": {"modes": modes(levels, stacked)},
    }


def decentralized(algorithm: Any, topology: Any, workload: dict[str, Any], **train: Any) -> dict[str, Any]:
    """Return eight peers."""
    return {
        "name": "golden",
        "rounds": 4,
        "workload": workload,
        "peers": {"num": 8, "topology": topology},
        "train": {"lr": 0.05, "batch_size": 4} | train,
        "algorithm": algorithm,
        "engine": {"modes": modes([1.0], stacked=True)},
    }


IMAGES = {"name": "image-classification", "dataset": SYNTHETIC, "model": MLP}
CHOCO = {"name": "choco-sgd", "compressor": {"name": "random-k", "share": 0.2}}
RUNS: dict[str, dict[str, Any]] = {
    "fedavg": federated("fedavg", [1.0], True, momentum=0.9),
    "fedrolex": federated("fedrolex", LEVELS, True),
    "scaffold": federated("scaffold", [1.0], False),
    "fiarse": federated("fiarse", LEVELS, False),
    "dsgd": decentralized("dsgd", "od-equidyn", IMAGES, momentum=0.9),
    "dsgt": decentralized("dsgt", {"name": "ring", "lazy": True}, LEAST_SQUARES, steps=1),
    "push-sum": decentralized("push-sum", "static-exp", IMAGES),
    "choco-sgd": decentralized(CHOCO, "ring", IMAGES),
}


def digest(run: gossamer.Run) -> str:
    """Return the SHA-256 of a run's final model and metrics."""
    found = hashlib.sha256()
    for name, value in sorted(run.params.items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    for record in run.metrics:
        kept = {key: value for key, value in record.items() if key not in CLOCKS}
        found.update(json.dumps(kept, sort_keys=True).encode())
    return found.hexdigest()


def measure(engine: str, workers: int) -> dict[str, str]:
    """Run all eight on an engine and return their digests."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, config in RUNS.items():
            config = config | {"engine": config["engine"] | {"name": engine, "workers": workers}}
            found[name] = digest(gossamer.run(config, out=Path(directory) / name))
    return found


def main() -> int:
    """Measure, print, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--compare", type=Path, help="an earlier output")
    given = parser.parse_args()
    torch.set_num_threads(1)
    hashes: Mapping[str, Mapping[str, str]] = {engine: measure(engine, given.workers) for engine in given.engines}
    engines_equal = len({json.dumps(one, sort_keys=True) for one in hashes.values()}) == 1
    report: dict[str, Any] = {"hashes": hashes, "engines_equal": engines_equal}
    if given.compare is not None:
        before = json.loads(given.compare.read_text())["hashes"]
        report["differ"] = [
            f"{engine}/{name}" for engine in hashes for name in RUNS if hashes[engine][name] != before[engine][name]
        ]
    print(json.dumps(report))
    return 0 if engines_equal and not report.get("differ") else 1


if __name__ == "__main__":
    sys.exit(main())
