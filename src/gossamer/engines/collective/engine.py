"""A federation on the ranks of a torchrun job: rank 0 is the server, and trains as the others do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engines.base import EngineSetup
from gossamer.engines.collective.clients import ClientRank, take_sums
from gossamer.engines.collective.peers import CollectivePeerEngine
from gossamer.engines.collective.world import Letter, current_world
from gossamer.engines.memory import keep_freed_memory
from gossamer.engines.server import FederatedEngine
from gossamer.engines.task import Task, require_devices
from gossamer.engines.training.job import BlockResult
from gossamer.errors import ConfigError
from gossamer.plan import Block, RoundPlan
from gossamer.storage.client_store import ClientStore
from gossamer.workloads.base import Sums


class CollectiveEngine(FederatedEngine):
    """Trains a federation on all ranks of a torchrun job, with the bits of the local engine."""

    is_remote = True

    def __init__(self, task: Task, state: Mapping[str, Tensor], store: ClientStore | None, setup: EngineSetup) -> None:
        """Let all ranks rebuild the task.

        Args:
            store: store of private client state, on rank 0; needed if the algorithm keeps some.

        Raises:
            ConfigError: this process was not started by torchrun, or there are more ranks than clients.
        """
        require_devices(task)
        keep_freed_memory()
        self._world = current_world()
        require_enough(self._world.size, task.workload.num_clients, "clients")
        super().__init__(task, {name: value.clone() for name, value in state.items()}, store, setup, self._world.size)
        self._world.begin(ClientRank(task, self._world.group, self._state, self._order), setup)
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

    def exchange(self, plan: RoundPlan) -> None:
        """Update the state: here, and where all ranks have the sums, at each of them."""
        super().exchange(plan)
        self._is_fresh = self._is_fresh and self._is_summed
        if self._is_summed:
            message = {"kind": "update", "round": plan.round, "phase": plan.phase, "lr": plan.lr}
            fields = (plan.client, plan.weight, plan.steps, plan.variant, self.survivors(plan))
            self._world.ask_all(message, [torch.from_numpy(np.ascontiguousarray(value)) for value in fields])

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
            private = [value for job in jobs for value in self._client_state(job).values()]
            letters.append(Letter({**message, "jobs": [job.message() for job in jobs]}, private))
        self._counts = None
        for share, (reply, arrays) in zip(shares, self._world.ask(letters), strict=True):
            values = iter(arrays)
            for block, described in zip(share, reply["blocks"], strict=True):
                yield self._returned(block, described, [next(values) for _ in described["arrays"]])

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
