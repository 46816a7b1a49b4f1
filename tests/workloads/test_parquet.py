"""Tables in parquet files, read whole and by row groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import gossamer
from federation import assert_same
from gossamer.errors import DataError
from gossamer.workloads import parquet, samples
from gossamer.workloads.digests import digest_of
from gossamer.workloads.files import table
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.parquet import Recent, RowGroupSource
from gossamer.workloads.samples import LazySamples

ROWS_A_GROUP, NUM_ROWS = 6, 60
FEATURES = np.random.default_rng(0).normal(5, 3, (NUM_ROWS, 3)).astype(np.float32)
CLASSES = [("low", "high")[int(value > 5)] for value in FEATURES[:, 0]]


def columns() -> pa.Table:
    """Return the table of all tests."""
    given = {"a": FEATURES[:, 0], "kind": CLASSES, "b": FEATURES[:, 1].astype(np.float64), "c": FEATURES[:, 2]}
    return pa.table(given)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Write ten row groups of six rows."""
    pq.write_table(columns(), tmp_path / "rows.parquet", row_group_size=ROWS_A_GROUP)
    return str(tmp_path / "rows.parquet")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count as large what exceeds 100 bytes; return the numbers of row groups as they are read."""
    made: list[int] = []
    read = RowGroupSource.read_group

    def counted(source: RowGroupSource, number: int) -> Tensor:
        assert len(source.recent.held) < parquet.MAX_HELD
        made.append(number)
        return read(source, number)

    monkeypatch.setattr(RowGroupSource, "read_group", counted)
    monkeypatch.setattr(samples, "SMALL_BYTES", 100)
    monkeypatch.setattr(samples, "PIECE_BYTES", 100)
    return made


def options(path: str) -> dict[str, Any]:
    """Return the data set's section of a configuration."""
    return {"name": "table", "path": path, "label": "kind"}


def train(data: dict[str, Any], directory: Path, **changes: Any) -> gossamer.Run:
    """Run a small federation on a table."""
    given = {"rounds": 2, "clients": {"num": 4, "per_round": 3}, "train": {"lr": 0.1}, "engine": {"workers": 0}}
    return gossamer.run(given | changes, data=data, model="softmax", out=directory)


def test_rows_are_those_of_the_table(path: str, reads: list[int]) -> None:
    data = table({"path": path, "label": "kind", "test_path": path})
    assert isinstance(data.train_images, LazySamples)
    assert (data.num_labels, data.shape) == (2, (3,))
    assert data.train_labels.tolist() == [("low", "high").index(name) for name in CLASSES]
    rows = torch.from_numpy(np.random.default_rng(1).permutation(NUM_ROWS))
    assert torch.equal(data.train_images[rows], torch.from_numpy(FEATURES)[rows])
    assert data.mean == pytest.approx(FEATURES.astype(np.float64).mean(0), rel=1e-9)
    assert data.std == pytest.approx(FEATURES.astype(np.float64).std(0), rel=1e-9)


def test_a_batch_reads_the_row_groups_of_its_rows_once(path: str, reads: list[int], tmp_path: Path) -> None:
    """Client 1 has rows 18 to 35, all of the groups 3 to 5, of which a second batch finds what it needs in memory."""
    (tmp_path / "parts.json").write_text(json.dumps([[*range(18)], [*range(18, 36)], [*range(36, 60)]]))
    workload = ImageClassification(
        {"dataset": options(path) | {"test_path": path}, "model": "softmax"},
        num_clients=3, seed=0, partition={"name": "file", "path": str(tmp_path / "parts.json")},
    )  # fmt: skip
    reads.clear()
    client = np.array([1])
    first = workload.batch(client, np.array([[17, 0, 5, 16]])).samples["x"][0]
    assert sorted(reads) == [3, 5]
    expected = (torch.from_numpy(FEATURES[[35, 18, 23, 34]]) - torch.tensor(workload.data.mean)) * (
        1 / torch.tensor(workload.data.std)
    )
    assert torch.equal(first, expected)
    workload.batch(client, np.array([[1, 17]]))
    assert sorted(reads) == [3, 5]
    workload.batch(client, np.array([[7]]))
    assert reads[2:] == [4]


