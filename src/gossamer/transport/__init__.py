"""Messages between machines over gRPC: a server that listens, clients that dial. The only package that imports grpc."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gossamer.transport.client import Client
    from gossamer.transport.credentials import Caller, Credentials, verify_tokens
    from gossamer.transport.limits import Limits, Traffic
    from gossamer.transport.messages import (
        SERVER,
        SERVER_NODE,
        Accept,
        Address,
        Audit,
        Event,
        Gone,
        Header,
        Hello,
        Joined,
        Message,
        Received,
        Refusal,
        Welcome,
    )
    from gossamer.transport.order import Expectations
    from gossamer.transport.server import Server

# gRPC would write to standard error what is raised here; whoever sets the variable gets it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__all__ = [
    "SERVER",
    "SERVER_NODE",
    "Accept",
    "Address",
    "Audit",
    "Caller",
    "Client",
    "Credentials",
    "Event",
    "Expectations",
    "Gone",
    "Header",
    "Hello",
    "Joined",
    "Limits",
    "Message",
    "Received",
    "Refusal",
    "Server",
    "Traffic",
    "Welcome",
    "verify_tokens",
]

_NAMES = {
    "client": ("Client",),
    "credentials": ("Caller", "Credentials", "verify_tokens"),
    "limits": ("Limits", "Traffic"),
    "messages": (
        "SERVER",
        "SERVER_NODE",
        "Accept",
        "Address",
        "Audit",
        "Event",
        "Gone",
        "Header",
        "Hello",
        "Joined",
        "Message",
        "Received",
        "Refusal",
        "Welcome",
    ),
    "order": ("Expectations",),
    "server": ("Server",),
}
_HOMES = {name: f"gossamer.transport.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Return a public name, for which torch and gRPC's messages are imported only now."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
