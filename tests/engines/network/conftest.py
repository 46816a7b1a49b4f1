"""What tests of the network engine share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nodes import Nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Nodes that end with the test."""
    made = Nodes(tmp_path / "nodes")
    yield made
    made.end()
