"""Exchange of those rows of n peers that others need to hear, in one message for each pair of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engines.collective.group import Extent, Group
from gossamer.engines.training.sent_rows import Windows

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


class HeldRows:
    """What the windows of a round hold of the rows, array after array, peer after peer."""

    def __init__(self, windows: Windows) -> None:
        """Bind the windows of a round."""
        self._windows = windows

    def num_bytes(self, rows: Rows, peers: Tensor) -> int:
        """Return the bytes of what the windows hold, see `Packing`."""
        return sum(
            value.itemsize * self._windows.length(name, value[peer], peer)
            for name, value in rows.items()
            for peer in peers.tolist()
        )

    def pack(self, rows: Rows, peers: Tensor) -> Tensor:
        """Return what the windows hold as bytes, see `Packing`."""
        return torch.cat(
            [
                self._windows.read(name, rows[name][peer], peer).view(torch.uint8)
                for name in sorted(rows)
                for peer in peers.tolist()
            ]
        )

    def unpack_(self, rows: Rows, peers: Tensor, packed: Tensor) -> None:
        """Write what `pack` made; what a window does not hold stays as it is, see `Packing`."""
        offset = 0
        for name in sorted(rows):
            for peer in peers.tolist():
                row = rows[name][peer]
                end = offset + row.itemsize * self._windows.length(name, row, peer)
                self._windows.write(name, row, peer, packed[offset:end].clone().view(row.dtype))
                offset = end


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
