"""Where a round's time goes: named spans, added up by name, with listeners."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, bool], None]


class Spans:
    """Measures named stretches of time; `listeners` are told of every start (True) and end (False)."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure what happens inside as `name`."""
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
        """Return the seconds of every span since the last call, and start anew."""
        taken, self._seconds = self._seconds, {}
        return taken
