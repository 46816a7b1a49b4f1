"""Atomic commits of a run's state.

A commit is a directory of some files, written under another name, synced to the disk and then renamed:

    %08d/                   the round, as a decimal number; %08d-%d: and phases of the next one that are done, if any
        arrays.safetensors  every array, but for those of which several processes have rows:
        rows-%05d.safetensors  the rows of each, in the order of the numbers
        progress.json       everything else that a resume needs
        manifest.json       written last: format, round, phase, SHA-256 and size of each file, positions in the logs,
                            and the inputs of the run

So a directory of that name is a complete commit, and anything else is a leftover. What is committed again, because its
first commit was damaged, goes to ``%08d.1``, ``%08d.2``, ..., and then the earlier one is deleted.

Assumptions: the file system renames atomically and keeps what it has fsynced; there is one writer at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gossamer.errors import CheckpointError, ConfigError, storage_errors
from gossamer.storage.disk import remove, sync
from gossamer.storage.jsonl import Position
from gossamer.storage.stored_arrays import StoredArrays

FORMAT = 3
READABLE = (2, 3)  # in format 2 all arrays are in one file
SUFFIX = ".safetensors"
ARRAYS, ROWS = f"arrays{SUFFIX}", f"rows-{{:05d}}{SUFFIX}"  # the latter of a number
STATE, STORE = "state.", "store."  # what the names of arrays begin with: of the engine's state, of the client store
PROGRESS = "progress.json"
MANIFEST = "manifest.json"

_COMMIT_NAME = re.compile(r"(\d{8,})(?:-(\d+))?(?:\.(\d+))?")
_LEFTOVERS = (".writing-*", ".deleting-*")
Files = dict[str, dict[str, Any]]  # {name: size and SHA-256}, see `describe_file`


@dataclass(frozen=True)
class Checkpoint:
    """One verified commit.

    Attributes:
        round: number of rounds done at the commit.
        arrays: tensors by name, on the CPU, each starting on a 64-byte boundary; where a `StoredArrays` holds them,
            they are read when they are needed.
        progress: JSON object that was committed with them.
        logs: where each log ended at the commit.
        path: its directory.
        inputs: what the run's results depend on, see `Checkpoints`.
        phase: number of phases of the next round that were done.
        damaged: one message for each newer commit that is damaged.
    """

    round: int
    arrays: Mapping[str, torch.Tensor]
    progress: dict[str, Any]
    logs: dict[str, Position]
    path: Path
    inputs: dict[str, Any] = field(default_factory=dict)
    phase: int = 0
    damaged: list[str] = field(default_factory=list)

    def below(self, prefix: str) -> Mapping[str, torch.Tensor]:
        """Return the arrays whose names begin with `prefix`, without it."""
        if isinstance(self.arrays, StoredArrays):
            return self.arrays.below(prefix)
        return {name.removeprefix(prefix): v for name, v in self.arrays.items() if name.startswith(prefix)}


class Checkpoints:
    """The commits of one run, of which the newest `keep` are kept.

    Attributes:
        describe: what describes a written file, see `describe_file`.
    """

    def __init__(self, directory: Path, keep: int = 2, inputs: Mapping[str, Any] | None = None) -> None:
        """Open `directory`, create it if needed, and remove what a killed writer left unfinished there.

        Because it removes leftovers, only the process that owns the run may open it.

        Args:
            keep: number of commits that are kept.
            inputs: what the results depend on, as JSON values: the configuration, and digests of data and other files.
                It is written into every commit, so that a resume can tell what was changed.

        Raises:
            ConfigError: `keep` is below 2.
            StorageError: the disk refuses a write.
        """
        if keep < 2:
            raise ConfigError(
                f"cannot keep {keep} checkpoints: keep at least 2, so that a damaged one has a predecessor"
            )
        self.directory = Path(directory)
        self.keep = keep
        self.inputs = dict(inputs or {})
        self.describe: Callable[[Path], dict[str, Any]] = describe_file
        self._damaged: set[Path] = set()
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            for pattern in _LEFTOVERS:
                for leftover in self.directory.glob(pattern):
                    remove(leftover)

    def commit(
        self,
        round: int,
        arrays: Mapping[str, torch.Tensor],
        progress: Mapping[str, Any],
        logs: Mapping[str, Position],
        on_step: Callable[[str], None] | None = None,
        *,
        phase: int = 0,
        save_rows: Callable[[Path], Files] | None = None,
    ) -> Path:
        """Make a state durable, then delete all commits but the newest `keep`.

        Later commits, left by an abandoned continuation, are deleted too.

        Args:
            round: number of rounds done, >= 0.
            arrays: tensors of any shape and any dtype that safetensors supports.
            progress: JSON values; integer keys come back as text.
            logs: where each log ends, already synced.
            on_step: callback, called with "arrays", "progress", "manifest", "renamed" and "pruned" as each is done.
            phase: number of phases of the next round that are done.
            save_rows: callback by which other processes write what they have into a directory, and sync it; returns
                `describe_file` of each file.

        Returns:
            The directory of the commit.

        Raises:
            CheckpointError: `progress` cannot be expressed in JSON.
            ValueError: `round` is negative.
            StorageError: the disk refuses a write; what was written is removed, and earlier commits are unchanged.
        """
        if round < 0:
            raise ValueError(f"cannot commit round {round}: rounds count from 0")
        done, address = on_step or _ignore, (round, phase)
        aside = self.directory / f".writing-{round}"
        try:
            with storage_errors(aside):
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                files = save_rows(aside) if save_rows else {}
                self._write(aside, address, arrays, progress, logs, done, files)
                target = self._free_name(address)
                os.rename(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        with storage_errors(target):
            sync(self.directory)
            done("renamed")
            self._prune(address)
            done("pruned")
        return target

    @property
    def is_empty(self) -> bool:
        """Whether there is no commit, damaged or not."""
        return not commits_in(self.directory)

    def clear(self) -> None:
        """Delete all commits.

        Raises:
            StorageError: the disk refuses.
        """
        with storage_errors(self.directory):
            for _, _, path in commits_in(self.directory):
                _remove(path)

    def latest(self) -> Checkpoint | None:
        """Return the newest intact commit, or None if there is no commit at all; its arrays are read when needed.

        Raises:
            CheckpointError: every commit is damaged.
        """
        return read_latest(self.directory, self._damaged.add, whole=False)

    def _write(
        self,
        aside: Path,
        address: tuple[int, int],
        arrays: Mapping[str, torch.Tensor],
        progress: Mapping[str, Any],
        logs: Mapping[str, Position],
        done: Callable[[str], None],
        files: Files,
    ) -> None:
        save_arrays(aside / ARRAYS, arrays)
        done("arrays")
        try:
            text = json.dumps(dict(progress), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the progress of round {address[0]} is not valid JSON ({error}): use finite plain values only"
            ) from error
        _write_text(aside / PROGRESS, text)
        done("progress")
        manifest = {
            "format": FORMAT,
            "round": address[0],
            "phase": address[1],
            "files": {name: self.describe(aside / name) for name in (ARRAYS, PROGRESS)} | files,
            "logs": {name: asdict(position) for name, position in logs.items()},
            "inputs": self.inputs,
        }
        _write_text(aside / MANIFEST, json.dumps(manifest | {"sha256": digest_of_json(manifest)}, indent=2))
        sync(aside)
        done("manifest")

    def _free_name(self, address: tuple[int, int]) -> Path:
        attempts = [attempt for existing, attempt, _ in commits_in(self.directory) if existing == address]
        round, phase = address
        name = f"{round:08d}-{phase}" if phase else f"{round:08d}"
        return self.directory / (f"{name}.{max(attempts) + 1}" if attempts else name)

    def _prune(self, address: tuple[int, int]) -> None:
        kept: set[tuple[int, int]] = set()
        for existing, _, path in commits_in(self.directory):
            superseded = existing > address or existing in kept or path in self._damaged
            if superseded or len(kept) == self.keep:
                _remove(path)
                self._damaged.discard(path)  # whose name a sound commit may get
            else:
                kept.add(existing)


def commits_in(directory: Path) -> list[tuple[tuple[int, int], int, Path]]:
    """List ((round, phase), attempt, path) of every commit in a directory, the newest first."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _COMMIT_NAME.fullmatch(path.name)
        if match:
            found.append(((int(match[1]), int(match[2] or 0)), int(match[3] or 0), path))
    return sorted(found, reverse=True)


