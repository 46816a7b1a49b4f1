"""The connections of one peer, or of the observer of all: it listens for rows, and has a lane to each who needs its."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import EngineHooks
from gossamer.engines.network.gate import ASK, Gate, Specs
from gossamer.engines.network.lanes import Lane, When, when
from gossamer.engines.network.place import Place, described, name_of
from gossamer.engines.network.roster import versions
from gossamer.errors import ConfigError, EngineError, Interrupted, TransportError
from gossamer.profiling import recorder
from gossamer.transport import (
    SERVER,
    Address,
    Client,
    Gone,
    Hello,
    Joined,
    Message,
    Received,
    Refusal,
    Server,
    Welcome,
)
from gossamer.transport.audit import AUDIT, AuditLog, no_audit

POLL_SECONDS = 0.2
LINGER_SECONDS = 60.0
AGAIN_SECONDS = 3.0  # in which neighbours who still wait find a node that was started again
ASK_SECONDS = 30.0
MAX_REFUSALS = 100  # that are told


class PeerLinks:
    """Listens, sends and collects what others send, by phase and sender."""

    def __init__(self, place: Place, kind: str, hooks: EngineHooks) -> None:
        """Listen, and say where.

        Args:
            place: see `Place`.
            kind: of the messages that are taken: "row" at a peer, "state" at the observer.
            hooks: of the run.

        Raises:
            ConfigError: the address cannot be listened on, or the kit is another node's.
        """
        self._place, self._hooks, self._kind = place, hooks, kind
        self._changed = threading.Condition()
        self._numbers: dict[str, int | None] = {}  # of nodes that were admitted
        self._lanes: dict[int | None, Lane] = {}
        self._collected: dict[When, dict[int, Message]] = defaultdict(dict)
        self._present: set[int | None] = set()
        self._absent: set[int | None] = set()  # who was not there when this node waited last
        self._snapshot: Arrays = {}
        self._num_questions = 0
        self._refusals: set[str] = set()  # that were told
        self._at: When = (0, 0)
        self._parent = os.getppid() if place.secret and place.number is not None else None
        self._stack = ExitStack()
        self._gate = Gate(place.run, kind, self._numbers.get, self._changed)
        self._audit = no_audit
        if place.kit is not None:
            log = AuditLog(place.directory / AUDIT)
            self._stack.callback(log.close)
            self._audit = log.record
        try:
            self._server = Server(
                place.listen,
                admit=self._admit,
                accept=self._gate,
                credentials=None if place.kit is None else place.kit.credentials(),
                audit=self._audit,
                trace_name=name_of(place.number),
            )
        except BaseException:
            self._stack.close()
            raise
        place.book.announce(place.number, self._server.address)
        self._over = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def address(self) -> str:
        """Where others dial, as host:port."""
        return self._server.address

    @property
    def present(self) -> set[int | None]:
        """The numbers of those who have joined."""
        with self._changed:
            return set(self._present)

    def begin(self, at: When, specs: Mapping[int, Specs], snapshot: Arrays | None = None) -> None:
        """Take from now on what belongs to a phase, and nothing of those before.

        Args:
            at: round and phase.
            specs: arrays that each sender sends in it.
            snapshot: state with which it begins, for peers that have fallen behind; None: there is none.
        """
        with self._changed:
            self._at, self._snapshot = at, snapshot or {}
            for old in [one for one in self._collected if one < at]:
                del self._collected[old]
        self._gate.open(at, specs)

    def lane(self, number: int | None, kept: Iterable[Message] = ()) -> Lane:
        """Return the lane to a peer or to the observer (None); `kept`: see `Lane`."""
        if number not in self._lanes:
            self._lanes[number] = Lane(
                lambda seconds: self._dial(number, seconds),
                kept,
                self._changed,
                lambda reason: self._hooks.tell(f"{described(number)} is away; waiting for it ({reason})"),
            )
        return self._lanes[number]

    @property
    def lanes(self) -> Mapping[int | None, Lane]:
        """The lanes that there are, by number."""
        return self._lanes

    def message(self, kind: str, at: When, arrays: Arrays, body: Mapping[str, Any] | None = None) -> Message:
        """Return a message of this node's, of a phase."""
        sender = SERVER if self._place.number is None else self._place.number
        return Message(kind, Address(self._place.run, *at, sender), body or {}, arrays)

    def wait(
        self, at: When, senders: Collection[int], receivers: Collection[int | None], until: float | None = None
    ) -> set[int]:
        """Wait until all that is sent to this node in a phase is there, and what it sends is taken.

        Args:
            at: round and phase.
            senders, receivers: who sends, and to whom this node sends.
            until: time of the monotonic clock after which it waits no longer, nor does it wait for those who are still
                away since then, if others are there: who is cut off does not run ahead; None: it waits for ever.

        Returns:
            Senders of whom nothing has come, nor will.

        Raises:
            Interrupted: a stop was requested.
            GossamerError: a node refuses this one.
        """
        with self._changed:
            while True:
                self.check()
                missing = set(senders) - self._collected[at].keys()
                past = {one for one in missing if self._gate.is_past(one, at)}
                untaken = {one for one in receivers if not self._lanes[one].has_taken(at)}
                is_alone = not self._present - {None}
                away = set() if until is None or is_alone else self._absent - self._present
                is_late = until is not None and time.monotonic() >= until
                if is_late or not (missing - past - away or untaken - away):
                    self._absent = (self._absent - {*senders, *receivers}) | missing | untaken
                    return missing
                with recorder.span("wait"):
                    self._changed.wait(POLL_SECONDS)

    def is_past(self, number: int, at: When) -> bool:
        """Say whether another peer sends nothing of a phase any more."""
        return self._gate.is_past(number, at)

    def rounds_ahead(self, number: int) -> int:
        """Return by how many rounds another peer is ahead of this one, as far as that is known."""
        return self._gate.rounds_ahead(number)

    def state_of(self, number: int, specs: Specs, *, is_patient: bool) -> tuple[When, Arrays] | None:
        """Return a phase, and the state arrays with which another peer began it; None: it does not answer.

        Args:
            specs: dtypes and shapes of the arrays.
            is_patient: whether it is waited for, too, while it is away.

        Raises:
            Interrupted: a stop was requested.
        """
        lane, until = self.lane(number), time.monotonic() + ASK_SECONDS
        self._num_questions += 1
        asked = self.message(ASK, self._at, {})
        lane.ask(replace(asked, address=replace(asked.address, attempt=self._num_questions)))
        with self._changed:
            while lane.answer is None and time.monotonic() < until and (is_patient or not lane.is_away):
                self.check()
                with recorder.span("wait"):
                    self._changed.wait(POLL_SECONDS)
        answer = lane.answer
        if answer is None:
            return None
        found = {name: (row.dtype, tuple(row.shape)) for name, row in answer.arrays.items()}
        if found != dict(specs) or not all(bool(row.isfinite().all()) for row in answer.arrays.values()):
            return None
        return when(answer), dict(answer.arrays)

    def wait_for_some(self, at: When, senders: Collection[int], seconds: float) -> None:
        """Wait until one of some senders has sent what belongs to a phase, for so many seconds at most.

        Raises:
            GossamerError: a node refuses this one.
        """
        with self._changed:
            if not set(senders) & self._collected[at].keys():
                self._changed.wait(seconds)
            for lane in self._lanes.values():
                if lane.error is not None:
                    raise lane.error

    def collected(self, at: When) -> dict[int, Message]:
        """Return what has come in a phase, by sender."""
        with self._changed:
            return dict(self._collected[at])

    def check(self) -> None:
        """Raise what ends the wait for others.

        Raises:
            Interrupted: a stop was requested.
            GossamerError: a node refuses this one.
        """
        if self._hooks.stop_requested():
            raise Interrupted("stopped")
        if self._parent is not None and os.getppid() != self._parent:
            raise EngineError("the run that has started this peer is gone")
        for lane in self._lanes.values():
            if lane.error is not None:
                raise lane.error

    def finish(self, patience_seconds: float = LINGER_SECONDS, *, is_again: bool = False) -> bool:
        """Tell all who send to this node that it needs nothing more; wait for those who may need something of it.

        Args:
            patience_seconds: after which others go on without what they need.
            is_again: whether this node had finished before it was started again: others, who do not know it, may have
                ended since, so it waits `AGAIN_SECONDS` only for those who are away.

        Returns:
            Whether all to whom this node sends have ended, too.
        """
        end = (self._place.num_rounds, 0)
        with self._changed:
            self._at, self._over = end, True
        for name in self._server.nodes():
            self._say_end(name)
        began = time.monotonic()
        with self._changed:
            while (now := time.monotonic()) < began + min(LINGER_SECONDS, patience_seconds):
                left = {number for number, lane in self._lanes.items() if not lane.is_over}
                is_found = not is_again or now >= began + AGAIN_SECONDS
                if is_found and all(number in self._absent or self._is_gone(number, is_again) for number in left):
                    return not left
                if self._hooks.stop_requested():
                    return False
                with recorder.span("wait"):
                    self._changed.wait(POLL_SECONDS)
        return False

    def _is_gone(self, number: int | None, is_again: bool) -> bool:
        return is_again and self._lanes[number].is_away

    def close(self, reason: str) -> None:
        """End all connections."""
        self._gate.close()
        for lane in self._lanes.values():
            lane.close()
        self._server.close(reason)
        self._listener.join(POLL_SECONDS)
        self._stack.close()

    # ---- inside

    def _admit(self, hello: Hello) -> Welcome | Refusal:
        """Say whether a node may join; in any thread."""
        reason = self._place.objection(hello)
        if reason is not None:
            with self._changed:
                is_new = reason not in self._refusals and len(self._refusals) < MAX_REFUSALS
                self._refusals |= {reason} if is_new else set()
            if is_new:
                self._hooks.tell(f"refused: {reason}")
            return Refusal(reason)
        number = hello.body["peer"]
        with self._changed:
            self._numbers[hello.node] = number
            at = self._at
        return Welcome({"peer": self._place.number, "at": list(at)})

    def _dial(self, number: int | None, seconds: float) -> Client | None:
        """Join another node."""
        place, address = self._place, self._place.book.of(number)
        if address is None:
            return None
        hello = {
            "peer": place.number,
            "experiment": place.run,
            **vars(place.samples),
            "versions": versions(),
            "secret": place.secret,
        }
        expected = None
        if place.kit is not None:
            names = [name for name, its in place.members.items() if its == number]
            expected = names[0] if names and number is not None else None
        client = Client(
            address,
            name=place.name,
            hello=hello,
            credentials=None if place.kit is None else place.kit.credentials(),
            server_name=expected,
            audit=self._audit,
            trace_name=name_of(number),
            timeout_seconds=seconds,
        )
        if client.welcome.get("peer") != number:
            client.close()
            raise ConfigError(
                f"at {address} listens {described(client.welcome.get('peer'))}, not {described(number)}: correct the"
                f" addresses in {place.book.path.name}, or its --id"
            )
        return client

    def _listen(self) -> None:
        """Sort what happens, in a thread of its own."""
        while (event := self._server.receive(None)) is not None:
            with self._changed:
                if isinstance(event, Received) and event.message.kind == ASK:
                    self._answer(event.node)
                elif isinstance(event, Received):
                    address = event.message.address
                    self._collected[address.round, address.phase][address.sender] = event.message
                elif isinstance(event, Joined):
                    self._present.add(self._numbers.get(event.node))
                elif isinstance(event, Gone) and event.node not in self._server.nodes():
                    self._present.discard(self._numbers.get(event.node))
                self._changed.notify_all()
            if isinstance(event, Joined) and self._over:
                self._say_end(event.node)

    def _answer(self, node: str) -> None:
        with suppress(TransportError):
            self._server.send(node, self.message("state", self._at, self._snapshot))

    def _say_end(self, node: str) -> None:
        with suppress(TransportError):
            self._server.send(node, self.message("end", (self._place.num_rounds, 0), {}))
