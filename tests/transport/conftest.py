"""A provisioned federation of two clients, and a stranger of the same names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gossamer.transport.provisioning import provision

FEDERATION = "name: hospitals\nserver: {hosts: [fl.example.org]}\nnodes: [charite, ucsf]\n"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("federations")
    (root / "FEDERATION.yaml").write_text(FEDERATION)
    for name in ("federation", "stranger"):
        provision(root / "FEDERATION.yaml", root / name)
    return root


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A federation of one's own, and beside it another one of the same names."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy" / "federation"
