"""Clients of a simulation as processes of this machine, which dial its server as real ones do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gossamer.engines.base import EngineSetup
from gossamer.engines.network.roster import Roster
from gossamer.engines.network.state import NODES
from gossamer.errors import EngineError, storage_errors

SECRET = "GOSSAMER_NODE_SECRET"  # environment variable by which a server tells its own processes from strangers
START_SECONDS = 300.0  # that a process may take to load its data
SILENT_SECONDS = 30.0  # that one may be away, unless the configuration says
PATIENCE_SECONDS = 20.0  # after which processes end whose server is gone
MAX_STARTS = 20
CLOSE_SECONDS = 5.0


@dataclass
class _Process:
    """One process: the clients that it is, and what it does.

    Attributes:
        deadline: when it is given up unless its node is there by then.
        starts: how often it was started.
    """

    name: str
    clients: list[int]
    running: subprocess.Popen[bytes]
    deadline: float
    starts: int = 1


class Processes:
    """The processes that are all clients of a run; they are started again when they die."""

    def __init__(self, address: str, secret: str, num_clients: int, setup: EngineSetup) -> None:
        """Start them.

        Args:
            address: host:port of the server.
            secret: what they must say when they join.
            num_clients: clients of the run, of which each process is every n-th.
            setup: number of processes, 0 for one for each core; the run's directory; callback for events.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        number = min(setup.workers or cores, num_clients)
        assert setup.directory is not None
        self._directory = setup.directory / NODES
        with storage_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        self._address, self._secret, self._report = address, secret, setup.hooks.report
        self._silent_seconds = setup.straggler_seconds or SILENT_SECONDS
        clients = {f"clients-{n}": list(range(n, num_clients, number)) for n in range(number)}
        self._processes = [
            _Process(name, some, self._start(name, some), time.monotonic() + START_SECONDS)
            for name, some in clients.items()
        ]

    def look_after(self, roster: Roster) -> None:
        """Start again those that have died, or were away for too long.

        Raises:
            EngineError: one ended with an error, or dies again and again.
        """
        now = time.monotonic()
        for one in self._processes:
            code = one.running.poll()
            if code is None and roster.get(one.name) is not None:
                one.deadline = now + self._silent_seconds
            elif code is None and now > one.deadline:
                one.running.kill()
            elif code is not None:
                self._replace(one, code)

    def close(self) -> None:
        """End them; kill those that do not end."""
        for one in self._processes:
            one.running.terminate()
        deadline = time.monotonic() + CLOSE_SECONDS
        for one in self._processes:
            try:
                one.running.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.running.kill()
                one.running.wait()

    def _replace(self, one: _Process, code: int) -> None:
        if code >= 0 or one.starts >= MAX_STARTS:
            lines = self._log(one.name).read_text(encoding="utf-8", errors="replace").split("\n")
            told = [line for line in lines if line][-1:] or [f"exit code {code}"]
            raise EngineError(f"process {one.name} ended: {told[0].removeprefix('error: ')}")
        self._report("worker-restarted", worker=one.name, exit_code=code, clients=one.clients[:100])
        one.running, one.starts = self._start(one.name, one.clients), one.starts + 1
        one.deadline = time.monotonic() + START_SECONDS

    def _start(self, name: str, clients: list[int]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gossamer", "node", "client", "--server", self._address, "--name", name]
        command += ["--simulate", ",".join(map(str, clients)), "--directory", str(self._directory), "--trust"]
        command += ["--patience", str(PATIENCE_SECONDS), "--linger", "0"]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, SECRET: self._secret}
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # signals of the terminal are for the server, which then ends them
            )

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"
