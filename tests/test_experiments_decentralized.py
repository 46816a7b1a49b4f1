"""Experiments of peers: every method of theirs starts, and what is written beside them belongs to them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import gossamer
from gossamer.config.loading import expand, load, parse
from gossamer.reports.curves import find_runs
from gossamer.task import build_topology

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NAMES = ("equitopo-mnist", "base-graph-noniid")
SMALL = [
    "workload={dataset: digits, model: {name: mlp, hidden: [4]}, local_evaluation: false}",
    "peers.partition=iid",
    "train.batch_size=4",
    "seeds=[0]",
    "rounds=2",
    "evaluation.num_peers=2",
    "engine.workers=0",
]


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["config.yaml", "full.yaml"])
def test_every_method_trains(name: str, file: str, tmp_path: Path) -> None:
    gossamer.run(EXPERIMENTS / name / file, SMALL, out=tmp_path / "runs")
    distances = {}
    for run in find_runs([tmp_path / "runs"]):
        last = run.records[-1]
        assert last["round"] == 2
        assert {"accuracy", "accuracy_peers.mean", "accuracy_peers.min"} <= set(last)
        distances[str(run.config["name"])] = last["consensus_distance"]
    assert distances["complete"] < 1e-6  # the exact mean after every round, but for rounding
    assert min(value for method, value in distances.items() if method.startswith("ring")) > 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["config.yaml", "full.yaml"])
def test_evaluations_meet_every_graph_of_a_period(name: str, file: str) -> None:
    """An evaluation that always followed the exact average of a period would flatter its topology."""
    for single in expand(load(EXPERIMENTS / name / file)).values():
        config = parse(single)
        topology = build_topology(config)
        assert topology is not None
        assert math.gcd(config.evaluation.every, topology.schedule.cycle or 1) == 1


@pytest.mark.parametrize("name", NAMES)
def test_expectations_are_of_the_experiment(name: str) -> None:
    small, full = (load(EXPERIMENTS / name / file) for file in ("config.yaml", "full.yaml"))
    assert small["methods"] == full["methods"]
    expected = json.loads((EXPERIMENTS / name / "expected.json").read_text())
    assert expected["measured"]["seeds"] == small["seeds"]
    assert set(expected["measured"]["values"]) == set(small["methods"])
    for entry in expected["published"] + expected["theory"]:
        methods = {entry[key] for key in ("method", "larger", "smaller") if key in entry}
        assert methods <= set(small["methods"])
        assert all(entry["metric"] in expected["measured"]["values"][method] for method in methods)
