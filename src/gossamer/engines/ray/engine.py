"""The engine of a cluster: the server in this process, blocks of clients on Ray actors."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engines.aggregation import RemoteAggregation
from gossamer.engines.base import EngineSetup
from gossamer.engines.ray.actor_pool import AHEAD, CPU, GPU, ActorPool, Call
from gossamer.engines.ray.client_actor import ClientActor
from gossamer.engines.ray.cluster import (
    arrays_of,
    is_running,
    make_actor,
    num_cpus,
    num_gpus,
    put_data,
    start_ray,
    watch_daemons,
)
from gossamer.engines.ray.peers import RayPeerEngine
from gossamer.engines.ray.recording import recipe_entry
from gossamer.engines.ray.shared_memory import SharedMemory
from gossamer.engines.server import MAX_BLOCK_ROWS_ONE_BY_ONE, ORDER, FederatedEngine
from gossamer.engines.slots import SPARE_SLOTS
from gossamer.engines.task import Task, Variant
from gossamer.engines.training.compression import decoded_downlink
from gossamer.engines.training.job import BlockResult, Job
from gossamer.errors import ConfigError
from gossamer.memory import keep_freed_memory
from gossamer.plan import Block, RoundPlan, TrainReport
from gossamer.storage.client_store import ClientStore
from gossamer.workloads.base import Sums


class RayEngine(FederatedEngine):
    """Trains a federation on Ray actors, with the bits of the local engine."""

    is_remote = True

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Tensor],
        store: ClientStore | None,
        setup: EngineSetup,
    ) -> None:
        """Start Ray or join a cluster, and start actors of one CPU each.

        Where modes name another device than "cpu", there is one more actor for every GPU of the cluster; these alone
        train the capacities of such modes.

        Raises:
            EngineError: Ray does not start, or there is no such cluster.
            ConfigError: a capacity is to be trained on a GPU, and the cluster has none.
        """
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        keep_freed_memory()
        is_own = setup.address is None and not is_running()
        elsewhere = None  # forked before Ray has threads in this process
        if setup.offload is not None:
            elsewhere, setup = RemoteAggregation(task, state, setup.offload, setup), replace(setup, offload=None)
        self._leave = start_ray(setup.address, setup.workers or None)
        self._adapts = not setup.workers
        owned = {name: value.clone() for name, value in state.items()}
        is_on_gpu = any(variant.mode.is_on_gpu for variant in task.variants)
        self._num_gpus = num_gpus() if is_on_gpu else 0
        if is_on_gpu and not self._num_gpus:
            self._leave()
            raise ConfigError(
                "engine.modes trains on another device than cpu, but Ray finds no GPU: join a cluster that has some, or"
                " use cpu"
            )
        super().__init__(task, owned, store, setup, setup.workers or self._num_free_cpus())
        self._elsewhere = elsewhere
        self._memory: SharedMemory | None = None
        if is_own and sys.platform == "linux":
            self._memory = SharedMemory(owned, AHEAD * self.num_workers + SPARE_SLOTS, self._floats_of_a_slot())
            self._state = self._memory.state
        arguments = json.dumps({**setup.recipe, **recipe_entry()}), put_data(task.workload)
        self._actors = ActorPool(
            make_actor(ClientActor, *arguments),
            self.num_workers,
            straggler_seconds=setup.straggler_seconds,
            on_event=setup.hooks.report,
            check=watch_daemons(),
            others={GPU: (make_actor(ClientActor, *arguments, num_gpus=1), self._num_gpus)},
        )
        self._received: dict[int | None, Any] = {}
        self._order_there: Any = {}  # or a reference to the round's order

    @staticmethod
    def of_peers(task: Task, x: Tensor, setup: EngineSetup) -> RayPeerEngine:
        """Return the engine of a task that has a topology instead of a server."""
        return RayPeerEngine(task, x, setup)

    def close(self) -> None:
        """Stop the actors, and the Ray that was started for them."""
        self._actors.stop()
        self._received, self._order_there = {}, {}
        self._leave()
        if self._memory is not None:
            self._memory.close()
        super().close()

    def _num_free_cpus(self) -> int:
        """Return how many CPUs are left for actors without a GPU; one at least, to evaluate."""
        return max(1, num_cpus() - self._num_gpus)

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train on as many actors as there are CPUs by now, and cut blocks for them, see `FederatedEngine`."""
        if self._adapts:
            self._actors.resize(self._num_free_cpus())
            self.num_workers = len(self._actors)
        return super().train(plan)

    def _begin(self) -> None:
        self._received = {}
        self._put_order()
        if self._memory is not None:
            self._memory.begin(self._trees.values())

    def _train_blocks(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        by_key = {(block.variant, block.rows.start): block for block in blocks}
        by_kind: dict[str, list[Block]] = {}
        for block in blocks:
            by_kind.setdefault(GPU if self._task.variants[block.variant].mode.is_on_gpu else CPU, []).append(block)
        calls = {kind: self._calls(plan, of_kind) for kind, of_kind in by_kind.items()}
        for key, (reply, arrays) in self._actors.map(calls, self.hooks.stop_requested):
            described = json.loads(reply)
            if "slot" in described:
                assert self._memory is not None
                values = self._memory.take_back(described)
            else:
                values = [torch.from_numpy(array) for array in arrays]
            yield self._block_result(by_key[key], described, values)

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace state arrays; actors read the order of channels anew if that is among them."""
        super().write(state)
        if any(name.startswith(ORDER) for name in state):
            self._put_order()

    def _put_order(self) -> None:
        import ray

        self._order_there = ray.put(arrays_of(self._order)) if self._order else {}

    def _blocks_of(self, plan: RoundPlan, variant: Variant) -> list[Block]:
        """Cut the last rows of a round finely and the first ones coarsely: every block sends one sum."""
        blocks = super()._blocks_of(plan, variant)
        if self._block_size or variant.mode.stacked or not variant.shares_window:
            return blocks
        rows, found, low, size = plan.variant_rows(variant.index), list[Block](), 0, 1
        while (left := rows.stop - rows.start - low) > 0:
            if len(found) % self.num_workers == 0:  # every actor has got one of the size before
                size = 1 << (min(max(1, left // self.num_workers), MAX_BLOCK_ROWS_ONE_BY_ONE).bit_length() - 1)
            found.append(Block(variant.index, low // size, size, slice(rows.start + low, rows.start + low + size)))
            low += size
        return found

    def _calls(self, plan: RoundPlan, blocks: Iterable[Block]) -> Iterator[Call]:
        shared = self._memory
        for block in blocks:
            job, variant = self._job(plan, block), self._task.variants[block.variant]
            is_cut = variant.shares_window
            message = job.message() | {"is_cut": is_cut, "memory": shared and shared.address, "slot": None}
            rows = self._client_state(job)
            rest = [] if shared else [self._put(job, is_cut=is_cut)], self._order_there, arrays_of(rows)
            first = message | {"slot": shared and shared.slots.take()}
            cost = float(job.steps.sum()) * variant.layout.d
            key = (block.variant, block.rows.start)
            # Another attempt gets no slot: the one before may still write to it.
            yield Call(key, "train", (json.dumps(first), *rest), cost=cost, again=(json.dumps(message), *rest))

    def _put(self, job: Job, *, is_cut: bool) -> Any:
        """Return a reference to what the clients of a capacity start from, put into the object store once a round."""
        key = job.block.variant if is_cut else None
        if key not in self._received:
            import ray

            names = self._phase.algorithm.traits.downlink if is_cut else self._state
            rows = {name: self._state[name] for name in names or ()}
            if is_cut:
                rows = decoded_downlink(self._phase, self._state, rows, job.round, job.phase)
            cut = self._task.cut(self._task.variants[job.block.variant], job.round, order=self._order)
            if is_cut and not cut.is_full:
                rows = {name: cut.read(row[0], row.new_zeros(cut.sub.d))[None] for name, row in rows.items()}
            self._received[key] = ray.put(arrays_of(rows))
        return self._received[key]

    def _owns(self, value: Tensor | None) -> bool:
        """Say whether a part of a payload lies in a slot; what lies in the object store must not be overwritten."""
        return value is not None and self._memory is not None and self._memory.slots.holds(value)

    def _map_chunks(self, message: dict[str, Any], num_chunks: int) -> list[Sums]:
        import ray

        message["memory"] = self._memory and self._memory.address
        state: Any = {} if self._memory else ray.put(arrays_of(self._state))
        calls = (
            Call(chunk, "handle", (json.dumps({**message, "chunk": chunk}), state, self._order_there))
            for chunk in range(num_chunks)
        )
        replies = self._actors.map(calls, self.hooks.must_stop)
        sums = {key: json.loads(reply)["sums"] for key, reply in replies}
        self.hooks.check()
        return [{name: np.array(v, dtype=np.float64) for name, v in sums[chunk].items()} for chunk in range(num_chunks)]
