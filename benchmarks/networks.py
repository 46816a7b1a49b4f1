"""Networks of processes' own, whose cable can be cut, and slow lines."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
import time
from pathlib import Path

from forked import start, wait

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from wires import Wire

SLOW_BYTES = 20_000  # that have passed through a slow line when it counts as one

_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_GET_FLAGS, _SET_FLAGS, _IS_UP = 0x8913, 0x8914, 1


def make_network() -> bool:
    """Give this process, and those that it starts, a network of their own; false where the system does not let it."""
    flags = _CLONE_NEWNET if os.geteuid() == 0 else _CLONE_NEWNET | _CLONE_NEWUSER
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(flags):
        return False
    try:
        set_cable(True)
    except OSError:
        return False
    return True


def set_cable(is_up: bool) -> None:
    """Let the loopback interface work, or not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(one, _GET_FLAGS, request), 16)
        flags = flags | _IS_UP if is_up else flags & ~_IS_UP
        fcntl.ioctl(one, _SET_FLAGS, struct.pack("16sH14x", b"lo", flags))


def can_cut(log: Path) -> bool:
    """Say whether processes can have a network of their own here."""
    return wait(start(lambda: int(not make_network()), log)) == 0


def free_port() -> int:
    """Return the number of a port that is free."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def be_wire(target: str, bytes_per_second: float, file: Path, marker: Path) -> int:
    """Be a slow line to an address; write where it is dialled, and that a good deal went through."""
    with Wire(target, bytes_per_second) as wire:
        aside = file.with_suffix(".writing")
        aside.write_text(wire.address)
        aside.replace(file)
        while True:
            if wire.forwarded_bytes > SLOW_BYTES and not marker.exists():
                marker.touch()
            time.sleep(0.05)
