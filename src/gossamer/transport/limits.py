"""Caps that are checked before memory is taken, times, and the accounts that keep them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from gossamer.errors import ConfigError
from gossamer.transport.rate_limits import Bucket, take

Compression = Literal["none", "zstd"]
MAX_CHUNK_BYTES = 4 << 20
MAX_BODY_BYTES = 4 << 20
FRAME_BYTES = MAX_CHUNK_BYTES + MAX_BODY_BYTES + (64 << 10)  # that gRPC reads at most, before it is looked at
MESSAGE_OVERHEAD_BYTES = 4096  # that a message without arrays is counted as, at least


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps and times; a server and its clients have their own.

    Attributes:
        message_bytes: of all arrays of a message, uncompressed.
        body_bytes: of a body as JSON.
        arrays: number of arrays of a message.
        inbox_bytes: of messages that are being received, or were received but not taken by `receive`; what comes beyond
            waits unread.
        nodes: that are connected.
        senders: of one node that are told apart, see `gossamer.transport.Address`.
        queued_messages: to one node, that are not sent yet.
        calls_per_node: messages that a node sends at a time.
        messages_per_second: that a server takes from a node on average, in bursts of twice as many; joining is one.
        chunk_bytes: of a message, in one frame.
        call_seconds: deadline of the call that sends one message.
        join_seconds: after which a node has to join again.
        keepalive_seconds: after which a silent connection is asked whether it is alive.
        keepalive_timeout_seconds: within which the other machine has to acknowledge what is sent to it (the system
            does, for any process), or it is cut off: with the one before, how soon a cut cable is noticed.
        silence_seconds: within which the other process has to answer what it is asked, or it is taken for stopped; the
            answer may wait behind `gossamer.transport.calls.WINDOW_BYTES` of data, so slow lines need time.
        compression: of what is sent; what is received may have any.
    """

    message_bytes: int = 4 << 30
    body_bytes: int = 1 << 20
    arrays: int = 4096
    inbox_bytes: int = 4 << 30
    nodes: int = 1000
    senders: int = 10_000
    queued_messages: int = 64
    calls_per_node: int = 4
    messages_per_second: float = 200.0
    chunk_bytes: int = 1 << 20
    call_seconds: float = 600.0
    join_seconds: float = 86_400.0
    keepalive_seconds: float = 0.8
    keepalive_timeout_seconds: float = 1.5
    silence_seconds: float = 30.0
    compression: Compression = "none"

    def __post_init__(self) -> None:
        """Check what would not work.

        Raises:
            ConfigError: a limit is out of range.
        """
        if not 1 <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ConfigError(f"chunk_bytes is {self.chunk_bytes}: give 1 to {MAX_CHUNK_BYTES}")
        if not 1 <= self.body_bytes <= MAX_BODY_BYTES:
            raise ConfigError(f"body_bytes is {self.body_bytes}: give 1 to {MAX_BODY_BYTES}")
        if self.inbox_bytes < MESSAGE_OVERHEAD_BYTES + MAX_BODY_BYTES:
            raise ConfigError(
                f"inbox_bytes is {self.inbox_bytes}: give {MESSAGE_OVERHEAD_BYTES + MAX_BODY_BYTES} at least"
            )


@dataclass(frozen=True)
class Traffic:
    """What went over the wire: bytes of all frames, and whole messages.

    Attributes:
        sent_bytes, received_bytes: without what HTTP/2, TLS and TCP add, which is about 0.1 percent of large messages.
        sent_messages, received_messages: those received include the dropped ones.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    sent_messages: int = 0
    received_messages: int = 0


class Counts:
    """Traffic of one node, and a count of what was dropped."""

    def __init__(self) -> None:
        """Count from zero."""
        self._lock = threading.Lock()
        self._numbers: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def add(self, **numbers: int) -> None:
        """Add to fields of `Traffic`."""
        with self._lock:
            self._numbers.update(numbers)

    def drop(self, reason: str) -> None:
        """Count a message that was dropped."""
        with self._lock:
            self.dropped[reason] += 1

    def traffic(self) -> Traffic:
        """Return the traffic so far."""
        with self._lock:
            return Traffic(**self._numbers)


class Inbox:
    """Account of the bytes that are being received, or wait to be taken."""

    def __init__(self, capacity_bytes: int) -> None:
        """Start empty."""
        self.capacity_bytes = capacity_bytes
        self._used = 0
        self._changed = threading.Condition()
        self._closed = False

    def take(self, num_bytes: int, timeout_seconds: float | None) -> bool:
        """Wait until there is room for `num_bytes`, and count them; false where there is none in time."""
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._closed or self._used + num_bytes <= self.capacity_bytes, timeout_seconds
            )
            if not free or self._closed:
                return False
            self._used += num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        """Count them no longer."""
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait or take any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Slots:
    """At most so many at a time."""

    def __init__(self, number: int) -> None:
        """Start with all of them free."""
        self._free = threading.BoundedSemaphore(number)

    @contextmanager
    def one(self) -> Iterator[bool]:
        """Hold one within the block; false where none is free."""
        taken = self._free.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._free.release()


class Rate:
    """How often something may happen: so many times a second on average, twice as many at once."""

    def __init__(self, per_second: float) -> None:
        """Start full."""
        self._per_second, self._lock = per_second, threading.Lock()
        self._bucket = Bucket(2 * per_second, time.monotonic())

    def take(self) -> bool:
        """Say whether it may happen now, and count it."""
        with self._lock:
            now, rate = time.monotonic(), self._per_second
            self._bucket, wait = take(self._bucket, now, 1.0, rate, 2 * rate)
            return wait == 0


class Account:
    """What a server keeps of a node, whether it is connected or not.

    Attributes:
        counts: of what went over the wire, and was dropped.
        calls, rate: how many messages the node may send at a time, and a second.
    """

    def __init__(self, limits: Limits) -> None:
        """Start with nothing."""
        self.counts = Counts()
        self.calls = Slots(limits.calls_per_node)
        self.rate = Rate(limits.messages_per_second)
