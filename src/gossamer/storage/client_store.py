"""Private state of clients on disk, within a stated bound.

A row is float32, or float64, of one width per namespace and belongs to one client. Rows are appended to
``<directory>/<namespace>.<generation>.rows``, raw and little-endian, and never changed in place: a commit stays
readable while later rounds write. The position and the CRC-32 of each live row are kept in memory, 24 bytes for each
client that ever stored a row, and `index` returns them for the commit. Reading reads single rows, never the file.

When dead rows outnumber live ones at a commit, the live ones are copied to a new generation. The old generation is
deleted once none of the last `keep` commits refers to it, so that each of those can be resumed from.

Several processes can share a store on one disk: one of them has the store, the others append to files of their own,
``<directory>/<namespace>.<part>.<generation>.rows``, and tell it, see `gossamer.storage.row_files.SharedRows`. A row
of a client is live in one of these files, where it was written last. Any number of processes can go on with them.

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
most `keep` committed generations, one left by a failed commit and one being written. That holds for the files of each
part, and `live` is the sum of theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.errors import CheckpointError, ConfigError, storage_errors
from gossamer.storage.disk import sync, write_at
from gossamer.storage.row_files import FLOATS, Address, Work, packed, read_intact, settle
from gossamer.storage.row_tables import Table, parse_index

CLIENTS = "clients"  # folder of a run that its store is in
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]+")
_FILE = re.compile(rf"({_NAMESPACE.pattern}(?:\.\d+)?)\.(\d+)\.rows")


class ClientStore:
    """Rows by (client, namespace) in `directory`; one store of it at a time.

    Attributes:
        settle: what does the work before a commit; by default this process, with all files.
    """

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
        self.keep, self._dtype, self._float = keep, dtype, FLOATS[dtype]
        self._tables: dict[str, Table] = {}  # by namespace, and the number of a part behind a dot
        self.settle: Callable[[Sequence[Work]], None] = partial(settle, self.directory)
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    @property
    def namespaces(self) -> list[str]:
        """The namespaces that were declared, or found in a commit."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self._tables))

    def declare(self, namespace: str, width: int) -> None:
        """Set the number of floats in a row of `namespace`; setting it again has no effect.

        Raises:
            ConfigError: the name or the width is invalid, or the namespace has another width.
        """
        if not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(f"{namespace!r} cannot name client state: use letters, digits, '-' and '_'")
        if width < 1:
            raise ConfigError(f"client state {namespace!r} has width {width}: the width must be at least 1")
        table = self._tables.setdefault(namespace, Table(width, self._float.itemsize))
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
        names = clients.numpy()
        rows = torch.zeros(len(names), self._tables[namespace].width, dtype=self._dtype)
        view, found = rows.numpy(), np.zeros(len(names), bool)
        for name, table in self._tables_of(namespace):
            positions, present = table.find(names)
            found |= present
            path = self._path(name, table.generation)
            for i in np.flatnonzero(present):
                slot, checksum = (int(one[positions[i]]) for one in (table.slots, table.checksums))
                descriptor = self._readable(name, table)
                content = read_intact(descriptor, path, table.row_bytes, slot, checksum, int(names[i]))
                view[i] = np.frombuffer(content, self._float)
        return rows, torch.from_numpy(found)

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
        content, checksums = packed(rows)
        descriptor = self._writable(namespace, table)
        with storage_errors(self._path(namespace, table.generation)):
            write_at(descriptor, content, table.num_rows * table.row_bytes)
        self._append(namespace, names, checksums)

    # ---- several processes

    def addresses(self, namespace: str, clients: NDArray[np.int64]) -> list[Address | None]:
        """Return where the rows of clients are, int64 [s]; None of those that have none."""
        found: list[Address | None] = [None] * len(clients)
        for name, table in self._tables_of(namespace):
            positions, present = table.find(clients)
            file = self._path(name, table.generation).name
            for i in np.flatnonzero(present).tolist():
                at = positions[i]
                found[i] = Address(file, int(table.slots[at]), int(table.checksums[at]))
        return found

    def place(self, namespace: str, part: int) -> tuple[str, int]:
        """Return the file to which the process `part` appends, and the rows that it holds."""
        name = _name_of(namespace, part)
        width = self._tables[namespace].width
        table = self._tables.setdefault(name, Table(width, self._float.itemsize))
        return self._path(name, table.generation).name, table.num_rows

    def record(self, namespace: str, part: int, clients: NDArray[np.int64], checksums: NDArray[np.int64]) -> None:
        """Take over rows of distinct clients, which the process `part` has appended at its `place`."""
        name = _name_of(namespace, part)
        self._close(self._tables[name])  # to read, later, what has been written by then
        self._tables[name].is_made = True
        self._append(name, clients, checksums)

    # ---- commits

    def sync(self) -> None:
        """Copy live rows to a new generation where dead ones outnumber them, and sync all files to the disk.

        Raises:
            CheckpointError: a live row cannot be read.
            StorageError: the disk refuses a write; the store is unchanged.
        """
        work, copied = list[Work](), list[tuple[str, Table, NDArray[np.int64]]]()
        for name, table in self._tables.items():
            file = self._path(name, table.generation).name if table.is_made else None
            order, target = np.argsort(table.slots), None
            if table.num_rows > 2 * len(table.clients):
                target = self._path(name, table.generation + 1).name
                copied.append((name, table, order))
            part = int(name.partition(".")[2] or 0)
            work.append(Work(part, file, target, table.slots[order], table.row_bytes))
        self.settle(work)
        for name, table, order in copied:
            self._close(table)
            table.generation, table.num_rows = table.generation + 1, len(order)
            table.slots[order] = np.arange(len(order))
            self._delete_unneeded(name, table)
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
        for name, table in self._tables.items():
            table.issued = table.generation
            arrays |= table.arrays(name, self.keep)
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
        restored = parse_index(index, self._float.itemsize)
        for name, table in restored.items():
            if (namespace := name.partition(".")[0]) in self._tables:
                self.declare(namespace, table.width)
            path, needed = self._path(name, table.generation), table.num_rows * table.row_bytes
            size = path.stat().st_size if path.exists() else 0
            if size < needed:
                raise CheckpointError(
                    f"{str(path)!r} holds {size} bytes but the checkpoint needs {needed}: resume from an earlier"
                    " checkpoint, or start a new run"
                )
        self.close()
        self._tables = {name: Table(table.width, table.itemsize) for name, table in self._tables.items()} | restored
        for path, namespace, _ in self._files():
            if namespace not in restored:
                with storage_errors(path):
                    path.unlink()
        for namespace, table in restored.items():
            self._delete_unneeded(namespace, table)
            path = self._path(namespace, table.generation)
            with storage_errors(path):
                if path.exists():
                    table.descriptor, table.is_made = os.open(path, os.O_RDWR), True
                    os.ftruncate(table.descriptor, table.num_rows * table.row_bytes)

    def attach(self, index: Mapping[str, torch.Tensor]) -> None:
        """Let `get` read the rows of a commit, and change nothing on the disk; `put` is not for such a store.

        Raises:
            CheckpointError: the index is malformed, or a file cannot be read.
        """
        self._tables = parse_index(index, self._float.itemsize)
        for namespace, table in self._tables.items():
            path = self._path(namespace, table.generation)
            try:
                table.descriptor = os.open(path, os.O_RDONLY) if len(table.clients) else None
            except OSError as error:
                raise CheckpointError(f"cannot read {str(path)!r} ({error.strerror}): restore it") from error

    def close(self) -> None:
        """Close the files; a later `put` or `get` needs `restore` first."""
        for table in self._tables.values():
            self._close(table)
            table.is_made = False

    # ---- inside

    def _tables_of(self, namespace: str) -> Iterator[tuple[str, Table]]:
        """Yield the tables of a namespace, by their names."""
        return ((name, one) for name, one in self._tables.items() if name.partition(".")[0] == namespace)

    def _append(self, name: str, clients: NDArray[np.int64], checksums: NDArray[np.int64]) -> None:
        """Take over rows that were appended to the file of a table."""
        for other, table in self._tables_of(name.partition(".")[0]):
            if other == name:
                table.append(clients, checksums)
            else:
                table.forget(clients)

    def _close(self, table: Table) -> None:
        if table.descriptor is not None:
            os.close(table.descriptor)
            table.descriptor = None

    def _path(self, namespace: str, generation: int) -> Path:
        return self.directory / f"{namespace}.{generation}.rows"

    def _files(self) -> list[tuple[Path, str, int]]:
        """List (path, namespace, generation) of the files that a store has made, whatever else lies beside them."""
        found = [(path, _FILE.fullmatch(path.name)) for path in self.directory.iterdir() if path.is_file()]
        return [(path, match[1], int(match[2])) for path, match in found if match]

    def _writable(self, name: str, table: Table) -> int:
        """Return the descriptor of the current file of a table, which is made if needed."""
        if table.descriptor is None:
            path, new = self._path(name, table.generation), 0 if table.is_made else os.O_CREAT | os.O_EXCL
            with storage_errors(path):
                try:
                    table.descriptor = os.open(path, os.O_RDWR | new, 0o666)
                except FileExistsError as error:
                    raise CheckpointError(
                        f"{str(path)!r} holds rows of an earlier run: restore its index, or an empty one to remove them"
                    ) from error
            table.is_made = True
        return table.descriptor

    def _readable(self, name: str, table: Table) -> int:
        """Return the descriptor of the current file of a table, which holds rows."""
        path = self._path(name, table.generation)
        if table.descriptor is None and not table.is_made:
            raise CheckpointError(f"{str(path)!r} is closed: restore the store before reading from it")
        if table.descriptor is None:
            try:
                table.descriptor = os.open(path, os.O_RDWR)
            except OSError as error:
                raise CheckpointError(f"cannot read {str(path)!r} ({error.strerror}): restore it") from error
        return table.descriptor

    def _delete_unneeded(self, namespace: str, table: Table) -> None:
        needed = {table.generation, table.issued, *table.committed}
        for path, name, generation in self._files():
            if name == namespace and generation not in needed:
                with storage_errors(path):
                    path.unlink()


def _name_of(namespace: str, part: int) -> str:
    """Return the name of the table that a process writes."""
    return f"{namespace}.{part}" if part else namespace
