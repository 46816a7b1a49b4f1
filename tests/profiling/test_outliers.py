"""A slow process is found and named, and how slow it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gossamer.profiling.outliers import find_outliers
from gossamer.profiling.trace import Round, read_trace
from gossamer.reports.profile import examine, render
from traces import span, write


def recorded(directory: Path, factor: float, seed: int = 0) -> list[Round]:
    """Return ten rounds of three workers with noise of 10 %, of which the second mixes `factor` times as slowly."""
    draws, rounds = np.random.default_rng(seed), [(n + 1, 100.0 * n, 100.0 * n + 90) for n in range(10)]
    write(directory, "driver", [span("plan", begin, begin + 1) for _, begin, _ in rounds], rounds)
    for worker in range(3):
        spans = []
        for _, begin, _ in rounds:
            for piece in range(2):
                at, (train, mix) = begin + 40 * piece, np.array([10, 8]) * draws.uniform(0.9, 1.1, 2)
                mix *= factor if worker == 1 else 1.0
                spans += [span("train", at, at + train), span("mix", at + train, at + train + mix)]
        write(directory, "worker", spans, pid=worker + 2)
    return read_trace(directory).rounds


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_a_secret_slowdown_is_found(tmp_path: Path, factor: float) -> None:
    (one,) = find_outliers(recorded(tmp_path, factor))
    assert (one.process, one.stage) == ("worker-1", "mix")
    assert one.ratio.mean == pytest.approx(factor, rel=0.1)
    assert one.seconds == pytest.approx(2 * 0.008 * (factor - 1), rel=0.1)
    told = render(examine(read_trace(tmp_path)))
    assert "worker-1 takes" in told
    assert "times as long for a piece of mix as the others" in told


def test_noise_is_no_slowdown(tmp_path: Path) -> None:
    for seed in range(20):
        assert find_outliers(recorded(tmp_path / str(seed), 1.0, seed)) == []


def test_one_process_has_no_others(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("plan", 0, 50)], [(1, 0, 90)])
    assert find_outliers(read_trace(tmp_path).rounds) == []
