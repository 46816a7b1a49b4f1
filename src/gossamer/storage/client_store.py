"""Private state of clients on disk, within a stated bound.

A row is float32, or float64, of one width per namespace and belongs to one client. Rows are appended to
``<directory>/<namespace>.<generation>.rows``, raw and little-endian, and never changed in place: a commit stays
readable while later rounds write. The position and the CRC-32 of each live row are kept in memory, 24 bytes for each
client that ever stored a row, and `index` returns them for the commit. Reading reads single rows, never the file.

When dead rows outnumber live ones at a commit, the live ones are copied to a new generation. The old generation is
deleted once none of the last `keep` commits refers to it, so that each of those can be resumed from.

The order of a commit, with the same `keep` on both sides:

    index = store.index()                                  # compacts and fsyncs first
    checkpoints.commit(round, arrays | index, ...)
    store.release()                                        # deletes old generations

Disk bound. With live = clients that hold a row in the namespace, row_bytes = 4 * width (8 * width in float64), and
written = rows put since the oldest commit that is kept (since the start, if fewer than `keep` exist), a namespace never
takes more than

    row_bytes * (2 * (keep + 1) * live + written)          at any instant, compaction included
    row_bytes * (2 * keep * live + written)                after each `release`

because a generation holds at most 2 * live rows at a commit, rows put after that count in `written`, and there are at
most `keep` committed generations, one left by a failed commit and one being written.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.errors import CheckpointError, ConfigError, storage_errors
from gossamer.storage.disk import sync, write_at

CLIENTS = "clients"  # folder of a run that its store is in
_PREFIX = "clientstore"
_FLOATS: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]+")
_FILE = re.compile(rf"({_NAMESPACE.pattern})\.(\d+)\.rows")


@dataclass
class _Table:
    """One namespace: its current file, and the position of each client's row in it.

    Attributes:
        num_rows: rows in the current generation's file, including dead ones.
        clients: i64[m], ascending; slots: i64[m], position in the file; checksums: i64[m], CRC-32 of the row's bytes.
        committed: generations of the last `keep` commits, newest last.
        issued: generation in the `index` of a commit that may or may not have succeeded since then.
    """

    width: int
    itemsize: int
    generation: int = 0
    num_rows: int = 0
    descriptor: int | None = None
    clients: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    slots: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    checksums: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    committed: list[int] = field(default_factory=list)
    issued: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.itemsize * self.width

    def find(self, clients: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the position of each client in the index, or where it would go, and whether it is there."""
        positions = np.searchsorted(self.clients, clients)
        present = np.zeros(len(clients), bool)
        inside = positions < len(self.clients)
        present[inside] = self.clients[positions[inside]] == clients[inside]
        return positions, present

    def point(self, clients: NDArray[np.int64], slots: NDArray[np.int64], checksums: NDArray[np.int64]) -> None:
        """Set the slots of distinct `clients`."""
        order = np.argsort(clients)
        clients, slots, checksums = clients[order], slots[order], checksums[order]
        positions, present = self.find(clients)
        self.slots[positions[present]] = slots[present]
        self.checksums[positions[present]] = checksums[present]
        gaps = positions[~present]
        self.clients = np.insert(self.clients, gaps, clients[~present])
        self.slots = np.insert(self.slots, gaps, slots[~present])
        self.checksums = np.insert(self.checksums, gaps, checksums[~present])


