"""SHA-256 of small runs on an engine: equal before and after a change that should alter no bits.

FedAvg, FedRolex, SCAFFOLD and FIARSE by clients; DSGD, DSGT, push-sum and CHOCO-SGD by peers; clients and peers of
unequal modalities. A hash covers the names
and bytes of the final model and every metric but those of clocks. Prints one JSON object; with --compare FILE it exits
with 1 where a hash differs from that of an earlier output. With --by-rule modes are not pinned but left to the rule,
and the examples of the README run, too: `golden_hashes.py --by-rule --workers 1 2 3 --repeats 2`. With --training the
runs are those of optimizers, parts of models, codecs and outer steps; with --kill each is also killed after its second
round by SIGKILL, on the local engine, and resumed: `golden_hashes.py --training --kill --workers 1 2 4`. With
--multimodal the runs are those of several modalities: `golden_hashes.py --multimodal --workers 0 1 2`. With --ranks
they also run on engine collective, under torchrun: `golden_hashes.py --engines local --ranks 1 2 3 5`. With --profile
each also runs recorded, on the first engine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

import gossamer
from gossamer.config.loading import with_value

CLOCKS = ("wall_seconds", "round_seconds", "phase_seconds")
OF_REAL_CLIENTS = ("_weighted", "_by_client")  # ends of the names of metrics that simulations do not have
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
TOP_K = {"name": "choco-sgd", "compressor": {"name": "top-k", "share": 0.1}}
VIDEOS = {
    "name": "video-language",
    "dataset": {"name": "moving-digits", "num_train": 120, "num_pools": 1},
    "model": {"name": "mplug-2", "stream": 16, "hidden": 24, "vision_blocks": 1, "num_latents": 3},
    "modalities": {"video+text": 0.5, "text": 0.25, "video": 0.25},
    "missing": {"train": {"text": 0.3}},
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "missing modalities": federated("fedrolex", [0.5, 1.0], False, lr=0.01)
    | {"workload": VIDEOS, "rounds": 3, "engine": {}},
    "missing modalities, peers": decentralized("dsgd", "od-equidyn", VIDEOS, steps=1) | {"rounds": 3, "engine": {}},
}
RUNS: dict[str, dict[str, Any]] = MULTIMODAL | {
    "fedavg": federated("fedavg", [1.0], True, momentum=0.9),
    "fedrolex": federated("fedrolex", LEVELS, True),
    "scaffold": federated("scaffold", [1.0], False),
    "fiarse": federated("fiarse", LEVELS, False),
    "dsgd": decentralized("dsgd", "od-equidyn", IMAGES, momentum=0.9),
    "dsgt": decentralized("dsgt", {"name": "ring", "lazy": True}, LEAST_SQUARES, steps=1),
    "push-sum": decentralized("push-sum", "static-exp", IMAGES),
    "choco-sgd": decentralized(CHOCO, "ring", IMAGES),
    "choco-sgd, top-k": decentralized(TOP_K, "ring", IMAGES),
    "windowed peers": decentralized("dsgd", "od-equidyn", IMAGES)
    | {"submodel": {"capacities": LEVELS}, "engine": {"modes": modes(LEVELS, stacked=True)}},
}


MOMENTS = {"train.optimizer": {"name": "adamw", "state": "keep"}, "train.lr": 0.01}
DROPOUT = {"name": "mlp", "hidden": [32], "dropout": 0.3}
LORA = {"rank": 4, "targets": ["hidden0"], "train": ["output.*"]}
RESNET = {"name": "preact-resnet18", "width": 0.0625}
RING = {"name": "gasloc", "gamma": 0.5}


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with entries at dotted keys replaced."""
    for key, value in changes.items():
        config = with_value(config, key.split("."), value)
    return config


TRAINING: dict[str, dict[str, Any]] = {
    "adamw, kept": changed(federated("fedrolex", LEVELS, True), MOMENTS),
    "adamw, kept by peers": changed(decentralized("dsgd", "od-equidyn", IMAGES), MOMENTS),
    "muon": changed(federated("fedavg", [1.0], False), {"train.optimizer": "muon", "train.lr": 0.02}),
    "lora by capacity": changed(federated("heterofl", LEVELS, False), {"workload.lora": LORA}),
    "flexlora": changed(federated("flexlora", LEVELS, False), {"workload.lora": LORA}),
    "dropout": changed(federated("fedrolex", LEVELS, True), {"workload.model": DROPOUT}),
    "fedbn": changed(federated("fedbn", [1.0], False), {"workload.model": RESNET, "evaluation.num_clients": 2}),
    "top-k with error feedback": changed(
        federated("fedrolex", LEVELS, True), {"communication.uplink": {"name": "top-k", "share": 0.05}}
    ),
    "diloco": changed(federated("diloco", [1.0], True), MOMENTS),
    "streaming-diloco": changed(federated("streaming-diloco", [1.0], True), MOMENTS),
    "gasloc": changed(decentralized(RING, "ring", IMAGES), MOMENTS),
    "noloco": changed(decentralized("noloco", "random-match", IMAGES), MOMENTS),
}


