"""Jobs, and the batches that their local steps go through."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer import rng
from gossamer.engines.base import never
from gossamer.engines.task import Task
from gossamer.engines.training.job import Job
from gossamer.errors import Interrupted
from gossamer.workloads.base import Workload

FETCH_BYTES = 64 << 20  # samples that are assembled in one go


class Part(NamedTuple):
    """A part of a batch, and its share of the samples: of one client, or [s]; None: the part is the whole."""

    batch: dict[str, Any]
    share: Tensor | None


class Batches:
    """Assembles the batches of jobs of one task."""

    def __init__(self, task: Task, stop: Callable[[], bool] = never) -> None:
        """Bind a task; once `stop` is true, `Interrupted` is raised instead of the next batch."""
        self._task, self._stop, self._sample_bytes = task, stop, sample_bytes(task.workload)

    def of(self, job: Job, rows: slice, positions: NDArray[np.int64], *, one_by_one: bool) -> Iterator[list[Part]]:
        """Yield the parts of one batch per local step for the clients in `rows`; samples are fetched many at a time.

        Tensors have a leading client dimension, unless a single client is trained (`one_by_one`).
        """
        task, clients = self._task, job.client[rows]
        size, variant = task.batch_size, task.variants[job.block.variant]
        mode, part_size = variant.mode, variant.local_steps.part_size
        num_steps = int(job.steps[rows].max())
        keys = step_keys(task, job, rows, num_steps) if task.workload.traits.uses_key else None
        fetch_steps = max(1, FETCH_BYTES // (len(clients) * size * self._sample_bytes))
        for first in range(0, num_steps, fetch_steps):
            last = min(first + fetch_steps, num_steps)
            wanted = positions[rows, first * size : last * size]
            lengths, width = [size] * (last - first), size
            if not mode.padding:  # the last batch of an epoch may be short; every row is equally short
                by_step = wanted.reshape(len(clients), -1, size)
                lengths = (by_step[0] >= 0).sum(axis=1).tolist()
                width = max(lengths)
                wanted = by_step[:, :, :width].reshape(len(clients), -1)
            samples, constants = task.workload.batch(clients, wanted, job.round, job.phase)
            samples = {key: as_format(value, mode.channels_last) for key, value in samples.items()}
            if mode.padding:
                samples["mask"] = torch.from_numpy(wanted >= 0).float()
            else:
                samples.pop("mask", None)
            samples, constants = on(mode.device, samples), on(mode.device, constants)
            merged: dict[str, Any] = {"scale": 1.0 / variant.capacity if task.scaler else 1.0, **constants}
            if one_by_one:
                samples = {key: value[0] for key, value in samples.items()}
                merged |= {key: value[0] for key, value in constants.items()}
            own = wanted[0] if one_by_one else wanted
            for step, length in enumerate(lengths):
                if self._stop():
                    raise Interrupted("stopped between two steps")
                whole = slice(step * width, step * width + length)
                batch = merged | {key: v[whole] if one_by_one else v[:, whole] for key, v in samples.items()}
                if keys is not None:
                    key = keys[:, first + step].to(mode.device)
                    batch["key"] = key[0] if one_by_one else key
                if part_size is None or part_size >= length:
                    yield [Part(batch, None)]
                else:
                    yield _parts(batch, set(samples), own[..., whole], part_size)


def _parts(batch: Mapping[str, Any], samples: Collection[str], positions: NDArray[np.int64], size: int) -> list[Part]:
    """Cut a batch into parts of `size` samples, each with random bits of its own.

    Args:
        batch: the batch; `samples` names what of it has a dimension of samples, which is that of `positions`.
        positions: int64 [b], or [s, b]; below 0 is padding.
    """
    parts, num_samples, axis = [], positions.shape[-1], positions.ndim - 1
    for number, low in enumerate(range(0, num_samples, size)):
        high = min(low + size, num_samples)
        own = {key: batch[key].narrow(axis, low, high - low) for key in samples}
        if "key" in batch:
            own["key"] = batch["key"] + number
        parts.append(Part({**batch, **own}, share(positions[..., low:high], positions)))
    return parts


def share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> Tensor:
    """Return the share of the samples of a batch that are in a part of it; positions below 0 are padding."""
    return torch.from_numpy(np.asarray((part >= 0).sum(axis=-1) / np.maximum((whole >= 0).sum(axis=-1), 1)))


def step_keys(task: Task, job: Job, rows: slice, num_steps: int) -> Tensor:
    """Return the random bits of local steps, see `Workload.loss`; int64 [participants in `rows`, num_steps]."""
    words = rng.bits(task.seed, "step-key", job.round, job.phase, job.client[rows], num_steps)
    return torch.from_numpy(words.view(np.int64))


def on(device: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on a device; those that are there already are the same ones."""
    return {name: value.to(device) for name, value in arrays.items()}


def sample_bytes(workload: Workload) -> int:
    """Return the bytes of one training sample as `Workload.batch` returns it."""
    zero = np.zeros(1, dtype=np.int64)
    return sum(value.nbytes for value in workload.batch(zero, zero[None]).samples.values())


def local_positions(task: Task, job: Job) -> NDArray[np.int64]:
    """Shuffle every client's samples, once an epoch, into its local batches.

    Returns:
        int64 [s, max(steps) * batch size] of positions in the client's own data; -1 is padding.
    """
    size = task.batch_size
    num_samples = task.workload.num_samples[job.client]
    most = int(job.steps.max())
    per_epoch = -(-num_samples // size)  # batches
    positions = np.full((len(job.client), most * size), -1, dtype=np.int64)
    filled = np.zeros(len(job.client), dtype=np.int64)
    epoch = 0
    while (filled < job.steps).any():
        rows = np.flatnonzero(filled < job.steps)
        order = rng.permutations(
            task.seed, "shuffle", job.round, job.phase, job.client[rows], num_samples[rows], extra=epoch
        )
        columns = filled[rows, None] * size + np.arange(order.shape[1])
        fitting = (order >= 0) & (columns < positions.shape[1])
        positions[np.broadcast_to(rows[:, None], order.shape)[fitting], columns[fitting]] = order[fitting]
        filled += per_epoch
        epoch += 1
    return positions


def as_format(images: Tensor, channels_last: bool) -> Tensor:
    """Return image samples [s, b, channels, height, width] in channels-last order; other tensors as they are.

    With one channel the memory is the same in both orders, and only the strides tell convolutions which one is meant.
    """
    if not channels_last or images.dim() != 5:
        return images
    s, b, c, h, w = images.shape
    if c == 1:  # views of a size-1 dimension forget its stride, so it is set last
        return images.contiguous().as_strided(images.shape, (b * h * w, h * w, 1, w, 1))
    return images.reshape(s * b, c, h, w).contiguous(memory_format=torch.channels_last).view(s, b, c, h, w)
