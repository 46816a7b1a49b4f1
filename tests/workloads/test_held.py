"""What a client names as its own data, and which part of it is for testing."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.workloads.files import table
from gossamer.workloads.held import spec_of

ROWS = "a,b,label\n" + "".join(f"{n}.0,{-n}.0,{n % 2}\n" for n in range(20))


def test_a_folder_with_train_and_test(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(ROWS)
    (tmp_path / "test.csv").write_text("a,b,label\n3.0,4.0,1\n")
    spec = spec_of(str(tmp_path))
    assert spec == {"name": "table", "path": str(tmp_path / "train.csv"), "test_path": str(tmp_path / "test.csv")}
    found = table({key: value for key, value in spec.items() if key != "name"})
    assert (len(found.train_labels), len(found.test_labels)) == (20, 1)


def test_folders_of_parquet(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.parquet").write_bytes(b"")
    assert spec_of(str(tmp_path)) == {
        "name": "table",
        "path": str(tmp_path / "train"),
        "test_path": str(tmp_path / "test"),
    }


@pytest.mark.parametrize("name", ["train", "one"])
def test_one_table_is_divided(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.csv"
    file.write_text(ROWS)
    assert spec_of(str(file)) == {"name": "table", "path": str(file)}
    found = table({"path": str(file)})
    assert len(found.train_labels) + len(found.test_labels) == 20
    assert 0 < len(found.test_labels) < 10


def test_folders_of_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
    assert spec_of(str(tmp_path)) == {"name": "image-folder", "path": str(tmp_path)}
