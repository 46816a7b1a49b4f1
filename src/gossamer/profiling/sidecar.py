"""A process that stands for a device, and really does the work of one stage of a run.

Forked from the driver, it is handed pieces of work, each a JSON message and arrays in shared memory, does them in their
order, and hands back what comes of them. Nothing of that changes a bit, for the work is the same program; only time is
emulated. The link: a piece arrives `latency` after its bytes have crossed at the stated bandwidth, transfers of each
direction one after another. The core: after c seconds of processor time the process sleeps (k - 1) c, or until an
engine would have been done, by the rates in its profile. Whoever waits sleeps until a moment of the clock, so that what
is slept too long in one place is not added to the next. See docs/profiling.md for what this does not emulate.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer import errors
from gossamer.errors import EngineError, GossamerError, one_line
from gossamer.memory import memory_errors
from gossamer.profiling import recorder
from gossamer.profiling.offload import BACKGROUND, Costs, Offload
from gossamer.profiling.trace import SIDE_CAR
from gossamer.shared_memory import Mappable, attach

Message = dict[str, Any]
Handler = Callable[[Message, list[Tensor]], tuple[Message, list[Tensor]]]

AHEAD = 16  # pieces that are handed over before the answer to the first of them is read
POLL_SECONDS = 0.5
ALIGNMENT = 64  # bytes
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


class Answer(NamedTuple):
    """What comes of a piece.

    Attributes:
        message, arrays: that the handler returned.
        due: moment of the monotonic clock, in seconds, at which it has crossed the link.
    """

    message: Message
    arrays: list[Tensor]
    due: float


class SideCar:
    """The host's side of a device that is a process."""

    def __init__(
        self,
        offload: Offload,
        make_handler: Callable[[], Handler],
        check: Callable[[], None] = lambda: None,
        num_processes: int = 1,
    ) -> None:
        """Fork the process.

        Args:
            offload: what it does, and what that costs on the device that it stands for.
            make_handler: called in the process; returns what does a piece.
            check: called again and again while an answer is waited for; may raise.
            num_processes: of the run; where there are more processors, the last is kept for the device.

        Raises:
            EngineError: the system does not grant the process.
        """
        self._stage, self._check = offload.stage, check
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._connection, offload, make_handler, _processor(num_processes))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        try:
            self._process.start()
        except OSError as error:
            reason = error.strerror or error
            raise EngineError(f"cannot start the side-car of offload.stage ({reason}): leave offload out") from None
        finally:
            theirs.close()
        self._outbox, self._inbox, self._link = Outbox(), Inbox(), Link(offload.costs)
        self._num_sent = self._num_received = 0

    def submit(
        self,
        message: Message,
        arrays: Sequence[Tensor] = (),
        num_bytes: int | None = None,
        worked_bytes: int | None = None,
    ) -> None:
        """Hand over a piece; of a stage in the background, return once it is copied.

        Args:
            message: JSON values.
            arrays: of any shapes and dtypes, which are copied.
            num_bytes: that cross the link; None: those of `arrays`.
            worked_bytes: that the piece works on; None: those that cross the link.

        Raises:
            EngineError: the process has ended.
            GossamerError: an earlier piece raised it.
        """
        while self._num_sent - self._num_received >= AHEAD:  # whose memory is used again now
            self._receive()
        size = sum(value.nbytes for value in arrays) if num_bytes is None else num_bytes
        worked = size if worked_bytes is None else worked_bytes
        self._num_sent += 1
        with recorder.span("send", size, f"s{self._process.pid}<{self._num_sent}"):
            described = self._outbox.write(self._num_sent, arrays)
            due = self._link.arrival(size)
            text = json.dumps({"due": due, "bytes": worked, "arrays": described, "message": message})
            try:
                self._connection.send_bytes(text.encode())
            except OSError:
                raise self._ended() from None
        if self._stage.mode == BACKGROUND:
            with recorder.span("wait"):
                sleep_until(due)

    def result(self) -> Answer:
        """Wait for all that is under way; return the answer to the last piece, when it has crossed the link.

        Raises:
            EngineError, GossamerError: see `submit`.
        """
        assert self._num_sent > self._num_received, "nothing is under way"
        while self._num_sent > self._num_received:
            answer = self._receive()
        return answer

    def drain(self) -> None:
        """Wait for all that is under way, if anything is.

        Raises:
            EngineError, GossamerError: see `submit`.
        """
        if self._num_sent > self._num_received:
            self.result()

    def close(self) -> None:
        """End the process, at once if it does something."""
        self._connection.close()
        if self._num_sent == self._num_received:  # it writes the rest of its trace
            self._process.join(timeout=1)
        self._process.kill()
        self._process.join(timeout=5)

    def _receive(self) -> Answer:
        """Return the next answer."""
        self._num_received += 1
        is_last = self._num_received == self._num_sent
        with recorder.span("wait"):
            while not self._connection.poll(POLL_SECONDS):
                self._check()
            try:
                reply = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                raise self._ended() from None
            if is_last:
                sleep_until(reply["due"])
        if "error" in reply:
            raise _error_of(reply)
        with recorder.span("receive", message=f"s{self._process.pid}>{self._num_received}"):
            return Answer(reply["message"], self._inbox.read(reply["arrays"]), reply["due"])

    def _ended(self) -> EngineError:
        self._process.join(timeout=5)
        return EngineError(
            f"the side-car process {self._process.pid}, which does {self._stage.name}, ended with exit code"
            f" {self._process.exitcode}: resume the run, or resume it with offload=null to do that in the driver"
        )


