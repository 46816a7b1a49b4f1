"""Samples that are read later: some of them kept in memory, with the digest of those that are all kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.workloads import samples
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.digests import digest_of
from gossamer.workloads.files import arrays, table
from gossamer.workloads.samples import ArraySource, LazySamples, reading_later, telling

VALUES = np.random.default_rng(0).normal(5, 3, (60, 3)).astype(np.float32)


class Counted(ArraySource):
    """Remembers which rows are read."""

    asked: list[int]

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        self.asked.extend(rows.tolist())
        return super().read(rows)


@pytest.fixture
def source() -> Counted:
    found = Counted(VALUES)
    object.__setattr__(found, "asked", [])
    return found


def test_what_is_held_is_read_once(source: Counted) -> None:
    numbers = torch.arange(59, -1, -1)  # so that numbers differ from rows
    whole = LazySamples(source, numbers, (3,), torch.float32, "")
    held = whole.holding(torch.tensor([7, 3, 7, 12]))
    assert sorted(source.asked) == [47, 52, 56]
    source.asked.clear()
    assert torch.equal(held[torch.tensor([12, 3, 3])], torch.from_numpy(VALUES[[47, 56, 56]]))
    assert source.asked == []
    assert torch.equal(held[torch.tensor([8, 7, 9])], torch.from_numpy(VALUES[[51, 52, 50]]))
    assert source.asked == [51, 50]
    held[torch.tensor([3])].zero_()  # which belongs to the caller
    assert torch.equal(held[torch.tensor([3])], torch.from_numpy(VALUES[[56]]))
    assert torch.equal(held.subset(torch.tensor([3]))[:], torch.from_numpy(VALUES[[56]]))


def test_nothing_is_held_of_nothing_or_too_much(source: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LazySamples(source, torch.arange(60), (3,), torch.float32, "")
    assert whole.holding(torch.empty(0, dtype=torch.int64)) is whole
    monkeypatch.setattr(samples, "SMALL_BYTES", 12 * 3)
    assert whole.holding(torch.arange(4)) is whole
    assert source.asked == []
    assert whole.holding(torch.arange(3)) is not whole


def of_table(directory: Path) -> ImageData:
    classes = [("low", "high")[int(value > 5)] for value in VALUES[:, 0]]
    columns: dict[str, Any] = {"a": VALUES[:, 0], "label": classes, "b": VALUES[:, 1], "c": VALUES[:, 2]}
    pq.write_table(pa.table(columns), directory / "rows.parquet", row_group_size=7)
    return table({"path": str(directory / "rows.parquet")})


def of_images(directory: Path) -> ImageData:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 1, 4, 4), np.uint8)
    for name, array in {"x_train": pixels, "y_train": np.arange(30) % 3}.items():
        np.save(directory / f"{name}.npy", array, allow_pickle=False)
    return arrays({"path": str(directory)})


def of_numbers(directory: Path) -> ImageData:
    for name, array in {"x_train": VALUES, "y_train": np.arange(60) % 3}.items():
        np.save(directory / f"{name}.npy", array, allow_pickle=False)
    return arrays({"path": str(directory)})


@pytest.mark.parametrize("make", [of_table, of_images, of_numbers])
def test_read_later_with_the_same_bits_and_digest(tmp_path: Path, make: Any) -> None:
    whole = make(tmp_path)
    with reading_later():
        later = make(tmp_path)
    assert (whole.is_lazy, later.is_lazy) == (False, True)
    assert (later.mean, later.std) == (whole.mean, whole.std)
    assert torch.equal(later.train_images[:], whole.train_images)
    assert torch.equal(later.test_images[:], whole.test_images)
    assert digest_of(later) == digest_of(whole)
    held = later.holding(torch.arange(5), torch.arange(2))
    assert torch.equal(held.train_images[:], whole.train_images)
    assert torch.equal(held.test_images[:], whole.test_images)


@pytest.mark.parametrize("make", [of_table, of_images, of_numbers])
def test_what_one_process_has_found_spares_another_its_passes(
    tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading_later() as found:
        first = make(tmp_path)
    assert found

    told, pieces = json.loads(json.dumps(found)), samples.pieces

    def of_few(given: samples.Samples) -> Any:
        """Go through samples in memory, but through no others."""
        assert isinstance(given, Tensor)
        return pieces(given)

    monkeypatch.setattr(samples, "pieces", of_few)
    with telling(told), reading_later() as again:
        second = make(tmp_path)
    assert again == told
    assert (second.mean, second.std) == (first.mean, first.std)


def test_pages_that_only_this_process_has_changed_stay(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", VALUES, allow_pickle=False)
    mine: Any = np.load(tmp_path / "x.npy", mmap_mode="c", allow_pickle=False)
    mine[4] = 1.0
    source = ArraySource(mine)
    source.forget()
    assert source.read(np.array([4])).tolist() == [[1.0] * 3]
