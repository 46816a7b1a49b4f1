"""Faults of ranks: a federation whose clients keep private state, and peers, on the ranks of torchrun.

Each run has one fault. Algorithm, seed, rank and instant are drawn:

- kill-in-exchange, stop-in-exchange: SIGKILL or SIGSTOP of a rank between two of the messages of an exchange. A stopped
  rank gets SIGCONT once another one has given it up: torchrun's SIGTERM finds it then, for which torchrun would
  otherwise wait 30 s before it kills;
- kill-in-commit: SIGKILL of rank 0 after one of the steps of a commit;
- ask-to-stop: SIGTERM of one rank;
- full-disk: from an instant after the first commit on, the disk refuses all that a rank writes there.

torchrun starts the ranks again after a rank was killed or given up, and the run goes on by itself; after the other
faults the job ends, and `gossamer resume` starts it again. All of it is torch's elastic agent, as the command torchrun
runs it, but ranks are forked from a process that has imported torch: to import it takes longer than all else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch

import gossamer
from forked import firing, refused, start, wait, write_digest
from golden_hashes import LEAST_SQUARES, decentralized, federated
from gossamer import experiment
from gossamer.distributed.links import ROWS
from gossamer.distributed.shared import SharedMemory
from gossamer.engines.collective import serving
from gossamer.engines.collective.environment import is_restarted
from gossamer.errors import GossamerError
from gossamer.storage.checkpoint import Checkpoints

NUM_FAULTS = 40
NUM_RANKS = 2
NUM_SEEDS = 2
STRAGGLER_SECONDS = 5.0  # after which a stopped rank is given up
LEADER_SECONDS = 20.0  # and rank 0, where others wait for its next message; a run of a user's own has 600
GIVEN_UP = "waited in vain for rank"  # what a rank says of another
AGAIN = ("kill-in-exchange", "stop-in-exchange", "kill-in-commit")  # after which torchrun starts ranks again
KINDS = (*AGAIN, "ask-to-stop", "full-disk")
MESSAGES = {"scaffold": 8, "dsgt": 6}  # that a rank sends and receives in exchanges, at least
COMMIT_STEPS = 15  # of three commits
EXPERIMENTS = {
    "scaffold": federated("scaffold", [1.0], True),
    "dsgt": decentralized("dsgt", {"name": "ring", "lazy": True}, LEAST_SQUARES, steps=1),
}


def configuration(fault: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """Return a run that commits every round."""
    config = EXPERIMENTS[fault["experiment"]]
    return config | {
        "seed": fault["seed"],
        "rounds": 4,
        "checkpoint": {"every_seconds": 0},
        "engine": config["engine"] | engine,
    }


# ---- ranks


def torchrun(do: Callable[[], object], max_restarts: int) -> int:
    """Do something on all ranks, as torchrun does; returns its exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_RANKS,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=f"faults-{os.getpid()}",
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, be_rank)(do)
    except ChildFailedError:
        return 1
    return 0


