"""The processes that train together, as torchrun starts them, and what this one knows of the others."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch

from gossamer.distributed.ending import end_in_a_sentence
from gossamer.distributed.environment import choose_interface, first_line, ranks
from gossamer.distributed.links import Links
from gossamer.errors import ConfigError, EngineError
from gossamer.topology import Topology, find

Backend = Literal["gloo", "nccl"]
TIMEOUT_SECONDS = 300.0
REMEDY = "see whether they still run, and call the same functions in the same order on all ranks"


@dataclass
class World:
    """The group of all processes, as one of them sees it.

    Attributes:
        rank: number of this process, 0, ..., size - 1.
        size: number of processes.
        local_rank: number of this process among those of its machine.
        device: where this process should keep its model.
        backend: "gloo", between processors, through which CUDA tensors pass by way of the processor; or "nccl", between
            CUDA devices, beside which tensors of processors travel by gloo.
        timeout_seconds: how long to wait for others, for each message.
        links: the ways to the other processes.
        compared: what all ranks were found to agree on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    timeout_seconds: float
    links: Links = field(compare=False, repr=False)
    compared: set[str] = field(default_factory=set, repr=False)
    default_topology: Topology | None = field(default=None, repr=False)


_joined: list[World] = []  # the one, once `init` was called


def init(
    backend: Backend | None = None,
    *,
    device: str | torch.device | None = None,
    interface: str | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    shared_memory: bool = True,
) -> World:
    """Join the group of the processes that torchrun has started, and wait for the others.

    A group that the program has initialised by ``torch.distributed.init_process_group`` itself is taken as it is.

    From now on an error of gossamer's that the program does not catch ends it with its sentence and exit code 2.

    Args:
        backend: "nccl" or "gloo"; None: nccl if each process of this machine has a CUDA device of its own.
        device: where this process keeps its model; None: the CUDA device of its local rank with nccl, else "cpu".
        interface: name of the network interface to listen on; None: that of the environment's ``GLOO_SOCKET_IFNAME``,
            or loopback if all processes are on one machine.
        timeout_seconds: how long to wait for others, now and for each message.
        shared_memory: whether processes of one machine send each other messages through memory that both have mapped,
            and not through sockets.

    Raises:
        ConfigError: the environment is not that of torchrun, or an argument does not fit this machine.
        EngineError: the others did not come in time.
    """
    import torch.distributed as dist

    end_in_a_sentence()
    if timeout_seconds <= 0:
        raise ConfigError(f"timeout_seconds = {timeout_seconds}: give a number above 0")
    if dist.is_initialized():
        found = str(dist.get_backend())
        chosen: str = "nccl" if "nccl" in found else "gloo"
        if backend not in (None, chosen):
            raise ConfigError(f"backend = {backend!r}, but the process group has {found!r}: leave it out")
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    else:
        rank, size, local_rank = ranks()
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        chosen = _backend(backend, local_size)
        choose_interface(interface)
    where = torch.device(device or (f"cuda:{local_rank}" if chosen == "nccl" else "cpu"))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    if not dist.is_initialized():
        _form(chosen, rank, size, timeout_seconds)
        end_in_a_sentence()  # again, because torch has put a hook of its own before it
    if chosen == "nccl":
        dist.all_reduce(torch.zeros(1, device=where))  # connects all, which messages between a few alone would not
    links = Links(dist.group.WORLD, rank, size, timeout_seconds, REMEDY, has_nccl=chosen == "nccl")
    if shared_memory and "gloo" in str(dist.get_backend_config()):
        links.share_memory()
    if _joined:
        _joined.pop().links.close()
    _joined[:] = [World(rank, size, local_rank, where, chosen, timeout_seconds, links)]
    return _joined[0]


def shutdown() -> None:
    """Leave the group; the others' messages to this process fail from now on."""
    import torch.distributed as dist

    if _joined:
        _joined.pop().links.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def current() -> World:
    """Return the group that this process has joined.

    Raises:
        ConfigError: it has not yet, or the group is no longer the one that it joined.
    """
    import torch.distributed as dist

    if not _joined:
        raise ConfigError("this process has joined no group yet: call gossamer.distributed.init() first")
    world, size = _joined[0], dist.get_world_size() if dist.is_initialized() else 0
    if size != world.size:
        raise ConfigError(
            f"this process joined a group of {world.size}, which now has {size}: call gossamer.distributed.init()"
            " again, and make topologies and optimizers anew"
        )
    return world


def rank() -> int:
    """Return the number of this process, 0, ..., size - 1."""
    return current().rank


def size() -> int:
    """Return the number of processes."""
    return current().size


def bytes_sent() -> int:
    """Return how many bytes this process has sent to neighbours; collectives of all processes are not counted."""
    return current().links.bytes_sent


def topology(name: str, **parameters: Any) -> Topology:
    """Return a topology whose peers are the processes of the group.

    Args:
        name: of a topology (``gossamer topology list``), or the path of a file, see `gossamer.topology.load`.
        **parameters: parameters of the topology, ``seed`` (default 0) among them.

    Raises:
        ConfigError: see `gossamer.topology.build`; or the topology has another number of peers.
    """
    world = current()
    if world.size == 1:
        raise ConfigError(
            f"topology {name!r} needs several processes, and this group has one: torchrun --nproc-per-node 2 or more"
        )
    found = find(name, parameters, default_n=world.size)
    check_size(world, found)
    return found


def check_size(world: World, topology: Topology) -> None:
    """Check that the peers of a topology are the processes of the group.

    Raises:
        ConfigError: there are more or fewer.
    """
    if topology.n != world.size:
        raise ConfigError(
            f"topology {topology.name!r} has {topology.n} peers, but the group has {world.size} processes: build it by"
            " gossamer.distributed.topology, or start as many"
        )


def _backend(asked: str | None, local_size: int) -> Backend:
    import torch.distributed as dist

    if asked not in (None, "gloo", "nccl"):
        raise ConfigError(f"backend = {asked!r} is neither 'gloo' nor 'nccl': give one of them, or leave it out")
    if asked == "nccl" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise ConfigError("backend = 'nccl' needs CUDA devices, of which there are none here: give 'gloo'")
    if asked == "nccl" and torch.cuda.device_count() < local_size:
        raise ConfigError(
            f"backend = 'nccl' needs a CUDA device for each of {local_size} processes, but there are"
            f" {torch.cuda.device_count()}: start fewer processes, or give 'gloo'"
        )
    if asked is not None:
        return "nccl" if asked == "nccl" else "gloo"
    has_devices = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    return "nccl" if has_devices and dist.is_nccl_available() else "gloo"


def _form(backend: str, rank: int, size: int, timeout_seconds: float) -> None:
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (RuntimeError, ValueError) as error:  # of which torch's own errors are
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise EngineError(
            f"rank {rank} found no group of {size} processes at {at} within {timeout_seconds:g} s"
            f" ({first_line(error)}): see whether all of them run"
        ) from None
