"""A slow process is found and named, and how slow it is."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import gossamer
from gossamer.aggregate.codecs import CODECS, Sign
from gossamer.profiling.outliers import find_outliers
from gossamer.profiling.trace import Round, read_trace
from gossamer.reports.profile import examine, render
from traces import span, write

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 200}, "model": "softmax"}


class Sleepy(Sign):
    """Takes a time that is stated; in the worker that comes first, and so makes the file `mark`, a multiple of it."""

    mark: str
    seconds: float
    factor: float

    def compress(self, rows: Tensor, **draws: Any) -> Tensor:
        """Sleep, and compress."""
        if multiprocessing.parent_process() is not None:
            with suppress(FileExistsError):
                os.symlink(str(os.getpid()), self.mark)
            is_slow = os.readlink(self.mark) == str(os.getpid())
            time.sleep(self.seconds * (self.factor if is_slow else 1.0))
        return super().compress(rows, **draws)


def test_a_secret_slowdown_of_a_real_worker_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two workers, that which trains first compresses thrice as slowly, or so: others use the processors, too."""
    monkeypatch.setitem(CODECS, "sleepy", Sleepy)
    mark = tmp_path / "slow"
    codec = {"name": "sleepy", "mark": str(mark), "seconds": 0.02, "factor": 3.0}
    config = {
        "rounds": 6,
        "workload": IMAGES,
        "clients": {"num": 8, "per_round": 8},
        "train": {"lr": 0.1},
        "communication": {"uplink": codec},
        "engine": {"workers": 2, "modes": "auto"},
        "profile": True,
    }
    trace = read_trace(gossamer.run(config, out=tmp_path / "run").directory)
    names = {lane.pid: lane.name for one in trace.rounds for lane in one.lanes}
    found = {one.stage: one for one in find_outliers(trace.rounds)}["compress"]
    assert found.process == names[int(mark.readlink().name)]
    assert found.ratio.mean > 1.5
    assert f"{found.process} takes" in render(examine(trace))


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


def test_who_waited_for_a_processor_is_not_slow(tmp_path: Path) -> None:
    """A worker takes thrice as long as another: found where it worked, and not where it waited for a processor."""
    for name, delay in (("worked", 0.0), ("waited", 20.0)):
        rounds = [(n + 1, 100.0 * n, 100.0 * n + 90) for n in range(5)]
        write(tmp_path / name, "driver", [span("plan", begin, begin + 1) for _, begin, _ in rounds], rounds)
        for pid, seconds in ((2, 10), (3, 30)):
            waited = delay if pid == 3 else 0.0
            spans = [span("mix", begin, begin + seconds, delay=waited) for _, begin, _ in rounds]
            write(tmp_path / name, "worker", spans, pid=pid)
    (slow,) = find_outliers(read_trace(tmp_path / "worked").rounds)
    assert (slow.process, slow.ratio.mean) == ("worker-1", pytest.approx(3.0))
    assert find_outliers(read_trace(tmp_path / "waited").rounds) == []


def test_one_process_has_no_others(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("plan", 0, 50)], [(1, 0, 90)])
    assert find_outliers(read_trace(tmp_path).rounds) == []