def read_latest(
    directory: Path, on_damaged: Callable[[Path], None] = lambda path: None, *, whole: bool = True
) -> Checkpoint | None:
    """Return the newest intact commit in a directory, or None if there is no commit at all; nothing is changed.

    Args:
        directory: that of `Checkpoints`.
        on_damaged: callback for each commit that is damaged.
        whole: whether to read all arrays now, since whoever owns the run may delete the commit.

    Raises:
        CheckpointError: every commit is damaged.
    """
    damaged = []
    for _, _, path in commits_in(directory):
        try:
            found = _read(path)
            found = replace(found, arrays=dict(found.arrays)) if whole else found
        except CheckpointError as error:
            on_damaged(path)
            damaged.append(f"checkpoint {str(path)!r} is damaged: {error}")
        else:
            return replace(found, damaged=damaged)
    if damaged:
        raise CheckpointError(f"no checkpoint in {str(directory)!r} can be used ({'; '.join(damaged)}): restore one")
    return None


def peek(directory: Path) -> tuple[int, dict[str, Any]]:
    """Return the rounds that are done at the newest commit, and its progress, without reading its arrays.

    Args:
        directory: that of `Checkpoints`; where it has no commit, no round is done.

    Raises:
        CheckpointError: it is damaged, as far as manifest and sizes tell.
    """
    for _, _, path in commits_in(directory):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            is_whole = manifest.pop("sha256") == digest_of_json(manifest)
            sizes = {name: (path / name).stat().st_size for name in manifest["files"]}
            progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
            if is_whole and all(size == manifest["files"][name]["bytes"] for name, size in sizes.items()):
                return int(manifest["round"]), dict(progress)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        raise CheckpointError(f"checkpoint {str(path)!r} is damaged")
    return 0, {}


