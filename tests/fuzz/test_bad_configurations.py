"""A sample of bad configurations; ``python tests/fuzz/trials.py`` tries thousands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fuzz.configurations import FILES, GOOD, bad
from fuzz.trials import try_one, warm_up

NUMBER = 40


def test_the_good_ones_run(tmp_path: Path) -> None:
    warm_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {*FILES, *map(str, range(len(GOOD)))}


def test_a_seed_gives_the_same_files() -> None:
    assert bad("a-1") == bad("a-1")
    assert len({bad(f"a-{number}")["e.yaml"] for number in range(50)}) > 40


def test_bad_ones_end_in_a_sentence(
    tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seeds change with the commit."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    problems = []
    for number in range(NUMBER):
        folder = tmp_path / str(number)
        os.mkdir(folder)
        outcome = try_one(f"{pytestconfig.option.sweep_seed}-{number}", folder)
        if outcome.problem is not None:
            problems.append(outcome)
    assert problems == []
