"""Groups of processes that send tensors to each other, and where they meet."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.errors import ConfigError, EngineError

Backend = Literal["gloo", "nccl"]
LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable: where it listens
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
_GET_ADDRESS = 0x8915  # SIOCGIFADDR


class GroupBroken(EngineError):
    """A member of a group is gone or does not answer; what was under way must be done again by a new group."""


class Place(NamedTuple):
    """A process's place in a group.

    Attributes:
        host, port: of the meeting.
        name: of the group, which no earlier one of that meeting had.
        rank: of the process, in 0, ..., size - 1.
        size: number of processes.
        backend: gloo, between processors; nccl, between CUDA devices, one each.
        seconds: in which all members must have come, and then every message must have gone.
    """

    host: str
    port: int
    name: str
    rank: int
    size: int
    backend: Backend
    seconds: float


class Meeting:
    """Where the members of groups find each other: a small server that listens at one address only."""

    def __init__(self, host: str = LOOPBACK) -> None:
        """Listen at `host`, which names one interface of this machine, on any free port.

        Raises:
            OSError: this machine has no such interface.
        """
        import torch.distributed as dist

        listener = socket.socket()
        listener.bind((host, 0))
        listener.listen()
        self.host, self.port = host, int(listener.getsockname()[1])
        self._server: Any = dist.TCPStore(  # type: ignore[attr-defined]
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._num_groups = 0

    def places(self, size: int, backend: Backend, seconds: float) -> list[Place]:
        """Return the places of a new group."""
        self._num_groups += 1
        name = str(self._num_groups)
        return [Place(self.host, self.port, name, rank, size, backend, seconds) for rank in range(size)]

    def close(self) -> None:
        """Listen no longer; groups that have come together stay."""
        self._server = None


class Group:
    """A member of a group, apart from torch's default group and from any other that the process is in."""

    def __init__(self, place: Place) -> None:
        """Wait for the others.

        Raises:
            GroupBroken: they did not come.
            ConfigError: they are on other machines, and the variable that names a network is not set here.
        """
        import torch.distributed as dist

        self.place, limit = place, timedelta(seconds=place.seconds)
        _listen_where_told(place)
        try:
            meeting = dist.TCPStore(  # type: ignore[attr-defined]
                place.host, place.port, is_master=False, wait_for_workers=False, timeout=limit
            )
            store = dist.PrefixStore(place.name, meeting)  # type: ignore[attr-defined]
            self._members = self._start(store, limit)
        except RuntimeError as error:  # of which torch's own errors are
            raise GroupBroken(f"a group of {place.size} did not come together: {_first_line(error)}") from None

    def _start(self, store: Any, limit: timedelta) -> Any:
        import torch.distributed as dist

        if self.place.backend == "gloo":
            return dist.ProcessGroupGloo(store, self.place.rank, self.place.size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, self.place.rank, self.place.size, options)

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send one tensor to each of some other ranks, and receive one from each of some; all at a time.

        Args:
            outgoing: ``{rank: contiguous tensor}``, uint8.
            incoming: ``{rank: contiguous tensor}``, uint8, overwritten; as large as the one that the rank sends.

        Raises:
            GroupBroken: a member is gone, or did not do its part in time.
        """
        try:
            if self.place.backend == "nccl":
                self._exchange_on_gpu(outgoing, incoming)
                return
            under_way = [self._members.send([value], rank, 0) for rank, value in outgoing.items()]
            under_way += [self._members.recv([buffer], rank, 0) for rank, buffer in incoming.items()]
            for work in under_way:
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"a member of a group of {self.place.size} is gone: {_first_line(error)}") from None

    def _exchange_on_gpu(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Do it as one all-to-all, in which most may send nothing."""
        nothing = torch.empty(0, dtype=torch.uint8)
        sent = [outgoing.get(rank, nothing).cuda() for rank in range(self.place.size)]
        received = [incoming.get(rank, nothing).cuda() for rank in range(self.place.size)]
        self._members.alltoall(received, sent).wait()
        torch.cuda.synchronize()
        for rank, buffer in incoming.items():
            buffer.copy_(received[rank])

    def close(self) -> None:
        """Leave; the others' messages to this process fail from now on."""
        self._members = None


def has_nccl() -> bool:
    """Say whether this torch can use NCCL."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_nccl_available()


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface of this machine.

    Raises:
        ConfigError: there is no such interface, or it has no such address.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", interface[:15].encode())
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)[20:24])
    except OSError as error:
        raise ConfigError(
            f"{INTERFACE} = {interface!r} is no interface with an IPv4 address of {socket.gethostname()}"
            f" ({error.strerror}): name one that ip -4 address lists"
        ) from None


def _listen_where_told(place: Place) -> None:
    """Let this process's side listen on loopback if all are on one machine, else on the interface that is named."""
    if place.host == LOOPBACK:
        os.environ[INTERFACE] = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    elif INTERFACE not in os.environ:
        raise ConfigError(
            f"a member of a group would listen on any network at {socket.gethostname()}: set {INTERFACE} there to the"
            " interface of a private one, for groups know neither authentication nor encryption"
        )
    os.environ[NCCL_INTERFACE] = os.environ[INTERFACE]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
