"""The calls that a server answers."""

from __future__ import annotations

import hmac
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from gossamer.errors import Dropped, GossamerError, TransportError, one_line
from gossamer.profiling import recorder
from gossamer.transport import gossamer_pb2 as pb
from gossamer.transport.audit import of_received, of_sent
from gossamer.transport.calls import DELIVER, DELIVER_STREAM, JOIN, NODE, SERVICE, SESSION, VERSION, Failure
from gossamer.transport.credentials import Caller, Credentials, caller_of
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import Account, Limits, Traffic
from gossamer.transport.links import Link, fail
from gossamer.transport.messages import (
    QUEUED,
    TAKEN,
    Audit,
    Event,
    Gone,
    Hello,
    Joined,
    Received,
    Refusal,
    Welcome,
    check_node,
    decode_json,
    encode_json,
    message_id,
    traced,
)
from gossamer.transport.order import TAKEN_BEFORE, Busy
from gossamer.transport.reading import Frames, Reader

ACCOUNTS_PER_NODE = 100  # names that are remembered for each node that may be connected
_SLACK_SECONDS = 1.0


class Events(Protocol):
    """Where events go, and how many bytes of the inbox they take."""

    def __call__(self, event: Event, taken_bytes: int = 0, /) -> None:
        """Take one."""


