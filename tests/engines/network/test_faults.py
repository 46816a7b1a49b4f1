"""Servers, clients, peers and lines fail, and runs end as if nothing had happened: benchmarks/faults.py in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from federation import environment

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "faults.py"
KINDS = {
    "clients that are killed or stopped": ["kill-client-in-training", "kill-client-in-sending", "stop-client"],
    "servers that are killed or restarted": ["kill-server-in-commit", "kill-server-in-round", "restart-server"],
    "lines that are slow or cut": ["slow-client", "cut-cable"],
    "disks that are full": ["full-disk-at-server", "full-disk-at-client"],
    "clients that are late": ["late-client", "late-slow-client"],
    "peers that are killed": ["kill-peer-in-training", "kill-peer-in-sending", "kill-peer-in-commit"],
    "peers that are stopped, slow or cut off": ["stop-peer", "slow-peer", "cut-peers"],
    "peers that are absent": ["absent-peer", "absent-slow-peer", "absent-cut-peers"],
    "peers whose disks are full": ["full-disk-at-peer"],
}


@pytest.mark.sweep(keep=0.2, at_least=1)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_fault(name: str) -> None:
    kinds = KINDS[name]
    command = [sys.executable, str(SCRIPT), "--engine", "network", "--faults", str(len(kinds)), "--kinds", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["all_equal"]
    assert set(report["fired"]) == set(kinds) - set(report["left_out"])
    assert report["faults"] == len(kinds)
    assert report["hung"] == 0