def by_rule() -> dict[str, dict[str, Any]]:
    """Return all experiments, those of the README included, with modes left to the rule."""
    quickstart = yaml.safe_load((Path(__file__).parent.parent / "experiments/quickstart/config.yaml").read_text())
    methods = quickstart.pop("methods")
    quickstart |= {"seeds": None, "rounds": 6}
    federation = {
        "rounds": 6,
        "workload": {"dataset": "digits", "model": {"name": "mlp", "hidden": [128]}},
        "clients": {"num": 50, "per_round": 10, "partition": {"name": "dirichlet", "alpha": 1.0, "min_samples": 2}},
        "train": {"epochs": 1, "batch_size": 10, "lr": 0.1},
        "algorithm": "fedrolex",
        "submodel": {"capacities": [1.0, 0.5, 0.25]},
    }
    peers = {
        "rounds": 20,
        "workload": {"name": "least-squares", "heterogeneity": 1.0},
        "peers": {"num": 64, "topology": {"name": "od-equidyn"}},
        "train": {"steps": 1, "batch_size": 50, "lr": 0.05},
        "algorithm": "dsgt",
    }
    found = {f"quickstart/{name}": quickstart | method for name, method in methods.items()}
    found |= {"readme, federation": federation, "readme, peers": peers}
    return {name: config | {"engine": {}} for name, config in (RUNS | found).items()}


def digest(run: gossamer.Run) -> str:
    """Return the SHA-256 of a run's final model and metrics."""
    found = hashlib.sha256()
    for name, value in sorted(run.params.items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    for record in run.metrics:
        kept = {key: value for key, value in record.items() if key not in CLOCKS and not key.endswith(OF_REAL_CLIENTS)}
        found.update(json.dumps(kept, sort_keys=True).encode())
    return found.hexdigest()


def kill(record: Mapping[str, Any]) -> None:
    """Kill this process once two rounds are done."""
    if record["round"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def resumed(config: dict[str, Any], directory: Path) -> gossamer.Run:
    """Run in a process that is killed amid, and resume here."""
    pid = os.fork()
    if not pid:
        gossamer.run(config | {"checkpoint": {"every_seconds": 0}}, out=directory, on_round=kill)
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
        raise SystemExit(f"{directory}: the run was not killed")
    return gossamer.resume(directory)


def measure(runs: Mapping[str, dict[str, Any]], engine: str, workers: int, killed: bool = False) -> dict[str, str]:
    """Run all on an engine, killed and resumed or not, and return their digests."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, config) in enumerate(runs.items()):
            config = config | {"engine": config["engine"] | {"name": engine, "workers": workers}}
            where = Path(directory) / str(number)
            found[name] = digest(resumed(config, where) if killed else gossamer.run(config, out=where))
    return found


def measured_on_ranks(num_ranks: int, arguments: list[str]) -> dict[str, str]:
    """Start this script by torchrun, and return the digests that rank 0 prints."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, *arguments]
    done = subprocess.run([*command, "--as-rank"], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure, print, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=1, help="runs of each on each engine and number of workers")
    parser.add_argument("--by-rule", action="store_true", help="leave modes to the rule; the README's examples, too")
    parser.add_argument(
        "--training", action="store_true", help="runs of optimizers, parts of models, codecs, outer steps"
    )
    parser.add_argument("--multimodal", action="store_true", help="runs of several modalities alone")
    parser.add_argument("--profile", action="store_true", help="also record each, on the first engine")
    parser.add_argument("--kill", action="store_true", help="also kill and resume each, on the local engine")
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="also on so many ranks, under torchrun")
    parser.add_argument("--as-rank", action="store_true", help="be one of the ranks that torchrun starts")
    parser.add_argument("--compare", type=Path, help="an earlier output")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name for name in ("multimodal", "training", "by_rule") if vars(given)[name]]
    runs = {"multimodal": MULTIMODAL, "training": TRAINING}.get(chosen[0], by_rule()) if chosen else RUNS
    ways = dict[str, tuple[str, int]]()
    if given.as_rank:
        found = measure(runs, "collective", 1)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return 0
    for engine, workers, number in product(given.engines, given.workers, range(given.repeats)):
        if engine == "ray" and not workers:  # which has actors
            continue
        is_only = len(given.workers) == given.repeats == 1
        ways[engine if is_only else f"{engine}, {workers} workers, run {number + 1}"] = engine, workers
    hashes: dict[str, Mapping[str, str]] = {}
    if given.kill:  # first, because Ray's threads do not go with forks
        hashes["local, killed"] = measure(runs, "local", given.workers[0], killed=True)
    hashes |= {name: measure(runs, *way) for name, way in ways.items()}
    if given.profile:
        recorded = {name: config | {"profile": True} for name, config in runs.items()}
        hashes[f"{given.engines[0]}, recorded"] = measure(recorded, given.engines[0], given.workers[0])
    which = [f"--{name.replace('_', '-')}" for name in chosen]
    hashes |= {f"collective, {num} ranks": measured_on_ranks(num, which) for num in given.ranks}
    engines_equal = len({json.dumps(one, sort_keys=True) for one in hashes.values()}) == 1
    report: dict[str, Any] = {"hashes": hashes, "engines_equal": engines_equal}
    if given.compare is not None:
        before = json.loads(given.compare.read_text())["hashes"]
        report["differ"] = [
            f"{engine}/{name}"
            for engine in before
            for name in runs
            if hashes[engine][name] != before[engine].get(name, hashes[engine][name])
        ]
    print(json.dumps(report))
    return 0 if engines_equal and not report.get("differ") else 1


if __name__ == "__main__":
    sys.exit(main())
