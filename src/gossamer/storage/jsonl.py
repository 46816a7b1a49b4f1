"""Append-only logs: one JSON object a line, whose last key is a running digest.

The digest covers the line without it, and the digest of the line before, so that a line that was changed, removed or
inserted is noticed wherever the log is read. A line is one unbuffered `os.write` in append mode: whatever kills the
process, at most the last line of a log is incomplete. Readers ignore what follows the last newline; the next line
replaces it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError, DataError, storage_errors

_DIGEST = re.compile(rb'(?:, )?"digest": "([0-9a-f]{16})"\}\Z')
_CHANGED_NEWLINE = re.compile(rb'"digest": "[0-9a-f]{16}"\}.', re.DOTALL)  # no write is torn behind its last character


@dataclass(frozen=True)
class Position:
    """A length of a log in bytes, and the digest of the line that ends there."""

    num_bytes: int = 0
    digest: str = ""


class LogFile:
    """One log, open for writing; `position` is where the next line goes."""

    def __init__(self, path: Path) -> None:
        """Open `path`, created if needed.

        Raises:
            StorageError: it cannot be opened for writing.
        """
        self.path = path
        with storage_errors(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.refresh()

    def refresh(self) -> None:
        """Find out where the log ends, because another process may have written it.

        Raises:
            StorageError: it cannot be read.
        """
        with storage_errors(self.path):
            content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        last = _DIGEST.search(content[content.rfind(b"\n", 0, max(end - 1, 0)) + 1 : max(end - 1, 0)])
        self.position = Position(end, last[1].decode() if last else "")

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record of finite plain values.

        Raises:
            StorageError: the disk refuses the line; the log is unchanged.
        """
        body, before = json.dumps(record, allow_nan=False).encode(), self.position
        digest = _digest(body, before.digest)
        line = body[:-1] + (b", " if record else b"") + b'"digest": "' + digest.encode() + b'"}\n'
        with storage_errors(self.path):
            if os.fstat(self._descriptor).st_size > before.num_bytes:
                os.ftruncate(self._descriptor, before.num_bytes)
            if os.write(self._descriptor, line) != len(line):
                # A regular file accepts fewer bytes than given only where there is no space for the rest.
                os.ftruncate(self._descriptor, before.num_bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.position = Position(before.num_bytes + len(line), digest)

    def check(self, position: Position | None = None) -> int:
        """Check the lines before `position`, or all of them, and return their number.

        Raises:
            CheckpointError: the log is shorter than `position`, or holds other lines than at the commit.
            DataError: a line is malformed or was changed.
        """
        content = self.path.read_bytes()
        if position is not None and len(content) < position.num_bytes:
            raise CheckpointError(
                f"{str(self.path)!r} holds {len(content)} bytes but the commit was made at {position.num_bytes}: its"
                " last lines were cut, so restore it from a backup"
            )
        records, digest = _parse(self.path, content if position is None else content[: position.num_bytes])
        if position is not None and digest != position.digest:
            raise CheckpointError(
                f"{str(self.path)!r} holds other lines than at the commit: it was replaced, so restore it from a backup"
            )
        return len(records)

    def truncate(self, position: Position) -> None:
        """Remove what follows `position`, and sync.

        Raises:
            StorageError: the disk refuses a write.
        """
        with storage_errors(self.path):
            os.ftruncate(self._descriptor, position.num_bytes)
            os.fsync(self._descriptor)
        self.position = position

    def sync(self) -> None:
        """Sync the log to the disk.

        Raises:
            StorageError: the disk refuses a write.
        """
        with storage_errors(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the log."""
        os.close(self._descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log without their digests; [] where there is no log.

    A log in which no line has a digest is read, too.

    Raises:
        DataError: a line is malformed or was changed, or one before it was removed.
    """
    try:
        return _parse(path, path.read_bytes())[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"cannot read the log {str(path)!r} ({error.strerror}): move away what is there, or check its permissions"
        ) from None
    except DataError as error:
        again = f"gossamer resume {shlex.quote(str(path.parent))} --restart"
        raise DataError(f"{error}, or erase it and train anew with: {again}") from error


def _parse(path: Path, content: bytes) -> tuple[list[dict[str, Any]], str]:
    """Return records, and the digest of the last one."""
    *lines, torn = content.split(b"\n")
    if _CHANGED_NEWLINE.search(torn):
        lines.append(torn)
    digest, records = "", []
    has_digests = any(map(_DIGEST.search, lines))
    remedy = "restore the log from a backup"
    for number, line in enumerate(lines, start=1):
        record, found = _object(line), _DIGEST.search(line)
        if record is None:
            raise DataError(f"line {number} of {str(path)!r} is not a JSON object: {remedy}")
        if has_digests:
            digest = _digest(line[: found.start()] + b"}", digest) if found else ""
            if not found or found[1].decode() != digest:
                raise DataError(
                    f"line {number} of {str(path)!r} is not as it was written, or a line before it is missing: {remedy}"
                )
            del record["digest"]
        records.append(record)
    return records, digest


def _digest(body: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:16]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
