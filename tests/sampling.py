"""Samples of parametrised sweeps: which cases of a test run today, drawn by a seed that changes with the commit.

A sweep is a test marked ``@pytest.mark.sweep(keep=0.25)``: a quarter of its cases run, all of them with
``--all-sweeps``, or where tests are named one by one. Cases of different *kinds* belong into different tests, or tell
their kind by an argument of their own, since every value of an argument stays for which there is room; the kind may be
that of several arguments ``together=("name", "other")``.
"""

from __future__ import annotations

import math
import random
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import pytest

NO_COMMIT = "none"  # the seed outside of a repository


def commit(directory: Path) -> str:
    """Return the short name of the commit that is checked out, or `NO_COMMIT`."""
    command = ["git", "-C", str(directory), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return NO_COMMIT


def sample(cases: Sequence[Mapping[str, Hashable]], keep: float, seed: str, at_least: int = 2) -> list[int]:
    """Choose the cases of one sweep that run.

    Args:
        cases: values of each case's arguments.
        keep: share of the cases, above 0; rounded up.
        seed: what the choice depends on.
        at_least: number of cases that are chosen if there are as many.

    Returns:
        Indices of the chosen cases, ascending. Every value of an argument is among them if the argument takes no
        more values than cases are chosen, and as far as the values of several such arguments fit in together.
    """
    number = min(len(cases), max(at_least, math.ceil(keep * len(cases))))
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    values = {(name, value) for case in cases for name, value in case.items()}
    names = [name for name, _ in values]
    missing = {(name, value) for name, value in values if names.count(name) <= number}
    chosen: list[int] = []
    while len(chosen) < number:
        best = max(order, key=lambda index: len(missing.intersection(cases[index].items())))  # the first of the best
        order.remove(best)
        chosen.append(best)
        missing.difference_update(cases[best].items())
    return sorted(chosen)


def left_out(items: Sequence[pytest.Item], seed: str) -> set[pytest.Item]:
    """Return the items that are left out of sweeps."""
    sweeps: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("sweep") and hasattr(item, "callspec"):
            sweeps.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped: set[pytest.Item] = set()
    for name, cases in sweeps.items():
        marker = cases[0].get_closest_marker("sweep")
        assert marker is not None
        options = dict(marker.kwargs)
        together = options.pop("together", ())
        chosen = sample([arguments(case, together) for case in cases], seed=f"{seed} {name}", **options)
        dropped.update(case for index, case in enumerate(cases) if index not in chosen)
    return dropped


def arguments(case: pytest.Function, together: Sequence[str]) -> dict[str, Hashable]:
    """Return what tells the values of a case's arguments apart, those that count `together` as one more argument."""
    values: dict[str, Hashable] = {name: repr(value) for name, value in case.callspec.params.items()}
    return values | ({"together": tuple(values[name] for name in together)} if together else {})
