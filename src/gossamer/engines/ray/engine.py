"""The engine of a cluster: the server in this process, blocks of clients on Ray actors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.clientstore import ClientStore
from gossamer.engines.base import Task
from gossamer.engines.federation import MAX_BLOCK_ROWS_ONE_BY_ONE, FederatedEngine, num_leaves_of
from gossamer.engines.local.batches import Job
from gossamer.engines.local.memory import keep_freed_memory
from gossamer.engines.ray.actors import Actors, Call
from gossamer.engines.ray.host import Host
from gossamer.engines.ray.peers import RayPeerEngine
from gossamer.engines.ray.placing import arrays_of, make_actor, num_cpus, put_data
from gossamer.engines.ray.starting import start_ray
from gossamer.records import Block, BlockResult, RoundPlan
from gossamer.workloads.base import Sums


class RayEngine(FederatedEngine):
    """Trains a federation on Ray actors, with the bits of the local engine."""

    is_remote = True

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Tensor],
        store: ClientStore | None = None,
        *,
        workers: int,
        block_size: int | None = None,
        recipe: Mapping[str, Any],
        address: str | None = None,
        straggler_seconds: float | None = None,
    ) -> None:
        """Start Ray or join a cluster, and start actors.

        Args:
            task, state, store, block_size: as of the local engine.
            workers: actors, of one CPU each; 0: as many as there are CPUs, anew every round. Changes no bits.
            recipe: how actors rebuild the task, see `Host`.
            address: None: a Ray of our own; else "auto" or the address of a cluster.
            straggler_seconds: see `Actors`.

        Raises:
            EngineError: Ray does not start, or there is no such cluster.
        """
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        keep_freed_memory()
        self._leave = start_ray(address, workers or None)
        self._adapts = not workers
        owned = {name: value.clone() for name, value in state.items()}
        super().__init__(task, owned, store, num_workers=workers or num_cpus(), block_size=block_size)
        self._actors = Actors(
            make_actor(Host, json.dumps(recipe), put_data(task.workload)),
            self.num_workers,
            straggler_seconds=straggler_seconds,
            on_event=lambda kind, **fields: self.report(kind, **fields),
        )
        self._received: dict[float | None, Any] = {}

    @staticmethod
    def of_peers(task: Task, x: Tensor, **options: Any) -> RayPeerEngine:
        """Return the engine of a task that has a topology instead of a server."""
        return RayPeerEngine(task, x, **options)

    def close(self) -> None:
        """Stop the actors, and the Ray that was started for them."""
        self._actors.stop()
        self._received = {}
        self._leave()

    def train(self, plan: RoundPlan) -> Iterator[BlockResult]:
        """Train on as many actors as there are CPUs by now, and cut blocks for them, see `FederatedEngine`."""
        if self._adapts:
            self._actors.resize(num_cpus())
            self.num_workers = len(self._actors)
        return super().train(plan)

    def _train_blocks(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        self._received = {}
        by_key = {(block.variant, block.rows.start): block for block in blocks}
        for key, (reply, arrays) in self._actors.map(self._calls(plan, blocks), self.stop_requested):
            yield self._block_result(plan, by_key[key], json.loads(reply), arrays)  # type: ignore[index]

    def _blocks_of(self, plan: RoundPlan, variant: int) -> list[Block]:
        """Cut the last rows of a round finely and the first ones coarsely: every block sends one sum."""
        blocks = super()._blocks_of(plan, variant)
        capacity = plan.capacities[variant]
        if self._block_size or self._task.modes[variant].stacked or not self._task.cutter.shares(capacity):
            return blocks
        rows, found, low, size = plan.variant_rows(variant), list[Block](), 0, 1
        while (left := rows.stop - rows.start - low) > 0:
            if len(found) % self.num_workers == 0:  # every actor has got one of the size before
                size = 1 << (min(max(1, left // self.num_workers), MAX_BLOCK_ROWS_ONE_BY_ONE).bit_length() - 1)
            found.append(Block(variant, low // size, size, slice(rows.start + low, rows.start + low + size)))
            low += size
        return found

    def _calls(self, plan: RoundPlan, blocks: Iterable[Block]) -> Iterator[Call]:
        cutter = self._task.cutter
        for block in blocks:
            job = self._job(plan, block)
            is_cut = cutter.shares(job.capacity) and cutter.strategy.rank is None
            message = job.message() | {"is_cut": is_cut}
            rows = self._client_state(job.client, cutter.sub_layout(job.capacity).d)
            arguments = (json.dumps(message), [self._put(job, is_cut=is_cut)], arrays_of(rows))
            cost = float(job.steps.sum()) * cutter.sub_layout(job.capacity).d
            yield Call((block.variant, block.rows.start), "train", arguments, cost=cost)

    def _put(self, job: Job, *, is_cut: bool) -> Any:
        """Return a reference to what the clients of a capacity start from, put into the object store once a round."""
        key = job.capacity if is_cut else None
        if key not in self._received:
            import ray

            names = self._task.algorithm.downlink if is_cut else self._state
            rows = {name: self._state[name] for name in names or ()}
            cut = self._task.cutter.cut(job.capacity, job.round, 0)
            if is_cut and not cut.is_full:
                rows = {name: cut.read(row[0], row.new_zeros(cut.sub.d))[None] for name, row in rows.items()}
            self._received[key] = ray.put(arrays_of(rows))
        return self._received[key]

    def _block_result(
        self, plan: RoundPlan, block: Block, reply: Mapping[str, Any], arrays: list[NDArray[Any]]
    ) -> BlockResult:
        shared = self._task.cutter.shares(plan.capacities[block.variant])
        num_parts = num_leaves_of(block) if shared else block.rows.stop - block.rows.start
        payload: dict[str, list[Tensor | None]] = {name: [None] * num_parts for name in self._task.algorithm.uplink}
        private: dict[str, Tensor] = {}
        for (key, part), array in zip(reply["arrays"], arrays, strict=True):
            group, name = key.split(".", 1)
            value = torch.from_numpy(array)  # in the object store: must not be overwritten
            if group == "private":
                private[name] = value
            else:
                payload[name][part] = value
        return BlockResult(block, payload, reply["loss"], reply["finite"], private)

    def _map_chunks(self, message: dict[str, Any], num_chunks: int) -> list[Sums]:
        import ray

        state = ray.put(arrays_of(self._state))
        ranked = [self._received[None]] if self._task.cutter.strategy.rank is not None else []
        calls = (
            Call(chunk, "handle", (json.dumps({**message, "chunk": chunk}), state, ranked))
            for chunk in range(num_chunks)
        )
        sums = {key: json.loads(reply)["sums"] for key, reply in self._actors.map(calls)}
        return [{name: np.array(v, dtype=np.float64) for name, v in sums[chunk].items()} for chunk in range(num_chunks)]
