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

from gossamer.engines.ray.recording import answer_id, call_id
from gossamer.errors import EngineError, GossamerError, RoundAborted, StateLost, one_line
from gossamer.profiling import recorder

AHEAD = 2  # calls queued at an actor, so that it need not wait for the next
POLL_SECONDS = 0.2
MAX_FAILURES = 3  # of each actor in a row, on average, without a single result
START_SECONDS = 120.0  # timeout for the first actor to start
HUNG = 3  # multiple of the limit after which a silent actor is replaced; doubled for every replacement
PATIENCE = 20  # multiple of the longest answer so far: the limit where straggler_seconds is not given
MIN_PATIENCE_SECONDS = 60.0


class Call(NamedTuple):
    """One call of an actor's method.

    Attributes:
        key: key, unique in its batch.
        method: name of the actor's method.
        arguments: arguments; Ray resolves object references among them first.
        num_returns: number of objects returned; more than one stay references.
        cost: rough duration, relative to the others of its batch.
        again: arguments of a repetition, on a replacement or beside a straggler; None: the same.
    """

    key: Hashable
    method: str
    arguments: tuple[Any, ...]
    num_returns: int = 1
    cost: float = 1.0
    again: tuple[Any, ...] | None = None

    def repeated(self) -> Call:
        """Return the call as it is made again."""
        return self if self.again is None else self._replace(arguments=self.again)


@dataclass
class _Actor:
    """One actor of the pool; a replacement takes over its number.

    Attributes:
        handle: its Ray handle.
        starting: reference to its first answer; None once it has come.
        generation: number of actors that it replaces, one after another.
        heard: monotonic time in seconds of its last answer, or of its last call while idle.
        kind: kind of actor.
        num_calls: number of calls that were made.
    """

    handle: Any
    starting: Any
    kind: str
    generation: int = 0
    heard: float = 0.0
    num_calls: int = 1  # of `ready`


@dataclass
class _Attempt:
    call: Call
    refs: list[Any]
    number: int
    generation: int
    is_doubled: bool = False
    answer: str = ""  # message id


CPU, GPU = "cpu", "gpu"  # kinds of actors
Calls = Iterable[Call] | Mapping[str, Iterable[Call]]
READY = Call("ready", "ready", ())


