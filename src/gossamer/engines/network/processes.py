"""Clients of a simulation as processes of this machine, which dial its server as real ones do."""

from __future__ import annotations

import os

from gossamer.engines.base import EngineSetup
from gossamer.engines.network.children import SILENT_SECONDS, Child, end
from gossamer.engines.network.roster import Roster
from gossamer.engines.network.state import NODES
from gossamer.errors import storage_errors
from gossamer.profiling import recorder

PATIENCE_SECONDS = 20.0  # after which processes end whose server is gone


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
        directory = setup.directory / NODES
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._silent_seconds = setup.straggler_seconds or SILENT_SECONDS
        self._children: dict[str, Child] = {}
        for n in range(number):
            name, clients = f"clients-{n}", list(range(n, num_clients, number))
            arguments = ["client", "--server", address, "--name", name, "--directory", str(directory), "--trust"]
            arguments += ["--simulate", ",".join(map(str, clients))]
            arguments += ["--patience", str(PATIENCE_SECONDS), "--linger", "0"]
            folder = recorder.folder()
            arguments += [] if folder is None else ["--profile", folder]
            log, report = directory / f"{name}.log", setup.hooks.report
            self._children[name] = Child(name, arguments, log, secret, report, clients=clients[:100])

    def look_after(self, roster: Roster) -> None:
        """Start again those that have died, or were away for too long.

        Raises:
            EngineError: one ended with an error, or dies again and again.
        """
        for name, one in self._children.items():
            one.look_after(roster.get(name) is not None, self._silent_seconds)

    def close(self) -> None:
        """End them; kill those that do not end."""
        end(self._children.values())
