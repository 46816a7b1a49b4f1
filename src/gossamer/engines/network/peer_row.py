"""The row of one peer: trained, mixed and evaluated where it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.aggregate.codec_base import Draws
from gossamer.algorithms.base import Arrays
from gossamer.engines.network.gate import Specs
from gossamer.engines.peers import Message
from gossamer.engines.task import Task
from gossamer.engines.training.mixing import HOLDERS, SENT, Mixer, sparse_zeros
from gossamer.engines.training.peer_worker import PeerState, PeerWorker, initial_rows
from gossamer.engines.training.rows import row_norms
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
        d = task.cutter.layout.num_parameters
        codes = {
            name: torch.zeros(1, codec.row_bytes(d, x.itemsize), dtype=torch.uint8)
            for phase in task.phases
            if phase.is_whole
            for name, codec in phase.algorithm.traits.codecs.items()
        }
        self._peers = replace(peers, codes=codes)
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

    def payload(self, phase: int) -> Arrays:
        """Return copies of what the peer sends, [1, width] each."""
        task = self._task.phases[phase]
        sent = {name: self._peers.payload(name) for name in task.algorithm.traits.uplink}
        sent |= {name: code for name, code in self._peers.codes.items() if name in task.algorithm.traits.codecs}
        if self._peers.holders is not None:
            sent[HOLDERS] = self._peers.holders
        return {name: row.clone() for name, row in sent.items()}

    def specs(self, phase: int) -> Specs:
        """Return dtypes and shapes of what every peer sends."""
        return {name: (row.dtype, tuple(row.shape)) for name, row in self.payload(phase).items()}

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
        sent = self.payload(message["phase"])
        with one_thread(), recorder.span("mix"):
            everyone = mixer.laid_out([[own, own + 1]], [{f"{SENT}{name}": row for name, row in sent.items()}])
            for peer, arrays in received.items():
                for name, row in arrays.items():
                    everyone[name][peer] = row[0]
            peers = torch.tensor(sorted(received), dtype=torch.int64)
            for name in self._task.phases[message["phase"]].algorithm.traits.codecs:
                if name in self._peers.codes:
                    everyone[name] = self._decoded(message, name, everyone[name][peers], peers)
            holders = everyone.pop(HOLDERS, None)
            if holders is None and len(received) < len(self.senders(message)):
                holders = torch.zeros(self._task.workload.num_clients, 1, dtype=torch.uint8)
                holders[[own, *received]] = 1
            updated = mixer.update(message, everyone, holders, self.state, slice(own, own + 1))
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

    def _decoded(self, message: Message, name: str, codes: Tensor, peers: Tensor) -> Tensor:
        """Return the payload of all n peers, [n, d], with this peer's and those received filled in."""
        task, own = self._task.phases[message["phase"]], self._peers.payload(name)
        layout = task.cutter.layout
        draws: Any = Draws(seed=task.seed, round=message["round"], phase=message["phase"], peers=peers.numpy())
        rows = own.new_zeros(len(peers), layout.d)
        codec = task.algorithm.traits.codecs[name]
        rows[:, layout.coordinates] = codec.decode(codes, layout.num_parameters, own.dtype, **draws)
        found = sparse_zeros((task.workload.num_clients, layout.d), own.dtype)
        found[self._number], found[peers] = own[0], rows
        return found
