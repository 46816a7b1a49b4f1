"""What a peer takes of what others send: that of the phase that it is in, from those who send in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from gossamer.engines.network.lanes import START, When
from gossamer.errors import Dropped
from gossamer.transport.messages import Header, Spec
from gossamer.transport.order import Busy

HOLD_SECONDS = 60.0  # for which what is of a later phase waits unread, before it has to be sent again
ASK = "ask"  # kind of the message by which a peer asks another one for its state
Specs = Mapping[str, Spec]


class Gate:
    """An `Accept`: takes messages of the phase at hand, drops earlier ones, and holds later ones back unread."""

    def __init__(
        self, run: str, kind: str, number_of: Callable[[str], int | None], changed: threading.Condition
    ) -> None:
        """Take nothing yet.

        Args:
            run: id of the run.
            kind: of the messages.
            number_of: callback that returns the number of the peer that a node is.
            changed: notified when somebody sends what is of a later phase.
        """
        self._run, self._kind, self._number_of, self._changed = run, kind, number_of, changed
        self._at: When = START
        self._specs: Mapping[int, Specs] = {}
        self._seen: dict[int, When] = {}  # the latest phase of which each has sent something
        self._accepted: set[int] = set()  # whose messages of the phase at hand were taken, or are being read
        self._closed = False

    def is_past(self, sender: int, at: When) -> bool:
        """Say whether somebody sends what is of a later phase, and has sent nothing of the one at hand, `at`."""
        return self._seen.get(sender, START) > at and sender not in self._accepted

    def rounds_ahead(self, sender: int) -> int:
        """Return by how many rounds somebody was ahead of this peer when it last sent something."""
        return self._seen.get(sender, START)[0] - self._at[0]

    def open(self, at: When, specs: Mapping[int, Specs]) -> None:
        """Go on to a phase.

        Args:
            at: round and phase.
            specs: dtypes and shapes of the arrays of each sender.
        """
        with self._changed:
            self._at, self._specs, self._accepted = at, specs, set()
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
        if header.kind not in (self._kind, ASK) or address.run != self._run:
            raise Dropped("unexpected")
        if address.sender != self._number_of(header.node):
            raise Dropped("another sender")
        if header.kind == ASK:
            if header.specs:
                raise Dropped("wrong arrays")
            return
        with self._changed:
            self._seen[address.sender] = max(at, self._seen.get(address.sender, START))
            self._changed.notify_all()
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
        with self._changed:
            if self._at == at:
                self._accepted.add(address.sender)
