"""The engine of one machine: state in shared memory, blocks trained here or by forked workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gossamer.aggregate.codec_base import BaseCodec
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import EngineSetup, never
from gossamer.engines.local.peers import LocalPeerEngine
from gossamer.engines.local.pool import WorkerPool
from gossamer.engines.memory import shared_zeros
from gossamer.engines.server import FederatedEngine
from gossamer.engines.slots import SPARE_SLOTS, Slots, read_arrays
from gossamer.engines.task import Task, require_devices
from gossamer.engines.training.job import BlockResult, Job
from gossamer.engines.training.worker import Message, Worker
from gossamer.errors import Interrupted
from gossamer.memory import keep_freed_memory
from gossamer.plan import Block, RoundPlan
from gossamer.profiling.coding import RemoteCodec, coder
from gossamer.profiling.sidecar import SideCar
from gossamer.storage.client_store import ClientStore
from gossamer.threads import one_thread
from gossamer.workloads.base import Sums

UPLINK = "uplink"


class LocalEngine(FederatedEngine):
    """Trains a federation on this machine."""

    def __init__(
        self,
        task: Task,
        state: Mapping[str, Tensor],
        store: ClientStore | None,
        setup: EngineSetup,
    ) -> None:
        """Place `state` (arrays [1, d]) in shared memory and start the workers.

        Args:
            store: store of private client state; needed if the algorithm keeps some.
        """
        keep_freed_memory()
        require_devices(task)
        num_workers = setup.workers if sys.platform == "linux" else 0
        self._coder: SideCar | None = None  # which does what codecs do
        if setup.offload is not None and "compress" in setup.offload.stage.kinds:
            uplink = task.communication.uplink
            assert uplink is not None, "it is refused where nothing is compressed"
            self._coder = SideCar(setup.offload, lambda: coder({UPLINK: uplink}), num_processes=setup.workers + 1)
            task = with_uplink(task, RemoteCodec.of(uplink, UPLINK, self._coder.port))
        super().__init__(task, shared(state), store, setup, num_workers)
        self._order = shared(self._order)
        self._slots = Slots(self._make_slots() if num_workers else torch.zeros(0, 0))

        def make_worker(stop: Callable[[], bool] = never) -> Worker:
            """Return what handles messages, in whichever process."""
            return Worker(task, self._state, self._order, self._slots.memory, stop)

        self._local = make_worker(setup.hooks.stop_requested)
        self._pool: WorkerPool | None = None
        if num_workers:  # which change nothing but their slots: any job can be done again
            self._pool = WorkerPool(
                num_workers,
                lambda before_writing: make_worker().handle,
                silent_seconds=setup.straggler_seconds,
                on_event=setup.hooks.report,
            )

    @staticmethod
    def of_peers(task: Task, x: Tensor, setup: EngineSetup) -> LocalPeerEngine:
        """Return the engine of a task that has a topology instead of a server."""
        require_devices(task)
        return LocalPeerEngine(task, x, setup)

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._coder is not None:
            self._coder.close()
        super().close()

    # ---- inside

    def _make_slots(self) -> Tensor:
        """Reserve the workers' slots; pages that are never written take no memory."""
        num_slots, num_floats = 2 * self.num_workers + SPARE_SLOTS, self._floats_of_a_slot()
        return shared_zeros(num_slots * num_floats, self._state["x"].dtype).view(num_slots, num_floats)

    def _begin(self) -> None:
        self._slots.begin(self._trees.values())

    def _train_blocks(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        jobs = (self._job(plan, block) for block in blocks)
        if self._pool is None:
            for job in jobs:
                if self.hooks.stop_requested():
                    return
                try:
                    with one_thread():
                        result = self._local.train(job, self._client_state(job))
                except Interrupted:
                    return
                yield result
            return
        by_address = {(block.variant, block.first_tile): block for block in blocks}
        for reply in self._pool.map(map(self._message, jobs), self.hooks.stop_requested, self._write_client_state):
            block, slot = by_address[reply["variant"], reply["first_tile"]], self._slots.memory[reply["slot"]]
            arrays = read_arrays(slot, reply["extents"])
            self._slots.give_back(reply["slot"])
            yield self._block_result(block, reply, arrays)

    def _message(self, job: Job) -> Message:
        """Write a job's client state into a free slot and describe the job."""
        number = self._slots.take()
        assert number is not None, "there are more slots than jobs under way"
        message = {"kind": "train", "slot": number} | job.message()
        self._write_client_state(message)
        return message

    def _write_client_state(self, message: Message) -> None:
        """Write the client state that a message's job reads into its slot."""
        if message["kind"] != "train" or not self._phase.client_arrays:
            return
        slot, taken = self._slots.memory[message["slot"]], 0
        for rows in self._client_state(Job.of_message(message)).values():
            slot[taken : taken + rows.numel()].copy_(rows.view(-1))
            taken += rows.numel()

    def _map_chunks(self, message: Message, num_chunks: int) -> list[Sums]:
        """Handle one message per chunk, and return the sums in the order of the chunks."""
        jobs: Iterable[Message] = ({**message, "chunk": chunk} for chunk in range(num_chunks))
        replies = []
        if self._pool is None:
            for job in jobs:
                self.hooks.check()
                with one_thread():
                    replies.append(self._local.handle(job))
        else:
            replies += self._pool.map(jobs, self.hooks.must_stop)
            self.hooks.check()
        replies.sort(key=lambda reply: int(reply["chunk"]))
        return [{name: np.array(v, dtype=np.float64) for name, v in reply["sums"].items()} for reply in replies]


def with_uplink(task: Task, codec: BaseCodec) -> Task:
    """Return the same task, in which this codec compresses what clients send."""
    told = replace(task, communication=replace(task.communication, uplink=codec))
    return told.with_modes([one.mode for one in told.variants])


def shared(arrays: Mapping[str, Tensor]) -> Arrays:
    """Return copies of arrays in memory that forked processes share."""
    return {
        name: shared_zeros(value.numel(), value.dtype).view(value.shape).copy_(value) for name, value in arrays.items()
    }
