"""The stacked simulator of peers: rows of all peers in shared memory, trained in blocks of rows, mixed in panels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import NO_HOOKS, EngineHooks, Record
from gossamer.engines.local.pool import WorkerPool
from gossamer.engines.memory import keep_freed_memory, shared_zeros
from gossamer.engines.peers import distance_record, job_message, peers_record, rows_of_block
from gossamer.engines.task import WHOLE, Task, Variant
from gossamer.engines.training.batches import sample_bytes
from gossamer.engines.training.peer_worker import Message, PeerState, PeerWorker
from gossamer.plan import Block, RoundPlan, TrainReport
from gossamer.threads import one_thread
from gossamer.topology.streaming import panels
from gossamer.workloads.base import Sums, add_sums

SMALL_FLOATS = 1 << 17  # of a state that one process mixes sooner than it could tell others to


class PeerEngine:
    """Trains peers on this machine; see `peerwork.PeerWorker` for what is done with a block and with a panel."""

    def __init__(
        self,
        task: Task,
        x: Tensor,
        *,
        workers: int,
        block_size: int | None = None,
        hooks: EngineHooks = NO_HOOKS,
    ) -> None:
        """Place the peers' state in shared memory and start the workers.

        Args:
            task: what trains; it has a topology.
            x: [d], the initial model of all peers, unless the workload has a `peer_init`.
            workers: processes; 0 trains in this process. Changes no bits.
            block_size: peers a block, or None for a size that suits. Changes no bits.
            hooks: see `EngineHooks`.
        """
        assert task.topology is not None
        keep_freed_memory()
        self._task, self._block_size, self._num_peers = task, block_size, task.topology.n
        initial = task.algorithm.init(x[None])
        state = {name: self._place(row.shape[1], row.dtype) for name, row in initial.items()}
        scalars = task.algorithm.traits.scalars
        outbox = {
            name: self._place(1 if name in scalars else len(x), x.dtype)
            for name in task.algorithm.traits.uplink
            if name not in state
        }
        holders = None if task.is_whole else self._place(len(x), torch.uint8)
        merged = shared_zeros(len(x), x.dtype)[None]
        self._peers = PeerState(state, outbox, holders, merged)
        self.write({name: row.expand(self._num_peers, -1) for name, row in initial.items()})
        peer_init: Callable[[int], Tensor] | None = getattr(task.workload, "peer_init", None)
        if peer_init is not None:
            self.write(task.algorithm.init(peer_init(task.seed)))
        self._columns = [[one.start, one.stop] for one in panels(self._num_peers, len(x), x.dtype.itemsize)]
        self._sample_bytes = sample_bytes(task.workload)
        self._local = PeerWorker(task, self._peers)
        self._pool: WorkerPool | None = None
        if workers and sys.platform == "linux":
            self._pool = WorkerPool(workers, lambda: PeerWorker(task, self._peers).handle)
        self.is_whole, self.hooks = True, hooks
        self._squares: float | None = None

    def _place(self, d: int, dtype: torch.dtype) -> Tensor:
        return shared_zeros(self._num_peers * d, dtype).view(self._num_peers, d)

    # ---- the two verbs

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train all peers where their rows lie; a request to stop is heeded after the round."""
        self.is_whole = False
        blocks = [block for variant in self._task.variants for block in self._blocks(plan, variant)]
        by_first = {block.rows.start: block for block in blocks}
        for reply in self._map((job_message(plan, block) for block in blocks), small=False):
            yield TrainReport(by_first[reply["first"]].rows, reply["loss"], reply["finite"])

    def exchange(self, plan: RoundPlan) -> None:
        """Mix and update, panel by panel; scalars last."""
        message = {"kind": "mix", "round": plan.round, "mixing": plan.mixing, "lr": plan.lr}
        small = self._peers.state["x"].numel() <= SMALL_FLOATS
        for columns in (self._columns, [[0, 0]] if self._task.algorithm.traits.scalars else []):
            for _ in self._map(({**message, "columns": one} for one in columns), small=small):
                pass
        self.is_whole, self._squares = True, None

    # ---- evaluation and state

    def evaluate(self, variant: int, round: int) -> Sums:
        """Evaluate the merged model, the mean of all peers', or its sub-model of a variant at `round`."""
        self._merge()
        return self._evaluate([-1], variant, round)[0]

    def measure(self, num_peers: int) -> Record:
        """Return how far peers are from their mean, and what they reach by themselves.

        ``consensus_distance`` is the root mean square distance from the mean, ``sqrt(1/n sum_i |x_i - mean|^2)``;
        ``<metric>_peers`` holds mean, min and max over `num_peers` evenly spaced peers.
        """
        workload = self._task.workload
        own: Callable[[Tensor], dict[str, float]] | None = getattr(workload, "peer_metrics", None)
        record = distance_record(self._merge(), self._num_peers)
        if own is not None:
            record |= own(self._peers.state["x"])
        count = min(num_peers, self._num_peers)
        if not count:
            return record
        chosen = (np.arange(count) * self._num_peers // count).tolist()
        return record | peers_record([workload.metrics(sums) for sums in self._evaluate(chosen, WHOLE, 0)])

    def merged(self) -> Tensor:
        """Return the mean of all peers' models, [d]."""
        self._merge()
        return self._peers.merged[0].clone()

    def read(self) -> Arrays:
        """Return the state arrays themselves, [n, d]: a copy of many peers would not fit."""
        return dict(self._peers.state)

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays."""
        for name, value in state.items():
            self._peers.state[name].copy_(value)
        self._squares = None

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    # ---- inside

    def _blocks(self, plan: RoundPlan, variant: Variant) -> list[Block]:
        rows = plan.variant_rows(variant.index)
        size = self._block_size or rows_of_block(self._task, variant, self._peers.merged.itemsize, self._sample_bytes)
        starts = range(rows.start, rows.stop, size)
        return [Block(variant.index, 0, size, slice(low, min(low + size, rows.stop))) for low in starts]

    def _map(self, jobs: Iterable[Message], *, small: bool) -> Iterator[Message]:
        """Handle messages here or in the workers; yield the replies in any order."""
        if self._pool is not None and not small:
            yield from self._pool.map(jobs, lambda: False)
            return
        for job in jobs:
            with one_thread():
                reply = self._local.handle(job)
            yield reply

    def _merge(self) -> float:
        """Take the mean of all peers' models, once after each exchange; return the squared distances from it."""
        if self._squares is None:
            jobs = ({"kind": "measure", "columns": one} for one in self._columns)
            replies = self._map(jobs, small=self._peers.state["x"].numel() <= SMALL_FLOATS)
            self._squares = sum(each["squares"] for each in sorted(replies, key=lambda reply: int(reply["first"])))
        return self._squares

    def _evaluate(self, peers: list[int], variant: int, round: int) -> list[Sums]:
        """Return the sums over all chunks of the test data of each of `peers`; -1 is the merged model."""
        workload, where = self._task.workload, {"peers": peers, "variant": variant, "round": round}
        statistics = self._over_chunks({"kind": "statistics"} | where, workload.num_statistics_chunks)
        listed: list[dict[str, Any]] = [{name: value.tolist() for name, value in one.items()} for one in statistics]
        return self._over_chunks({"kind": "evaluate", "statistics": listed} | where, workload.num_evaluation_chunks)

    def _over_chunks(self, message: Message, num_chunks: int) -> list[Sums]:
        """Handle one message per chunk, and return each peer's sums, added up in the order of the chunks."""
        jobs = ({**message, "chunk": chunk} for chunk in range(num_chunks))
        replies = sorted(self._map(jobs, small=False), key=lambda reply: int(reply["chunk"]))
        sums = [
            [{name: np.array(value, dtype=np.float64) for name, value in one.items()} for one in reply["sums"]]
            for reply in replies
        ]
        return [add_sums([chunk[number] for chunk in sums]) for number in range(len(message["peers"]))]
