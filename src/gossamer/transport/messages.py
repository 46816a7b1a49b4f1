"""What is sent between nodes, and what a server and a client tell the one who uses them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import TransportError

SERVER = -1  # sender of what the server itself says
SERVER_NODE = "server"  # name that a client's events give to its server
MAX_NUMBER = 2**32 - 1  # of rounds, phases and attempts

QUEUED, TAKEN = ":queued", ":taken"  # of the ids of messages that are on their way between threads of one process

Json = Mapping[str, Any]
Spec = tuple[torch.dtype, tuple[int, ...]]  # of an array
Audit = Callable[..., None]  # audit(kind, **fields)

_TO_JSON = json.JSONEncoder(separators=(",", ":"))
_RUN = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_NODE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KIND = re.compile(r"[a-z0-9_-]{1,32}")


@dataclass(frozen=True, order=True)
class Address:
    """What a message belongs to; it is applied at most once.

    Of one (run, sender, kind of message), only what is later than the last one applied is taken, in the order of
    (round, phase, attempt): an equal one is a duplicate, an earlier one is stale. A reply carries the address of its
    job. A job that is repeated carries a higher attempt if a new answer is wanted, the same if it only may not have
    arrived. A restarted server is a new one to its nodes: it may repeat a round with the same addresses.

    Attributes:
        run: id of the run.
        round, phase: see `gossamer.plan.RoundPlan`.
        sender: participant (client or peer) that it is from, or for; `SERVER`.
        attempt: 0, 1, ...
    """

    run: str
    round: int
    phase: int
    sender: int
    attempt: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """(round, phase, attempt), by which messages of one run, sender and kind are ordered."""
        return self.round, self.phase, self.attempt


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: what it is, such as "train", "update" or "row".
        address: see `Address`.
        body: JSON values, nothing large.
        arrays: contiguous tensors in the memory of this machine, of any dtype that safetensors names. They are sent
            from where they are, so must not change until `Client.send` has returned, or the future of `Server.send` is
            done.
    """

    kind: str
    address: Address
    body: Json = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.numel() * array.itemsize for array in self.arrays.values())


@dataclass(frozen=True)
class Header:
    """What is known of a message before memory is taken for its arrays; it is within all limits.

    Attributes:
        node: name of the node that sends it.
        kind, address, body: see `Message`.
        specs: dtype and shape of each array, in the order of their data.
        num_bytes: of all arrays.
    """

    node: str
    kind: str
    address: Address
    body: Json
    specs: Mapping[str, Spec]
    num_bytes: int


Accept = Callable[[Header], Mapping[str, Tensor] | None]
"""Decides about a message by its header, in any thread.

Returns contiguous tensors that its arrays are read into, of equal names, dtypes and shapes (what they hold is undefined
until the message is received, and after it was dropped), or None: memory is allocated, of each array by itself. Raises
`Dropped` where the message is not wanted.
"""


@dataclass(frozen=True)
class Hello:
    """A node that wants to join, after it was authenticated.

    Attributes:
        node: its name.
        body: JSON values that it tells.
        address: of its connection.
        identities: names in its certificate; empty without TLS.
    """

    node: str
    body: Json
    address: str
    identities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Welcome:
    """The node may join; `body`, JSON values, is what it is told."""

    body: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """The node may not join: a sentence that it is told, and whether it may try again."""

    reason: str
    retry: bool = False


@dataclass(frozen=True)
class Joined:
    """A node has joined, or joined again."""

    node: str
    hello: Hello


@dataclass(frozen=True)
class Received:
    """A whole message with a right digest, later than all of its kind before.

    Attributes:
        node: name of the node that sent it.
        message: its arrays are the receiver's.
        sha256: hexadecimal digest of header and arrays.
        wire_bytes: of its frames.
    """

    node: str
    message: Message
    sha256: str
    wire_bytes: int


@dataclass(frozen=True)
class Gone:
    """A node has left, or its connection is lost."""

    node: str
    reason: str


Event = Joined | Received | Gone


def traced(client: str, server: str) -> str:
    """Return what a connection is called in traces: by who has dialled, and whom, if that has a name."""
    return f"{client}@{server}" if server else client


def message_id(client: str, way: str, message: Message | Header) -> str:
    """Return the name that a message has in the traces of both ends, see `gossamer.profiling.recorder`.

    Args:
        client: node that has dialled, see `traced`.
        way: ">" from it, or "<" to it.
    """
    address = message.address
    return f"{client}{way}{message.kind}.{address.round}.{address.phase}.{address.sender}.{address.attempt}"


def check_node(name: str) -> str:
    """Return the name of a node.

    Raises:
        TransportError: it is not one.
    """
    if not _NODE.fullmatch(name):
        raise TransportError(f"{name[:80]!r} is no name of a node: give 1 to 64 letters, digits, '.', '_' and '-'")
    return name


def check_address(kind: str, address: Address) -> None:
    """Check the kind and the address of a message.

    Raises:
        TransportError: they are malformed.
    """
    if not _KIND.fullmatch(kind):
        raise TransportError(f"{kind[:80]!r} is no kind of message: give 1 to 32 small letters, digits, '_' and '-'")
    if not _RUN.fullmatch(address.run):
        raise TransportError(f"{address.run[:80]!r} is no id of a run: give 1 to 64 letters, digits and '._:-'")
    numbers = {"round": address.round, "phase": address.phase, "attempt": address.attempt}
    for name, number in numbers.items():
        if not 0 <= number <= MAX_NUMBER:
            raise TransportError(f"{name} {number} of a message is out of range: give 0 to {MAX_NUMBER}")
    if not SERVER <= address.sender < 2**63:
        raise TransportError(
            f"sender {address.sender} of a message is out of range: give {SERVER} (the server) or more"
        )


def encode_json(body: Json, max_bytes: int) -> bytes:
    """Return a JSON object in UTF-8.

    Raises:
        TransportError: it holds what JSON cannot, or is longer than `max_bytes`.
    """
    try:
        encoded = _TO_JSON.encode(body).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TransportError(f"a body must hold JSON values ({error}): send arrays as arrays") from None
    if len(encoded) > max_bytes:
        raise TransportError(
            f"a body takes {len(encoded)} bytes, more than {max_bytes}: send less, or raise body_bytes"
        )
    return encoded


def decode_json(encoded: bytes, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object that `encoded` is; empty: an empty one.

    Raises:
        TransportError: it is none, or is longer than `max_bytes`.
    """
    if len(encoded) > max_bytes:
        raise TransportError(f"a body takes {len(encoded)} bytes, more than {max_bytes}")
    try:
        found = json.loads(encoded) if encoded else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise TransportError("a body is no JSON object")
    return found
