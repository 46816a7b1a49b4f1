"""Four real ranks over gloo; what they check is in checks.py and checks_optimizer.py.

One start serves all, because starting costs the most.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gossamer

HERE = Path(__file__).parent
SIZE = 4
LIMIT_SECONDS = 280
MODULES = ("checks", "checks_optimizer")
NAMES = re.findall(r"^def (check_\w+)", "".join((HERE / f"{name}.py").read_text() for name in MODULES), re.MULTILINE)
RUN: dict[str, Any] = {
    "seed": 3,
    "rounds": 4,
    "workload": {"name": "least-squares", "dim": 6, "num_samples": 20, "heterogeneity": 1.0},
    "train": {"steps": 3, "batch_size": 20, "lr": 0.05, "optimizer": {"name": "adamw", "state": "keep"}},
}
OUTER: list[dict[str, Any]] = [
    {"algorithm": {"name": "gasloc", "gamma": 0.4}, "peers": {"num": SIZE, "topology": "od-equidyn"}},
    {"algorithm": {"name": "noloco"}, "peers": {"num": SIZE, "topology": "random-match"}},
    {"algorithm": {"name": "diloco"}, "clients": {"num": SIZE, "per_round": SIZE}},
    {
        "algorithm": {"name": "streaming-diloco", "fragments": 3, "alpha": 0.4},
        "clients": {"num": SIZE, "per_round": SIZE},
        "workload": {
            "name": "image-classification",
            "dataset": {"name": "synthetic", "num_train": 20 * SIZE, "num_test": 4},
            "model": {"name": "mlp", "hidden": [4]},
        },
        "train": RUN["train"] | {"precision": "float64"},
    },
]


def reference(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the models that a run of the simulator ends with: of all peers, or the server's."""
    run = gossamer.run(config, out=folder)
    loaded = gossamer.load(run.directory)
    models = [loaded.state_dict(peer=peer) for peer in (range(SIZE) if "peers" in config else [None])]
    as_json = [{name: value.tolist() for name, value in model.items()} for model in models]
    return {"config": config, "models": as_json}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return what each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    references = [reference(RUN | outer, folder / outer["algorithm"]["name"]) for outer in OUTER]
    (folder / "references.json").write_text(json.dumps(references))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(gossamer.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "REFERENCES": str(folder / "references.json"),
    }
    command = [sys.executable, str(HERE / "launch.py"), str(SIZE), str(folder), *MODULES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks(found: list[dict[str, str]], name: str) -> None:
    assert {rank: each.get(name, "never ran") for rank, each in enumerate(found) if each.get(name) != ""} == {}