class ActorPool:
    """ActorPool of one class, which has a method `ready`; those that die or hang are replaced."""

    def __init__(
        self,
        make: Callable[[], Any],
        num_actors: int,
        *,
        straggler_seconds: float | None = None,
        start_seconds: float = START_SECONDS,
        on_event: Callable[..., None] = lambda kind, **fields: None,
        check: Callable[[], None] = lambda: None,
        others: Mapping[str, tuple[Callable[[], Any], int]] | None = None,
    ) -> None:
        """Start actors.

        Args:
            make: function that starts one actor of kind `CPU` and returns its handle.
            num_actors: number of actors of that kind.
            straggler_seconds: wall-clock seconds without an answer of an actor after which its calls are repeated on
                the next idle one; after `HUNG` times that it is replaced. None: `PATIENCE` times the longest time that
                an answer to the same method has taken, a minute at least.
            start_seconds: timeout for the first actor to start.
            on_event: callback for every retry and replacement.
            check: callback that raises if Ray itself is gone.
            others: for each further kind, a function as `make` and a number of actors.
        """
        self._make = {CPU: make} | {kind: one for kind, (one, _) in (others or {}).items()}
        self._straggler_seconds, self.on_event, self._start_seconds = straggler_seconds, on_event, start_seconds
        self.check = check
        self._actors = [self._started(kind) for kind, (_, number) in (others or {}).items() for _ in range(number)]
        self._longest: dict[str, float] = {}
        self._num_others = len(self._actors)
        self.resize(num_actors)

    def __len__(self) -> int:
        return len(self._actors) - self._num_others

    @property
    def generations(self) -> tuple[int, ...]:
        """Number of replacements of each actor: equal as long as all actors are the same ones."""
        return tuple(actor.generation for actor in self._actors)

    def resize(self, num_actors: int) -> None:
        """Start further actors of kind `CPU`, or stop the last ones; only between two calls of `map`."""
        import ray

        while len(self) > num_actors:
            ray.kill(self._actors.pop().handle)
        while len(self) < num_actors:
            self._actors.append(self._started(CPU))

    def map(self, calls: Calls, stop: Callable[[], bool] = lambda: False) -> Iterator[tuple[Any, Any]]:
        """Yield (key, result) of all calls, in the order in which they end.

        Args:
            calls: calls for actors of kind `CPU`, or ``{kind: calls}``; drawn from lazily, and spread evenly where they
                are few. Of a call with several returned objects the first is fetched, the others stay references.
            stop: predicate that ends the wait for further results.

        Raises:
            RoundAborted: actors died again and again, or none started, and no call succeeded.
            EngineError: a call raised an error that is no `GossamerError`, or there is no actor of its kind.
            GossamerError: a call raised one.
        """
        sources = calls if isinstance(calls, Mapping) else {CPU: calls}
        if missing := set(sources) - {actor.kind for actor in self._actors}:
            raise EngineError(f"there is no Ray actor of kind {', '.join(sorted(missing))}")
        batch = _Batch(self, {kind: iter(of_kind) for kind, of_kind in sources.items()})
        while batch.fill():
            attempt = batch.wait()
            if stop():
                return
            if attempt is None or attempt.call.key in batch.done:
                continue
            try:
                with recorder.span("receive", message=attempt.answer):
                    result = _result(attempt)
            except _lost() as error:
                if not attempt.is_doubled:
                    batch.again[self._actors[attempt.number].kind].append(attempt.call.repeated())
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

    def limit_seconds(self, method: str) -> float:
        """Return the time without an answer after which a call is repeated elsewhere."""
        if self._straggler_seconds is not None:
            return self._straggler_seconds
        if method not in self._longest:
            return math.inf
        return max(MIN_PATIENCE_SECONDS, PATIENCE * self._longest[method])

    # ---- inside

    def _started(self, kind: str, generation: int = 0) -> _Actor:
        actor = self._make[kind]()
        return _Actor(actor, actor.ready.remote(), kind, generation)

    def _lost_one(self, attempt: _Attempt, reason: str, batch: _Batch) -> None:
        self.check()
        self.on_event("retry", reason=reason, call=str(attempt.call.key))
        self._give_up(attempt, reason, batch)

    def _give_up(self, attempt: _Attempt, reason: str, batch: _Batch) -> None:
        """Replace the actor that had an attempt, unless that happened too often without a result in between."""
        batch.failures += self._replace(attempt, reason)
        if batch.failures > MAX_FAILURES * len(self._actors):
            raise RoundAborted(
                f"{batch.failures} Ray actors in a row were lost ({reason}): look at the memory and the logs of the"
                " cluster, raise engine.straggler_seconds if it is set, then resume"
            ) from None

    def _replace(self, attempt: _Attempt, reason: str) -> bool:
        """Replace the actor that had an attempt, unless that was done already; say whether it was done now."""
        import ray

        actor = self._actors[attempt.number]
        if actor.generation != attempt.generation:
            return False
        ray.kill(actor.handle)
        self._actors[attempt.number] = self._started(actor.kind, actor.generation + 1)
        self.on_event("actor-replaced", reason=reason, actor=attempt.number)
        return True


