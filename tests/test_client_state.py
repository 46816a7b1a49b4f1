"""An algorithm with private state on its clients: SCAFFOLD."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting import NEWCOMER
from torch import Tensor

from federation import SCAFFOLD, SINGLY, STACKED, assert_same, configure, modes, relative_error
from gossamer import run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.storage.checkpoint import Checkpoints
from slow import initial_model, perceptron, sample_order, training_samples

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
Params = dict[str, Tensor]


def combine(*terms: tuple[float, Params]) -> Params:
    """Return a weighted sum of models."""
    return {name: sum((weight * params[name] for weight, params in terms), torch.zeros(())) for name in terms[0][1]}


def slow_scaffold(config: dict[str, Any]) -> tuple[Params, dict[int, Params]]:
    """Run SCAFFOLD as in algorithm 1, option II, of the paper; return the model and the clients' controls."""
    parts = build(parse(config))
    model, rate = initial_model(parts), parts.config.train.lr
    zero = combine((0.0, model))
    server, controls = zero, dict[int, Params]()
    for round in range(parts.config.rounds):
        changes, weights, control_changes = [], [], []
        for client in parts.planner.plan(round).client.tolist():
            mine, own = controls.get(client, zero), model
            batches = sample_order(parts, round, client)
            for batch in batches:
                leaves = {name: value.detach().requires_grad_() for name, value in own.items()}
                images, labels = training_samples(parts, batch)
                loss = F.cross_entropy(perceptron(leaves, images), labels)
                grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
                own = combine((1.0, own), (-rate, grads), (rate, mine), (-rate, server))
            step = 1 / (len(batches) * rate)
            controls[client] = combine((1.0, mine), (-1.0, server), (step, model), (-step, own))
            changes.append(combine((1.0, own), (-1.0, model)))
            control_changes.append(combine((1.0, controls[client]), (-1.0, mine)))
            weights.append(len(parts.workload.partition.of_client(client)))
        shares = [weight / sum(weights) for weight in weights]
        model = combine((1.0, model), *zip(shares, changes, strict=True))
        server = combine((1.0, server), *((1 / parts.config.clients.num, change) for change in control_changes))
    return model, controls


def stored(directory: Path, name: str = "control") -> dict[int, Tensor]:
    """Read every client's row from the files of a run, by the index in its last commit."""
    latest = Checkpoints(directory / "checkpoints").latest()
    assert latest is not None
    prefix = f"store.clientstore/{name}/"
    index = {key.removeprefix(prefix): array for key, array in latest.arrays.items() if key.startswith(prefix)}
    width, generation, _ = index["file"].tolist()
    rows = np.fromfile(directory / f"clients/{name}.{generation}.rows", np.float32).reshape(-1, width)
    slots = zip(index["clients"].tolist(), index["slots"].tolist(), strict=True)
    return {client: torch.from_numpy(rows[slot]) for client, slot in slots}


@EITHER
def test_slow_version(tmp_path: Path, mode: dict[str, bool]) -> None:
    """Clients differ in size, and so in local steps."""
    ragged = {"clients.partition": {"name": "n-classes", "n": 3}, "clients.per_round": 6, "train.batch_size": 4}
    config = configure(SCAFFOLD | modes(**mode) | ragged)
    assert len(set(build(parse(config)).planner.plan(0).steps.tolist())) > 1
    done = run(config, out=tmp_path / "run")
    model, controls = slow_scaffold(config)
    assert relative_error(done.params, model) < 1e-5
    rows = stored(done.directory)
    assert rows.keys() == controls.keys()
    layout = build(parse(config)).workload.layout
    for client, control in controls.items():
        assert relative_error(layout.views(rows[client]), control) < 1e-4


@EITHER
def test_workers_and_blocks_change_no_bits(tmp_path: Path, mode: dict[str, bool]) -> None:
    config = configure(SCAFFOLD | modes(**mode) | {"clients.per_round": 7, "checkpoint.every_seconds": 1000})
    reference = run(config, out=tmp_path / "reference")
    expected = stored(reference.directory)
    for workers, block_size in [(0, 1), (0, 4), (1, "auto"), (2, "auto"), (2, 1)]:
        engine = config["engine"] | {"workers": workers, "block_size": block_size}
        done = run(config | {"engine": engine}, out=tmp_path / f"{workers}-{block_size}")
        assert_same(done, reference)
        found = stored(done.directory)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[client], expected[client]) for client in found)


@EITHER
@pytest.mark.parametrize("workers", [0, 2])
def test_two_arrays(tmp_path: Path, mode: dict[str, bool], workers: int) -> None:
    """Each client gets back what is its own, in whichever process it is trained; a newcomer starts as it should."""
    config = configure({"algorithm": "counting:Counting", "rounds": 5, "engine.workers": workers} | modes(**mode))
    parts = build(parse(config))
    times = Counter(client for round in range(5) for client in parts.planner.plan(round).client.tolist())
    done = run(config, out=tmp_path / "run")
    counted = stored(done.directory, "times")
    assert {client: float(row[0]) - NEWCOMER for client, row in counted.items()} == times
    assert all(bool((row == row[0]).all()) for row in counted.values())
    last, plan = stored(done.directory, "last"), parts.planner.plan(4)
    share = plan.weight / plan.weight.sum()
    models = [parts.workload.layout.views(last[client]) for client in plan.client.tolist()]
    assert relative_error(combine(*zip(share.tolist(), models, strict=True)), done.params) < 1e-5
    plain = run(configure({"rounds": 5} | modes(**mode)), out=tmp_path / "plain")
    assert relative_error(done.params, plain.params) < 1e-6


def test_only_participants_have_rows(tmp_path: Path) -> None:
    config = configure(SCAFFOLD | {"clients.num": 30, "clients.per_round": 2})
    planner = build(parse(config)).planner
    chosen = {client for round in range(3) for client in planner.plan(round).client.tolist()}
    done = run(config, out=tmp_path / "run")
    rows = stored(done.directory)
    assert rows.keys() == chosen
    assert all(bool(row.any()) for row in rows.values())


def test_old_rows_are_dropped(tmp_path: Path) -> None:
    """On disk are at most twice the live rows for each of two commits, and those of the round in between."""
    config = configure(SCAFFOLD | {"clients": {"num": 4, "per_round": 3}, "rounds": 12})
    done = run(config, out=tmp_path / "run")
    assert len(stored(done.directory)) == 4
    size = sum(path.stat().st_size for path in (done.directory / "clients").iterdir())
    assert size <= 4 * build(parse(config)).workload.layout.d * (2 * 2 * 4 + 3)


def test_controls_matter(tmp_path: Path) -> None:
    """In the first round all controls are zero, and SCAFFOLD is FedAvg; then no longer."""
    for rounds, equal in ((1, True), (3, False)):
        changes = {"rounds": rounds, "clients.per_round": 8, "clients.partition": {"name": "n-classes", "n": 2}}
        plain = run(configure(changes), out=tmp_path / f"plain-{rounds}")
        controlled = run(configure({"algorithm": "scaffold"} | changes), out=tmp_path / f"controlled-{rounds}")
        assert (relative_error(controlled.params, plain.params) < 1e-6) == equal


def test_whole_models_only(tmp_path: Path) -> None:
    levels = {"submodel": {"capacities": [0.5, 1.0], "strategy": "rolling"}}
    with pytest.raises(ConfigError, match="trains whole models only, because the server's control variate"):
        run(configure(SCAFFOLD | levels), out=tmp_path / "run")
