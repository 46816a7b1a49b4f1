"""Requests to stop a run: the signals that ask for it, and how patient they are."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gossamer.engines.base import STOP_SIGNALS
from gossamer.errors import Interrupted

PATIENCE_SECONDS = 2.0  # between a request to stop and the end of what cannot be stopped without loss
AGAIN_SECONDS = 1.0  # between two signals that were sent one after the other, not by a terminal and a wrapper at once


class StopRequest:
    """Whether a signal has asked a run to stop; it is asked by being called.

    The first signal asks. A second Ctrl-C interrupts at once, as does any signal within `at_once`.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._at_once = False

    def __call__(self) -> bool:
        """Say whether the run was asked to stop."""
        return self._asked_at is not None

    def is_overdue(self) -> bool:
        """Say whether it was asked `PATIENCE_SECONDS` ago."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > PATIENCE_SECONDS

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let signals interrupt what is done within the block: nothing of it is worth a commit.

        Raises:
            Interrupted: there was one, or there had been one before.
        """
        stopped = Interrupted("stopped while it was prepared")
        if self():
            raise stopped
        self._at_once = True
        try:
            yield
        except KeyboardInterrupt:
            raise stopped from None
        finally:
            self._at_once = False

    def ask(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        now = time.monotonic()
        is_again = self._asked_at is not None and now - self._asked_at > AGAIN_SECONDS
        if self._at_once or (is_again and number == signal.SIGINT):
            raise KeyboardInterrupt
        self._asked_at = now if self._asked_at is None else self._asked_at


_active: list[StopRequest] = []  # of the run, or sweep of runs, that this process is in


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn signals that end a process into a polite request to stop; within another such block, into the same one.

    What was ignored before, as by nohup, stays so; and so do handlers of signals that users may give a meaning.
    """
    if _active or threading.current_thread() is not threading.main_thread():
        yield _active[0] if _active else StopRequest()
        return
    handlers = {one: signal.getsignal(one) or signal.SIG_DFL for one in STOP_SIGNALS}
    always, unless_ignored = (signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGQUIT)
    before = {
        one: handler
        for one, handler in handlers.items()
        if one in always or (one in unless_ignored and handler != signal.SIG_IGN) or handler == signal.SIG_DFL
    }
    _active.append(StopRequest())
    for number in before:
        signal.signal(number, _active[0].ask)
    try:
        yield _active[0]
    finally:
        _active.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
