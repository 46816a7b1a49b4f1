"""Extracting ten PreAct ResNet-18 sub-models of mixed capacity and averaging them: slices, fancy indices, a plain copy.

Two clients of each capacity 1, 1/2, 1/4, 1/8, 1/16; rolling windows of a late round, half of the labels each.
A trial is one pass over all three.
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
from torch import Tensor

import gossamer
from gossamer.submodel import LABEL_AXIS, SubModel
from gossamer.submodel.layout import as_dim
from gossamer.workloads.resnet import PreActResNet18
from harness import Gate, machine, spread

CAPACITIES = (1.0, 0.5, 0.25, 0.125, 0.0625) * 2
ROUND = 300
WEIGHT = 50.0


def by_slices(params: dict[str, Tensor], axes: Any, labels: list[list[int]]) -> dict[str, Tensor]:
    """Extract and average with gossamer's public functions."""
    subs = [gossamer.submodel.extract(params, axes, capacity=c, round=ROUND, strategy="rolling") for c in CAPACITIES]
    return gossamer.aggregate.selective_mean(
        params, axes, [(sub, WEIGHT, own) for sub, own in zip(subs, labels, strict=True)]
    )


def by_fancy_indices(
    params: dict[str, Tensor], axes: Any, labels: list[list[int]], windows: list[dict[str, Any]]
) -> dict[str, Tensor]:
    """Do the same naively: index arrays, an accumulator and a counter of the parameter's shape for each client."""
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    count = {name: torch.zeros_like(value) for name, value in params.items()}
    for own, window in zip(labels, windows, strict=True):
        for name, value in params.items():
            index = mesh(value, axes[name], window)
            sub = value[index].clone()
            weight = torch.full_like(sub, WEIGHT)
            if as_dim(axes[name][0]).axis == LABEL_AXIS:
                mask = torch.zeros(len(sub))
                mask[own] = 1.0
                weight *= mask.view(-1, *(1,) * (sub.dim() - 1))
            total[name][index] += sub * weight
            count[name][index] += weight
    return {n: torch.where(count[n] > 0, total[n] / count[n].clamp(min=1), v) for n, v in params.items()}


def mesh(value: Tensor, specs: Any, window: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the open mesh of index tensors of one parameter's window."""
    indices = []
    for size, spec in zip(value.shape, specs, strict=True):
        dim = as_dim(spec)
        indices.append(window[dim.axis].indices if dim.cuttable else np.arange(size))
    return tuple(torch.from_numpy(index) for index in np.ix_(*indices))


def copies(subs: list[SubModel], buffers: list[dict[str, Tensor]]) -> None:
    """Copy as many bytes as extraction and averaging must move at least: every sub-model out, and back in."""
    for sub, buffer in zip(subs, buffers, strict=True):
        for name, value in sub.params.items():
            buffer[name].copy_(value)
            value.copy_(buffer[name])


def seconds_of(way: Callable[[], Any]) -> float:
    """Time one call."""
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    Gate.add_options(parser)
    arguments = parser.parse_args()
    before, gate = machine(), Gate.of(arguments)
    model = PreActResNet18((3, 32, 32), 10)
    axes, params = model.axes, model.init(np.random.default_rng(0))
    labels = [[(i + j) % 10 for j in range(5)] for i in range(len(CAPACITIES))]
    subs = [gossamer.submodel.extract(params, axes, capacity=c, round=ROUND) for c in CAPACITIES]
    buffers = [{name: torch.empty_like(value) for name, value in sub.params.items()} for sub in subs]
    windows = [sub.windows for sub in subs]
    ways: dict[str, Callable[[], Any]] = {
        "slices": lambda: by_slices(params, axes, labels),
        "fancy indices": lambda: by_fancy_indices(params, axes, labels, windows),
        "copy of the same bytes, there and back": lambda: copies(subs, buffers),
    }
    difference = max(
        float((a - b).abs().max())
        for a, b in zip(ways["slices"]().values(), ways["fancy indices"]().values(), strict=True)
    )
    if difference > 1e-5:
        raise SystemExit(f"the two ways differ by {difference}")
    passes = gate.gated(lambda: {name: seconds_of(way) for name, way in ways.items()}, arguments.repeats).results
    seconds = {name: [one[name] for one in passes] for name in ways}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_bytes = sum(4 * value.numel() for sub in subs for value in sub.params.values())
    result = {
        "benchmark": "submodel",
        "machine": before,
        **gate.report(),
        "versions": {"torch": version("torch"), "threads": torch.get_num_threads()},
        "bytes_of_all_sub_models": num_bytes,
        "seconds": medians,
        "ranges": {name: spread(values) for name, values in seconds.items()},
        "slices as a multiple of the copy": medians["slices"] / medians["copy of the same bytes, there and back"],
        "slices as a share of fancy indices": medians["slices"] / medians["fancy indices"],
        "largest difference": difference,
        "goals": {"extract + aggregate, seconds": gate.goal(medians["slices"], 0.35)},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
