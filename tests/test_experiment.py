"""Runs and experiments: their directories, what is refused, and resuming what is not finished."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from federation import LEVELS, Injected, assert_same, configure, digest, failing, mixed, without_clocks
from gossamer import resume, run
from gossamer.errors import ConfigError, DataError, GossamerError
from gossamer.experiment import Hooks, Run
from gossamer.storage.runlog import read_config, read_metrics

METHODS = {
    "rolex": {"algorithm": "fedrolex", "submodel.capacities": [0.5, 1.0], "engine.modes": "auto"},
    "plain": {"train.lr": 0.05},
}


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Return bytes and time of change of every file below `directory`."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


class TestDirectory:
    def test_contents(self, tmp_path: Path) -> None:
        done = run(configure({"rounds": 2}), out=tmp_path / "deep" / "run")
        assert done.directory == tmp_path / "deep" / "run"
        assert sorted(path.name for path in done.directory.iterdir()) == [
            ".lock",
            "checkpoints",
            "config.yaml",
            "environment.json",
            "events.jsonl",
            "metrics.jsonl",
            "model.json",
            "plots",
            "trace",
        ]
        assert done.runs == []
        assert list(done.params) == ["hidden0.weight", "hidden0.bias", "output.weight", "output.bias"]

    def test_the_resolved_configuration_is_the_same_run(self, tmp_path: Path) -> None:
        """It names every default, and resolves to itself."""
        first = run(configure(mixed("all-smallest") | {"engine.modes": "auto", "rounds": 1}), out=tmp_path / "first")
        resolved = read_config(first.directory)
        assert resolved["train"]["momentum"] == 0.0
        assert resolved["submodel"]["strategy"] == "static"
        second = run(first.directory / "config.yaml", out=tmp_path / "second")
        assert_same(first, second)
        assert read_config(second.directory) == resolved

    def test_overrides_and_a_name_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(configure()))
        done = run("e.yaml", ["rounds=1", "train.lr=0.25", "name=mine"])
        assert done.directory.parent == Path("runs")
        assert done.directory.name.startswith("mine-20")
        assert [record["lr"] for record in done.metrics] == [0.25]

    def test_equal_configurations_are_equal_runs(self, tmp_path: Path) -> None:
        config = configure(mixed("fedrolex", LEVELS))
        assert_same(run(config, out=tmp_path / "one"), run(config, out=tmp_path / "two"))


class TestRepr:
    def test_one_run(self, tmp_path: Path) -> None:
        done = run(configure({"rounds": 2}), out=tmp_path / "run")
        directory, rounds, size = repr(done).splitlines()
        assert directory == f"Run in {tmp_path / 'run'}"
        last = done.metrics[-1]
        assert rounds.startswith(f"2 rounds, train_loss {last['train_loss']:.4g}, accuracy {last['accuracy']:.4g}, ")
        assert "seconds" not in rounds
        assert size == f"{sum(value.numel() for value in done.params.values()):,} parameters in 4 tensors"

    def test_several(self) -> None:
        single = Run(Path("a"), [], {"w": torch.zeros(40, 50)})
        several = Run(Path("b"), [{"lr": 0.1, "train_loss": 2.0}] * 3, single.params, [single, single])
        lines = ["Run in b", "3 rounds, train_loss 2", "2,000 parameters in 1 tensors, of the first of 2 runs"]
        assert repr(several).splitlines() == lines
        assert repr(single).splitlines()[1] == "0 rounds"


class TestRefusals:
    @pytest.mark.parametrize("changes", [{"rounds": 1}, {"rounds": 1, "seeds": [0, 1]}], ids=["run", "experiment"])
    def test_an_occupied_directory(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        run(configure(changes), out=tmp_path / "run")
        before = contents(tmp_path)
        for again in ({"rounds": 1}, {"rounds": 1, "seeds": [0, 1]}):
            with pytest.raises(ConfigError, match=r"run' already holds a run: resume it, or choose another --out"):
                run(configure(again), out=tmp_path / "run")
        assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rouns": 3}, "unknown key 'rouns'; did you mean 'rounds'"),
            ({"rounds": 0}, "rounds = 0"),
            ({"clients.per_round": 9}, "clients.per_round 9 exceeds clients.num 8"),
            ({"algorithm": "fedrolx"}, "unknown algorithm 'fedrolx'; did you mean 'fedrolex'"),
            ({"algorithm.server_lr": -1}, "algorithm.server_lr = -1"),
            ({"workload.model": "mpl"}, "unknown model 'mpl'"),
            ({"workload.dataset": "nowhere:data"}, "cannot load dataset 'nowhere:data'"),
            ({"workload.dataset.num_train": 7}, "7 training samples cannot give 8 clients"),
            ({"submodel.capacities": [0.5, 1.0]}, "algorithm 'fedavg' trains whole models"),
            ({"algorithm": "scaffold", "train.momentum": 0.9}, "Scaffold does not go with train.momentum = 0.9"),
            ({"engine": "lokal"}, "unknown engine 'lokal'; did you mean 'local'"),
            ({"engine.modes": []}, "engine.modes names capacities"),
            ({"clients.sampler": "unifrom"}, "unknown sampler 'unifrom'"),
            ({"clients.sampler": "math:pi"}, "sampler 'math:pi' is a float: give a function"),
            ({"clients.partition": "math:pi"}, "partition 'math:pi' is a float: give a function"),
            ({"workload.dataset": "math:pi"}, "dataset 'math:pi' is a float: give a function"),
            ({"workload": "builtins:dict"}, "workload 'builtins:dict' is a dict without traits, init, "),
            ({"workload": "json:loads"}, "workload {'name': 'json:loads'} on partition 'iid' fails with TypeError"),
            ({"workload": "builtins:print"}, "'num_clients' is an invalid keyword argument for print()"),
            ({"workload.dataset": "json:loads"}, "'json:loads'"),
            ({"workload.model": "builtins:print"}, "'builtins:print'"),
            ({"clients.partition": "builtins:dict"}, "'builtins:dict'"),
            ({"algorithm": "json:loads"}, "algorithm 'json:loads' is a function without traits, optimizer, init, "),
            ({"algorithm": "builtins:dict"}, "algorithm 'builtins:dict' is a dict without traits, optimizer, init, "),
            (
                {"submodel.strategy": "math:pi"},
                "submodel.strategy 'math:pi' is a float: give a gossamer.submodel.Str",
            ),
            ({"engine": "math:pi"}, "engine 'math:pi' is a float without is_remote, train, exchange, "),
            ({"log": {"sinks": ["tensorbord"]}}, "unknown entry 'tensorbord' in log.sinks; did you mean 'tensorboard'"),
            ({"methods": {"a": {"train.lr": -1}}}, "train.lr = -1"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    @pytest.mark.parametrize("several", [{}, {"seeds": [0, 1]}], ids=["run", "experiment"])
    def test_nothing_is_left(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any],
        message: str,
        several: dict[str, Any],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for out in (None, tmp_path / "out"):
            with pytest.raises((ConfigError, DataError)) as caught:
                run(configure(changes | several), out=out, trust=True)
            assert message in str(caught.value)
            assert caught.value.exit_code == 2
            assert [path for path in tmp_path.rglob("*") if path != tmp_path / "runs"] == []

    @pytest.mark.parametrize(("name", "reason"), [("json:loads", "loads"), ("builtins:print", "int")])
    def test_a_sampler_that_fails(self, tmp_path: Path, name: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=rf"^clients.sampler '{name}' fails with TypeError: {reason}\(\) "):
            run(configure({"clients.sampler": name}), out=tmp_path / "run", trust=True)

    def test_an_empty_directory_is_welcome(self, tmp_path: Path) -> None:
        assert run(configure({"rounds": 1}), out=tmp_path).directory == tmp_path

    @pytest.mark.parametrize("name", ["nowhere", "."])
    def test_resuming_what_is_no_run(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=r"is not a run directory \(it has no config.yaml\)"):
            resume(tmp_path / name)


class TestTogether:
    """Two processes start on one directory: one of them runs, and the other leaves no trace."""

    @pytest.mark.parametrize("several", [{}, {"seeds": [0]}], ids=["run", "experiment"])
    def test_one_of_them_runs(self, tmp_path: Path, several: dict[str, Any]) -> None:
        context = multiprocessing.get_context("fork")
        for trial in range(3):
            out, outcomes, barrier = tmp_path / str(trial), context.SimpleQueue(), context.Barrier(2)

            def start(lr: float) -> None:
                config = configure(several | {"train.lr": lr, "rounds": 2})
                barrier.wait()  # noqa: B023
                try:
                    run(config, out=out)  # noqa: B023
                except ConfigError as error:
                    outcomes.put((lr, str(error)))  # noqa: B023
                else:
                    outcomes.put((lr, ""))  # noqa: B023

            children = [context.Process(target=start, args=(lr,)) for lr in (0.1, 0.2)]
            for child in children:
                child.start()
            for child in children:
                child.join(60)
            told = dict(outcomes.get() for _ in children)
            (winner,) = [lr for lr, error in told.items() if not error]
            sentences = ("another process works on", "already holds", "holds another experiment")
            assert any(sentence in error for error in told.values() for sentence in sentences), told
            where = out / "seed-0" if several else out
            assert read_config(where)["train"]["lr"] == winner
            assert [record["lr"] for record in read_metrics(where)] == [winner] * 2


class TestSeveral:
    def test_methods_and_seeds(self, tmp_path: Path) -> None:
        experiment = configure({"methods": METHODS, "seeds": [3, 1], "rounds": 2})
        done = run(experiment, out=tmp_path / "all")
        names = ["rolex/seed-3", "rolex/seed-1", "plain/seed-3", "plain/seed-1"]
        assert [str(one.directory.relative_to(done.directory)) for one in done.runs] == names
        assert yaml.safe_load((done.directory / "experiment.yaml").read_text()) == experiment
        assert not (done.directory / "config.yaml").exists()
        assert [(record["run"], record["round"]) for record in done.metrics] == [
            (name, round) for name in names for round in (1, 2)
        ]
        assert digest(done.params) == digest(done.runs[0].params)
        resolved = read_config(done.directory / "plain/seed-1")
        assert (resolved["name"], resolved["seed"], resolved["train"]["lr"]) == ("plain", 1, 0.05)
        assert "methods" not in {key for key, value in resolved.items() if value is not None}
        alone = run(configure({"train.lr": 0.05, "seed": 1, "rounds": 2}), out=tmp_path / "alone")
        assert_same(alone, done.runs[3])

    @pytest.mark.parametrize(
        ("changes", "names"),
        [
            ({"seeds": [7]}, ["seed-7"]),
            ({"methods": {"a": {}, "b": {}}}, ["a", "b"]),
        ],
        ids=["seeds", "methods"],
    )
    def test_one_of_both(self, tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
        done = run(configure(changes | {"rounds": 1}), out=tmp_path / "all")
        assert [one.directory.name for one in done.runs] == names

    def test_finished_runs_are_not_run_again(self, tmp_path: Path) -> None:
        experiment = configure({"seeds": [0, 1, 2], "rounds": 3})
        with pytest.raises(Injected):
            run(experiment, out=tmp_path / "cut", hooks=failing("exchange", True, 5))  # in round 2 of seed 1
        assert [len(read_metrics(tmp_path / "cut" / name)) for name in ("seed-0", "seed-1")] == [3, 1]
        assert not (tmp_path / "cut/seed-2").exists()
        finished = contents(tmp_path / "cut/seed-0")
        observed: list[str] = []
        hooks = Hooks(observer=lambda name, rounds: observed.append(name))
        resumed = resume(tmp_path / "cut", hooks)
        assert observed == ["seed-1", "seed-2"]
        assert contents(tmp_path / "cut/seed-0") == finished
        whole = run(experiment, out=tmp_path / "whole")
        assert without_clocks(resumed.metrics) == without_clocks(whole.metrics)
        for one, other in zip(resumed.runs, whole.runs, strict=True):
            assert_same(one, other)
        everything = contents(tmp_path / "cut")
        assert without_clocks(resume(tmp_path / "cut").metrics) == without_clocks(whole.metrics)
        assert contents(tmp_path / "cut") == everything

    def test_an_error_names_the_run(self, tmp_path: Path) -> None:
        """What can only be seen when a run is built stops the experiment there; what was done stays."""
        methods = {"good": {}, "bad": {"workload.dataset.num_train": 4}}
        with pytest.raises(GossamerError, match=r"^bad: 4 training samples cannot give 8 clients"):
            run(configure({"methods": methods, "rounds": 1}), out=tmp_path / "all")
        assert sorted(os.listdir(tmp_path / "all")) == [".lock", "experiment.yaml", "good"]
