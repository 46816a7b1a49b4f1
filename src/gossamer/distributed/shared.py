"""Messages between processes of one machine by memory that both have mapped: written once, read where they lie."""

from __future__ import annotations

import os
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gossamer.shared_memory import Mappable, attach

ALIGNMENT = 64
LEAST_BYTES = 4096  # of a segment
CLOSING_SECONDS = 5.0
AHEAD = 2  # exchanges that a sender may have finished before its receivers have read
LETTER = struct.Struct("<5q")  # file, number and size of a segment, its use, and where in it to read
PAUSE_SECONDS = 0.0005
Extents = Sequence[tuple[int, torch.dtype]]  # lengths and dtypes of a message's tensors
Use = tuple["Segment", int]


class Segment:
    """Memory of this process for the messages of one exchange; receivers raise their flags once they have read."""

    def __init__(self, num_bytes: int, num_ranks: int) -> None:
        """Reserve memory for messages, beside a flag for each rank."""
        self.capacity, self.use, self.readers = num_bytes, 0, list[int]()
        self._memory = Mappable(_padded(8 * num_ranks) + num_bytes, torch.uint8)
        self._flags = self._memory.tensor[: 8 * num_ranks].view(torch.int64)
        self.room = self._memory.tensor[_padded(8 * num_ranks) :]

    def begin(self, readers: Sequence[int]) -> None:
        """Begin another use, for some ranks to read."""
        self.use, self.readers = self.use + 1, [*readers]

    def is_read(self, use: int) -> bool:
        """Say whether all have read what it was used for, if not something later."""
        return use < self.use or bool((self._flags[self.readers] == use).all())

    def letter(self, offset: int) -> bytes:
        """Return what a receiver must know to read from an offset of the room."""
        return LETTER.pack(*self._memory.address[1:4], self.use, offset)