class Service:
    """Lets nodes join, writes to them what is queued in their links, and reads what they send."""

    def __init__(
        self,
        limits: Limits,
        admit: Callable[[Hello], Welcome | Refusal],
        reader: Reader,
        credentials: Credentials | None,
        audit: Audit,
        events: Events,
    ) -> None:
        """Answer nothing yet: see `handlers`."""
        self._limits = limits
        self._admit = admit
        self._reader = reader
        self._verify = credentials.verify if credentials is not None else None
        self._audit = audit
        self._events = events
        self._id = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._links: dict[str, Link] = {}
        self._accounts: dict[str, Account] = {}
        self._closed: str | None = None

    def handlers(self) -> Any:
        """Return what gRPC calls; the bytes of a frame are left to `gossamer.transport.frames`."""
        import grpc

        def failing(failure: Failure, context: Any) -> None:
            """End a call with a status."""
            context.abort(grpc.StatusCode[failure.code], failure.sentence)

        def join(request: bytes, context: Any) -> Iterator[bytes]:
            """Serve Join."""
            try:
                yield from self._join(request, context)
                return
            except Exception as error:
                failure = self._failure(error, context)
            failing(failure, context)

        def deliver(frames: Iterator[bytes], context: Any) -> Any:
            """Serve Deliver and DeliverStream."""
            try:
                return self._deliver(frames, context)
            except Exception as error:
                failure = self._failure(error, context)
            return failing(failure, context)

        methods = {
            JOIN: grpc.unary_stream_rpc_method_handler(join),
            DELIVER: grpc.unary_unary_rpc_method_handler(lambda frame, context: deliver(iter((frame,)), context)),
            DELIVER_STREAM: grpc.stream_unary_rpc_method_handler(deliver),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def links(self) -> dict[str, Link]:
        """Return the links of nodes that are connected."""
        with self._lock:
            return dict(self._links)

    def traffic(self) -> dict[str, Traffic]:
        """Return the traffic of all nodes."""
        with self._lock:
            return {node: account.counts.traffic() for node, account in self._accounts.items()}

    def dropped(self) -> Counter[str]:
        """Return how many messages were dropped, by reason."""
        with self._lock:
            return sum((account.counts.dropped for account in self._accounts.values()), Counter())

    def close(self, reason: str) -> None:
        """Let nobody join any more."""
        with self._lock:
            self._closed = reason

    def _failure(self, error: Exception, context: Any) -> Failure:
        """Return the status by which a call fails."""
        if isinstance(error, Failure):
            return error
        if isinstance(error, Busy):
            return Failure("ABORTED", str(error))
        if isinstance(error, GossamerError):
            self._refuse(context, str(error))
            return Failure("PERMISSION_DENIED", str(error))
        if context.is_active():
            self._audit("fault", peer=context.peer(), reason=one_line(error))
        return Failure("INTERNAL", "a fault of the server's, which its log tells")

    def _refuse(self, context: Any, reason: str) -> None:
        node = dict(context.invocation_metadata()).get(NODE, "")
        self._audit("refused", node=str(node)[:80], peer=context.peer(), reason=reason)

    def _caller(self, context: Any, max_seconds: float) -> tuple[Caller, dict[str, str]]:
        """Return who calls, and the metadata.

        Raises:
            GossamerError: the caller is refused.
            Failure: the call has no deadline, or one that is too late.
        """
        seconds = context.time_remaining()
        if seconds is None or seconds > max_seconds + _SLACK_SECONDS:
            raise Failure("INVALID_ARGUMENT", f"calls need a deadline, of {max_seconds:g} seconds at most")
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        caller = caller_of(context, metadata)
        check_node(caller.name)
        if self._verify is not None:
            self._verify(caller)
        return caller, metadata

    def _join(self, request: bytes, context: Any) -> Iterator[bytes]:
        caller, _ = self._caller(context, self._limits.join_seconds)
        link, body = self._linked(request, caller)
        try:
            if not context.add_callback(lambda: self._leave(link, "the connection ended")):
                return
            yield pb.Frame(welcome=pb.Welcome(session=link.session, body=body, server=self._id)).SerializeToString()
            while (waiting := link.next()) is not None:
                yield from self._written(link, *waiting)
        finally:
            self._leave(link, "the connection ended")
        if link.failure is not None:
            raise link.failure

    def _linked(self, request: bytes, caller: Caller) -> tuple[Link, bytes]:
        """Admit a node; returns its link, and what it is told."""
        try:
            asked = pb.Hello.FromString(request)
            hello = Hello(
                caller.name, decode_json(asked.body, self._limits.body_bytes), caller.address, caller.identities
            )
        except (DecodeError, TransportError):
            raise Failure("INVALID_ARGUMENT", "the node's first words are malformed") from None
        if asked.version != VERSION:
            raise Failure(
                "PERMISSION_DENIED",
                f"the server speaks version {VERSION} of the protocol, the node version {asked.version}: install the"
                " same version of gossamer at both",
            )
        account = self._account(caller.name)
        decision = self._admit(hello)
        if isinstance(decision, Refusal):
            self._audit("refused", node=caller.name, peer=caller.address, reason=decision.reason)
            raise Failure("UNAVAILABLE" if decision.retry else "PERMISSION_DENIED", decision.reason)
        link = Link(hello, caller, asked.instance, account, self._limits)
        body = encode_json(decision.body, self._limits.body_bytes)
        self._enter(link)
        return link, body

    def _account(self, node: str) -> Account:
        """Return the account of a node, and count that it wants to join.

        Raises:
            Failure: it does so too often, or too many nodes have one.
        """
        with self._lock:
            if node not in self._accounts and len(self._accounts) >= ACCOUNTS_PER_NODE * self._limits.nodes:
                raise Failure("UNAVAILABLE", "more names of nodes were given than are kept: start the server anew")
            account = self._accounts.setdefault(node, Account(self._limits))
        self._limit_rate(account)
        return account

    def _limit_rate(self, account: Account) -> None:
        if not account.rate.take():
            raise Failure("ABORTED", f"more than {self._limits.messages_per_second:g} calls a second: wait")

    def _enter(self, link: Link) -> None:
        """Make a link the one of its node.

        Raises:
            Failure: another client of its name is connected, or there are as many nodes as may be.
        """
        with self._lock:
            before = self._links.get(link.node)
            if self._closed is not None:
                raise Failure("UNAVAILABLE", self._closed)
            if before is not None and before.instance != link.instance:
                raise Failure(
                    "UNAVAILABLE",
                    f"node {link.node!r} is connected already, from {before.caller.address}: give each node a name of"
                    " its own",
                )
            if before is None and len(self._links) >= self._limits.nodes:
                raise Failure("UNAVAILABLE", f"{self._limits.nodes} nodes are connected, as many as may be")
            self._links[link.node] = link
            if before is not None:
                self._events(Gone(link.node, "it joined again"))
            self._events(Joined(link.node, link.hello))
        if before is not None:
            before.end(Failure("UNAVAILABLE", "the node joined again"))
        self._audit("joined", node=link.node, peer=link.caller.address)

    def _leave(self, link: Link, reason: str) -> None:
        """Let a link be the one of its node no longer, if it is."""
        link.end()
        reason = link.failure.sentence if link.failure is not None else reason
        with self._lock:
            if self._links.get(link.node) is not link:
                return
            del self._links[link.node]
            self._events(Gone(link.node, reason))
        self._audit("left", node=link.node, peer=link.caller.address, reason=reason)

    def _written(self, link: Link, outgoing: Outgoing, future: Any) -> Iterator[bytes]:
        """Yield the frames of a message."""
        counts, size, name = (
            link.account.counts,
            0,
            message_id(traced(link.node, self._reader.trace_name), "<", outgoing.message),
        )
        recorder.mark("receive", message=f"{name}{QUEUED}")
        try:
            if self._verify is not None:
                self._verify(link.caller)
            with recorder.span("send", message=name):
                for frame in outgoing.frames():
                    yield frame
                    counts.add(sent_bytes=outgoing.wire_bytes - size)
                    size = outgoing.wire_bytes
                recorder.count_bytes(lambda: outgoing.wire_bytes)
            counts.add(sent_messages=1)
            self._audit("sent", **of_sent(link.node, outgoing))
            future.set_result(outgoing.sha256)
        finally:
            fail(future, link.node)

    def _deliver(self, encoded: Iterator[bytes], context: Any) -> bytes:
        """Read one message of a node; returns a receipt."""
        caller, metadata = self._caller(context, self._limits.call_seconds)
        with self._lock:
            link = self._links.get(caller.name)
        if link is None or not hmac.compare_digest(link.session, metadata.get(SESSION, "")):
            raise Failure("FAILED_PRECONDITION", f"node {caller.name!r} has not joined, or joined again since")
        self._limit_rate(link.account)
        counts = link.account.counts

        def take(received: Received, taken_bytes: int) -> None:
            """Hand a message that was read to the engine, unless its node has joined again since."""
            name = message_id(traced(link.node, self._reader.trace_name), ">", received.message)
            with recorder.span("send", message=f"{name}{TAKEN}"), self._lock:
                if self._links.get(link.node) is not link:
                    raise Failure("FAILED_PRECONDITION", f"node {link.node!r} joined again since")
                self._events(received, taken_bytes)
            self._audit("received", **of_received(received))

        with link.account.calls.one() as is_free:
            if not is_free:
                raise Failure("ABORTED", f"more than {self._limits.calls_per_node} messages at a time: wait")
            try:
                self._reader.read(link.node, Frames(encoded, counts), self._limits.call_seconds, take)
            except Dropped as dropped:
                counts.drop(dropped.reason)
                self._audit("dropped", node=link.node, reason=dropped.reason)
                outcome = pb.DUPLICATE if dropped.reason in TAKEN_BEFORE else pb.DROPPED
                return encoded_receipt(outcome, dropped.reason)
            except Exception:
                if not context.is_active():
                    counts.drop("interrupted")
                raise
        counts.add(received_messages=1)
        return encoded_receipt(pb.TAKEN)


def encoded_receipt(outcome: Any, reason: str = "") -> bytes:
    """Return the answer to a message."""
    encoded: bytes = pb.Receipt(outcome=outcome, reason=reason).SerializeToString()
    return encoded
