"""Mixing of peers' rows inside a process: a panel of all peers, or all that a block of them receives."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.aggregate import tree_sum_rows
from gossamer.algorithms.base import Arrays
from gossamer.engines.task import Task
from gossamer.threads import one_thread
from gossamer.topology import BlockAverage, Edges, Mixing

HOLDERS = "holders"  # under which what windows hold travels with the payloads
MERGED_COLUMNS = 1 << 10  # that are summed at a time
SENT, STATE = "sent.", "state."  # prefixes of what a block keeps from training to mixing


class Mixer:
    """Mixes what peers send, and updates their state, in one phase."""

    def __init__(self, task: Task) -> None:
        """Bind the task of the phase."""
        self._task, self._num_peers = task, task.workload.num_clients
        # Of methods they would be cycles, and keep peers' rows until the garbage is collected.
        self._mixing = lru_cache(maxsize=2)(partial(mixing_of, task))
        self._edges = lru_cache(maxsize=4)(partial(_edges_of, task))
        self._personal = task.cutter.layout.mask(task.personal) if task.personal else None

    def update(
        self,
        plan: Mapping[str, Any],
        sent: Arrays,
        holders: Tensor | None,
        state: Arrays,
        rows: slice,
        columns: slice = slice(None),
    ) -> Arrays:
        """Return the new state of the peers `rows`, of the arrays that change.

        Where windows differ, a mean is taken with the weights of those in the closed neighbourhood who hold the
        coordinate, divided by their sum; where nobody there does, a peer keeps what it has.

        Args:
            plan: has ``round``, ``mixing`` and ``lr``, see `RoundPlan`.
            sent: payloads of all n peers, [n, columns]; only those that `rows` hear from, and their own, are read.
            holders: uint8, likewise; None: everybody holds all.
            state: arrays of the peers `rows`, [s, columns].
            columns: which of the model's coordinates these are.
        """
        mixing, algorithm = self._mixing(plan["round"], plan["mixing"]), self._task.algorithm
        own = {name: value[rows] for name, value in sent.items()}
        held, mixed, scalars = None, Arrays(), algorithm.traits.scalars
        if mixing.rows_per_site == 2:
            pairs = mixing.rows(torch.stack([sent["x"], sent["y"]], dim=1), rows.start, rows.stop)
            mixed["x"], mixed["y"] = pairs.unbind(1)
        elif holders is None:
            mixed = {name: _apply(mixing, value, rows) for name, value in sent.items()}
        else:
            mask = holders.to(own[next(iter(own))].dtype)
            nothing = torch.zeros((), dtype=mask.dtype)
            weight = _apply(mixing, mask, rows)
            held = weight > 0
            weight = torch.where(held, weight, 1.0)
            for name, value in sent.items():
                held_value = value if name in scalars else torch.where(holders > 0, value, nothing)
                mixed[name] = _apply(mixing, held_value, rows)
                if algorithm.traits.uplink[name] == "mean" and name not in scalars:
                    mixed[name] = torch.where(held, mixed[name] / weight, own[name])
        inbox = {**mixed, "sent": own, "held": held, "lr": plan["lr"]}
        kept = {name: value for name, value in state.items() if name not in algorithm.traits.uplink}
        updated = algorithm.update(kept, inbox, self._num_peers)
        if self._personal is not None:
            updated["x"] = torch.where(self._personal[columns], own["x"], updated["x"])
        return updated

    def update_without(
        self,
        plan: Mapping[str, Any],
        sent: Arrays,
        holders: Tensor | None,
        state: Arrays,
        absent: tuple[int, Sequence[int]],
        columns: slice = slice(None),
    ) -> Arrays:
        """Return the new state of one peer that some did not reach, [1, columns].

        What the others and the peer itself weigh is divided by its sum; where payloads are added up, what is missing is
        lost.

        Args:
            plan, sent, holders, columns: see `update`.
            state: arrays of all peers, [n, columns].
            absent: the peer, and those that did not reach it.
        """
        peer, missing = absent[0], list(absent[1])
        held = torch.ones(self._num_peers, 1, dtype=torch.uint8) if holders is None else holders.clone()
        held[missing] = 0
        reached = {name: value.index_fill(0, torch.tensor(missing), 0.0) for name, value in sent.items()}
        own = slice(peer, peer + 1)
        return self.update(plan, reached, held, {name: value[own] for name, value in state.items()}, own, columns)

    def update_block(self, plan: Mapping[str, Any], everyone: Arrays, block: Arrays, bounds: Sequence[int]) -> Arrays:
        """Return the new state of a block of peers.

        Args:
            plan: see `update`.
            everyone: payloads of its peers and of those that they hear from, see `laid_out`.
            block: trained rows, see `laid_out`.
            bounds: [low, high] of the block's peers.
        """
        sent = {name: rows for name, rows in everyone.items() if name != HOLDERS}
        state = {name.removeprefix(STATE): rows for name, rows in block.items() if name.startswith(STATE)}
        updated = self.update(plan, sent, everyone.get(HOLDERS), state, slice(*bounds))
        return state | {name: value.contiguous() for name, value in updated.items()}

    def laid_out(self, bounds: Sequence[Sequence[int]], blocks: Sequence[Arrays]) -> Arrays:
        """Return arrays [n, d] of what all peers send, holders included, with the rows of some blocks filled in.

        Args:
            bounds: [low, high] of each block.
            blocks: trained rows: payloads under `SENT`, other state arrays under `STATE`.
        """
        everyone: Arrays = {}
        for (low, high), block in zip(bounds, blocks, strict=True):
            for name, rows in block.items():
                if name.startswith(SENT):
                    key = name.removeprefix(SENT)
                    if key not in everyone:
                        everyone[key] = sparse_zeros((self._num_peers, rows.shape[1]), rows.dtype)
                    everyone[key][low:high] = rows
        return everyone

    def heard(self, plan: Mapping[str, Any], first: int, last: int, low: int, high: int) -> NDArray[np.int64] | None:
        """Return which of the peers low, ..., high - 1 those in first, ..., last - 1 hear from; None: nobody."""
        if plan["mixing"] == "mean":
            return np.arange(low, high)
        edges = self._edges(plan["round"])
        receiver, sender = edges.receiver, edges.sender
        between = (receiver >= first) & (receiver < last) & (sender >= low) & (sender < high)
        found = np.unique(sender[between])
        return found if len(found) else None


def mixing_of(task: Task, round: int, kind: str) -> Mixing:
    """Return by what peers mix in a round; `kind`: see `RoundPlan.mixing`."""
    assert task.topology is not None
    if kind == "mean":
        return BlockAverage(1, task.topology.n, 1)
    mixing = task.topology.mixing(round)
    return mixing.lazy() if task.algorithm.traits.lazy else mixing


def _edges_of(task: Task, round: int) -> Edges:
    assert task.topology is not None
    return task.topology.mixing(round).edges()


def _apply(mixing: Mixing, value: Tensor, rows: slice) -> Tensor:
    if rows.stop - rows.start == mixing.n:
        return mixing.apply(value)
    return mixing.rows(value, rows.start, rows.stop)


def sparse_zeros(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return zeros of which only the pages that are written take memory, until nobody holds the tensor.

    An allocator that keeps freed memory (`keep_freed_memory`) would clear it all anew, and keep it.
    """
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def column_sums(rows: Tensor) -> Tensor:
    """Return the sums over all rows [n, d], as float64 [d], added up pairwise.

    Blocks of rows that are aligned to a power of two, added up by the same tree, give the same bits.
    """
    return tree_sum_rows(rows.to(torch.float64, copy=True)).clone()  # sums overwrite their rows


def merged_model(x: Tensor) -> Tensor:
    """Return the model [d] of rows [n, d]: the server's where there is one, or the mean of all peers'."""
    if len(x) == 1:
        return x[0]
    with one_thread():  # panel by panel, because sums in double precision copy what they are given
        starts = range(0, x.shape[1], MERGED_COLUMNS)
        sums = torch.cat([column_sums(x[:, start : start + MERGED_COLUMNS]) for start in starts])
    return (sums / len(x)).to(x.dtype)


def squared_distance(rows: Tensor, mean: Tensor) -> Tensor:
    """Return ``sum_i |rows[i] - mean|^2``, float64 [], the rows' own added up pairwise, as in `column_sums`."""
    return tree_sum_rows((rows - mean).double().square_().sum(1, keepdim=True))[0].clone()
