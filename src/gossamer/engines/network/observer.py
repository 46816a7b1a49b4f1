"""Who collects what peers become: it trains nothing, and evaluates, logs and commits their rows as any engine does."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import GONE, EngineSetup
from gossamer.engines.network.addresses import AddressBook
from gossamer.engines.network.lanes import When
from gossamer.engines.network.peer import STATE, place_of
from gossamer.engines.network.peer_links import PeerLinks
from gossamer.engines.network.peer_processes import PeerProcesses
from gossamer.engines.peers import Message, PeerEngine
from gossamer.engines.task import Task
from gossamer.engines.training.peer_worker import PeerState, PeerWorker, initial_rows
from gossamer.errors import Interrupted
from gossamer.memory import keep_freed_memory
from gossamer.plan import STOPPED, RoundPlan, TrainReport
from gossamer.storage.checkpoint import commits_in
from gossamer.storage.runlog import CHECKPOINTS
from gossamer.threads import one_thread

LOOPBACK = "127.0.0.1:0"
POLL_SECONDS = 0.5
GATHER_SECONDS = 0.05


class NetworkObserver(PeerEngine):
    """Holds a copy of all peers' rows, which they send after each phase; without addresses it starts the peers."""

    def __init__(self, task: Task, x: Tensor, setup: EngineSetup, addresses: Path | None) -> None:
        """Make the initial rows, and listen.

        Args:
            x: [d], the initial model.
            addresses: see `AddressBook`; None: all peers are processes that are started here.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        keep_freed_memory()
        num_peers = task.workload.num_clients
        super().__init__(task, x, [[0, num_peers]], setup)
        secret = secrets.token_hex(16) if addresses is None else ""
        self._setup, self._processes = setup, None if addresses else PeerProcesses(task, secret, setup)
        book = AddressBook(addresses or self._folder, num_peers)
        listen = setup.address or (LOOPBACK if addresses is None else book.of(None) or LOOPBACK)
        place = place_of(task, setup, None, listen, book, secret)
        initial = initial_rows(task, x, 0, num_peers)
        self._state = {name: rows.contiguous().clone() for name, rows in initial.items()}
        merged = torch.zeros(1, len(x), dtype=x.dtype)
        self._mean = merged[0]
        self._worker = PeerWorker(task.phases[0], PeerState(self._state, {}, None, merged))
        self._specs = {name: (rows.dtype, (1, rows.shape[1])) for name, rows in self._state.items()}
        self._links = PeerLinks(place, STATE, setup.hooks)
        self._is_begun = self._is_done = self._is_given = False
        self._num_rounds = place.num_rounds
        options = setup.recipe["config"]["peers"]
        waits = options["absent_neighbour"] == "wait"
        self._patience_seconds = inf if waits else options["patience_seconds"]  # after the first of them
        try:
            if addresses is not None:
                setup.hooks.report("listening", address=self._links.address)
                setup.hooks.tell(f"listening on {self._links.address} for {num_peers} peers")
            elif not commits_in(place.directory / CHECKPOINTS):
                self._start((0, 0), book)
        except BaseException:
            self.close()
            raise

    def _start(self, at: When, book: AddressBook | None = None) -> None:
        """Start the peers, and wait until all that are in a book listen.

        Raises:
            Interrupted: a stop was requested before.
            EngineError: one ends with an error.
        """
        assert self._processes is not None
        self._processes.start(at, self._state if self._is_given else None)
        self._is_begun = True
        while book is not None:
            listening = {peer for peer in range(self._num_peers) if book.of(peer) is not None}
            if len(listening) == self._num_peers:
                return
            if self.hooks.stop_requested():
                raise Interrupted("stopped while it waited for peers")
            self._processes.look_after(listening)
            time.sleep(GATHER_SECONDS)

    @property
    def _folder(self) -> Path:
        assert self._processes is not None
        return self._processes.folder

    # ---- the two verbs

    def train(self, plan: RoundPlan) -> Iterator[TrainReport]:
        """Wait until all peers have trained and mixed; what came of it is kept for `exchange`."""
        at = plan.round, plan.phase
        if not self._is_begun and self._processes is not None:
            self._start(at)
        self._links.begin(at, dict.fromkeys(range(self._num_peers), self._specs))
        row_of = {int(peer): row for row, peer in enumerate(plan.client)}
        waiting, until = set(row_of), None
        while waiting and not self.hooks.stop_requested():
            self._links.wait_for_some(at, waiting, POLL_SECONDS)
            if until is None and len(waiting) < len(row_of):
                until = time.monotonic() + self._patience_seconds
            if gone := {peer for peer in waiting if self._links.is_past(peer, at) or time.monotonic() > (until or inf)}:
                yield from self._missing(row_of, gone, GONE)
                waiting -= gone
            came = self._links.collected(at)
            for peer in sorted(waiting & came.keys()):
                body, row = came[peer].body, row_of[peer]
                yield TrainReport(slice(row, row + 1), body["loss"], body["finite"], norm=body["norm"])
                waiting.discard(peer)
            if self._processes is not None:
                self._processes.look_after(self._links.present)
        yield from self._missing(row_of, waiting, STOPPED)

    @staticmethod
    def _missing(row_of: Mapping[int, int], peers: set[int], reason: str) -> Iterator[TrainReport]:
        for peer in sorted(peers):
            yield TrainReport.of_missing(slice(row_of[peer], row_of[peer] + 1), reason)

    def _mix(self, plan: RoundPlan) -> None:
        for peer, message in self._links.collected((plan.round, plan.phase)).items():
            for name, row in message.arrays.items():
                self._state[name][peer] = row[0]
        is_last = plan.phase + 1 == self._task.num_phases
        self._is_done = is_last and plan.round + 1 == self._num_rounds

    def _train_jobs(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        """Train nothing: peers do."""
        return iter(())

    # ---- state

    def read(self) -> Arrays:
        """Return the state arrays themselves, [n, d]."""
        return self._state | self._statistics.read()

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays; processes that are started later begin with them."""
        for name, value in self._statistics.take(state).items():
            self._state[name].copy_(value)
        self._squares, self._is_given = None, True

    def close(self) -> None:
        """Tell the peers that nothing more is needed, and end those that were started here."""
        if self._is_done:
            self._links.finish()
        self._links.close("the observer has ended")
        if self._processes is not None:
            self._processes.close()

    # ---- inside

    def _take_mean(self) -> float:
        with one_thread():
            replies = [self._worker.measure({"columns": one}) for one in self._columns]
        return float(sum(reply["squares"] for reply in replies))

    def _models(self, peers: list[int]) -> None:
        """Return nothing: the rows are here."""

    def _map_chunks(self, message: Message, models: Any, num_chunks: int) -> list[list[Any]]:
        replies = []
        for chunk in range(num_chunks):
            self.hooks.check()
            with one_thread():
                replies.append(self._worker.evaluate({**message, "chunk": chunk}))
        return [reply["sums"] for reply in replies]
