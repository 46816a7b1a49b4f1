"""The errors that a user can cause or must act on.

Each message is one sentence: what is wrong, which value, what to do. The command line prints the message alone, without
a traceback, and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import errno
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class GossamerWarning(UserWarning):
    """What is allowed, but hardly meant: one sentence, which the command line prints to standard error."""


def warn(messages: Iterable[str], run: str = "") -> None:
    """Issue a `GossamerWarning` for each message.

    Args:
        run: name of the run that they are about, where there are several.
    """
    for message in messages:
        warnings.warn(f"{run}: {message}" if run else message, GossamerWarning, stacklevel=2)


class GossamerError(Exception):
    """Base class of every error that gossamer raises deliberately."""

    exit_code = 2


class ConfigError(GossamerError):
    """A configuration is unknown, malformed or contradicts itself."""


class RegistryError(ConfigError):
    """A name of a plug-in cannot be resolved."""


class ContractError(GossamerError, AssertionError):
    """A plug-in does not keep to the contract that `gossamer.testing` checks."""


class DataError(GossamerError):
    """A dataset is missing or malformed, or cannot be split as asked."""


class CheckpointError(GossamerError):
    """A checkpoint cannot be written or read."""


class StorageError(GossamerError):
    """The disk refuses a write: it is full or read-only, or permission is missing."""


class QuorumError(GossamerError):
    """Too few participants of a round delivered a usable update."""


class EngineError(GossamerError):
    """An engine cannot start, or has lost a worker that it cannot replace."""


class StateLost(EngineError):
    """The resident state is lost; the last commit has it.

    Attributes:
        told: more of it, by name, for the log.
    """

    def __init__(self, message: str, **told: int) -> None:
        """Say why."""
        super().__init__(message)
        self.told = told


class RoundAborted(EngineError):
    """A round cannot be finished; the state before it is committed."""


class TransportError(GossamerError):
    """What should be sent to another machine, or came from it, cannot be."""


class Disconnected(TransportError):
    """The connection to another node is lost, or there is none."""


class Refused(TransportError):
    """Another node refuses this one: it may not join, or not any more."""


class Dropped(TransportError):
    """A message is not taken.

    Attributes:
        reason: why, in few words.
    """

    def __init__(self, reason: str) -> None:
        """Keep the reason."""
        super().__init__(f"the message was dropped: {reason}")
        self.reason = reason


class AuthenticationError(GossamerError):
    """A node is not who it says, or its certificate, token or start-up kit is missing, expired or revoked."""


class PolicyError(GossamerError):
    """The policy of a client refuses what a server asks of it."""


class Interrupted(GossamerError):
    """The user or a scheduler asked the run to stop; finished rounds are committed."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a hint such as ``; did you mean 'rolling'?`` for a misspelt `name`, or an empty string.

    Args:
        cutoff: minimum similarity in [0, 1], as `difflib` measures it.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException, frame: traceback.FrameSummary | None = None) -> str:
    """Return an error's type, message, file and line, such as ``KeyError: 'x' (a.py, line 3)``.

    Args:
        frame: the frame whose file and line are named; None: the last one.
    """
    told = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    place = frame or (places[-1] if places else None)
    return f"{told} ({place.filename}, line {place.lineno})" if place else told


@contextmanager
def plugin_errors(plugin: str) -> Iterator[None]:
    """Convert any error but gossamer's own, raised within the block, to a `ConfigError` that names `plugin`.

    So are exits, and whatever else a plug-in derives from `BaseException`; an interrupt stays one.

    Raises:
        ConfigError: the plug-in raised another error.
    """
    try:
        yield
    except (GossamerError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # also exits, as argparse raises
        raise ConfigError(f"{plugin} fails with {one_line(error)}: correct it, or name another one") from error


def require_attributes(plugin: str, found: object, names: Iterable[str], remedy: str = "correct it") -> None:
    """Check that what a plug-in is, or makes, has the attributes `names`, and no abstract methods of these.

    Raises:
        ConfigError: it lacks some.
    """
    abstract: Iterable[str] = vars(found).get("__abstractmethods__", ()) if isinstance(found, type) else ()
    # What the class has is not evaluated: a property may be costly, or refuse.
    missing = [name for name in names if name in abstract or not (hasattr(type(found), name) or hasattr(found, name))]
    if missing:
        kind = found.__name__ if isinstance(found, type) else type(found).__name__
        raise ConfigError(f"{plugin} is a {kind} without {', '.join(missing)}: {remedy}, or name another one")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` raised within the block to a `StorageError` that names `path` and the remedy.

    Raises:
        StorageError: the disk is full or read-only, or permission is missing.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left on the device that holds {str(path)!r}: free some space or choose another --out;"
                " everything up to the last commit is intact"
            ) from error
        raise StorageError(
            f"cannot write {str(path)!r} ({error.strerror or error}): check the path and its permissions"
        ) from error
