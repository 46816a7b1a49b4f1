"""Nodes of a rehearsal: processes of this machine that are started again when they die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from gossamer.errors import EngineError

SECRET = "GOSSAMER_NODE_SECRET"  # environment variable by which a node tells its own processes from strangers
START_SECONDS = 300.0  # that a process may take to load its data
SILENT_SECONDS = 30.0  # that one may be away, unless the configuration says
MAX_STARTS = 20
CLOSE_SECONDS = 5.0


class Child:
    """A process that runs ``gossamer node``, and is started again when it dies or is away for too long."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, secret: str, report: Callable[..., None], **details: Any
    ) -> None:
        """Start it.

        Args:
            name: its name in sentences and events.
            arguments: those of ``gossamer node``.
            log: file to which what it prints is appended.
            secret: what it must say when it joins.
            report: callback for events, which get the `details`, too.
        """
        self._name, self._arguments, self._log, self._secret = name, arguments, log, secret
        self._report, self._details, self._starts = report, details, 1
        self._running = self._start()

    def look_after(self, is_there: bool, silent_seconds: float) -> None:
        """Start it again if it has died, or was away for too long.

        Args:
            is_there: whether it has joined.
            silent_seconds: how long it may be away after that.

        Raises:
            EngineError: it ended with an error, or dies again and again.
        """
        now, code = time.monotonic(), self._running.poll()
        if code is None and is_there:
            self._deadline = now + silent_seconds
        elif code is None and now > self._deadline:
            self._running.kill()
        elif code is not None:
            self._replace(code)

    def terminate(self) -> None:
        """Ask it to end."""
        self._running.terminate()

    def wait(self, deadline: float) -> None:
        """Wait until it has ended; kill it at a time of the monotonic clock."""
        try:
            self._running.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()

    def _replace(self, code: int) -> None:
        if code >= 0 or self._starts >= MAX_STARTS:
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            told = [line for line in lines if line][-1:] or [f"exit code {code}"]
            raise EngineError(f"process {self._name} ended: {told[0].removeprefix('error: ')}")
        self._report("worker-restarted", worker=self._name, exit_code=code, **self._details)
        self._running, self._starts = self._start(), self._starts + 1

    def _start(self) -> subprocess.Popen[bytes]:
        self._deadline = time.monotonic() + START_SECONDS
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gossamer", "node", *self._arguments],
                env=os.environ | {"PYTHONPATH": paths, SECRET: self._secret},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # signals of the terminal are for the process that has started it
            )


def end(children: Collection[Child]) -> None:
    """End processes; kill those that do not end within `CLOSE_SECONDS`."""
    for one in children:
        one.terminate()
    deadline = time.monotonic() + CLOSE_SECONDS
    for one in children:
        one.wait(deadline)
