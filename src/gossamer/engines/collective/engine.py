"""A federation on the ranks of a torchrun job: rank 0 is the server, and trains as the others do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engines.base import EngineSetup
from gossamer.engines.collective.agreement import digests
from gossamer.engines.collective.clients import ClientRank, take_sums
from gossamer.engines.collective.peers import CollectivePeerEngine
from gossamer.engines.collective.world import Letter, current_world
from gossamer.engines.server import FederatedEngine
from gossamer.engines.task import Task, require_devices
from gossamer.engines.training.job import BlockResult, Job
from gossamer.errors import ConfigError
from gossamer.memory import keep_freed_memory
from gossamer.plan import Block, RoundPlan
from gossamer.storage.client_store import ClientStore
from gossamer.storage.row_files import Work
from gossamer.workloads.base import Sums


class CollectiveEngine(FederatedEngine):
    """Trains a federation on all ranks of a torchrun job, with the bits of the local engine."""

    is_remote = True

    def __init__(self, task: Task, state: Mapping[str, Tensor], store: ClientStore | None, setup: EngineSetup) -> None:
        """Let all ranks rebuild the task.

        Args:
            store: store of private client state, on rank 0; needed if the algorithm keeps some.

        Raises:
            ConfigError: this process was not started by torchrun, or there are more ranks than clients, or a rank does
                not see the directory of private client state.
        """
        require_devices(task)
        keep_freed_memory()
        self._world, self._store = current_world(), store
        require_enough(self._world.size, task.workload.num_clients, "clients")
        super().__init__(task, {name: value.clone() for name, value in state.items()}, store, setup, self._world.size)
        shared = None
        if store is not None:
            self._world.require_shared(store.directory)
            store.settle = self._settle
            shared = {"directory": os.path.abspath(store.directory), "dtype": str(self._state["x"].dtype)}
        rank = ClientRank(task, self._world.group, self._state, self._order, shared)
        self._world.begin(rank, setup, task=digests(task), store=shared)
        self._is_fresh = False  # whether all ranks have the state
        self._counts: dict[int, int] | None = None  # rows of each variant, until all ranks know them

    @staticmethod
    def of_peers(task: Task, x: Tensor, setup: EngineSetup) -> CollectivePeerEngine:
        """Return the engine of a task that has a topology instead of a server."""
        require_devices(task)
        world = current_world()
        require_enough(world.size, task.workload.num_clients, "peers")
        return CollectivePeerEngine(task, x, setup, world)

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace state arrays; the other ranks get them when they need them."""
        super().write(state)
        self._is_fresh = False

    def close(self) -> None:
        """Let the other ranks forget the task."""
        self._world.end()

    # ---- inside

    def _begin(self) -> None:
        self._is_fresh &= not self._order  # which is another one in each round
        self._refresh()
        self._counts = {variant: tree.count for (variant, _), tree in self._trees.items()}

    def _end(self) -> None:
        letters = self._world.ask_all({"kind": "sums", "on_all_ranks": self._is_summed})
        take_sums(self._trees, letters)

    @property
    def _is_summed(self) -> bool:
        """Whether the phase has no rows but sums, so that all ranks can have them and do the update."""
        names, variants = self._phase.algorithm.traits.uplink, range(len(self._task.variants))
        return all(self._phase.is_summed(variant, name) for variant in variants for name in names)

    def _refresh(self) -> None:
        """Give all ranks the state, unless they have it."""
        if not self._is_fresh:
            arrays = {("state", name): self._state[name] for name in self._state}
            arrays |= {("order", name): value for name, value in self._order.items()}
            self._world.ask_all({"kind": "state", "names": [*arrays]}, [*arrays.values()])
            self._is_fresh = True

    def _train_blocks(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        if self.hooks.stop_requested():
            return
        shares = self._shared_out(plan, blocks)
        bound = self._largest_norm() if self._max_norm is None else np.inf
        message = {"kind": "train", "phase": plan.phase, "counts": self._counts}
        message["bound"] = bound if np.isfinite(bound) else None
        letters = []
        for share in shares:
            jobs = [self._job(plan, block) for block in share]
            letters.append(Letter({**message, "jobs": [job.message() for job in jobs], "known": self._known(jobs)}))
        self._counts = None
        for share, (reply, arrays) in zip(shares, self._world.ask(letters), strict=True):
            values = iter(arrays)
            for block, described in zip(share, reply["blocks"], strict=True):
                yield self._returned(block, described, [next(values) for _ in described["arrays"]])

    def _known(self, jobs: Sequence[Job]) -> list[list[Any]]:
        """Return namespace, client and address of the private rows of jobs."""
        if self._store is None or not jobs:
            return []
        clients = np.concatenate([job.client for job in jobs])
        return [
            [name, client, *address]
            for name in self._phase.client_arrays
            for client, address in zip(clients.tolist(), self._store.addresses(name, clients), strict=True)
            if address is not None
        ]

    def _keep_private(self, plan: RoundPlan) -> None:
        """Let all ranks keep the survivors' private rows, and update the state where they have the sums."""
        self._is_fresh = self._is_fresh and self._is_summed
        if not self._is_summed and self._store is None:
            return
        message = {"kind": "finish", "round": plan.round, "phase": plan.phase, "lr": plan.lr}
        message["on_all_ranks"] = self._is_summed
        fields = (plan.client, plan.weight, plan.steps, plan.variant, self.survivors(plan))
        arrays = [torch.from_numpy(np.ascontiguousarray(value)) for value in fields]
        letters = [Letter({**message, "places": self._places(rank)}, arrays) for rank in range(self._world.size)]
        for rank, (reply, found) in enumerate(self._world.ask(letters)):
            for name, clients, checksums in zip(reply["kept"], found[::2], found[1::2], strict=True):
                assert self._store is not None
                self._store.record(name, rank, clients.numpy(), checksums.numpy())

    def _places(self, rank: int) -> dict[str, tuple[str, int]]:
        """Return where a rank appends private rows."""
        if self._store is None:
            return {}
        return {name: self._store.place(name, rank) for name in self._store.namespaces}

    def _settle(self, work: Sequence[Work]) -> None:
        """Have the ranks copy and sync files of private rows; those of ranks that are no more are shared out."""
        letters = []
        for rank in range(self._world.size):
            own = [one for one in work if one.part % self._world.size == rank]
            described = [[one.part, one.source, one.target, one.row_bytes] for one in own]
            slots = [torch.from_numpy(one.slots) for one in own]
            letters.append(Letter({"kind": "settle", "work": described}, slots))
        self._world.ask(letters)

    def _returned(self, block: Block, described: Mapping[str, Any], arrays: Sequence[Tensor]) -> BlockResult:
        """Put together what a rank returned of a block; what is added up stays with the rank."""
        result = self._block_result(block, described, arrays)
        kept = {name: parts for name, parts in result.payload.items() if not self._phase.is_summed(block.variant, name)}
        return BlockResult(block, kept, result.loss, result.finite, result.norm, result.private)

    def _shared_out(self, plan: RoundPlan, blocks: list[Block]) -> list[list[Block]]:
        """Return the blocks of each rank: consecutive ones, so that few partial sums are left, of nearly equal cost."""
        cost = [float(plan.steps[b.rows].sum()) * self._task.variants[b.variant].layout.d for b in blocks]
        middle = np.cumsum(cost) - np.array(cost) / 2
        total = sum(cost) or 1.0
        ranks = np.minimum((middle / total * self._world.size).astype(int), self._world.size - 1)
        return [
            [b for b, owner in zip(blocks, ranks, strict=True) if owner == rank] for rank in range(self._world.size)
        ]

    def _map_chunks(self, message: dict[str, Any], num_chunks: int) -> list[Sums]:
        self._refresh()
        size = self._world.size
        letters = [
            Letter({"kind": "evaluate", "job": message, "chunks": list(range(rank, num_chunks, size))})
            for rank in range(size)
        ]
        replies = [one for reply in self._world.ask(letters) for one in reply.message["replies"]]
        self.hooks.check()
        replies.sort(key=lambda reply: int(reply["chunk"]))
        return [{name: np.array(v, dtype=np.float64) for name, v in reply["sums"].items()} for reply in replies]


def require_enough(size: int, num: int, what: str) -> None:
    """Refuse ranks that would have nothing to do.

    Raises:
        ConfigError: there are more ranks than participants.
    """
    if size > num:
        raise ConfigError(f"torchrun started {size} ranks, but there are only {num} {what}: start {num} or fewer")
