"""What clients reach by themselves: the server's model with their personal parameters, and after local steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gossamer.aggregate.codec_base import Communication
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import Record, spread
from gossamer.engines.statistics import name_of
from gossamer.engines.task import PERSONAL, Task
from gossamer.engines.training.job import Job
from gossamer.engines.training.personal import with_own
from gossamer.engines.training.trainer import Trainer
from gossamer.plan import Block, RoundPlan
from gossamer.round_record import merged
from gossamer.threads import one_thread
from gossamer.workloads.base import Sums, add_sums

NO_CODEC = Communication()


class ClientModels:
    """Evaluates models of single clients, in the process that holds the server's state."""

    def __init__(self, task: Task, state: Mapping[str, Tensor], order: Mapping[str, Tensor]) -> None:
        """Bind the task of a run's last phase, and the resident arrays of its server."""
        self._task, self._state, self._order = task, state, order
        # What a client keeps of a round in which everything is personal is the model that it has trained.
        alone = replace(task.with_personal(task.cutter.layout.names), communication=NO_CODEC)
        self._trainer = Trainer(alone, state, order)

    def measure(
        self, plan: RoundPlan, client_state: Callable[[Job], Arrays], keep: Callable[[str, Sums], None]
    ) -> Record:
        """Return mean, min and max over the plan's clients of each of their metrics, see `Workload.client_metrics`.

        Args:
            plan: its clients, with their variants; `steps` are local steps before another evaluation, 0 for none. Their
                batches are drawn as those of a phase that follows the round's own.
            client_state: callback that returns the private rows of a job's clients.
            keep: callback for the statistics by which a client's own model was evaluated, by their name, see `name_of`.

        Returns:
            ``<metric>_personal``, where clients keep parameters, and ``<metric>_fine_tuned``, after the steps.
        """
        found: dict[str, list[dict[str, float]]] = {"personal": [], "fine_tuned": []}
        with one_thread():
            for row in np.argsort(plan.client).tolist():
                here = slice(row, row + 1)
                job = Job(
                    plan.round,
                    plan.phase,
                    Block(int(plan.variant[row]), 0, 1, slice(0, 1)),
                    plan.client[here],
                    plan.weight[here],
                    plan.steps[here],
                    plan.lr,
                )
                kept = client_state(job)
                if self._task.personal:
                    own, statistics = self._evaluated(job, self._own(job, kept))
                    found["personal"].append(own)
                    capacity = self._task.capacities[job.block.variant]
                    keep(name_of(capacity, client=int(plan.client[row])), statistics)
                if plan.steps[row]:
                    found["fine_tuned"].append(self._evaluated(job, self._fine_tuned(job, kept))[0])
        return merged(*(spread(metrics, f"_{name}") for name, metrics in found.items() if metrics))

    def _own(self, job: Job, kept: Arrays) -> Tensor:
        """Return a client's model [d_sub] before local steps."""
        variant, client = self._task.variants[job.block.variant], int(job.client[0])
        x = self._state["x"][0]
        received = self._task.cut(variant, job.round, client, self._order).read(x, x.new_zeros(variant.layout.d))
        return with_own([{"x": received[None]}], kept[PERSONAL], variant.personal_mask)[0]["x"][0]

    def _fine_tuned(self, job: Job, kept: Arrays) -> Tensor:
        """Return a client's model [d_sub] after local steps."""
        variant = self._task.variants[job.block.variant]
        own = {PERSONAL: self._state["x"].new_full((1, variant.layout.d), torch.nan)} | kept
        arrays = {name: own[name] for name in self._trainer.task.client_arrays}
        return self._trainer.train(job, arrays).private[PERSONAL][0]

    @torch.no_grad()
    def _evaluated(self, job: Job, row: Tensor) -> tuple[dict[str, float], Sums]:
        """Return the metrics of a client's model, and the statistics by which it was evaluated."""
        workload, client = self._task.workload, int(job.client[0])
        params = self._task.variants[job.block.variant].layout.views(row)
        statistics = workload.client_statistics(params, client) if workload.num_statistics_chunks else {}
        sums = [workload.evaluate(params, statistics, chunk) for chunk in range(workload.num_evaluation_chunks)]
        return workload.client_metrics(add_sums(sums), client), {n: value.numpy() for n, value in statistics.items()}
