"""Tables of methods and lists of runs, against sums by hand over the logs."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gossamer
from federation import Injected, configure, failing
from gossamer.cli.main import app
from gossamer.errors import ConfigError
from gossamer.reports.listing import list_runs
from gossamer.reports.listing import render as render_list
from gossamer.reports.summary import render
from gossamer.storage.disk import DirectoryLock

METHODS = {"fed_avg": {}, "slow": {"train": {"lr": 0.001}}}
DATA = configure({"methods": METHODS, "seeds": [0, 1], "rounds": 2, "workload.model": "softmax"})


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> gossamer.Run:
    """Two methods with two seeds."""
    return gossamer.run(DATA, out=tmp_path_factory.mktemp("runs") / "several")


class TestTables:
    def test_numbers_are_those_of_the_logs(self, several: gossamer.Run) -> None:
        runs = several.runs[:2]
        target = min(one.metrics[-1]["accuracy"] for one in runs)
        text = render([several.directory], "csv", target=target)
        row = next(csv.DictReader(io.StringIO(text)))
        assert (row["method"], row["seeds"]) == ("fed_avg", "2")
        final = [one.metrics[-1]["accuracy"] for one in runs]
        assert float(row["accuracy final mean"]) == pytest.approx(statistics.mean(final))
        assert float(row["accuracy final deviation"]) == pytest.approx(statistics.stdev(final))
        best = [max(record["accuracy"] for record in one.metrics) for one in runs]
        assert float(row["accuracy best mean"]) == pytest.approx(statistics.mean(best))
        sent = [one.metrics[-1]["total_bytes_up"] + one.metrics[-1]["total_bytes_down"] for one in runs]
        assert float(row["bytes mean"]) == statistics.mean(sent)
        reached = [next(r for r in one.metrics if r["accuracy"] >= target) for one in runs]
        seconds = statistics.mean(record["simulated_seconds"] for record in reached)
        assert float(row[f"simulated seconds to {target:g} mean"]) == pytest.approx(seconds)
        assert float(row[f"rounds to {target:g} mean"]) == statistics.mean(record["round"] for record in reached)

    def test_targets_that_only_some_reach(self, several: gossamer.Run) -> None:
        finals = sorted(max(record["accuracy"] for record in one.metrics) for one in several.runs[:2])
        assert finals[0] < finals[1]
        lines = render([several.directory], target=finals[1]).splitlines()
        assert "(1 of 2)" in lines[1]
        assert lines[2].split()[-1] == "-"

    def test_losses_are_best_where_they_are_least(self, several: gossamer.Run) -> None:
        row = next(csv.DictReader(io.StringIO(render([several.directory], "csv", "loss"))))
        best = [min(record["loss"] for record in one.metrics) for one in several.runs[:2]]
        assert float(row["loss best mean"]) == pytest.approx(statistics.mean(best))

    def test_a_single_seed_has_no_deviation(self, several: gossamer.Run) -> None:
        lines = render([several.runs[0].directory]).splitlines()
        assert len(lines) == 2
        assert "±" not in lines[1]

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"format": "txt"}, r"unknown --format 'txt'; did you mean 'text'\?"),
            ({"metric": "acuracy"}, r"no run has logged 'acuracy'; did you mean 'accuracy'\?"),
            ({"target": math.nan}, "--target nan: give a finite number"),
        ],
    )
    def test_refusals(self, several: gossamer.Run, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            render([several.directory], **given)

    def test_command(self, several: gossamer.Run) -> None:
        done = CliRunner().invoke(app, ["table", str(several.directory), "--format", "latex"])
        assert done.exit_code == 0
        assert r"fed\_avg & 2 & " in done.stdout
        assert CliRunner().invoke(app, ["table", str(several.directory), "--metric", "no"]).exit_code == 2


class TestLists:
    def test_states(self, several: gossamer.Run, tmp_path: Path) -> None:
        single = configure({"workload.model": "softmax"})
        gossamer.run(single, out=tmp_path / "a" / "done")
        for name in ("stopped", "damaged"):
            with pytest.raises(Injected):
                gossamer.run(single, out=tmp_path / name, hooks=failing("train", True, 3))
        newest = max((tmp_path / "damaged" / "checkpoints").iterdir())
        (newest / "arrays.safetensors").write_bytes(b"")
        ended = configure({"workload.model": "softmax", "stop": {"metric": "accuracy", "target": 0.0}})
        gossamer.run(ended, out=tmp_path / "ended")
        found = {run.name: run for run in list_runs(tmp_path)}
        assert {name: (run.state, run.rounds, run.num_rounds) for name, run in found.items()} == {
            "a/done": ("finished", 3, 3),
            "damaged": ("damaged", 2, 3),
            "ended": ("finished", 1, 3),
            "stopped": ("stopped", 2, 3),
        }
        assert "is damaged" in found["damaged"].reason
        assert "reached stop.target" in found["ended"].reason
        assert found["a/done"].metrics["accuracy"] == gossamer.load(tmp_path / "a" / "done").metrics[-1]["accuracy"]
        text = render_list(list(found.values())).splitlines()
        assert text[1].split()[:4] == ["a/done", "finished", "3/3", "accuracy"]

    def test_a_log_that_was_changed(self, tmp_path: Path) -> None:
        directory = gossamer.run(configure({"rounds": 1}), out=tmp_path / "run").directory
        log = directory / "metrics.jsonl"
        log.write_text(log.read_text().replace('"round": 1', '"round": 2'))
        assert [run.state for run in list_runs(tmp_path)] == ["damaged"]

    def test_running(self, several: gossamer.Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process holds the lock; locks of this one do not exclude it, so the lock is refused by hand."""
        assert {run.state for run in list_runs(several.directory)} == {"finished"}

        def held(path: Path) -> None:
            """Refuse."""
            raise BlockingIOError

        monkeypatch.setattr("gossamer.storage.disk.lock", held)
        assert {run.state for run in list_runs(several.directory)} == {"running"}

    def test_command(self, several: gossamer.Run, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["runs", str(several.directory), "--json"])
        listed = json.loads(done.stdout)
        assert [run["name"] for run in listed] == ["fed_avg/seed-0", "fed_avg/seed-1", "slow/seed-0", "slow/seed-1"]
        assert listed[0]["num_bytes"] > 1000
        assert CliRunner().invoke(app, ["runs", str(tmp_path)]).stdout == "no runs\n"
        assert CliRunner().invoke(app, ["runs", str(tmp_path / "nowhere")]).exit_code == 2

    def test_locks_are_left_as_they_were(self, tmp_path: Path) -> None:
        directory = gossamer.run(configure({"rounds": 1}), out=tmp_path / "run").directory
        (directory / ".lock").unlink()
        assert [run.state for run in list_runs(tmp_path)] == ["finished"]
        assert not (directory / ".lock").exists()
        DirectoryLock(directory).close()
