"""Which way of training is quicker here: a short measurement on the workload's own data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from gossamer.engines.base import Task, VariantMode
from gossamer.engines.local.memory import keep_freed_memory
from gossamer.engines.local.training import Job, Trainer
from gossamer.records import Block
from gossamer.threads import one_thread

NUM_STEPS = 2
NUM_REPEATS = 3
HOPELESS = 2.0


def choose_modes(task: Task, state: Mapping[str, Tensor]) -> tuple[VariantMode, ...]:
    """Time every admissible mode for every capacity and return the quickest ones.

    Args:
        task: the task; its `modes` are ignored.
        state: state arrays [1, d].
    """
    keep_freed_memory()
    return tuple(_quickest(task, state, variant) for variant in range(len(task.capacities)))


def admissible(task: Task) -> list[VariantMode]:
    """List the modes that the workload supports, the one that is most often quickest first."""
    workload = task.workload
    formats = [True, False] if workload.has_images else [False]
    modes = [VariantMode(channels_last=last) for last in formats]
    ragged = bool((workload.num_samples % task.train.batch_size != 0).any())
    if workload.supports_stacking and (workload.supports_padding or not ragged):
        modes.append(VariantMode(stacked=True, padding=ragged))
    return modes


def _quickest(task: Task, state: Mapping[str, Tensor], variant: int) -> VariantMode:
    modes = admissible(task)
    if len(modes) == 1:
        return modes[0]
    best, best_seconds = modes[0], float("inf")
    for mode in modes:
        seconds = _seconds_per_client(task, state, variant, mode, give_up=HOPELESS * best_seconds)
        if seconds < best_seconds:
            best, best_seconds = mode, seconds
    return best


def _seconds_per_client(
    task: Task, state: Mapping[str, Tensor], variant: int, mode: VariantMode, give_up: float
) -> float:
    """Return the least time per client of a few repeats after a warm-up; one hopeless repeat ends the trial."""
    layout = task.cutter.sub_layout(task.capacities[variant])
    num_rows = 1 if not mode.stacked else max(2, min(16, (1 << 20) // layout.d))
    clients = np.argsort(-task.workload.num_samples, kind="stable")[:num_rows].astype(np.int64)
    job = Job(
        round=0,
        phase=0,
        block=Block(variant, 0, slice(0, len(clients))),
        capacity=task.capacities[variant],
        client=clients,
        weight=np.ones(len(clients)),
        steps=np.full(len(clients), NUM_STEPS, dtype=np.int32),
        lr=0.0,
    )
    modes = list(task.modes)
    modes[variant] = mode
    trainer = Trainer(replace(task, modes=tuple(modes)), state)
    fresh = task.algorithm.init_client(state["x"].new_zeros(len(clients), layout.d))
    times: list[float] = []
    with one_thread():
        while len(times) <= NUM_REPEATS:
            began = time.perf_counter()
            trainer.train(job, fresh)
            times.append((time.perf_counter() - began) / len(clients))
            if len(times) == 2 and min(times) > give_up:
                break
    return min(times[1:])
