"""Exchange of those rows of n peers that others need to hear, in one message for each pair of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engines.collective.group import Group

Rows = Mapping[str, Tensor]  # {name: [n, width]}, of any dtypes
Heard = Callable[[int, int, int, int], NDArray[np.int64] | None]


def swap_rows_(group: Group, spans: Sequence[Sequence[int]], rows: Rows, heard: Heard) -> tuple[int, Tensor]:
    """Send and receive the rows that cross ranks, and fill in those that this rank's peers hear.

    All ranks call it at the same time, with the same `spans` and the same answers of `heard`.

    Args:
        group: the group of this process.
        spans: [low, high] of each rank, which has the rows low, ..., high - 1.
        rows: arrays of all n peers, with this rank's own rows filled in.
        heard: ``(first, last, low, high) -> peers``: those of low, ..., high - 1 from which any of first, ...,
            last - 1 hears, ascending, or None.

    Returns:
        number of bytes sent, and int64 peers whose rows have come.

    Raises:
        GroupBroken: see `Group.exchange`.
    """
    own, row_bytes = spans[group.rank], sum(value[:1].nbytes for value in rows.values())
    outgoing: dict[int, Tensor] = {}
    incoming: dict[int, Tensor] = {}
    senders: dict[int, Tensor] = {}
    for rank, other in enumerate(spans):
        if rank == group.rank:
            continue
        wanted = heard(*other, *own)
        if wanted is not None:
            outgoing[rank] = _packed(rows, torch.from_numpy(wanted))
        wanted = heard(*own, *other)
        if wanted is not None:
            senders[rank] = torch.from_numpy(wanted)
            incoming[rank] = torch.empty(len(wanted) * row_bytes, dtype=torch.uint8)
    group.exchange(outgoing, incoming)
    for rank, peers in senders.items():
        _unpack_(rows, peers, incoming[rank])
    num_bytes = sum(value.nbytes for value in outgoing.values())
    return num_bytes, torch.cat([torch.empty(0, dtype=torch.int64), *senders.values()])


def _packed(rows: Rows, peers: Tensor) -> Tensor:
    """Return the rows of some peers, array after array, as bytes."""
    return torch.cat([rows[name][peers].view(torch.uint8).reshape(-1) for name in sorted(rows)])


def _unpack_(rows: Rows, peers: Tensor, packed: Tensor) -> None:
    """Write what `_packed` made into the rows of those peers."""
    offset = 0
    for name in sorted(rows):
        like = rows[name]
        end = offset + len(peers) * like[:1].nbytes
        piece = packed[offset:end].clone()  # whose memory is aligned for any dtype
        like[peers] = piece.view(like.dtype).view(len(peers), -1)
        offset = end
