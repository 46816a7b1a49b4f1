"""What clients keep from round to round: read for a job, and kept once the update of their owner is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.task import Task
from gossamer.engines.training.job import Job
from gossamer.submodel import Cut


class RowStore(Protocol):
    """Rows by (client, namespace), such as a `gossamer.storage.client_store.ClientStore`."""

    def get(self, namespace: str, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [s, width] of clients, int64 [s], and bool [s]: whether there is one."""
        ...

    def put(self, namespace: str, clients: Tensor, rows: Tensor) -> None:
        """Replace the rows of distinct clients."""
        ...


class PrivateRows:
    """The private arrays of clients in a store, [d] each, cut to the windows of a round."""

    def __init__(self, store: RowStore | None, dtype: torch.dtype) -> None:
        """Bind a store; None: the run's clients keep nothing, or keep it elsewhere."""
        self._store, self._dtype = store, dtype

    def of_job(self, phase: Task, job: Job, order: Mapping[str, Tensor]) -> Arrays:
        """Return the private rows of a job's clients, [s, d_sub]: what of [s, d] lies in the windows of this round.

        Args:
            phase: task of the job's phase.
            job: the job.
            order: the round's order of channels.
        """
        rows = self._stored(phase, phase.client_arrays, job.client)
        cuts = _cuts(phase, job.block.variant, job.round, job.client, order) if rows else []
        for name, whole in rows.items():
            if name not in phase.scalars and not cuts[0].is_full:
                parts = [cut.read(row, row.new_zeros(cut.sub.d)) for cut, row in zip(cuts, whole, strict=True)]
                rows[name] = torch.stack(parts)
        return rows

    def keep(
        self,
        phase: Task,
        variant: int,
        round: int,
        clients: NDArray[np.int64],
        kept: Arrays,
        order: Mapping[str, Tensor],
    ) -> None:
        """Store the new private rows of clients of a variant; coordinates outside a window keep their bits.

        Args:
            phase: task of the phase in which they were trained.
            variant: number of the clients' variant.
            round: round of their windows.
            clients: int64 [s], those whose update is used.
            kept: ``{name: [s, d_sub]}``.
            order: the round's order of channels.
        """
        if self._store is None or not kept or not len(clients):
            return
        cuts = _cuts(phase, variant, round, clients, order)
        shaped = [] if cuts[0].is_full else [name for name in kept if name not in phase.scalars]
        whole = self._stored(phase, shaped, clients)
        for name, rows in kept.items():
            new = rows
            if name in whole:
                for cut, target, row in zip(cuts, whole[name], new, strict=True):
                    cut.write(target, row)
                new = whole[name]
            self._store.put(name, torch.from_numpy(clients), new)

    def _stored(self, phase: Task, names: Iterable[str], clients: NDArray[np.int64]) -> Arrays:
        """Return the private rows [s, d] of clients, [s, 1] of scalars; those of newcomers as they start."""
        if not (names := list(names)):
            return {}
        assert self._store is not None
        zeros = torch.zeros(len(clients), phase.cutter.layout.d, dtype=self._dtype)
        rows, fresh = {}, phase.newcomers(zeros)
        for name in names:
            stored, present = self._store.get(name, torch.from_numpy(clients))
            rows[name] = torch.where(present[:, None], stored, fresh[name])
        return rows


def _cuts(phase: Task, variant: int, round: int, clients: NDArray[np.int64], order: Mapping[str, Tensor]) -> list[Cut]:
    """Return the windows of clients of a variant."""
    return [phase.cut(phase.variants[variant], round, client, order) for client in clients.tolist()]
