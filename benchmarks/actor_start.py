"""How long a Ray actor takes until it can train ResNet-18 of five capacities, and what it does meanwhile.

An actor gets a configuration as JSON and the data through the object store, and rebuilds its task from them. From the
call on, its process starts, torch and gossamer are imported, the data looked up, the task rebuilt, and its answer
arrives. Beside it, in turn, stands the bound: an actor with the same imports that rebuilds nothing. Every actor is a
process of its own; one Ray serves all. A trial is one of each.

FedRolex with capacities 1, 1/2, 1/4, 1/8, 1/16; made-up images of 3 x 32 x 32, or with --cifar CIFAR-10 from below
GOSSAMER_DATA. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from harness import Gate, Report, machine, spread
from quiet import descendants, read, together, usage

CAPACITIES = (1.0, 0.5, 0.25, 0.125, 0.0625)
STAGES = ("process", "import torch", "import gossamer", "data", "task", "answer")
FACTORIES = ("gossamer.task:task_of", "gossamer.build:task_of")  # of this release, and of those before
GET_DATA = ("gossamer.engines.ray.client_actor:get_data", "gossamer.engines.ray.host:get_data")  # and all of an actor
PUT_DATA = ("gossamer.engines.ray.cluster:put_data", "gossamer.engines.ray.placing:put_data")
GONE_SECONDS = 30.0  # in which an actor's process must be gone


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the experiment; how each capacity is trained is given, so that nothing is measured."""
    synthetic = {"name": "synthetic", "num_train": options.samples, "num_test": 100, "shape": [3, 32, 32]}
    return {
        "rounds": 10,
        "workload": {"dataset": "cifar10" if options.cifar else synthetic, "model": "preact-resnet18"},
        "clients": {"num": 100, "per_round": 10},
        "train": {"lr": 0.1, "batch_size": 10},
        "algorithm": "fedrolex",
        "submodel": {"capacities": list(CAPACITIES)},
        "engine": {"modes": [{"capacity": capacity, "channels_last": True} for capacity in CAPACITIES]},
    }


def load_first(names: tuple[str, ...]) -> Callable[..., Any]:
    """Return the first of several ``module:function`` that there is.

    Raises:
        ImportError: there is none.
    """
    for name in names:
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(names)}")


class Actor:
    """What an actor of the Ray engine does at its start, with a clock that all processes of the machine share."""

    def __init__(self, config: str, data: list[Any], paths: list[str], *, is_bare: bool) -> None:
        """Import, and rebuild the task unless it is the bound."""
        self.stamps = [time.monotonic()]
        sys.path += [path for path in paths if path not in sys.path]
        import torch

        torch.set_num_threads(1)
        self.stamps.append(time.monotonic())
        factory, get_data = load_first(FACTORIES), load_first(GET_DATA)
        self.stamps.append(time.monotonic())
        found = None if is_bare else get_data(data)
        self.stamps.append(time.monotonic())
        self.task = None if is_bare else factory(json.loads(config), found)
        self.stamps.append(time.monotonic())

    def ready(self) -> tuple[int, list[float]]:
        """Return the process, and when each stage ended."""
        return os.getpid(), self.stamps


def start(arguments: tuple[Any, ...], *, is_bare: bool) -> Report:
    """Start an actor, wait until it answers, and end it; return the seconds of every stage, and what was used.

    The counters are read while it lives, because it takes what it used along, see quiet.py.
    """
    import ray

    before, called = read(), time.monotonic()
    actor = ray.remote(num_cpus=1, max_restarts=0)(Actor).remote(*arguments, is_bare=is_bare)
    process, stamps = ray.get(actor.ready.remote())
    stamps = [called, *stamps, time.monotonic()]
    used = usage(before, read())
    ray.kill(actor)
    deadline = time.monotonic() + GONE_SECONDS
    while process in descendants(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    return {"used": used, "ready": stamps[-1] - called, **dict(zip(STAGES, seconds, strict=True))}


def summary(of_kind: list[Report]) -> Report:
    """Return medians and ranges of every stage."""
    stages = ("ready", *STAGES)
    return {
        "seconds": {stage: statistics.median(one[stage] for one in of_kind) for stage in stages},
        "ranges": {stage: spread([one[stage] for one in of_kind]) for stage in stages},
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="actors of each kind")
    parser.add_argument("--samples", type=int, default=50_000, help="made-up training images")
    parser.add_argument("--cifar", action="store_true", help="CIFAR-10 from below GOSSAMER_DATA instead")
    Gate.add_options(parser)
    options = parser.parse_args()
    before, gate = machine(), Gate.of(options)
    import ray

    from building import resolved

    config = resolved(configuration(options))
    factory = load_first(FACTORIES)
    began = time.monotonic()
    task = factory(config)
    alone = time.monotonic() - began  # loads or makes the data, too
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    paths = [os.path.abspath(path) for path in sys.path]
    arguments = (json.dumps(config), load_first(PUT_DATA)(task.workload), paths)
    kinds = {"actor": False, "bound": True}

    def one_of_each() -> dict[str, Report]:
        """Start one actor of each kind in turn."""
        return {kind: start(arguments, is_bare=is_bare) for kind, is_bare in kinds.items()}

    one_of_each()  # takes the processes that Ray started ahead, and warms up
    trials = gate.gated(one_of_each, options.repeats, lambda trial: together(one["used"] for one in trial.values()))
    found = {kind: summary([one[kind] for one in trials.results]) for kind in kinds}
    ray.shutdown()
    result = {
        "benchmark": "actor_start",
        "machine": before,
        **gate.report(),
        "factory": f"{factory.__module__}:{factory.__name__}",
        "data": "cifar10" if options.cifar else f"{options.samples} made-up images",
        "parameters": task.workload.layout.d,
        "capacities": CAPACITIES,
        "task with its data, in the driver, seconds (once)": alone,
        "kinds": found,
        "actor / bound": found["actor"]["seconds"]["ready"] / found["bound"]["seconds"]["ready"],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "ray")}},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    # Ray would pickle whatever is defined in __main__ by value; from here it travels by name.
    import actor_start

    actor_start.main()
