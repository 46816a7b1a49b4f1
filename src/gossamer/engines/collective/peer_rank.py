"""A rank's share of the peers: their rows stay there, and only rows that cross ranks travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.engines.collective.environment import use_own_device
from gossamer.engines.collective.group import Group, Message
from gossamer.engines.collective.rows import HeldRows, swap_rows_
from gossamer.engines.collective.world import Letter
from gossamer.engines.task import Task
from gossamer.engines.training.mixing import SENT, Mixer, column_sums, squared_distance
from gossamer.engines.training.peer_worker import PeerState, PeerWorker, initial_rows
from gossamer.engines.training.sent_rows import Windows, no_codes, received_rows, sent_rows
from gossamer.errors import storage_errors
from gossamer.profiling import recorder
from gossamer.storage.checkpoint import ROWS, STATE, describe_file, save_arrays
from gossamer.storage.stored_arrays import StoredArrays
from gossamer.threads import one_thread

STAGES = {"train": "train", "mix": "mix", "save": "checkpoint", "read": "checkpoint"}  # all else is to evaluate


class PeerRank:
    """Trains, mixes and measures the peers of one rank; on every rank alike."""

    def __init__(self, task: Task, group: Group, spans: list[list[int]], bounds: list[list[list[int]]]) -> None:
        """Make the initial rows of this rank's peers.

        Args:
            task: task that trains them.
            group: the group of all ranks.
            spans: [low, high] of the peers of each rank.
            bounds: those of the blocks of each rank, aligned to powers of two, over which sums are taken.
        """
        use_own_device(variant.mode.device for variant in task.variants)
        self._task, self._group, self._spans = task, group, spans
        self._low, self._high = spans[group.rank]
        self._bounds, self._num_blocks = bounds[group.rank], sum(map(len, bounds))
        self._first_block = sum(map(len, bounds[: group.rank]))
        chunks = np.arange(group.rank, task.workload.num_evaluation_chunks, group.size)
        task.workload.hold(np.arange(self._low, self._high), chunks)
        x = task.workload.init(task.seed)
        initial = initial_rows(task, x, self._low, self._high)
        state = {name: rows.contiguous().clone() for name, rows in initial.items()}

        def zeros(d: int, dtype: torch.dtype) -> Tensor:
            """Return memory for the rank's peers."""
            return torch.zeros(self._high - self._low, d, dtype=dtype)

        peers = PeerState.of(task, state, zeros, torch.zeros(1, len(x), dtype=x.dtype), self._low)
        codes = no_codes(task, self._high - self._low, x.dtype) if group.size > 1 else {}
        self._peers = replace(peers, codes=codes)
        self._workers = [PeerWorker(phase, self._peers) for phase in task.phases]
        self._mixers = [Mixer(phase) for phase in task.phases]

    def handle(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Do one job, see `World.ask`."""
        with one_thread(), recorder.span(STAGES.get(message["kind"], "evaluate")):
            return self._jobs[message["kind"]](message, arrays)

    @property
    def _jobs(self) -> dict[str, Callable[[Message, list[Tensor]], Letter]]:
        return {
            "train": self._train,
            "mix": self._mix,
            "sum": self._sum,
            "squares": self._squares,
            "rows": self._rows,
            "read": self._read,
            "write": self._write,
            "save": self._save,
            "load": self._load,
            "evaluate": self._evaluate,
        }

    def _train(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Train the peers of ``jobs``, where their rows lie."""
        worker = self._workers[message["phase"]]
        return Letter({"replies": [worker.train(job) for job in message["jobs"]]})

    def _mix(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Exchange what crosses ranks, mix and update; see `mix_message`.

        Args:
            message: see `mix_message`.
            arrays: int16 [n], the number of each peer's variant; none where all hold the whole model.
        """
        task, mixer = self._task.phases[message["phase"]], self._mixers[message["phase"]]
        own, windows = [self._low, self._high], None
        sent = sent_rows(task, self._peers)
        everyone = mixer.laid_out([own], [{f"{SENT}{name}": value for name, value in sent.items()}])
        if self._peers.holders is not None:
            windows = Windows(task, message["round"], arrays[0].tolist())
        packing = None if windows is None else HeldRows(windows)
        _, heard = swap_rows_(
            self._group, self._spans, everyone, lambda *bounds: mixer.heard(message, *bounds), packing
        )
        received, holders = received_rows(task, message, self._peers, everyone, heard, windows)
        updated = mixer.update(message, received, holders, self._peers.state, slice(*own))
        for name, value in updated.items():
            self._peers.state[name].copy_(value)
        return Letter({})

    def _sum(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Return the partial sums of the models, see `column_sums`."""
        return self._added_up(lambda x: column_sums(x))

    def _squares(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Keep the mean of all peers' models; return partial sums of squared distances from it, by ``columns``."""
        mean, columns = arrays[0], message["columns"]
        self._peers.merged[0].copy_(mean)
        return self._added_up(
            lambda x: torch.stack([squared_distance(x[:, slice(*one)], mean[slice(*one)]) for one in columns])
        )

    def _added_up(self, total: Callable[[Tensor], Tensor]) -> Letter:
        tree = TreeSum(self._num_blocks)
        for number, (low, high) in enumerate(self._bounds, self._first_block):
            tree.add(number, total(self._peers.state["x"][low - self._low : high - self._low]))
        found = tree.partial_sums()
        return Letter({"sums": [[level, index] for level, index, _ in found]}, [v for *_, v in found if v is not None])

    def _rows(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Return the models of ``peers``."""
        rows = [peer - self._low for peer in message["peers"]]
        return Letter({}, [self._peers.state["x"][rows].contiguous()])

    def _read(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Return all rows."""
        return Letter({"names": [*self._peers.state]}, [value.contiguous() for value in self._peers.state.values()])

    def _write(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Replace all rows."""
        for name, value in zip(message["names"], arrays, strict=True):
            self._peers.state[name].copy_(value)
        return Letter({})

    def _save(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Write all rows into a file of ``directory``, and sync it."""
        path = Path(message["directory"]) / ROWS.format(self._group.rank)
        with storage_errors(path):
            save_arrays(path, {STATE + name: value for name, value in self._peers.state.items()})
            return Letter({"files": {path.name: describe_file(path)}})

    def _load(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Read all rows from the files of a commit."""
        stored = StoredArrays([Path(path) for path in message["paths"]], message["prefix"])
        for name, value in self._peers.state.items():
            value.copy_(stored.rows(name, self._low, self._high))
        return Letter({})

    def _evaluate(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Return the sums of ``chunks`` for several models [k, d], or for the mean if none are given."""
        x = arrays[0] if arrays else self._peers.merged
        job: dict[str, Any] = {**message["job"], "peers": range(len(x))}
        worker = PeerWorker(self._task.phases[0], PeerState({"x": x}, {}, None, x))
        return Letter({"replies": [worker.evaluate({**job, "chunk": chunk}) for chunk in message["chunks"]]})


def partial_sums(letters: Sequence[Letter]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (level, index, sum) of all ranks, see `TreeSum.partial_sums`."""
    for message, arrays in letters:
        for (level, index), value in zip(message["sums"], arrays, strict=True):
            yield level, index, value
