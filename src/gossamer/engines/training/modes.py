"""How each capacity is trained: by a rule of shapes and numbers, or in the quickest way, by a short measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from gossamer.engines.task import Task, Variant, VariantMode
from gossamer.engines.training.job import Job
from gossamer.engines.training.trainer import Trainer
from gossamer.memory import keep_freed_memory
from gossamer.plan import Block
from gossamer.threads import one_thread

LIGHT = 3e6  # FLOPs of a batch for each parameter tensor, up to which vmap pays for convolutions
SMALL_MODEL = 1 << 17  # parameters of other models, up to which it does
FEW = 4  # participants, with fewer of which it does not
MOST_PADDED = 2.0  # times as many samples as there are, up to which others than light models are stacked
MAX_STEPS = 5
NUM_REPEATS = 2
MAX_CLIENTS = 16
TRIAL_SECONDS = 0.05
STACKED_BLOCK_FLOATS = 1 << 20
HOPELESS = 4.0


def modes_by_rule(
    task: Task, flops_per_sample: Sequence[float], num_participants: Sequence[float]
) -> tuple[VariantMode, ...]:
    """Choose a mode for every capacity, the same on every machine.

    Images are trained channels-last. Participants are stacked, where that is possible, if

    - the model takes stacked parameters itself, as built-in perceptrons do, and a round has more than one of them; or
    - a round has enough of them to share calls, and these cost more than what they do: convolutions take few FLOPs, or
      a model without them fits the cache several times.

    Padding that multiplies the samples speaks against it. docs/decisions/0021 has the measurements.

    Args:
        task: the task; the modes of its variants are ignored.
        flops_per_sample: of each variant, as counted.
        num_participants: expected number of participants of each variant in a round.
    """
    singly, stacked = (next((one for one in admissible(task) if one.stacked == way), None) for way in (False, True))
    assert singly is not None
    samples = task.workload.num_samples
    batch = min(task.batch_size, int(samples.max()))
    padded = float((-(-samples // batch) * batch).sum() / samples.sum())  # times as many samples

    def pays(variant: Variant, flops: float, number: float) -> bool:
        """Say whether stacking does."""
        is_light = flops * batch * padded <= LIGHT * len(variant.layout.shapes)
        if task.workload.traits.stacks_natively:
            return number > 1 and (is_light or padded <= MOST_PADDED)
        if variant.layout.convolves:
            return number >= FEW and is_light
        return number >= FEW and variant.layout.d <= SMALL_MODEL and (is_light or padded <= MOST_PADDED)

    return tuple(
        stacked if stacked is not None and pays(*each) else singly
        for each in zip(task.variants, flops_per_sample, num_participants, strict=True)
    )


def measured_modes(task: Task, state: Mapping[str, Tensor]) -> tuple[VariantMode, ...]:
    """Time every admissible mode for every capacity and return the quickest ones.

    Args:
        task: the task; the modes of its variants are ignored.
        state: state arrays [1, d].
    """
    keep_freed_memory()
    return tuple(_quickest(task, state, variant) for variant in task.variants)


def admissible(task: Task) -> list[VariantMode]:
    """List the modes that workload and algorithm support, the one that is most often quickest first."""
    workload = task.workload
    formats = [True, False] if workload.traits.has_images else [False]
    modes = [VariantMode(channels_last=last) for last in formats]
    ragged = bool((workload.num_samples % task.batch_size != 0).any())
    stackable = workload.traits.supports_stacking and task.is_stackable
    if stackable and (workload.traits.supports_padding or not ragged):
        modes.append(VariantMode(stacked=True, padding=ragged))
    return modes


def _quickest(task: Task, state: Mapping[str, Tensor], variant: Variant) -> VariantMode:
    """Time the modes in turn, several times over, so that a disturbance does not hit one of them alone."""
    modes = admissible(task)
    if len(modes) == 1:
        return modes[0]
    with one_thread():
        # A first step of one client warms up, tells what is hopeless, and how many clients a fair trial can afford.
        first = {mode: _trial(task, state, variant, mode, 1, 1) for mode in modes}
        seconds = {mode: min(trial(), trial()) for mode, trial in first.items()}  # once alone could be disturbed
        num_clients = max(1, min(MAX_CLIENTS, int(TRIAL_SECONDS / MAX_STEPS / min(seconds.values()))))
        trials = {mode: _trial(task, state, variant, mode, num_clients, MAX_STEPS) for mode in modes}
        bound = HOPELESS * min(seconds.values())
        seconds = {mode: trials[mode]() for mode in modes if seconds[mode] <= bound}
        for _ in range(NUM_REPEATS):
            bound = HOPELESS * min(seconds.values())
            seconds = {mode: min(trials[mode](), taken) for mode, taken in seconds.items() if taken <= bound}
    return min(seconds, key=lambda mode: seconds[mode])


def _trial(
    task: Task, state: Mapping[str, Tensor], variant: Variant, mode: VariantMode, num_clients: int, max_steps: int
) -> Callable[[], float]:
    """Return a function that trains a block for a few steps in `mode` and returns the seconds per client."""
    layout = variant.layout
    num_rows = num_clients if not mode.stacked else max(2, min(num_clients, STACKED_BLOCK_FLOATS // layout.d))
    clients = np.argsort(-task.workload.num_samples, kind="stable")[:num_rows].astype(np.int64)
    num_steps = max(1, min(max_steps, int(task.workload.num_samples[clients[0]]) // task.batch_size))
    job = Job(
        round=0,
        phase=0,
        block=Block(variant.index, 0, MAX_CLIENTS, slice(0, len(clients))),
        client=clients,
        weight=np.ones(len(clients)),
        steps=np.full(len(clients), num_steps, dtype=np.int32),
        lr=0.0,
    )
    modes = [mode if other is variant else other.mode for other in task.variants]
    x = state["x"][0]
    order = task.cutter.order(x)
    trainers = [Trainer(phase, state, order) for phase in task.with_modes(modes).phases]
    row = task.cut(variant, 0, order=order).read(x, x.new_zeros(layout.d))
    zeros = row.new_zeros(len(clients), layout.d)
    peers = task.algorithm.init(row.repeat(len(clients), 1)) if task.topology is not None else None

    def run() -> float:
        """Train the block once, in every phase."""
        began = time.perf_counter()
        for phase, trainer in enumerate(trainers):
            if peers is not None:
                trainer.train_peers(job._replace(phase=phase), peers, [math.inf] * len(clients))
            else:
                trainer.train(job._replace(phase=phase), trainer.task.newcomers(zeros))
        return (time.perf_counter() - began) / len(clients)

    return run
