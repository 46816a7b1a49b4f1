"""Ray clusters with a node on this machine, found in /proc, and their exposed ports. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

LISTENING = "0A"  # the state of a socket in /proc/net/tcp
PROCESSES = {
    "gcs_server": r"(.*/)?gcs_server",
    "raylet": r"(.*/)?raylet",
    "worker": r"ray::.*",  # agents of the node too
    "dashboard": r".*/ray/dashboard/dashboard\.py",
    "client server": r"ray\.util\.client\.server",
}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that has a node here.

    Attributes:
        address: value for engine.address.
        object_store_bytes: maximum size of this node's object store; None: unknown.
        has_token: whether token authentication is on; None: unknown, because the process belongs to another user.
        exposed: ports that other machines can reach, by kind of process.
    """

    address: str
    object_store_bytes: int | None
    has_token: bool | None
    exposed: dict[str, list[int]] = field(default_factory=dict)


def find_clusters(proc: Path = Path("/proc")) -> list[Cluster]:
    """Return the clusters with a node on this machine; none where there is no /proc."""
    processes, listening = dict(_processes(proc)), _exposed_ports(proc)
    found = []
    for process, arguments in processes.items():
        address = _option(arguments, "gcs-address")
        if _kind(arguments) != "raylet" or address is None:
            continue
        exposed = dict[str, list[int]]()
        for other, theirs in processes.items():
            kind = _kind(theirs)
            ports = sorted(listening[inode] for inode in _sockets(other) & set(listening)) if kind else []
            is_part = {
                "gcs_server": int(address.rpartition(":")[2]) in ports,
                "worker": _parent(other) == process.name,
            }.get(str(kind), address in (_option(theirs, "gcs-address"), _option(theirs, "address")))
            if kind and ports and is_part:
                exposed[kind] = sorted([*exposed.get(kind, []), *ports])
        size = _option(arguments, "object_store_memory")
        found.append(Cluster(address, int(size) if size else None, _has_token(process), exposed))
    return found


def _processes(proc: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder and the command line of every process."""
    for process in sorted(proc.glob("[0-9]*")):
        with suppress(OSError):  # the process ended meanwhile
            arguments = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            yield process, [argument for argument in arguments if argument]


def _kind(arguments: list[str]) -> str | None:
    """Return the kind of a Ray process by its command line, or None."""
    for kind, pattern in PROCESSES.items():
        if any(re.fullmatch(pattern, argument.strip()) for argument in arguments[:4]):  # after the interpreter
            return kind
    return None


def _parent(process: Path) -> str | None:
    with suppress(OSError, IndexError):
        return (process / "stat").read_text().rpartition(")")[2].split()[1]
    return None


def _option(arguments: list[str], name: str) -> str | None:
    """Return the value of ``--name=value``."""
    prefix = f"--{name}="
    return next((argument.removeprefix(prefix) for argument in arguments if argument.startswith(prefix)), None)


def _exposed_ports(proc: Path) -> dict[str, int]:
    """Return ``{inode: port}`` of the sockets in /proc/net/tcp that other machines can reach."""
    found = {}
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for words in map(str.split, (proc / "net" / table).read_text().splitlines()[1:]):
                address, _, port = words[1].partition(":")
                if words[3] == LISTENING and not _is_loopback(address):
                    found[words[9]] = int(port, 16)
    return found


def _is_loopback(address: str) -> bool:
    """Say whether an address, in hexadecimal little-endian words, is 127.0.0.0/8, mapped or not, or ::1."""
    if len(address) == 8 or address.startswith("0" * 16 + "FFFF0000"):
        return address.endswith("7F")
    return address == "0" * 24 + "01000000"


def _sockets(process: Path) -> set[str]:
    """Return the inodes of a process's sockets, among other names; none if it belongs to another user."""
    found = set()
    with suppress(OSError):  # no permission, or the process ended meanwhile
        for descriptor in list((process / "fd").iterdir()):
            with suppress(OSError):  # closed meanwhile
                found.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found


def _has_token(process: Path) -> bool | None:
    try:
        return b"RAY_AUTH_MODE=token" in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
