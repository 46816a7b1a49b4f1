"""Records what each thread of a run does when, as JSON lines in ``DIR/trace/``, one file a process.

A file begins with a header, see `Recorder`; then follows a line for each span, a list in the order of `FIELDS`, and in
the driver's an object for each whole round. Spans of a thread are nested or apart. Processes that are forked while a
recorder is on record to files of their own. While none is on, a span is one shared object that does nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from gossamer.errors import storage_errors

if TYPE_CHECKING:
    from gossamer.profiling.torch_recording import TorchRecording

FORMAT, VERSION = "gossamer-trace", 1
FIELDS = ("kind", "thread", "begin_ns", "end_ns", "cpu_ns", "delay_ns", "bytes", "message")
MAX_BUFFERED = 4096  # spans, after which a buffer is written
CRITICAL, BACKGROUND = "critical", "background"
AWAY_NS = 10_000  # for which a thread must have been off its processor before its statistics are read again
BACKGROUND_KINDS = ("checkpoint", "commit", "digest", "log")  # that no other work of the round waits for


class _Nothing:
    """A span that is not recorded."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


_NOTHING = _Nothing()


class _Thread(threading.local):
    """What a thread needs: its number, its open spans and its statistics of the scheduler, -1 where there are none."""

    def __init__(self) -> None:
        self.number, self.descriptor = threading.get_native_id(), -1
        self.open: list[_Span] = []
        self._away_ns, self._delay_ns = -AWAY_NS, 0  # when the statistics were read last, and what they said
        with suppress(OSError):
            self.descriptor = os.open(f"/proc/self/task/{self.number}/schedstat", os.O_RDONLY)

    def delay_ns(self, away_ns: int) -> int:
        """Return how long the thread has waited for a processor so far.

        Args:
            away_ns: how long it has been off its processor so far, but for a constant. As long as that does not change,
                nor does what is asked for.
        """
        if away_ns - self._away_ns >= AWAY_NS and self.descriptor >= 0:
            self._away_ns, self._delay_ns = away_ns, int(os.pread(self.descriptor, 64, 0).split()[1])
        return self._delay_ns


class Recorder:
    """Writes the trace of one process.

    The header names ``format``, ``version``, ``process``, ``pid``, ``thread`` (the main one: the others serve it, and
    are away where they record nothing), ``host``, ``boot`` (processes of one boot share the clock), ``fields`` and a
    reading of both clocks, ``monotonic_ns`` and ``unix_ns``, taken together. May be used from several threads.
    """

    def __init__(self, directory: Path, process: str, torch: TorchRecording | None = None) -> None:
        """Begin to record; the file is made when there is something to write.

        Args:
            torch: what runs torch.profiler under train spans; None: it does not run.
        """
        self.directory, self.torch, self._thread, pid = directory, torch, _Thread(), os.getpid()
        self._lines: list[str] = []
        self._lock, self._is_closed = threading.RLock(), False
        self._path = directory / f"{process}-{pid}-{time.time_ns()}.jsonl"
        self._descriptor = -1
        header = {
            "format": FORMAT,
            "version": VERSION,
            "process": process,
            "pid": pid,
            "thread": self._thread.number,
            "host": socket.gethostname(),
            "boot": _boot(),
            "fields": FIELDS,
            "monotonic_ns": time.monotonic_ns(),
            "unix_ns": time.time_ns(),
        }
        self._header = json.dumps(header)

    def span(self, kind: str, num_bytes: int = 0, message: str = "") -> AbstractContextManager[None]:
        """Return a context that records a span.

        Args:
            kind: stage, such as ``train``.
            num_bytes: of what it works on.
            message: id that a sender's span and its receiver's have in common.
        """
        found = _Span(self, self._thread, kind, num_bytes, message)
        if self.torch is None or kind != "train":
            return found
        return self.torch.around(found, self.span("record"))

    def count_bytes(self, num_bytes: int) -> None:
        """Add to the bytes of the span that is open in this thread."""
        if self._thread.open:
            self._thread.open[-1].num_bytes += num_bytes

    @contextmanager
    def round(self, number: int) -> Iterator[None]:
        """Note a round, counted from 1, if it ends well; what was recorded by then is written."""
        began = time.monotonic_ns()
        yield
        self.write(f'{{"round": {number}, "begin_ns": {began}, "end_ns": {time.monotonic_ns()}}}')
        self.flush()

    def write(self, line: str) -> None:
        """Add one line, unless the recorder is closed."""
        with self._lock:
            if not self._is_closed:
                self._lines.append(line)
            if len(self._lines) >= MAX_BUFFERED:
                self.flush()

    def flush(self) -> None:
        """Write what was recorded.

        Raises:
            StorageError: the disk refuses it.
        """
        with self._lock, storage_errors(self._path):
            if self._lines:
                lines, self._lines = self._lines, []
                if self._descriptor < 0:
                    self.directory.mkdir(parents=True, exist_ok=True)
                    self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                    lines.insert(0, self._header)
                os.write(self._descriptor, ("\n".join(lines) + "\n").encode())

    def close(self) -> None:
        """Write the rest, and close the file."""
        with self._lock:
            self.flush()
            self._is_closed = True
            if self._descriptor >= 0:
                os.close(self._descriptor)


