"""Numbers that participants send beside their models: weighted, added up and averaged over all survivors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federation import LEVELS, SINGLY, STACKED, assert_same, configure, digest, mixed, modes
from gossamer import run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.training.job import BlockResult
from slow_federated import UNEQUAL

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
WORKERS = pytest.mark.parametrize(("workers", "block_size"), [(0, "auto"), (0, 2), (2, "auto"), (2, 1)])
SUB_MODELS = {"submodel": {"capacities": LEVELS, "strategy": "random", "mask_labels": True}}
TALLYING = {"algorithm": "tallying:Tallying"} | UNEQUAL


def tallies(config: dict[str, Any], where: Path) -> tuple[float, float, float, float]:
    """Return the count and the mean number of steps that the server saw in one round, and those expected."""
    parts = build(parse(config))
    engine = parts.start_engine(where)[0]
    train_blocks = engine._train_blocks

    def watched(*arguments: Any) -> Iterator[BlockResult]:
        for result in train_blocks(*arguments):
            sent = [value for value in result.payload["x"] if value is not None]
            assert all(value.data_ptr() % 64 == 0 for value in sent), "after a scalar, rows must still start aligned"
            yield result

    engine._train_blocks = watched
    try:
        plan = parts.planner.plan(0)
        list(engine.train(plan))
        engine.exchange(plan)
        kept, state = engine.survivors(plan), engine.read()
    finally:
        engine.close()
    assert all(bool((state[name] == state[name][0, 0]).all()) for name in ("count", "steps"))
    expected = float(np.average(plan.steps[kept], weights=plan.weight[kept]))
    return float(state["count"][0, 0]), float(state["steps"][0, 0]), float(kept.sum()), expected


@pytest.mark.sweep(keep=0.5)
@EITHER
@WORKERS
@pytest.mark.parametrize("changes", [{}, SUB_MODELS], ids=["whole", "sub-models"])
def test_sums_and_means(
    tmp_path: Path, mode: dict[str, bool], workers: int, block_size: int | str, changes: dict[str, Any]
) -> None:
    """Windows of their own, and means per label, are no matter of a scalar's."""
    levels = LEVELS if changes else (1.0,)
    way = {"engine.workers": workers, "engine.block_size": block_size}
    count, steps, num, expected = tallies(configure(TALLYING | changes | modes(levels, **mode) | way), tmp_path)
    assert count == num == 6
    assert steps == pytest.approx(expected, rel=1e-6)


@pytest.mark.sweep(keep=0.5)
@EITHER
@WORKERS
def test_survivors_alone(tmp_path: Path, mode: dict[str, bool], workers: int, block_size: int | str) -> None:
    faulty = {"workload.name": "faulty:Faulty", "workload.clients": [2, 5], "clients.per_round": 8}
    way = {"engine.workers": workers, "engine.block_size": block_size}
    count, steps, num, expected = tallies(configure(TALLYING | faulty | modes(**mode) | way), tmp_path)
    assert count == num == 6
    assert steps == pytest.approx(expected, rel=1e-6)


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("channels_last", [False, True])
def test_models_are_those_of_fedavg(tmp_path: Path, mode: dict[str, bool], channels_last: bool) -> None:
    """What is sent beside them changes no bit of the models, in processes neither."""
    cnn = {"workload.model": {"name": "cnn", "width": 0.125}, "rounds": 2}
    way = modes(**mode | {"channels_last": channels_last})
    plain = run(configure(UNEQUAL | cnn | way), out=tmp_path / "plain")
    for workers in (0, 2):
        config = configure(TALLYING | cnn | way | {"engine.workers": workers})
        assert digest(run(config, out=tmp_path / str(workers)).params) == digest(plain.params)


def test_more_blocks_than_room(tmp_path: Path) -> None:
    """The few slots in which workers leave results have room for scalars too."""
    clients = {"clients": {"num": 60, "per_round": 50}, "rounds": 2, "algorithm": "tallying:Tallying"}
    config = configure(mixed("tallying:Tallying", (0.5, 1.0)) | clients | {"submodel.strategy": "random"})
    reference = run(config, out=tmp_path / "reference")
    for workers, block_size in [(1, 1), (2, 1), (2, 4)]:
        engine = config["engine"] | {"workers": workers, "block_size": block_size}
        assert_same(run(config | {"engine": engine}, out=tmp_path / f"{workers}-{block_size}"), reference)


def test_every_round_anew(tmp_path: Path) -> None:
    """The tallies of a round are its own."""
    config = configure(TALLYING | {"engine.workers": 2})
    parts = build(parse(config))
    engine, _ = parts.start_engine(tmp_path)
    try:
        seen = []
        for round in range(2):
            plan = parts.planner.plan(round)
            list(engine.train(plan))
            engine.exchange(plan)
            seen.append(engine.read()["steps"])
            assert torch.allclose(seen[round], torch.tensor(np.average(plan.steps, weights=plan.weight)).float())
    finally:
        engine.close()
