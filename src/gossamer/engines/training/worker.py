"""What a worker does with a job: read it from shared memory, train or evaluate, write the result back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import never
from gossamer.engines.slots import write_arrays
from gossamer.engines.task import Task, Variant
from gossamer.engines.training.job import BlockResult, Job
from gossamer.engines.training.trainer import Trainer
from gossamer.profiling import recorder
from gossamer.workloads.base import Sums

Message = dict[str, Any]


class Worker:
    """Handles messages; lives in a worker process, or in the driver's where there are none.

    A slot is a stretch of shared memory: first the client state that a job reads, then what the job writes.

    Attributes:
        trainers: of each phase of a round.
    """

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Tensor],
        order: Mapping[str, Tensor],
        slots: Tensor,
        stop: Callable[[], bool] = never,
    ) -> None:
        self._task, self._state, self._order, self._slots = task, state, order, slots
        self.trainers = [Trainer(phase, state, order, stop) for phase in task.phases]
        self._statistics: tuple[tuple[float, int], dict[str, Tensor]] | None = None

    def handle(self, message: Message) -> Message:
        """Do one job and return its reply, both plain JSON values."""
        with recorder.span("train" if message["kind"] == "train" else "evaluate"):
            return self._handle(message)

    def _handle(self, message: Message) -> Message:
        if message["kind"] == "train":
            return self._train(message)
        if message["kind"] == "statistics":
            sums = self.statistics(message["variant"], message["round"], message["chunk"])
            return {"chunk": message["chunk"], "sums": {name: value.tolist() for name, value in sums.items()}}
        statistics = {name: torch.tensor(value, dtype=torch.float64) for name, value in message["statistics"].items()}
        found = self.evaluate(message["variant"], message["round"], statistics, message["chunk"])
        return {"chunk": message["chunk"], "sums": {name: value.tolist() for name, value in found.items()}}

    def train(self, job: Job, client_state: Arrays) -> BlockResult:
        """Train one block in this process."""
        with recorder.span("train"):
            return self.trainers[job.phase].train(job, client_state)

    def statistics(self, variant: int, round: int, chunk: int) -> dict[str, Tensor]:
        """Return the BatchNorm sums of one chunk of training data."""
        with torch.no_grad():
            return self._task.workload.statistics(self._params(variant, round), chunk)

    def evaluate(self, variant: int, round: int, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return the metric sums of one chunk of test data."""
        with torch.no_grad():
            return self._task.workload.evaluate(self._params(variant, round), statistics, chunk)

    def row(self, variant: Variant, round: int) -> Tensor:
        """Return the model, or its sub-model of a variant at `round`, as it is evaluated: [d] of its layout."""
        x = self._state["x"][0]
        cut = self._task.cut(variant, round, order=self._order)
        x = variant.algorithm.evaluated(x)
        return x if cut.is_full else cut.read(x, x.new_zeros(cut.sub.d))

    def _params(self, index: int, round: int) -> dict[str, Tensor]:
        variant = self._task.variant(index)
        return variant.layout.views(self.row(variant, round))

    def _train(self, message: Message) -> Message:
        job = Job.of_message(message)
        slot, num_rows, trainer = self._slots[message["slot"]], len(job.client), self.trainers[job.phase]
        d_sub, taken, client_state = self._task.variants[job.block.variant].layout.d, 0, Arrays()
        for name in trainer.task.client_arrays:
            width = 1 if name in trainer.task.scalars else d_sub
            client_state[name] = slot[taken : taken + num_rows * width].view(num_rows, width).clone()
            taken += num_rows * width
        result = trainer.train(job, client_state, slot)
        present = named_arrays(result)
        with recorder.span("serialise", sum(value.nbytes for *_, value in present)):
            extents = write_arrays(slot, [value for *_, value in present])
        return {
            "variant": message["variant"],
            "first_tile": message["first_tile"],
            "slot": message["slot"],
            "loss": result.loss,
            "finite": result.finite,
            "norm": result.norm,
            "arrays": [[name, part] for name, part, _ in present],
            "extents": extents,
        }


def named_arrays(result: BlockResult) -> list[tuple[str, int, Tensor]]:
    """List what a block returns: ``payload.<name>`` part by part, those that are there, and ``private.<name>``."""
    payload = [
        (f"payload.{name}", part, value)
        for name, parts in result.payload.items()
        for part, value in enumerate(parts)
        if value is not None
    ]
    return payload + [(f"private.{name}", 0, value) for name, value in result.private.items()]
