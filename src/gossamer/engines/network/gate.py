"""What a peer takes of what others send: that of the phase that it is in, from those who send in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from gossamer.engines.network.lanes import When
from gossamer.errors import Dropped
from gossamer.transport.messages import Header, Spec
from gossamer.transport.order import Busy

HOLD_SECONDS = 60.0  # for which what is of a later phase waits unread, before it has to be sent again
Specs = Mapping[str, Spec]


class Gate:
    """An `Accept`: messages of the phase at hand are taken, those of earlier ones dropped, later ones held back unread."""

    def __init__(self, run: str, kind: str, number_of: Callable[[str], int | None]) -> None:
        """Take nothing yet.

        Args:
            run: id of the run.
            kind: of the messages.
            number_of: callback that returns the number of the peer that a node is.
        """
        self._run, self._kind, self._number_of = run, kind, number_of
        self._at: When = (-1, 0)
        self._specs: Mapping[int, Specs] = {}
        self._changed = threading.Condition()
        self._closed = False

    def open(self, at: When, specs: Mapping[int, Specs]) -> None:
        """Go on to a phase.

        Args:
            at: round and phase.
            specs: dtypes and shapes of the arrays of each sender.
        """
        with self._changed:
            self._at, self._specs = at, specs
            self._changed.notify_all()

    def close(self) -> None:
        """Hold nothing back any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __call__(self, header: Header) -> None:
        """See `gossamer.transport.messages.Accept`; memory is allocated for each message."""
        address = header.address
        at = address.round, address.phase
        if header.kind != self._kind or address.run != self._run:
            raise Dropped("unexpected")
        if address.sender != self._number_of(header.node):
            raise Dropped("another sender")
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._at >= at, HOLD_SECONDS)
            if self._closed or self._at < at:
                raise Busy("it is of a later phase than this peer is in: send it again later")
            if self._at > at:
                raise Dropped("stale")
            specs = self._specs.get(address.sender)
        if specs is None:
            raise Dropped("unexpected")
        if dict(header.specs) != dict(specs):
            raise Dropped("wrong arrays")
