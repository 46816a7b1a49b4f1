"""Ranks on CUDA devices: NCCL with a device each, gloo with one that they share, and runs of engine collective."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gossamer

HERE = Path(__file__).parent
LAUNCH = HERE.parent / "distributed" / "launch.py"
LIMIT_SECONDS = 240
NUM_DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.skipif(not NUM_DEVICES, reason="this machine has no CUDA device"),
    pytest.mark.timeout(LIMIT_SECONDS + 30),
    pytest.mark.xdist_group("cuda"),
]

SYNTHETIC = {"name": "synthetic", "num_train": 90, "num_test": 20, "noise": 2.0}
BASE: dict[str, Any] = {
    "rounds": 3,
    "workload": {"name": "image-classification", "dataset": SYNTHETIC, "model": {"name": "mlp", "hidden": [16]}},
    "train": {"lr": 0.1, "batch_size": 8},
    "engine": {"modes": "auto", "device": "cuda"},
}
RUNS: dict[str, dict[str, Any]] = {
    "scaffold": BASE | {"algorithm": "scaffold", "clients": {"num": 8, "per_round": 5}},
    "dsgt": BASE
    | {"algorithm": "dsgt", "peers": {"num": 6, "topology": "ring"}, "train": BASE["train"] | {"steps": 1}},
}


def environment(**more: str) -> dict[str, str]:
    """Return the environment of ranks, in which the package and the checks are found."""
    paths = [str(Path(gossamer.__file__).parents[1]), str(HERE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_distributed(backend: str, tmp_path: Path) -> None:
    size = min(NUM_DEVICES, 4) if backend == "nccl" else 2
    if size < 2:
        pytest.skip("NCCL needs a CUDA device for each rank, and this machine has one")
    command = [sys.executable, str(LAUNCH), str(size), str(tmp_path), "checks_cuda"]
    done = subprocess.run(
        command, env=environment(BACKEND=backend), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 5
        assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("name", RUNS)
def test_engine(name: str, tmp_path: Path) -> None:
    """Gradients on the device, on two ranks as on the local engine."""
    config = RUNS[name]
    local = gossamer.run(config | {"engine": config["engine"] | {"workers": 0}}, out=tmp_path / "local")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "gossamer", "run", "config.yaml", "--engine", "collective"]
    done = subprocess.run(
        [*command, "--out", "ranks"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = gossamer.load(tmp_path / "ranks").params
    assert list(found) == list(local.params)
    for key, value in local.params.items():
        assert torch.allclose(value, found[key], rtol=1e-5, atol=1e-6), key
