"""Private state on a client's own disk: what holds is what the server names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.engines.network.private import PrivateState
from gossamer.errors import CheckpointError

ME = torch.tensor([5])


def written(directory: Path, when: tuple[int, int], value: float, kept: tuple[int, int] | None = None) -> None:
    state = PrivateState(directory, kept)
    state.put("c", ME, torch.full((1, 3), value))
    state.write(when)


def read(directory: Path, kept: tuple[int, int] | None) -> float | None:
    rows, present = PrivateState(directory, kept).get("c", ME)
    return float(rows[0, 0]) if bool(present) else None


def test_what_is_named_holds(tmp_path: Path) -> None:
    written(tmp_path, (0, 0), 1.0)
    written(tmp_path, (3, 1), 2.0, (0, 0))
    assert read(tmp_path, None) is None
    assert read(tmp_path, (0, 0)) == 1.0, "the update of round 4 was not used"
    assert read(tmp_path, (3, 1)) == 2.0
    written(tmp_path, (3, 1), 4.0, (0, 0))
    assert read(tmp_path, (3, 1)) == 4.0, "it was trained again"


def test_what_no_commit_needs_is_deleted(tmp_path: Path) -> None:
    for round in range(4):
        written(tmp_path, (round, 0), float(round))
    PrivateState(tmp_path, (3, 0)).forget((2, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2-0.safetensors", "3-0.safetensors"]


def test_lost_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="private state of round 8"):
        PrivateState(tmp_path, (7, 0))
    (tmp_path / "7-0.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError, match="private state of round 8"):
        PrivateState(tmp_path, (7, 0))
