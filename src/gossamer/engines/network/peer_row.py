"""The row of one peer: trained, mixed and evaluated where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.network.gate import Specs
from gossamer.engines.peers import Message
from gossamer.engines.task import Task
from gossamer.engines.training.mixing import SENT, Mixer
from gossamer.engines.training.peer_worker import PeerState, PeerWorker, initial_rows
from gossamer.engines.training.rows import row_norms
from gossamer.engines.training.sent_rows import Windows, no_codes, received_rows, sent_rows
from gossamer.profiling import recorder
from gossamer.threads import one_thread


class PeerRow:
    """What a peer holds, and what it does with it; the bits are those of the same peer among all others.

    Attributes:
        state: the algorithm's state, [1, d] each, [1, 1] of scalars.
    """

    def __init__(self, task: Task, number: int) -> None:
        """Make the initial row.

        Args:
            task: task that trains it.
            number: of the peer.
        """
        self._task, self._number = task, number
        task.workload.hold(np.array([number]), np.arange(task.workload.num_evaluation_chunks))
        x = task.workload.init(task.seed)
        initial = initial_rows(task, x, number, number + 1)
        self.state = {name: rows.contiguous().clone() for name, rows in initial.items()}

        def zeros(d: int, dtype: torch.dtype) -> Tensor:
            """Return memory for the peer."""
            return torch.zeros(1, d, dtype=dtype)

        peers = PeerState.of(task, self.state, zeros, torch.zeros(1, len(x), dtype=x.dtype), number)
        self._peers = replace(peers, codes=no_codes(task, 1, x.dtype))
        self._workers = [PeerWorker(phase, self._peers) for phase in task.phases]
        self._mixers = [Mixer(phase) for phase in task.phases]

    def train(self, job: Message) -> Message:
        """Train, see `PeerWorker.train`.

        What others' updates are like is not known here: one that is very large is dropped if the row was not zero.
        """
        with one_thread(), recorder.span("train"):
            reply = self._workers[job["phase"]].train(job)
            if reply["again"]:
                is_zero = not any(row_norms(self.state))
                reply = self._workers[job["phase"]].train(job | {"max_norm": torch.inf if is_zero else 0.0})
        return reply | {"again": False}

    def payload(self, message: Message) -> Arrays:
        """Return copies of what the peer sends, [1, width] each: of its window, what that holds.

        Args:
            message: see `mix_message`, with ``variants``, the number of each peer's, where windows differ.
        """
        task, windows = self._task.phases[message["phase"]], self._windows(message)
        rows = sent_rows(task, self._peers)
        if windows is None:
            return {name: row.clone() for name, row in rows.items()}
        return {name: windows.read(name, row[0], self._number)[None].clone() for name, row in rows.items()}

    def specs(self, message: Message, sender: int) -> Specs:
        """Return dtypes and shapes of what another peer sends."""
        windows, rows = self._windows(message), sent_rows(self._task.phases[message["phase"]], self._peers)
        return {
            name: (row.dtype, (1, row.shape[1] if windows is None else windows.length(name, row[0], sender)))
            for name, row in rows.items()
        }

    def senders(self, message: Message) -> list[int]:
        """Return the other peers from whom this one hears in a phase; `message`: see `mix_message`."""
        found = self._heard(message, self._number, self._number + 1, 0, self._task.workload.num_clients)
        return [peer for peer in found if peer != self._number]

    def receivers(self, message: Message) -> list[int]:
        """Return the other peers who hear from this one."""
        own, others = self._number, range(self._task.workload.num_clients)
        return [peer for peer in others if peer != own and self._heard(message, peer, peer + 1, own, own + 1)]

    def mix(self, message: Message, received: Mapping[int, Arrays]) -> None:
        """Mix and update.

        Args:
            message: see `mix_message`.
            received: payloads of those from whom this peer hears; where some are missing, what the others and this one
                weigh is divided by its sum, or, where payloads are added up, what is missing is lost.
        """
        mixer, own = self._mixers[message["phase"]], self._number
        task, windows = self._task.phases[message["phase"]], self._windows(message)
        sent = {f"{SENT}{name}": row for name, row in sent_rows(task, self._peers).items()}
        with one_thread(), recorder.span("mix"):
            everyone = mixer.laid_out([[own, own + 1]], [sent])
            for peer, arrays in received.items():
                for name, row in arrays.items():
                    if windows is None:
                        everyone[name][peer] = row[0]
                    else:
                        windows.write(name, everyone[name][peer], peer, row[0])
            heard = torch.tensor(sorted(received), dtype=torch.int64)
            rows, holders = received_rows(task, message, self._peers, everyone, heard, windows)
            if holders is None and len(received) < len(self.senders(message)):
                holders = torch.zeros(task.workload.num_clients, 1, dtype=torch.uint8)
                holders[[own, *received]] = 1
            updated = mixer.update(message, rows, holders, self.state, slice(own, own + 1))
            for name, value in updated.items():
                self.state[name].copy_(value)

    def evaluate(self, message: Message) -> Message:
        """Return the sums of one chunk of data for the peer's model, see `PeerWorker.evaluate`."""
        x = self.state["x"]
        worker = PeerWorker(self._task.phases[0], PeerState({"x": x}, {}, None, x))
        with one_thread():
            return worker.evaluate(message)

    def _heard(self, message: Message, *bounds: int) -> list[int]:
        found = self._mixers[message["phase"]].heard(message, *bounds)
        return [] if found is None else [int(peer) for peer in found]

    def _windows(self, message: Message) -> Windows | None:
        if self._peers.holders is None:
            return None
        return Windows(self._task.phases[message["phase"]], message["round"], message["variants"])
