"""Runs under torchrun have the bits of the local engine, and stop, fail and go on as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open

import gossamer
from gossamer import experiment
from gossamer.engines.collective.engine import require_enough
from gossamer.engines.collective.peers import blocks_of_ranks
from gossamer.errors import ConfigError
from gossamer.storage.runlog import read_metrics

SYNTHETIC = {"name": "synthetic", "num_train": 90, "num_test": 20, "noise": 2.0}
IMAGES = {"name": "image-classification", "dataset": SYNTHETIC, "model": {"name": "mlp", "hidden": [16]}}
LEVELS = [0.25, 0.5, 1.0]
STACKED = [{"capacity": level, "stacked": True, "padding": True} for level in LEVELS]
CLIENTS = {
    "rounds": 3,
    "workload": IMAGES,
    "clients": {"num": 8, "per_round": 5},
    "train": {"lr": 0.1, "batch_size": 8},
    "engine": {"modes": "auto"},
}
PEERS = {
    "rounds": 3,
    "workload": IMAGES,
    "peers": {"num": 9, "topology": "od-equidyn"},
    "train": {"lr": 0.1, "batch_size": 8},
    "engine": {"modes": "auto"},
    "evaluation": {"num_peers": 3},
}
RUNS: dict[str, dict[str, Any]] = {
    "fedrolex": CLIENTS
    | {"algorithm": "fedrolex", "submodel": {"capacities": LEVELS}, "evaluation": {"by_capacity": True}}
    | {"engine": {"modes": STACKED}},
    "private state": CLIENTS | {"algorithm": "scaffold"},
    "personal parameters": CLIENTS
    | {"algorithm": "fedrolex", "evaluation": {"num_clients": 3}, "submodel": {"capacities": [0.5, 1.0]}}
    | {"clients": {"num": 8, "per_round": 5, "personal": ["output.*"]}, "engine": {"modes": STACKED[1:]}},
    "ranked channels": CLIENTS | {"algorithm": "fiarse", "submodel": {"capacities": LEVELS}},
    "rows of factors": CLIENTS
    | {
        "algorithm": "flexlora",
        "submodel": {"capacities": LEVELS},
        "workload": {**IMAGES, "lora": {"rank": 4, "targets": ["hidden0"]}},
    },
    "representations": CLIENTS
    | {
        "algorithm": {"name": "creamfl", "public_batch_size": 8},
        "workload": {
            "name": "audio-visual-digits",
            "dataset": {"bands": 8, "frames": 8, "num_public": 12},
            "modalities": {"image+audio": 0.5, "image": 0.5},
            "exchange": "representations",
            "architectures": {
                "flat": {"share": 0.5},
                "deep": {"share": 0.5, "encoders": {"image": {"name": "mlp", "hidden": [8, 6]}}},
            },
        },
        "train": {"lr": 0.01, "batch_size": 4, "steps": 2},
        "evaluation": {"num_clients": 3},
    },
    "updates too large": CLIENTS
    | {
        "train": {"lr": 3000.0, "batch_size": 8},
        "aggregation": {"max_update_norm_ratio": 30},
        "clients": {"num": 8, "per_round": 5, "quorum": 0.1},
    },
    "peers": PEERS | {"algorithm": "dsgd"},
    "windowed peers": PEERS | {"algorithm": "dsgd", "submodel": {"capacities": LEVELS}, "engine": {"modes": STACKED}},
    "push-sum": PEERS | {"algorithm": "push-sum", "peers": {"num": 9, "topology": "static-exp", "final_merge": True}},
    "codes": PEERS | {"algorithm": "choco-sgd", "peers": {"num": 9, "topology": "ring"}},
}
CODECS: list[dict[str, Any]] = [
    {"name": "top-k", "share": 0.1},
    {"name": "random-k", "share": 0.1},
    {"name": "sign"},
    {"name": "int8", "rounding": "nearest"},
    {"name": "quantise", "levels": 4},
]
EVERY = """
import json, os, sys
import gossamer
from gossamer.engines.collective import peer_rank
swap, num_bytes = peer_rank.swap_rows_, [0]
def counting(*arguments):
    found = swap(*arguments)
    num_bytes[0] += found[0]
    return found
