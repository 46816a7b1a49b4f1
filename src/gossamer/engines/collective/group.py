"""Groups of processes that send tensors to each other, and the rendezvous at which they form."""

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


class Member(NamedTuple):
    """A process's membership of a group.

    Attributes:
        host, port: address of the rendezvous.
        name: name of the group, unique at its rendezvous.
        rank: rank of the process, in 0, ..., size - 1.
        size: number of processes.
        backend: gloo, between processors; nccl, between CUDA devices, one each.
        timeout_seconds: timeout for the rendezvous, then for each message.
    """

    host: str
    port: int
    name: str
    rank: int
    size: int
    backend: Backend
    timeout_seconds: float


class Rendezvous:
    """A server, listening at one address only, by which the members of groups find each other."""

    def __init__(self, host: str = LOOPBACK) -> None:
        """Listen on any free port.

        Args:
            host: address of one interface of this machine.

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

    def members(self, size: int, backend: Backend, timeout_seconds: float) -> list[Member]:
        """Return the members of a new group, by rank."""
        self._num_groups += 1
        name = str(self._num_groups)
        return [Member(self.host, self.port, name, rank, size, backend, timeout_seconds) for rank in range(size)]

    def close(self) -> None:
        """Stop listening; groups that have formed stay."""
        self._server = None


class Group:
    """A process group, independent of torch's default group and of any other that this process is in."""

    def __init__(self, member: Member) -> None:
        """Join as one member, and wait for the others.

        Raises:
            GroupBroken: the others did not come in time.
            ConfigError: the rendezvous is on another machine, and `INTERFACE` is not set in the environment here.
        """
        import torch.distributed as dist

        self.member, limit = member, timedelta(seconds=member.timeout_seconds)
        _set_interface(member)
        try:
            rendezvous = dist.TCPStore(  # type: ignore[attr-defined]
                member.host, member.port, is_master=False, wait_for_workers=False, timeout=limit
            )
            store = dist.PrefixStore(member.name, rendezvous)  # type: ignore[attr-defined]
            self._members = self._start(store, limit)
        except RuntimeError as error:  # of which torch's own errors are
            raise GroupBroken(f"a group of {member.size} did not form: {_first_line(error)}") from None

    def _start(self, store: Any, limit: timedelta) -> Any:
        import torch.distributed as dist

        if self.member.backend == "gloo":
            return dist.ProcessGroupGloo(store, self.member.rank, self.member.size, limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, self.member.rank, self.member.size, options)

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send a tensor to each of some other ranks, and receive one from each of some, all at once.

        Args:
            outgoing: ``{rank: contiguous tensor}``, uint8.
            incoming: ``{rank: contiguous tensor}``, uint8, overwritten; of the size that the rank sends.

        Raises:
            GroupBroken: a member is gone, or did not answer in time.
        """
        try:
            if self.member.backend == "nccl":
                self._exchange_on_gpu(outgoing, incoming)
                return
            under_way = [self._members.send([value], rank, 0) for rank, value in outgoing.items()]
            under_way += [self._members.recv([buffer], rank, 0) for rank, buffer in incoming.items()]
            for work in under_way:
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"a member of a group of {self.member.size} is gone: {_first_line(error)}") from None

    def _exchange_on_gpu(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Exchange by one all-to-all, in which most may send nothing."""
        nothing = torch.empty(0, dtype=torch.uint8)
        sent = [outgoing.get(rank, nothing).cuda() for rank in range(self.member.size)]
        received = [incoming.get(rank, nothing).cuda() for rank in range(self.member.size)]
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
            f"{INTERFACE} = {interface!r} is no interface of {socket.gethostname()} with an IPv4 address"
            f" ({error.strerror}): name one that ip -4 address lists"
        ) from None


def _set_interface(member: Member) -> None:
    """Make this process listen on loopback if the rendezvous does, else on the interface of the environment."""
    if member.host == LOOPBACK:
        os.environ[INTERFACE] = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    elif INTERFACE not in os.environ:
        raise ConfigError(
            f"a member of a group would listen on every network of {socket.gethostname()}: set {INTERFACE} there to the"
            " interface of a private one, because groups know neither authentication nor encryption"
        )
    os.environ[NCCL_INTERFACE] = os.environ[INTERFACE]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