def be_rank(do: Callable[[], object]) -> None:
    """Do something as one of the ranks, with the signals of a new process."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        do()
    except GossamerError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


# ---- one fault


def run_with(fault: dict[str, Any], directory: Path) -> None:
    """Run on one rank, which brings about the fault if it is meant."""
    if not is_restarted() and os.environ["RANK"] == str(fault["rank"]):
        prepare(fault, directory)
    serving.TIMEOUT_SECONDS = LEADER_SECONDS  # type: ignore[attr-defined]
    straggler_seconds = STRAGGLER_SECONDS if fault["kind"] == "stop-in-exchange" else None
    experiment.run(configuration(fault, name="collective", straggler_seconds=straggler_seconds), out=directory)


def prepare(fault: dict[str, Any], directory: Path) -> None:
    """Let something fail at its `fault["at"]`-th call."""
    kind = fault["kind"]
    number = {"stop-in-exchange": signal.SIGSTOP, "ask-to-stop": signal.SIGTERM}.get(kind, signal.SIGKILL)
    fire = firing(fault["at"], directory.with_suffix(".fired"), number)

    if kind == "kill-in-commit":
        Checkpoints.commit = partialmethod(  # type: ignore[assignment]
            Checkpoints.commit, on_step=fire
        )
    elif kind == "full-disk":
        os.fsync, os.pwrite = (refused(call, fault["at"], directory) for call in (os.fsync, os.pwrite))
    else:
        SharedMemory.send = failing(SharedMemory.send, fire)  # type: ignore[method-assign]
        SharedMemory.receive = failing(SharedMemory.receive, fire)  # type: ignore[method-assign]


def failing(call: Callable[..., Any], fire: Callable[[], None]) -> Callable[..., Any]:
    """Return what fails before a message of an exchange is sent or received; what was sent before is under way."""

    def call_or_fail(*arguments: Any) -> Any:
        """Be the call, of which a tag is among the arguments."""
        if arguments[2] == ROWS:  # its tag, after the object and what, or from whom
            fire()
        return call(*arguments)

    return call_or_fail


def try_one(fault: dict[str, Any], directory: Path, expected: str) -> dict[str, Any]:
    """Run a job with one fault, start it again if torchrun does not, and compare."""
    began, log, marker = time.monotonic(), directory.with_suffix(".log"), directory.with_suffix(".fired")
    stopped = fault["kind"] == "stop-in-exchange"

    def wake() -> None:
        """Let a stopped rank go on, once it has been given up."""
        nonlocal stopped
        if stopped and marker.exists() and GIVEN_UP in log.read_text(errors="replace"):
            os.kill(int(marker.read_text()), signal.SIGCONT)
            stopped = False

    restarts = 1 if fault["kind"] in AGAIN else 0
    codes = [wait(start(partial(torchrun, partial(run_with, fault, directory), restarts), log), wake)]
    if codes == [1] and not restarts:
        codes.append(wait(start(partial(torchrun, partial(experiment.resume, directory), 0), log)))
    result = directory.with_suffix(".digest")
    wait(start(partial(write_digest, partial(gossamer.load, directory), result), log))
    found = {
        "fired": marker.exists(),
        "equal": codes[-1] == 0 and result.exists() and result.read_text() == expected,
        "hung": None in codes,
        "seconds": round(time.monotonic() - began, 1),
    }
    return fault | found | ({} if found["equal"] else {"codes": codes, "said": log.read_text(errors="replace")[-3000:]})


def drawn(number: int, source: random.Random, experiments: list[str]) -> dict[str, Any]:
    """Return the fault of a number."""
    kind, name = KINDS[number % len(KINDS)], source.choice(experiments)
    calls = {"kill-in-commit": COMMIT_STEPS, "full-disk": 2}.get(kind, MESSAGES[name])
    return {
        "kind": kind,
        "experiment": name,
        "seed": source.randrange(NUM_SEEDS),
        "rank": 0 if kind == "kill-in-commit" else source.randrange(NUM_RANKS),
        "at": source.randint(1, calls),
    }


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Try until that many faults have fired, or three times as many were tried; return what the JSON says of them."""
    torch.set_num_threads(1)
    for module in ("torch._dynamo", "torch.distributed.launcher.api"):
        importlib.import_module(module)  # which every process would do anew
    source, names = random.Random(options.seed), options.experiments or list(EXPERIMENTS)
    expected, results = dict[tuple[str, int], str](), list[dict[str, Any]]()
    for number in range(3 * options.faults):
        if (num_fired := sum(one["fired"] for one in results)) == options.faults:
            break
        fault = drawn(num_fired, source, names)
        key, directory = (fault["experiment"], fault["seed"]), folder / str(number)
        if key not in expected:
            calm = folder / f"{key[0]}-{key[1]}"
            make = partial(gossamer.run, configuration(fault, workers=0), out=calm)
            path = calm.with_suffix(".digest")
            wait(start(partial(write_digest, make, path), calm.with_suffix(".log")))
            expected[key] = path.read_text()
        results.append(try_one(fault, directory, expected[key]))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    fired = [one for one in results if one["fired"]]
    return {
        "experiments": {name: sum(one["experiment"] == name for one in fired) for name in names},
        "fired": dict(sorted(Counter(one["kind"] for one in fired).items())),
        "faults": len(fired),
        "all_equal": all(one["equal"] for one in results),
        "hung": sum(one["hung"] for one in results),
        "wrong": [one for one in results if not one["equal"]],
        "longest_seconds": max(one["seconds"] for one in results),
    }
