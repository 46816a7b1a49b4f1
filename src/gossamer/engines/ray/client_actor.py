"""What runs inside a Ray actor: a task rebuilt from JSON, and the same training as on one machine.

Nothing here matters: all that an actor holds was given with the call, so a dead one costs a repetition and no result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from gossamer.algorithms.base import Arrays
from gossamer.engines.ray.cluster import get_data, get_or_end
from gossamer.engines.ray.recording import recorded, start
from gossamer.engines.ray.shared_memory import AttachedMemory
from gossamer.engines.recipe import rebuild
from gossamer.engines.slots import write_arrays
from gossamer.engines.task import Task
from gossamer.engines.training.job import Job
from gossamer.engines.training.worker import Worker, named_arrays

Received = Mapping[str, NDArray[Any]]


def prepare(recipe: str, data: list[Any]) -> Task:
    """Set this process up for training, and rebuild a task.

    Args:
        recipe: JSON, see `rebuild`.
        data: the workload's, see `put_data`.
    """
    described = json.loads(recipe)
    start(described)
    return rebuild(described, get_data(data))


class ClientActor:
    """Trains and evaluates blocks of a federation; one torch thread."""

    def __init__(self, recipe: str, data: list[Any]) -> None:
        """Rebuild the task, see `prepare`."""
        self._task = prepare(recipe, data)
        self._state: Arrays = {}
        self._order: Arrays = {}
        self._worker = Worker(self._task, self._state, self._order, torch.zeros(0, 0))
        self._attached = AttachedMemory()
        self._received_at: Any = None

    @recorded("start")
    def ready(self) -> bool:
        """Answer, once the task is built."""
        return True

    @recorded("train")
    def train(
        self, message: str, received: list[Any], order: Received, client_state: Received
    ) -> tuple[str, list[NDArray[Any]]]:
        """Train one block.

        Args:
            message: JSON, a `Job`; whether `received` is cut to its capacity; ``memory``, where the state lies in the
                driver's memory, or null; and the number of the ``slot`` there that takes the result, or null.
            received: a reference to the downlink arrays [1, d_sub], or to the whole state [1, d]; in a list, so that it
                is fetched for the first block of a round only.
            order: the round's order of channels, where the strategy ranks them.
            client_state: rows [s, d_sub] of the algorithm's client arrays.

        Returns:
            JSON of losses, who was finite, and the names of the arrays that follow, or their extents in the slot.
        """
        described = json.loads(message)
        job = Job.of_message(described)
        _replace(self._order, tensors(order))
        if described["memory"] is not None:
            _replace(self._state, self._attached.state(described["memory"]))
        else:
            self._receive(job, received, is_cut=described["is_cut"])
        number = described["slot"]
        slot = None if number is None else self._attached.slot(described["memory"], number)
        result = self._worker.trainers[job.phase].train(job, tensors(client_state), slot)
        present = named_arrays(result)
        arrays = [value for *_, value in present]
        reply = {"loss": result.loss, "finite": result.finite, "norm": result.norm}
        reply |= {"arrays": [[name, part] for name, part, _ in present]}
        if slot is None:
            return json.dumps(reply), [value.numpy() for value in arrays]
        return json.dumps(reply | {"slot": number, "extents": write_arrays(slot, arrays)}), []

    @recorded("evaluate")
    def handle(self, message: str, state: Received, order: Received) -> str:
        """Return the sums of one chunk of data, see `Worker.handle`.

        Args:
            message: JSON, with ``memory`` as in `train`.
            state: the whole one, if there is no such memory.
            order: see `train`.
        """
        described = json.loads(message)
        memory = described["memory"]
        _replace(self._order, tensors(order))
        _replace(self._state, tensors(state) if memory is None else self._attached.state(memory))
        return json.dumps(self._worker.handle(described))

    def _receive(self, job: Job, reference: list[Any], *, is_cut: bool) -> None:
        address = (job.round, job.phase, job.block.variant if is_cut else None)
        if address == self._received_at:  # further blocks of the same round
            return
        received: Received = get_or_end(reference[0])
        self._received_at = address
        if is_cut:
            self._worker.trainers[job.phase].receive(job, tensors(received))
        else:
            _replace(self._state, tensors(received))


def _replace(arrays: Arrays, new: Arrays) -> None:
    arrays.clear()
    arrays.update(new)


def tensors(arrays: Received) -> Arrays:
    """Return arrays as tensors on the same memory, which must not be written to."""
    return {name: torch.from_numpy(value) for name, value in arrays.items()}
