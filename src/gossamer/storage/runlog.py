"""The run directory: the resolved configuration, the environment and two append-only logs.

config.yaml        the resolved configuration; a directory that holds it is a run directory
environment.json   interpreter, machine, versions and start time
metrics.jsonl      one JSON object for each round, see `gossamer.storage.jsonl`
events.jsonl       drops, retries, warnings: one JSON object each
model.json         what the model needs to be built without the data, see `gossamer.storage.model_file`
trace/  checkpoints/  plots/
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import yaml

from gossamer.errors import CheckpointError, ConfigError, DataError, storage_errors
from gossamer.round_record import as_json, from_json
from gossamer.storage.disk import DirectoryLock, sync, write_atomically
from gossamer.storage.jsonl import LogFile, Position, read
from gossamer.storage.strict_yaml import dump_yaml, read_yaml

CONFIG = "config.yaml"
EXPERIMENT = "experiment.yaml"  # beside the directories of several runs: the configuration that they were expanded from
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LOGS = (METRICS, EVENTS)
CHECKPOINTS = "checkpoints"
TRACE = "trace"
FOLDERS = (TRACE, CHECKPOINTS, "plots")
MAX_DEPTH = 3  # levels below a directory at which runs are looked for


class Sink(Protocol):
    """A tracker that receives every metrics record after it is logged."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Receive one round's record, as in metrics.jsonl."""

    def close(self) -> None:
        """Flush and close the tracker."""


class LogStore(Protocol):
    """What a `LogFile` is to those who write it, wherever that happens."""

    @property
    def position(self) -> Position:
        """Where the next line goes."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record of finite plain values."""

    def check(self, position: Position | None = None) -> int:
        """Check the lines before `position`, or all of them, and return their number."""

    def truncate(self, position: Position) -> None:
        """Remove what follows `position`, and sync."""

    def sync(self) -> None:
        """Sync the log to the disk."""

    def close(self) -> None:
        """Close the log."""


