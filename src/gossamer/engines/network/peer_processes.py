"""Peers of a rehearsal: one process each, which find each other in a folder of the run."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from gossamer.engines.base import EngineSetup
from gossamer.engines.network.beginning import begin_at
from gossamer.engines.network.children import SILENT_SECONDS, Child, end
from gossamer.engines.network.lanes import When
from gossamer.engines.network.state import NODES
from gossamer.engines.task import Task
from gossamer.errors import ConfigError, storage_errors
from gossamer.storage.runlog import CONFIG

BOOK = "addresses"  # folder in which peers of one machine find each other
MAX_PEERS = 64  # that are processes of one machine


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
        self._children: list[Child] = []
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
            self._children.append(self._start(peer))

    def look_after(self, present: Collection[int | None]) -> None:
        """Start again those that have died, or were away for too long.

        Raises:
            EngineError: one ended with an error, or dies again and again.
        """
        for peer, one in enumerate(self._children):
            one.look_after(peer in present, self._silent_seconds)

    def close(self) -> None:
        """End them; kill those that do not end."""
        end(self._children)

    @property
    def _own_options(self) -> dict[str, dict[str, Any] | None]:
        """Entries of the configuration that are others at the peers: the observer evaluates, logs and ends the run."""
        every = self._setup.recipe["config"]["rounds"]
        return {"evaluation": {"every": every}, "log": {"sinks": []}, "stop": None, "replay": None}

    def _start(self, peer: int) -> Child:
        name = f"peer-{peer}"
        arguments = ["peer", str(self._run / CONFIG), "--id", str(peer), "--listen", "127.0.0.1:0"]
        arguments += ["--peers", str(self.folder), "--trust", "--quiet", "--out", str(self._directory / name)]
        for section, change in self._own_options.items():
            entries = {section: "null"} if change is None else {f"{section}.{key}": one for key, one in change.items()}
            arguments += [f"{key}={one}" for key, one in entries.items()]
        log = self._directory / f"{name}.log"
        return Child(name, arguments, log, self._secret, self._report, peers=[peer])
