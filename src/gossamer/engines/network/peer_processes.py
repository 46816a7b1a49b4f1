"""Peers of a rehearsal: one process each, which find each other in a folder of the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.engines.base import EngineSetup
from gossamer.engines.network.beginning import begin_at
from gossamer.engines.network.lanes import When
from gossamer.engines.network.processes import CLOSE_SECONDS, MAX_STARTS, SECRET, SILENT_SECONDS, START_SECONDS
from gossamer.engines.network.state import NODES
from gossamer.engines.task import Task
from gossamer.errors import ConfigError, EngineError, storage_errors
from gossamer.storage.runlog import CONFIG

BOOK = "addresses"  # folder in which peers of one machine find each other
MAX_PEERS = 64  # that are processes of one machine


@dataclass
class _Process:
    """One peer's process, when it is given up unless it is there by then, and how often it was started."""

    running: subprocess.Popen[bytes]
    deadline: float
    starts: int = 1


class PeerProcesses:
    """The processes that are the peers of a run; they are started again when they die.

    Attributes:
        folder: into which each writes its address.
    """

    def __init__(self, task: Task, secret: str, setup: EngineSetup) -> None:
        """Start none yet.

        Args:
            task: task that they train.
            secret: what they must say when they join.
            setup: the run's directory; callback for events.

        Raises:
            ConfigError: there are too many peers.
        """
        num_peers = task.workload.num_clients
        if num_peers > MAX_PEERS:
            raise ConfigError(
                f"engine network starts a process for each of {num_peers} peers, and {MAX_PEERS} at most: take engine"
                " local, ray or collective, or start peers yourself with gossamer node peer"
            )
        assert setup.directory is not None
        self._run, self._directory, self._setup = setup.directory, setup.directory / NODES, setup
        assert task.topology is not None
        self._inputs = {"data": task.workload.digest(), "topology": task.topology.digest()}
        self._num_peers, self._secret, self._report = num_peers, secret, setup.hooks.report
        self._silent_seconds = setup.straggler_seconds or SILENT_SECONDS
        self._processes: list[_Process] = []
        self.folder = self._directory / BOOK
        with storage_errors(self._directory):
            shutil.rmtree(self._directory, ignore_errors=True)  # of processes that are gone
            self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, at: When, state: Mapping[str, Tensor] | None) -> None:
        """Start them.

        Args:
            at: round and phase in which they begin.
            state: rows of all peers from which they go on, [n, d]; None: they begin with the initial ones.
        """
        config: dict[str, Any] = {**self._setup.recipe["config"]}
        for section, change in self._own_options.items():
            config[section] = change if change is None else {**config[section], **change}
        for peer in range(self._num_peers):
            if state is not None:
                rows = {name: value[peer : peer + 1] for name, value in state.items()}
                begin_at(self._directory / f"peer-{peer}", config, {"configuration": config, **self._inputs}, at, rows)
            self._processes.append(_Process(self._start(peer), time.monotonic() + START_SECONDS))

    def look_after(self, present: Collection[int | None]) -> None:
        """Start again those that have died, or were away for too long.

        Raises:
            EngineError: one ended with an error, or dies again and again.
        """
        now = time.monotonic()
        for peer, one in enumerate(self._processes):
            code = one.running.poll()
            if code is None and peer in present:
                one.deadline = now + self._silent_seconds
            elif code is None and now > one.deadline:
                one.running.kill()
            elif code is not None:
                self._replace(peer, one, code)

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

    @property
    def _own_options(self) -> dict[str, dict[str, Any] | None]:
        """Entries of the configuration that are others at the peers: the observer evaluates, logs and ends the run."""
        every = self._setup.recipe["config"]["rounds"]
        return {"evaluation": {"every": every}, "log": {"sinks": []}, "stop": None, "replay": None}

    def _replace(self, peer: int, one: _Process, code: int) -> None:
        if code >= 0 or one.starts >= MAX_STARTS:
            lines = self._log(peer).read_text(encoding="utf-8", errors="replace").split("\n")
            told = [line for line in lines if line][-1:] or [f"exit code {code}"]
            raise EngineError(f"process peer-{peer} ended: {told[0].removeprefix('error: ')}")
        self._report("worker-restarted", worker=f"peer-{peer}", exit_code=code, peers=[peer])
        one.running, one.starts = self._start(peer), one.starts + 1
        one.deadline = time.monotonic() + START_SECONDS

    def _start(self, peer: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gossamer", "node", "peer", str(self._run / CONFIG), "--id", str(peer)]
        command += ["--listen", "127.0.0.1:0", "--peers", str(self.folder), "--trust", "--quiet"]
        command += ["--out", str(self._directory / f"peer-{peer}")]
        for section, change in self._own_options.items():
            entries = {section: "null"} if change is None else {f"{section}.{key}": one for key, one in change.items()}
            command += [f"{key}={one}" for key, one in entries.items()]
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, SECRET: self._secret}
        with self._log(peer).open("ab") as log:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # signals of the terminal are for the observer, which then ends them
            )

    def _log(self, peer: int) -> Path:
        return self._directory / f"peer-{peer}.log"
