"""Mixings that are cheaper than a sparse matrix: shifts, matchings and block averages.

Sparse and joint mixings are in `sparse.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.topology import streaming
from gossamer.topology.base import Edges, Floats, Integers, check_num_edges, sorted_edges
from gossamer.topology.streaming import Streaming, arrivals, block_size, row_blocks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Shift(Streaming):
    """A circulant: peer j sends to j + u for every offset u, modulo n.

    Attributes:
        offsets: ascending, distinct, each in 1..n-1.
        weights: receiver's weight of each offset's message; its own weight is 1 - sum.
    """

    kind = "shift"
    n: int
    offsets: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def self_weight(self) -> float:
        """Diagonal of W, the same for all peers."""
        return 1.0 - sum(self.weights)

    @property
    def is_symmetric(self) -> bool:
        """Whether each offset has a mirror image of equal weight."""
        pairs = dict(zip(self.offsets, self.weights, strict=True))
        return all(pairs.get(self.n - u) == w for u, w in pairs.items())

    @property
    def max_degree(self) -> int:
        """Number of offsets."""
        return len(self.offsets)

    def first_column(self) -> Floats:
        """Return column 0 of W, float64 [n], whose Fourier transform is the spectrum."""
        column = np.zeros(self.n)
        column[list(self.offsets)] = self.weights
        column[0] = self.self_weight
        return column

    def edges(self) -> Edges:
        """Return n edges for each offset."""
        check_num_edges(self.n * len(self.offsets))
        receiver = np.repeat(np.arange(self.n), len(self.offsets))
        sender = (receiver - np.tile(np.array(self.offsets, dtype=np.int64), self.n)) % self.n
        return sorted_edges(receiver, sender, np.tile(np.array(self.weights, dtype=np.float64), self.n))

    def recv_ranks(self, i: int) -> list[int]:
        """Return i - u for every offset u."""
        return sorted((self._check_peer(i) - u) % self.n for u in self.offsets)

    def send_ranks(self, i: int) -> list[int]:
        """Return i + u for every offset u."""
        return sorted((self._check_peer(i) + u) % self.n for u in self.offsets)

    def lazy(self, share: float = 0.5) -> Shift:
        """Scale the weights."""
        return replace(self, weights=tuple(w * share for w in self.weights))

    def transposed(self) -> Shift:
        """Negate the offsets."""
        pairs = sorted(((self.n - u, w) for u, w in zip(self.offsets, self.weights, strict=True)))
        return replace(self, offsets=tuple(u for u, _ in pairs), weights=tuple(w for _, w in pairs))

    def _write(self, x: Tensor, out: Tensor) -> None:
        step = min(self.offsets[0], self.n - self.offsets[0])
        most = block_size(x.shape[1] * x.itemsize, streaming.WALK_BYTES)
        if len(self.offsets) > 1 or step < most:
            super()._write(x, out)
            return
        # From a block to the one that hears of it, which finds its senders in the cache.
        for first in range(0, step, most):
            size = min(most, step - first)
            for start in range(first, self.n, step):
                stop = min(start + size, self.n)
                self._write_rows(x, start, stop, out[start:stop])

    def _write_rows(self, x: Tensor, lo: int, hi: int, out: Tensor) -> None:
        import torch

        if len(self.offsets) == 1:
            for a, b, source in arrivals(self.n, self.offsets[0], lo, hi):
                torch.lerp(x[a:b], x[source : source + b - a], self.weights[0], out=out[a - lo : b - lo])
            return
        for start, stop in row_blocks(x, lo, hi):
            torch.mul(x[start:stop], self.self_weight, out=out[start - lo : stop - lo])
            for u, w in zip(self.offsets, self.weights, strict=True):
                for a, b, source in arrivals(self.n, u, start, stop):
                    out[a - lo : b - lo].add_(x[source : source + b - a], alpha=w)

    def _identity(self) -> tuple[Any, ...]:
        return self.offsets, self.weights


@dataclass(frozen=True, eq=False)
class Matching(Streaming):
    """Pairs of peers that move towards each other; a peer without a partner idles.

    Attributes:
        partner: int64 [n], an involution; ``partner[i] == i`` where i has none.
        weight: weight of the partner's row.
    """

    kind = "matching"
    is_symmetric = True
    partner: Integers
    weight: float

    @property
    def n(self) -> int:  # type: ignore[override]
        """Number of peers."""
        return len(self.partner)

    @property
    def max_degree(self) -> int:
        """1, or 0 if no peer has a partner."""
        return int(bool((self.partner != np.arange(self.n)).any()))

    def edges(self) -> Edges:
        """Return both directions of each pair."""
        receiver = np.flatnonzero(self.partner != np.arange(self.n))
        return Edges(receiver, self.partner[receiver], np.full(len(receiver), self.weight))

    def recv_ranks(self, i: int) -> list[int]:
        """Return the partner, if there is one."""
        partner = int(self.partner[self._check_peer(i)])
        return [] if partner == i else [partner]

    def send_ranks(self, i: int) -> list[int]:
        """Return the partner, if there is one."""
        return self.recv_ranks(i)

    def lazy(self, share: float = 0.5) -> Matching:
        """Scale the weight."""
        return replace(self, weight=self.weight * share)

    def transposed(self) -> Matching:
        """Return this mixing, which is symmetric."""
        return self

    def _write_rows(self, x: Tensor, lo: int, hi: int, out: Tensor) -> None:
        import torch

        partner = torch.from_numpy(self.partner).to(x.device)
        for a, b in row_blocks(x, lo, hi, streaming.STREAM_BYTES):
            mixed = out[a - lo : b - lo]
            torch.index_select(x, 0, partner[a:b], out=mixed)
            torch.lerp(x[a:b], mixed, self.weight, out=mixed)

    def _identity(self) -> tuple[Any, ...]:
        return self.partner, self.weight


@dataclass(frozen=True)
class BlockAverage(Streaming):
    """Peers that differ only in one mixed-radix digit average fully: peer = (outer digit, digit of size, inner digit).

    Attributes:
        outer, size, inner: with outer * size * inner = n.
        weight: weight of the average in the new row: 1, or less if lazy.
    """

    kind = "block"
    is_symmetric = True
    outer: int
    size: int
    inner: int
    weight: float = 1.0

    @property
    def n(self) -> int:  # type: ignore[override]
        """Number of peers."""
        return self.outer * self.size * self.inner

    @property
    def max_degree(self) -> int:
        """Number of others in the group."""
        return self.size - 1

    @cached_property
    def _strides(self) -> Integers:
        return np.arange(self.size, dtype=np.int64) * self.inner

    def _group(self, i: int | Integers) -> Any:
        """Return the first member of the group of peer i."""
        return i - (i // self.inner % self.size) * self.inner

    def edges(self) -> Edges:
        """Return all pairs of each group."""
        check_num_edges(self.n * (self.size - 1))
        everyone = np.arange(self.n, dtype=np.int64)
        sender = (self._group(everyone)[:, None] + self._strides[None, :]).reshape(-1)
        receiver = np.repeat(everyone, self.size)
        others = sender != receiver
        receiver, sender = receiver[others], sender[others]
        return Edges(receiver, sender, np.full(len(receiver), self.weight / self.size))

    def recv_ranks(self, i: int) -> list[int]:
        """Return the others of the group."""
        members: list[int] = (self._group(self._check_peer(i)) + self._strides).tolist()
        return [j for j in members if j != i]

    def send_ranks(self, i: int) -> list[int]:
        """Return the others of the group."""
        return self.recv_ranks(i)

    def self_weights(self) -> Floats:
        """Return the diagonal, without listing the edges."""
        return np.full(self.n, 1.0 - self.weight + self.weight / self.size)

    def lazy(self, share: float = 0.5) -> BlockAverage:
        """Scale the weight."""
        return replace(self, weight=self.weight * share)

    def transposed(self) -> BlockAverage:
        """Return this mixing, which is symmetric."""
        return self

    def _write(self, x: Tensor, out: Tensor) -> None:
        import torch

        shape = (self.outer, self.size, self.inner, x.shape[1])
        blocks, mixed = x.view(shape), out.view(shape)
        cells = block_size(self.size * x.shape[1] * x.itemsize)  # groups at a time
        width = min(cells, self.inner)
        for o in range(0, self.outer, cells // width):
            outer = slice(o, o + cells // width)
            for i in range(0, self.inner, width):
                inner = slice(i, i + width)
                own = blocks[outer, :, inner]
                torch.lerp(own, _mean(own), self.weight, out=mixed[outer, :, inner])

    def _write_rows(self, x: Tensor, lo: int, hi: int, out: Tensor) -> None:
        import torch

        groups, index = np.unique(self._group(np.arange(lo, hi, dtype=np.int64)), return_inverse=True)
        members = torch.from_numpy(groups[:, None] + self._strides[None, :]).to(x.device)
        means = _mean(x[members.reshape(-1)].view(len(groups), self.size, x.shape[1])).squeeze(1)
        torch.lerp(x[lo:hi], means[torch.from_numpy(index).to(x.device)], self.weight, out=out)

    def _identity(self) -> tuple[Any, ...]:
        return self.outer, self.size, self.inner, self.weight


def _mean(x: Tensor) -> Tensor:
    """Return the mean over axis 1, kept; halves are added recursively, so that bits do not depend on shapes."""
    count = size = x.shape[1]
    total = x[:, : count - count // 2].clone()
    while count > 1:
        half = count // 2
        total[:, :half].add_(x[:, count - half : count])
        x, count = total, count - half
    return total[:, :1].div_(size)