def test_samples_of_some_clients_are_read_once(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, read = list[int](), RowGroupSource.read_group

    def counted(source: RowGroupSource, number: int) -> Tensor:
        made.append(number)
        return read(source, number)

    monkeypatch.setattr(RowGroupSource, "read_group", counted)
    (tmp_path / "parts.json").write_text(json.dumps([[*range(18)], [*range(18, 36)], [*range(36, 60)]]))
    with samples.reading_later():
        workload = ImageClassification(
            {"dataset": options(path) | {"test_path": path}, "model": "softmax", "evaluation_chunk": 20},
            num_clients=3, seed=0, partition={"name": "file", "path": str(tmp_path / "parts.json")},
        )  # fmt: skip
    whole = [workload.batch(np.array([client]), np.array([[3, 1]])).samples["x"] for client in range(3)]
    for found in (workload.data.train_images, workload.data.test_images):
        found.source.forget()
    made.clear()
    workload.hold(np.array([1]), np.array([2]))
    assert made == [3, 4, 5, 6, 7, 8, 9]
    made.clear()
    assert torch.equal(workload.batch(np.array([1]), np.array([[3, 1]])).samples["x"], whole[1])
    workload.evaluate(workload.layout.views(workload.init(0)), {}, 2)
    assert made == []
    assert torch.equal(workload.batch(np.array([2]), np.array([[3, 1]])).samples["x"], whole[2])
    assert made == [6]


def test_the_bits_are_those_of_a_table_that_is_read_whole(
    path: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = train(options(path), tmp_path / "whole")
    reads = request.getfixturevalue("reads")
    lazily = train(options(path), tmp_path / "lazily")
    assert_same(whole, lazily)
    assert set(reads) == set(range(10))
    assert_same(whole, train(options(path), tmp_path / "forked", engine={"workers": 2}))


def test_several_files_are_joined(tmp_path: Path, reads: list[int]) -> None:
    (tmp_path / "parts").mkdir()
    for number, start in enumerate(range(0, NUM_ROWS, 20)):
        pq.write_table(columns()[start : start + 20], tmp_path / "parts" / f"{number}.parquet", row_group_size=7)
    path = str(tmp_path / "parts")
    data = table({"path": path, "label": "kind", "test_path": path})
    assert torch.equal(data.train_images[:], torch.from_numpy(FEATURES))
    before = digest_of(data)
    pq.write_table(columns()[:20], tmp_path / "parts" / "2.parquet", row_group_size=7)
    assert digest_of(table({"path": path, "label": "kind", "test_path": path})) != before


def test_what_was_used_last_is_kept() -> None:
    recent, read = Recent(2), list[int]()

    def tensor(number: int) -> Tensor:
        read.append(number)
        return torch.tensor(number)

    assert [int(recent.get(number, tensor)) for number in (0, 1, 0, 2, 0, 1)] == [0, 1, 0, 2, 0, 1]
    assert read == [0, 1, 2, 1]
    assert list(recent.held) == [0, 1]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda made: made.drop_columns("kind"), r"has the columns \['a', 'b', 'c'\]: give the name of its column"),
        (lambda made: made.select(["kind"]), "has no column besides 'kind'"),
        (lambda made: made.append_column("d", [CLASSES]), "'d' of .* is of type string: give numbers"),
        (lambda made: made.set_column(0, "a", [[None] * NUM_ROWS]).cast(made.schema), "'a' of .* lacks values"),
        (lambda made: made.set_column(1, "kind", [[None] * NUM_ROWS]), "has rows without a class in its column"),
        (lambda made: made[:0], "has no rows in its column 'kind'"),
        (lambda made: made.set_column(0, "a", [[float("nan")] * NUM_ROWS]), "not finite"),
    ],
)
def test_what_is_refused(tmp_path: Path, spoil: Callable[[pa.Table], pa.Table], sentence: str) -> None:
    pq.write_table(spoil(columns()), tmp_path / "spoilt.parquet")
    with pytest.raises(DataError, match=sentence):
        table({"path": str(tmp_path / "spoilt.parquet"), "label": "kind"})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("text")
    for path, sentence in {
        "text.parquet": "as parquet .*: correct its path, or fetch it again",
        "none.parquet": "as parquet .*: correct its path",
        ".": "as parquet",
    }.items():
        with pytest.raises(DataError, match=sentence):
            table({"path": str(tmp_path / path), "label": "kind"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.parquet files"):
        table({"path": str(tmp_path / "empty"), "label": "kind"})
    pq.write_table(columns(), tmp_path / "a.parquet")
    pq.write_table(columns().rename_columns(["a", "kind", "b", "d"]), tmp_path / "b.parquet")
    (tmp_path / "text.parquet").unlink()
    with pytest.raises(DataError, match=r"has the features \['a', 'b', 'd'\], but .*: give both the same"):
        table({"path": str(tmp_path), "label": "kind"})


def test_an_index_of_pandas_is_no_feature(tmp_path: Path) -> None:
    """pandas writes the index of rows that were chosen or shuffled as a column, and reads it as no column."""
    table = columns().append_column("__index_level_0__", pa.array(range(NUM_ROWS)))
    pq.write_table(table, tmp_path / "rows.parquet")
    names, *_ = parquet.read_parquet(str(tmp_path / "rows.parquet"), "kind")
    assert names == ["a", "b", "c"]
