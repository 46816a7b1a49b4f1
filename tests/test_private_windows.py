"""Private state of clients that hold a part of the model: it lies in whole width, and follows the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from keeping import DECAY, NEWCOMER, Keeping

from federation import LEVELS, SINGLY, STACKED, Injected, assert_same, configure, failing, modes, relative_error
from gossamer import resume, run
from gossamer.algorithms.scaffold import Scaffold
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.testing import check_algorithm
from slow import initial_model
from slow_federated import Params, Sent, add, gradients_of, mean_change, window_of
from test_client_state import stored

MODES = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
STRATEGIES = pytest.mark.parametrize("strategy", ["rolling", "random", "magnitude"])


def keeping(strategy: str = "rolling", levels: tuple[float, ...] = LEVELS, **mode: bool) -> dict[str, Any]:
    """Return a federation whose clients get a capacity anew in every round."""
    sub = {"capacities": list(levels), "strategy": strategy, "assignment": "dynamic"}
    changes = {"algorithm": "keeping:Keeping", "submodel": sub, "rounds": 5, "train.lr": 0.02}
    return configure(changes | modes(levels, **mode))


def slow_keeping(parts: Parts) -> tuple[Params, dict[int, tuple[Params, int]]]:
    """Keep a dict of full rows by client; return the model, and the dict."""
    model = {name: value.double() for name, value in initial_model(parts).items()}
    kept: dict[int, tuple[Params, int]] = {}
    for round in range(parts.config.rounds):
        sent, plan, rate = list[Sent](), parts.planner.plan(round), parts.config.train.lr
        for client, variant, weight in zip(plan.client.tolist(), plan.variant, plan.weight, strict=True):
            capacity = parts.task.capacities[variant]
            where = window_of(parts, round, client, capacity, model)
            row, steps = kept.get(client, ({n: torch.full_like(v, NEWCOMER) for n, v in model.items()}, 0))
            start = {name: value[where[name]].clone() for name, value in model.items()}
            own, velocity = start, {name: value[where[name]] / (1 + steps / 10) for name, value in row.items()}
            gradients = gradients_of(parts, round, client, 1 / capacity)
            for gradient in gradients:
                velocity = add((DECAY, velocity), (1.0, gradient(own)))
                own = add((1.0, own), (-rate, velocity))
            for name, value in velocity.items():
                row[name][where[name]] = value
            kept[client] = row, steps + len(gradients)
            sent.append(Sent(client, weight, len(gradients), where, add((1.0, own), (-1.0, start))))
        model = add((1.0, model), (1.0, mean_change(model, sent)[0]))
    return model, kept


@pytest.mark.sweep(keep=0.5)
@MODES
@pytest.mark.parametrize("strategy", ["rolling", "random"])
def test_slow_version(tmp_path: Path, mode: dict[str, bool], strategy: str) -> None:
    config = keeping(strategy, **mode)
    parts = build(parse(config))
    done, (model, kept) = run(config, out=tmp_path / "run"), slow_keeping(parts)
    assert relative_error(done.params, model) < 1e-5
    rows, counts = stored(done.directory, "velocity"), stored(done.directory, "steps")
    assert rows.keys() == counts.keys() == kept.keys()
    outside = 0
    for client, (row, steps) in kept.items():
        assert counts[client].tolist() == [steps]
        views = parts.workload.layout.views(rows[client])
        assert relative_error(views, row) < 1e-5
        for name, value in row.items():
            never = value == NEWCOMER
            assert bool((views[name][never] == NEWCOMER).all())
            outside += int(never.sum())
    assert outside > 0


@pytest.mark.sweep(keep=0.34, at_least=3)
@MODES
@STRATEGIES
def test_workers_and_blocks_change_no_bits(tmp_path: Path, mode: dict[str, bool], strategy: str) -> None:
    config = keeping(strategy, **mode) | {"checkpoint": {"every_seconds": 1000}}
    reference = run(config, out=tmp_path / "reference")
    for workers, block_size in [(1, "auto"), (2, 2)]:
        engine = config["engine"] | {"workers": workers, "block_size": block_size}
        done = run(config | {"engine": engine}, out=tmp_path / f"{workers}-{block_size}")
        assert_same(done, reference)
        assert_same_rows(done.directory, reference.directory)


def assert_same_rows(directory: Path, other: Path) -> None:
    for name in ("velocity", "steps"):
        found, expected = stored(directory, name), stored(other, name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[client], expected[client]) for client in found)


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize(("span", "started"), [("train", False), ("exchange", False), ("commit", True)])
def test_resumed(tmp_path: Path, span: str, started: bool) -> None:
    config = keeping()
    whole = run(config, out=tmp_path / "whole")
    with pytest.raises(Injected):
        run(config, out=tmp_path / "part", hooks=failing(span, started, 3))
    assert_same(resume(tmp_path / "part", overrides=["engine.workers=1"]), whole)
    assert_same_rows(tmp_path / "part", whole.directory)


def test_rows_of_the_dropped_stay(tmp_path: Path) -> None:
    """A client whose updates are not finite from round 3 on keeps what it had."""
    workload = {"name": "faulty:Faulty", "clients": [2], "first_round": 2, "model": {"name": "mlp", "hidden": [32]}}
    config = keeping() | {"clients": {"num": 4, "per_round": 4}}
    config["workload"] = config["workload"] | workload
    before, after = (run(config | {"rounds": n}, out=tmp_path / f"{n}") for n in (2, 4))
    for name in ("velocity", "steps"):
        rows, later = stored(before.directory, name), stored(after.directory, name)
        same = {client: torch.equal(rows[client], later[client]) for client in rows}
        assert same == {client: client == 2 for client in range(4)}


def test_disk_bound(tmp_path: Path) -> None:
    """On disk are at most twice the live rows for each of two commits, and those of the round in between."""
    config = keeping() | {"clients": {"num": 4, "per_round": 3}, "rounds": 10}
    done = run(config, out=tmp_path / "run")
    files = list((done.directory / "clients").glob("velocity.*"))
    size = sum(path.stat().st_size for path in files)
    assert size <= 4 * build(parse(config)).workload.layout.d * (2 * 2 * 4 + 3)
    assert sum(path.stat().st_size for path in (done.directory / "clients").glob("steps.*")) <= 4 * (2 * 2 * 4 + 3)


def test_contract() -> None:
    check_algorithm(Keeping({}))


def test_theory_still_refuses() -> None:
    """That state can be kept does not mean that SCAFFOLD could use it."""
    assert Scaffold.traits.client_arrays
    assert Scaffold.traits.whole_models_only is not None
