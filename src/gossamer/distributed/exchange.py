"""Messages between neighbours: sent and received at once, counted, and waited for with a sentence if nobody answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gossamer.distributed.neighbors import Neighbors
from gossamer.distributed.world import World, first_line
from gossamer.errors import EngineError

HALVES = (torch.float16, torch.bfloat16)  # dtypes whose sums are taken in float32


@contextmanager
def waiting_for_all(world: World) -> Iterator[None]:
    """Say in a sentence, as an `EngineError`, that not all came to a collective call."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(
            f"rank {world.rank} waited in vain for the others ({first_line(error)}): see whether they still run, and"
            " call the same functions in the same order on all ranks"
        ) from None


class Exchange:
    """Messages under way: a few to each of some ranks, and a few from each."""

    def __init__(
        self, world: World, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]
    ) -> None:
        """Send and receive.

        Args:
            world: the group.
            outgoing: ranks, and contiguous tensors of any dtype, not to be changed before `wait` returns.
            incoming: ranks, and contiguous tensors that `wait` overwrites, in the order in which the rank sends them.
        """
        self._world, self._incoming = world, [each for each in incoming if each[1].numel()]
        sent = [(rank, self._carried(value)) for rank, value in outgoing if value.numel()]
        self._received = [
            (rank, value if self._is_carried(value) else torch.empty_like(value, device="cpu"))
            for rank, value in self._incoming
        ]
        world.bytes_sent += sum(value.nbytes for _, value in sent)
        self._sent = sent  # kept until the messages have left
        try:
            self._works = _posted(sent, self._received)
        except RuntimeError as error:
            raise self._failure(error) from None

    def wait(self) -> None:
        """Wait until everything has been sent and received.

        Raises:
            EngineError: a rank is gone, or did not answer in time.
        """
        try:
            for work in self._works:  # gloo has one for each message
                work.wait()
        except RuntimeError as error:
            raise self._failure(error) from None
        for (_, target), (_, value) in zip(self._incoming, self._received, strict=True):
            if value is not target:
                target.copy_(value)
        self._works, self._sent = [], []

    def _is_carried(self, value: Tensor) -> bool:
        """Say whether the backend takes tensors of this device."""
        return value.device.type == "cpu" or self._world.backend == "nccl"

    def _carried(self, value: Tensor) -> Tensor:
        return value if self._is_carried(value) else value.cpu()

    def _failure(self, error: RuntimeError) -> EngineError:
        others = sorted({rank for rank, _ in (*self._sent, *self._received)})
        return EngineError(
            f"rank {self._world.rank} waited in vain for one of the ranks {', '.join(map(str, others))}"
            f" ({first_line(error)}): see whether they still run, and call the same functions in the same order on all"
            " ranks"
        )


def _posted(sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> list[Any]:
    import torch.distributed as dist

    messages = [dist.P2POp(dist.isend, value.view(torch.uint8), rank) for rank, value in sent]
    messages += [dist.P2POp(dist.irecv, value.view(torch.uint8), rank) for rank, value in received]
    return list(dist.batch_isend_irecv(messages)) if messages else []  # a peer may idle


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
        self._heard = {rank: [torch.empty_like(value) for value in messages] for rank in near.sources}
        incoming = [(rank, value) for rank, values in self._heard.items() for value in values]
        self._exchange = Exchange(world, outgoing, incoming)

    def wait(self) -> list[Tensor]:
        """Return the weighted sums as new tensors of the shapes and dtypes of the rows.

        Neighbours are added by ascending rank, whoever answers first; halves in single precision.

        Raises:
            EngineError: see `Exchange.wait`.
        """
        self._exchange.wait()
        near, found = self._near, []
        for number, own in enumerate(self._rows):
            precise = torch.float32 if own.dtype in HALVES else own.dtype
            weights = [_column(each, precise, own.device) for each in (near.self_weights, *near.sources.values())]
            total = own.to(precise) * weights[0]
            for values, weight in zip(self._heard.values(), weights[1:], strict=True):
                total.addcmul_(values[number].to(precise), weight)
            found.append(total.to(own.dtype))
        return found


@lru_cache(maxsize=256)  # so that a device gets them once, and is not waited for
def _column(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights of rows, [rows, 1]."""
    return torch.tensor(weights, dtype=dtype, device=device)[:, None]
