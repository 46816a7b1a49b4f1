"""A full training step of SMAUG that masks, against one of the same model that sees everything.

Models, data, tasks and batch are those of the two methods of experiments/smaug-cost; a step is forward, backward and
torch's AdamW, on one thread. A trial is ten steps of each, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import yaml

from gossamer.simulation.counting import count_step
from gossamer.workloads.multimodal.workload import VideoLanguage
from harness import HERE, Gate, machine, spread

NUM_STEPS = 10  # of a trial


def workload_of(config: dict[str, Any], method: str) -> VideoLanguage:
    """Return the workload of a method, of a few clips."""
    options = {key: value for key, value in config["workload"].items() if key != "name"}
    options["dataset"] = {**options["dataset"], "num_train": 240, "num_pools": 1}
    options["model"] = dict(options["model"])
    for key, value in config["methods"][method].items():
        *sections, name = key.split(".")[1:]
        (options[sections[0]] if sections else options)[name] = value
    return VideoLanguage(options, num_clients=1, partition="iid", seed=0)


def step_of(workload: VideoLanguage, batch_size: int, lr: float) -> Callable[[], None]:
    """Return a training step on one batch."""
    params = {name: value.clone() for name, value in workload.layout.views(workload.init(0)).items()}
    leaves = [value.requires_grad_() for value in params.values()]
    optimizer = torch.optim.AdamW(leaves, lr=lr)
    batch = workload.batch(np.array([0]), np.arange(batch_size)[None])
    given = {name: value[0] for name, value in (batch.samples | batch.client).items()} | {"key": torch.tensor(5)}

    def step() -> None:
        """Take it."""
        optimizer.zero_grad()
        workload.loss(params, given).backward()
        optimizer.step()

    return step


def turns(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median seconds of each kind of step, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(NUM_STEPS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    torch.set_num_threads(1)
    config = yaml.safe_load((HERE.parent / "experiments" / "smaug-cost" / "config.yaml").read_text())
    batch_size, lr = config["train"]["batch_size"], config["train"]["lr"]
    workloads = {method: workload_of(config, method) for method in ("sparse", "dense")}
    steps = {method: step_of(workload, batch_size, lr) for method, workload in workloads.items()}
    flops = {
        method: batch_size * count_step(workload, workload.layout, batch_size).flops_per_sample
        for method, workload in workloads.items()
    }
    turns(steps)  # once unmeasured: memory is touched for the first time
    trials = gate.gated(lambda: turns(steps), arguments.repeats).results
    seconds = {method: [one[method] for one in trials] for method in steps}
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    ratios = {"flops": flops["dense"] / flops["sparse"], "seconds": medians["dense"] / medians["sparse"]}
    result = {
        "benchmark": "smaug_step",
        "machine": before,
        **gate.report(),
        "versions": {"torch": version("torch"), "threads": torch.get_num_threads()},
        "flops of a step": flops,
        "seconds of a step": medians,
        "ranges": {method: spread(values) for method, values in seconds.items()},
        "dense as a multiple of sparse": ratios,
        "median of paired ratios": statistics.median(one["dense"] / one["sparse"] for one in trials),
        "goals": {"flops, at least 1.9": ratios["flops"] >= 1.9, "seconds, at least 1.5": ratios["seconds"] >= 1.5},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
