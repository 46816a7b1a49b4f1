"""What the audit is told of messages: who, what, when in the run, how much, and its digest; never what is in it."""

from __future__ import annotations

from typing import Any

from gossamer.transport.frames import Outgoing
from gossamer.transport.messages import Message, Received


def no_audit(kind: str, **fields: Any) -> None:
    """Tell nobody."""


def of_sent(node: str, outgoing: Outgoing) -> dict[str, Any]:
    """Return what is told of a message that was sent to a node."""
    return _told(node, outgoing.message, outgoing.sha256, outgoing.wire_bytes)


def of_received(received: Received) -> dict[str, Any]:
    """Return what is told of a message that was received."""
    return _told(received.node, received.message, received.sha256, received.wire_bytes)


def _told(node: str, message: Message, sha256: str, wire_bytes: int) -> dict[str, Any]:
    return {
        "node": node,
        "message": message.kind,
        "address": dict(vars(message.address)),
        "sha256": sha256,
        "num_bytes": message.num_bytes,
        "wire_bytes": wire_bytes,
    }
