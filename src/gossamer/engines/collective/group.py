"""Groups of processes that send tensors to each other, and how the processes of torchrun form one."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Self
from uuid import uuid4

import torch
from torch import Tensor

from gossamer.distributed.environment import INTERFACE, NCCL_INTERFACE, first_line
from gossamer.distributed.links import Exchange, GroupBroken, Links
from gossamer.errors import ConfigError
from gossamer.profiling import recorder

LOOPBACK = "127.0.0.1"
TIMEOUT_SECONDS = 600.0
REMEDY = "start the job again, and it goes on from the last commit"
BLOCK_BYTES = 4096  # of a message to all
DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.uint8,
        torch.bool,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
Message = dict[str, Any]
Extent = tuple[int, int, torch.dtype]  # rank, length and dtype of a tensor


class Group:
    """A process group, independent of torch's default group and of any other that this process is in.

    Attributes:
        rank: rank of this process, in 0, ..., size - 1.
        size: number of processes.
        links: the ways to the others: memory on one machine, gloo between machines.
        bytes_sent: bytes of all messages that this process has sent.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        """Join as one member, and wait for the others.

        Args:
            store: torch's key-value store, by which the members find each other.
            rank, size: see the class.
            timeout_seconds: timeout for the rendezvous, then for each message.

        Raises:
            GroupBroken: the others did not come in time.
        """
        import torch.distributed as dist

        self.rank, self.size, self.bytes_sent = rank, size, 0
        self._numbers = Counter[str]()  # of messages, by sender, receiver and how they travel
        try:
            members = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_seconds))
        except RuntimeError as error:  # of which torch's own errors are
            raise GroupBroken(f"a group of {size} did not form: {first_line(error)}") from None
        self.links = Links(members, rank, size, timeout_seconds, REMEDY)
        self.links.share_memory()

    @classmethod
    def of_environment(cls, timeout_seconds: float = TIMEOUT_SECONDS) -> Self:
        """Join the group of all processes that torchrun started.

        Args:
            timeout_seconds: timeout for the rendezvous, then for each message.

        Raises:
            GroupBroken: the others did not come in time.
            ConfigError: the environment lacks torchrun's variables, or names an interface that does not exist.
        """
        import torch.distributed as dist

        if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigError(
                f"engine collective needs {', '.join(missing)} in the environment: start it with torchrun"
                " --nproc-per-node N -m gossamer run FILE --engine collective --out DIR"
            )
        _set_interface()
        try:
            limit = timedelta(seconds=timeout_seconds)
            found = dist.rendezvous("env://", timeout=limit)  # type: ignore[attr-defined]
            store, rank, size = next(iter(found))
            name = _agree_on_name(store, rank, size, timeout_seconds)
        except (RuntimeError, ValueError) as error:
            raise GroupBroken(f"the rendezvous of torchrun failed: {first_line(error)}") from None
        return cls(dist.PrefixStore(name, store), rank, size, timeout_seconds=timeout_seconds)  # type: ignore[attr-defined]

    @property
    def others(self) -> list[int]:
        """The other ranks, ascending."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def exchange(self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[Extent]) -> Exchange:
        """Send tensors to other ranks, and receive some from them, all at once; see `Exchange`.

        Args:
            outgoing: ranks, and contiguous tensors on the CPU.
            incoming: rank, length and dtype of each tensor, in the order in which the rank sends them.

        Raises:
            GroupBroken: a member is gone, or did not answer in time.
        """
        sizes, expected = Counter[int](), Counter[int]()
        for rank, value in outgoing:
            sizes[rank] += value.nbytes
        for rank, length, dtype in incoming:
            expected[rank] += length * dtype.itemsize
        self.bytes_sent += sizes.total()
        ids = {rank: self._id(rank, self.rank, "=") for rank, size in expected.items() if size}

        @contextmanager
        def arrival(rank: int) -> Iterator[None]:
            """Record a wait, and what has come."""
            with recorder.span("wait"):
                yield
            recorder.mark("receive", expected[rank], ids[rank])

        for rank, size in sizes.items():
            if size:
                recorder.mark("send", size, self._id(self.rank, rank, "="))
        with recorder.span("send"):
            return Exchange(self.links, outgoing, incoming, arrival=arrival)

    def tell_all(self, message: Message) -> list[Message]:
        """Send JSON values to all ranks, and return those of all, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        first = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)  # of a size that all know: the length, and what fits
        first[:8] = torch.tensor([len(text)]).view(torch.uint8)
        first[8 : 8 + len(text)] = text[: BLOCK_BYTES - 8]
        told = {rank: block.clone() for rank, block in self._swapped(first, dict.fromkeys(self.others, BLOCK_BYTES))}
        lengths = {rank: int(block[:8].view(torch.int64)) for rank, block in told.items()}
        texts = {rank: block[8 : 8 + lengths[rank]] for rank, block in told.items()}
        if max(len(text), *lengths.values(), 0) > BLOCK_BYTES - 8:
            texts = dict(self._swapped(text, lengths))
        values = {rank: json.loads(value.numpy().tobytes()) for rank, value in texts.items()} | {self.rank: message}
        return [values[rank] for rank in range(self.size)]

    def _swapped(self, value: Tensor, lengths: Mapping[int, int]) -> list[tuple[int, Tensor]]:
        """Send bytes to all others, and return theirs, by rank."""
        incoming = [(rank, length, torch.uint8) for rank, length in lengths.items()]
        with self.exchange([(rank, value) for rank in self.others], incoming) as received:
            return [(rank, part.clone()) for rank, part in zip(lengths, received, strict=True)]

    def send(self, rank: int, message: Mapping[str, Any], arrays: Sequence[Tensor] = ()) -> Callable[[], None]:
        """Send JSON values and arrays to another rank.

        Args:
            rank: the receiver, which calls `receive`.
            message: JSON values.
            arrays: contiguous tensors on the CPU; unchanged until they are sent.

        Returns:
            a function that waits until everything is sent.

        Raises:
            GroupBroken: as `exchange`, here or when the function is called.
        """
        described = [[str(value.dtype), list(value.shape)] for value in arrays]
        with recorder.span("serialise"):
            header = torch.frombuffer(bytearray(json.dumps([message, described]).encode()), dtype=torch.uint8)
            recorder.count_bytes(lambda: len(header))
        parts = [torch.tensor([len(header)]), header, *(value for value in arrays if value.numel())]
        num_bytes = sum(part.nbytes for part in parts)
        self.bytes_sent += num_bytes
        with recorder.span("send", num_bytes, self._id(self.rank, rank, ">")):
            return self.links.send(rank, parts)

    def receive(self, rank: int, timeout_seconds: float | None = None) -> tuple[Message, list[Tensor]]:
        """Receive what another rank sent.

        Args:
            rank: the sender, which calls `send`.
            timeout_seconds: timeout for its first part; None: that of the group.

        Raises:
            GroupBroken: it is gone, or did not send in time.
        """
        with ExitStack() as stack:
            with recorder.span("wait"):
                take = stack.enter_context(self.links.receive(rank, timeout_seconds))
                length = take(1, torch.int64)
            with recorder.span("receive", message=self._id(rank, self.rank, ">")):
                header = take(int(length), torch.uint8)
                message, described = json.loads(header.numpy().tobytes())
                arrays = [torch.empty(shape, dtype=DTYPES[dtype]) for dtype, shape in described]
                for value in arrays:
                    if value.numel():
                        value.view(-1).copy_(take(value.numel(), value.dtype))
                recorder.count_bytes(lambda: sum(part.nbytes for part in (length, header, *arrays)))
            return message, arrays

    def _id(self, sender: int, receiver: int, way: str) -> str:
        """Number a message, and return what a sender's span and its receiver's have in common."""
        path = f"{sender}{way}{receiver}"
        self._numbers[path] += 1
        return f"{path}.{self._numbers[path]}"

    def limit(self, timeout_seconds: float) -> None:
        """Change the timeout for each message."""
        self.links.timeout_seconds = timeout_seconds

    def close(self) -> None:
        """Leave; the others' messages to this process fail from now on."""
        self.links.close()
        self.links.members = None


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


