"""The side that listens."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from gossamer.errors import ConfigError, Disconnected
from gossamer.profiling import recorder
from gossamer.transport.audit import no_audit
from gossamer.transport.calls import SERVICE, Failure, options
from gossamer.transport.credentials import Credentials, host_and_port, require_protected
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import Inbox, Limits, Traffic
from gossamer.transport.messages import (
    QUEUED,
    TAKEN,
    Accept,
    Audit,
    Event,
    Hello,
    Message,
    Received,
    Refusal,
    Welcome,
    message_id,
    traced,
)
from gossamer.transport.reading import Reader
from gossamer.transport.service import Service

DRAIN_SECONDS = 2.0  # that `close` gives to what waits to be sent
SPARE_FILES = 256  # open at a time, besides the connection of each node
SPARE_CALLS = 64  # at a time, besides one of each node that has joined


def welcome_all(hello: Hello) -> Welcome:
    """Let any node join that is authenticated."""
    return Welcome()


class Server:
    """Listens for nodes, sends them messages and receives theirs. May be used from several threads."""

    def __init__(
        self,
        listen: str,
        *,
        admit: Callable[[Hello], Welcome | Refusal] = welcome_all,
        accept: Accept | None = None,
        credentials: Credentials | None = None,
        limits: Limits | None = None,
        audit: Audit = no_audit,
        trace_name: str = "",
    ) -> None:
        """Listen.

        Args:
            listen: "host:port"; port 0: one that is free, see `address`.
            admit: asked before a node has joined, in any thread.
            accept: see `Accept`; None: all that is within the limits.
            audit: told of what happens, ``audit(kind, **fields)``, in any thread; kinds: "joined", "left", "refused",
                "sent", "received", "dropped"; fields: node, and where there are some: peer (address of the connection),
                reason, message (its kind), address (a mapping), sha256, num_bytes, wire_bytes.
            trace_name: of this server, where a node dials several: a part of messages' names in traces.

        Raises:
            ConfigError: it would listen beyond loopback without mutual TLS and a token, or cannot listen there.
        """
        import grpc

        require_protected(listen, credentials, "listening on")
        if credentials is not None and credentials.verify is None:
            raise ConfigError("a server needs Credentials.verify, or it would take any token: give verify_tokens(...)")
        self._limits = limits = limits or Limits()
        _allow_files(limits.nodes + SPARE_FILES)
        self._inbox = Inbox(limits.inbox_bytes)
        self._events: queue.SimpleQueue[tuple[Event, int] | None] = queue.SimpleQueue()
        self._closed, self._reader = False, Reader(limits, accept, self._inbox, trace_name=trace_name)
        self._service = Service(limits, admit, self._reader, credentials, audit, self._put)
        self._pool = ThreadPoolExecutor(limits.nodes + SPARE_CALLS, thread_name_prefix="transport")
        self._grpc = grpc.server(
            self._pool,
            handlers=(self._service.handlers(),),
            options=[
                *options(limits),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", limits.calls_per_node + 4),
            ],
            maximum_concurrent_rpcs=limits.nodes + SPARE_CALLS,
        )
        self._health = _add_health(self._grpc)
        host, _ = host_and_port(listen, "listening on")
        try:
            if credentials is None:
                port = self._grpc.add_insecure_port(listen)
            else:
                pair = [(credentials.key, credentials.certificate)]
                secure = grpc.ssl_server_credentials(pair, credentials.authority, require_client_auth=True)
                port = self._grpc.add_secure_port(listen, secure)
        except RuntimeError:
            self._pool.shutdown(wait=False)
            raise ConfigError(
                f"cannot listen on {listen}: choose a port that is free (0: any) of an address of this machine, and"
                " check certificate and key"
            ) from None
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._grpc.start()

    @property
    def address(self) -> str:
        """host:port, with the real port."""
        return self._address

    @property
    def dropped(self) -> Counter[str]:
        """How many messages were dropped, by reason."""
        return self._service.dropped()

    def nodes(self) -> dict[str, Hello]:
        """Return those that are connected, by name."""
        return {node: link.hello for node, link in self._service.links().items()}

    def traffic(self) -> dict[str, Traffic]:
        """Return what went to and from each node that ever joined, by name."""
        return self._service.traffic()

    def send(self, node: str, message: Message) -> Future[str]:
        """Queue a message to a node.

        Returns:
            a future that is done when all of it was handed to the connection: its SHA-256; or it fails with
            `Disconnected`. Whether it has arrived is known from its answer only.

        Raises:
            Disconnected: the node is not connected.
            TransportError: `Limits.queued_messages` wait already; the message is malformed or over a limit.
        """
        link = self._service.links().get(node)
        if link is None:
            raise Disconnected(f"node {node!r} is not connected")
        with recorder.span(
            "send", message=f"{message_id(traced(node, self._reader.trace_name), '<', message)}{QUEUED}"
        ):
            return link.put(Outgoing(message, self._limits))

    def receive(self, timeout_seconds: float | None) -> Event | None:
        """Return the next event; None: there was none within the timeout, or the server is closed."""
        if self._closed:
            return None
        try:
            with recorder.span("wait"):
                found = self._events.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if found is None:
            self._events.put(None)  # for the next one who asks
            return None
        event, taken_bytes = found
        if isinstance(event, Received):
            recorder.mark(
                "receive",
                message=f"{message_id(traced(event.node, self._reader.trace_name), '>', event.message)}{TAKEN}",
            )
        self._inbox.give_back(taken_bytes)
        return event

    def disconnect(self, node: str, reason: str) -> None:
        """End a node's connection with a sentence, if there is one; it may join again if it is admitted."""
        link = self._service.links().get(node)
        if link is not None:
            link.end(Failure("UNAVAILABLE", reason))

    def close(self, reason: str = "the server is closed") -> None:
        """Send what waits, for two seconds at most, end all connections and listen no longer."""
        if self._closed:
            return
        self._closed = True
        self._service.close(reason)
        self._health.enter_graceful_shutdown()
        stopped = self._grpc.stop(DRAIN_SECONDS)
        end = time.monotonic() + DRAIN_SECONDS
        for link in self._service.links().values():
            link.finish(Failure("UNAVAILABLE", reason))
        stopped.wait(max(0.0, end - time.monotonic()))
        for link in self._service.links().values():
            link.end()
        self._inbox.close()
        self._events.put(None)
        self._grpc.stop(None).wait(DRAIN_SECONDS)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        """Return the server."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _put(self, event: Event, taken_bytes: int = 0) -> None:
        self._events.put((event, taken_bytes))


def _add_health(server: Any) -> Any:
    """Add gRPC's health service to a server; no other one is added: no reflection."""
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    servicer = health.HealthServicer()
    servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


def _allow_files(number: int) -> None:
    """Let this process have so many files open, as far as the system permits: each connection is one."""
    try:
        import resource
    except ImportError:  # not Unix, and no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
