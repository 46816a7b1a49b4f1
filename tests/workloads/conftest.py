"""Real image sets, which take seconds to decode, are read once in each process; one worker has all tests of them."""

from __future__ import annotations

from functools import cache

import pytest

from gossamer.workloads import datasets
from gossamer.workloads.datasets_hub import load

load_once = cache(load)


@pytest.fixture
def decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let image sets come from memory if a test has read them before."""
    monkeypatch.setattr(datasets, "load", load_once)