class ClientStore:
    """Rows by (client, namespace) in `directory`; one writer at a time."""

    def __init__(self, directory: Path, keep: int = 2, dtype: torch.dtype = torch.float32) -> None:
        """Open `directory`, create it if needed; if it already holds rows, call `restore` before `put`.

        Args:
            keep: number of commits that must stay readable, as given to `Checkpoints`.
            dtype: that of all rows, float32 or float64.

        Raises:
            ConfigError: `keep` is below 2.
            StorageError: the disk refuses a write.
        """
        if keep < 2:
            raise ConfigError(f"cannot keep {keep} commits of client state: keep at least 2, as many as checkpoints")
        self.directory = Path(directory)
        self.keep, self._dtype, self._float = keep, dtype, _FLOATS[dtype]
        self._tables: dict[str, _Table] = {}
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def namespaces(self) -> list[str]:
        """The namespaces that were declared, or found in a commit."""
        return list(self._tables)

    def declare(self, namespace: str, width: int) -> None:
        """Set the number of floats in a row of `namespace`; setting it again has no effect.

        Raises:
            ConfigError: the name or the width is invalid, or the namespace has another width.
        """
        if not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(f"{namespace!r} cannot name client state: use letters, digits, '-' and '_'")
        if width < 1:
            raise ConfigError(f"client state {namespace!r} has width {width}: the width must be at least 1")
        table = self._tables.setdefault(namespace, _Table(width, self._float.itemsize))
        if table.width != width:
            raise ConfigError(
                f"client state {namespace!r} has width {table.width}, not {width}: keep the run's model, or"
                " start a new run"
            )

    def get(self, namespace: str, clients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read rows from the disk.

        Args:
            clients: i64[s], with or without stored rows; they may repeat.

        Returns:
            (rows [s, width], zero where nothing is stored; present bool[s]).

        Raises:
            CheckpointError: a row cannot be read, or its checksum differs.
        """
        table = self._tables[namespace]
        names = clients.numpy()
        positions, present = table.find(names)
        rows = torch.zeros(len(names), table.width, dtype=self._dtype)
        view = rows.numpy()
        for i in np.flatnonzero(present):
            content = self._read_row(namespace, table, int(table.slots[positions[i]]))
            if zlib.crc32(content) != table.checksums[positions[i]]:
                raise CheckpointError(
                    f"the row of client {names[i]} in {str(self._path(namespace, table.generation))!r} is damaged (its"
                    " CRC-32 differs): resume from an earlier checkpoint, or start a new run"
                )
            view[i] = np.frombuffer(content, self._float)
        return rows, torch.from_numpy(present)

    def put(self, namespace: str, clients: torch.Tensor, rows: torch.Tensor) -> None:
        """Append the rows of distinct clients; `get` returns these from now on, while earlier commits keep their own.

        Args:
            clients: i64[s], >= 0.
            rows: [s, width] of the store's dtype.

        Raises:
            ValueError: shape or dtype is wrong, or a client is negative or repeated.
            CheckpointError: the directory holds rows that were not restored.
            StorageError: the disk refuses a write; the store is unchanged.
        """
        table = self._tables[namespace]
        names = clients.numpy()
        if names.dtype != np.int64 or (names < 0).any() or len(np.unique(names)) != len(names):
            raise ValueError(f"clients must be distinct int64 numbers >= 0, not {clients!r}")
        if rows.dtype != self._dtype or rows.shape != (len(names), table.width):
            raise ValueError(
                f"rows of {namespace!r} must be {str(self._dtype).removeprefix('torch.')} {(len(names), table.width)},"
                f" not {rows.dtype} {tuple(rows.shape)}"
            )
        if not len(names):
            return
        content = np.ascontiguousarray(rows.detach().cpu().numpy(), self._float)
        checksums = np.array([zlib.crc32(row.data) for row in content], np.int64)
        descriptor = self._open(namespace, table)
        with storage_errors(self._path(namespace, table.generation)):
            write_at(descriptor, content.data.cast("B"), table.num_rows * table.row_bytes)
        table.point(names, table.num_rows + np.arange(len(names)), checksums)
        table.num_rows += len(names)

    def sync(self) -> None:
        """Copy live rows to a new generation where dead ones outnumber them, then sync all files to the disk.

        Raises:
            CheckpointError: a live row cannot be read.
            StorageError: the disk refuses a write; the store is unchanged.
        """
        for namespace, table in self._tables.items():
            if table.num_rows > 2 * len(table.clients):
                self._compact(namespace, table)
            if table.descriptor is not None:
                with storage_errors(self._path(namespace, table.generation)):
                    os.fsync(table.descriptor)
        with storage_errors(self.directory):
            sync(self.directory)

    def index(self) -> dict[str, torch.Tensor]:
        """Call `sync`, and return what a commit must store for `restore`.

        Returns:
            int64 arrays named ``clientstore/<namespace>/<part>``, 24 bytes for each client with a row.

        Raises:
            CheckpointError, StorageError: as `sync`.
        """
        self.sync()
        arrays: dict[str, torch.Tensor] = {}
        for namespace, table in self._tables.items():
            table.issued = table.generation
            parts = {
                "clients": table.clients,
                "slots": table.slots,
                "checksums": table.checksums,
                "file": np.array([table.width, table.generation, table.num_rows], np.int64),
                "committed": np.array([*table.committed, table.issued][-self.keep :], np.int64),
            }
            arrays |= {f"{_PREFIX}/{namespace}/{part}": torch.from_numpy(array.copy()) for part, array in parts.items()}
        return arrays

    def release(self) -> None:
        """Note that the commit with the last `index` is durable, and delete the files that no kept commit needs.

        Raises:
            StorageError: the disk refuses a write.
        """
        for namespace, table in self._tables.items():
            if table.issued is not None:
                table.committed = [*table.committed, table.issued][-self.keep :]
                table.issued = None
            self._delete_unneeded(namespace, table)

    def restore(self, index: Mapping[str, torch.Tensor]) -> None:
        """Return to the rows of a commit, and delete everything newer.

        Args:
            index: result of `index` at that commit, other arrays ignored; an empty one removes all rows.

        Raises:
            CheckpointError: the index is malformed, or a file is missing or shorter than at the commit (nothing is
                deleted then).
            ConfigError: a namespace was declared with another width.
            StorageError: the disk refuses a write.
        """
        restored = _parse_index(index, self._float.itemsize)
        for namespace, table in restored.items():
            if namespace in self._tables:
                self.declare(namespace, table.width)
            path, needed = self._path(namespace, table.generation), table.num_rows * table.row_bytes
            size = path.stat().st_size if path.exists() else 0
            if size < needed:
                raise CheckpointError(
                    f"{str(path)!r} holds {size} bytes but the checkpoint needs {needed}: resume from an earlier"
                    " checkpoint, or start a new run"
                )
        self.close()
        self._tables = {name: _Table(table.width, table.itemsize) for name, table in self._tables.items()} | restored
        for path, namespace, _ in self._files():
            if namespace not in restored:
                with storage_errors(path):
                    path.unlink()
        for namespace, table in restored.items():
            self._delete_unneeded(namespace, table)
            path = self._path(namespace, table.generation)
            with storage_errors(path):
                if path.exists():
                    table.descriptor = os.open(path, os.O_RDWR)
                    os.ftruncate(table.descriptor, table.num_rows * table.row_bytes)

    def attach(self, index: Mapping[str, torch.Tensor]) -> None:
        """Let `get` read the rows of a commit, and change nothing on the disk; `put` is not for such a store.

        Raises:
            CheckpointError: the index is malformed, or a file cannot be read.
        """
        self._tables = _parse_index(index, self._float.itemsize)
        for namespace, table in self._tables.items():
            path = self._path(namespace, table.generation)
            try:
                table.descriptor = os.open(path, os.O_RDONLY) if len(table.clients) else None
            except OSError as error:
                raise CheckpointError(f"cannot read {str(path)!r} ({error.strerror}): restore it") from error

    def close(self) -> None:
        """Close the files; a later `put` or `get` needs `restore` first."""
        for table in self._tables.values():
            if table.descriptor is not None:
                os.close(table.descriptor)
                table.descriptor = None

    def _path(self, namespace: str, generation: int) -> Path:
        return self.directory / f"{namespace}.{generation}.rows"

    def _files(self) -> list[tuple[Path, str, int]]:
        """List (path, namespace, generation) of the files that a store has made, whatever else lies beside them."""
        found = [(path, _FILE.fullmatch(path.name)) for path in self.directory.iterdir() if path.is_file()]
        return [(path, match[1], int(match[2])) for path, match in found if match]

    def _open(self, namespace: str, table: _Table) -> int:
        if table.descriptor is None:
            path = self._path(namespace, table.generation)
            with storage_errors(path):
                try:
                    table.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                except FileExistsError as error:
                    raise CheckpointError(
                        f"{str(path)!r} holds rows of an earlier run: restore its index, or an empty one to remove them"
                    ) from error
        return table.descriptor

    def _read_row(self, namespace: str, table: _Table, slot: int) -> bytes:
        path = str(self._path(namespace, table.generation))
        if table.descriptor is None:
            raise CheckpointError(f"{path!r} is closed: restore the store before reading from it")
        try:
            content = os.pread(table.descriptor, table.row_bytes, slot * table.row_bytes)
        except OSError as error:
            raise CheckpointError(f"cannot read row {slot} of {path!r} ({error.strerror}): check the disk") from error
        if len(content) != table.row_bytes:
            raise CheckpointError(f"{path!r} ends before its row {slot}: resume from an earlier checkpoint")
        return content

    def _delete_unneeded(self, namespace: str, table: _Table) -> None:
        needed = {table.generation, table.issued, *table.committed}
        for path, name, generation in self._files():
            if name == namespace and generation not in needed:
                with storage_errors(path):
                    path.unlink()

    def _compact(self, namespace: str, table: _Table) -> None:
        """Copy the live rows, in the order of the file, to the next generation; their checksums stay as they are."""
        order = np.argsort(table.slots)
        fresh = _Table(table.width, table.itemsize, table.generation + 1)
        target = self._path(namespace, fresh.generation)
        descriptor = self._open(namespace, fresh)
        try:
            for position, slot in enumerate(table.slots[order].tolist()):
                content = self._read_row(namespace, table, slot)
                with storage_errors(target):
                    write_at(descriptor, memoryview(content), position * table.row_bytes)
        except BaseException:
            os.close(descriptor)
            target.unlink(missing_ok=True)
            raise
        if table.descriptor is not None:
            os.close(table.descriptor)
        table.generation, table.num_rows, table.descriptor = fresh.generation, len(order), descriptor
        table.slots[order] = np.arange(len(order))
        self._delete_unneeded(namespace, table)


def _parse_index(index: Mapping[str, torch.Tensor], itemsize: int) -> dict[str, _Table]:
    found: dict[str, dict[str, NDArray[np.int64]]] = {}
    for name, array in index.items():
        prefix, _, rest = name.partition("/")
        if prefix == _PREFIX:
            namespace, _, part = rest.partition("/")
            found.setdefault(namespace, {})[part] = array.numpy().copy()
    tables = {}
    for namespace, parts in found.items():
        try:
            width, generation, num_rows = parts["file"].tolist()
            tables[namespace] = _Table(
                width,
                itemsize,
                generation,
                num_rows,
                clients=parts["clients"],
                slots=parts["slots"],
                checksums=parts["checksums"],
                committed=parts["committed"].tolist(),
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"the index of client state {namespace!r} is malformed ({error}): resume from an earlier checkpoint"
            ) from error
    return tables
