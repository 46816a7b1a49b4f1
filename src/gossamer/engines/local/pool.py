"""Forked worker processes that train and evaluate blocks over shared memory.

Workers inherit the workload, the state and the slots by fork, so nothing is copied and no program text travels;
messages are JSON. A worker has one torch thread. Forking (Linux) also spares users the ``if __name__ == "__main__"``
guard and a second import of torch; docs/decisions/0002 says what speaks against it.

A worker that dies, is stopped, or hangs is replaced, and its jobs are done again. Signs of life are answers and
processor time, so a long job is left alone however long it takes.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import json
import mmap
import multiprocessing
import os
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from gossamer.engines.base import STOP_SIGNALS, never
from gossamer.errors import EngineError, GossamerError, StateLost, one_line
from gossamer.memory import memory_errors
from gossamer.profiling import recorder

Message = dict[str, Any]
Handler = Callable[[Message], Message]

JOBS_AHEAD = 2
POLL_SECONDS = 0.1
LARGE_BYTES = 32_768
TRANSFER_SECONDS = 30  # in which some of a message must get through, because who reads or writes it has begun to
CHECKS_STOPPED = 10  # polls in a row that find a worker stopped; counted, since the driver may have been stopped, too
SILENT_SECONDS = 120.0  # without a sign of life; doubled for every replacement
MAX_FAILURES = 3  # of each worker in a row, on average, without a single reply
_PR_SET_PDEATHSIG = 1


class WorkerPool:
    """Processes that all run the same handler."""

    def __init__(
        self,
        num_workers: int,
        make_handler: Callable[[Callable[[], None]], Handler],
        *,
        silent_seconds: float | None = None,
        on_event: Callable[..., None] = lambda kind, **fields: None,
    ) -> None:
        """Fork `num_workers` processes.

        Args:
            num_workers: number of processes.
            make_handler: called in each process with a callback, which a handler calls before it changes what cannot be
                made anew: a job is done again only if the worker was lost before.
            silent_seconds: seconds without a sign of life after which a worker is replaced; None: `SILENT_SECONDS`.
            on_event: callback for every replacement.

        Raises:
            EngineError: the system does not grant that many processes.
        """
        self._make_handler, self._on_event = make_handler, on_event
        self._silent_seconds = silent_seconds or SILENT_SECONDS
        self._workers: list[_Worker] = []
        atexit.register(self.close)  # workers do not heed SIGTERM, by which multiprocessing would end them
        for number in range(num_workers):
            try:
                self._workers.append(self._started())
            except OSError as error:
                self.close()
                raise EngineError(
                    f"cannot start worker process {number + 1} of {num_workers} ({error.strerror or error}): lower"
                    " engine.workers"
                ) from None

    def map(
        self,
        jobs: Iterable[Message],
        stop: Callable[[], bool] = never,
        before_repetition: Callable[[Message], None] = lambda message: None,
    ) -> Iterator[Message]:
        """Hand out `jobs` as workers become free; yield replies in the order in which they arrive.

        Args:
            jobs: drawn from lazily.
            stop: when it turns true, no more replies are waited for and `StopIteration` follows.
            before_repetition: callback for a job that is done again, because its worker was lost.

        Raises:
            EngineError: workers were lost again and again, or a handler failed (its traceback is a note of the error).
            StateLost: a worker was lost while it changed what cannot be made anew.
            GossamerError: the handler raised one; it is raised again here.
        """
        batch = _Batch(iter(jobs))
        self._workers = [self._started(worker.generation) if worker.is_ended else worker for worker in self._workers]
        try:
            for depth in range(1, JOBS_AHEAD + 1):  # breadth first, so that few jobs are shared evenly
                for worker in self._workers:
                    batch.refill(worker, depth)
            while busy := {worker.connection: worker for worker in self._workers if worker.queue}:
                with recorder.span("wait"):
                    ready = wait(list(busy), POLL_SECONDS)
                if stop():
                    return
                for worker in [busy[connection] for connection in ready]:  # type: ignore[index]
                    reply = worker.receive()
                    if reply is not None:
                        batch.num_failures = 0
                        yield reply
                        batch.refill(worker, JOBS_AHEAD)
                    else:
                        self._replace(worker, worker.end(), batch, before_repetition)
                for worker in busy.values() if batch.is_time_to_check() else ():
                    reason = worker.fault(self._silent_seconds) if worker.queue and not worker.is_ended else None
                    if reason is not None:
                        worker.kill()
                        self._replace(worker, reason, batch, before_repetition)
        finally:
            for worker in self._workers:
                if worker.queue:  # whoever uses the pool next must not get what comes of these jobs
                    worker.kill()

    def close(self) -> None:
        """Stop every worker now."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.kill()

    def _started(self, generation: int = 0) -> _Worker:
        others = [worker.connection for worker in self._workers if not worker.is_ended]
        return _Worker(self._make_handler, others, generation)

    def _replace(self, lost: _Worker, reason: str, batch: _Batch, before_repetition: Callable[[Message], None]) -> None:
        """Start another worker in the place of one that has ended, and have its jobs done again."""
        number, pid = self._workers.index(lost), lost.process.pid
        batch.num_failures += 1
        if batch.num_failures > MAX_FAILURES * len(self._workers):
            raise EngineError(
                f"worker process {pid} {reason}, as {batch.num_failures - 1} did before it: resume the run, with fewer"
                " engine.workers if memory is short"
            )
        self._on_event("worker-replaced", worker=number, process=pid, reason=reason)
        if lost.is_writing:
            raise StateLost(f"worker process {pid} {reason} while it changed the state: resume from the last commit")
        for message in lost.queue:
            before_repetition(message)
        batch.again.extend(lost.queue)
        self._workers[number] = self._started(lost.generation + 1)
        batch.refill(self._workers[number], JOBS_AHEAD)


