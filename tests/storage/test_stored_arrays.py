"""Arrays that several files have together are read whole or by rows, and what cannot be read is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.storage.checkpoint import save_arrays
from gossamer.storage.stored_arrays import StoredArrays

X = torch.arange(21, dtype=torch.float32).view(7, 3)


@pytest.fixture
def stored(tmp_path: Path) -> StoredArrays:
    """Rows 0-1, 2-5 and 6 in three files, and a scalar in the second."""
    parts: list[dict[str, Tensor]] = [{"state.x": X[:2]}, {"state.x": X[2:6], "other": torch.tensor(5)}]
    parts.append({"state.x": X[6:]})
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, arrays in zip(paths, parts, strict=True):
        save_arrays(path, arrays)
    return StoredArrays(paths)


def test_whole(stored: StoredArrays) -> None:
    assert dict(stored).keys() == {"state.x", "other"}
    assert torch.equal(stored["state.x"], X)
    assert stored["other"] == 5
    assert stored["state.x"].data_ptr() % 64 == stored["other"].data_ptr() % 64 == 0


def test_below_a_prefix(stored: StoredArrays) -> None:
    below = stored.below("state.")
    assert list(below) == ["x"]
    assert torch.equal(below["x"], X)
    assert torch.equal(below.rows("x", 1, 3), X[1:3])


@pytest.mark.parametrize("low", range(8))
def test_rows(stored: StoredArrays, low: int) -> None:
    for high in range(low + 1, 8):
        found = stored.rows("state.x", low, high)
        assert torch.equal(found, X[low:high])
        assert found.data_ptr() % 64 == 0


def test_what_is_not_there(stored: StoredArrays) -> None:
    with pytest.raises(CheckpointError, match=r"'state\.x' has 7 rows, but 8 are needed"):
        stored.rows("state.x", 6, 8)
    with pytest.raises(KeyError):
        stored["y"]
    stored.paths[1].write_bytes(b"no arrays")
    with pytest.raises(CheckpointError, match=r"cannot read '.*1\.safetensors'"):
        stored.rows("state.x", 2, 3)
    assert torch.equal(stored.rows("state.x", 0, 2), X[:2])
    stored.paths[0].unlink()
    with pytest.raises(CheckpointError, match=r"cannot read '.*0\.safetensors'"):
        StoredArrays(stored.paths)
