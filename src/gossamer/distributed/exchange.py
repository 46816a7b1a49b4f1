"""Means of neighbours: sent and received at once, and added up by their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gossamer.distributed.links import Exchange
from gossamer.distributed.neighbors import Neighbors
from gossamer.distributed.world import World

HALVES = (torch.float16, torch.bfloat16)  # dtypes whose sums are taken in float32
_PIECE = 1 << 16  # numbers that are mixed at a time, so that they stay in cache
_CPU = torch.device("cpu")


class Mixed:
    """A mixing under way: the sum of this process's own tensors and its neighbours', by their weights."""

    def __init__(self, world: World, rows: Sequence[Tensor], near: Neighbors, wire: torch.dtype | None) -> None:
        """Send and receive.

        Args:
            world: the group.
            rows: contiguous, [1, width] each, or [2, width] where two rows are mixed jointly; not to be changed before
                `wait` returns.
            near: from whom to hear, and to whom to send.
            wire: dtype of what travels; None: that of the rows.
        """
        self._rows, self._near = rows, near
        messages = [row[near.sent_row].to(wire or row.dtype) for row in rows]
        outgoing = [
            (rank, value if factor == 1.0 else value * factor)
            for rank, factor in near.destinations.items()
            for value in messages
        ]
        incoming = [(rank, len(value), value.dtype) for rank in near.sources for value in messages]
        self._exchange = Exchange(world.links, outgoing, incoming, rows[0].device if rows else _CPU)

    def wait(self) -> list[Tensor]:
        """Return the weighted sums as new tensors of the shapes and dtypes of the rows.

        Neighbours are added by ascending rank, whoever answers first; halves in single precision.

        Raises:
            GroupBroken: see `Exchange`.
        """
        with self._exchange as received:
            number = len(self._rows)
            of_ranks = [received[first : first + number] for first in range(0, len(received), number)]
            heard = dict(zip(self._near.sources, of_ranks, strict=True))
            return [
                _weighted(own, {rank: values[place] for rank, values in heard.items()}, self._near)
                for place, own in enumerate(self._rows)
            ]


def _weighted(own: Tensor, heard: Mapping[int, Tensor], near: Neighbors) -> Tensor:
    """Return the weighted sums of rows, [rows, width], and of what was heard, [width] each."""
    found = torch.empty_like(own)
    precise = torch.float32 if own.dtype in HALVES else own.dtype
    size = _PIECE if own.device.type == "cpu" else max(own.shape[1], 1)
    for start in range(0, own.shape[1], size):
        piece = slice(start, start + size)
        parts = [(near.sources[rank], value[piece].to(own.device, precise)) for rank, value in heard.items()]
        for row, weight in enumerate(near.self_weights):
            mine, target = own[row, piece], found[row, piece]
            total = torch.mul(mine, weight, out=target) if own.dtype == precise else mine.to(precise) * weight
            for weights, part in parts:
                total.add_(part, alpha=weights[row])
            if total is not target:
                target.copy_(total)
    return found
