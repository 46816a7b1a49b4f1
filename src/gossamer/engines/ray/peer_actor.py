"""What runs inside a Ray actor that trains and mixes blocks of peers.

The rows of peers live in the object store and never change there: a call reads some and returns new ones, so whoever
repeats it gets the same.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.collective.group import Group, GroupBroken, Member
from gossamer.engines.collective.rows import swap_rows_
from gossamer.engines.ray.client_actor import prepare, tensors
from gossamer.engines.training.mixing import column_sums, squared_distance
from gossamer.engines.training.peer_worker import PeerState, PeerWorker

Rows = Mapping[str, NDArray[Any]]
HOLDERS = "holders"  # travels with the payloads where windows differ


class PeerActor:
    """Trains and mixes blocks of peers; one torch thread."""

    def __init__(self, recipe: str, data: list[Any]) -> None:
        """Rebuild the task, see `prepare`."""
        self._task = prepare(recipe, data)
        self._scalars = self._task.algorithm.traits.scalars
        self._needs = lru_cache(maxsize=4)(self._make_needs)
        empty = PeerState({}, {}, None, torch.zeros(1, self._task.workload.layout.d))
        self._mixer = PeerWorker(self._task, empty)
        self._group: Group | None = None

    def ready(self) -> bool:
        """Answer, once the task is built."""
        return True

    def init(self, low: int, high: int) -> Any:
        """Return "" and the initial state of the peers low, ..., high - 1."""
        algorithm, workload = self._task.algorithm, self._task.workload
        peer_init = getattr(workload, "peer_init", None)
        if peer_init is None:
            one = algorithm.init(workload.init(self._task.seed)[None])
            return "", {name: row.expand(high - low, -1).numpy().copy() for name, row in one.items()}
        state = algorithm.init(peer_init(self._task.seed)[low:high])
        return "", {name: rows.numpy() for name, rows in state.items()}

    def train(self, message: str, state: Rows) -> Any:
        """Train one block of peers.

        Args:
            message: JSON: ``jobs``, as `PeerWorker.train` takes them, of all peers low, ..., high - 1; ``bounds``, of
                all blocks; ``block``, the number of this one; ``round`` and ``mixing``; ``pieces``, whether there are
                to be any.
            state: rows of the block.

        Returns:
            JSON of the jobs' replies; the block's rows of payloads and state; and for each block of the others, what it
            needs to hear: its payloads' rows and their numbers.
        """
        described = json.loads(message)
        (low, high), d = described["bounds"][described["block"]], self._task.workload.layout.d
        algorithm = self._task.algorithm
        arrays = {name: torch.from_numpy(rows.copy()) for name, rows in state.items()}
        x = arrays["x"]
        outbox = {
            name: x.new_zeros(high - low, 1 if name in self._scalars else d)
            for name in algorithm.traits.uplink
            if name not in arrays
        }
        holders = None if self._task.is_whole else torch.zeros(high - low, d, dtype=torch.uint8)
        peers = PeerState(arrays, outbox, holders, x[:1], low)
        worker = PeerWorker(self._task, peers)
        replies = [worker.train(job) for job in described["jobs"]]
        sent = {name: peers.payload(name) for name in algorithm.traits.uplink}
        if holders is not None:
            sent[HOLDERS] = holders
        kept = {f"state.{name}": value for name, value in arrays.items() if name not in sent}
        block = {f"sent.{name}": value for name, value in sent.items()} | kept
        pieces = []
        for number, (first, last) in enumerate(described["bounds"] if described["pieces"] else ()):
            wanted = self._needed(described, first, last, low, high) if number != described["block"] else None
            pieces.append(None if wanted is None else _piece(sent, wanted, low))
        return json.dumps(replies), {name: value.numpy() for name, value in block.items()}, *pieces

    def mix(self, message: str, block: Rows, *pieces: Rows | None) -> Any:
        """Return "" and the new rows of a block's state.

        Args:
            message: as of `train`, without jobs, and with ``lr``.
            block: what `train` returned for the block.
            pieces: what the other blocks' peers send to this one.
        """
        described = json.loads(message)
        bounds = described["bounds"][described["block"]]
        everyone = self._laid_out([bounds], [block])
        for piece in pieces:
            if piece is not None:
                for name, rows in everyone.items():
                    rows[torch.from_numpy(piece["peers"])] = torch.from_numpy(piece[name])
        return "", self._mixed(described, everyone, block, bounds)

    def mix_collectively(self, message: str, *blocks: Rows) -> Any:
        """Mix several blocks while other actors mix theirs, exchanging rows by a process group.

        Args:
            message: JSON: ``bounds``, ``round``, ``mixing`` and ``lr``, as of `mix`; ``numbers`` of the blocks;
                ``spans``, see `swap_rows_`; ``member``, see `Member`, or null: then nothing is done.
            blocks: what `train` returned for them.

        Returns:
            "", or why the group broke; the new rows of each block's state, or None.
        """
        described = json.loads(message)
        bounds = [described["bounds"][number] for number in described["numbers"]]
        everyone = self._laid_out(bounds, blocks)
        try:
            group = self._joined(described["member"])
            swap_rows_(group, described["spans"], everyone, lambda *where: self._needed(described, *where))
        except GroupBroken as error:
            self._leave()
            return str(error), *[None] * len(blocks)
        mixed = (self._mixed(described, everyone, *each) for each in zip(blocks, bounds, strict=True))
        return "", *mixed

    def _joined(self, member: list[Any] | None) -> Group:
        """Return the group of a member, in which this process stays until it is given another.

        Raises:
            GroupBroken: this actor is a replacement, or the others did not come in time.
        """
        if member is None:
            raise GroupBroken("a member was replaced")
        if self._group is None or self._group.member != Member(*member):
            self._leave()
            self._group = Group(Member(*member))
        return self._group

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _laid_out(self, bounds: Sequence[Sequence[int]], blocks: Sequence[Rows]) -> Arrays:
        """Return arrays of what all peers send, holders included, with the rows of some blocks filled in."""
        everyone: Arrays = {}
        for (low, high), block in zip(bounds, blocks, strict=True):
            for name, rows in block.items():
                if name.startswith("sent."):
                    key = name.removeprefix("sent.")
                    if key not in everyone:
                        zeros = _sparse_zeros((self._task.workload.num_clients, rows.shape[1]), rows.dtype)
                        everyone[key] = torch.from_numpy(zeros)
                    everyone[key][low:high] = torch.from_numpy(rows)
        return everyone

    def _mixed(
        self, described: dict[str, Any], everyone: Arrays, block: Rows, bounds: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Return the new rows of a block's state, given what its peers and those that they hear from send."""
        sent = {name: rows for name, rows in everyone.items() if name != HOLDERS}
        state = tensors({n.removeprefix("state."): value for n, value in block.items() if n.startswith("state.")})
        updated = self._mixer.mix_rows(described, sent, everyone.get(HOLDERS), state, slice(*bounds))
        merged = state | {name: value.contiguous() for name, value in updated.items()}
        return {name: value.numpy() for name, value in merged.items()}

    def sums(self, block: Rows) -> NDArray[np.float64]:
        """Return the sum of a block's models, float64 [d], see `column_sums`."""
        return column_sums(torch.from_numpy(block["x"])).numpy()

    def squares(self, block: Rows, mean: NDArray[Any], columns: list[list[int]]) -> NDArray[np.float64]:
        """Return the squared distances of a block's models from their mean, float64 [panels of columns, 1]."""
        x, center = torch.from_numpy(block["x"]), torch.from_numpy(mean)
        found = [squared_distance(x[:, slice(*one)], center[slice(*one)]) for one in columns]
        return torch.stack(found).numpy()

    def rows(self, block: Rows, places: list[int]) -> NDArray[Any]:
        """Return some of a block's models."""
        return block["x"][places]

    def evaluate(self, message: str, models: NDArray[Any]) -> str:
        """Return the sums of one chunk of data for several models [k, d], see `PeerWorker.evaluate`."""
        x = torch.from_numpy(models)
        worker = PeerWorker(self._task, PeerState({"x": x}, {}, None, x[:1]))
        return json.dumps(worker.evaluate(json.loads(message)))

    def _needed(
        self, described: Mapping[str, Any], first: int, last: int, low: int, high: int
    ) -> NDArray[np.int64] | None:
        """Return which of the peers low, ..., high - 1 those in first, ..., last - 1 hear from; None: nobody."""
        if described["mixing"] == "mean":
            return np.arange(low, high)
        receiver, sender = self._needs(described["round"])
        heard = (receiver >= first) & (receiver < last) & (sender >= low) & (sender < high)
        found = np.unique(sender[heard])
        return found if len(found) else None

    def _make_needs(self, round: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return receivers and senders of all messages of a round."""
        assert self._task.topology is not None
        edges = self._task.topology.mixing(round).edges()
        return edges.receiver, edges.sender


def _piece(sent: Mapping[str, Tensor], peers: NDArray[np.int64], low: int) -> dict[str, NDArray[Any]]:
    """Return the rows of some peers of a block that begins with peer `low`."""
    places = torch.from_numpy(peers - low)
    return {"peers": peers} | {name: value[places].numpy() for name, value in sent.items()}


def _sparse_zeros(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros of which only the pages that are written take memory, until nobody holds the array.

    An allocator that keeps freed memory (`keep_freed_memory`) would clear it all anew, and keep it.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE)
    return np.frombuffer(pages, dtype).reshape(shape)
