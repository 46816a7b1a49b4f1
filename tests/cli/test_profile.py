"""``gossamer profile`` and ``gossamer offload``: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import gossamer
from federation import configure
from gossamer.cli.main import app
from slow_peers import decentralized
from traces import span, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run of five rounds in which a checkpoint takes a fifth of the time."""
    spans, rounds = [], []
    for number in range(5):
        at = 100.0 * number
        spans += [span("train", at, at + 80, num_bytes=9), span("checkpoint", at + 80, at + 100, num_bytes=1000)]
        rounds.append((number + 1, at, at + 100))
    write(tmp_path / "run", "driver", spans, rounds)
    return tmp_path / "run"


def call(*arguments: object) -> Result:
    """Run a command."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_profile_prints_stages_and_writes_files(run: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.json", "a.goal", "a.0.et", "a.png")]
    exports = ("--chrome", files[0], "--goal", files[1], "--chakra", tmp_path / "a")
    result = call("profile", run, *exports, "-o", files[-1])
    assert result.exit_code == 0, result.output
    assert "a round takes 100 ms" in result.output
    assert [line.split()[0] for line in result.output.splitlines()[3:5]] == ["train", "checkpoint"]
    assert result.output.splitlines()[-len(files) :] == [str(path) for path in files]
    assert all(path.stat().st_size for path in files)


def test_profile_prints_json(run: Path) -> None:
    found = json.loads(call("profile", run, "--json").stdout)
    assert found["num_rounds"] == 5
    assert {one["stage"]: one["path_share"] for one in found["stages"]} == pytest.approx(
        {"train": 0.8, "checkpoint": 0.2}
    )


def test_offload_prints_verdicts(run: Path, tmp_path: Path) -> None:
    result = call("offload", run, "--device", "bluefield-2", "-o", tmp_path / "a.svg")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.output.splitlines() if line.startswith("checkpoint"))
    assert row.split()[1] == "win"
    assert "A2 met" in result.output
    assert result.output.splitlines()[-1] == str(tmp_path / "a.svg")


def test_offload_prints_json(run: Path) -> None:
    found = json.loads(call("offload", run, "--device", "emulated", "--json").stdout)
    assert not found["nothing_worth_offloading"]
    (stage,) = found["stages"]
    assert stage["verdict"] == "win"
    assert stage["change"]["mean"] == pytest.approx(-0.2, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["profile", "nowhere"], "no directory 'nowhere': name one that 'gossamer run' made"),
        (["profile", "RUN", "-o", "a.txt"], "cannot tell the format"),
        (["profile", "RUN", "--workers", 3], "--workers 3 changes nothing without --scale"),
        (["profile", "RUN", "--links", "a.graphml"], "--links a.graphml changes nothing without --scale"),
        (["profile", "RUN", "--scale", "9", "--workers", 3, "--links", "a"], "--workers are of this machine"),
        (["profile", "RUN", "--scale", "9", "--links", "a.graphml"], "--links a.graphml: cannot read the graph"),
        (["profile", "RUN", "--scale", "10", "--chrome", "a.json"], "--chrome exports the recorded trace"),
        (["profile", "RUN", "--torch", "a.json"], "--torch a.json changes nothing without --chrome or --perfetto"),
        (["profile", "RUN", "--chakra", "a", "--scale", "10"], "--chakra exports the recorded trace"),
        (["profile", "RUN", "--chrome", "a.json", "--torch", "none.json"], "cannot read 'none.json'"),
        (["offload", "RUN", "--device", "bluefield-9"], "unknown device 'bluefield-9'"),
        (["offload", "RUN", "--device", "emulated", "--stage", "mixin"], "did you mean 'mixing'"),
        (["offload", "RUN", "--device", "emulated", "--stage", "mixing"], "no span of stage 'mixing' was recorded"),
        (["offload", "RUN", "--device", "./none.yaml"], "none.yaml"),
    ],
)
def test_bad_input_is_one_sentence(run: Path, arguments: list[str], told: str) -> None:
    result = call(*(run if one == "RUN" else one for one in arguments))
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_run_with_a_side_car_is_not_judged(run: Path) -> None:
    write(run, "side-car", [span("checkpoint", 190, 210)], pid=2)
    assert call("profile", run).exit_code == 0
    result = call("offload", run, "--device", "emulated")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: in round 2 a side-car does a stage of this run already")
    assert result.stderr.count("\n") == 1


class TestScale:
    def test_prints_a_table_and_draws(self, run: Path, tmp_path: Path) -> None:
        (run / "config.yaml").write_text("name: run\nclients: {num: 8, per_round: 2}\n")
        spans = [span("wait", 490, 500)]
        for at in range(0, 500, 100):
            spans += [span("wait", at, at + 1), span("train", at + 1, at + 49)]
        write(run, "worker", spans, pid=2)
        result = call("profile", run, "--scale", "2,200", "--workers", 4, "-o", tmp_path / "a.png")
        assert result.exit_code == 0, result.output
        assert [line.split()[0] for line in result.output.splitlines()[3:5]] == ["2", "200"]
        assert (tmp_path / "a.png").stat().st_size
        found = json.loads(call("profile", run, "--scale", "200", "--json").stdout)
        assert found[0]["bottleneck"] == "workers"

    @pytest.mark.parametrize("sizes", ["many", "0", "2,,3", "9999999999"])
    def test_bad_sizes_are_one_sentence(self, run: Path, sizes: str) -> None:
        result = call("profile", run, "--scale", sizes)
        assert result.exit_code == 2
        assert f"--scale {sizes}: give numbers from 1" in result.stderr

    def test_peers_are_refused(self, run: Path) -> None:
        (run / "config.yaml").write_text("name: run\npeers: {num: 8}\n")
        result = call("profile", run, "--scale", "10")
        assert result.exit_code == 2
        assert "--scale is for runs with clients" in result.stderr


NETWORK = "topologies/internet-50.graphml"


@pytest.mark.parametrize("kind", ["clients", "peers"])
def test_a_run_is_extrapolated_to_machines_of_a_network(kind: str, tmp_path: Path) -> None:
    config = configure({"rounds": 2}) if kind == "clients" else decentralized({"rounds": 2, "peers.topology": "ring"})
    kinds = [{"profile": "laptop"}, {"profile": "raspberry-pi-4"}]
    engine = {**config["engine"], "workers": 1}
    gossamer.run({**config, "profile": True, "devices": kinds, "engine": engine}, out=tmp_path / "run")
    result = call(
        "profile", tmp_path / "run", "--scale", "8,300", "--links", NETWORK, "-o", tmp_path / "a.png", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [one["participants"] for one in found] == [8, 300]
    assert all(one["workers"] is None and one["seconds"]["mean"] > 0.05 for one in found), "a link takes 50 ms"
    assert (tmp_path / "a.png").stat().st_size
    table = call("profile", tmp_path / "run", "--scale", "300", "--links", NETWORK).stdout
    assert "its own" in table
    assert " -" in table.splitlines()[-1]


def test_topologies_of_a_given_number_of_peers_are_refused(tmp_path: Path) -> None:
    config = decentralized({"rounds": 1, "engine.workers": 1, "profile": True})
    gossamer.run({**config, "peers": {"topology": "topologies/karate-club.yaml"}}, out=tmp_path / "run")
    result = call("profile", tmp_path / "run", "--scale", "300", "--links", NETWORK)
    assert result.exit_code == 2
    assert "has 34 peers" in result.stderr
