"""The side that dials."""

from __future__ import annotations

import queue
import secrets
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

from gossamer.errors import Disconnected, Dropped, Refused, TransportError
from gossamer.profiling import recorder
from gossamer.transport import gossamer_pb2 as pb
from gossamer.transport.audit import no_audit, of_received, of_sent
from gossamer.transport.calls import VERSION, waits
from gossamer.transport.connection import Connection, Foreign
from gossamer.transport.credentials import Credentials, require_protected
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import Counts, Inbox, Limits, Traffic
from gossamer.transport.messages import (
    SERVER_NODE,
    TAKEN,
    Accept,
    Audit,
    Json,
    Message,
    Received,
    check_node,
    encode_json,
    message_id,
    traced,
)
from gossamer.transport.order import Busy
from gossamer.transport.reading import Frames, Reader


class Client:
    """A node that dials a server, sends it messages and receives its. May be used from several threads."""

    def __init__(
        self,
        server: str,
        *,
        name: str,
        hello: Json | None = None,
        accept: Accept | None = None,
        credentials: Credentials | None = None,
        server_name: str | None = None,
        trace_name: str = "",
        limits: Limits | None = None,
        audit: Audit = no_audit,
        timeout_seconds: float = 10.0,
    ) -> None:
        """Dial and join; tries again, with backoff, until the timeout.

        Args:
            server: "host:port".
            name: of this node: up to 64 letters, digits, '.', '_' and '-'; its certificate must have it.
            hello: JSON values, for the server's `admit`.
            accept: see `Accept`; None: all that is within the limits.
            server_name: name that the server's certificate must have; None: its host.
            trace_name: see `Server`.
            audit: see `Server`; kinds "sent", "received" and "dropped".

        Raises:
            Disconnected: no server of this federation answers within the timeout.
            Refused: the server refuses this node.
            ConfigError: it would dial beyond loopback without credentials.
        """
        require_protected(server, credentials, "dialling")
        self._server, self._name = server, check_node(name)
        self._traced = traced(name, trace_name)
        self._limits = limits = limits or Limits()
        self._credentials, self._server_name, self._audit = credentials, server_name, audit
        body = encode_json(hello or {}, limits.body_bytes)
        self._hello = pb.Hello(version=VERSION, instance=secrets.token_hex(16), body=body).SerializeToString()
        self._counts = Counts()
        self._inbox = Inbox(limits.inbox_bytes)
        self._reader = Reader(limits, accept, self._inbox, self._traced)
        self._server_id: str | None = None
        self._received: queue.SimpleQueue[tuple[Received, int] | None] = queue.SimpleQueue()
        self._connection = self._joined(timeout_seconds)

    @property
    def welcome(self) -> Json:
        """What the server said when this node joined last."""
        return self._connection.welcome

    @property
    def connected(self) -> bool:
        """Whether the connection is not known to be lost."""
        return self._connection.error is None

    @property
    def dropped(self) -> Counter[str]:
        """How many messages were dropped, by reason."""
        return self._counts.dropped

    def traffic(self) -> Traffic:
        """Return what went to and from the server, over all connections."""
        return self._counts.traffic()

    def receive(self, timeout_seconds: float | None) -> Received | None:
        """Return the next message; None: there was none within the timeout.

        What arrived before the connection was lost is returned first.

        Raises:
            Disconnected: the connection is lost, see `reconnect`.
            Refused: the server has ended it, and does not want this node any more.
        """
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            error = self._connection.error
            left = 0.0 if error is not None else None if end is None else max(0.0, end - time.monotonic())
            try:
                with recorder.span("wait"):
                    found = self._received.get(timeout=left)
            except queue.Empty:
                if error is not None:
                    raise error from None
                return None
            if found is not None:
                received, taken_bytes = found
                recorder.mark("receive", message=self._taken_id(received))
                self._inbox.give_back(taken_bytes)
                return received

    def send(self, message: Message, timeout_seconds: float | None = None) -> bool:
        """Send a message; returns when the server has it, and tries again where it is busy.

        Args:
            timeout_seconds: deadline; None: `Limits.call_seconds`.

        Returns:
            Whether it was taken now; False: it, or a later one, was taken before.

        Raises:
            Disconnected: the connection is lost, or the deadline is over. It may have arrived: `reconnect`, and send it
                again.
            Dropped: the server does not want it.
            Refused: the server does not want this node any more.
            TransportError: the message is malformed or over a limit.
        """
        seconds = self._limits.call_seconds if timeout_seconds is None else timeout_seconds
        with recorder.span("send", message=message_id(self._traced, ">", message)):
            return self._send(Outgoing(message, self._limits), seconds)

    def _send(self, outgoing: Outgoing, seconds: float) -> bool:
        connection = self._connection
        busy = ""
        for left in waits(seconds):
            if connection.error is not None:
                raise connection.error
            try:
                receipt = connection.deliver(outgoing, left)
            except Busy as error:
                busy = f" ({error})"
                continue
            except (Disconnected, Refused) as error:
                connection.close(error)
                raise
            return self._taken(receipt, outgoing)
        raise Disconnected(f"the server at {self._server} did not take a message within {seconds:g} seconds{busy}")

    def reconnect(self, timeout_seconds: float) -> None:
        """Join again; tries with backoff, from 0.1 to 5 seconds, until the timeout.

        Raises:
            Disconnected, Refused: as the constructor.
        """
        self._connection.close(Disconnected("the node joins again"))
        self._connection = self._joined(timeout_seconds)

    def close(self) -> None:
        """Leave; a second call does nothing."""
        self._connection.close(Disconnected("the node has left"))
        self._inbox.close()
        self._received.put(None)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave."""
        self.close()

    def _joined(self, timeout_seconds: float) -> Connection:
        """Return a connection that has joined."""
        last: TransportError = Disconnected("no time")
        for left in waits(timeout_seconds):
            connection = Connection(
                self._server, self._name, self._credentials, self._server_name, self._limits, self._counts
            )
            try:
                connection.join(self._hello, left, self)
            except (Refused, Foreign):
                connection.close(Disconnected("refused"))
                raise
            except TransportError as error:
                connection.close(error)
                last = error
            else:
                return connection
        raise Disconnected(f"could not join the server at {self._server} ({last}): check that it runs, and its address")

    def begin(self, server_id: str) -> None:
        """Forget what was applied where the server is a new one; see `Joining`."""
        if self._server_id not in (None, server_id):
            self._reader.order.forget()
        self._server_id = server_id

    def end(self) -> None:
        """Wake up whoever waits in `receive`."""
        self._received.put(None)

    def read(self, frames: Frames) -> None:
        """Read one message, or skip it."""
        try:
            self._reader.read(SERVER_NODE, frames, None, self._take)
        except Dropped as dropped:
            if frames.is_broken:
                raise
            self._counts.drop(dropped.reason)
            self._audit("dropped", node=SERVER_NODE, reason=dropped.reason)
            frames.skip_message()
        else:
            self._counts.add(received_messages=1)

    def _take(self, received: Received, taken_bytes: int) -> None:
        self._audit("received", **of_received(received))
        with recorder.span("send", message=self._taken_id(received)):
            self._received.put((received, taken_bytes))

    def _taken_id(self, received: Received) -> str:
        return f"{message_id(self._traced, '<', received.message)}{TAKEN}"

    def _taken(self, receipt: Any, outgoing: Outgoing) -> bool:
        """Return what a receipt says."""
        if receipt.outcome == pb.DROPPED:
            raise Dropped(receipt.reason)
        if receipt.outcome == pb.TAKEN:
            self._counts.add(sent_messages=1)
            self._audit("sent", **of_sent(SERVER_NODE, outgoing))
        return bool(receipt.outcome == pb.TAKEN)