class RunLog:
    """Writes one run directory; use `create` or `open`, one writer at a time.

    A sink that raises is dropped and named in events.jsonl: a failing tracker must not end a run.

    Attributes:
        sinks: trackers that also receive each metrics record.
        files: the logs by their names; another process may write them, see `gossamer.profiling.storing`.
    """

    def __init__(self, directory: Path) -> None:
        """Lock `directory`; `create` and `open` open the logs.

        Raises:
            ConfigError: another process has it locked.
        """
        self.directory = directory
        self.sinks: list[Sink] = []
        self._lock = DirectoryLock(directory)
        self.files: dict[str, LogStore] = {}

    @classmethod
    def create(cls, directory: Path, config: Mapping[str, Any], environment: Mapping[str, Any] | None = None) -> Self:
        """Start a run in `directory`, created if needed.

        Args:
            config: resolved configuration, of plain YAML values; the order of keys is kept.
            environment: further entries of environment.json, besides those of `describe_environment`.

        Raises:
            ConfigError: the directory already holds a run, or `config` holds a value that YAML cannot express.
            StorageError: the disk refuses a write.
        """
        try:
            text = dump_yaml(dict(config))
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the configuration cannot be written as YAML ({reason}): use plain values only"
            ) from error
        log = cls(Path(directory))
        try:
            require_vacant(log.directory)
            with storage_errors(log.directory):
                for folder in FOLDERS:
                    (log.directory / folder).mkdir(exist_ok=True)
            facts = describe_environment() | dict(environment or {})
            write_atomically(log.directory / ENVIRONMENT, json.dumps(_plain(facts), indent=2, allow_nan=False) + "\n")
            write_atomically(log.directory / CONFIG, text)
            log._open_logs()
        except BaseException:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Continue the run in `directory`; what is written next replaces incomplete last lines of its logs.

        Raises:
            ConfigError: `directory` is not a run directory, or another process works on it.
            StorageError: the disk refuses a write.
        """
        log = cls(_require_run(directory))
        try:
            log._open_logs()
        except BaseException:
            log.close()
            raise
        return log

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace config.yaml, at once.

        Raises:
            StorageError: the disk refuses a write.
        """
        write_atomically(self.directory / CONFIG, dump_yaml(dict(config)))

    def _open_logs(self) -> None:
        for name in LOGS:
            self.files[name] = LogFile(self.directory / name)
        with storage_errors(self.directory):
            sync(self.directory)

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one round's metrics; arrays and tensors become lists, non-finite numbers what `as_json` says.

        Raises:
            StorageError: the disk refuses the line; the log is unchanged.
        """
        plain = _plain(record)
        self.files[METRICS].append(plain)
        self._tell_sinks(lambda sink: sink.log(plain))

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append one event: its kind, the time (ISO 8601, UTC) and `fields`.

        Raises:
            StorageError: the disk refuses the line; the log is unchanged.
        """
        self.files[EVENTS].append(_plain({"kind": kind, "time": _now(), **fields}))

    def sync(self) -> None:
        """Sync both logs to the disk.

        Raises:
            StorageError: the disk refuses a write.
        """
        for log in self.files.values():
            log.sync()

    def positions(self) -> dict[str, Position]:
        """Return where each log ends; call `sync` before a commit relies on it."""
        return {name: log.position for name, log in self.files.items()}

    def check(self, positions: Mapping[str, Position] | None) -> None:
        """Check that the logs hold what they held at a commit, before anything is trained.

        Args:
            positions: result of `positions` at that commit; None: there is no commit, so no round may be logged.

        Raises:
            CheckpointError: a log was cut, replaced or changed, or rounds are logged of which there is no commit.
        """
        try:
            if positions is None:
                self._require_no_rounds(self.files[METRICS].check())
            else:
                for name, log in self.files.items():
                    log.check(positions[name])
        except DataError as error:
            raise CheckpointError(str(error)) from error

    def _require_no_rounds(self, num_rounds: int) -> None:
        if num_rounds:
            raise CheckpointError(
                f"{str(self.directory / METRICS)!r} holds {num_rounds} rounds, but"
                f" {str(self.directory / CHECKPOINTS)!r} no commit to continue from: restore it from a backup"
            )

    def truncate(self, positions: Mapping[str, Position]) -> None:
        """Truncate both logs to their positions at a commit, and sync them.

        Raises:
            StorageError: the disk refuses a write.
        """
        for name, log in self.files.items():
            log.truncate(positions[name])

    def erase(self) -> None:
        """Empty both logs.

        Raises:
            StorageError: the disk refuses a write.
        """
        self.truncate(dict.fromkeys(LOGS, Position()))

    def close(self, discard: bool = False) -> None:
        """Close the logs and the sinks; a second call does nothing.

        Args:
            discard: whether to remove what was written into the directory since it was created or opened.
        """
        self._tell_sinks(lambda sink: sink.close())
        self.sinks = []
        while self.files:
            self.files.popitem()[1].close()
        self._lock.close(discard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tell_sinks(self, tell: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                tell(sink)
            except Exception as error:  # a tracker may fail in any way; the run goes on without it
                self.sinks.remove(sink)
                self.log_event("sink-dropped", sink=type(sink).__name__, error=f"{type(error).__name__}: {error}")


def require_vacant(directory: Path) -> None:
    """Refuse a directory that holds a run, or several.

    Raises:
        ConfigError: it does.
    """
    with storage_errors(directory):
        files = [directory / name for name in (CONFIG, EXPERIMENT, *LOGS)]
        if any(path.exists() and path.stat().st_size for path in files):
            raise ConfigError(f"{str(directory)!r} already holds a run: resume it, or choose another --out")


def run_directories(directory: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield the run directories in or below `directory`, at most `depth` levels down, in the order of their names."""
    if (directory / CONFIG).is_file() and (directory / METRICS).is_file():
        yield directory
    elif depth > 0:
        for child in sorted(directory.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from run_directories(child, depth - 1)


def new_directory(root: Path, name: str) -> Path:
    """Create and return a new directory ``root/name-YYYYmmdd-HHMMSS[-k]`` (local time).

    Two processes that call it at the same time get different ones.

    Raises:
        ConfigError: `name` is empty or holds a path separator.
        StorageError: the directory cannot be created.
    """
    if not name or os.sep in name:
        raise ConfigError(f"{name!r} cannot name a run directory: use a name without {os.sep!r}")
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    root = Path(root)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for attempt in count():
            directory = root / (f"{stem}-{attempt}" if attempt else stem)
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory
    raise AssertionError("unreachable")


def describe_environment() -> dict[str, Any]:
    """Return what a run records about interpreter, machine and installed versions."""
    packages = ("gossamer", "torch", "numpy")
    return {
        "started": _now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "versions": {package: _version(package) for package in packages},
    }


def read_config(directory: Path) -> dict[str, Any]:
    """Return the resolved configuration of the run in `directory`.

    Raises:
        ConfigError: `directory` is not a run directory, or its config.yaml is not a mapping in valid YAML.
    """
    path = _require_run(directory) / CONFIG
    config = read_yaml(path, "configuration")
    if not isinstance(config, dict):
        raise ConfigError(f"{str(path)!r} holds {config!r}, not a mapping: restore it")
    return config


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, one for each round, without an incomplete last line.

    Infinite numbers, which the file holds as strings, are numbers again.

    Raises:
        ConfigError: `directory` is not a run directory.
        DataError: a line is malformed or was changed.
    """
    return [from_json(record) for record in read(_require_run(directory) / METRICS)]


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Return the records of events.jsonl, without an incomplete last line.

    Raises:
        ConfigError: `directory` is not a run directory.
        DataError: a line is malformed or was changed.
    """
    return read(_require_run(directory) / EVENTS)


def _plain(value: Any) -> Any:
    """Convert `value` to what JSON can express."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return as_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _require_run(directory: Path) -> Path:
    directory = Path(directory)
    if not os.path.isfile(directory / CONFIG):  # not `Path.is_file`, which raises where a name is too long
        raise ConfigError(
            f"{str(directory)!r} is not a run directory (it has no {CONFIG}): give one that 'gossamer run' created"
        )
    return directory


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
