"""Rows of clients come back bit for bit, damage is found out, and a refused write changes nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from gossamer.errors import CheckpointError, ConfigError, StorageError
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.client_store import ClientStore

WIDTH = 3
ROW_BYTES = 4 * WIDTH
NUM_CLIENTS = 6

Rows = dict[int, torch.Tensor]
Index = dict[str, torch.Tensor]


def ids(*clients: int) -> torch.Tensor:
    return torch.tensor(clients, dtype=torch.int64)


def opened(directory: Path) -> ClientStore:
    store = ClientStore(directory)
    store.declare("control", WIDTH)
    return store


def put(store: ClientStore, rows: Rows) -> None:
    store.put("control", ids(*rows), torch.stack(list(rows.values())))


def assert_holds(store: ClientStore, model: Rows) -> None:
    rows, present = store.get("control", torch.arange(NUM_CLIENTS))
    assert present.tolist() == [client in model for client in range(NUM_CLIENTS)]
    for client in range(NUM_CLIENTS):
        assert torch.equal(rows[client], model.get(client, torch.zeros(WIDTH)))


def assert_restores(directory: Path, index: Index, model: Rows) -> None:
    store = opened(directory)
    store.restore(index)
    assert_holds(store, model)
    store.close()


def used_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def counter() -> Iterator[torch.Tensor]:
    """Yield rows that are all different."""
    value = 0
    while True:
        value += 1
        yield torch.tensor([value, -value, value / 7])


def test_who_reads_a_commit_changes_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, {1: torch.ones(WIDTH)})
    index = store.index()
    put(store, {1: torch.zeros(WIDTH), 2: torch.ones(WIDTH)})  # by a run that goes on
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    reader = ClientStore(tmp_path)
    reader.attach(index)
    assert_holds(reader, {1: torch.ones(WIDTH)})
    reader.close()
    assert reader.namespaces == ["control"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read '.*control.0.rows' \(No such file"):
        ClientStore(tmp_path).attach(index)


def test_rows_come_back_and_strangers_are_zero(tmp_path: Path) -> None:
    store = opened(tmp_path)
    rows, present = store.get("control", ids(4, 2))
    assert rows.tolist() == [[0.0] * WIDTH] * 2
    assert present.tolist() == [False, False]
    put(store, {4: torch.tensor([1.0, float("nan"), -0.0]), 1: torch.ones(WIDTH)})
    put(store, {1: 2 * torch.ones(WIDTH), 3: 3 * torch.ones(WIDTH)})
    rows, present = store.get("control", ids(3, 9, 1, 4, 1))
    assert present.tolist() == [True, False, True, True, True]
    assert rows[[0, 1, 2, 4], 0].tolist() == [3.0, 0.0, 2.0, 2.0]
    assert rows[3].view(torch.int32).tolist() == torch.tensor([1.0, float("nan"), -0.0]).view(torch.int32).tolist()


def test_namespaces_are_apart(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.declare("momentum", 1)
    put(store, {0: torch.ones(WIDTH)})
    store.put("momentum", ids(0), torch.tensor([[9.0]]))
    assert store.get("control", ids(0))[0].tolist() == [[1.0] * WIDTH]
    assert store.get("momentum", ids(0, 1))[0].tolist() == [[9.0], [0.0]]
    index = store.index()
    other = ClientStore(tmp_path)
    other.restore(index)
    assert other.get("momentum", ids(0))[0].tolist() == [[9.0]]


def test_the_file_is_raw_little_endian_rows(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, {5: torch.tensor([1.0, 2.0, 3.0])})
    assert (tmp_path / "control.0.rows").read_bytes().hex() == "0000803f" + "00000040" + "00004040"


@pytest.mark.parametrize(
    ("clients", "rows"),
    [
        (ids(1, 1), torch.zeros(2, WIDTH)),
        (ids(-1), torch.zeros(1, WIDTH)),
        (torch.tensor([1], dtype=torch.int32), torch.zeros(1, WIDTH)),
        (ids(1), torch.zeros(1, WIDTH + 1)),
        (ids(1), torch.zeros(2, WIDTH)),
        (ids(1), torch.zeros(1, WIDTH, dtype=torch.float64)),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, clients: torch.Tensor, rows: torch.Tensor) -> None:
    store = opened(tmp_path)
    with pytest.raises(ValueError, match=r"must be"):
        store.put("control", clients, rows)
    assert used_bytes(tmp_path) == 0


def test_putting_nothing_is_harmless(tmp_path: Path) -> None:
    opened(tmp_path).put("control", ids(), torch.zeros(0, WIDTH))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("namespace", "width"), [("a/b", 1), ("", 1), ("a.b", 1), ("ok", 0), ("control", 4)])
def test_malformed_declarations_are_refused(tmp_path: Path, namespace: str, width: int) -> None:
    with pytest.raises(ConfigError):
        opened(tmp_path).declare(namespace, width)


def test_keeping_fewer_than_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep 1 commits"):
        ClientStore(tmp_path, keep=1)


def test_a_damaged_row_names_client_and_file(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, {3: torch.ones(WIDTH), 5: torch.ones(WIDTH)})
    with (tmp_path / "control.0.rows").open("r+b") as file:
        file.seek(ROW_BYTES + 1)
        file.write(b"\x01")
    assert store.get("control", ids(3))[1].tolist() == [True]
    with pytest.raises(CheckpointError, match=r"client 5 in .*control\.0\.rows.* is damaged"):
        store.get("control", ids(3, 5))
    os.truncate(tmp_path / "control.0.rows", ROW_BYTES + 2)
    with pytest.raises(CheckpointError, match=r"control\.0\.rows.* ends before its row 1"):
        store.get("control", ids(5))


def test_a_damaged_row_is_still_found_out_after_compaction(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for value in range(4):
        put(store, {0: torch.full((WIDTH,), float(value))})
    with (tmp_path / "control.0.rows").open("r+b") as file:
        file.seek(3 * ROW_BYTES)
        file.write(b"\x01")
    store.index()
    assert (tmp_path / "control.1.rows").stat().st_size == ROW_BYTES
    with pytest.raises(CheckpointError, match=r"client 0 in .*control\.1\.rows"):
        store.get("control", ids(0))


def test_reading_takes_only_the_rows_asked_for(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, {client: torch.ones(WIDTH) for client in range(50)})
    with mock.patch.object(os, "pread", wraps=os.pread) as pread:
        store.get("control", ids(7, 70, 9))
    assert [call.args[1] for call in pread.call_args_list] == [ROW_BYTES, ROW_BYTES]


@pytest.mark.parametrize("num_bytes_taken", [0, 5])
def test_a_refused_put_leaves_the_store_as_it_was(tmp_path: Path, num_bytes_taken: int) -> None:
    store = opened(tmp_path)
    put(store, {0: torch.ones(WIDTH)})
    pwrite, refusing = os.pwrite, [False]

    def refuse(descriptor: int, content: memoryview, offset: int) -> int:
        if refusing[0] or not num_bytes_taken:
            raise OSError(errno.ENOSPC, "full")
        refusing[0] = True
        return pwrite(descriptor, content[:num_bytes_taken], offset)

    with mock.patch.object(os, "pwrite", refuse), pytest.raises(StorageError, match="no space left"):
        put(store, {0: torch.zeros(WIDTH), 1: torch.zeros(WIDTH)})
    assert_holds(store, {0: torch.ones(WIDTH)})
    assert used_bytes(tmp_path) == ROW_BYTES
    put(store, {1: 2 * torch.ones(WIDTH)})
    assert_holds(store, {0: torch.ones(WIDTH), 1: 2 * torch.ones(WIDTH)})


def test_short_writes_are_continued(tmp_path: Path) -> None:
    store = opened(tmp_path)
    pwrite = os.pwrite
    with mock.patch.object(os, "pwrite", lambda descriptor, content, offset: pwrite(descriptor, content[:5], offset)):
        put(store, {0: torch.ones(WIDTH), 1: 2 * torch.ones(WIDTH)})
    assert_holds(store, {0: torch.ones(WIDTH), 1: 2 * torch.ones(WIDTH)})


def test_a_refused_compaction_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for value in range(4):
        put(store, {0: torch.full((WIDTH,), float(value))})
    with (
        mock.patch.object(os, "pwrite", side_effect=OSError(errno.ENOSPC, "full")),
        pytest.raises(StorageError, match="no space left"),
    ):
        store.index()
    assert [path.name for path in tmp_path.iterdir()] == ["control.0.rows"]
    assert_holds(store, {0: torch.full((WIDTH,), 3.0)})
    assert_restores(tmp_path, store.index(), {0: torch.full((WIDTH,), 3.0)})


def test_rows_of_a_forgotten_run_are_not_overwritten(tmp_path: Path) -> None:
    first = opened(tmp_path)
    put(first, {0: torch.ones(WIDTH)})
    index = first.index()
    with pytest.raises(CheckpointError, match="holds rows of an earlier run"):
        put(opened(tmp_path), {0: torch.zeros(WIDTH)})
    assert_restores(tmp_path, index, {0: torch.ones(WIDTH)})
    fresh = opened(tmp_path)
    fresh.restore({})
    assert not list(tmp_path.iterdir())
    put(fresh, {1: torch.ones(WIDTH)})
    assert_holds(fresh, {1: torch.ones(WIDTH)})


def test_an_index_is_a_snapshot(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, {0: torch.ones(WIDTH)})
    index = store.index()
    before = {name: tensor.clone() for name, tensor in index.items()}
    put(store, {0: torch.zeros(WIDTH), 1: torch.zeros(WIDTH)})
    assert all(torch.equal(index[name], tensor) for name, tensor in before.items())
    store.restore(index)
    put(store, {0: torch.zeros(WIDTH)})
    assert all(torch.equal(index[name], tensor) for name, tensor in before.items())


def test_a_missing_or_cut_file_is_found_out_before_anything_is_deleted(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.declare("momentum", 1)
    put(store, {0: torch.ones(WIDTH)})
    store.put("momentum", ids(0), torch.ones(1, 1))
    index = store.index()
    os.truncate(tmp_path / "momentum.0.rows", 3)
    (tmp_path / "control.7.rows").touch()
    with pytest.raises(CheckpointError, match=r"momentum\.0\.rows.* holds 3 bytes but the checkpoint needs 4"):
        opened(tmp_path).restore(index)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_malformed_index_is_refused(tmp_path: Path) -> None:
    index = opened(tmp_path).index()
    del index["clientstore/control/slots"]
    with pytest.raises(CheckpointError, match="index of client state 'control' is malformed"):
        opened(tmp_path).restore(index)


def test_another_width_is_refused(tmp_path: Path) -> None:
    index = opened(tmp_path).index()
    other = ClientStore(tmp_path)
    other.declare("control", WIDTH + 1)
    with pytest.raises(ConfigError, match="has width 4, not 3"):
        other.restore(index)


def test_an_index_passes_through_a_checkpoint(tmp_path: Path) -> None:
    store, checkpoints = opened(tmp_path / "clients"), Checkpoints(tmp_path / "checkpoints")
    put(store, {client: torch.full((WIDTH,), float(client)) for client in range(4)})
    checkpoints.commit(0, {"x": torch.zeros(2)} | store.index(), {}, {})
    store.release()
    put(store, {0: torch.zeros(WIDTH)})
    found = checkpoints.latest()
    assert found is not None
    assert_restores(
        tmp_path / "clients", found.arrays, {client: torch.full((WIDTH,), float(client)) for client in range(4)}
    )


def test_a_commit_whose_release_was_missed_survives_the_next_compaction(tmp_path: Path) -> None:
    store, fresh = opened(tmp_path), counter()
    put(store, {0: (first := next(fresh))})
    index = store.index()
    for _ in range(3):
        put(store, {0: next(fresh)})
    store.index()
    assert len(list(tmp_path.iterdir())) == 2
    assert_restores(tmp_path, index, {0: first})


def test_a_generation_goes_once_no_kept_commit_refers_to_it(tmp_path: Path) -> None:
    store, fresh = opened(tmp_path), counter()
    present = []
    for num_puts in (1, 3, 1):
        for _ in range(num_puts):
            put(store, {0: next(fresh)})
        store.index()
        store.release()
        present.append(sorted(path.name for path in tmp_path.iterdir()))
    assert present == [["control.0.rows"], ["control.0.rows", "control.1.rows"], ["control.1.rows"]]


def test_restoring_cuts_off_what_is_newer(tmp_path: Path) -> None:
    store, fresh = opened(tmp_path), counter()
    put(store, {0: (first := next(fresh))})
    index = store.index()
    put(store, {0: next(fresh), 1: next(fresh)})
    store.index()
    store.restore(index)
    assert used_bytes(tmp_path) == ROW_BYTES
    assert_holds(store, {0: first})


def test_descriptors_are_not_leaked(tmp_path: Path) -> None:
    def num_open() -> int:
        return sum(
            os.readlink(path).startswith(str(tmp_path)) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
        )

    store = opened(tmp_path)
    for value in range(5):
        put(store, {0: torch.full((WIDTH,), float(value))})
    index = store.index()
    store.release()
    for _ in range(3):
        store.restore(index)
    assert num_open() == 1
    store.close()
    assert num_open() == 0


def test_stray_files_are_left_alone(tmp_path: Path) -> None:
    store, values = opened(tmp_path), counter()
    put(store, {1: next(values)})
    index = store.index()
    store.close()
    (tmp_path / "control.backup.rows").touch()
    (tmp_path / "mine.rows").mkdir()
    opened(tmp_path).restore(index)
    opened(tmp_path).restore({})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["control.backup.rows", "mine.rows"]
