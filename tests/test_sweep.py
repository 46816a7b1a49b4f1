"""Sweeps: the grid against nested loops, every run against the same run by itself, failures, stopping and resuming."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import gate
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import gossamer
from federation import environment, wait_for
from gossamer import experiment
from gossamer.errors import ConfigError, GossamerError, Interrupted
from gossamer.reports.curves import find_runs, group
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_config, read_metrics
from gossamer.sweep import STOPPED, columns, line, make_grid, parse_seeds, render, require_all_done, sweep

DATA: dict[str, Any] = {
    "name": "tiny",
    "rounds": 2,
    "workload": {"dataset": "digits", "model": "softmax"},
    "clients": {"num": 20, "per_round": 2},
    "train": {"lr": 0.1, "steps": 1},
    "engine": {"workers": 0, "modes": [{"capacity": 1.0}]},
}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from([0.5, 0.25, 0.125]), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
)
def test_grid_is_what_nested_loops_give(rounds: list[int], rates: list[float], seeds: list[int]) -> None:
    grid = make_grid(DATA, [f"rounds={','.join(map(str, rounds))}", f"train.lr={','.join(map(str, rates))}"], seeds)
    found = [(one["rounds"], one["train"]["lr"], one["seed"]) for one in grid.singles.values()]
    expected = []
    for number in rounds:
        for rate in rates:
            for seed in seeds:
                expected.append((number, rate, seed))
    assert found == expected
    assert all(one["clients"] == DATA["clients"] and one["train"]["steps"] == 1 for one in grid.singles.values())
    varied = ["rounds"] * (len(rounds) > 1) + ["train.lr"] * (len(rates) > 1) + ["seed"]
    chosen = {"rounds": 0, "train.lr": 1, "seed": 2}
    assert list(grid.cells.values()) == [{key: one[chosen[key]] for key in varied} for one in expected]


def test_values_may_be_lists_and_mappings() -> None:
    grid = make_grid(DATA, ["algorithm=fedavg,{name: fedprox, mu: 0.1}", "submodel.capacities=[1.0, 0.5],[1.0]"])
    assert [(one["algorithm"], one["submodel"]["capacities"]) for one in grid.singles.values()] == [
        ("fedavg", [1.0, 0.5]),
        ("fedavg", [1.0]),
        ({"name": "fedprox", "mu": 0.1}, [1.0, 0.5]),
        ({"name": "fedprox", "mu": 0.1}, [1.0]),
    ]
    assert next(iter(grid.labels.values())) == "algorithm=fedavg, capacities=[1.0, 0.5]"
    assert next(iter(grid.singles)) == "algorithm-fedavg-capacities-1.0-0.5/seed-0"


def test_methods_of_the_file_are_crossed_and_seeds_kept() -> None:
    data = DATA | {"methods": {"slow": {"train": {"lr": 0.01}}, "fast": {}}, "seeds": [3, 4]}
    grid = make_grid(data, ["train.steps=1,2"])
    assert [(one["train"]["lr"], one["train"]["steps"], one["seed"]) for one in grid.singles.values()] == [
        (rate, steps, seed) for rate in (0.01, 0.1) for steps in (1, 2) for seed in (3, 4)
    ]
    assert grid.cells["slow-steps-2/seed-3"] == {"method": "slow", "train.steps": 2, "seed": 3}
    assert grid.labels["slow-steps-2"] == "slow, steps=2"


def test_keys_that_end_alike_are_told_apart() -> None:
    labels = make_grid(DATA, ["clients.num=10,20", "workload.dataset.num=1,2"]).labels
    assert "clients.num=10, workload.dataset.num=1" in labels.values()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.lr"], "not of the form"),
        (["train.lr="], "not of the form"),
        (["=1,2"], "not of the form"),
        (["train.lr=[1"], "no list of YAML values"),
        (["seed=1,2"], "with --seeds"),
        (["train.lr=0.1,0.1"], "twice: name every value once"),
        (["train.lr=0.1", "train.lr=0.2"], "given twice"),
        (["train.lr=0.1,-1"], "greater than 0"),
        (["train.rate=1,2"], "train.rate"),
    ],
)
def test_wrong_settings(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_grid(DATA, settings)


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1;2"])
def test_wrong_seeds(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


def test_wrong_engine_and_parallel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown --engine 'gpu'"):
        sweep(DATA, [], engine="gpu", out=tmp_path)
    with pytest.raises(ConfigError, match="--parallel 0"):
        sweep(DATA, [], num_parallel=0, out=tmp_path)
    with pytest.raises(ConfigError, match="--engine ray"):
        sweep(DATA, [], engine="local", num_parallel=2, out=tmp_path)


def test_every_run_is_what_it_is_by_itself(tmp_path: Path) -> None:
    found = sweep(DATA, ["train.lr=0.1,0.05"], [0, 1], "local", tmp_path / "all")
    require_all_done(found)
    for row in found.rows:
        data = DATA | {"seed": row["seed"], "train": {"lr": row["train.lr"], "steps": 1}}
        alone = gossamer.run(data, out=tmp_path / "alone" / f"{row['train.lr']}-{row['seed']}")
        accuracies = [record["accuracy"] for record in alone.metrics]
        assert (row["metric"], row["final"], row["best"]) == ("accuracy", accuracies[-1], max(accuracies))
        assert read_config(Path(row["directory"]))["train"]["lr"] == row["train.lr"]
        assert row["seconds"] > 0
    assert json.loads((tmp_path / "all" / "results.json").read_text()) == found.rows
    with (tmp_path / "all" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["final"]) for row in table] == [row["final"] for row in found.rows]
    assert found.figure is not None
    assert found.figure.stat().st_size > 0
    curves = {curve.label: len(curve.runs) for curve in group(find_runs([tmp_path / "all"]))}
    assert curves == {"lr-0.1": 2, "lr-0.05": 2}


def test_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module and arrays, in forked workers, too: each run is that of `gossamer.run`, and is resumed with the same."""
    model, x = torch.nn.Linear(4, 2), np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
    data = (x[:60], (x[:60, 0] > 0).astype(np.int64), x[60:], (x[60:, 0] > 0).astype(np.int64))
    config = DATA | {"workload": {}, "clients": {"num": 4, "per_round": 2}}
    monkeypatch.setattr("gossamer.sweep._draw", lambda *given: None)
    settings = ["engine.workers=0,2"]
    found = sweep(config, settings, None, "local", tmp_path / "all", model=model, data=data)
    require_all_done(found)
    alone = gossamer.run(config, model=model, data=data, out=tmp_path / "alone")
    losses = [one["train_loss"] for one in alone.metrics]
    for row in found.rows:
        assert [one["train_loss"] for one in read_metrics(Path(row["directory"]))] == losses
        assert row["final"] == alone.metrics[-1]["accuracy"]
    again = sweep(config, settings, None, "local", tmp_path / "all", model=model, data=data)
    assert [row["final"] for row in again.rows] == [row["final"] for row in found.rows]
    with pytest.raises(ConfigError, match="'object:Linear' is an object of this process, which tasks of Ray cannot"):
        sweep(config, settings, out=tmp_path / "ray", model=model, data=data)


