"""Standing Ray actors, one for each core, and work that is done once whatever happens to them.

A call may run twice, on a replacement or beside a straggler; the first result counts and every other one is dropped, so
it must not change anything but its own result.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gossamer.errors import EngineError, GossamerError, RoundAborted, StateLost, one_line

AHEAD = 2  # calls that an actor has at once, so that it need not wait for the next
POLL_SECONDS = 0.2
MOST_FAILURES = 3  # of each actor in a row, on average, without a single result
START_SECONDS = 120.0  # in which one actor at least must have come up
HUNG = 3  # times that limit without an answer: the first actor of a place is replaced; every next waits twice
PATIENCE = 20  # times the longest answer so far, the limit where straggler_seconds is not given
LEAST_PATIENCE_SECONDS = 60.0


class Call(NamedTuple):
    """One call of an actor's method.

    Attributes:
        key: what tells it from the others of its batch.
        method: of the actor.
        arguments: what it is given; Ray object references are resolved first.
        num_returns: how many objects it returns; more than one stay references.
        cost: about how long it takes, compared with the others of its batch.
        again: what it is given when it is made again, on a replacement or beside a straggler; None: the same.
        waits_seconds: that it may wait for other calls of its batch. Such a call is not made elsewhere meanwhile, and
            whoever makes it notes how long it takes.
    """

    key: Hashable
    method: str
    arguments: tuple[Any, ...]
    num_returns: int = 1
    cost: float = 1.0
    again: tuple[Any, ...] | None = None
    waits_seconds: float = 0.0

    def repeated(self) -> Call:
        """Return the call as it is made again."""
        return self if self.again is None else self._replace(arguments=self.again)


@dataclass
class _Slot:
    """A place for an actor, and who has it now.

    Attributes:
        actor: its handle.
        starting: what its first answer comes under; None once it is there.
        generation: how many had the place before.
        heard: when it last answered, or was given work while it had none.
        kind: of actor.
    """

    actor: Any
    starting: Any
    kind: str
    generation: int = 0
    heard: float = 0.0


@dataclass
class _Attempt:
    call: Call
    refs: list[Any]
    slot: int
    generation: int
    is_doubled: bool = False


CPU, GPU = "cpu", "gpu"  # kinds of actors
Calls = Iterable[Call] | Mapping[str, Iterable[Call]]
READY = Call("ready", "ready", ())


class Actors:
    """Actors of one class, which has a method `ready`; those that die or hang are replaced."""

    def __init__(
        self,
        make: Callable[[], Any],
        num_actors: int,
        *,
        straggler_seconds: float | None = None,
        start_seconds: float = START_SECONDS,
        on_event: Callable[..., None] = lambda kind, **fields: None,
        others: Mapping[str, tuple[Callable[[], Any], int]] | None = None,
    ) -> None:
        """Start actors.

        Args:
            make: starts one actor of kind `CPU` and returns its handle.
            num_actors: of that kind.
            straggler_seconds: wall-clock seconds without an answer of an actor after which its calls are done again
                elsewhere, as soon as another one has time; long after that it is replaced. None: `PATIENCE` times the
                longest time that an answer to the same method has taken, a minute at least.
            start_seconds: in which one actor at least must have come up.
            on_event: is told of every retry and replacement.
            others: how actors of further kinds are started, and how many of them.
        """
        self._make = {CPU: make} | {kind: one for kind, (one, _) in (others or {}).items()}
        self._straggler_seconds, self.on_event, self._start_seconds = straggler_seconds, on_event, start_seconds
        self._slots = [self._started(kind) for kind, (_, number) in (others or {}).items() for _ in range(number)]
        self._longest: dict[str, float] = {}
        self._num_others = len(self._slots)
        self.resize(num_actors)

    def __len__(self) -> int:
        return len(self._slots) - self._num_others

    @property
    def generations(self) -> tuple[int, ...]:
        """How many actors each place has lost; equal as long as all are the same ones."""
        return tuple(slot.generation for slot in self._slots)

    def resize(self, num_actors: int) -> None:
        """Start further actors of kind `CPU`, or stop the last ones; only between two calls of `map`."""
        import ray

        while len(self) > num_actors:
            ray.kill(self._slots.pop().actor)
        while len(self) < num_actors:
            self._slots.append(self._started(CPU))

    def map(self, calls: Calls, stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Hashable, Any]]:
        """Yield (key, result) of all calls, in the order in which they are done; a batch of few is spread evenly.

        `calls` are for actors of kind `CPU`, or ``{kind: calls}``; they are drawn from lazily. When `stop` turns true
        no more results are waited for. Of a call with several returned objects the first is fetched, the others stay
        references.

        Raises:
            RoundAborted: actors died again and again, or none came up, and no call got through.
            EngineError: a call failed by an error of its own, or there is no actor of its kind.
            GossamerError: a call raised one.
        """
        sources = calls if isinstance(calls, Mapping) else {CPU: calls}
        if missing := set(sources) - {slot.kind for slot in self._slots}:
            raise EngineError(f"there is no Ray actor of kind {', '.join(sorted(missing))}")
        batch = _Batch(self, {kind: iter(of_kind) for kind, of_kind in sources.items()})
        while batch.fill():
            attempt = batch.wait()
            if stop():
                return
            if attempt is None or attempt.call.key in batch.done:
                continue
            try:
                result = _result(attempt)
            except _lost() as error:
                if not attempt.is_doubled:
                    batch.again[self._slots[attempt.slot].kind].append(attempt.call.repeated())
                self._lost_one(attempt, type(error).__name__, batch)
                continue
            batch.failures = 0
            batch.done.add(attempt.call.key)
            yield attempt.call.key, result
        for attempt in batch.flying.values():
            if attempt.is_doubled:  # it still works on what another one has done
                self._replace(attempt, "straggler")

    def stop(self) -> None:
        """Kill the actors."""
        self._num_others = 0
        self.resize(0)

    def note_seconds(self, method: str, seconds: float) -> None:
        """Take down how long an answer took."""
        self._longest[method] = max(seconds, self._longest.get(method, 0.0))

    def limit_seconds(self, method: str) -> float:
        """Return how long a call may stay without an answer before it is made elsewhere, too."""
        if self._straggler_seconds is not None:
            return self._straggler_seconds
        if method not in self._longest:
            return math.inf
        return max(LEAST_PATIENCE_SECONDS, PATIENCE * self._longest[method])

    # ---- inside

    def _started(self, kind: str, generation: int = 0) -> _Slot:
        actor = self._make[kind]()
        return _Slot(actor, actor.ready.remote(), kind, generation)

    def _lost_one(self, attempt: _Attempt, reason: str, batch: _Batch) -> None:
        self.on_event("retry", reason=reason, call=str(attempt.call.key))
        self._give_up(attempt, reason, batch)

    def _give_up(self, attempt: _Attempt, reason: str, batch: _Batch) -> None:
        """Replace the actor that had an attempt, unless that happened too often without a result in between."""
        batch.failures += self._replace(attempt, reason)
        if batch.failures > MOST_FAILURES * len(self._slots):
            raise RoundAborted(
                f"{batch.failures} Ray actors in a row were lost ({reason}): look at the memory and the logs of the"
                " cluster, raise engine.straggler_seconds if it is set, then resume"
            ) from None

    def _replace(self, attempt: _Attempt, reason: str) -> bool:
        """Put a new actor in the place of the one that had an attempt, unless that was done already."""
        import ray

        slot = self._slots[attempt.slot]
        if slot.generation != attempt.generation:
            return False
        ray.kill(slot.actor)
        self._slots[attempt.slot] = self._started(slot.kind, slot.generation + 1)
        self.on_event("actor-replaced", reason=reason, slot=attempt.slot)
        return True


class _Batch:
    """What `Actors.map` has under way."""

    def __init__(self, actors: Actors, sources: dict[str, Iterator[Call]]) -> None:
        self._actors, self._sources = actors, sources
        self.again: dict[str, deque[Call]] = {kind: deque() for kind in sources}
        self.flying: dict[Any, _Attempt] = {}
        self.done: set[Hashable] = set()
        self.failures = 0
        self._idle_since = time.monotonic()

    def fill(self) -> bool:
        """Give calls to the actors that answer until each has `AHEAD`, to who has least first; False if all is done."""
        slots = self._actors._slots
        busy = {number: 0 for number, slot in enumerate(slots) if slot.starting is None}
        load = dict.fromkeys(busy, 0.0)
        for attempt in self._current():
            busy[attempt.slot] = AHEAD if attempt.is_doubled else busy[attempt.slot] + 1
            load[attempt.slot] += attempt.call.cost
        for depth in range(1, AHEAD + 1):
            for number in sorted(busy, key=load.__getitem__):
                call = self._next(slots[number].kind) if busy[number] < depth else None
                if call is not None:
                    self._send(call, number, is_idle=busy[number] == 0)
                    busy[number] += 1
                    load[number] += call.cost
        is_waiting = any(attempt.call.key not in self.done for attempt in self.flying.values())
        return is_waiting or any(self.again.values()) or bool(self._sources)

    def wait(self) -> _Attempt | None:
        """Wait for a call to end, or an actor to come up, but not long; return the attempt that ended."""
        import ray

        slots, limit = self._actors._slots, self._actors._start_seconds
        starting = {slot.starting: slot for slot in slots if slot.starting is not None}
        ready, _ = ray.wait([*self.flying, *starting], num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        now = time.monotonic()
        if ready or self.flying:
            self._idle_since = now
        elif now - self._idle_since > limit:
            raise RoundAborted(
                f"{len(starting)} of {len(slots)} Ray actors did not come up in {limit:g} seconds: give the cluster"
                " that many free CPUs, or set engine.workers lower"
            )
        if not ready:
            self._do_again(now)
            return None
        if ready[0] in starting:
            self._came_up(starting[ready[0]])
            return None
        attempt = self.flying.pop(ready[0])
        if slots[attempt.slot].generation == attempt.generation:
            if not attempt.call.waits_seconds:
                self._actors.note_seconds(attempt.call.method, now - slots[attempt.slot].heard)
            slots[attempt.slot].heard = now
        return attempt

    def _current(self) -> list[_Attempt]:
        """Return the attempts whose actors have not been replaced."""
        slots = self._actors._slots
        return [one for one in self.flying.values() if slots[one.slot].generation == one.generation]

    def _came_up(self, slot: _Slot) -> None:
        """Note that an actor is there, or start another one if it died before."""
        import ray

        try:
            ray.get(slot.starting)
        except _lost() as error:
            if getattr(error, "actor_init_failed", False):
                raise EngineError(f"a Ray actor cannot start: {str(error).splitlines()[-1]}") from None
            number = self._actors._slots.index(slot)
            self._actors._lost_one(_Attempt(READY, [], number, slot.generation), type(error).__name__, self)
        except ray.exceptions.RayTaskError as error:
            raise _own_error(error) from None
        else:
            slot.starting = None

    def _next(self, kind: str) -> Call | None:
        again = self.again.get(kind, ())
        while again:
            call = again.popleft()
            if call.key not in self.done:
                return call
        drawn = next(self._sources.get(kind, iter(())), None)
        if drawn is None:
            self._sources.pop(kind, None)
        return drawn

    def _send(self, call: Call, number: int, *, is_idle: bool) -> None:
        slot = self._actors._slots[number]
        if is_idle:
            slot.heard = time.monotonic()
        method = getattr(slot.actor, call.method).options(num_returns=call.num_returns)
        found = method.remote(*call.arguments)
        refs = [found] if call.num_returns == 1 else list(found)
        self.flying[refs[0]] = _Attempt(call, refs, number, slot.generation)

    def _do_again(self, now: float) -> None:
        """Give the calls of actors that do not answer to others, and replace those that never will."""
        slots = self._actors._slots
        for attempt in self._current():
            silent, limit = now - slots[attempt.slot].heard, self._actors.limit_seconds(attempt.call.method)
            silent -= attempt.call.waits_seconds
            is_alone = not attempt.call.waits_seconds
            if is_alone and silent > limit and not attempt.is_doubled and attempt.call.key not in self.done:
                attempt.is_doubled = True
                self.again[slots[attempt.slot].kind].append(attempt.call.repeated())
                self._actors.on_event("retry", reason="straggler", call=str(attempt.call.key))
            if silent > HUNG * limit * 2**attempt.generation:  # the limit may be too short for an honest call
                self._actors._give_up(attempt, "hung", self)


def _result(attempt: _Attempt) -> Any:
    """Return what a call returned.

    Raises:
        Exception: one of `_lost` if the actor or its object is gone.
        GossamerError: the call raised one, or something else, which is an `EngineError`.
    """
    import ray

    try:
        first = ray.get(attempt.refs[0])
    except ray.exceptions.RayTaskError as error:
        raise _own_error(error) from None
    except ray.exceptions.RayError as error:
        if isinstance(error, _lost()):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise EngineError(f"Ray fails ({reason}): look at its logs, then resume") from None
    return first if attempt.call.num_returns == 1 else (first, *attempt.refs[1:])


def _own_error(error: Any) -> GossamerError:
    from ray.exceptions import ObjectLostError

    cause = error.cause
    if isinstance(cause, GossamerError):
        return type(cause)(*cause.args)
    if isinstance(cause, ObjectLostError):  # no other actor could do it either
        return StateLost(
            f"the cluster lost what a call was to be given, as with a node ({type(cause).__name__}): resume from the"
            " last commit"
        )
    failed = EngineError(f"a Ray actor failed with {one_line(cause)}: correct it")
    failed.add_note(str(error))
    return failed


def _lost() -> tuple[type[Exception], ...]:
    """Return the errors that say that an actor, its node, or an object that it held, is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
    )