def _agree_on_name(store: Any, rank: int, size: int, timeout_seconds: float) -> str:
    """Return a name for the group that no earlier one had: torchrun keeps its store when it starts ranks again.

    Every other rank asks under a key of its own with a number that is new, and rank 0 answers under that number.
    """
    own = f"gossamer-{uuid4()}"
    if rank:
        store.set(f"gossamer-{rank}", own)
        name = str(store.get(own).decode())
        store.set(f"{name}-{rank}", "")
        return name
    deadline, waiting, answered = time.monotonic() + timeout_seconds, list(range(1, size)), {""}
    while waiting:
        for other in waiting:
            asked = store.get(f"gossamer-{other}").decode() if store.check([f"gossamer-{other}"]) else ""
            if asked not in answered:  # of a rank that is no more, perhaps, which does no harm
                store.set(asked, own)
                answered.add(asked)
        waiting = [other for other in waiting if not store.check([f"{own}-{other}"])]
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {waiting[0]} did not come within {timeout_seconds:g} s")
        time.sleep(0.005)
    return own


def _set_interface() -> None:
    """Let the ranks of one machine listen on its loopback interface, unless the environment names another one."""
    if INTERFACE in os.environ:
        address_of(os.environ[INTERFACE])
    elif os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ["WORLD_SIZE"]:
        os.environ[INTERFACE] = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    if INTERFACE in os.environ:
        os.environ.setdefault(NCCL_INTERFACE, os.environ[INTERFACE])
