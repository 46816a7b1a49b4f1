"""Four real ranks over gloo; what they check is in checks.py. One start serves all, because it costs the most."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer

HERE = Path(__file__).parent
SIZE = 4
LIMIT_SECONDS = 110
NAMES = re.findall(r"^def (check_\w+)", (HERE / "checks.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(Path(gossamer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "launch.py"), str(SIZE), str(folder), "checks"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks(found: list[dict[str, str]], name: str) -> None:
    assert {rank: each.get(name, "never ran") for rank, each in enumerate(found) if each.get(name) != ""} == {}
