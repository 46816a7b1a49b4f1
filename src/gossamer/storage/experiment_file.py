"""The directory of several runs: a lock, and beside their directories what they were expanded from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from gossamer.errors import ConfigError
from gossamer.storage.disk import DirectoryLock, write_atomically
from gossamer.storage.runlog import CONFIG, EXPERIMENT
from gossamer.storage.strict_yaml import parse_yaml

_HEADER = "# The runs beside this file were expanded from it; digest of what follows: {}\n"


def hold_experiment(directory: Path, config: Mapping[str, Any] | None = None) -> DirectoryLock:
    """Lock the directory of several runs, and write the configuration that they are expanded from.

    Args:
        config: the configuration; None: it is there.

    Raises:
        ConfigError: the directory holds another experiment, or another process has it locked.
        StorageError: the disk refuses a write.
    """
    held, path = DirectoryLock(directory), directory / EXPERIMENT
    try:
        if config is not None:
            text = _with_digest(yaml.safe_dump(dict(config), sort_keys=False))
            before = _read(path) if path.exists() else None
            if (directory / CONFIG).exists() or before not in (None, text):
                raise ConfigError(
                    f"{str(directory)!r} holds another experiment: repeat its settings, or choose another --out"
                )
            if before is None:
                write_atomically(path, text)
    except BaseException:
        held.close()
        raise
    return held


def replace_experiment(directory: Path, config: Mapping[str, Any]) -> None:
    """Replace the configuration that the runs in `directory` are expanded from.

    Raises:
        ConfigError: another process has the directory locked.
        StorageError: the disk refuses a write.
    """
    with closing(DirectoryLock(directory)):
        write_atomically(directory / EXPERIMENT, _with_digest(yaml.safe_dump(dict(config), sort_keys=False)))


def read_experiment(directory: Path) -> dict[str, Any]:
    """Return the configuration that the runs in `directory` were expanded from.

    Raises:
        ConfigError: it cannot be read, or is not as it was written.
    """
    path = directory / EXPERIMENT
    text = _read(path).partition("\n")[2]
    if _read(path) != _with_digest(text):
        raise ConfigError(f"{str(path)!r} was changed since its runs began: restore it, or start another experiment")
    found: dict[str, Any] = parse_yaml(text, f"configuration {str(path)!r}")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r} ({error.strerror}): check its permissions") from error


def _with_digest(text: str) -> str:
    return _HEADER.format(hashlib.sha256(text.encode()).hexdigest()[:16]) + text
