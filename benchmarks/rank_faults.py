"""Kill, stop and starve ranks of engine collective, and compare the bits that are left with those of a quiet run.

A federation and peers run on two ranks under torchrun, which starts all ranks again after a failure. Each trial has
one fault, at a place and round drawn from the seed: SIGKILL or SIGSTOP of a rank amid an exchange, SIGKILL of rank 0
inside a commit, SIGTERM of one rank, a full disk at rank 0. A fault counts only where it has fired. After it the run
is finished, by torchrun itself or by `gossamer resume` on the local engine, and its final parameters and records must
be those of the local engine without a fault. Prints one JSON object; exits with 1 where bits differ, or a job
outlasts `LIMIT_SECONDS`.

    python benchmarks/rank_faults.py --faults 40
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import gossamer
from golden_hashes import decentralized, digest, federated
from gossamer import experiment
from gossamer.engines.collective import clients, peer_rank
from gossamer.engines.collective.environment import is_restarted
from gossamer.storage import checkpoint

KINDS = ("kill amid exchange", "stop amid exchange", "kill inside commit", "ask to stop", "full disk")
LIMIT_SECONDS = 180.0
STRAGGLER_SECONDS = 5.0
IMAGES = {
    "name": "image-classification",
    "dataset": {"name": "synthetic", "num_train": 150, "num_test": 40, "noise": 2.0},
    "model": {"name": "mlp", "hidden": [32]},
}
RUNS = {
    "clients": federated("fedrolex", [0.25, 0.5, 1.0], True),
    "peers": decentralized("dsgd", "od-equidyn", IMAGES, momentum=0.9),
}


def configuration(side: str) -> dict[str, Any]:
    """Return a run that commits every round."""
    return RUNS[side] | {"checkpoint": {"every_seconds": 0}}


def be_rank(fault: dict[str, Any]) -> None:
    """Run one rank, which brings about the fault if it is meant."""
    if not is_restarted() and os.environ["RANK"] == str(fault["rank"]):
        prepare(fault)
    engine = RUNS[fault["side"]]["engine"] | {"name": "collective", "straggler_seconds": STRAGGLER_SECONDS}
    config, directory = configuration(fault["side"]) | {"engine": engine}, Path(fault["directory"])
    try:
        experiment.run(config, out=directory)
    except gossamer.errors.GossamerError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def prepare(fault: dict[str, Any]) -> None:
    """Let something fail at its `fault["at"]`-th call."""
    calls, marker = 0, Path(fault["marker"])

    def fire() -> None:
        """Bring the fault about, in the call that was drawn."""
        nonlocal calls
        calls += 1
        if calls != fault["at"]:
            return
        marker.touch()
        if fault["kind"] == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault["directory"])
        number = {"stop amid exchange": signal.SIGSTOP, "ask to stop": signal.SIGTERM}.get(
            fault["kind"], signal.SIGKILL
        )
        os.kill(os.getpid(), number)

    if fault["kind"] in ("kill inside commit", "full disk"):
        save = checkpoint.save_arrays

        def save_arrays(*arguments: Any) -> None:
            """Fail after the arrays are written, before there is a manifest."""
            save(*arguments)
            fire()

        checkpoint.save_arrays = save_arrays
        return
    module, name = (clients, "sums_of_all") if fault["side"] == "clients" else (peer_rank, "swap_rows_")
    exchange = vars(module)[name]

    def failing(*arguments: Any) -> Any:
        """Fail where the other ranks are about to send."""
        fire()
        return exchange(*arguments)

    setattr(module, name, failing)


def try_one(fault: dict[str, Any], expected: str) -> dict[str, Any]:
    """Run a job with one fault, finish it, and compare."""
    began, restarts = time.monotonic(), "0" if fault["kind"] in ("ask to stop", "full disk") else "1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", restarts]
    command = [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__]
    try:
        done = subprocess.run(
            [*command, "--as-rank", json.dumps(fault)], capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return fault | {"hangs": True, "fired": Path(fault["marker"]).exists(), "equal": False}
    seconds, directory = time.monotonic() - began, Path(fault["directory"])
    run = experiment.resume(directory, overrides=["engine.name=local", "engine.straggler_seconds=null"])
    found = {"fired": Path(fault["marker"]).exists(), "equal": digest(run) == expected, "hangs": False}
    ended = {"code": done.returncode, "seconds": round(seconds, 1)}
    return fault | found | ended | ({} if found["equal"] else {"told": done.stderr[-2000:]})


def main() -> int:
    """Try all faults, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as-rank", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_rank:
        be_rank(given.as_rank)
        return 0
    source, results = random.Random(given.seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        expected = {side: digest(gossamer.run(configuration(side), out=Path(folder) / side)) for side in RUNS}
        for number in range(given.faults):
            kind, side = KINDS[number % len(KINDS)], source.choice(list(RUNS))
            at_commit = kind in ("kill inside commit", "full disk")
            where = {"directory": f"{folder}/{number}", "marker": f"{folder}/{number}.fired"}
            fault = {
                "kind": kind,
                "side": side,
                "rank": 0 if at_commit else source.randrange(2),
                "at": source.randint(2, 3),
            }
            results.append(try_one(fault | where, expected[side]))
            print({key: value for key, value in results[-1].items() if key not in where}, file=sys.stderr, flush=True)
    fired = Counter(one["kind"] for one in results if one["fired"])
    wrong = [one for one in results if one["fired"] and not one["equal"]]
    report = {"benchmark": "rank_faults", "fired": dict(fired), "all_equal": not wrong, "wrong": wrong}
    report["longest_seconds"] = max((one.get("seconds", LIMIT_SECONDS) for one in results), default=0.0)
    print(json.dumps(report, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
