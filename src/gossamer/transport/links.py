"""A server's side of a node: what waits to be sent to it, and what it may still send."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from concurrent.futures import Future

from gossamer.errors import Disconnected, TransportError
from gossamer.profiling import recorder
from gossamer.transport.calls import Failure
from gossamer.transport.credentials import Caller
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import Account, Limits
from gossamer.transport.messages import Hello

Waiting = tuple[Outgoing, "Future[str]"]


class Link:
    """A node that has joined, until it is gone.

    Attributes:
        node: its name.
        hello: what it said of itself.
        caller: who it was when it joined.
        instance: of the client, see `gossamer.proto`.
        account: of what it sends and is sent; it outlasts the link.
        session: secret that its calls show.
        failure: status with which the server ends it; None: it has none.
    """

    def __init__(self, hello: Hello, caller: Caller, instance: str, account: Account, limits: Limits) -> None:
        """Begin with nothing to send."""
        self.node = hello.node
        self.hello = hello
        self.caller = caller
        self.instance = instance
        self.account = account
        self.session = secrets.token_hex(16)
        self.failure: Failure | None = None
        self._max_waiting = limits.queued_messages
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._is_open = True
        self._is_draining = False

    def put(self, outgoing: Outgoing) -> Future[str]:
        """Queue a message; see `gossamer.transport.Server.send`."""
        future: Future[str] = Future()
        with self._changed:
            if not self._is_open or self._is_draining:
                raise Disconnected(f"node {self.node!r} is not connected")
            if len(self._waiting) >= self._max_waiting:
                raise TransportError(
                    f"{self._max_waiting} messages wait to be sent to node {self.node!r}: wait for their futures, or"
                    " raise queued_messages"
                )
            self._waiting.append((outgoing, future))
            self._changed.notify_all()
        return future

    def next(self) -> Waiting | None:
        """Wait for a message to send; None: the link has ended."""
        with recorder.span("wait"), self._changed:
            self._changed.wait_for(lambda: self._waiting or not self._is_open or self._is_draining)
            return self._waiting.popleft() if self._waiting and self._is_open else None

    def finish(self, failure: Failure) -> None:
        """End the link after what waits is sent."""
        with self._changed:
            self.failure = self.failure or failure
            self._is_draining = True
            self._changed.notify_all()

    def end(self, failure: Failure | None = None) -> None:
        """End the link at once; whatever waits to be sent fails."""
        with self._changed:
            self.failure = self.failure or failure
            self._is_open = False
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for _, future in waiting:
            fail(future, self.node)


def fail(future: Future[str], node: str) -> None:
    """Fail what was to be sent to a node that is gone."""
    if not future.done():
        future.set_exception(Disconnected(f"node {node!r} was gone before all of a message was sent"))