def _remove(path: Path) -> None:
    """Delete a commit; renamed first, so that an interrupted deletion leaves no part of it under a commit's name."""
    doomed = path.with_name(f".deleting-{path.name}")
    os.rename(path, doomed)
    remove(doomed)


def _read(path: Path) -> Checkpoint:
    """Verify the commit at `path` and load it.

    Raises:
        CheckpointError: a file is missing, altered or of another format; the message is the reason alone.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest.pop("sha256")
        if expected != digest_of_json(manifest):
            raise CheckpointError(f"{MANIFEST} was altered")
        if manifest["format"] not in READABLE:
            readable = " and ".join(map(str, READABLE))
            raise CheckpointError(f"its format is {manifest['format']!r}, but this version reads {readable}")
        for name, description in manifest["files"].items():
            found = describe_file(path / name)
            if found != description:
                raise CheckpointError(
                    f"{name} was altered ({found['bytes']} bytes with SHA-256 {found['sha256'][:12]}, but"
                    f" {description['bytes']} bytes with {description['sha256'][:12]} were committed)"
                )
        arrays = StoredArrays([path / name for name in sorted(manifest["files"]) if name.endswith(SUFFIX)])
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        logs = {name: Position(**position) for name, position in manifest["logs"].items()}
    except OSError as error:
        raise CheckpointError(
            f"{Path(error.filename or path).name} cannot be read ({error.strerror or error})"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} or what it lists is malformed ({error})") from error
    return Checkpoint(manifest["round"], arrays, progress, logs, path, manifest["inputs"], manifest["phase"])


def save_arrays(path: Path, arrays: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as safetensors, and sync them.

    Args:
        metadata: texts for the file's header.

    Raises:
        OSError: the disk refuses.
    """
    packed: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, array in arrays.items():
        tensor = array.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, as views of one flat row may.
        packed[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        save_file(packed, path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        # It reports a full disk as its own kind of error, with the number inside the text.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    sync(path)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def digest_of_json(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _ignore(step: str) -> None:
    pass