class SharedMemory:
    """Segments of this process, those of others that it has mapped, and a pipe to and from each of these others.

    A pipe says where the next message lies, and ends when its writer dies.
    """

    def __init__(
        self, rank: int, size: int, processes: Mapping[int, int], pipes: Mapping[int, tuple[int, int]]
    ) -> None:
        """Bind what `connect` has found: ``{rank: process}`` and ``{rank: (file to read from, file to write to)}``."""
        self._rank, self._size, self._processes, self._pipes = rank, size, processes, pipes
        self._own, self._mapped = list[Segment](), dict[tuple[int, ...], Tensor]()
        self._asked, self._come = dict.fromkeys(processes, 0), dict.fromkeys(processes, 0)
        self._letters = dict[tuple[int, int], bytes]()  # those that have come, by rank and number
        self._finished = deque[Use]()

    def __contains__(self, rank: int) -> bool:
        return rank in self._processes

    def send(self, messages: Mapping[int, Sequence[Tensor]]) -> Use:
        """Write messages, equal ones once, and tell the receivers.

        Args:
            messages: ``{receiver: contiguous tensors}``.

        Raises:
            RuntimeError: a receiver is gone.
        """
        unlike = {tuple(map(id, parts)): parts for parts in messages.values()}
        segment = self._free(sum(_padded(part.nbytes) for parts in unlike.values() for part in parts))
        segment.begin([*messages])
        places, end = dict[tuple[int, ...], int](), 0
        for key, parts in unlike.items():
            places[key] = end
            for part in parts:
                segment.room[end : end + part.nbytes].view(part.dtype).copy_(part.view(-1))
                end += _padded(part.nbytes)
        for rank, parts in messages.items():
            try:
                os.write(self._pipes[rank][1], segment.letter(places[tuple(map(id, parts))]))
            except OSError as error:
                raise RuntimeError(f"it reads no more: {error.strerror}") from None
        return segment, segment.use

    def ask(self, rank: int) -> int:
        """Return the number of the next message of a rank, for `receive`."""
        self._asked[rank] += 1
        return self._asked[rank] - 1

    def receive(
        self, rank: int, number: int, extents: Extents, timeout_seconds: float
    ) -> tuple[list[Tensor], Callable[[], object]]:
        """Return the tensors of a rank's message, and what is to be called once they have been read.

        Raises:
            RuntimeError: the rank is gone, or has not sent in time.
        """
        while self._come[rank] <= number:
            self._letters[rank, self._come[rank]] = self._read(rank, timeout_seconds)
            self._come[rank] += 1
        file, inode, size, use, offset = LETTER.unpack(self._letters.pop((rank, number)))
        key = rank, file, inode
        if key not in self._mapped:
            try:
                self._mapped[key] = attach([self._processes[rank], file, inode, size, "uint8"])
            except OSError as error:
                raise RuntimeError(f"its memory is gone: {error.strerror}") from None
        memory, found, end = self._mapped[key], [], _padded(8 * self._size) + offset
        for length, dtype in extents:
            found.append(memory[end : end + length * dtype.itemsize].view(dtype))
            end += _padded(length * dtype.itemsize)
        flag = memory[8 * self._rank : 8 * (self._rank + 1)].view(torch.int64)
        return found, lambda: flag.fill_(use)

    def finish(self, used: Use, timeout_seconds: float) -> None:
        """Wait until receivers have read what was sent some exchanges ago, so that no sender runs far ahead.

        Raises:
            RuntimeError: they did not in time.
        """
        self._finished.append(used)
        if len(self._finished) > AHEAD:
            self._wait_for_readers(*self._finished.popleft(), timeout_seconds)

    def close(self) -> None:
        """Wait, for some seconds at most, until others have read all; tell them that nothing more will come."""
        for used in self._finished:
            with suppress(RuntimeError):
                self._wait_for_readers(*used, CLOSING_SECONDS)
        for files in self._pipes.values():
            for file in files:
                os.close(file)
        self._pipes = {}

    def _wait_for_readers(self, segment: Segment, use: int, timeout_seconds: float) -> None:
        deadline, ended = time.monotonic() + timeout_seconds, select.poll()
        for rank in segment.readers:
            ended.register(self._pipes[rank][1], 0)  # an error, once nobody reads any more
        while not segment.is_read(use):
            if ended.poll(0):
                raise RuntimeError("it has closed its pipe")
            if time.monotonic() > deadline:
                raise RuntimeError(f"it has not read a message for {timeout_seconds:g} s")
            time.sleep(PAUSE_SECONDS)

    def _read(self, rank: int, timeout_seconds: float) -> bytes:
        waiting = select.poll()
        waiting.register(self._pipes[rank][0], select.POLLIN)
        if not waiting.poll(1000 * timeout_seconds):
            raise RuntimeError(f"nothing came for {timeout_seconds:g} s")
        letter = os.read(self._pipes[rank][0], LETTER.size)  # whole: writes of a few bytes are not split
        if not letter:
            raise RuntimeError("it has closed its pipe")
        return letter

    def _free(self, num_bytes: int) -> Segment:
        """Return a segment that nobody reads; sizes are powers of two, so that there are few."""
        capacity = max(LEAST_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
        for segment in self._own:
            if segment.capacity == capacity and segment.is_read(segment.use):
                return segment
        self._own.append(Segment(capacity, self._size))
        return self._own[-1]


def connect(rank: int, size: int, gather: Callable[[Tensor], list[Tensor]]) -> SharedMemory | None:
    """Find out which processes can map each other's memory, and open pipes between them; all ranks call it.

    Args:
        rank, size: of this process.
        gather: returns the tensors of all ranks, by rank.

    Returns:
        what reaches the ranks of this machine; None: none can be reached.
    """
    proof, own = Mappable(2, torch.int64), {other: os.pipe() for other in range(size) if other != rank}
    proof.tensor.copy_(torch.frombuffer(bytearray(os.urandom(16)), dtype=torch.int64))
    inboxes = [own[other][1] if other in own else 0 for other in range(size)]
    told = [each.tolist() for each in gather(torch.tensor([*proof.address[:3], *proof.tensor.tolist(), *inboxes]))]
    opened = {other: _opened(told[other], rank) for other in own}
    reached = gather(torch.tensor([opened.get(other) is not None for other in range(size)], dtype=torch.uint8))
    processes, pipes = dict[int, int](), dict[int, tuple[int, int]]()
    for other, (inbox, copied) in own.items():
        os.close(copied)  # all who can have opened it by now
        outbox = opened[other]
        if outbox is not None and reached[other][rank]:
            processes[other], pipes[other] = told[other][0], (inbox, outbox)
        else:
            for file in (inbox, outbox):
                if file is not None:
                    os.close(file)
    proof.close()
    return SharedMemory(rank, size, processes, pipes) if processes else None


def _opened(told: Sequence[int], rank: int) -> int | None:
    """Return a file for writing to a process; None: its memory is not to be had, as of one on another machine."""
    process, file, inode, *proof = told[:5]
    try:
        if not os.readlink(f"/proc/{process}/fd/{file}").startswith("/memfd:gossamer"):
            return None
        if attach([process, file, inode, 2, "int64"]).tolist() != proof:
            return None
        return os.open(f"/proc/{process}/fd/{told[5 + rank]}", os.O_WRONLY)
    except (OSError, ValueError):
        return None


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
