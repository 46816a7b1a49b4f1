"""What somebody does on the first day: the scripts below experiments/first-day, at a small size."""

from __future__ import annotations

import ast
import json
import os
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gossamer.storage.runlog import read_config, read_metrics

FOLDER = Path(__file__).parent.parent / "experiments" / "first-day"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
MAX_LINES = 15
Trained = Callable[..., float]


@pytest.fixture
def trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., float]:
    """Return what runs a script in an empty folder, and returns the last accuracy."""

    def run(script: str, *arguments: str) -> float:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        (directory,) = (tmp_path / "runs").iterdir()
        assert f"Run in runs/{directory.name}" in capsys.readouterr().out
        assert read_config(directory)["workload"]["model"]["name"].startswith("object:")
        accuracy: float = read_metrics(directory)[-1]["accuracy"]
        return accuracy

    return run


def documented(tree: ast.AST) -> list[ast.Module | ast.ClassDef | ast.FunctionDef]:
    """Return the module, and all classes and functions below."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_are_short_and_have_docstrings(script: str) -> None:
    """Lines of code are counted, which are neither blank nor of a docstring."""
    text = (FOLDER / script).read_text()
    docstrings = set[int]()
    for node in documented(ast.parse(text)):
        assert ast.get_docstring(node), node
        docstrings |= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    code = [line for number, line in enumerate(text.splitlines(), start=1) if line.strip() and number not in docstrings]
    assert 5 < len(code) <= MAX_LINES


def test_cifar10(trained: Trained) -> None:
    if not (Path(os.environ.get("GOSSAMER_DATA", "nowhere")) / "cifar10").is_dir():
        pytest.skip("GOSSAMER_DATA has no folder cifar10")
    small = ["rounds=1", "workload.dataset.limit=100", "workload.model.width=2", "clients.per_round=2"]
    trained("cifar10_resnet.py", *small, "evaluation.every=1", "train.batch_size=5")


def test_fifty_peers(trained: Trained) -> None:
    assert trained("fifty_peers.py", "rounds=8") > 0.5


def test_a_folder_of_images(tmp_path: Path, trained: Trained) -> None:
    from PIL import Image

    source = np.random.default_rng(0)
    for name, shade in (("dark", 60), ("light", 190)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = source.normal(shade, 20, (12, 10 + number % 3, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    lists = {"anna": [0, 1, 2, 16, 17], "bert": [3, 4, 18, 19], "carl": [5, 20, 21]}
    (tmp_path / "parts.json").write_text(json.dumps(lists))
    assert trained("image_folder.py", "images", "parts.json", "rounds=3") > 0.9
