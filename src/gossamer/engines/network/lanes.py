"""What one peer sends to another one: in order, at most one message at a time, and again after either was restarted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing

from gossamer.errors import Disconnected, Dropped, GossamerError, TransportError
from gossamer.transport import Client, Message

KEPT = 2  # messages of which the receiver may need one again: the one that it has not taken, and the one before
DIAL_SECONDS = 1.0
POLL_SECONDS = 0.2
START = (-1, 0)
When = tuple[int, int]  # round and phase
Dial = Callable[[float], Client | None]  # (seconds) -> connection; None: where to is not known


def when(message: Message) -> When:
    """Return the phase that a message belongs to."""
    return message.address.round, message.address.phase


class Lane:
    """Sends to one node, in a thread of its own.

    Attributes:
        error: why nothing can be sent, which is not mended by waiting; None: nothing is known of any.
        at: phase that the node was in when this one joined it last; `START`: it never did.
        is_over: whether the node has finished the run, and needs nothing more.
        answer: what it has answered to `ask`.
    """

    def __init__(
        self, dial: Dial, kept: Iterable[Message], changed: threading.Condition, told: Callable[[str], None]
    ) -> None:
        """Start.

        Args:
            dial: callback that joins the node; its welcome says ``at``, the phase that the node is in.
            kept: what was sent to it last, by a process that is gone.
            changed: notified whenever something was taken, or went wrong.
            told: callback, given the reason when the node is away, be it from the beginning.
        """
        self._dial, self._changed, self._told = dial, changed, told
        self._kept = deque(kept, KEPT)
        self._waiting = deque(self._kept)
        self._taken, self._closed, self._is_there = START, False, True
        self.error: GossamerError | None = None
        self.at, self.is_over = START, False
        self._question: Message | None = None
        self.answer: Message | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Send a message, later than all before."""
        with self._changed:
            self._kept.append(message)
            self._waiting.append(message)
            while len(self._waiting) > KEPT:  # nobody waits for it any more
                self._waiting.popleft()
            self._changed.notify_all()

    def ask(self, message: Message) -> None:
        """Ask the node for its state, see `answer`."""
        with self._changed:
            self._question, self.answer = message, None
            self._changed.notify_all()

    def has_taken(self, address: When) -> bool:
        """Say whether the node has what belongs to a phase, or needs it no more."""
        return self.is_over or self._taken >= address

    @property
    def is_away(self) -> bool:
        """Whether the node has ended, or could not be joined when this one tried last."""
        return self.is_over or not self._is_there

    @property
    def kept(self) -> list[When]:
        """The phases whose messages are kept, to be sent again."""
        with self._changed:
            return [when(message) for message in self._kept]

    def close(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(2 * DIAL_SECONDS)

    # ---- in the thread

    def _run(self) -> None:
        while not (self._closed or self.is_over):
            try:
                client = self._dial(DIAL_SECONDS)
                if client is None:
                    self._pause()
                    continue
                with closing(client):
                    self._use(client)
            except Disconnected as error:
                self._note_away(str(error))
                self._pause()
            except GossamerError as error:
                if self.at == START or isinstance(error, Dropped) or not isinstance(error, TransportError):
                    self._fail(error)
                    return
                self._note_away(str(error))  # another node now listens there: it is the one that has to be mended
                self._pause()

    def _use(self, client: Client) -> None:
        """Send over a connection until it is lost."""
        with self._changed:
            round, phase = client.welcome["at"]
            self.at = (int(round), int(phase))
            self._waiting = deque(message for message in self._kept if when(message) >= self.at)
            self._taken = max([self._taken, *(when(m) for m in self._kept if when(m) < self.at)])
            self._changed.notify_all()
        self._is_there = True
        while not self._closed:
            received = client.receive(0.0)
            if received is not None and self._hear(received.message):
                return
            with self._changed:
                if not (self._waiting or self._question):
                    self._changed.wait(POLL_SECONDS)
                message, question = self._waiting[0] if self._waiting else None, self._question
                self._question = None
            if question is not None:
                client.send(question)
            if message is not None:
                client.send(message)
                self._take(message)

    def _hear(self, message: Message) -> bool:
        """Take what the node says; return whether it is over for it."""
        with self._changed:
            if message.kind == "end":
                self.is_over = True
            else:
                self.answer = message
            self._changed.notify_all()
            return self.is_over

    def _take(self, message: Message) -> None:
        with self._changed:
            if self._waiting and self._waiting[0] is message:
                self._waiting.popleft()
            self._taken = max(self._taken, when(message))
            self._changed.notify_all()

    def _fail(self, error: GossamerError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()

    def _note_away(self, reason: str) -> None:
        if self._is_there:
            self._is_there = False
            self._told(reason)

    def _pause(self) -> None:
        with self._changed:
            if not self._closed:
                self._changed.wait(POLL_SECONDS)
