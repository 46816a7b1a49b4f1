"""The package itself: its public names, and ``python -m gossamer``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gossamer


def test_dir_lists_what_there_is() -> None:
    assert dir(gossamer) == sorted(gossamer.__all__)
    assert {"run", "resume", "Run", "aggregate", "submodel", "testing", "topology"} < set(dir(gossamer))
    for name in dir(gossamer):
        assert getattr(gossamer, name) is not None
    with pytest.raises(AttributeError, match="module 'gossamer' has no attribute 'runn'"):
        _ = gossamer.runn  # type: ignore[attr-defined]


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "gossamer", "topology", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    assert "od-equidyn" in done.stdout
