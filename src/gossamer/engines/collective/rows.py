"""Exchange of those rows of n peers that others need to hear, in one message for each pair of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engines.collective.group import Extent, Group
from gossamer.engines.task import Task, Variant

Rows = Mapping[str, Tensor]  # {name: [n, width]}, of any dtypes
Heard = Callable[[int, int, int, int], NDArray[np.int64] | None]


class Packing(Protocol):
    """How rows of peers become bytes that travel."""

    def num_bytes(self, rows: Rows, peers: Tensor) -> int:
        """Return how many bytes the rows of some peers, int64 [k], are."""

    def pack(self, rows: Rows, peers: Tensor) -> Tensor:
        """Return the rows of some peers as uint8 [num_bytes]."""

    def unpack_(self, rows: Rows, peers: Tensor, packed: Tensor) -> None:
        """Write what `pack` made into the rows of those peers."""


class WholeRows:
    """All coordinates of the rows, array after array."""

    def num_bytes(self, rows: Rows, peers: Tensor) -> int:
        """Return the bytes of the rows, see `Packing`."""
        return len(peers) * sum(value[:1].nbytes for value in rows.values())

    def pack(self, rows: Rows, peers: Tensor) -> Tensor:
        """Return the rows as bytes, see `Packing`."""
        return torch.cat([rows[name][peers].view(torch.uint8).reshape(-1) for name in sorted(rows)])

    def unpack_(self, rows: Rows, peers: Tensor, packed: Tensor) -> None:
        """Write what `pack` made, see `Packing`."""
        offset = 0
        for name in sorted(rows):
            like = rows[name]
            end = offset + len(peers) * like[:1].nbytes
            piece = packed[offset:end].clone()  # whose memory is aligned for any dtype
            like[peers] = piece.view(like.dtype).view(len(peers), -1)
            offset = end


class Windows:
    """What the windows of a round hold of the rows, peer after peer; both sides know the windows."""

    def __init__(self, task: Task, round: int, variants: Sequence[int]) -> None:
        """Bind a round.

        Args:
            task: task of the phase.
            round: number of the round.
            variants: number of the variant of each of the n peers.
        """
        self._task, self._round, self._variants = task, round, variants

    def num_bytes(self, rows: Rows, peers: Tensor) -> int:
        """Return the bytes of what the windows hold, see `Packing`."""
        held = [self._variant(peer).layout.num_parameters for peer in peers.tolist()]
        return sum(
            value.itemsize * (len(held) * value.shape[1] if self._is_scalar(name) else sum(held))
            for name, value in rows.items()
        )

    def pack(self, rows: Rows, peers: Tensor) -> Tensor:
        """Return what the windows hold as bytes, see `Packing`."""
        return torch.cat(
            [
                (rows[name][peer] if self._is_scalar(name) else self._cut_out(rows[name][peer], peer)).view(torch.uint8)
                for name in sorted(rows)
                for peer in peers.tolist()
            ]
        )

    def unpack_(self, rows: Rows, peers: Tensor, packed: Tensor) -> None:
        """Write what `pack` made; what a window does not hold stays as it is, see `Packing`."""
        offset = 0
        for name in sorted(rows):
            like = rows[name]
            for peer in peers.tolist():
                layout = self._variant(peer).layout
                length = like.shape[1] if self._is_scalar(name) else layout.num_parameters
                piece = packed[offset : offset + length * like.itemsize].clone().view(like.dtype)
                offset += length * like.itemsize
                if self._is_scalar(name):
                    like[peer] = piece
                else:
                    row = like.new_zeros(layout.d)
                    row[layout.coordinates] = piece
                    self._task.cut(self._variant(peer), self._round, peer).write(like[peer], row)

    def holders(self, dtype: torch.dtype, width: int, peers: Tensor) -> Tensor:
        """Return which coordinates the windows of some peers hold: ones and zeros, [k, width]."""
        found = torch.zeros(len(peers), width, dtype=dtype)
        for row, peer in zip(found, peers.tolist(), strict=True):
            variant = self._variant(peer)
            ones = torch.ones(variant.layout.d, dtype=dtype)
            self._task.cut(variant, self._round, peer).write(row, ones)
        return found

    def _variant(self, peer: int) -> Variant:
        return self._task.variants[self._variants[peer]]

    def _is_scalar(self, name: str) -> bool:
        return name in self._task.scalars

    def _cut_out(self, row: Tensor, peer: int) -> Tensor:
        layout = self._variant(peer).layout
        out = self._task.cut(self._variant(peer), self._round, peer).read(row, row.new_zeros(layout.d))
        return out[layout.coordinates]


def swap_rows_(
    group: Group, spans: Sequence[Sequence[int]], rows: Rows, heard: Heard, packing: Packing | None = None
) -> tuple[int, Tensor]:
    """Send and receive the rows that cross ranks, and fill in those that this rank's peers hear.

    All ranks call it at the same time, with the same `spans` and the same answers of `heard`.

    Args:
        group: the group of this process.
        spans: [low, high] of each rank, which has the rows low, ..., high - 1.
        rows: arrays of all n peers, with this rank's own rows filled in.
        heard: ``(first, last, low, high) -> peers``: those of low, ..., high - 1 from which any of first, ...,
            last - 1 hears, ascending, or None.
        packing: what of the rows travels; None: all of it.

    Returns:
        number of bytes sent, and int64 peers whose rows have come.

    Raises:
        GroupBroken: a rank is gone, or did not answer in time.
    """
    own, packing = spans[group.rank], packing or WholeRows()
    outgoing, incoming, senders = list[tuple[int, Tensor]](), list[Extent](), dict[int, Tensor]()
    for rank in group.others:
        wanted = heard(*spans[rank], *own)
        if wanted is not None:
            outgoing.append((rank, packing.pack(rows, torch.from_numpy(wanted))))
        wanted = heard(*own, *spans[rank])
        if wanted is not None:
            senders[rank] = torch.from_numpy(wanted)
            incoming.append((rank, packing.num_bytes(rows, senders[rank]), torch.uint8))
    with group.exchange(outgoing, incoming) as received:
        for peers, packed in zip(senders.values(), received, strict=True):
            packing.unpack_(rows, peers, packed)
    num_bytes = sum(value.nbytes for _, value in outgoing)
    return num_bytes, torch.cat([torch.empty(0, dtype=torch.int64), *senders.values()])
