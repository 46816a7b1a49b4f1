"""Named spans of wall-clock time, added up by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, bool], None]


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
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            for listener in self.listeners:
                listener(name, False)

    def take(self) -> dict[str, float]:
        """Return the seconds of every span since the last call, and reset them."""
        taken, self._seconds = self._seconds, {}
        return taken