class _Batch:
    """The calls that `ActorPool.map` has under way."""

    def __init__(self, pool: ActorPool, sources: dict[str, Iterator[Call]]) -> None:
        self._pool, self._sources = pool, sources
        self.again: dict[str, deque[Call]] = {kind: deque() for kind in sources}
        self.flying: dict[Any, _Attempt] = {}
        self.done: set[Hashable] = set()
        self.failures = 0
        self._idle_since = time.monotonic()

    def fill(self) -> bool:
        """Send calls until each started actor has `AHEAD`, least loaded first; return False if all is done."""
        actors = self._pool._actors
        busy = {number: 0 for number, actor in enumerate(actors) if actor.starting is None}
        load = dict.fromkeys(busy, 0.0)
        for attempt in self._current():
            busy[attempt.number] = AHEAD if attempt.is_doubled else busy[attempt.number] + 1
            load[attempt.number] += attempt.call.cost
        for depth in range(1, AHEAD + 1):
            for number in sorted(busy, key=load.__getitem__):
                call = self._next(actors[number].kind) if busy[number] < depth else None
                if call is not None:
                    self._send(call, number, is_idle=busy[number] == 0)
                    busy[number] += 1
                    load[number] += call.cost
        is_waiting = any(attempt.call.key not in self.done for attempt in self.flying.values())
        return is_waiting or any(self.again.values()) or bool(self._sources)

    def wait(self) -> _Attempt | None:
        """Wait up to `POLL_SECONDS` for a call to end or an actor to start; return the attempt that ended, if any."""
        import ray

        actors, limit = self._pool._actors, self._pool._start_seconds
        starting = {actor.starting: actor for actor in actors if actor.starting is not None}
        with recorder.span("wait"):
            ready, _ = ray.wait([*self.flying, *starting], num_returns=1, timeout=POLL_SECONDS, fetch_local=False)
        self._pool.check()  # without its daemon, Ray would end this process at the next access to an object
        now = time.monotonic()
        if ready or self.flying:
            self._idle_since = now
        elif now - self._idle_since > limit:
            raise RoundAborted(
                f"{len(starting)} of {len(actors)} Ray actors did not start in {limit:g} seconds: give the cluster"
                " that many free CPUs, or set engine.workers lower"
            )
        if not ready:
            self._repeat(now)
            return None
        if ready[0] in starting:
            self._note_started(starting[ready[0]])
            return None
        attempt = self.flying.pop(ready[0])
        if actors[attempt.number].generation == attempt.generation:
            method, longest = attempt.call.method, self._pool._longest
            longest[method] = max(now - actors[attempt.number].heard, longest.get(method, 0.0))
            actors[attempt.number].heard = now
        return attempt

    def _current(self) -> list[_Attempt]:
        """Return the attempts whose actors have not been replaced."""
        actors = self._pool._actors
        return [one for one in self.flying.values() if actors[one.number].generation == one.generation]

    def _note_started(self, actor: _Actor) -> None:
        """Note that an actor has started, or replace it if it died before."""
        import ray

        try:
            ray.get(actor.starting)
        except _lost() as error:
            if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
                raise EngineError(f"a Ray actor cannot start: {str(error).splitlines()[-1]}") from None
            number = self._pool._actors.index(actor)
            self._pool._lost_one(_Attempt(READY, [], number, actor.generation), type(error).__name__, self)
        except ray.exceptions.RayTaskError as error:
            raise _own_error(error) from None
        else:
            actor.starting = None

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
        actor = self._pool._actors[number]
        if is_idle:
            actor.heard = time.monotonic()
        method = getattr(actor.handle, call.method).options(num_returns=call.num_returns)
        actor.num_calls += 1
        name = actor.handle._actor_id.hex() if recorder.is_on() else ""
        with recorder.span("send", message=call_id(name, actor.num_calls)):
            found = method.remote(*call.arguments)
        refs = [found] if call.num_returns == 1 else list(found)
        answer = answer_id(name, actor.num_calls)
        self.flying[refs[0]] = _Attempt(call, refs, number, actor.generation, answer=answer)

    def _repeat(self, now: float) -> None:
        """Repeat the calls of silent actors on others, and replace actors that hang."""
        actors = self._pool._actors
        for attempt in self._current():
            silent, limit = now - actors[attempt.number].heard, self._pool.limit_seconds(attempt.call.method)
            if silent > limit and not attempt.is_doubled and attempt.call.key not in self.done:
                attempt.is_doubled = True
                self.again[actors[attempt.number].kind].append(attempt.call.repeated())
                self._pool.on_event("retry", reason="straggler", call=str(attempt.call.key))
            if silent > HUNG * limit * 2**attempt.generation:  # the limit may be too short for an honest call
                self._pool._give_up(attempt, "hung", self)


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
