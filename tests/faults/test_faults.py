"""Runs are struck at random and end as if nothing had happened: a short form of benchmarks/faults.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from federation import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"
KINDS = {"kill-at-boundary", "kill-driver", "kill-in-round", "stop"}


def strike(experiment: str, num_faults: int, engine: str = "ray") -> dict[str, Any]:
    """Strike at one experiment, and return what the script reports."""
    command = [sys.executable, str(SCRIPT), "--engine", engine, "--faults", str(num_faults)]
    command += ["--experiments", experiment]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["all_equal"]
    assert report["faults"] == sum(report["fired"].values()) == num_faults
    return report


@pytest.mark.xdist_group("ray")
@pytest.mark.sweep(keep=0.3, at_least=1)
@pytest.mark.parametrize("experiment", ["fedrolex", "peers", "cluster"])
def test_every_kind_of_blow(experiment: str) -> None:
    """Clients, or peers, on a Ray of their own, that goes when its driver is killed; a cluster that loses a node."""
    kinds = KINDS | ({"kill-node"} if experiment == "cluster" else set())
    report = strike(experiment, len(kinds))
    assert set(report["fired"]) == kinds
    assert report["left_behind"] == []
    found = report["experiments"][experiment]
    assert found["actors_replaced"] > 0
    assert found["retries"] > 0
    assert found["actors_gone_seconds"] < 60


@pytest.mark.xdist_group("torchrun")
@pytest.mark.sweep(keep=0.5, at_least=1)
@pytest.mark.parametrize("experiment", ["scaffold", "dsgt"])
def test_every_kind_of_fault_of_ranks(experiment: str) -> None:
    """Killed or stopped amid an exchange, killed inside a commit, asked to stop, refused by the disk."""
    report = strike(experiment, 5, "collective")
    assert len(report["fired"]) == 5
    assert report["hung"] == 0