peer_rank.swap_rows_ = counting
for name, config in json.loads(sys.argv[1]).items():
    num_bytes[0] = 0
    gossamer.run(config, out=f"{sys.argv[2]}/{name}")
    with open(f"{sys.argv[2]}/{name}/bytes.{os.environ['RANK']}", "w") as file:
        file.write(str(num_bytes[0]))
"""


def on(config: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """Return a configuration on another engine."""
    return config | {"engine": config["engine"] | engine}


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start processes by torchrun if it is given options, and else as it does."""
    started: list[subprocess.Popen[str]] = []

    def start(num_ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("launch.py")), str(num_ranks), *arguments]
        if options:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *options, *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], code: int) -> str:
    """Wait for the end of a job, and return what it said of itself."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, errors
    return output + errors


def require_equal(directory: Path, expected: gossamer.Run) -> None:
    """Compare a run's final model and records with those of another."""
    params, others = (gossamer.load(path).state_dict() for path in (directory, expected.directory))
    assert list(params) == list(others)
    assert all(torch.equal(value, others[name]) for name, value in params.items())
    clocks = ("wall_seconds", "round_seconds", "phase_seconds")
    found = [{k: v for k, v in record.items() if k not in clocks} for record in read_metrics(directory)]
    assert found == [{k: v for k, v in record.items() if k not in clocks} for record in expected.metrics]


def table_in(directory: Path) -> dict[str, str]:
    """Write a table of nine row groups, of which a rank keeps the rows of its peers."""
    values = np.random.default_rng(0).normal(size=(90, 3))
    columns = {"a": values[:, 0], "b": values[:, 1], "label": (values[:, 2] > 0).astype(int)}
    pq.write_table(pa.table(columns), directory / "rows.parquet", row_group_size=10)
    return {"name": "table", "path": str(directory / "rows.parquet")}


