"""Models that are exported: names, shapes and moments come back, and nothing is overwritten by accident."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import gossamer
import user_modules
from federation import configure
from gossamer.cli.main import app

MODEL = {"workload.model": {"name": "user_modules:ResNet"}, "submodel": {"capacities": [1.0, 0.5]}}
CHANGES = MODEL | {
    "rounds": 1,
    "algorithm": "fedrolex",
    "evaluation.by_capacity": True,
    "train": {"lr": 0.1, "steps": 1},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a module with BatchNorm."""
    data = configure(CHANGES) | {"engine": {"workers": 0}}
    return gossamer.run(data, out=tmp_path_factory.mktemp("runs") / "run").directory


def test_round_trip(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    done = CliRunner().invoke(app, ["export", str(directory), "-o", str(file)])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, str(file))
    run, fresh = gossamer.load(directory), user_modules.ResNet((1, 8, 8), 10)
    fresh.load_state_dict(load_file(file), strict=True)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), run.model()(x))
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["gossamer_version"] == gossamer.__version__
    assert (header["round"], "capacity" in header) == ("1", False)
    assert json.loads(header["metrics"]) == run.metrics[-1]
    assert json.loads(header["facts"])["input_size"] == [1, 8, 8]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_sub_models(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    done = CliRunner().invoke(app, ["export", str(directory), "-o", str(file), "--capacity", "0.5"])
    assert done.exit_code == 0
    found = load_file(file)
    expected = gossamer.load(directory).state_dict(capacity=0.5)
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in expected.items()}
    assert found["bn1.running_mean"].shape == (4,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "model.pt"], "give a name that ends in .safetensors"),
        (["-o", "there.safetensors"], "is there already: choose another name, or overwrite it with --force"),
        (["-o", "new.safetensors", "--peer", "1"], "the run has a server"),
        (["-o", "new.safetensors", "--run", "fedavg"], "no run 'fedavg'"),
        (["-o", "nowhere/new.safetensors"], "cannot write"),
    ],
)
def test_refusals(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.safetensors").write_bytes(b"mine")
    done = CliRunner().invoke(app, ["export", str(directory), *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert Path("there.safetensors").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_force(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")
    assert CliRunner().invoke(app, ["export", str(directory), "-o", str(file), "--force"]).exit_code == 0
    assert "conv1.weight" in load_file(file)
