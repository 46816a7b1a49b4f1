"""Forked worker processes that train and evaluate blocks over shared memory.

Workers inherit the workload, the state and the slots by fork, so nothing is copied and no program text travels;
messages are JSON. A worker has one torch thread. Forking (Linux) also spares users the ``if __name__ == "__main__"``
guard and a second import of torch; docs/decisions/0002 says what speaks against it.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from gossamer.errors import EngineError, GossamerError, one_line

Message = dict[str, Any]
Handler = Callable[[Message], Message]

JOBS_AHEAD = 2
POLL_SECONDS = 0.1
LARGE_BYTES = 32_768
_PR_SET_PDEATHSIG = 1


class WorkerPool:
    """Processes that all run the same handler."""

    def __init__(self, num_workers: int, make_handler: Callable[[], Handler]) -> None:
        """Fork `num_workers` processes; each builds its handler with `make_handler` after the fork."""
        context = multiprocessing.get_context("fork")
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, [*self._connections, ours], make_handler, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def map(self, jobs: Iterable[Message], stop: Callable[[], bool]) -> Iterator[Message]:
        """Hand out `jobs` as workers become free; yield replies in the order in which they arrive.

        `jobs` is drawn from lazily. When `stop` turns true, no more replies are waited for and `StopIteration` follows.

        Raises:
            EngineError: a worker died, or its handler failed (its traceback is a note of the error).
            GossamerError: the handler raised one; it is raised again here.
        """
        source, in_flight = iter(jobs), {id(c): deque[None]() for c in self._connections}
        by_id = {id(connection): connection for connection in self._connections}

        held: list[bytes] = []

        def refill(connection: Connection, depth: int) -> None:
            """Send jobs to a worker until it has `depth` of them."""
            queue = in_flight[id(connection)]
            while len(queue) < depth:
                job = None if held else next(source, None)
                if job is None and not held:
                    return
                message = held.pop() if held else json.dumps(job).encode()
                if queue and len(message) > LARGE_BYTES:  # a busy worker reads later: both sides could wait to write
                    held.append(message)
                    return
                self._send(connection, message)
                queue.append(None)

        for depth in range(1, JOBS_AHEAD + 1):  # breadth first, so that few jobs are shared evenly
            for connection in self._connections:
                refill(connection, depth)
        while any(in_flight.values()):
            ready = wait([by_id[key] for key, jobs_there in in_flight.items() if jobs_there], POLL_SECONDS)
            if not ready and stop():
                return
            for connection in (by_id[id(item)] for item in ready):
                reply = self._receive(connection)
                in_flight[id(connection)].popleft()
                yield reply
                refill(connection, JOBS_AHEAD)

    def close(self) -> None:
        """Stop every worker now."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()

    def _send(self, connection: Connection, message: bytes) -> None:
        try:
            connection.send_bytes(message)
        except (BrokenPipeError, ConnectionError):
            self._died(connection)

    def _receive(self, connection: Connection) -> Message:
        try:
            reply: Message = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):
            self._died(connection)
        if "error" in reply:
            if reply["gossamer"]:
                raise GossamerError(reply["error"])
            failed = EngineError(
                f"worker process {self._process_of(connection).pid} failed with {reply['error']}: correct it;"
                " engine.workers=0 trains in this process, for a debugger"
            )
            failed.add_note(reply["traceback"])
            raise failed
        return reply

    def _process_of(self, connection: Connection) -> BaseProcess:
        return self._processes[self._connections.index(connection)]

    def _died(self, connection: Connection) -> None:
        process = self._process_of(connection)
        process.join(timeout=5)
        raise EngineError(
            f"worker process {process.pid} died with exit code {process.exitcode} (-9: often out of memory):"
            " resume the run, with fewer engine.workers if memory is short"
        )


def _work(
    connection: Connection, inherited: list[Connection], make_handler: Callable[[], Handler], parent: int
) -> None:
    """Serve jobs until the parent goes away."""
    for other in inherited:
        other.close()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    handler = make_handler()
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            reply = handler(json.loads(message))
        except Exception as error:
            is_ours = isinstance(error, GossamerError)
            told = str(error) if is_ours else one_line(error)
            reply = {"error": told, "gossamer": is_ours, "traceback": traceback.format_exc()}
        connection.send_bytes(json.dumps(reply).encode())
