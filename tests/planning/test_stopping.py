"""Runs that end early: patience and targets against a slow count, bits on resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gossamer
from federation import Injected, assert_same, configure, events, failing
from gossamer.errors import ConfigError, GossamerWarning
from gossamer.options import parse_options
from gossamer.planning.stopping import StopOptions, watch
from gossamer.round_record import Progress
from slow_peers import decentralized


def ends(options: StopOptions, values: list[float | None], every: int = 1) -> int | None:
    """Return the round after which a run with these values ends."""
    progress = Progress()
    for round, value in enumerate(values, start=1):
        progress.round = round
        record = {"accuracy": value} if round % every == 0 else {"train_loss": 1.0}
        watch(options, every, progress, record, lambda kind, **fields: None)
        if progress.stop_reason:
            return round
    return None


def slowly(values: list[float | None], patience: int, min_delta: float, sign: int) -> int | None:
    """Return the same by looking back from every round."""
    best, last = None, 0
    for round, value in enumerate(values, start=1):
        if value is not None and (best is None or sign * (value - best) > min_delta):
            best, last = value, round
        if round - last >= patience:
            return round
    return None


VALUES = st.lists(st.one_of(st.none(), st.integers(0, 8).map(float)), max_size=20)


@given(VALUES, st.integers(1, 5), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from(["min", "max"]))
def test_patience(values: list[float | None], patience: int, min_delta: float, mode: Any) -> None:
    options = StopOptions(metric="accuracy", patience=patience, min_delta=min_delta, mode=mode)
    assert ends(options, values) == slowly(values, patience, min_delta, 1 if mode == "max" else -1)


@given(VALUES, st.integers(0, 8))
def test_target(values: list[float | None], target: int) -> None:
    options = StopOptions(metric="accuracy", target=target)
    reached = [round for round, value in enumerate(values, start=1) if value is not None and value >= target]
    assert ends(options, values) == (reached[0] if reached else None)


def test_only_rounds_that_are_evaluated_count() -> None:
    options = StopOptions(metric="accuracy", patience=2)
    assert ends(options, [0.5] * 12, every=3) == 9


@pytest.mark.parametrize(("metric", "ended"), [("loss", 3), ("accuracy", 1), ("bits_per_character", 3)])
def test_which_way_is_better_follows_from_the_name(metric: str, ended: int) -> None:
    options, progress = StopOptions(metric=metric, target=0.3), Progress()
    for round, value in enumerate([0.9, 0.5, 0.2], start=1):
        progress.round = round
        watch(options, 1, progress, {metric: value}, lambda kind, **fields: None)
        if progress.stop_reason:
            break
    assert progress.round == ended


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "ends nothing by itself: give stop.target or stop.patience"),
        ({"metric": "accuracy", "target": 1, "min_delta": 0.1}, "changes nothing without stop.patience"),
        ({"metric": "accuracy", "patience": 0}, "patience"),
        ({"target": 1}, "metric"),
    ],
)
def test_options_that_say_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(StopOptions, options, "stop")


STALE = {"rounds": 9, "stop": {"metric": "accuracy", "patience": 2, "min_delta": 0.9}}


class TestRuns:
    def test_ends_with_the_bits_of_the_rounds_before(self, tmp_path: Path) -> None:
        run = gossamer.run(configure(STALE), out=tmp_path / "run")
        assert len(run.metrics) == 3
        assert "for stop.patience = 2 evaluations" in run.stop_reason
        assert events(run.directory, "ended") == [{"round": 3, "reason": run.stop_reason}]
        assert_same(run, gossamer.run(configure({"rounds": 3}), out=tmp_path / "three"))

    def test_is_finished(self, tmp_path: Path) -> None:
        run = gossamer.run(configure(STALE), out=tmp_path / "run")
        again = gossamer.resume(run.directory)
        assert_same(run, again)
        assert again.stop_reason == run.stop_reason
        with pytest.raises(ConfigError, match=r"rounds = 12 changes nothing, because the run has ended after 3 rounds"):
            gossamer.resume(run.directory, overrides=["rounds=12"])

    @pytest.mark.parametrize(("span", "number"), [("exchange", 2), ("exchange", 3), ("commit", 4)])
    def test_counts_on_after_an_interruption(self, tmp_path: Path, span: str, number: int) -> None:
        with pytest.raises(Injected):
            gossamer.run(configure(STALE), out=tmp_path / "run", hooks=failing(span, True, number))
        run = gossamer.resume(tmp_path / "run")
        assert len(run.metrics) == 3
        assert len(events(run.directory, "ended")) == 1

    def test_peers_and_nested_metrics(self, tmp_path: Path) -> None:
        stop = {"metric": "accuracy_peers.mean", "target": 0.0}
        run = gossamer.run(decentralized({"stop": stop}), out=tmp_path / "run")
        assert (len(run.metrics), "reached stop.target = 0" in run.stop_reason) == (1, True)

    def test_unknown_metrics_are_refused_at_the_first_evaluation(self, tmp_path: Path) -> None:
        stop = {"stop": {"metric": "acuracy", "patience": 2}}
        with pytest.raises(ConfigError, match=r"'acuracy' is not logged; did you mean 'accuracy'\? \(there are: round"):
            gossamer.run(configure(stop), out=tmp_path / "run")

    def test_a_last_merge_needs_a_last_round(self) -> None:
        changes = {"stop": {"metric": "accuracy", "patience": 2}, "peers.final_merge": True}
        with pytest.raises(ConfigError, match="merges in round 3, but stop may end the run before it"):
            gossamer.run(decentralized(changes))

    def test_patience_beyond_the_run_is_warned_of(self, tmp_path: Path) -> None:
        changes = {"stop": {"metric": "accuracy", "patience": 5}, "rounds": 1}
        with pytest.warns(GossamerWarning, match=r"stop\.patience = 5 .*the run has 1 evaluations"):
            gossamer.run(configure(changes), out=tmp_path / "run")
