"""Messages between processes of one machine by memory that both have mapped: written once, read where they lie."""

from __future__ import annotations

import os
import select
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gossamer.shared_memory import Mappable, attach

ALIGNMENT = 64
LEAST_BYTES = 4096  # of a segment
MAX_SEGMENTS = 8  # of one process that it keeps while nobody reads them, and that another one keeps mapped
CLOSING_SECONDS = 5.0
AHEAD = 2  # exchanges that a sender may have finished before its receivers have read
LETTER = struct.Struct("<6q")  # tag of a message; file, number and size of a segment, its use, and where in it to read
PAUSE_SECONDS = 0.0005
WATCH_SECONDS = 0.5  # between looks at a process that is waited for
STOPPED_SECONDS = 60.0  # for which a process is stopped before it is given up
Use = tuple["Segment", int]


class Segment:
    """Memory of this process for the messages of one exchange; receivers raise their flags once they have read."""

    def __init__(self, num_bytes: int, num_ranks: int) -> None:
        """Reserve memory for messages, beside a flag for each rank."""
        self.capacity, self.use, self.readers = num_bytes, 0, list[int]()
        self._memory = Mappable(padded(8 * num_ranks) + num_bytes, torch.uint8)
        self._flags = self._memory.tensor[: 8 * num_ranks].view(torch.int64).numpy()
        self.room = self._memory.tensor[padded(8 * num_ranks) :]

    def begin(self, readers: Sequence[int]) -> None:
        """Begin another use, for some ranks to read."""
        self.use, self.readers = self.use + 1, [*readers]

    def is_read(self, use: int) -> bool:
        """Say whether all have read what it was used for, if not something later."""
        return use < self.use or all(self._flags[rank] == use for rank in self.readers)

    def letter(self, tag: int, offset: int) -> bytes:
        """Return what a receiver must know to read from an offset of the room."""
        return LETTER.pack(tag, *self._memory.address[1:4], self.use, offset)

    def close(self) -> None:
        """Let nobody map it any more; its memory is free once those who have it mapped let go."""
        self._memory.close()


class Incoming:
    """A message of another rank, to be read where it lies."""

    def __init__(self, memory: Tensor, rank: int, num_ranks: int, use: int, offset: int) -> None:
        self._memory, self._use, self._end = memory, use, padded(8 * num_ranks) + offset
        self._flag = memory[8 * rank : 8 * (rank + 1)].view(torch.int64).numpy()

    def take(self, length: int, dtype: torch.dtype) -> Tensor:
        """Return its next tensor, [length]."""
        begin, self._end = self._end, self._end + padded(length * dtype.itemsize)
        return self._memory[begin : begin + length * dtype.itemsize].view(dtype)

    def release(self) -> None:
        """Say that it has been read."""
        self._flag[0] = self._use


