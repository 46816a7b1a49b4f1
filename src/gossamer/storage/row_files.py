"""Files of raw rows: reading single ones, appending, and copying live ones, in whichever process."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import CheckpointError, storage_errors
from gossamer.storage.disk import sync, write_at

FLOATS: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}


class Address(NamedTuple):
    """Where a row is, and what it is told from others by.

    Attributes:
        file: name of its file in the store's directory.
        slot: its position there.
        checksum: CRC-32 of its bytes.
    """

    file: str
    slot: int
    checksum: int


class Work(NamedTuple):
    """What is to be done with the file of a table before a commit.

    Attributes:
        part: number of the process that writes the file.
        source: its name; None: there is none.
        target: name of the file that live rows are to be copied to, in the place of a sync; None: no copy.
        slots: int64 [m], where these are, in the order of the copy.
        row_bytes: bytes of a row.
    """

    part: int
    source: str | None
    target: str | None
    slots: NDArray[np.int64]
    row_bytes: int


def packed(rows: Tensor) -> tuple[memoryview, NDArray[np.int64]]:
    """Return rows as a file has them, and their checksums."""
    content = np.ascontiguousarray(rows.detach().cpu().numpy(), FLOATS[rows.dtype])
    return content.data.cast("B"), np.array([zlib.crc32(row.data) for row in content], np.int64)


def read_row(descriptor: int, path: Path, row_bytes: int, slot: int) -> bytes:
    """Read one row.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        content = os.pread(descriptor, row_bytes, slot * row_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot read row {slot} of {str(path)!r} ({error.strerror}): check the disk") from error
    if len(content) != row_bytes:
        raise CheckpointError(f"{str(path)!r} ends before its row {slot}: resume from an earlier checkpoint")
    return content


def read_intact(descriptor: int, path: Path, row_bytes: int, slot: int, checksum: int, client: int) -> bytes:
    """Read the row of a client.

    Raises:
        CheckpointError: it cannot be read, or its checksum differs.
    """
    content = read_row(descriptor, path, row_bytes, slot)
    if zlib.crc32(content) != checksum:
        raise CheckpointError(
            f"the row of client {client} in {str(path)!r} is damaged (its CRC-32 differs): resume from an earlier"
            " checkpoint, or start a new run"
        )
    return content


def settle(directory: Path, work: Iterable[Work]) -> None:
    """Copy live rows to new files where that is asked for, and sync all files.

    Raises:
        CheckpointError: a live row cannot be read.
        StorageError: the disk refuses a write; the file that was to be written is not there.
    """
    for one in work:
        if one.target is not None and one.source is not None:
            _copy(directory / one.source, directory / one.target, one)
        elif one.source is not None:
            with storage_errors(directory / one.source):
                sync(directory / one.source)


def _copy(source: Path, target: Path, work: Work) -> None:
    try:
        with storage_errors(target):
            goal = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            origin = _opened(source)
            try:
                for position, slot in enumerate(work.slots.tolist()):
                    content = read_row(origin, source, work.row_bytes, slot)
                    with storage_errors(target):
                        write_at(goal, memoryview(content), position * work.row_bytes)
            finally:
                os.close(origin)
            with storage_errors(target):
                os.fsync(goal)
        finally:
            os.close(goal)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _opened(path: Path) -> int:
    """Open a file for reading.

    Raises:
        CheckpointError: it cannot be.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"cannot read {str(path)!r} ({error.strerror}): restore it") from error


class SharedRows:
    """Rows of clients on a disk that several processes share, each of which appends to files of its own.

    Which rows are live is known to one process alone, which tells the others what they need. A file is opened anew each
    time and closed again, by which file systems of a network ensure that what one process wrote is what another reads.

    Attributes:
        known: ``{(namespace, client): address}``, where the rows are that `get` reads; there are no others.
        places: ``{namespace: (file, rows in it)}``, where `put` appends.
        directory: where all files are.
    """

    def __init__(self, directory: Path, widths: Mapping[str, int], dtype: torch.dtype) -> None:
        """Bind a directory.

        Args:
            directory: see the class.
            widths: ``{namespace: floats of a row}``.
            dtype: type of them, float32 or float64.
        """
        self.directory, self._widths, self._dtype = directory, widths, dtype
        self.known: dict[tuple[str, int], Address] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def get(self, namespace: str, clients: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and which are there, see `gossamer.storage.client_store.ClientStore.get`.

        Raises:
            CheckpointError: a row cannot be read, or its checksum differs.
        """
        rows = torch.zeros(len(clients), self._widths[namespace], dtype=self._dtype)
        present, view, opened = torch.zeros(len(clients), dtype=torch.bool), rows.numpy(), dict[str, int]()
        try:
            for number, client in enumerate(clients.tolist()):
                if (address := self.known.get((namespace, client))) is None:
                    continue
                path = self.directory / address.file
                if address.file not in opened:
                    opened[address.file] = _opened(path)
                row_bytes = view[number].nbytes
                content = read_intact(opened[address.file], path, row_bytes, address.slot, address.checksum, client)
                view[number] = np.frombuffer(content, FLOATS[self._dtype])
                present[number] = True
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        return rows, present

    def put(self, namespace: str, clients: Tensor, rows: Tensor) -> None:
        """Append the rows of distinct clients.

        Raises:
            StorageError: the disk refuses a write.
        """
        file, num_rows = self.places[namespace]
        content, checksums = packed(rows)
        path = self.directory / file
        with storage_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                write_at(descriptor, content, num_rows * rows[0].nbytes)
            finally:
                os.close(descriptor)
        self.places[namespace] = file, num_rows + len(rows)
        self._kept.setdefault(namespace, []).append((clients, torch.from_numpy(checksums)))

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return clients and checksums of the rows that were appended since the last call, by namespace, int64 [s]."""
        kept, self._kept = self._kept, {}
        found = {}
        for namespace, parts in kept.items():
            clients, checksums = zip(*parts, strict=True)
            found[namespace] = torch.cat(clients), torch.cat(checksums)
        return found
