"""Rows that several processes write on one disk: each finds what the others wrote, and damage is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from gossamer.errors import CheckpointError, StorageError
from gossamer.storage.client_store import ClientStore
from gossamer.storage.row_files import SharedRows

WIDTH = 3


def ids(*clients: int) -> torch.Tensor:
    return torch.tensor(clients, dtype=torch.int64)


def opened(directory: Path) -> ClientStore:
    store = ClientStore(directory)
    store.declare("control", WIDTH)
    return store


def put(store: ClientStore, part: int, *clients: int) -> None:
    """Have another process keep rows that tell its number."""
    other = SharedRows(store.directory, {"control": WIDTH}, torch.float32)
    other.places = {"control": store.place("control", part)}
    for client in clients:  # as block after block
        other.put("control", ids(client), torch.full((1, WIDTH), 100.0 * part + client))
    for name, (kept, checksums) in other.take().items():
        store.record(name, part, kept.numpy(), checksums.numpy())


def got(store: ClientStore, *clients: int) -> list[float]:
    """Return what the store, and another process that it tells where they are, read of rows."""
    rows, present = store.get("control", ids(*clients))
    other = SharedRows(store.directory, {"control": WIDTH}, torch.float32)
    found = zip(clients, store.addresses("control", np.array(clients)), strict=True)
    other.known = {("control", client): address for client, address in found if address is not None}
    theirs, are_there = other.get("control", ids(*clients))
    assert torch.equal(rows, theirs)
    assert torch.equal(present, are_there)
    return rows[:, 0].tolist()


def test_the_last_row_counts_whoever_wrote_it(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 1, 2, 3)
    put(store, 2, 2)
    put(store, 0, 3)
    assert got(store, 1, 2, 3, 4, 2) == [101.0, 202.0, 3.0, 0.0, 202.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "control.0.rows",
        "control.1.0.rows",
        "control.2.0.rows",
    ]


def test_fewer_and_more_processes_go_on(tmp_path: Path) -> None:
    """What files of processes that are no more hold dies as clients are trained, and is taken out by others."""
    store = opened(tmp_path)
    put(store, 0, 0, 1, 2)
    put(store, 1, 3, 4, 5)
    index = store.index()
    store.release()
    put(store, 2, 0, 5)
    alone = opened(tmp_path)
    alone.restore(index)
    assert got(alone, 0, 3, 5) == [0.0, 103.0, 105.0]
    for _ in range(2):
        alone.put("control", ids(3, 4, 5), torch.full((3, WIDTH), 7.0))
        alone.put("control", ids(0, 1, 2), torch.full((3, WIDTH), 8.0))
        alone.index()
        alone.release()
    assert got(alone, 0, 3, 5) == [8.0, 7.0, 7.0]
    assert (tmp_path / "control.1.1.rows").stat().st_size == 0
    put(alone, 1, 4)
    assert got(alone, 4) == [104.0]


def test_a_damaged_row_names_client_and_file(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 4, 5)
    with (tmp_path / "control.1.0.rows").open("r+b") as file:
        file.seek(4 * WIDTH + 1)
        file.write(b"\x01")
    assert got(store, 4) == [104.0]
    other = SharedRows(tmp_path, {"control": WIDTH}, torch.float32)
    (address,) = store.addresses("control", np.array([5]))
    assert address is not None
    other.known = {("control", 5): address}
    with pytest.raises(CheckpointError, match=r"client 5 in .*control\.1\.0\.rows.* is damaged"):
        other.get("control", ids(5))
    (tmp_path / "control.1.0.rows").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read '.*control\.1\.0\.rows'"):
        other.get("control", ids(5))


def test_a_refused_put_is_told(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, 1, 4)
    full = OSError(errno.ENOSPC, "full")
    with mock.patch.object(os, "pwrite", side_effect=full), pytest.raises(StorageError, match="no space left"):
        put(store, 1, 5)
    assert got(store, 4, 5) == [104.0, 0.0]
    put(store, 1, 5)
    assert got(store, 4, 5) == [104.0, 105.0]
