"""Messages between ranks: sent and received at once, counted, and waited for with a sentence if nobody answers."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gossamer.distributed.environment import first_line
from gossamer.distributed.shared import Extents, SharedMemory, Use, connect
from gossamer.errors import EngineError

ROWS = 0  # tag
_CPU = torch.device("cpu")


class GroupBroken(EngineError):
    """A member of a group is gone or does not answer; what was under way must be done again by a new group."""


@dataclass
class Links:
    """Ways from this process to the others of a group: memory on one machine, NCCL between devices, sockets.

    Attributes:
        members: torch's process group.
        rank, size: number of this process, 0, ..., size - 1, and number of processes.
        timeout_seconds: timeout for each message.
        remedy: what to do about a rank that does not answer.
        has_nccl: whether tensors of CUDA devices travel by NCCL; otherwise by way of the processor.
        memory: what reaches the ranks of this machine; None: nothing but sockets.
        bytes_sent: bytes of the messages that this process has sent by `Exchange`.
    """

    members: Any
    rank: int
    size: int
    timeout_seconds: float
    remedy: str
    has_nccl: bool = False
    memory: SharedMemory | None = None
    bytes_sent: int = 0
    _buffers: dict[int, list[Tensor]] = field(default_factory=dict)

    def is_near(self, rank: int) -> bool:
        """Say whether messages of a rank come through memory."""
        return self.memory is not None and rank in self.memory

    def share_memory(self) -> None:
        """Find out which ranks are of this machine, and use its memory between them; all ranks call it."""
        if self.size > 1:
            self.memory = connect(self.rank, self.size, self.gathered)
            atexit.register(self.close)

    def gathered(self, block: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, of one shape and dtype, on the CPU.

        Raises:
            GroupBroken: a member is gone, or did not answer in time.
        """
        found = [torch.empty_like(block) for _ in range(self.size)]
        with self.waiting():
            self.members.allgather([found], [block]).wait(self.limit)
        return found

    @property
    def limit(self) -> timedelta:
        """Timeout for each message."""
        return timedelta(seconds=self.timeout_seconds)

    @contextmanager
    def waiting(self, *others: int) -> Iterator[None]:
        """Say in a sentence that some ranks, or none in particular, did not answer.

        Raises:
            GroupBroken: torch says so within the block.
        """
        try:
            yield
        except RuntimeError as error:  # of which torch's own errors are
            listed = ", ".join(map(str, sorted({*others})))
            who = f"rank {listed}" if len({*others}) == 1 else f"one of the ranks {listed}" if others else "the others"
            raise GroupBroken(
                f"rank {self.rank} waited in vain for {who} ({first_line(error)}): {self.remedy}"
            ) from None

    def close(self) -> None:
        """Tell the others of this machine that nothing will come any more, once they have read what did."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def borrow(self, num_bytes: int) -> Tensor:
        """Return memory, uint8 [num_bytes], whose pages are there already if it was given back before."""
        free = self._buffers.get(num_bytes)
        return free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """Take memory back."""
        self._buffers.setdefault(len(buffer), []).append(buffer)


class Exchange:
    """Messages under way: a few tensors to each of some ranks, and a few from each.

    As a context it waits, and gives what has come, each flat and in the order of `incoming`, to be read in the block::

        with Exchange(links, outgoing, incoming) as received:
            ...
    """

    def __init__(
        self,
        links: Links,
        outgoing: Sequence[tuple[int, Tensor]],
        incoming: Sequence[tuple[int, int, torch.dtype]],
        device: torch.device = _CPU,
    ) -> None:
        """Send and receive.

        Args:
            links: the group; all its ranks begin their exchanges in the same order.
            outgoing: ranks, and contiguous tensors of any dtype, not to be changed before the block.
            incoming: rank, length and dtype of each tensor, in the order in which the rank sends them.
            device: where what is sent lies. What comes lies there too if NCCL brings it, otherwise on the CPU.

        Raises:
            GroupBroken: a rank is gone.
        """
        self._links, self._incoming = links, incoming
        links.bytes_sent += sum(value.nbytes for _, value in outgoing)
        self._works = list[tuple[int, Any]]()
        self._used: Use | None = None
        self._buffers, self._asked, self._release = dict[int, Tensor](), dict[int, int](), list[Callable[[], object]]()
        self._kept = [(rank, value) for rank, value in outgoing if value.numel()]  # until they have left
        self._is_nccl = links.has_nccl and device.type != "cpu"
        self._came_to = device if self._is_nccl else _CPU
        self._others = [*(rank for rank, _ in self._kept), *(rank for rank, _, _ in incoming)]
        with links.waiting(*self._others):
            (self._begin_nccl if self._is_nccl else self._begin)()

    def _begin(self) -> None:
        links = self._links
        for number, (rank, length, dtype) in enumerate(self._incoming):
            if length and links.is_near(rank):
                self._asked.setdefault(rank, -1)
            elif length:
                self._buffers[number] = links.borrow(length * dtype.itemsize)
                self._works.append((rank, links.members.recv([self._buffers[number]], rank, ROWS)))
        near = dict[int, list[Tensor]]()
        for place, (rank, value) in enumerate(self._kept):
            if links.is_near(rank):
                near.setdefault(rank, []).append(value)
            else:
                self._kept[place] = rank, value.cpu().view(-1).view(torch.uint8)
                self._works.append((rank, links.members.send([self._kept[place][1]], rank, ROWS)))
        if links.memory is not None:
            self._asked = {rank: links.memory.ask(rank) for rank in self._asked}
            self._used = links.memory.send(near) if near else None

    def _begin_nccl(self) -> None:
        for number, (_, length, dtype) in enumerate(self._incoming):
            if length:
                self._buffers[number] = torch.empty(length * dtype.itemsize, dtype=torch.uint8, device=self._came_to)
        received = [(self._incoming[number][0], buffer) for number, buffer in self._buffers.items()]
        self._works = [(self._others[0], work) for work in _posted(self._kept, received)]

    def __enter__(self) -> list[Tensor]:
        """Wait until everything has been sent and received.

        Raises:
            GroupBroken: a rank is gone, or did not answer in time.
        """
        limit = () if self._is_nccl else (self._links.limit,)  # NCCL's only makes the device wait, if it has no limit
        for rank, work in self._works:
            with self._links.waiting(rank):
                work.wait(*limit)
        heard = {rank: iter(self._read(rank, number)) for rank, number in self._asked.items()}
        found = []
        for number, (rank, length, dtype) in enumerate(self._incoming):
            if number in self._buffers:
                found.append(self._buffers[number].view(dtype))
            else:
                found.append(next(heard[rank]) if length else torch.empty(0, dtype=dtype, device=self._came_to))
        return found

    def _read(self, rank: int, number: int) -> list[Tensor]:
        links, memory = self._links, self._links.memory
        assert memory is not None
        extents: Extents = [(length, dtype) for other, length, dtype in self._incoming if other == rank and length]
        with links.waiting(rank):
            found, release = memory.receive(rank, number, extents, links.timeout_seconds)
        self._release.append(release)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let memory be used again."""
        links, used = self._links, self._used
        for release in self._release:
            release()
        if not self._is_nccl:
            for buffer in self._buffers.values():
                links.give_back(buffer)
        if used is not None and links.memory is not None and kind is None:
            with links.waiting(*(rank for rank, _ in self._kept)):
                links.memory.finish(used, links.timeout_seconds)


def _posted(sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> list[Any]:
    """Post messages to NCCL, all at once."""
    import torch.distributed as dist

    messages = [dist.P2POp(dist.isend, value.view(-1).view(torch.uint8), rank) for rank, value in sent]
    messages += [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in received]
    return list(dist.batch_isend_irecv(messages)) if messages else []  # a peer may idle
