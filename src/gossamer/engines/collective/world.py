"""The ranks of a torchrun job: rank 0 leads, the others serve it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from torch import Tensor

from gossamer.distributed.links import GroupBroken
from gossamer.engines.base import EngineSetup
from gossamer.engines.collective.environment import is_rank
from gossamer.engines.collective.group import TIMEOUT_SECONDS, Group, Message
from gossamer.errors import ConfigError, EngineError, GossamerError, storage_errors
from gossamer.profiling import recorder


class Letter(NamedTuple):
    """What ranks send each other: JSON values, and arrays."""

    message: Message
    arrays: Sequence[Tensor] = ()


class Handler(Protocol):
    """What a rank does for an engine, on every rank alike."""

    def handle(self, message: Message, arrays: list[Tensor]) -> Letter:
        """Do one job, and return the reply."""
        ...


class World:
    """The leader's side: it has every rank handle a message, itself among them.

    Attributes:
        group: the group of all ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._handler: Handler | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.group.size

    def compare(self, described: Mapping[str, Any]) -> None:
        """Compare what all ranks know of a run before it begins.

        Args:
            described: ``{part: value}``, JSON values, of this rank.

        Raises:
            ConfigError: another rank has another value of a part.
        """
        others = [message["described"] for message, _ in self._ask_others({"kind": "compare"})]
        for part, value in described.items():
            differing = {rank: theirs.get(part) for rank, theirs in enumerate(others, 1) if theirs.get(part) != value}
            if differing:
                told = ", ".join(f"rank {rank} has {part} {other!r}" for rank, other in differing.items())
                raise ConfigError(
                    f"{told}, but rank 0 has {value!r}: start all ranks with the same command, files and versions"
                )

    def require_shared(self, directory: Path) -> None:
        """Check that all ranks see a directory of rank 0.

        Raises:
            ConfigError: one does not.
            StorageError: rank 0 cannot write there.
        """
        token = Path(os.path.abspath(directory)) / f".seen-by-all-{uuid4()}"
        with storage_errors(token):
            token.touch()
        try:
            for rank, (message, _) in enumerate(self._ask_others({"kind": "see", "path": str(token)}), 1):
                if not message["seen"]:
                    raise ConfigError(
                        f"rank {rank} does not see {str(token.parent)!r}, where ranks write what they hold: give a"
                        " directory on a file system that all ranks share"
                    )
        finally:
            token.unlink(missing_ok=True)

    def begin(self, handler: Handler, setup: EngineSetup, **more: Any) -> None:
        """Let all ranks rebuild the task of an engine.

        Args:
            handler: the leader's own.
            setup: recipe of the task, and ``straggler_seconds`` after which a rank that does not answer is given up.
            more: what else the ranks' handlers need, JSON values.
        """
        limit = TIMEOUT_SECONDS if setup.straggler_seconds is None else setup.straggler_seconds
        self._handler = handler
        told = {"recipe": dict(setup.recipe), "timeout_seconds": limit, "trace": recorder.folder()}
        self._ask_others({"kind": "begin"} | told | more)
        self.group.limit(limit)

    def ask(self, letters: Sequence[Letter]) -> list[Letter]:
        """Have each rank handle its letter, and return the replies, by rank.

        Raises:
            GroupBroken: a rank is gone, or did not answer in time.
            EngineError: a rank failed.
        """
        assert self._handler is not None
        sent = self._post(letters)
        try:
            own = self._handler.handle(letters[0].message, list(letters[0].arrays))
        except GroupBroken:
            raise
        except GossamerError:
            with suppress(EngineError):
                self._collect(sent, None)
            raise
        return self._collect(sent, own)

    def ask_all(self, message: Message, arrays: Sequence[Tensor] = ()) -> list[Letter]:
        """Have all ranks handle the same letter, see `ask`."""
        return self.ask([Letter(message, arrays)] * self.size)

    def end(self) -> None:
        """Let all ranks forget the engine."""
        if self._handler is not None:
            self._handler = None
            self.group.limit(TIMEOUT_SECONDS)
            with suppress(GroupBroken):
                self._ask_others({"kind": "close"})

    def dismiss(self, exit_code: int) -> None:
        """Let the other ranks end."""
        with suppress(GroupBroken):
            for wait in self._post([Letter({"kind": "end", "exit_code": exit_code})] * self.size):
                wait()

    def _ask_others(self, message: Message) -> list[Letter]:
        return self._collect(self._post([Letter(message)] * self.size), None)

    def _post(self, letters: Sequence[Letter]) -> list[Callable[[], None]]:
        return [self.group.send(rank, *letters[rank]) for rank in range(1, self.size)]

    def _collect(self, sent: list[Callable[[], None]], own: Letter | None) -> list[Letter]:
        for wait in sent:
            wait()
        replies, errors = [] if own is None else [own], list[GossamerError]()
        for rank in range(1, self.size):
            message, arrays = self.group.receive(rank)
            if message.pop("stop"):
                signal.raise_signal(signal.SIGTERM)  # as if it had come to this rank
            if "error" in message:
                errors.append(_error_of(rank, message))
            replies.append(Letter(message, arrays))
        if errors:  # once all have replied: the next reply is to the next question
            raise errors[0]
        return replies


def _error_of(rank: int, message: Message) -> GossamerError:
    """Return the error of another rank."""
    error: GossamerError = EngineError(f"rank {rank}: {message['error']}")
    error.exit_code = message["exit_code"]
    return error


_worlds: list[World] = []  # of which this process leads one, or none


def current_world() -> World:
    """Return the ranks that this process leads.

    Raises:
        ConfigError: it was not started by torchrun.
    """
    if not _worlds:
        raise ConfigError(
            "engine collective runs on the processes that torchrun starts: torchrun --nproc-per-node N -m gossamer run"
            " FILE --engine collective --out DIR"
        )
    return _worlds[0]


def require_collective(engine: str) -> None:
    """Refuse another engine on the ranks of a torchrun job.

    Raises:
        ConfigError: it is another one.
    """
    if _worlds and engine != "collective":
        raise ConfigError(
            f"torchrun started {_worlds[0].size} processes, but engine {engine!r} needs one: add --engine collective"
        )


@contextmanager
def leading(described: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Lead the other ranks of this torchrun job, if it is one, while the block runs; then let them end.

    Args:
        described: returns what this rank knows of the run, see `World.compare`.
    """
    if not is_rank() or _worlds:
        yield
        return
    group = Group.of_environment()
    _worlds.append(World(group))
    exit_code = 1
    try:
        _worlds[0].compare(described())
        yield
        exit_code = 0
    except GossamerError as error:
        exit_code = error.exit_code
        raise
    finally:
        _worlds.pop().dismiss(exit_code)
        group.close()
