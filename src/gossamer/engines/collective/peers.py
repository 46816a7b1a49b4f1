"""Peers on the ranks of a torchrun job: each rank has rows, and rank 0 leads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.aggregate import TreeSum
from gossamer.algorithms.base import Arrays
from gossamer.engines.base import EngineSetup
from gossamer.engines.collective.agreement import digests
from gossamer.engines.collective.peer_rank import PeerRank, partial_sums
from gossamer.engines.collective.world import Letter, World
from gossamer.engines.peers import MERGED, Message, PeerEngine, mix_message
from gossamer.engines.statistics import PREFIX
from gossamer.engines.task import Task
from gossamer.plan import RoundPlan
from gossamer.storage.checkpoint import Files
from gossamer.storage.stored_arrays import StoredArrays

BLOCKS_PER_RANK = 8


class CollectivePeerEngine(PeerEngine):
    """Trains peers on all ranks of a torchrun job, with the bits of the local engine."""

    trains_in_place = True

    def __init__(self, task: Task, x: Tensor, setup: EngineSetup, world: World) -> None:
        """Let all ranks rebuild the task and make their peers' initial rows.

        Args:
            x: [d], the initial model, of which ranks make their own.
            world: all ranks.

        Raises:
            ConfigError: a rank does not see the run directory.
        """
        self._world = world
        if setup.directory is not None:
            world.require_shared(setup.directory)
        blocks = blocks_of_ranks(task.workload.num_clients, world.size)
        spans = [[bounds[0][0], bounds[-1][1]] for bounds in blocks]
        super().__init__(task, x, spans, setup)
        rank, passes = PeerRank(task, world.group, spans, blocks), list(task.workload.passes)
        world.begin(rank, setup, task=digests(task), spans=spans, bounds=blocks, passes=passes)
        self._num_blocks = sum(map(len, blocks))

    def read(self) -> Arrays:
        """Return copies of the state arrays, [n, d]."""
        replies = self._world.ask_all({"kind": "read"})
        names = replies[0].message["names"]
        parts = zip(*(reply.arrays for reply in replies), strict=True)
        return {name: torch.cat(rows) for name, rows in zip(names, parts, strict=True)} | self._statistics.read()

    def held(self) -> Arrays:
        """Return what rank 0 commits, which are no rows."""
        return self._statistics.read()

    def save_rows(self, directory: Path) -> Files:
        """Have each rank write its rows, see `Engine`."""
        replies = self._world.ask_all({"kind": "save", "directory": os.path.abspath(directory)})
        return {name: described for reply in replies for name, described in reply.message["files"].items()}

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays: each rank reads its rows of those that are stored."""
        if isinstance(state, StoredArrays):
            self._statistics.take({name: state[name] for name in state if name.startswith(PREFIX)})
            paths = [os.path.abspath(path) for path in state.paths]
            self._world.ask_all({"kind": "load", "paths": paths, "prefix": state.prefix})
        else:
            arrays = self._statistics.take(state)
            message = {"kind": "write", "names": [*arrays]}
            parts = [[value[low:high].contiguous() for value in arrays.values()] for low, high in self._bounds]
            self._world.ask([Letter(message, of_rank) for of_rank in parts])
        self._squares, self.is_whole = None, True

    def close(self) -> None:
        """Let the other ranks forget the task."""
        self._world.end()

    # ---- inside

    def _train_jobs(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        letters = [Letter({"kind": "train", "phase": plan.phase, "jobs": of_rank}) for of_rank in jobs]
        for reply in self._world.ask(letters):
            yield from reply.message["replies"]

    def _mix(self, plan: RoundPlan) -> None:
        variants = np.zeros(self._num_peers, dtype=np.int16)
        variants[plan.client] = plan.variant
        arrays = [] if self._task.is_whole else [torch.from_numpy(variants)]
        self._world.ask_all(mix_message(plan), arrays)

    def _take_mean(self) -> float:
        self._mean = (self._added_up({"kind": "sum"}) / self._num_peers).to(self._dtype)
        return float(self._added_up({"kind": "squares", "columns": self._columns}, self._mean).sum())

    def _added_up(self, message: Message, *arrays: Tensor) -> Tensor:
        """Add up what the blocks return, by a tree over blocks."""
        tree = TreeSum(self._num_blocks)
        for level, index, value in partial_sums(self._world.ask_all(message, arrays)):
            tree.add(index, value, level=level)
        assert tree.total is not None
        return tree.total

    def _models(self, peers: list[int]) -> list[Tensor]:
        """Return models, [k, d]; nothing for the mean, which all ranks have."""
        if peers == [MERGED]:
            return []
        wanted = [[peer for peer in peers if low <= peer < high] for low, high in self._bounds]
        replies = self._world.ask([Letter({"kind": "rows", "peers": of_rank}) for of_rank in wanted])
        return [torch.cat([reply.arrays[0] for reply in replies])]

    def _map_chunks(self, message: Message, models: list[Tensor], num_chunks: int) -> list[list[Any]]:
        size = self._world.size
        chunks = [list(range(rank, num_chunks, size)) for rank in range(size)]
        letters = [Letter({"kind": "evaluate", "job": message, "chunks": some}, models) for some in chunks]
        replies = [one for reply in self._world.ask(letters) for one in reply.message["replies"]]
        self.hooks.check()
        return [reply["sums"] for reply in sorted(replies, key=lambda reply: int(reply["chunk"]))]


def blocks_of_ranks(num_peers: int, num_ranks: int) -> list[list[list[int]]]:
    """Return [low, high] of the blocks of each rank.

    They are aligned to powers of two: then sums over them have the bits of sums over rows. Each rank has one at least.
    """
    size = 1
    while 2 * size * BLOCKS_PER_RANK * num_ranks <= num_peers:
        size *= 2
    blocks = [[low, min(low + size, num_peers)] for low in range(0, num_peers, size)]
    return [[blocks[number] for number in some] for some in np.array_split(np.arange(len(blocks)), num_ranks)]
