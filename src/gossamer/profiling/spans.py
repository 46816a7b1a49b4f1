"""Named spans of wall-clock time, added up by name, and recorded where a run is profiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from gossamer.profiling import recorder

Listener = Callable[[str, bool], None]
KINDS = {"train": "coordinate"}  # what the driver does meanwhile


class Spans:
    """Measures named spans of time; `listeners` are called at every start (True) and end (False)."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure the time of the block as `name`."""
        for listener in self.listeners:
            listener(name, True)
        began = time.perf_counter()
        try:
            with recorder.span(KINDS.get(name, name)):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            for listener in self.listeners:
                listener(name, False)

    def stage(self, kind: str, num_bytes: int = 0) -> AbstractContextManager[None]:
        """Return a context that records the block, but adds up nothing."""
        return recorder.span(kind, num_bytes)

    def round(self, number: int) -> AbstractContextManager[None]:
        """Return a context that records a whole round."""
        return recorder.round_span(number)

    def take(self) -> dict[str, float]:
        """Return the seconds of every span since the last call, and reset them."""
        taken, self._seconds = self._seconds, {}
        return taken
