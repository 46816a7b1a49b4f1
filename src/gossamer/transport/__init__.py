"""Messages between machines over gRPC: a server that listens, clients that dial. The only package that imports grpc."""

import os

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
