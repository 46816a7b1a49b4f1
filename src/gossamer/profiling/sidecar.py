"""A process that stands for a device, and really does the work of one stage of a run.

Forked from the driver, it is handed pieces of work, each a JSON message and arrays in shared memory, does them in their
order, and hands back what comes of them. Nothing of that changes a bit, for the work is the same program; only time is
emulated. The link: a piece arrives `latency` after its bytes have crossed at the stated bandwidth, transfers of each
direction one after another. The core: after c seconds of processor time the process sleeps (k - 1) c, or until an
engine would have been done, by the rates in its profile. Whoever waits sleeps until a moment of the clock, so that what
is slept too long in one place is not added to the next. Processes that are forked later, as workers, reach it through a
`Port`, each by a connection of its own. See docs/profiling.md for what this does not emulate.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer import errors
from gossamer.errors import EngineError, GossamerError, one_line
from gossamer.memory import keep_freed_memory, memory_errors
from gossamer.profiling import recorder
from gossamer.profiling.emulation import (
    AHEAD,
    Inbox,
    Link,
    Outbox,
    Places,
    device_seconds,
    queued_seconds,
    sleep_until,
)
from gossamer.profiling.offload import BACKGROUND, Costs, Offload
from gossamer.profiling.trace import SIDE_CAR

Message = dict[str, Any]
Handler = Callable[[Message, list[Tensor]], tuple[Message, list[Tensor]]]

POLL_SECONDS = 0.5
MAX_NAME_BYTES = 64
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


class Channel:
    """One process's end of a connection to a side-car."""

    def __init__(self, connection: Connection, offload: Offload, name: str, check: Callable[[], None]) -> None:
        """Begin with nothing under way.

        Args:
            connection: to the side-car.
            offload: what it does, and what that costs on the device that it stands for.
            name: which the ids of messages begin with.
            check: called again and again while an answer is waited for; may raise.
        """
        self._connection, self._stage, self._name, self._check = connection, offload.stage, name, check
        self._outbox, self._inbox, self._link = Outbox(), Inbox(), Link(offload.costs)
        self._num_sent = self._num_received = 0
        self._places = Places()

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
        with recorder.span("send", size, f"s{self._name}<{self._num_sent}"):
            place = self._places.take()
            described = self._outbox.write(place, arrays)
            due = self._link.arrival(size)
            piece = {"due": due, "bytes": worked, "place": place, "arrays": described, "message": message}
            try:
                self._connection.send_bytes(json.dumps(piece).encode())
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
        self._places.free()
        if "error" in reply:
            raise _error_of(reply)
        with recorder.span("receive", message=f"s{self._name}>{self._num_received}"):
            return Answer(reply["message"], self._inbox.read(reply["arrays"]), reply["due"])

    def _ended(self) -> EngineError:
        return ended(self._name.partition(".")[0], self._stage.name, "ended")


def ended(process: str, stage: str, how: str) -> EngineError:
    """Return the error of a side-car that is no more."""
    return EngineError(
        f"the side-car process {process}, which does {stage}, {how}: resume the run, or resume it with offload=null to"
        " do that in the driver"
    )


class SideCar(Channel):
    """The driver's side of a device that is a process."""

    def __init__(
        self,
        offload: Offload,
        make_handler: Callable[[], Handler],
        check: Callable[[], None] = lambda: None,
        num_processes: int = 1,
    ) -> None:
        """Fork the process.

        Args:
            offload, check: see `Channel`.
            make_handler: called in the process; returns what does a piece.
            num_processes: of the run; where there are more processors, the last is kept for the device.

        Raises:
            EngineError: the system does not grant the process.
        """
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._door, their_door = socket.socketpair(type=socket.SOCK_DGRAM)
        inherited, kept = (ours, self._door), (theirs, their_door)
        arguments = (kept, inherited, offload, make_handler, _processor(num_processes))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        try:
            self._process.start()
        except OSError as error:
            reason = error.strerror or error
            raise EngineError(f"cannot start the side-car of offload.stage ({reason}): leave offload out") from None
        finally:
            theirs.close()
            their_door.close()
        self._offload = offload
        super().__init__(ours, offload, str(self._process.pid), check)

    @property
    def port(self) -> Port:
        """Where this process, and those that it forks from now on, hand over pieces and wait for what comes of them."""
        return Port(self._door, self._offload, self._name)

    def close(self) -> None:
        """End the process, at once if it does something."""
        self._connection.close()
        self._door.close()
        if self._num_sent == self._num_received:  # it writes the rest of its trace
            self._process.join(timeout=1)
        self._process.kill()
        self._process.join(timeout=5)

    def _ended(self) -> EngineError:
        self._process.join(timeout=5)
        return ended(self._name, self._stage.name, f"ended with exit code {self._process.exitcode}")


