"""The public module itself: found from any folder, without pytest, and its examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PLUGIN = """
from gossamer.algorithms.federated import FedAvg
from gossamer.workloads.convex import LeastSquares

class Mine(FedAvg):
    pass

class Wrong(LeastSquares):
    def init(self, seed):
        return super().init(seed)[:-1]
"""
PROGRAM = """
import sys
import gossamer
assert not {"torch", "gossamer.testing"} & set(sys.modules)
import plugin
gossamer.testing.check_algorithm(plugin.Mine({}))
try:
    gossamer.testing.check_workload(plugin.Wrong({"dim": 3}, num_clients=2, partition="iid", seed=0))
except AssertionError as error:
    print(error)
assert "pytest" not in sys.modules
"""


def test_a_plug_in_of_a_third_party(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-O", "program.py"]  # under -O assert statements do nothing
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.stderr == ""
    assert done.stdout.startswith("init returned shape (15,), not (16,): ")
