"""Runs that go on longer than they were begun for: the bits of a run that was as long from its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gossamer
from federation import Injected, assert_same, configure, digest, failing, without_clocks
from gossamer.errors import CheckpointError, ConfigError, GossamerWarning
from gossamer.experiment import Run
from gossamer.storage.experiment_file import read_experiment
from gossamer.storage.runlog import read_config
from slow_peers import decentralized

SCHEDULE = {"train.schedule": {"name": "multistep", "milestones": [3], "warmup_rounds": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "clients": configure({"algorithm": "scaffold"} | SCHEDULE),
    "peers": decentralized({"peers.merge_every": 2, "algorithm": "gossip-pga"}),
}


def run(data: dict[str, Any], rounds: int, out: Path) -> Run:
    """Run an experiment for a number of rounds."""
    return gossamer.run(data | {"rounds": rounds}, out=out)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_long_run(tmp_path: Path, kind: str) -> None:
    run(KINDS[kind], 2, tmp_path / "run")
    longer = gossamer.resume(tmp_path / "run", overrides=["rounds=4"])
    assert_same(longer, run(KINDS[kind], 4, tmp_path / "long"))
    assert read_config(tmp_path / "run") == read_config(tmp_path / "long")
    assert_same(gossamer.resume(tmp_path / "run"), longer)


def test_killed_before_the_first_commit_of_the_longer_run(tmp_path: Path) -> None:
    run(KINDS["clients"], 2, tmp_path / "run")
    with pytest.raises(Injected):
        gossamer.resume(tmp_path / "run", overrides=["rounds=4"], hooks=failing("train", True, 1))
    assert_same(gossamer.resume(tmp_path / "run"), run(KINDS["clients"], 4, tmp_path / "long"))


def test_an_end_between_evaluations_counts_for_nothing(tmp_path: Path) -> None:
    """The last round is evaluated, whatever it is: patience must not count it where the run goes on."""
    data = configure({"evaluation.every": 2, "stop": {"metric": "accuracy", "patience": 2, "min_delta": 0.9}})
    run(data, 3, tmp_path / "run")
    longer = gossamer.resume(tmp_path / "run", overrides=["rounds=9"])
    long = run(data, 9, tmp_path / "long")
    assert len(long.metrics) == 6
    assert digest(longer.params) == digest(long.params)
    assert without_clocks(longer.metrics)[3:] == without_clocks(long.metrics)[3:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            configure({"train.schedule": "cosine"}),
            "begun for 2, and train.schedule 'cosine' goes by",
        ),
        (decentralized({"peers.final_merge": True}), "begun for 2, and peers.final_merge merges in the last round"),
    ],
)
def test_where_the_end_is_fixed(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    run(data, 2, tmp_path / "run")
    with pytest.raises(ConfigError, match=f"rounds = 4, but the run was {message}.*: start another run of 4"):
        gossamer.resume(tmp_path / "run", overrides=["rounds=4"])
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 2\n", "rounds: 4\n"))
    with pytest.raises(CheckpointError, match=r"config\.yaml says rounds = 4, but the run was committed with 2"):
        gossamer.resume(tmp_path / "run")


def test_shorter_than_what_is_done(tmp_path: Path) -> None:
    run(KINDS["clients"], 3, tmp_path / "run")
    with pytest.raises(ConfigError, match="rounds = 2, but 3 rounds are done: give 3 or more"):
        gossamer.resume(tmp_path / "run", overrides=["rounds=2"])
    with pytest.raises(ConfigError, match="rounds"):
        gossamer.resume(tmp_path / "run", overrides=["rounds=0"])
    assert read_config(tmp_path / "run")["rounds"] == 3


def test_nothing_else_may_change_with_it(tmp_path: Path) -> None:
    run(KINDS["clients"], 2, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.1", "lr: 0.2"))
    with pytest.raises(CheckpointError, match="restore that entry"):
        gossamer.resume(tmp_path / "run", overrides=["rounds=4"])


class TestSeveralRuns:
    DATA = configure({"methods": {"slow": {"train": {"lr": 0.01}}, "fast": {}}, "workload.model": "softmax"})

    def test_all_of_them_go_on(self, tmp_path: Path) -> None:
        with pytest.raises(Injected):  # amid the second one
            gossamer.run(self.DATA | {"rounds": 2}, out=tmp_path / "run", hooks=failing("train", True, 3))
        longer = gossamer.resume(tmp_path / "run", overrides=["rounds=3"])
        long = run(self.DATA, 3, tmp_path / "long")
        assert [digest(one.params) for one in longer.runs] == [digest(one.params) for one in long.runs]
        assert read_experiment(tmp_path / "run") == read_experiment(tmp_path / "long")

    def test_none_goes_on_where_one_cannot(self, tmp_path: Path) -> None:
        methods = {"constant": {}, "cosine": {"train.schedule": "cosine"}}
        run(self.DATA | {"methods": methods}, 1, tmp_path / "run")
        with pytest.raises(ConfigError, match="'cosine' goes by"):
            gossamer.resume(tmp_path / "run", overrides=["rounds=3"])
        assert read_experiment(tmp_path / "run")["rounds"] == 1
        assert read_config(tmp_path / "run" / "constant")["rounds"] == 1

    def test_methods_with_rounds_of_their_own(self, tmp_path: Path) -> None:
        run(self.DATA | {"methods": {"long": {"rounds": 2}, "short": {}}}, 1, tmp_path / "run")
        with pytest.raises(ConfigError, match=r"methods\.long has rounds of its own: resume its runs one by one"):
            gossamer.resume(tmp_path / "run", overrides=["rounds=3"])
        assert len(gossamer.resume(tmp_path / "run" / "long", overrides=["rounds=3"]).metrics) == 3


class TestDevices:
    def test_of_all_modes(self, tmp_path: Path) -> None:
        data = configure({"engine.device": "cpu", "rounds": 1})
        assert_same(gossamer.run(data, out=tmp_path / "run"), run(configure(), 1, tmp_path / "other"))
        engine = read_config(tmp_path / "run")["engine"]
        assert (engine["device"], engine["modes"][0]["device"]) == ("cpu", "cpu")

    @pytest.mark.parametrize(
        ("device", "message"),
        [
            ("cuda:7", "on device 'cuda:7', which this machine does not have"),
            ("gpu", "engine.device = 'gpu': give a device as torch names it"),
        ],
    )
    @pytest.mark.parametrize("modes", ["auto", [{"capacity": 1.0, "device": "cpu"}]])
    def test_that_are_not_there(self, device: str, message: str, modes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            gossamer.run(configure({"engine.device": device, "engine.modes": modes}))

    def test_another_one_from_a_resume_on(self, tmp_path: Path) -> None:
        with pytest.raises(Injected):
            gossamer.run(configure(), out=tmp_path / "run", hooks=failing("train", True, 2))
        with pytest.raises(ConfigError, match="'cuda:7', which this machine does not have"):
            gossamer.resume(tmp_path / "run", overrides=["engine.device=cuda:7"])
        with pytest.warns(GossamerWarning, match="engine.device = 'cpu' changes the last bits from here on"):
            done = gossamer.resume(tmp_path / "run", overrides=["engine.device=cpu"])
        assert_same(done, run(configure(), 3, tmp_path / "whole"))
        assert read_config(tmp_path / "run")["engine"]["device"] is None
