"""Records the calls of an actor, where a run is profiled; the driver's side is in `ActorPool`.

The calls of an actor are numbered in the order in which the driver makes them, in which Ray serves them, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from gossamer.profiling import recorder

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
TRACE = "trace"  # entry of a recipe


def call_id(actor: str, number: int) -> str:
    """Return the message id of a call; that of its answer is the same with ">"."""
    return f"{actor[:16]}<{number}"


def answer_id(actor: str, number: int) -> str:
    """Return the message id of an answer."""
    return f"{actor[:16]}>{number}"


def recipe_entry() -> dict[str, str | None]:
    """Return what a recipe says of recording: where, or null."""
    return {TRACE: recorder.folder()}


class _Calls:
    """The calls of the actor that lives in this process."""

    def __init__(self) -> None:
        self.number, self.actor = 0, ""
        self._idle: AbstractContextManager[None] | None = None

    def begin(self) -> None:
        """End the wait for a call, and count it."""
        if not self.actor:
            import ray

            self.actor = ray.get_runtime_context().get_actor_id() or "actor"
        if self._idle is not None:
            self._idle.__exit__(None, None, None)
        self.number += 1
        recorder.mark("receive", message=call_id(self.actor, self.number))

    def end(self) -> None:
        """Note the answer, write what was recorded, and begin to wait."""
        with recorder.span("send", message=answer_id(self.actor, self.number)):
            recorder.flush()
        self._idle = recorder.span("wait")
        self._idle.__enter__()


_CALLS = _Calls()


def start(recipe: dict[str, Any]) -> None:
    """Record this process from now on, if a recipe says so."""
    recorder.start_there(recipe.get(TRACE), "actor")


def recorded(kind: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator of an actor's method that records each call as a span of a kind."""

    def decorate(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        """Return the method that records."""

        @wraps(method)
        def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
            """Do what the method does."""
            if not recorder.is_on():
                return method(*arguments, **named)
            _CALLS.begin()
            try:
                with recorder.span(kind):
                    return method(*arguments, **named)
            finally:
                _CALLS.end()

        return call

    return decorate
