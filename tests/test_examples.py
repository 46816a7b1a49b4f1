"""The examples in docstrings run, and say what happens."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gossamer

SOURCE = Path(gossamer.__file__).parent


def modules() -> list[str]:
    """Return the names of all modules with an example."""
    paths = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(["gossamer", *path.relative_to(SOURCE).with_suffix("").parts]) for path in paths]


def run_examples(name: str) -> dict[str, object]:
    """Run the examples of a module; return what those of its own docstring define."""
    module, own = importlib.import_module(name), dict[str, object]()
    for test in doctest.DocTestFinder().find(module):
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        result = runner.run(test, clear_globs=False)
        assert result.failed == 0
        own = test.globs if test.name == name else own
    return own


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    run_examples(name)


def test_toys_train_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = ModuleType("toy")
    for base in ("gossamer.algorithms.base", "gossamer.workloads.base"):
        vars(toy).update(run_examples(base))
    monkeypatch.setitem(sys.modules, "toy", toy)
    config = {
        "rounds": 20,
        "workload": "toy:Points",
        "clients": {"num": 8, "per_round": 4},
        "train": {"lr": 0.1, "batch_size": 3},
        "algorithm": {"name": "toy:MajorityVote", "size": 0.02},
        "engine": {"workers": 1},
    }
    losses = [record["loss"] for record in gossamer.run(config, out=tmp_path / "run", trust=True).metrics]
    assert losses[-1] < losses[0]
