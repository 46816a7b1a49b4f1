"""What a server tells other processes of its machine, in a file of its run directory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigError
from gossamer.storage.disk import is_locked, write_atomically

if TYPE_CHECKING:
    from gossamer.engines.network.roster import Roster
    from gossamer.transport import Traffic

NODES = "nodes"  # folder of a run for this file, and for the private state and the output of processes of a rehearsal
Row = Mapping[str, Any]  # of the table of clients
FILE = "server.json"
MAX_SHOWN = 20
PAUSE_SECONDS = 1.0  # between two writes


class StateFile:
    """The file; it is written where something has changed, now and then."""

    def __init__(
        self,
        directory: Path,
        address: str,
        num_clients: int,
        num_rounds: int,
        show: Callable[[Sequence[Row]], None] = lambda rows: None,
    ) -> None:
        """Make the folder.

        Args:
            directory: of the run.
            address: host:port of the server.
            num_clients: clients of the run.
            num_rounds: rounds of the run.
            show: gets a table once a second, see `table_of`.
        """
        self._file = directory / NODES / FILE
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._num_clients = num_clients
        self._told = {"process": os.getpid(), "address": address, "clients": num_clients, "rounds": num_rounds}
        self._show, self._written, self._at = show, "", 0.0

    def write(
        self, roster: Roster, done: tuple[int, int], waiting: list[int], traffic: Callable[[], Mapping[str, Traffic]]
    ) -> None:
        """Tell who is there, how many rounds and phases are done, and whose answers are waited for, once a second.

        Args:
            traffic: returns what went to and from each node.

        Raises:
            StorageError: the disk refuses a write.
        """
        now = time.monotonic()
        if now - self._at < PAUSE_SECONDS:
            return
        self._at = now
        self._show(table_of(roster, self._num_clients, waiting, traffic(), now))
        nodes = [{"name": node.name, "clients": sorted(node.clients)} for node in roster.nodes]
        text = json.dumps({**self._told, "done": done[0], "phase": done[1], "waiting": waiting, "nodes": nodes})
        if text != self._written:
            write_atomically(self._file, text)
            self._written = text


def table_of(
    roster: Roster, num_clients: int, waiting: Collection[int], traffic: Mapping[str, Traffic], now: float
) -> list[Row]:
    """Return what there is to see of the clients of a run, by their numbers; of those who never came, nothing.

    Args:
        waiting: clients whose answers are waited for.
        traffic: what went to and from each node, by name.
        now: seconds of a monotonic clock.

    Returns:
        of each its number, name, samples, state ("at work", "idle" or "away"), the seconds since its node was last
        heard, and the bytes that its node has sent and received.
    """
    rows = list[Row]()
    for client in range(num_clients):
        node = roster.last_node_of(client)
        if node is None:
            continue
        went = traffic.get(node.name)
        state = "at work" if client in waiting and client in node.asked else "idle"
        rows.append(
            {
                "client": client,
                "name": node.name,
                "samples": node.samples[client],
                "state": state if roster.node_of(client) is node else "away",
                "heard_seconds": now - node.heard_at,
                "bytes_up": 0 if went is None else went.received_bytes,
                "bytes_down": 0 if went is None else went.sent_bytes,
            }
        )
    return rows


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
