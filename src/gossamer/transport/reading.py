"""Reading a message: its header is checked, its memory taken, its data copied, its digest compared, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gossamer.errors import Dropped
from gossamer.profiling import recorder
from gossamer.transport.frames import GRPC_BYTES, Frame, Incoming, split
from gossamer.transport.limits import MESSAGE_OVERHEAD_BYTES, Counts, Inbox, Limits
from gossamer.transport.messages import Accept, Header, Received, message_id, traced
from gossamer.transport.order import Busy, Order

Deliver = Callable[[Received, int], None]


class Frames:
    """The frames of a call, counted.

    Attributes:
        wire_bytes: of those read since it was last set.
        at_end: whether the last one read was the last one of a message.
        is_broken: whether there are no more, or what came was none.
    """

    def __init__(self, encoded: Iterator[bytes], counts: Counts) -> None:
        """Read `encoded`, one frame at a time."""
        self._encoded = encoded
        self._counts = counts
        self.wire_bytes = 0
        self.at_end = True
        self.is_broken = False

    def read(self) -> Frame | None:
        """Return the next frame; None: there is none.

        Raises:
            Dropped: it is malformed.
        """
        with recorder.span("wait"):
            encoded = next(self._encoded, None)
        if encoded is None:
            self.is_broken = True
            return None
        self.wire_bytes += len(encoded) + GRPC_BYTES
        self._counts.add(received_bytes=len(encoded) + GRPC_BYTES)
        self.is_broken = True
        frame = split(encoded)
        self.is_broken = False
        self.at_end = bool(frame.sha256)
        return frame

    def skip_message(self) -> None:
        """Read what is left of a message that is not wanted."""
        while not self.at_end and self.read() is not None:
            pass


class Reader:
    """Reads messages of any node, several at a time."""

    def __init__(
        self, limits: Limits, accept: Accept | None, inbox: Inbox, client: str | None = None, trace_name: str = ""
    ) -> None:
        """Read into `inbox` what `accept` wants, see `gossamer.transport.messages.Accept`; `client`: who has dialled.

        None: a server reads, and those that send have dialled; `trace_name`: what it is called in traces.
        """
        self._limits, self._client, self.trace_name = limits, client, trace_name
        self._accept = accept
        self._inbox = inbox
        self.order = Order(limits.senders)

    def read(self, node: str, frames: Frames, patience_seconds: float | None, deliver: Deliver) -> None:
        """Read one message, and deliver it.

        Args:
            node: that sends it.
            patience_seconds: for which there may be no room in the inbox; None: for ever.
            deliver: called with the message and the bytes that it takes of the inbox; if it raises, the message counts
                as never received.

        Raises:
            Dropped: the message is not taken.
            Busy: there is no room, or another message of its kind and sender is being received.
        """
        frames.wire_bytes = 0
        frame = frames.read()
        if frame is None or not frame.header:
            raise Dropped("malformed frame")
        incoming = Incoming(node, frame.header, self._limits)
        taken_bytes = incoming.header.num_bytes + len(frame.header) + MESSAGE_OVERHEAD_BYTES
        if taken_bytes > self._inbox.capacity_bytes:
            raise Dropped("too large")
        with self.order.applying(incoming.header), recorder.span("receive", message=self._id(incoming.header)):
            targets = None if self._accept is None else self._accept(incoming.header)
            with recorder.span("wait"):
                has_room = self._inbox.take(taken_bytes, patience_seconds)
            if not has_room:
                raise Busy("the receiver has not taken what it was sent before: send it again later")
            try:
                incoming.read_into(targets)
                sha256 = self._read_data(frame, frames, incoming)
                recorder.count_bytes(lambda: frames.wire_bytes)
                message, digest = incoming.finish(sha256)
                deliver(Received(node, message, digest, frames.wire_bytes), taken_bytes)
            except BaseException:
                self._inbox.give_back(taken_bytes)
                raise

    def _id(self, header: Header) -> str:
        way = ">" if self._client is None else "<"
        return message_id(traced(header.node, self.trace_name) if self._client is None else self._client, way, header)

    @staticmethod
    def _read_data(first: Frame, frames: Frames, incoming: Incoming) -> bytes:
        """Read the data of a message; returns the digest that its sender says."""
        if first.chunk:
            incoming.add(first.chunk)
        frame: Frame | None = first
        while frame is not None and not frame.sha256:
            frame = frames.read()
            if frame is None:
                raise Dropped("truncated")
            if frame.header or not (frame.chunk or frame.sha256):
                raise Dropped("malformed frame")
            if frame.chunk:
                incoming.add(frame.chunk)
        assert frame is not None
        return frame.sha256
