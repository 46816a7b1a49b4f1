"""Curves: which runs belong together, and mean and extent of a metric over their seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gossamer.errors import ConfigError, DataError, GossamerWarning
from gossamer.reports.curves import Curve, SingleRun, find_runs, group, summarize


def write_run(directory: Path, accuracies: Sequence[float] = (0.5,), name: str = "digits", **config: Any) -> Path:
    """Write a run of one round for each of `accuracies`."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump({"name": name, "seed": 0} | config))
    records = [{"round": number, "accuracy": accuracy} for number, accuracy in enumerate(accuracies, start=1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def write_experiment(directory: Path, methods: Sequence[str], seeds: Sequence[int]) -> Path:
    """Write methods x seeds whose curves differ, started in the order of `methods`."""
    directory.mkdir(parents=True)
    (directory / "experiment.yaml").write_text("rounds: 6\n")
    for index, method in enumerate(methods):
        for seed in seeds:
            accuracies = np.random.default_rng([index, seed]).uniform(size=6).tolist()
            run = write_run(directory / method / f"seed-{seed}", accuracies, method, seed=seed)
            (run / "environment.json").write_text(json.dumps({"started": f"2025-01-01T00:00:{index:02}"}))
    return directory


def curves_of(*directories: Path) -> list[Curve]:
    return group(find_runs(directories))


def labels(curves: Sequence[Curve]) -> list[str]:
    return [curve.label for curve in curves]


class TestRunsFound:
    def test_methods_and_seeds_become_curves_in_the_order_of_their_start(self, tmp_path: Path) -> None:
        curves = curves_of(write_experiment(tmp_path / "exp", ["zeta", "alpha"], [0, 1, 2]))
        assert labels(curves) == ["zeta", "alpha"]
        assert [[run.config["seed"] for run in curve.runs] for curve in curves] == [[0, 1, 2], [0, 1, 2]]

    def test_peers_that_trained_together_become_one_curve(self, tmp_path: Path) -> None:
        places = [tmp_path / place for place in ("berlin/run", "paris/run", "rome/run")]
        for peer, place in enumerate(places):
            write_run(place, [0.1 * peer], engine={"name": "network", "peer": peer})
        other = write_run(tmp_path / "other", [0.5], engine={"name": "network", "peer": 0}, rounds=7)
        curves = curves_of(*places, other)
        assert [len(curve.runs) for curve in curves] == [3, 1]
        line = summarize(curves[0].runs, "accuracy", "round")
        assert line is not None
        assert (line.low[0], line.mean[0], line.high[0]) == pytest.approx((0.0, 0.1, 0.2))

    def test_a_run_without_rounds_is_left_out_with_a_warning(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg"], [0, 1])
        (experiment / "fedavg" / "seed-1" / "metrics.jsonl").write_text("")
        with pytest.warns(GossamerWarning, match=r"^no round is logged yet in .*seed-1: left out$") as told:
            runs = find_runs([experiment])
        assert len(told) == 1
        assert [run.config["seed"] for run in runs] == [0]

    def test_a_run_given_twice_counts_once(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg"], [0, 1])
        runs = find_runs(
            [experiment, experiment, experiment / "fedavg", experiment / "fedavg" / ".." / "fedavg" / "seed-1"]
        )
        assert [run.directory for run in runs] == [experiment / "fedavg" / "seed-0", experiment / "fedavg" / "seed-1"]

    def test_seeds_given_one_by_one_are_still_one_curve(self, tmp_path: Path) -> None:
        experiment = write_experiment(tmp_path / "exp", ["fedavg", "heterofl"], [0, 1])
        curves = curves_of(*sorted(experiment.glob("*/seed-*")))
        assert labels(curves) == ["fedavg", "heterofl"]
        assert [len(curve.runs) for curve in curves] == [2, 2]

    def test_one_name_in_two_directories_is_told_apart(self, tmp_path: Path) -> None:
        one, two = (write_experiment(tmp_path / name, ["fedavg"], [0]) for name in ("one", "two"))
        assert labels(curves_of(one, two)) == ["fedavg (one)", "fedavg (two)"]

    def test_directories_of_one_name_are_told_apart_by_their_paths(self, tmp_path: Path) -> None:
        one, two = (write_run(tmp_path / name / "run") for name in ("one", "two"))
        assert labels(curves_of(one, two)) == [f"digits ({one})", f"digits ({two})"]

    def test_runs_started_one_by_one_form_a_curve_if_only_their_seeds_differ(self, tmp_path: Path) -> None:
        for seed in (0, 1):
            write_run(tmp_path / f"run-{seed}", seed=seed, lr=0.1, engine={"workers": seed})
        assert [len(curve.runs) for curve in curves_of(tmp_path)] == [2]

    @pytest.mark.parametrize("second", [{"seed": 1, "lr": 0.2}, {"seed": 0, "lr": 0.1}], ids=["other lr", "same seed"])
    def test_different_or_repeated_runs_are_not_averaged(self, tmp_path: Path, second: dict[str, Any]) -> None:
        write_run(tmp_path / "a", seed=0, lr=0.1)
        write_run(tmp_path / "b", **second)
        assert labels(curves_of(tmp_path)) == ["digits (a)", "digits (b)"]

    def test_three_levels_down_and_no_further(self, tmp_path: Path) -> None:
        write_run(tmp_path / "1/2/3", name="near")
        write_run(tmp_path / "1/2/x/4", name="far")
        write_run(tmp_path / ".hidden", name="hidden")
        assert [run.name for run in find_runs([tmp_path])] == ["near"]

    def test_a_study_without_logs_is_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("rounds: 3\n")
        with pytest.raises(ConfigError, match="no run in or below"):
            find_runs([tmp_path])

    def test_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no directory '.*nothing'"):
            find_runs([tmp_path / "nothing"])

    def test_runs_without_rounds(self, tmp_path: Path) -> None:
        empty = write_run(tmp_path / "empty", [])
        with pytest.raises(ConfigError, match="no round is logged yet"):
            find_runs([empty])
        write_run(tmp_path / "full")
        assert [run.directory.name for run in find_runs([tmp_path])] == ["full"]

    def test_malformed_log(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        (run / "metrics.jsonl").write_text('no json\n{"round": 2}\n')
        with pytest.raises(DataError, match="line 1"):
            find_runs([run])


class TestSummary:
    @staticmethod
    def runs(*records: list[dict[str, float]]) -> list[SingleRun]:
        return [SingleRun(Path("."), Path("."), {}, list(entries)) for entries in records]

    def test_rounds_against_a_slow_computation(self, tmp_path: Path) -> None:
        (curve,) = curves_of(write_experiment(tmp_path / "exp", ["fedavg"], [0, 1, 2]))
        line = summarize(curve.runs, "accuracy", "round")
        assert line is not None
        assert line.x.tolist() == [1, 2, 3, 4, 5, 6]
        for index, number in enumerate(line.x):
            values = [r["accuracy"] for run in curve.runs for r in run.records if r["round"] == number]
            assert len(values) == line.num_seeds == 3
            assert line.mean[index] == pytest.approx(sum(values) / 3)
            assert (line.low[index], line.high[index]) == (min(values), max(values))
        assert not line.is_partial.any()

    def test_rounds_that_a_seed_lacks_are_left_out_and_its_end_ends_no_curve(self) -> None:
        one = [{"round": float(n), "accuracy": 0.1 * n} for n in (2, 4, 6)]
        two = [{"round": float(n), "accuracy": 0.2 * n} if n != 3 else {"round": 3.0} for n in (2, 3, 4)]
        line = summarize(self.runs(one, two), "accuracy", "round")
        assert line is not None
        assert line.x.tolist() == [2, 4, 6]
        assert line.mean == pytest.approx([0.3, 0.6, 0.6])
        assert (line.count.tolist(), line.is_partial.tolist()) == ([2, 2, 1], [False, False, True])

    def test_seeds_with_different_seconds_are_interpolated(self) -> None:
        one = [{"wall_seconds": x, "loss": y} for x, y in [(1.0, 10.0), (3.0, 6.0), (9.0, 0.0)]]
        two = [{"wall_seconds": x, "loss": y} for x, y in [(2.0, 8.0), (4.0, 7.0), (12.0, 3.0)]]
        line = summarize(self.runs(one, two), "loss", "seconds")
        assert line is not None
        assert (line.x[0], line.x[-1]) == (1.0, 12.0)
        assert np.array_equal(line.is_partial, (line.x < 2.0) | (line.x > 9.0))  # what one of them covers alone

        def slowly(points: list[dict[str, float]], x: float) -> float:
            for left, right in pairwise(points):
                if left["wall_seconds"] <= x <= right["wall_seconds"]:
                    share = (x - left["wall_seconds"]) / (right["wall_seconds"] - left["wall_seconds"])
                    return left["loss"] + share * (right["loss"] - left["loss"])
            raise AssertionError("outside")

        for index in range(0, len(line.x), 17):
            seeds = [
                seed for seed in (one, two) if seed[0]["wall_seconds"] <= line.x[index] <= seed[-1]["wall_seconds"]
            ]
            values = [slowly(seed, line.x[index]) for seed in seeds]
            assert line.mean[index] == pytest.approx(np.mean(values))
            assert (line.low[index], line.high[index]) == pytest.approx((min(values), max(values)))

    def test_one_seed_keeps_its_own_points(self) -> None:
        entries = [{"total_bytes_up": u, "total_bytes_down": d, "loss": 1.0} for u, d in [(1.0, 2.0), (5.0, 7.0)]]
        line = summarize(self.runs(entries), "loss", "bytes")
        assert line is not None
        assert line.x.tolist() == [3.0, 12.0]

    def test_a_single_round_a_seed_is_one_point(self) -> None:
        line = summarize(
            self.runs([{"wall_seconds": 1.0, "loss": 2.0}], [{"wall_seconds": 3.0, "loss": 4.0}]), "loss", "seconds"
        )
        assert line is not None
        assert (line.x.tolist(), line.mean.tolist(), line.low.tolist()) == ([2.0], [3.0], [2.0])

    def test_two_rounds_a_seed_are_taken_in_order(self) -> None:
        seeds = [[{"wall_seconds": x, "loss": 10 * x} for x in xs] for xs in ((1.0, 5.0), (3.0,))]
        line = summarize(self.runs(*seeds), "loss", "seconds")
        assert line is not None
        assert (line.x.tolist(), line.mean.tolist(), line.count.tolist()) == ([2.0, 5.0], [20.0, 50.0], [2, 1])

    def test_seeds_of_which_none_has_begun_before_another_ended(self) -> None:
        one, two = ([{"wall_seconds": x, "loss": x} for x in xs] for xs in ((1.0, 2.0, 3.0), (7.0, 8.0, 9.0)))
        line = summarize(self.runs(one, two), "loss", "seconds")
        assert line is not None
        assert line.is_partial.all()
        assert np.array_equal(np.isnan(line.mean), (line.x > 3.0) & (line.x < 7.0))

    def test_no_record_has_both(self) -> None:
        one, two = [{"round": 1.0, "loss": 1.0}], [{"round": 2.0}]
        assert summarize(self.runs(one, two), "accuracy", "round") is None
        assert summarize(self.runs(one, two), "loss", "seconds") is None

    def test_geometric_means_and_interpolation_on_logarithmic_axes(self) -> None:
        one = [{"wall_seconds": x, "loss": x**-2} for x in (1.0, 100.0, 1000.0)]
        two = [{"wall_seconds": x, "loss": 100 * x**-2} for x in (1.0, 10.0, 1000.0)]
        line = summarize(self.runs(one, two), "loss", "seconds", log_x=True, log_y=True)
        assert line is not None
        assert line.mean == pytest.approx(10 * line.x**-2)
        assert line.low == pytest.approx(line.x**-2)
        assert np.diff(np.log(line.x))[5:10] == pytest.approx(np.log(1000) / 199)

    def test_a_seed_that_reaches_0_takes_its_curve_there(self) -> None:
        one = [{"round": float(n), "loss": value} for n, value in enumerate((1.0, 1e-4, 0.0))]
        two = [{"round": float(n), "loss": 1e-2} for n in range(3)]
        for x in ("round", "seconds"):
            seeds = [[{**record, "wall_seconds": record["round"]} for record in seed] for seed in (one, two)]
            line = summarize(self.runs(*seeds), "loss", x, log_y=True)
            assert line is not None
            at = line.x.tolist().index(1.0) if 1.0 in line.x else 0
            assert line.mean[[0, -1]] == pytest.approx([0.1, 0.0])
            assert not ((line.low > 0) & (line.low < 0.99e-4)).any()
            assert at == 0 or line.mean[at] == pytest.approx(1e-3)
