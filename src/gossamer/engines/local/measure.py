"""Which way of training is quicker here: a short measurement on the workload's own data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from gossamer.engines.base import Task, VariantMode
from gossamer.engines.local.memory import keep_freed_memory
from gossamer.engines.local.training import Job, Trainer
from gossamer.records import Block
from gossamer.threads import one_thread

MAX_STEPS = 5
NUM_REPEATS = 4
MAX_ROWS = 16
STACKED_BLOCK_FLOATS = 1 << 20
HOPELESS = 1.5


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
    """Time the modes in turn, several times over, so that a disturbance does not hit one of them alone."""
    modes = admissible(task)
    if len(modes) == 1:
        return modes[0]
    trials = {mode: _trial(task, state, variant, mode) for mode in modes}
    seconds = {mode: float("inf") for mode in modes}
    with one_thread():
        for repeat in range(1 + NUM_REPEATS):
            for mode, trial in trials.items():
                if repeat > 1 and seconds[mode] > HOPELESS * min(seconds.values()):
                    continue
                taken = trial()
                if repeat:  # the first one warms up
                    seconds[mode] = min(seconds[mode], taken)
    return min(modes, key=lambda mode: seconds[mode])


def _trial(task: Task, state: Mapping[str, Tensor], variant: int, mode: VariantMode) -> Callable[[], float]:
    """Return a function that trains a block for a few steps in `mode` and returns the seconds per client."""
    layout = task.cutter.sub_layout(task.capacities[variant])
    num_rows = 1 if not mode.stacked else max(2, min(MAX_ROWS, STACKED_BLOCK_FLOATS // layout.d))
    clients = np.argsort(-task.workload.num_samples, kind="stable")[:num_rows].astype(np.int64)
    num_steps = max(1, min(MAX_STEPS, int(task.workload.num_samples[clients[0]]) // task.train.batch_size))
    job = Job(
        round=0,
        phase=0,
        block=Block(variant, 0, slice(0, len(clients))),
        capacity=task.capacities[variant],
        client=clients,
        weight=np.ones(len(clients)),
        steps=np.full(len(clients), num_steps, dtype=np.int32),
        lr=0.0,
    )
    modes = list(task.modes)
    modes[variant] = mode
    trainer = Trainer(replace(task, modes=tuple(modes)), state)
    fresh = task.algorithm.init_client(state["x"].new_zeros(len(clients), layout.d))

    def run() -> float:
        began = time.perf_counter()
        trainer.train(job, fresh)
        return (time.perf_counter() - began) / len(clients)

    return run
