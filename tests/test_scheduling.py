"""What xdist hands out: files, those of a shared fixture together, and first what takes long."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduling import LONG, SHARED, shared, turn

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("name", "fixture"), [("engines/ray/test_ray_peers.py", 0), ("test_sweep.py", 0), ("workloads/test_images.py", 1)]
)
def test_files_of_a_shared_fixture_belong_together(name: str, fixture: int) -> None:
    assert shared(HERE / name) == SHARED[fixture]


def test_other_files_are_alone() -> None:
    assert shared(HERE / "test_docs.py") is None


def test_what_is_long_exists_and_comes_first() -> None:
    files = [path.relative_to(HERE).as_posix() for path in HERE.rglob("test_*.py")]
    assert [name for name in LONG if not any(file.startswith(name) for file in files)] == []
    turns = [turn(f"tests/{name}") for name in ("engines/ray/test_cluster.py", "engines/test_slots.py", "fuzz/x.py")]
    assert turns == sorted(set(turns))
    assert turns[-1] == len(LONG)
