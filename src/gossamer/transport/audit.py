"""The audit log of a node: who joined, what was asked, and what was sent, as digests and sizes; no content, no secrets.

`audit.jsonl` is written as all logs are: a line at a time, each with a digest of itself and the line before, and a torn
last line is replaced.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.storage.jsonl import LogFile
from gossamer.transport.frames import Outgoing
from gossamer.transport.messages import Message, Received
from gossamer.transport.rate_limits import Bucket, take

AUDIT = "audit.jsonl"
TEXTS = ("node", "peer", "reason", "message", "run", "sha256")
NUMBERS = ("round", "phase", "sender", "attempt", "num_bytes", "wire_bytes")
MAX_CHARACTERS = 300  # of a text that others gave
FREQUENT = ("refused", "dropped", "fault")  # kinds that a stranger can cause, so that they could fill the disk
LINES_PER_SECOND, LINES_AT_ONCE = 1.0, 100.0


class AuditLog:
    """One audit log, open for writing; safe to use from several threads."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Open `path`, created if needed.

        Args:
            clock: returns seconds since 1970.

        Raises:
            StorageError: it cannot be opened for writing.
        """
        self._file, self._clock, self._lock = LogFile(path), clock, threading.Lock()
        self._bucket, self._num_untold = Bucket(LINES_AT_ONCE, clock()), 0

    def record(self, kind: str, **fields: Any) -> None:
        """Record what happened; the argument `audit` of a `Server` or a `Client`.

        Args:
            kind: "joined", "left", "refused", "sent", "received", "dropped" or "fault". Of those that strangers can
                cause, one a second is written after the first hundred, with ``num_untold``, the number of those before
                that were not.
            fields: `TEXTS` and `NUMBERS`, or ``address``, a mapping that has some of them. Nothing else is written.

        Raises:
            StorageError: the disk refuses the line.
        """
        given = {**fields, **fields.get("address", {})}
        record: dict[str, Any] = {"kind": kind}
        record |= {name: str(given[name])[:MAX_CHARACTERS] for name in TEXTS if given.get(name) is not None}
        record |= {name: int(given[name]) for name in NUMBERS if given.get(name) is not None}
        with self._lock:
            now = self._clock()
            if kind in FREQUENT:
                self._bucket, wait = take(self._bucket, now, 1.0, LINES_PER_SECOND, LINES_AT_ONCE)
                if wait:
                    self._num_untold += 1
                    return
                if self._num_untold:
                    record["num_untold"], self._num_untold = self._num_untold, 0
            self._file.append({"time": round(now, 3), **record})

    def close(self) -> None:
        """Sync and close the log.

        Raises:
            StorageError: the disk refuses.
        """
        with self._lock:
            self._file.sync()
            self._file.close()


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
