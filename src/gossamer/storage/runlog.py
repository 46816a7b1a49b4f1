"""The run directory: the resolved configuration, the environment and two append-only logs.

    config.yaml        the resolved configuration; a directory that holds it is a run directory
    environment.json   interpreter, machine, versions and start time
    metrics.jsonl      one JSON object for each round
    events.jsonl       drops, retries, warnings: one JSON object each
    trace/  checkpoints/  plots/

A log line is one unbuffered `os.write` in append mode: whatever kills the process, at most the last line of a log is
incomplete. Readers ignore an incomplete last line; opening the run for writing removes it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import yaml

from gossamer.errors import CheckpointError, ConfigError, DataError, storage_errors
from gossamer.round_record import as_json, from_json
from gossamer.storage.disk import lock, sync

CONFIG = "config.yaml"
EXPERIMENT = "experiment.yaml"  # beside the directories of several runs: the configuration that they were expanded from
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LOCK = ".lock"
LOGS = (METRICS, EVENTS)
FOLDERS = ("trace", "checkpoints", "plots")


class Sink(Protocol):
    """A tracker that receives every metrics record after it is logged."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Receive one round's record, as in metrics.jsonl."""

    def close(self) -> None:
        """Flush and close the tracker."""


class RunLog:
    """Writes one run directory; use `create` or `open`, one writer at a time.

    A sink that raises is dropped and named in events.jsonl: a failing tracker must not end a run.
    """

    def __init__(self, directory: Path, sinks: Sequence[Sink] = ()) -> None:
        """Open the logs of `directory`, which `create` or `open` has prepared.

        Raises:
            ConfigError: another process has them open.
            StorageError: a log cannot be opened for writing.
        """
        self.directory = directory
        self._sinks = list(sinks)
        self._descriptors: dict[str, int] = {}
        with storage_errors(directory):
            try:
                self._lock = lock(directory / LOCK)
            except BlockingIOError:
                raise ConfigError(
                    f"another process works on the run in {str(directory)!r}: wait for it, or stop it, and try again"
                ) from None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        for name in LOGS:
            with storage_errors(directory / name):
                self._descriptors[name] = os.open(directory / name, flags, 0o666)
        with storage_errors(directory):
            sync(directory)

    @classmethod
    def create(
        cls,
        directory: Path,
        config: Mapping[str, Any],
        environment: Mapping[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> Self:
        """Start a run in `directory`, created if needed.

        Args:
            config: resolved configuration, of plain YAML values; the order of keys is kept.
            environment: further entries of environment.json, besides those of `describe_environment`.
            sinks: trackers that also receive each metrics record.

        Raises:
            ConfigError: the directory already holds a run, or `config` holds a value that YAML cannot express.
            StorageError: the disk refuses a write.
        """
        directory = Path(directory)
        if any((directory / name).exists() and (directory / name).stat().st_size for name in (CONFIG, *LOGS)):
            raise ConfigError(f"{str(directory)!r} already holds a run: resume it, or choose another --out")
        try:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the configuration cannot be written as YAML ({reason}): use plain values only"
            ) from error
        with storage_errors(directory):
            for folder in FOLDERS:
                (directory / folder).mkdir(parents=True, exist_ok=True)
        facts = describe_environment() | dict(environment or {})
        _write_atomically(directory / ENVIRONMENT, json.dumps(_plain(facts), indent=2, allow_nan=False) + "\n")
        _write_atomically(directory / CONFIG, text)
        return cls(directory, sinks)

    @classmethod
    def open(cls, directory: Path, sinks: Sequence[Sink] = ()) -> Self:
        """Continue the run in `directory`; incomplete last lines of its logs are removed.

        Raises:
            ConfigError: `directory` is not a run directory.
            StorageError: the disk refuses a write.
        """
        directory = _require_run(directory)
        log = cls(directory, sinks)
        repair(directory)
        return log

    def log_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one round's metrics; arrays and tensors become lists, non-finite numbers what `as_json` says.

        Raises:
            StorageError: the disk refuses the line; the log is unchanged.
        """
        plain = _plain(record)
        self._append(METRICS, plain)
        self._tell_sinks(lambda sink: sink.log(plain))

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append one event: its kind, the time (ISO 8601, UTC) and `fields`.

        Raises:
            StorageError: the disk refuses the line; the log is unchanged.
        """
        self._append(EVENTS, _plain({"kind": kind, "time": _now(), **fields}))

    def sync(self) -> None:
        """Sync both logs to the disk.

        Raises:
            StorageError: the disk refuses a write.
        """
        for name, descriptor in self._descriptors.items():
            with storage_errors(self.directory / name):
                os.fsync(descriptor)

    def offsets(self) -> dict[str, int]:
        """Return the length of each log in bytes; call `sync` before a commit relies on them."""
        return {name: os.fstat(descriptor).st_size for name, descriptor in self._descriptors.items()}

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Truncate both logs to their lengths at a commit, and sync them.

        Args:
            offsets: result of `offsets` at that commit, in bytes.

        Raises:
            CheckpointError: a log is shorter than its offset, or has none; nothing is truncated then.
            StorageError: the disk refuses a write.
        """
        sizes = self.offsets()
        for name in LOGS:
            path = str(self.directory / name)
            if name not in offsets:
                raise CheckpointError(f"the commit records no offset for {path!r}: resume from another commit")
            if sizes[name] < offsets[name]:
                raise CheckpointError(
                    f"{path!r} holds {sizes[name]} bytes but the commit was made at {offsets[name]}: the log was"
                    " truncated or replaced, so restore it from a backup or start a new run"
                )
        for name, descriptor in self._descriptors.items():
            with storage_errors(self.directory / name):
                os.ftruncate(descriptor, offsets[name])
                os.fsync(descriptor)

    def close(self) -> None:
        """Close the logs and the sinks; a second call does nothing."""
        self._tell_sinks(lambda sink: sink.close())
        self._sinks.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tell_sinks(self, tell: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                tell(sink)
            except Exception as error:  # a tracker may fail in any way; the run goes on without it
                self._sinks.remove(sink)
                self.log_event("sink-dropped", sink=type(sink).__name__, error=f"{type(error).__name__}: {error}")

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        descriptor = self._descriptors[name]
        with storage_errors(self.directory / name):
            length_before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                # A regular file accepts fewer bytes than given only where there is no space for the rest.
                os.ftruncate(descriptor, length_before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    try:
        with path.open(encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r} ({error.strerror}): check its permissions") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid YAML ({' '.join(str(error).split())}): restore it") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{str(path)!r} holds {config!r}, not a mapping: restore it")
    return config


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, one for each round, without an incomplete last line.

    Infinite numbers, which the file holds as strings, are numbers again.

    Raises:
        ConfigError: `directory` is not a run directory.
        DataError: a line before the last is malformed.
    """
    return [from_json(record) for record in _read(_require_run(directory) / METRICS)]


def read_events(directory: Path) -> list[dict[str, Any]]:
    """Return the records of events.jsonl, without an incomplete last line.

    Raises:
        ConfigError: `directory` is not a run directory.
        DataError: a line before the last is malformed.
    """
    return _read(_require_run(directory) / EVENTS)


def repair(directory: Path) -> None:
    """Remove an incomplete last line from each log of the run in `directory`.

    Raises:
        StorageError: the disk refuses a write.
    """
    for path in (directory / name for name in LOGS):
        if not path.exists():
            continue
        with storage_errors(path):
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            start = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
            if end == len(content) and _parse(content[start:]) is None:
                end = start
            if end < len(content):
                os.truncate(path, end)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"cannot read the log {str(path)!r} ({error.strerror}): move away what is there, or check its permissions"
        ) from None
    *lines, torn = content.split(b"\n")  # what follows the last newline is incomplete, even where it parses
    records = [_parse(line) for line in lines]
    if not torn and records and records[-1] is None:
        records.pop()
    for number, record in enumerate(records, start=1):
        if record is None:
            raise DataError(
                f"line {number} of {str(path)!r} is not a JSON object: restore the file, or delete the line"
            )
    return [record for record in records if record is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


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
    if not (directory / CONFIG).is_file():
        raise ConfigError(
            f"{str(directory)!r} is not a run directory (it has no {CONFIG}): give one that 'gossamer run' created"
        )
    return directory


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    with storage_errors(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)