def test_failed_run_costs_its_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = experiment.run

    def failing(config: Any, **given: Any) -> Any:
        if config["train"]["lr"] == 0.5:
            raise ZeroDivisionError("nothing\nleft")
        return run(config, **given)

    monkeypatch.setattr(experiment, "run", failing)
    found = sweep(DATA, ["train.lr=0.1,0.5,0.05"], None, "local", tmp_path)
    assert [row["error"] for row in found.rows] == [None, "ZeroDivisionError: nothing left", None]
    assert found.rows[1].get("final") is None
    assert "ZeroDivisionError" in render(found.rows)
    with pytest.raises(GossamerError, match="1 of 3 runs failed"):
        require_all_done(found)
    monkeypatch.undo()
    require_all_done(sweep(DATA, ["train.lr=0.1,0.5,0.05"], None, "local", tmp_path))


def test_stopped_sweep_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(row: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    settings = ["train.lr=0.1,0.05,0.025"]
    found = sweep(DATA, settings, None, "local", tmp_path, on_row=interrupt)
    assert [row["error"] for row in found.rows] == [None, STOPPED, STOPPED]
    with pytest.raises(Interrupted, match="2 of 3 runs were stopped"):
        require_all_done(found)
    resumed, resume = list[str](), experiment.resume
    monkeypatch.setattr(experiment, "resume", lambda path, **options: resumed.append(path.parent.name) or resume(path))
    again = sweep(DATA, settings, None, "local", tmp_path)
    require_all_done(again)
    assert resumed == ["lr-0.1"]
    assert again.rows[0] == found.rows[0]


def test_directory_of_another_sweep_is_refused(tmp_path: Path) -> None:
    sweep(DATA, ["train.lr=0.1,0.05"], None, "local", tmp_path)
    with pytest.raises(ConfigError, match="holds another experiment"):
        sweep(DATA, ["train.lr=0.1,0.2"], None, "local", tmp_path)


def test_columns_of_rows_that_differ() -> None:
    rows = [{"a": 1, "seed": 0, "error": None}, {"a": {"name": "b"}, "seed": 0, "final": 0.5, "error": "x"}]
    assert columns(rows) == ["a", "seed", "metric", "final", "best", "seconds", "directory", "error"]
    assert render(rows).splitlines() == [
        "a              seed  final  error",
        "1              0",
        '{"name": "b"}  0     0.5    x',
    ]
    assert line(rows[1]) == 'a {"name": "b"}, seed 0, final 0.5, error x'


@pytest.fixture
def closed_gate(one_ray: Path) -> Path:
    """Return the folder of the plug-in `gate`, without the files of other tests."""
    for name in ("reached", "open"):
        (one_ray / name).unlink(missing_ok=True)
    return one_ray


def test_command_on_ray(tmp_path: Path) -> None:
    """On a Ray of its own, with twice as many runs as CPUs, of which some fail for a reason of their own."""
    data = DATA | {"clients": {"num": 20, "per_round": 2, "partition": "iid"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    out = tmp_path / "out"
    command = ["sweep", str(tmp_path / "tiny.yaml"), "clients.num=20,1000000", "--seeds", "0,1", "--parallel", "2"]
    program = [sys.executable, "-m", "gossamer.cli.main", *command, "--out", str(out)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment(), timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert "2 of 4 runs failed" in done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    rows = json.loads((out / "results.json").read_text())
    for row in rows:
        if row["clients.num"] == 20:
            alone = gossamer.run(data | {"seed": row["seed"]}, out=tmp_path / f"alone-{row['seed']}")
            assert row["error"] is None
            assert row["final"] == alone.metrics[-1]["accuracy"]
            assert read_config(Path(row["directory"]))["engine"]["workers"] == 0
        else:
            assert "1000000" in row["error"]
            assert row.get("final") is None


def test_stopping_on_ray_commits_what_runs(tmp_path: Path, closed_gate: Path) -> None:
    """One run is held in the middle; when another one has ended, the sweep is stopped, and the held one let go."""

    def interrupt(row: Any) -> None:
        if row["rounds"] == 1:
            wait_for((closed_gate / "reached").exists, 200)
            os.kill(os.getpid(), signal.SIGINT)
            (closed_gate / "open").touch()

    data = DATA | {"clients": {"num": 20, "per_round": 2, "sampler": "gate:hold"}}
    out = tmp_path / "out"
    found = sweep(data, ["rounds=1000000,1,2"], None, "ray", out, num_parallel=2, on_row=interrupt)
    assert [row["error"] for row in found.rows] == [STOPPED, None, STOPPED]
    assert not (out / "rounds-2").exists()  # dropped before it began
    held = out / "rounds-1000000" / "seed-0"
    committed = Checkpoints(held / "checkpoints", keep=2).latest()
    assert committed is not None
    assert committed.round == len(read_metrics(held)) >= gate.HELD_ROUND


def test_task_whose_worker_dies_goes_on_from_its_commit(tmp_path: Path, closed_gate: Path) -> None:
    data = DATA | {"rounds": 5, "checkpoint": {"every_seconds": 0}}
    data["clients"] = {"num": 20, "per_round": 2, "sampler": "gate:hold"}
    held = tmp_path / "out" / "seed-0"

    def kill_when_held() -> None:
        """Kill the run once it waits at the gate."""
        wait_for((closed_gate / "reached").exists, 200)
        (worker,) = [int(one.name) for one in Path("/proc").glob("[0-9]*") if _has_open(one, held / "metrics.jsonl")]
        os.kill(worker, signal.SIGKILL)
        (closed_gate / "open").touch()

    with ThreadPoolExecutor(1) as thread:
        killing = thread.submit(kill_when_held)
        found = sweep(data, [], None, "ray", tmp_path / "out", num_parallel=1)
        killing.result()
    require_all_done(found)
    assert [record["round"] for record in read_metrics(held)] == [1, 2, 3, 4, 5]
    alone = gossamer.run(data, out=tmp_path / "alone")
    assert found.rows[0]["final"] == alone.metrics[-1]["accuracy"]


def _has_open(process: Path, file: Path) -> bool:
    """Say whether a process, given by its folder in /proc, has a file open; one that has ended meanwhile has not."""
    found = []
    with suppress(OSError):
        for link in list((process / "fd").iterdir()):
            with suppress(OSError):  # it was closed meanwhile
                found.append(link.readlink())
    return file.resolve() in found
