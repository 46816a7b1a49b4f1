"""Rows of clients survive a kill at any instant, in every kept commit, and never take more disk than stated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.storage.client_store import ClientStore
from gossamer.storage.row_files import SharedRows

WIDTH = 3
ROW_BYTES = 4 * WIDTH
NUM_CLIENTS = 6
KEEP = 2

Rows = dict[int, torch.Tensor]
Index = dict[str, torch.Tensor]


def opened(directory: Path) -> ClientStore:
    store = ClientStore(directory, KEEP)
    store.declare("control", WIDTH)
    return store


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


CLIENTS = st.tuples(st.sets(st.integers(0, NUM_CLIENTS - 1), min_size=1), st.integers(0, 2))
OPERATIONS = st.one_of(
    CLIENTS, CLIENTS, st.sampled_from(["commit", "commit", "commit fails", "killed before release", "fall back"])
)


class Checked:
    """A store beside a model of it: plain dictionaries, and a count of what was put."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = opened(directory)
        self.model: Rows = {}
        self.num_put = 0
        self.serial = 0
        self.kept: list[tuple[Index, Rows, int]] = []

    def bound(self, factor: int) -> int:
        oldest = self.kept[0][2] if len(self.kept) == KEEP else 0
        return ROW_BYTES * (factor * len(self.model) + self.num_put - oldest)

    def assert_bound(self, factor: int = 2 * (KEEP + 1)) -> None:
        assert used_bytes(self.directory) <= self.bound(factor)

    def put(self, clients: set[int], part: int = 0) -> None:
        """Store new rows, different from all before; by another process if `part` is not 0."""
        self.serial += 1
        rows = {client: torch.tensor([self.serial, client, self.serial / 7]) for client in sorted(clients)}
        self.model |= rows
        self.num_put += len(rows)
        names, values = torch.tensor(list(rows)), torch.stack(list(rows.values()))
        if not part:
            self.store.put("control", names, values)
            return
        other = SharedRows(self.directory, {"control": WIDTH}, torch.float32)
        other.places = {"control": self.store.place("control", part)}
        other.put("control", names, values)
        kept, checksums = other.take()["control"]
        self.store.record("control", part, kept.numpy(), checksums.numpy())

    def commit(self, release: bool = True) -> None:
        index = self.store.index()
        self.assert_bound()
        self.kept = [*self.kept, (index, dict(self.model), self.num_put)][-KEEP:]
        if release:
            self.store.release()
            self.assert_bound(2 * KEEP)

    def resume(self) -> None:
        """Start anew from the newest commit, as another process would."""
        self.store.close()
        self.store = opened(self.directory)
        index, model, self.num_put = self.kept[-1] if self.kept else ({}, {}, 0)
        self.model = dict(model)
        self.store.restore(index)

    def run(self, operation: Any) -> None:
        if isinstance(operation, tuple):
            self.put(*operation)
        elif operation == "commit":
            self.commit()
        elif operation == "commit fails":
            self.store.index()
        elif operation == "killed before release":
            self.commit(release=False)
            self.resume()
        else:
            if len(self.kept) > 1:
                self.kept.pop()  # the newest commit is damaged
            self.resume()
        assert_holds(self.store, self.model)
        self.assert_bound()


@given(operations=st.lists(OPERATIONS, max_size=40))
def test_against_a_model_within_the_bound(tmp_path_factory: pytest.TempPathFactory, operations: list[Any]) -> None:
    checked = Checked(tmp_path_factory.mktemp("clients"))
    pwrite = os.pwrite

    def measured(descriptor: int, content: memoryview, offset: int) -> int:
        written = pwrite(descriptor, content, offset)
        checked.assert_bound()  # compaction included
        return written

    with mock.patch.object(os, "pwrite", measured), mock.patch.object(os, "fsync"):
        for operation in operations:
            checked.run(operation)
    for index, model, _ in checked.kept:
        image = checked.directory.with_name(checked.directory.name + "-image")
        shutil.copytree(checked.directory, image)
        assert_restores(image, index, model)
        shutil.rmtree(image)


def test_the_bound_holds_and_the_space_comes_back_over_many_rounds(tmp_path: Path) -> None:
    checked = Checked(tmp_path)
    with mock.patch.object(os, "fsync"):
        for round in range(60):
            checked.put({round % NUM_CLIENTS, (round * 5 + 1) % NUM_CLIENTS}, round % 3 if round < 40 else 0)
            checked.commit()
    assert checked.num_put > 15 * NUM_CLIENTS
    assert used_bytes(tmp_path) <= ROW_BYTES * (2 * KEEP * NUM_CLIENTS + 2)


@contextmanager
def before_each(calls: tuple[str, ...], note: Callable[[], None]) -> Iterator[None]:
    """Call `note` before each of the named functions of `os` (but not those that it calls), and amid each write."""
    noting = [False]

    def note_once() -> None:
        if not noting[0]:
            noting[0] = True
            note()
            noting[0] = False

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            note_once()
            return call(*args, **options)

        return wrapped

    pwrite = os.pwrite

    def torn(descriptor: int, content: memoryview, offset: int) -> int:
        note_once()
        return pwrite(descriptor, content[: max(1, len(content) // 2)], offset)

    replacements: dict[str, Any] = {"pwrite": torn} | {name: wrap(getattr(os, name)) for name in calls}
    with mock.patch.multiple(os, **replacements):
        yield


def test_each_kept_commit_can_be_resumed_from_after_a_kill_at_any_instant(tmp_path: Path) -> None:
    checked = Checked(tmp_path / "live")
    num_images = 0

    def kill_here() -> None:
        nonlocal num_images
        image = shutil.copytree(tmp_path / "live", tmp_path / "image")
        for index, model, _ in reversed(checked.kept):  # the older one even after a resume from the newer one
            assert_restores(image, index, model)
        shutil.rmtree(image)
        num_images += 1

    with before_each(("open", "fsync", "unlink", "ftruncate"), kill_here):
        for round in range(8):
            checked.put({(2 * round + i) % NUM_CLIENTS for i in range(3)})
            checked.put({(2 * round + i) % NUM_CLIENTS for i in range(1, 4)}, round // 3 % 2)
            checked.commit()
    generations = [int(path.name.split(".")[-2]) for path in (tmp_path / "live").iterdir()]
    assert min(generations) > 0  # compaction and deletion did happen
    assert num_images > 50