@pytest.mark.usefixtures("recorded")
@pytest.mark.sweep(keep=0.5, at_least=1)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_bits(num_ranks: int, torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """All at once, because starting processes takes longer than what they do."""
    script = tmp_path / "every.py"
    script.write_text(EVERY)
    # One peer a rank, so that all messages cross ranks.
    alone = PEERS | {"peers": {"num": num_ranks, "topology": "complete"}, "evaluation": {}}
    coded = {
        codec["name"]: alone | {"algorithm": {"name": "choco-sgd", "compressor": codec, "gamma": 0.02}}
        for codec in CODECS
    }
    windowed = {
        f"{strategy} windows": alone
        | {"algorithm": "dsgd", "submodel": {"capacities": [0.5, 1.0], "strategy": strategy}}
        for strategy in ("rolling", "random")
    }
    runs = (
        RUNS
        | coded
        | windowed
        | {"table": PEERS | {"algorithm": "dsgd", "workload": {**IMAGES, "dataset": table_in(tmp_path)}}}
    )
    configs = {name: on(config, name="collective") for name, config in runs.items()}
    job = torchrun(num_ranks, str(script), json.dumps(configs), str(tmp_path / "collective"))
    local = {name: gossamer.run(on(config, workers=0), out=tmp_path / "local" / name) for name, config in runs.items()}
    ended(job, 0)
    for name, run in local.items():
        require_equal(tmp_path / "collective" / name, run)
    for name in coded | windowed:
        sent = [int((tmp_path / "collective" / name / f"bytes.{rank}").read_text()) for rank in range(num_ranks)]
        assert sum(sent) == local[name].metrics[-1]["total_bytes_up"]


def test_killed_and_stopped(torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """A killed rank ends the job, torchrun starts it again; another is asked to stop; then it goes on elsewhere."""
    config = PEERS | {"algorithm": "dsgd", "rounds": 6, "checkpoint": {"every_seconds": 0}}
    expected = gossamer.run(on(config, workers=0), out=tmp_path / "expected")
    (tmp_path / "faults.py").write_text(FAULTS)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(on(config, name="collective")))
    told = ended(torchrun(2, "faults.py", options=("--max-restarts", "1")), 1)
    assert "stopped after round 4" in told
    assert "rank 0 waited in vain for rank 1 (its process has ended)" in told
    assert len(read_metrics(tmp_path / "run")) == 4
    require_equal(experiment.resume(tmp_path / "run", overrides=["engine.name=local"]).directory, expected)


FAULTS = f"""
import os, signal, sys
import gossamer
from gossamer import experiment
from gossamer.cli.main import app
from gossamer.engines.training.peer_worker import PeerWorker
train, restarted = PeerWorker.train, os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
def failing(self, message):
    if os.environ["RANK"] == "1" and message["round"] == (3 if restarted else 2):
        os.kill(os.getpid(), signal.{signal.SIGTERM.name} if restarted else signal.SIGKILL)
    return train(self, message)
PeerWorker.train = failing
app(["run", "config.yaml", "--out", "run"], prog_name="gossamer")
"""


def test_goes_on_with_other_ranks(torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """From one process to three ranks, two and one process again; no rank commits the rows of another."""
    kinds = {name: RUNS[name] for name in ("push-sum", "personal parameters", "private state")}
    kinds["push-sum"] = kinds["push-sum"] | {"peers": {"num": 9, "topology": "static-exp"}}
    commits = {"rounds": 6, "checkpoint": {"every_seconds": 0}}
    runs = {name: gossamer.run(config | commits, out=tmp_path / f"whole {name}") for name, config in kinds.items()}
    for name, config in kinds.items():
        gossamer.run(config | commits | {"rounds": 2}, out=tmp_path / name)
    (tmp_path / "resume.py").write_text(RESUME)
    for num_ranks, rounds in ((3, 4), (2, 5)):
        ended(torchrun(num_ranks, "resume.py", str(rounds), *kinds), 0)
        for name, config in kinds.items():
            last = tmp_path / name / "checkpoints" / f"{rounds:08d}"
            with safe_open(last / "arrays.safetensors", framework="pt") as file:
                assert ("state.x" in file.keys()) == ("clients" in config)  # noqa: SIM118
            assert len(list(last.glob("rows-*"))) == (0 if "clients" in config else num_ranks)
    assert len({path.name.split(".")[1] for path in (tmp_path / "private state/clients").iterdir()}) > 1
    for name, expected in runs.items():
        overrides = ["engine.name=local", "engine.workers=0", "rounds=6"]
        require_equal(experiment.resume(tmp_path / name, overrides=overrides).directory, expected)


RESUME = """
import sys
from gossamer import experiment
for name in sys.argv[2:]:
    experiment.resume(name, overrides=["engine.name=collective", f"rounds={sys.argv[1]}"])
"""


def test_a_plug_in_that_fails_at_one_rank(torchrun: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    """One sentence, by rank 0, and both end."""
    (tmp_path / "broken.py").write_text(BROKEN)
    model = {**IMAGES, "model": "broken:Net"}
    config = CLIENTS | {"workload": model, "engine": {"name": "collective", "modes": "auto"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    told = ended(torchrun(2, "-m", "gossamer", "run", "config.yaml", "--out", "run", "--trust"), 1)
    assert told.count("error: ") == 1
    assert "error: rank 1: plug-in 'broken' fails with ArithmeticError: cannot count" in told


BROKEN = """
import os
from torch import nn
class Net(nn.Module):
    def __init__(self, shape, num_classes):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
    def forward(self, x):
        if os.environ["RANK"] == "1" and len(x) == 8:  # a batch of training
            raise ArithmeticError("cannot count")
        return self.linear(x.flatten(1))
"""


def test_without_torchrun(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine collective runs on the processes that torchrun starts"):
        gossamer.run(on(CLIENTS, name="collective"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="3 ranks, but there are only 2 peers: start 2 or fewer"):
        require_enough(3, 2, "peers")


@pytest.mark.parametrize(("num_peers", "num_ranks"), [(5, 5), (9, 2), (1000, 3), (65, 4)])
def test_blocks_of_ranks(num_peers: int, num_ranks: int) -> None:
    """Blocks are aligned, cover all peers in order, and no rank has much more than another."""
    blocks = blocks_of_ranks(num_peers, num_ranks)
    every = [bound for of_rank in blocks for bound in of_rank]
    assert [low for low, _ in every] == [0, *(high for _, high in every[:-1])]
    assert every[-1][1] == num_peers
    size = every[0][1]
    assert size & (size - 1) == 0
    assert all(low % size == 0 and high - low <= size for low, high in every)
    assert all(of_rank for of_rank in blocks)
    counts = [of_rank[-1][1] - of_rank[0][0] for of_rank in blocks]
    assert max(counts) - min(counts) <= 2 * size
