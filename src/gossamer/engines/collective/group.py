"""Groups of processes that send tensors to each other, and how the processes of torchrun form one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Self
from uuid import uuid4

import torch
from torch import Tensor

from gossamer.errors import ConfigError, EngineError

Backend = Literal["gloo", "nccl"]
LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable: where it listens
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME"
TIMEOUT_SECONDS = 600.0
ROWS, MESSAGES = 0, 1  # tags
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


class GroupBroken(EngineError):
    """A member of a group is gone or does not answer; what was under way must be done again by a new group."""

    exit_code = 1


class Group:
    """A process group, independent of torch's default group and of any other that this process is in.

    Attributes:
        rank: rank of this process, in 0, ..., size - 1.
        size: number of processes.
        backend: gloo, between processors; nccl, between CUDA devices, one each.
    """

    def __init__(
        self, store: Any, rank: int, size: int, backend: Backend = "gloo", timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        """Join as one member, and wait for the others.

        Args:
            store: torch's key-value store, by which the members find each other.
            rank, size, backend: see the class.
            timeout_seconds: timeout for the rendezvous, then for each message.

        Raises:
            GroupBroken: the others did not come in time.
        """
        self.rank, self.size, self.backend = rank, size, backend
        self._limit = timedelta(seconds=timeout_seconds)
        try:
            self._members = self._start(store)
        except RuntimeError as error:  # of which torch's own errors are
            raise GroupBroken(f"a group of {size} did not form: {_first_line(error)}") from None

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
            raise GroupBroken(f"the rendezvous of torchrun failed: {_first_line(error)}") from None
        return cls(dist.PrefixStore(name, store), rank, size, timeout_seconds=timeout_seconds)  # type: ignore[attr-defined]

    def _start(self, store: Any) -> Any:
        import torch.distributed as dist

        if self.backend == "gloo":
            return dist.ProcessGroupGloo(store, self.rank, self.size, self._limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._limit
        return dist.ProcessGroupNCCL(store, self.rank, self.size, options)

    def exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send a tensor to each of some other ranks, and receive one from each of some, all at once.

        Args:
            outgoing: ``{rank: contiguous tensor}``, uint8.
            incoming: ``{rank: contiguous tensor}``, uint8, overwritten; of the size that the rank sends.

        Raises:
            GroupBroken: a member is gone, or did not answer in time.
        """
        if self.backend == "nccl":
            self._wait(lambda: self._exchange_on_gpu(outgoing, incoming))
            return
        works = [(rank, self._begin(self._members.send, value, rank, ROWS)) for rank, value in outgoing.items()]
        works += [(rank, self._begin(self._members.recv, value, rank, ROWS)) for rank, value in incoming.items()]
        for rank, work in works:
            self._wait(partial(work.wait, self._limit), rank)

    def _exchange_on_gpu(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Exchange by one all-to-all, in which most may send nothing."""
        nothing = torch.empty(0, dtype=torch.uint8)
        sent = [outgoing.get(rank, nothing).cuda() for rank in range(self.size)]
        received = [incoming.get(rank, nothing).cuda() for rank in range(self.size)]
        self._members.alltoall(received, sent).wait()
        torch.cuda.synchronize()
        for rank, buffer in incoming.items():
            buffer.copy_(received[rank])

    def swap(
        self, outgoing: Sequence[Sequence[Tensor]], lengths: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> list[list[Tensor]]:
        """Send each rank some rows, and receive some from each, all at once.

        Args:
            outgoing: rows for each rank, those for this one included.
            lengths: those of the rows that each rank sends.
            dtype: dtype of all rows.

        Returns:
            the rows of each rank, this one's own as they are.

        Raises:
            GroupBroken: see `exchange`.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        packed = {rank: torch.cat([*outgoing[rank]]) for rank in others if any(map(len, outgoing[rank]))}
        buffers = {rank: torch.empty(sum(lengths[rank]), dtype=dtype) for rank in others if sum(lengths[rank])}
        self.exchange(
            {rank: value.view(torch.uint8) for rank, value in packed.items()},
            {rank: value.view(torch.uint8) for rank, value in buffers.items()},
        )
        empty = torch.empty(0, dtype=dtype)
        return [
            [*outgoing[rank]] if rank == self.rank else list(torch.split(buffers.get(rank, empty), [*lengths[rank]]))
            for rank in range(self.size)
        ]

    def tell_all(self, message: Message) -> list[Message]:
        """Send JSON values to all ranks, and return those of all, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        first = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)  # of a size that all know: the length, and what fits
        first[:8] = torch.tensor([len(text)]).view(torch.uint8)
        first[8 : 8 + len(text)] = text[: BLOCK_BYTES - 8]
        blocks = self._gathered(first)
        lengths = [int(block[:8].clone().view(torch.int64)) for block in blocks]
        if max(lengths) > BLOCK_BYTES - 8:
            rest = torch.zeros(max(lengths) + 8, dtype=torch.uint8)
            rest[8 : 8 + len(text)] = text
            blocks = self._gathered(rest)
        pairs = zip(blocks, lengths, strict=True)
        return [json.loads(block[8 : 8 + length].numpy().tobytes()) for block, length in pairs]

    def _gathered(self, block: Tensor) -> list[Tensor]:
        found = [torch.empty_like(block) for _ in range(self.size)]
        self._wait(lambda: self._members.allgather([found], [block]).wait(self._limit))
        return found

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
        header = torch.frombuffer(bytearray(json.dumps([message, described]).encode()), dtype=torch.uint8)
        parts = [torch.tensor([len(header)]), header, *(value for value in arrays if value.numel())]
        works = [self._begin(self._members.send, part, rank, MESSAGES) for part in parts]

        def wait() -> None:
            """Wait; holds `parts`, which must live until then."""
            for work, _ in zip(works, parts, strict=True):
                self._wait(partial(work.wait, self._limit), rank)

        return wait

    def receive(self, rank: int, timeout_seconds: float | None = None) -> tuple[Message, list[Tensor]]:
        """Receive what another rank sent.

        Args:
            rank: the sender, which calls `send`.
            timeout_seconds: timeout for its first part; None: that of the group.

        Raises:
            GroupBroken: it is gone, or did not send in time.
        """
        length = self._received(rank, torch.empty(1, dtype=torch.int64), timeout_seconds)
        header = self._received(rank, torch.empty(int(length), dtype=torch.uint8))
        message, described = json.loads(header.numpy().tobytes())
        arrays = [torch.empty(shape, dtype=DTYPES[dtype]) for dtype, shape in described]
        return message, [self._received(rank, value) if value.numel() else value for value in arrays]

    def _received(self, rank: int, buffer: Tensor, timeout_seconds: float | None = None) -> Tensor:
        work = self._begin(self._members.recv, buffer, rank, MESSAGES)
        self._wait(
            partial(work.wait, self._limit if timeout_seconds is None else timedelta(seconds=timeout_seconds)), rank
        )
        return buffer

    def _begin(self, operation: Callable[..., Any], value: Tensor, rank: int, tag: int) -> Any:
        return self._wait(lambda: operation([value], rank, tag), rank)

    def _wait(self, do: Callable[[], Any], rank: int | None = None) -> Any:
        try:
            return do()
        except RuntimeError as error:
            who = "a rank" if rank is None else f"rank {rank}"
            raise GroupBroken(
                f"{who} of {self.size} is gone or did not answer rank {self.rank} within"
                f" {self._limit.total_seconds():g} s ({_first_line(error)}): start the job again, and it goes on from"
                " the last commit"
            ) from None

    def limit(self, timeout_seconds: float) -> None:
        """Change the timeout for each message."""
        self._limit = timedelta(seconds=timeout_seconds)

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


def _first_line(error: BaseException) -> str:
    """Return what torch says, without the place in its source and what it supposes."""
    line = str(error).partition("\n")[0] or type(error).__name__
    return re.sub(r"\[/[^]]*\] ", "", line).partition(". This is typically")[0][:200]
