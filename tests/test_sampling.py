"""Samples of sweeps: drawn by the seed alone, large enough, and with every value for which there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from sampling import NO_COMMIT, commit, sample

GRID = [{"name": name, "number": number} for name, number in product(range(26), range(7))]
SIMPLE = [{"file": number} for number in range(40)]


def test_the_seed_decides() -> None:
    assert sample(GRID, 0.3, "a") == sample(GRID, 0.3, "a")
    assert len({tuple(sample(GRID, 0.3, seed)) for seed in "abcdefgh"}) == 8


def test_the_same_in_every_process() -> None:
    """Workers of xdist must collect the same tests, whatever the order of their sets."""
    program = f"from sampling import sample; print(sample({GRID!r}, 0.3, 'a'))"
    for number in ("1", "2"):
        variables = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": number}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=variables)
        assert done.stdout == f"{sample(GRID, 0.3, 'a')}\n"


@pytest.mark.parametrize("seed", "abc")
def test_every_value_stays_if_there_is_room(seed: str) -> None:
    chosen = [GRID[index] for index in sample(GRID, 0.25, seed)]
    assert len(chosen) == 46
    assert {case["name"] for case in chosen} == set(range(26))
    assert {case["number"] for case in chosen} == set(range(7))
    few = [GRID[index] for index in sample(GRID, 0.05, seed)]  # ten cases, for seven numbers but not for 26 names
    assert {case["number"] for case in few} == set(range(7))


def test_every_case_has_its_turn() -> None:
    turns = [set(sample(SIMPLE, 0.2, str(seed))) for seed in range(60)]
    assert {len(turn) for turn in turns} == {8}
    assert set.union(*turns) == set(range(40))


@pytest.mark.parametrize(("keep", "at_least", "expected"), [(0.01, 2, 2), (0.01, 50, 40), (1.0, 2, 40), (0.11, 1, 5)])
def test_number_of_cases(keep: float, at_least: int, expected: int) -> None:
    assert len(sample(SIMPLE, keep, "a", at_least)) == expected


def test_outside_of_a_repository(tmp_path: Path) -> None:
    assert commit(tmp_path) == NO_COMMIT


@pytest.mark.sweep(keep=0.1, at_least=6, together=("phase", "is_start"))
@pytest.mark.parametrize("case", range(10))
@pytest.mark.parametrize(("phase", "is_start"), list(product(["train", "exchange", "commit"], [True, False])))
def test_kinds_of_two_arguments(request: pytest.FixtureRequest, phase: str, is_start: bool, case: int) -> None:
    """Six of sixty cases, and all six kinds are among them."""
    if not request.config.option.all_sweeps:
        prefix = request.node.originalname + "["
        others = [item.callspec.params for item in request.session.items if item.name.startswith(prefix)]
        assert len({(params["phase"], params["is_start"]) for params in others}) == len(others) == 6


@pytest.mark.sweep(keep=0.1)
@pytest.mark.parametrize("case", range(40))
def test_a_sweep(case: int) -> None:
    assert 0 <= case < 40


def test_this_session_samples_the_sweep_above(request: pytest.FixtureRequest) -> None:
    found = [item.callspec.params["case"] for item in request.session.items if item.name.startswith("test_a_sweep[")]
    if request.config.option.all_sweeps:
        assert len(found) in (0, 40)  # none if this test alone was asked for
    else:
        name = request.node.nodeid.rpartition("::")[0] + "::test_a_sweep"
        assert found == sample(SIMPLE, 0.1, f"{request.config.option.sweep_seed} {name}")