class _Span:
    """One span while it is open."""

    __slots__ = ("_began", "_cpu", "_delay", "_kind", "_message", "_recorder", "_thread", "num_bytes")

    def __init__(self, recorder: Recorder, thread: _Thread, kind: str, num_bytes: int, message: str) -> None:
        self._recorder, self._thread, self._kind, self._message = recorder, thread, kind, message
        self.num_bytes = num_bytes

    def __enter__(self) -> None:
        if self._thread.open:  # others may get the processor at this call of the system, for the outer span's work
            self._cpu, self._began = time.thread_time_ns(), time.monotonic_ns()
        else:
            self._began, self._cpu = time.monotonic_ns(), time.thread_time_ns()
        self._thread.open.append(self)
        self._delay = self._thread.delay_ns(self._began - self._cpu)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        used = time.thread_time_ns()  # a call of the system, at which others may get the processor: so before the end
        ended, thread = time.monotonic_ns(), self._thread
        if self not in thread.open:  # it was begun in another thread, as of a generator that is thrown away
            return
        cpu, delay = used - self._cpu, thread.delay_ns(ended - used) - self._delay
        thread.open.remove(self)
        self._recorder.write(
            f'["{self._kind}", {thread.number}, {self._began}, {ended}, {cpu}, {delay}, {self.num_bytes}, '
            f'"{self._message}"]'
        )


_current: Recorder | None = None


def span(kind: str, num_bytes: int = 0, message: str = "") -> AbstractContextManager[None]:
    """Return a context that records a span, see `Recorder.span`, or does nothing."""
    return _NOTHING if _current is None else _current.span(kind, num_bytes, message)


def mark(kind: str, num_bytes: int = 0, message: str = "") -> None:
    """Record a moment, such as that at which a message leaves; see `span`."""
    if _current is not None:
        with _current.span(kind, num_bytes, message):
            pass


def count_bytes(num_bytes: Callable[[], int]) -> None:
    """Add to the bytes of the open span; they are not counted while nothing is recorded."""
    if _current is not None:
        _current.count_bytes(num_bytes())


def round_span(number: int) -> AbstractContextManager[None]:
    """Return a context that records a round, or does nothing."""
    return _NOTHING if _current is None else _current.round(number)


def flush() -> None:
    """Write what was recorded, because this process may be ended."""
    if _current is not None:
        with _current.span("record"):
            _current.flush()


def is_on() -> bool:
    """Say whether this process records."""
    return _current is not None


def folder() -> str | None:
    """Return the absolute path of where this process records, for another one to begin there; None: it does not."""
    return None if _current is None else str(_current.directory.resolve())


def start(directory: Path, process: str, torch: bool = False) -> None:
    """Record this process from now on; `torch`: with torch.profiler under train spans."""
    global _current
    with_torch = None
    if torch:  # imported here, because it is rarely asked for
        from gossamer.profiling.torch_recording import TorchRecording

        with_torch = TorchRecording(directory, process)
    _current = Recorder(directory, process, with_torch)


def start_there(directory: str | None, process: str) -> None:
    """Record this process from now on if there is a folder for it, as on all machines that share the run's."""
    if directory is not None and Path(directory).is_dir():
        start(Path(directory), process)


def stop() -> None:
    """Write the rest of what this process recorded, and record no longer.

    Raises:
        StorageError: the disk refuses it.
    """
    global _current
    ended, _current = _current, None
    if ended is not None:
        ended.close()


@contextmanager
def recording(directory: Path | None, process: str = "driver", torch: bool = False) -> Iterator[None]:
    """Record this process, and all processes that it forks, within the block; None: record nothing.

    Args:
        torch: whether torch.profiler runs under train spans.

    Raises:
        StorageError: the disk refuses a write.
    """
    if directory is None:
        yield
        return
    if torch:
        from gossamer.profiling.torch_recording import prepare

        prepare()
    start(directory, process, torch)
    try:
        yield
    finally:
        stop()


def _after_fork() -> None:
    global _current
    if _current is not None:
        directory, torch, _current = _current.directory, _current.torch is not None, None
        start(directory, "worker", torch)


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


os.register_at_fork(after_in_child=_after_fork)