class Port:
    """What a process hands over, one piece after another; each process has a connection of its own, made when needed.

    The end of a new one travels to the side-car over a socket that all have inherited.
    """

    def __init__(self, door: socket.socket, offload: Offload, name: str) -> None:
        self._door, self._offload, self._name = door, offload, name
        self._channel = dict[int, Channel]()  # of this process alone, by its number

    def call(self, message: Message, arrays: Sequence[Tensor] = ()) -> Answer:
        """Hand over a piece, see `Channel.submit`; wait for what comes of it.

        Raises:
            EngineError: the side-car has ended.
            GossamerError: the piece raised it.
        """
        pid = os.getpid()
        if pid not in self._channel:
            self._channel = {pid: self._opened(f"{self._name}.{pid}")}
        self._channel[pid].submit(message, arrays)
        return self._channel[pid].result()

    def _opened(self, name: str) -> Channel:
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._door, [name.encode()], [theirs.fileno()])
        except OSError:
            ours.close()
            raise ended(self._name, self._offload.stage.name, "ended") from None
        finally:
            theirs.close()
        return Channel(Connection(ours.detach()), self._offload, name, lambda: None)


# ---- the process


class _Caller(NamedTuple):
    """A process that hands pieces over: the name of its connection, numbers of its pieces, and its memory."""

    name: str
    numbers: itertools.count[int]
    inbox: Inbox
    outbox: Outbox

    @classmethod
    def of(cls, name: str) -> _Caller:
        """Return one that has handed over nothing yet."""
        return cls(name, itertools.count(1), Inbox(), Outbox())


def _serve(
    own: tuple[Connection, socket.socket],
    inherited: tuple[Connection, socket.socket],
    offload: Offload,
    make_handler: Callable[[], Handler],
    processor: int | None,
) -> None:
    """Do pieces, in the order in which they come, until the driver goes away."""
    for one in inherited:
        one.close()
    _settle(processor)
    if (folder := recorder.folder()) is not None:
        recorder.start(Path(folder), SIDE_CAR)
    (driver, door), handler, link = own, make_handler(), Link(offload.costs)
    callers = {driver: _Caller.of(str(os.getpid()))}
    while driver in callers:
        with recorder.span("wait"):
            ready = wait([door, *callers])
        if door in ready:
            name, (descriptor, *_), _, _ = socket.recv_fds(door, MAX_NAME_BYTES, 1)
            callers[Connection(descriptor)] = _Caller.of(name.decode())
        for connection in [one for one in callers if one in ready]:
            if not _served(connection, callers[connection], offload, handler, link):
                del callers[connection]
                connection.close()


def _served(connection: Connection, caller: _Caller, offload: Offload, handler: Handler, link: Link) -> bool:
    """Do a piece that has come; return false if its sender has gone away."""
    number = next(caller.numbers)
    try:
        with recorder.span("wait"):
            piece = json.loads(connection.recv_bytes())
            arrays = caller.inbox.read(piece["arrays"])  # as the link would bring them
            sleep_until(piece["due"])
    except (EOFError, OSError):
        return False
    recorder.mark("receive", piece["bytes"], f"s{caller.name}<{number}")
    try:
        with recorder.span(offload.stage.kinds[0]):
            message, found = _do(handler, offload.costs, piece, arrays)
        back = message.pop("back_bytes", sum(value.nbytes for value in found))
        reply: Message = {"message": message, "arrays": caller.outbox.write(piece["place"], found)}
    except BaseException as error:  # the driver heeds signals, so that none of them is an interrupt
        reply, back = _description(error), 0
    try:
        with recorder.span("send", back, f"s{caller.name}>{number}"):
            connection.send_bytes(json.dumps(reply | {"due": link.arrival(back)}).encode())
    except OSError:
        return False
    recorder.flush()
    return True


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
    """Make this process end with the driver, leave signals to it, wake up in time, and stay on a processor.

    It keeps freed memory, as processes that train do, or the same work would take it longer.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        control = ctypes.CDLL(None).prctl
        control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        control(_PR_SET_TIMERSLACK, 1)
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    keep_freed_memory()
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
