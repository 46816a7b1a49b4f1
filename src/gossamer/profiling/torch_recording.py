"""Runs torch.profiler under the train spans of a process, and writes what it saw beside the trace.

That is ``DIR/trace/*.torch``, of which a line is an operation: a list of what `Operation` names.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from gossamer.errors import DataError, storage_errors
from gossamer.profiling.torch_events import Operation, read_operations

ENDING = ".torch"
FIELD_TYPES = (str, str, int, int, int, int)


class TorchRecording:
    """What a process records of torch; torch.profiler is one for all threads, so it runs under one span at a time."""

    def __init__(self, directory: Path, process: str) -> None:
        """Record to a file in a folder, which is made when there is something to write."""
        self._path = directory / f"{process}-{os.getpid()}-{time.time_ns()}{ENDING}"
        self._busy = threading.Lock()

    @contextmanager
    def around(self, span: AbstractContextManager[None], record: AbstractContextManager[None]) -> Iterator[None]:
        """Run torch.profiler around a span, unless it runs already.

        Args:
            span: within which operations are recorded.
            record: within which they are written.

        Raises:
            StorageError: the disk refuses it.
        """
        if not self._busy.acquire(blocking=False):
            with span:
                yield
            return
        try:
            profiler = _profiler()
            profiler.start()
            try:
                with span:
                    yield
            finally:
                with record:
                    profiler.stop()
                    self._write(profiler)
        finally:
            self._busy.release()

    def _write(self, profiler: Any) -> None:
        with storage_errors(self._path), tempfile.TemporaryDirectory() as folder:
            exported = Path(folder) / "torch.json"
            profiler.export_chrome_trace(str(exported))
            lines = "".join(json.dumps(list(one)) + "\n" for one in read_operations(exported))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(lines)


def prepare() -> None:
    """Load what torch.profiler needs, which takes seconds: before a round is measured, or a process forked."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it would print every start and stop
    with _profiler():
        pass


def _profiler() -> Any:
    """Make a profiler of the processor, and of the GPU if this process uses one."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    devices = [ProfilerActivity.CUDA] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return profile(activities=[ProfilerActivity.CPU, *devices])


def recorded_operations(directory: Path) -> list[Operation]:
    """Return what the processes of a run recorded of torch; incomplete last lines are left out.

    Raises:
        DataError: a file cannot be read, or holds something else.
    """
    found = []
    for path in sorted((directory / "trace").glob(f"*{ENDING}")):
        try:
            *lines, _ = path.read_text(errors="replace").split("\n")
        except OSError as error:
            raise DataError(f"cannot read {str(path)!r} ({error.strerror}): check its permissions") from None
        for number, line in enumerate(lines, start=1):
            values = _values(line)
            if values is None:
                raise DataError(f"line {number} of {str(path)!r} is no operation of torch: restore it, or move it away")
            found.append(Operation(*values))
    return found


def _values(line: str) -> list[Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_operation = isinstance(values, list) and tuple(map(type, values)) == FIELD_TYPES
    return values if is_operation and values[-1] >= 0 else None
