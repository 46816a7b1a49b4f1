"""What a server tells other processes of its machine, in a file of its run directory."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigError
from gossamer.storage.disk import is_locked, write_atomically

if TYPE_CHECKING:
    from gossamer.engines.network.roster import Roster

NODES = "nodes"  # folder of a run for this file, and for the private state and the output of processes of a rehearsal
FILE = "server.json"
MAX_SHOWN = 20
PAUSE_SECONDS = 1.0  # between two writes


class StateFile:
    """The file; it is written where something has changed, now and then."""

    def __init__(self, directory: Path, address: str, num_clients: int, num_rounds: int) -> None:
        """Make the folder.

        Args:
            directory: of the run.
            address: host:port of the server.
            num_clients: clients of the run.
            num_rounds: rounds of the run.
        """
        self._file = directory / NODES / FILE
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._told = {"process": os.getpid(), "address": address, "clients": num_clients, "rounds": num_rounds}
        self._written, self._at = "", 0.0

    def write(self, roster: Roster, done: tuple[int, int], waiting: list[int]) -> None:
        """Tell who is there, how many rounds and phases are done, and whose answers are waited for.

        Raises:
            StorageError: the disk refuses a write.
        """
        nodes = [{"name": node.name, "clients": sorted(node.clients)} for node in roster.nodes]
        text = json.dumps({**self._told, "done": done[0], "phase": done[1], "waiting": waiting, "nodes": nodes})
        if text != self._written and time.monotonic() - self._at >= PAUSE_SECONDS:
            write_atomically(self._file, text)
            self._written, self._at = text, time.monotonic()


def read(directory: Path) -> dict[str, Any]:
    """Return what the server of a run tells.

    Raises:
        ConfigError: none is at work there.
    """
    try:
        found: dict[str, Any] = json.loads((directory / NODES / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{str(directory)!r} is not the directory of a run of real clients: give --out DIR") from None
    if not is_locked(directory):
        raise ConfigError(f"no server is at work in {str(directory)!r}: start it again with gossamer node server")
    return found


def render(found: dict[str, Any]) -> str:
    """Return it as text, one line for each node."""
    present = {client for node in found["nodes"] for client in node["clients"]}
    lines = [
        f"listening on {found['address']}, {found['done']} of {found['rounds']} rounds done",
        f"{len(present)} of {found['clients']} clients are there",
    ]
    for node in found["nodes"]:
        waited = [client for client in node["clients"] if client in found["waiting"]]
        shown = ", ".join(map(str, node["clients"][:MAX_SHOWN])) + (", ..." if len(node["clients"]) > MAX_SHOWN else "")
        lines.append(f"  {node['name']}: client {shown}" + (f"; {len(waited)} at work" if waited else ""))
    away = [client for client in found["waiting"] if client not in present]
    return "\n".join(lines + ([f"waiting for client {', '.join(map(str, away[:MAX_SHOWN]))}"] if away else []))
