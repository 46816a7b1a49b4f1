"""What torchrun and the machine tell a process: its rank, and the network interface to listen on."""

from __future__ import annotations

import ipaddress
import os
import re
import socket

from gossamer.errors import ConfigError

INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable: where it listens
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ranks() -> tuple[int, int, int]:
    """Return rank, number of processes and local rank.

    Raises:
        ConfigError: torchrun has not started this process.
    """
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set in the environment, so torchrun has"
            " not started this process: start it by torchrun --nproc-per-node 4 train.py"
        )
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE or LOCAL_RANK is no whole number ({error}): use torchrun") from None
    if not 0 <= rank < size:
        raise ConfigError(f"RANK = {rank} is not below WORLD_SIZE = {size}: use torchrun")
    return rank, size, local_rank


def is_one_machine() -> bool:
    """Say whether all processes that torchrun has started are on this machine."""
    size = os.environ["WORLD_SIZE"]
    return os.environ.get("LOCAL_WORLD_SIZE", size) == size or _is_loopback(os.environ["MASTER_ADDR"])


def choose_interface(interface: str | None = None) -> None:
    """Let gloo and NCCL use one interface: the given one, the environment's, or loopback on one machine.

    Raises:
        ConfigError: there is no such interface, or none is named for several machines.
    """
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in names if name.startswith("lo")), "lo")
    chosen = interface or os.environ.get(INTERFACE) or (loopback if is_one_machine() else None)
    if chosen is None:
        raise ConfigError(
            f"the processes of several machines would listen on every network of {socket.gethostname()}: give"
            f" interface, or set {INTERFACE}, to that of a private one, because they know neither authentication nor"
            f" encryption ({', '.join(names)})"
        )
    unknown = [name for name in chosen.split(",") if name not in names]
    if unknown:
        raise ConfigError(
            f"{'interface' if interface else INTERFACE} = {chosen!r} is no network interface of"
            f" {socket.gethostname()}: name one of {', '.join(names)}"
        )
    os.environ[INTERFACE] = chosen
    os.environ.setdefault(NCCL_INTERFACE, chosen)


def first_line(error: BaseException) -> str:
    """Return what torch says, without the place in its source and what it supposes, 200 characters at most."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return re.sub(r"\[/[^]]*\] ", "", line).partition(". This is typically")[0][:200]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
