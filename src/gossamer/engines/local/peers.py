"""The stacked simulator of peers: rows of all peers in shared memory, trained in blocks of rows, mixed in panels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.aggregate.codec_base import Codec
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.engines.base import EngineSetup
from gossamer.engines.local.pool import WorkerPool
from gossamer.engines.memory import shared_zeros
from gossamer.engines.peers import Message, PeerEngine, mix_message
from gossamer.engines.task import Task
from gossamer.engines.training.peer_worker import PeerState, PeerWorker, initial_rows
from gossamer.memory import keep_freed_memory
from gossamer.plan import RoundPlan, TrainReport
from gossamer.profiling.coding import Codecs, RemoteCodec, coder
from gossamer.profiling.sidecar import Handler, Port, SideCar
from gossamer.threads import one_thread

SMALL_FLOATS = 1 << 17  # of a state that one process mixes sooner than it could tell others to


def codecs_of(task: Task) -> Codecs:
    """Return the codecs of what peers send, of all phases."""
    return {name_of(phase, name): one for phase in task.phases for name, one in phase.algorithm.traits.codecs.items()}


def name_of(phase: Task, payload: str) -> str:
    """Return the name of a codec among those of all phases."""
    return f"{phase.phase}.{payload}"


def remote(port: Port) -> Callable[[Task, str, Codec], Codec]:
    """Return what has the side-car at a port do the work of a codec, see `PeerWorker`."""
    return lambda task, payload, codec: RemoteCodec.of(codec, name_of(task, payload), port)


class LocalPeerEngine(PeerEngine):
    """Trains peers on this machine; see `PeerWorker` for what is done with a block and with a panel."""

    trains_in_place = True

    def __init__(self, task: Task, x: Tensor, setup: EngineSetup) -> None:
        """Place the peers' state in shared memory and start the workers.

        Args:
            x: [d], the initial model of all peers, unless the workload has a `peer_init`.
        """
        keep_freed_memory()
        num_peers = task.workload.num_clients
        super().__init__(task, x, [[0, num_peers]], setup)

        def zeros(d: int, dtype: torch.dtype) -> Tensor:
            """Return shared memory for all peers."""
            return shared_zeros(num_peers * d, dtype).view(num_peers, d)

        initial = initial_rows(task, x, 0, num_peers)
        state = {name: zeros(rows.shape[1], rows.dtype).copy_(rows) for name, rows in initial.items()}
        self._peers = PeerState.of(task, state, zeros, shared_zeros(len(x), x.dtype)[None], 0)
        self._mean = self._peers.merged[0]
        self._car: SideCar | None = None  # which mixes, or does what codecs do
        self._mixes_elsewhere, options = False, dict[str, Any]()
        if setup.offload is not None:
            self._mixes_elsewhere = "mix" in setup.offload.stage.kinds
            make_handler = self._mixer(task) if self._mixes_elsewhere else lambda: coder(codecs_of(task))
            self._car = SideCar(setup.offload, make_handler, setup.hooks.check, setup.workers + 1)
            if not self._mixes_elsewhere:
                options["of_codec"] = remote(self._car.port)
        self._handle = PeerWorker.handler(task, self._peers, stop=setup.hooks.must_stop, **options)
        self._pool: WorkerPool | None = None
        if setup.workers and sys.platform == "linux":
            self._pool = WorkerPool(
                setup.workers,
                lambda before_writing: PeerWorker.handler(task, self._peers, before_writing=before_writing, **options),
                silent_seconds=setup.straggler_seconds,
                on_event=setup.hooks.report,
            )

    def read(self) -> Arrays:
        """Return the state arrays themselves, [n, d]: a copy of many peers would not fit."""
        return self._peers.state | self._statistics.read()

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays."""
        for name, value in self._statistics.take(state).items():
            self._peers.state[name].copy_(value)
        self._squares, self.is_whole = None, True

    def close(self) -> None:
        """Stop the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        if self._car is not None:
            self._car.close()

    # ---- inside

    @property
    def _is_small(self) -> bool:
        return self._peers.state["x"].numel() <= SMALL_FLOATS

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Train all peers; in a run that is replayed, some begin with the state of another one."""
        if self.hooks.neighbours is not None:
            taken = self.hooks.neighbours.taken.get((plan.round, plan.phase), {})
            for rows in self._peers.state.values():
                rows[list(taken)] = rows[list(taken.values())]
        return super().train(plan)

    def _train_jobs(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        return self._map(jobs[0])

    def _mix(self, plan: RoundPlan) -> None:
        """Mix and update, panel by panel; scalars last."""
        message, algorithm = mix_message(plan), self._task.phases[plan.phase].algorithm
        if self.hooks.neighbours is not None:
            missing = self.hooks.neighbours.missing.get((plan.round, plan.phase), {})
            message["missing"] = [[peer, list(others)] for peer, others in missing.items()]
        if self._car is not None and self._mixes_elsewhere:
            self._mix_elsewhere(self._car, message, algorithm)
            return
        for columns in (self._columns, [[0, 0]] if algorithm.traits.scalars else []):
            for _ in self._map(({**message, "columns": one} for one in columns), here=self._is_small):
                pass

    def _mixer(self, task: Task) -> Callable[[], Handler]:
        """Return what makes the side-car's handler of `mix_message`s: rows lie in memory that it shares."""

        def make_handler() -> Handler:
            """Bind the task in the side-car."""
            handle = PeerWorker.handler(task, self._peers)
            return lambda message, arrays: (handle(message) | {"back_bytes": message["num_bytes"]}, [])

        return make_handler

    def _mix_elsewhere(self, car: SideCar, message: Message, algorithm: Algorithm) -> None:
        """Have the side-car mix all panels; rows cross the link both ways, as `PeerWorker.mix` counts them."""
        traits, itemsize = algorithm.traits, self._mean.element_size()
        for low, high in [*self._columns, *([[0, 0]] if traits.scalars else [])]:
            widths = (1 if name in traits.scalars else high - low for name in traits.uplink)
            size = self._num_peers * itemsize * sum(widths)
            car.submit({**message, "columns": [low, high], "num_bytes": size}, num_bytes=size)
        car.drain()

    def _take_mean(self) -> float:
        replies = self._map(({"kind": "measure", "columns": one} for one in self._columns), here=self._is_small)
        return float(sum(each["squares"] for each in sorted(replies, key=lambda reply: int(reply["first"]))))

    def _models(self, peers: list[int]) -> None:
        """Return nothing: workers have them."""

    def _map_chunks(self, message: Message, models: Any, num_chunks: int) -> list[list[Any]]:
        replies = self._map({**message, "chunk": chunk} for chunk in range(num_chunks))
        return [reply["sums"] for reply in sorted(replies, key=lambda reply: int(reply["chunk"]))]

    def _map(self, jobs: Iterable[Message], *, here: bool = False) -> Iterator[Message]:
        """Handle messages in the workers, if there are any, or here; yield the replies in any order."""
        if self._pool is not None and not here:
            yield from self._pool.map(jobs, self.hooks.must_stop)
            self.hooks.check()
            return
        for job in jobs:
            self.hooks.check()
            with one_thread():
                reply = self._handle(job)
            yield reply
