"""A package of somebody else's: installed by pip, found by its entry points, trained from its files."""

from __future__ import annotations

import importlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gossamer
from gossamer import registry
from gossamer.cli.main import app

PACKAGE = Path(__file__).parent / "plugins" / "gossamer-playground"


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Install a copy, because setuptools writes beside the sources, into a folder of its own; return the copy."""
    copy, target = tmp_path_factory.mktemp("source") / PACKAGE.name, tmp_path_factory.mktemp("site-packages")
    shutil.copytree(PACKAGE, copy)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True, timeout=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(target)
        importlib.invalidate_caches()
        yield copy
    for name in [name for name in sys.modules if name.partition(".")[0] == "gossamer_playground"]:
        del sys.modules[name]


def test_its_names_are_known() -> None:
    assert "activity" in registry.names("workload")
    assert registry.module_of("clips", "bouncing-ball") == "gossamer_playground.ball"


def test_its_options_are_described() -> None:
    done = CliRunner().invoke(app, ["describe", "workload", "activity"])
    assert done.exit_code == 0
    assert "names joined by +" in done.output


def test_it_keeps_the_contract(installed: Path) -> None:
    """By the three lines that its authors would write."""
    runpy.run_path(str(installed / "check_contract.py"))["test_contract"]()


def test_its_workload_is_trained_from_a_file(installed: Path, tmp_path: Path) -> None:
    """By clients of two sizes and unequal modalities, and each modality is of use."""
    done = gossamer.run(installed / "activity.yaml", out=tmp_path / "run")
    first, last = done.metrics[0], done.metrics[-1]
    assert last["accuracy"] > 0.8
    lacking = [last[f"accuracy_without_{name}"] for name in ("acceleration", "rotation", "note")]
    assert np.mean(lacking) < last["accuracy"]
    assert last["pace_error"] < first["pace_error"] / 2


def test_its_model_is_trained_on_its_data_from_a_file(installed: Path, tmp_path: Path) -> None:
    done = gossamer.run(installed / "ball.yaml", out=tmp_path / "run")
    assert done.metrics[-1]["direction_accuracy"] > 0.75
    assert done.metrics[0]["direction_accuracy"] < done.metrics[-1]["direction_accuracy"]
