"""`gossamer coverage`: what is told before a run agrees with what windows a run has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from federation import configure, modes
from gossamer import run
from gossamer.build import build
from gossamer.cli.main import app
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.reports import window_coverage
from gossamer.submodel import window
from gossamer.submodel.coverage import Coverage

TWO_LAYERS = {"name": "mlp", "hidden": [16, 16]}
SUBMODEL = {"workload.model": TWO_LAYERS, "submodel": {"capacities": [0.25, 0.5]}, "rounds": 40}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Write an experiment of two methods with two seeds."""
    path = tmp_path / "experiment.yaml"
    methods = {"rolling": {"algorithm": "fedrolex"}, "covering": {"submodel.strategy": "covering"}}
    data = configure(SUBMODEL) | {"methods": methods, "seeds": [0, 1]}
    del data["engine"]
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def shares(strategy: str, capacity: float, rounds: int) -> tuple[float, float]:
    """Return the shares of the hidden channels and of all weights of the perceptron, by brute force."""
    first, second = np.zeros(16, bool), np.zeros(16, bool)
    square = np.zeros((16, 16), bool)
    for number in range(rounds):
        one, two = (window(strategy, 16, capacity, number, group=group).indices for group in (0, 1))
        first[one], second[two] = True, True
        square[np.ix_(two, one)] = True
    pixels, classes = 64, 10
    held = first.sum() * (pixels + 1) + square.sum() + second.sum() * (1 + classes) + classes
    return float((first.mean() + second.mean()) / 2), held / (16 * (pixels + 1) + 16 * 17 + classes * 17)


class TestExamine:
    @pytest.mark.parametrize("rounds", [3, 40])
    def test_agrees_with_brute_force(self, experiment: Path, rounds: int) -> None:
        for one in window_coverage.examine(experiment, rounds=rounds):
            for reach in one.reaches[:-1]:
                assert isinstance(reach.capacity, float)
                expected = shares(one.strategy, reach.capacity, rounds)
                assert (reach.channels, reach.weights) == pytest.approx(expected)

    def test_says_when_everything_was_reached(self, experiment: Path) -> None:
        rolling, covering = window_coverage.examine(experiment)
        assert [reach.capacity for reach in rolling.reaches] == [0.25, 0.5, window_coverage.ALL]
        assert [reach.weights_after for reach in rolling.reaches] == [None, None, None]
        assert [reach.channels_after for reach in rolling.reaches[:2]] == [13, 9]
        assert [(reach.weights_after, reach.bound) for reach in covering.reaches[:2]] == [(16, 16), (4, 4)]

    def test_a_ranking_strategy_is_refused(self, experiment: Path) -> None:
        with pytest.raises(ConfigError, match="'magnitude' follow the model as it is trained"):
            window_coverage.examine(experiment, ["submodel.strategy=magnitude", "methods=null"])

    @pytest.mark.parametrize("rounds", [0, 10**11])
    def test_no_or_too_many_rounds_are_refused(self, experiment: Path, rounds: int) -> None:
        with pytest.raises(ConfigError, match=f"^coverage of {rounds} rounds: give --rounds from 1 to 1000000"):
            window_coverage.examine(experiment, rounds=rounds)


class TestCommand:
    def run(self, *arguments: Any) -> str:
        result = CliRunner().invoke(app, ["coverage", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    def test_table_and_picture(self, experiment: Path, tmp_path: Path) -> None:
        image = tmp_path / "window_coverage.png"
        output = self.run(experiment, "-o", image)
        assert "rolling: strategy rolling, 40 rounds" in output
        assert "round 16  16" in output
        assert output.splitlines()[-1] == str(image)
        assert image.read_bytes().startswith(b"\x89PNG")

    def test_an_image_of_no_known_format_is_refused_first(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, ["coverage", "no-such-file.yaml", "-o", str(tmp_path / "window_coverage.gif")])
        assert result.exit_code == 2
        assert "window_coverage.gif': give a name that ends in .png" in result.output

    def test_json(self, experiment: Path) -> None:
        found = json.loads(self.run(experiment, "--json", "--rounds", 4))["methods"]
        assert set(found) == {"rolling", "covering"}
        assert found["covering"]["reaches"][1]["weights"] == 1.0

    def test_random_windows_follow_the_plan(self, experiment: Path) -> None:
        output = self.run(experiment, "methods=null", "seeds=null", "algorithm=federated-dropout", "--json")
        reaches = json.loads(output)["methods"][""]["reaches"]
        assert 0.25 < reaches[0]["weights"] <= reaches[1]["weights"] <= 1.0


def test_participants_are_those_of_the_run(tmp_path: Path) -> None:
    """Devices that come and go: who takes part depends on the simulated time that the rounds before took."""
    changes = SUBMODEL | {"rounds": 12, "clients": {"num": 8, "per_round": 3, "quorum": 0}, "algorithm": "fedrolex"}
    changes |= {
        "submodel": {"capacities": [0.25, 0.5]},
        "devices": [
            {"profile": {"availability": {"trace": [[10, 70]]}}, "capacity": 0.5},
            {"profile": {"availability": {"trace": [[40, 40]]}, "latency_seconds": 10}, "capacity": 0.25},
        ],
    } | modes((0.25, 0.5))
    data = configure(changes)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(data))
    seen, now = Coverage(build(parse(data)).workload.layout), 0.0
    parts = build(parse(data))
    for record in run(data, out=tmp_path / "run").metrics:
        timed = parts.planner.phases(record["round"] - 1, now)[0]
        now = record["simulated_seconds"]
        for client, variant in zip(timed.plan.client, timed.plan.variant, strict=True):
            capacity = parts.task.capacities[variant]
            seen.add(parts.task.cutter.cut(capacity, timed.plan.round, int(client)))
    (found,) = window_coverage.examine(path)
    assert (found.reaches[-1].channels, found.reaches[-1].weights) == (seen.channels, seen.weights)
    assert found.reaches[-1].curve[-1][0] == 12


def test_says_that_label_rows_need_their_label(experiment: Path) -> None:
    told = "rows of labels count as reached, though only clients that hold a label train its row"
    assert window_coverage.render(window_coverage.examine(experiment, rounds=2), False).endswith(told)
    assert told not in window_coverage.render(
        window_coverage.examine(experiment, ["submodel.mask_labels=false"], rounds=2), False
    )
