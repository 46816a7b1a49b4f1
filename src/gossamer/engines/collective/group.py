"""Groups of processes that send tensors to each other, and where they meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.errors import ConfigError, EngineError

Backend = Literal["gloo", "nccl"]
LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable: where it listens
MEETING_SECONDS = 60.0  # in which all members must have come, and every message must have gone


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
    """

    host: str
    port: int
    name: str
    rank: int
    size: int
    backend: Backend


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

    def places(self, size: int, backend: Backend) -> list[Place]:
        """Return the places of a new group."""
        self._num_groups += 1
        name = str(self._num_groups)
        return [Place(self.host, self.port, name, rank, size, backend) for rank in range(size)]


class Group:
    """A member of a group; a process is in one at a time."""

    def __init__(self, place: Place, *, seconds: float = MEETING_SECONDS) -> None:
        """Wait for the others.

        Args:
            place: the process's own.
            seconds: in which they must have come, and in which every later message must have gone.

        Raises:
            GroupBroken: they did not come.
            ConfigError: they are on other machines, and the variable that names a network is not set here.
        """
        import torch.distributed as dist

        self.place, limit = place, timedelta(seconds=seconds)
        if place.host == LOOPBACK:
            os.environ[INTERFACE] = _loopback_interface()
        elif INTERFACE not in os.environ:
            raise ConfigError(
                f"a member of a group would listen on any network at {socket.gethostname()}: set {INTERFACE} there to"
                " the interface of a private one, for gloo knows neither authentication nor encryption"
            )
        try:
            meeting: Any = dist.TCPStore(  # type: ignore[attr-defined]
                place.host, place.port, is_master=False, wait_for_workers=False, timeout=limit
            )
            dist.init_process_group(
                place.backend,
                store=dist.PrefixStore(place.name, meeting),  # type: ignore[attr-defined]
                rank=place.rank,
                world_size=place.size,
                timeout=limit,
            )
        except RuntimeError as error:  # of which torch's own errors are
            self.close()
            raise GroupBroken(f"a group of {place.size} did not come together: {_first_line(error)}") from None

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send one tensor to each of some ranks, and receive one from each of some; all at a time.

        Args:
            outgoing: ``{rank: contiguous tensor}``.
            incoming: ``{rank: contiguous tensor}``, overwritten; of the size and dtype that the rank sends.

        Raises:
            GroupBroken: a member is gone, or did not do its part in time.
        """
        import torch.distributed as dist

        device = "cuda" if self.place.backend == "nccl" else "cpu"
        arriving = {rank: buffer.to(device) for rank, buffer in incoming.items()}
        operations = [dist.P2POp(dist.isend, value.to(device), rank) for rank, value in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in arriving.items()]
        if not operations:
            return
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        except RuntimeError as error:
            raise GroupBroken(f"a member of a group of {self.place.size} is gone: {_first_line(error)}") from None
        if device == "cuda":
            torch.cuda.synchronize()
        for rank, buffer in incoming.items():
            if arriving[rank] is not buffer:
                buffer.copy_(arriving[rank])

    def close(self) -> None:
        """Leave; the others' messages to this process fail from now on."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