class _Batch:
    """The jobs that `WorkerPool.map` has not handed out.

    Attributes:
        again: jobs of lost workers, which come first.
        num_failures: workers lost in a row.
    """

    def __init__(self, source: Iterator[Message]) -> None:
        self._source, self.again, self.num_failures = source, deque[Message](), 0
        self._checked = time.monotonic()

    def refill(self, worker: _Worker, depth: int) -> None:
        """Send jobs to a worker until it has `depth` of them."""
        while len(worker.queue) < depth:
            job = self.again.popleft() if self.again else next(self._source, None)
            if job is None:
                return
            message = json.dumps(job).encode()
            if worker.queue and len(message) > LARGE_BYTES:  # a busy worker reads later: both sides could wait to write
                self.again.appendleft(job)
                return
            worker.queue.append(job)
            worker.send(message)

    def is_time_to_check(self) -> bool:
        """Say whether `POLL_SECONDS` have passed since the last check of the workers, and note this one."""
        now = time.monotonic()
        if now - self._checked < POLL_SECONDS:
            return False
        self._checked = now
        return True


class _Worker:
    """A process, and the jobs that it has been sent.

    Attributes:
        process, connection: the process, and this end of the connection to it.
        queue: jobs that it has not answered.
        generation: number of workers that it replaces, one after another.
    """

    def __init__(
        self, make_handler: Callable[[Callable[[], None]], Handler], others: list[Connection], generation: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", TRANSFER_SECONDS, 0))
        self.queue, self.generation = deque[Message](), generation
        self._writing = mmap.mmap(-1, 1)
        self._ticks = self._num_stopped = self._num_silent = self._num_sent = self._num_received = 0
        arguments = (theirs, [*others, self.connection], make_handler, self._writing, os.getpid())
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        try:
            self.process.start()
        except OSError:
            self.connection.close()
            raise
        finally:
            theirs.close()

    @property
    def is_ended(self) -> bool:
        """Whether the process is no more."""
        return self.connection.closed

    @property
    def is_writing(self) -> bool:
        """Whether it is, or was when it ended, changing what cannot be made anew."""
        return self._writing[0] != 0

    def send(self, message: bytes) -> None:
        """Send a message; that nobody reads it is noticed when the answer is waited for."""
        self._num_sent += 1
        with recorder.span("send", len(message), f"{self.process.pid}<{self._num_sent}"):
            try:
                self.connection.send_bytes(message)
            except OSError:
                self.process.kill()

    def receive(self) -> Message | None:
        """Return an answer; None: the process has ended, or does not end its message."""
        self._num_received += 1
        with recorder.span("receive", message=f"{self.process.pid}>{self._num_received}"):
            try:
                text = self.connection.recv_bytes()
                reply: Message = json.loads(text)
            except (EOFError, OSError):
                return None
            recorder.count_bytes(lambda: len(text))
        self.queue.popleft()
        self._num_silent = 0
        if "error" in reply:
            if reply["gossamer"]:
                raise GossamerError(reply["error"])
            failed = EngineError(
                f"worker process {self.process.pid} failed with {reply['error']}: correct it; engine.workers=0 trains"
                " in this process, for a debugger"
            )
            failed.add_note(reply["traceback"])
            raise failed
        return reply

    def fault(self, silent_seconds: float) -> str | None:
        """Say, at one of regular checks, why the process should be replaced; None: it should not be.

        A process that a debugger has stopped (state t), or that waits for a disk (D), is left alone.
        """
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text(errors="replace")
        except OSError:  # it has ended, and the connection will say so
            return None
        fields = text.rpartition(")")[2].split()
        state, ticks = fields[0], int(fields[11]) + int(fields[12])  # of processor time, in all threads
        self._num_stopped = self._num_stopped + 1 if state == "T" else 0
        self._num_silent = self._num_silent + 1 if state in "ST" and ticks == self._ticks else 0
        self._ticks = ticks
        if self._num_stopped >= CHECKS_STOPPED:
            return "was stopped by a signal"
        silent = self._num_silent * POLL_SECONDS
        return f"gave no sign of life for {silent:.0f} s" if silent > silent_seconds * 2**self.generation else None

    def end(self) -> str:
        """Wait for a process that is about to end, and return how it did."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        self.kill()
        return "did not end its message" if code is None else f"died with exit code {code} (-9: often out of memory)"

    def kill(self) -> None:
        """End the process, if it has not ended."""
        self.process.kill()
        self.process.join(timeout=5)
        self.connection.close()


def _work(
    connection: Connection,
    inherited: list[Connection],
    make_handler: Callable[[Callable[[], None]], Handler],
    writing: mmap.mmap,
    parent: int,
) -> None:
    """Serve jobs until the parent goes away."""
    for other in inherited:
        other.close()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for number in STOP_SIGNALS:  # that a terminal or a scheduler sends to all processes: the parent heeds them
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)

    def before_writing() -> None:
        """Note that the job under way cannot be done again."""
        writing[0] = 1

    handler, pid = make_handler(before_writing), os.getpid()
    for count in itertools.count(1):
        try:
            with recorder.span("wait"):
                message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            with recorder.span("receive", len(message), f"{pid}<{count}"):
                job = json.loads(message)
            with memory_errors():
                reply = handler(job)
        except BaseException as error:  # the parent heeds signals, so that none of them is an interrupt
            is_ours = isinstance(error, GossamerError)
            told = str(error) if is_ours else one_line(error)
            reply = {"error": told, "gossamer": is_ours, "traceback": traceback.format_exc()}
        answer = json.dumps(reply).encode()
        with recorder.span("send", len(answer), f"{pid}>{count}"):
            connection.send_bytes(answer)
        writing[0] = 0
        recorder.flush()
