"""SHA-256 of what is sent and received, computed while the next chunk is on its way."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

from gossamer.profiling import recorder

_INLINE_BYTES = 1 << 16  # up to which another thread would take longer


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="transport-digests")


class Digest:
    """A SHA-256 that is updated in another thread, by one chunk at a time."""

    def __init__(self, start: bytes) -> None:
        """Begin with some bytes."""
        self._sha256 = hashlib.sha256(start)
        self._pending: Future[None] | None = None

    def update(self, chunk: memoryview) -> None:
        """Go on with a chunk, which must not change; waits for the one before."""
        self._wait()
        if len(chunk) <= _INLINE_BYTES:
            self._update(chunk)
        else:
            self._pending = _pool().submit(self._update, chunk)

    def digest(self) -> bytes:
        """Return the digest of all."""
        self._wait()
        return self._sha256.digest()

    def _update(self, chunk: memoryview) -> None:
        with recorder.span("checksum", len(chunk)):
            self._sha256.update(chunk)

    def _wait(self) -> None:
        if self._pending is not None:
            with recorder.span("wait"):
                self._pending.result()
            self._pending = None
