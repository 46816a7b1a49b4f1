"""Messages between ranks: sent and received at once, counted, and waited for with a sentence if nobody answers."""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from gossamer.distributed.environment import first_line
from gossamer.distributed.shared import Incoming, SharedMemory, Use, connect, padded
from gossamer.errors import EngineError

ROWS, MESSAGES = 0, 1  # tags
MAX_BUFFERS = 8  # that are kept
T = TypeVar("T")
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
    _given_up: set[int] = field(default_factory=set)
    _buffers: deque[Tensor] = field(default_factory=partial(deque, maxlen=MAX_BUFFERS))

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
        """Say in a sentence that some ranks, or none in particular, did not answer; one that was given up stays so.

        Raises:
            GroupBroken: torch says so within the block, or one of the ranks was given up before.
        """
        try:
            if lost := self._given_up & {*others}:
                raise RuntimeError(f"rank {min(lost)} was given up before")
            yield
        except RuntimeError as error:  # of which torch's own errors are
            if len({*others}) == 1:
                self._given_up |= {*others}
            listed = ", ".join(map(str, sorted({*others})))
            who = f"rank {listed}" if len({*others}) == 1 else f"one of the ranks {listed}" if others else "the others"
            raise GroupBroken(
                f"rank {self.rank} waited in vain for {who} ({first_line(error)}): {self.remedy}"
            ) from None

    def close(self) -> None:
        """Tell the others of this machine that nothing will come any more, once they have read what did."""
        atexit.unregister(self.close)
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def send(self, rank: int, parts: Sequence[Tensor]) -> Callable[[], None]:
        """Send a message whose receiver does not know how long it is.

        Args:
            rank: the receiver, which calls `receive`.
            parts: contiguous tensors on the CPU, none empty; unchanged until they are sent.

        Returns:
            a function that waits until they are sent.

        Raises:
            GroupBroken: the receiver is gone, here or when the function is called.
        """
        works = []
        with self.waiting(rank):
            if self.memory is not None and self.is_near(rank):
                self.memory.send({rank: parts}, MESSAGES)
            else:
                works = [self.members.send([part], rank, MESSAGES) for part in parts]

        def wait() -> None:
            """Wait; holds `parts`, which must live until then."""
            for work, _ in zip(works, parts, strict=bool(works)):
                with self.waiting(rank):
                    work.wait(self.limit)

        return wait

    @contextmanager
    def receive(
        self, rank: int, timeout_seconds: float | None = None
    ) -> Iterator[Callable[[int, torch.dtype], Tensor]]:
        """Receive what a rank gave to `send`, tensor after tensor, to be read in the block::

            with links.receive(rank) as take:
                first = take(3, torch.float32).clone()

        Args:
            rank: the sender.
            timeout_seconds: timeout for the first tensor; None: that of the group.

        Raises:
            GroupBroken: it is gone, or did not send in time.
        """
        limits = [self.timeout_seconds if timeout_seconds is None else timeout_seconds]
        if self.memory is not None and self.is_near(rank):
            with self.waiting(rank):
                message = self.memory.receive(rank, MESSAGES, self.memory.ask(rank, MESSAGES), limits[0])
            yield message.take
            message.release()
            return

        def take(length: int, dtype: torch.dtype) -> Tensor:
            """Return the next tensor, [length]."""
            value = torch.empty(length, dtype=dtype)
            limit = limits.pop() if limits else self.timeout_seconds
            with self.waiting(rank):
                self.members.recv([value], rank, MESSAGES).wait(timedelta(seconds=limit))
            return value

        yield take

    def borrow(self, num_bytes: int) -> Tensor:
        """Return memory, uint8 [num_bytes], whose pages are there already if it was given back before."""
        for buffer in self._buffers:
            if len(buffer) == num_bytes:
                self._buffers = deque((one for one in self._buffers if one is not buffer), MAX_BUFFERS)
                return buffer
        return torch.empty(num_bytes, dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """Take memory back; what was given back before all that is kept is let go."""
        self._buffers.append(buffer)


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
        arrival: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Send and receive.

        Args:
            links: the group; all its ranks begin their exchanges in the same order.
            outgoing: ranks, and contiguous tensors of any dtype, not to be changed before the block.
            incoming: rank, length and dtype of each tensor, in the order in which the rank sends them.
            device: where what is sent lies. What comes lies there too if NCCL brings it, otherwise on the CPU.
            arrival: called with a rank; returns a context within which what it sends is waited for.

        Raises:
            GroupBroken: a rank is gone.
        """
        self._links, self._incoming, self._arrival = links, incoming, arrival
        links.bytes_sent += sum(value.nbytes for _, value in outgoing)
        self._works = list[tuple[int, Any]]()
        self._used: Use | None = None
        self._buffers, self._come = dict[int, Tensor](), list[Incoming]()  # by rank; by number where NCCL brings them
        self._asked = dict[int, int]()
        self._kept = [(rank, value) for rank, value in outgoing if value.numel()]  # until they have left
        self._is_nccl = links.has_nccl and device.type != "cpu"
        self._came_to = device if self._is_nccl else _CPU
        self._others = [*(rank for rank, _ in self._kept), *(rank for rank, _, _ in incoming)]
        with links.waiting(*self._others):
            (self._begin_nccl if self._is_nccl else self._begin)()

    def _begin(self) -> None:
        links, near, kept = self._links, dict[int, Sequence[Tensor]](), list[tuple[int, Tensor]]()
        sizes = [(rank, length * dtype.itemsize) for rank, length, dtype in self._incoming if length]
        for rank, of_rank in _by_rank(sizes).items():
            if links.memory is not None and links.is_near(rank):
                self._asked[rank] = links.memory.ask(rank, ROWS)
            else:
                self._buffers[rank] = links.borrow(_packed_bytes(of_rank))
                self._works.append((rank, links.members.recv([self._buffers[rank]], rank, ROWS)))
        for rank, values in _by_rank(self._kept).items():
            if links.is_near(rank):
                near[rank] = values
            else:
                kept.append((rank, _packed([value.cpu().view(-1).view(torch.uint8) for value in values])))
                self._works.append((rank, links.members.send([kept[-1][1]], rank, ROWS)))
        if links.memory is not None and near:
            self._used = links.memory.send(near, ROWS)
        self._kept += kept

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
        num_received = 0 if self._is_nccl else len(self._buffers)
        for number, (rank, work) in enumerate(self._works):
            with self._links.waiting(rank), self._arrival(rank) if number < num_received else nullcontext():
                work.wait(*limit)
        if self._is_nccl:
            nothing = torch.empty(0, dtype=torch.uint8, device=self._came_to)
            return [self._buffers.get(place, nothing).view(one[2]) for place, one in enumerate(self._incoming)]
        take = {rank: Packed(buffer).take for rank, buffer in self._buffers.items()}
        take |= {rank: self._receive(rank, number).take for rank, number in self._asked.items()}
        return [
            take[rank](length, dtype) if length else torch.empty(0, dtype=dtype)
            for rank, length, dtype in self._incoming
        ]

    def _receive(self, rank: int, number: int) -> Incoming:
        links, memory = self._links, self._links.memory
        assert memory is not None
        with links.waiting(rank), self._arrival(rank):
            self._come.append(memory.receive(rank, ROWS, number, links.timeout_seconds))
        return self._come[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let memory be used again."""
        links, used = self._links, self._used
        for message in self._come:
            message.release()
        if not self._is_nccl:
            for buffer in self._buffers.values():
                links.give_back(buffer)
        if used is not None and links.memory is not None and kind is None:
            with links.waiting(*(rank for rank, _ in self._kept)):
                links.memory.finish(used, links.timeout_seconds)


class Packed:
    """Tensors that have come in one message by a socket."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._end = buffer, 0

    def take(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return the next tensor, [length]."""
        begin, self._end = self._end, self._end + padded(length * dtype.itemsize)
        return self._buffer[begin : begin + length * dtype.itemsize].view(dtype)


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors, uint8, as one message: a single one as it is, others where `Packed` looks for them."""
    if len(parts) == 1:
        return parts[0]
    message, end = torch.empty(_packed_bytes([len(part) for part in parts]), dtype=torch.uint8), 0
    for part in parts:
        message[end : end + len(part)] = part
        end += padded(len(part))
    return message


def _packed_bytes(sizes: Sequence[int]) -> int:
    return sum(padded(size) for size in sizes[:-1]) + sizes[-1]


def _by_rank(pairs: Sequence[tuple[int, T]]) -> dict[int, list[T]]:
    found = dict[int, list[T]]()
    for rank, value in pairs:
        found.setdefault(rank, []).append(value)
    return found


def _posted(sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> list[Any]:
    """Post messages to NCCL, all at once."""
    import torch.distributed as dist

    messages = [dist.P2POp(dist.isend, value.view(-1).view(torch.uint8), rank) for rank, value in sent]
    messages += [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in received]
    return list(dist.batch_isend_irecv(messages)) if messages else []  # a peer may idle