# ---- time


class Link:
    """One direction of a link, as whoever sends by it knows it."""

    def __init__(self, costs: Costs) -> None:
        self._seconds_per_byte, self._latency = costs.link_seconds_per_byte, costs.link_latency
        self._free = 0.0

    def arrival(self, num_bytes: float) -> float:
        """Return when what is sent now has crossed, seconds of the monotonic clock."""
        self._free = max(self._free, time.monotonic()) + num_bytes * self._seconds_per_byte
        return self._free + self._latency


def sleep_until(moment: float) -> None:
    """Sleep until a moment of the monotonic clock, if it has not passed."""
    if (left := moment - time.monotonic()) > 0:
        time.sleep(left)


def queued_seconds() -> float:
    """Return how long this thread has waited for a processor so far; 0 where the system does not tell."""
    with suppress(OSError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def device_seconds(costs: Costs, cpu: float, idle: float, num_bytes: int) -> float:
    """Return how long a piece takes on the device.

    Args:
        costs: of the device.
        cpu: seconds of processor time here.
        idle: seconds that it waited here, such as for a disk, but not for a processor.
        num_bytes: that it works on.
    """
    if costs.engine is not None:
        latency, seconds_per_byte = costs.engine
        return latency + num_bytes * seconds_per_byte
    return max(costs.slowdown * cpu, num_bytes * costs.memory_seconds_per_byte) + idle


# ---- memory


class Outbox:
    """Memory from which the process at the other end reads arrays, a place for each piece under way."""

    def __init__(self) -> None:
        self._places: list[Mappable | None] = [None] * AHEAD

    def write(self, number: int, arrays: Sequence[Tensor]) -> list[Any]:
        """Copy the arrays of piece `number`; return JSON values from which `Inbox.read` finds them."""
        begins = list(itertools.accumulate((_padded(value.nbytes) for value in arrays), initial=0))
        place = self._places[number % AHEAD]
        if arrays and (place is None or place.tensor.nbytes < begins[-1]):
            if place is not None:
                place.close()
            place = Mappable(1 << max(12, math.ceil(math.log2(begins[-1] + 1))), torch.uint8)
            self._places[number % AHEAD] = place
        extents = []
        for value, begin in zip(arrays, begins, strict=False):
            assert place is not None
            target = place.tensor[begin : begin + value.nbytes].view(value.dtype).view(value.shape)
            target.copy_(value)
            extents.append([begin, list(value.shape), str(value.dtype).removeprefix("torch.")])
        return [] if place is None or not arrays else [place.address, extents]


class Inbox:
    """The memory of an `Outbox` of another process."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, ...], Tensor] = {}

    def read(self, described: Sequence[Any]) -> list[Tensor]:
        """Return copies of what `Outbox.write` has described."""
        if not described:
            return []
        address, extents = described
        key = (address[1], address[2])  # of the open file
        if key not in self._mapped:
            if len(self._mapped) >= 2 * AHEAD:  # most of which were replaced by larger ones
                self._mapped.clear()
            self._mapped[key] = attach(address)
        found = []
        for begin, shape, name in extents:
            dtype: torch.dtype = vars(torch)[name]
            size = math.prod(shape) * dtype.itemsize
            found.append(self._mapped[key][begin : begin + size].view(dtype).view(shape).clone())
        return found


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


# ---- the process


def _serve(
    connection: Connection,
    inherited: Connection,
    offload: Offload,
    make_handler: Callable[[], Handler],
    processor: int | None,
) -> None:
    """Do pieces until the driver goes away."""
    inherited.close()
    _settle(processor)
    if (folder := recorder.folder()) is not None:
        recorder.start(Path(folder), SIDE_CAR)
    handler, inbox, outbox, link, pid = make_handler(), Inbox(), Outbox(), Link(offload.costs), os.getpid()
    for number in itertools.count(1):
        try:
            with recorder.span("wait"):
                piece = json.loads(connection.recv_bytes())
                arrays = inbox.read(piece["arrays"])  # as the link would bring them
                sleep_until(piece["due"])
        except (EOFError, ConnectionError):
            return
        recorder.mark("receive", piece["bytes"], f"s{pid}<{number}")
        try:
            with recorder.span(offload.stage.kinds[0]):
                message, found = _do(handler, offload.costs, piece, arrays)
            back = message.pop("back_bytes", sum(value.nbytes for value in found))
            reply: Message = {"message": message, "arrays": outbox.write(number, found)}
        except BaseException as error:  # the driver heeds signals, so that none of them is an interrupt
            reply, back = _description(error), 0
        with recorder.span("send", back, f"s{pid}>{number}"):
            connection.send_bytes(json.dumps(reply | {"due": link.arrival(back)}).encode())
        recorder.flush()


def _do(handler: Handler, costs: Costs, piece: Message, arrays: list[Tensor]) -> tuple[Message, list[Tensor]]:
    """Do a piece, and take as long for it as the device would."""
    began, cpu, queued = time.monotonic(), time.thread_time(), queued_seconds()
    with memory_errors():
        result = handler(piece["message"], arrays)
    cpu, queued = time.thread_time() - cpu, queued_seconds() - queued
    idle = max(0.0, time.monotonic() - began - cpu - queued)
    sleep_until(began + device_seconds(costs, cpu, idle, piece["bytes"]))
    return result


def _settle(processor: int | None) -> None:
    """Make this process end with the driver, leave signals to it, wake up in time, and stay on a processor."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        control = ctypes.CDLL(None).prctl
        control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        control(_PR_SET_TIMERSLACK, 1)
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    torch.set_num_threads(1)


def _processor(num_processes: int) -> int | None:
    """Return the processor to stay on; None: there are too few of them."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1] if len(allowed) > num_processes else None


def _description(error: BaseException) -> Message:
    if isinstance(error, GossamerError):
        return {"error": str(error), "class": type(error).__name__, "traceback": ""}
    return {"error": one_line(error), "class": "", "traceback": traceback.format_exc()}


def _error_of(reply: Mapping[str, Any]) -> GossamerError:
    """Return the error that a piece raised."""
    kind = vars(errors).get(reply["class"])
    if isinstance(kind, type) and issubclass(kind, GossamerError):
        return kind(reply["error"])
    failed = EngineError(f"the side-car failed with {reply['error']}: correct it, or leave offload out")
    failed.add_note(reply["traceback"])
    return failed
