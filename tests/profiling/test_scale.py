"""Rounds of other sizes: closed forms, and what becomes the bottleneck."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import DataError
from gossamer.profiling.scale import DRIVER, REST, WORKERS, Jobs, extrapolate, jobs_of, train_seconds
from gossamer.profiling.trace import read_trace
from traces import span, write


class TestTrainSeconds:
    def test_one_worker_is_serial(self) -> None:
        assert train_seconds([1.0, 2.0, 3.0], 1, 0.0) == pytest.approx(6.0)

    def test_equal_jobs_are_shared_out(self) -> None:
        assert train_seconds([1.0] * 12, 4, 0.0) == pytest.approx(3.0)

    def test_a_slow_driver_is_serial(self) -> None:
        assert train_seconds([0.1] * 50, 10, 1.0) == pytest.approx(0.1 + 50.0)

    @given(st.lists(st.floats(0.01, 1), min_size=1, max_size=40), st.integers(1, 6), st.floats(0, 0.1))
    def test_bounds(self, seconds: list[float], workers: int, handling: float) -> None:
        found = train_seconds(seconds, workers, handling)
        assert found >= max(max(seconds), sum(seconds) / workers, handling * len(seconds)) - 1e-9
        assert found <= sum(seconds) + handling * len(seconds) + 1e-9


@pytest.mark.parametrize(
    ("handling", "rest", "bottleneck"), [(1e-4, 0.01, WORKERS), (0.1, 0.01, DRIVER), (1e-4, 50.0, REST)]
)
def test_the_bottleneck_is_named(handling: float, rest: float, bottleneck: str) -> None:
    found = extrapolate(Jobs([0.1], 10, handling, [rest], 2), 10, 200, 2)
    assert found.bottleneck == bottleneck
    assert found.seconds.mean == pytest.approx(max(200 * 0.05, 200 * handling) + rest, rel=0.02)


def test_more_workers_help_until_the_driver_is_busy() -> None:
    jobs = Jobs([0.1], 10, 0.01, [0.0], 2)
    found = [extrapolate(jobs, 10, 1000, workers).seconds.mean for workers in (1, 2, 5, 10, 50, 100)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(1000 * 0.01, rel=0.02)


def recorded(directory: Path) -> None:
    """Write four rounds, in which two workers train two jobs each; times in milliseconds."""
    driver, rounds, workers = list[list](), [], ([], [])
    for number in range(4):
        at = 100.0 * number
        rounds.append((number + 1, at, at + 60))
        driver += [span("coordinate", at + 2, at + 40), span("send", at + 3, at + 4), span("wait", at + 5, at + 38)]
        for own in workers:
            own += [span("wait", at + 1, at + 5), span("train", at + 5, at + 15), span("wait", at + 15, at + 16)]
            own += [span("receive", at + 16, at + 17), span("train", at + 17, at + 37), span("wait", at + 37, at + 90)]
    write(directory, "driver", driver, rounds)
    for number, own in enumerate(workers):
        write(directory, "worker", own, pid=number + 2)


def test_jobs_are_taken_out_of_a_record(tmp_path: Path) -> None:
    recorded(tmp_path)
    found = jobs_of(read_trace(tmp_path).rounds)
    assert sorted(found.seconds) == pytest.approx([0.010] * 8 + [0.021] * 8, abs=1e-6)
    assert (found.per_round, found.workers) == (4, 2)
    assert found.rest == pytest.approx([0.022] * 4)
    assert found.handling == pytest.approx((1 + 1 + 1 + 2) / 1000 / 4)


def test_a_run_without_workers_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("coordinate", 0, 50)], [(1, 0, 90)])
    with pytest.raises(DataError, match="no worker has trained"):
        jobs_of(read_trace(tmp_path).rounds)
