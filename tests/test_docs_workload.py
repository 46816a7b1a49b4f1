"""The workload that docs/workloads.md writes from an empty folder keeps its contract and is trained from its file."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import gossamer
from gossamer.testing import check_workload

PAGE = Path(__file__).parent.parent / "docs" / "workloads.md"
SECTION = "## A whole workload, from an empty folder"


def test_it_is_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text(encoding="utf-8").partition(SECTION)[2]
    code, config = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    assert code is not None
    assert config is not None
    (tmp_path / "weather.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        workload = importlib.import_module("weather").Weather({}, num_clients=6, partition="iid", seed=0)
        check_workload(workload)
        given = yaml.safe_load(config[1]) | {"rounds": 40, "engine": {"name": "local", "workers": 0}}
        done = gossamer.run(given, out=tmp_path / "run")
    finally:
        sys.modules.pop("weather", None)
    first, last = done.metrics[0], done.metrics[-1]
    assert last["warmth_error"] < first["warmth_error"]
    assert last["rain_accuracy"] > 0.7
    both, eyes = (last["rain_accuracy_by_holding"][f"{kind} 1"] for kind in ("eyes+ears", "eyes"))
    assert both > eyes  # rain is heard
    assert {name.partition(" ")[0] for name in last["warmth_error_by_holding"]} == {"eyes", "ears", "eyes+ears"}
    assert np.isfinite(last["train_loss"])