class SharedMemory:
    """Segments of this process, those of others that it has mapped, and a pipe to and from each of these others.

    A pipe says where the next message lies, and ends when its writer dies.
    """

    def __init__(
        self, rank: int, size: int, processes: Mapping[int, int], pipes: Mapping[int, tuple[int, int]]
    ) -> None:
        """Bind what `connect` has found: ``{rank: process}`` and ``{rank: (file to read from, file to write to)}``."""
        self._rank, self._size, self._processes, self._pipes = rank, size, processes, pipes
        self._own, self._mapped = list[Segment](), {rank: OrderedDict[tuple[int, int], Tensor]() for rank in processes}
        self._asked, self._come = dict[tuple[int, int], int](), dict[tuple[int, int], int]()  # by rank and tag
        self._letters = dict[tuple[int, int, int], tuple[int, ...]]()  # those that have come: rank, tag and number
        self._finished = deque[Use]()

    def __contains__(self, rank: int) -> bool:
        return rank in self._processes

    def send(self, messages: Mapping[int, Sequence[Tensor]], tag: int) -> Use:
        """Write messages, equal ones once, and tell the receivers.

        Args:
            messages: ``{receiver: contiguous tensors}``.
            tag: messages of one tag come in the order in which they are sent.

        Raises:
            RuntimeError: a receiver is gone.
        """
        unlike = {tuple(map(id, parts)): parts for parts in messages.values()}
        segment = self._free(sum(padded(part.nbytes) for parts in unlike.values() for part in parts))
        segment.begin([*messages])
        places, end = dict[tuple[int, ...], int](), 0
        for key, parts in unlike.items():
            places[key] = end
            for part in parts:
                segment.room[end : end + part.nbytes].view(part.dtype).copy_(part.view(-1))
                end += padded(part.nbytes)
        for rank, parts in messages.items():
            try:
                os.write(self._pipes[rank][1], segment.letter(tag, places[tuple(map(id, parts))]))
            except OSError as error:
                raise RuntimeError(f"it reads no more: {error.strerror}") from None
        return segment, segment.use

    def ask(self, rank: int, tag: int) -> int:
        """Return the number of the next message of a rank, for `receive`."""
        number = self._asked.get((rank, tag), 0)
        self._asked[rank, tag] = number + 1
        return number

    def receive(self, rank: int, tag: int, number: int, timeout_seconds: float) -> Incoming:
        """Return a rank's message.

        Raises:
            RuntimeError: the rank is gone, has been stopped, or has not sent in time.
        """
        while (rank, tag, number) not in self._letters:
            letter = self._read(rank, timeout_seconds)
            came = self._come.get((rank, letter[0]), 0)
            self._letters[rank, letter[0], came] = letter
            self._come[rank, letter[0]] = came + 1
        _, file, inode, size, use, offset = self._letters.pop((rank, tag, number))
        return Incoming(self._map(rank, file, inode, size), self._rank, self._size, use, offset)

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
        deadline = time.monotonic() + CLOSING_SECONDS
        for segment in self._own:
            with suppress(RuntimeError):
                self._wait_for_readers(segment, segment.use, max(deadline - time.monotonic(), 0.0))
            segment.close()
        for files in self._pipes.values():
            for file in files:
                os.close(file)
        self._pipes, self._own = {}, []

    def _map(self, rank: int, file: int, inode: int, size: int) -> Tensor:
        """Return a segment of another rank; those of each that were read last are kept."""
        mapped, key = self._mapped[rank], (file, inode)
        if key not in mapped:
            try:
                mapped[key] = attach([self._processes[rank], file, inode, size, "uint8"])
            except OSError as error:
                raise RuntimeError(f"its memory is gone: {error.strerror}") from None
        mapped.move_to_end(key)
        if len(mapped) > MAX_SEGMENTS:
            mapped.popitem(last=False)
        return mapped[key]

    def _wait_for_readers(self, segment: Segment, use: int, timeout_seconds: float) -> None:
        deadline, ended = time.monotonic() + timeout_seconds, select.poll()
        for rank in segment.readers:
            ended.register(self._pipes[rank][1], 0)  # an error, once nobody reads any more
        watch = [Watch(self._processes[rank]) for rank in segment.readers]
        while not segment.is_read(use):
            if ended.poll(0):
                raise RuntimeError("its process has ended")
            if time.monotonic() > deadline:
                raise RuntimeError(f"it has not read a message for {timeout_seconds:g} s")
            for one in watch:
                one.look()
            time.sleep(PAUSE_SECONDS)

    def _read(self, rank: int, timeout_seconds: float) -> tuple[int, ...]:
        """Return the next letter of a rank."""
        waiting, watch = select.poll(), Watch(self._processes[rank])
        waiting.register(self._pipes[rank][0], select.POLLIN)
        deadline = time.monotonic() + timeout_seconds
        while not waiting.poll(1000 * min(max(deadline - time.monotonic(), 0.0), WATCH_SECONDS)):
            if time.monotonic() >= deadline:
                raise RuntimeError(f"nothing came for {timeout_seconds:g} s")
            watch.look()
        letter = os.read(self._pipes[rank][0], LETTER.size)  # whole: writes of a few bytes are not split
        if not letter:
            raise RuntimeError("its process has ended")
        return LETTER.unpack(letter)

    def _free(self, num_bytes: int) -> Segment:
        """Return a segment that nobody reads; sizes are powers of two, so that there are few."""
        capacity = max(LEAST_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
        free = [segment for segment in self._own if segment.is_read(segment.use)]
        found = next((segment for segment in reversed(free) if segment.capacity == capacity), None)  # the one in cache
        if found is None:
            for segment in free[: max(len(self._own) + 1 - MAX_SEGMENTS, 0)]:  # those that were used longest ago
                self._own.remove(segment)
                segment.close()
            found = Segment(capacity, self._size)
        else:
            self._own.remove(found)
        self._own.append(found)
        return found


class Watch:
    """Watches a process of this machine that is waited for."""

    def __init__(self, process: int) -> None:
        self._process, self._next, self._seconds = process, time.monotonic() + WATCH_SECONDS, 0.0

    def look(self) -> None:
        """Look at it now and then.

        Raises:
            RuntimeError: it has been stopped, as by SIGSTOP, for `STOPPED_SECONDS` in which this process ran.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + WATCH_SECONDS
        self._seconds = self._seconds + WATCH_SECONDS if is_stopped(self._process) else 0.0
        if self._seconds >= STOPPED_SECONDS:
            raise RuntimeError(f"process {self._process} has been stopped for {self._seconds:g} s")


def is_stopped(process: int) -> bool:
    """Say whether a process of this machine is stopped by a signal."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):  # it is gone, which its pipe tells
        return False


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


def padded(num_bytes: int) -> int:
    """Return the size of memory whose end is aligned for any dtype, and for the processor."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
