"""GASLoC and NoLoCo: against independent loops, against theory, and where they are something known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow_decentralized import DOUBLY, Quadratics, Rows, built, drive, mix, models, pushing, quadratics, start
from test_slow_versions import FEW, NUM_ROUNDS, PEERS, SEEDS, STEPS, assert_equal, rate

from federation import assert_same
from gossamer import run
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.decentralized.outer import GASLoC, NoLoCo
from gossamer.algorithms.diloco import DiLoCo
from gossamer.config.loading import parse
from gossamer.config.resolve import resolve
from gossamer.errors import ConfigError
from gossamer.topology import Topology, build
from slow_peers import decentralized


def local_sgd(problem: Quadratics, i: int, x: Rows, steps: int, lr: float) -> Rows:
    """Return where a peer's plain local steps end."""
    own = torch.tensor(x, requires_grad=True)
    optimizer = torch.optim.SGD([own], lr=lr)
    for _ in range(steps):
        own.grad = torch.from_numpy(problem.gradient(i, own.detach().numpy()))
        optimizer.step()
    return own.detach().numpy()


def slow_gasloc(topology: Topology, problem: Quadratics, x: Rows, num_rounds: int, steps: int, gamma: float) -> Rows:
    """theta <- W y + gamma (y - y of the round before), which begins as theta."""
    found, last = [x], x
    for round in range(num_rounds):
        y = np.stack([local_sgd(problem, i, row, steps, rate(round)) for i, row in enumerate(found[-1])])
        found.append(mix(topology.mixing(round).dense(), y) + gamma * (y - last))
        last = y
    return np.stack(found)


def slow_noloco(
    topology: Topology, problem: Quadratics, x: Rows, num_rounds: int, steps: int, outer_lr: float, mu: float
) -> Rows:
    """m <- mu m + eta (mean change + mean phi - own phi), phi <- phi + m; means over the neighbourhood."""
    found, momentum = [x], np.zeros_like(x)
    for round in range(num_rounds):
        phi, matrix = found[-1], topology.mixing(round).dense()
        change = np.stack([local_sgd(problem, i, row, steps, rate(round)) for i, row in enumerate(phi)]) - phi
        momentum = mu * momentum + outer_lr * (mix(matrix, change) + mix(matrix, phi) - phi)
        found.append(phi + momentum)
    return np.stack(found)


@given(name=st.sampled_from(DOUBLY), n=PEERS, seed=SEEDS, steps=STEPS, gamma=st.sampled_from([0.0, 0.3, 0.8]))
@FEW
def test_gasloc(name: str, n: int, seed: int, steps: int, gamma: float) -> None:
    graph, problem, x = built(name, n, seed), quadratics(n, seed), start(n, seed)
    found = drive(GASLoC({"gamma": gamma}), graph, problem, x, NUM_ROUNDS, rate, steps)
    assert_equal(found, slow_gasloc(graph, problem, x, NUM_ROUNDS, steps, gamma))


@given(name=st.sampled_from(["random-match", *DOUBLY]), n=PEERS, seed=SEEDS, steps=STEPS, block=st.integers(1, 5))
@FEW
def test_noloco(name: str, n: int, seed: int, steps: int, block: int) -> None:
    graph, problem, x = built(name, n, seed), quadratics(n, seed), start(n, seed)
    algorithm = NoLoCo({"outer_lr": 0.6, "outer_momentum": 0.4})
    found = drive(algorithm, graph, problem, x, NUM_ROUNDS, rate, steps, block)
    assert_equal(found, slow_noloco(graph, problem, x, NUM_ROUNDS, steps, 0.6, 0.4))


@pytest.mark.parametrize("steps", [1, 3])
def test_plain_gasloc_is_dsgd(steps: int) -> None:
    graph, problem, x = build("static-exp", 6), quadratics(6), start(6)
    expected = models(drive(DSGD({}), graph, problem, x, 10, rate, steps))
    np.testing.assert_array_equal(models(drive(GASLoC({"gamma": 0.0}), graph, problem, x, 10, rate, steps)), expected)


@pytest.mark.parametrize("name", ["ring", "complete", "od-equidyn", "one-peer-exp"])
def test_mean_of_gasloc_is_diloco(name: str) -> None:
    """Where all losses have one curvature, the mean of the peers follows DiLoCo with an outer rate of 1."""
    n, problem = 6, quadratics(6)
    problem.curvature[:] = problem.curvature[0]
    x = np.tile(start(6)[:1], (n, 1))
    found = models(drive(GASLoC({"gamma": 0.6}), build(name, n), problem, x, 15, rate, steps=3)).mean(1)
    server = DiLoCo({"outer_lr": 1.0, "outer_momentum": 0.6})
    state = server.init(torch.from_numpy(x[:1].copy()))
    for round, expected in enumerate(found[1:]):
        phi = state["x"].numpy()[0]
        change = np.mean([local_sgd(problem, i, phi, 3, rate(round)) - phi for i in range(n)], axis=0)
        state = server.update(state, {"x": torch.from_numpy(change)[None], "held": None}, n)
        np.testing.assert_allclose(state["x"].numpy()[0], expected, rtol=1e-9)


@pytest.mark.parametrize("algorithm", [GASLoC({}), NoLoCo({})], ids=["gasloc", "noloco"])
@pytest.mark.parametrize("name", ["ring", "od-equidyn", "base"])
def test_agree_where_nothing_is_learnt(algorithm: Any, name: str) -> None:
    """Without gradients momentum of less than 1 is harmless: peers agree on the mean that they began with."""
    problem, x = quadratics(7), start(7)
    problem.curvature[:] = 0
    found = models(drive(algorithm, build(name, 7), problem, x, 400, 0.1))
    np.testing.assert_allclose(found[-1], np.tile(x.mean(0), (7, 1)), atol=1e-6)


def test_outer_step_that_diverges() -> None:
    """Exactly the rates are refused with which peers never agree."""
    ring = build("ring", 8)
    least = ring.min_real_part(num_rounds=1)
    assert least is not None
    limit = 2 * 1.5 / (1 - least)
    problem, x = quadratics(8), start(8)
    problem.curvature[:] = 0
    with pytest.raises(ConfigError, match=r"algorithm.outer_lr = .* diverges on topology 'ring'.* set it below"):
        NoLoCo({"outer_lr": limit * 1.01}).check(ring)
    NoLoCo({"outer_lr": limit * 0.99}).check(ring)
    for factor, shrinks in ((0.95, True), (1.05, False)):
        found = models(drive(NoLoCo({"outer_lr": limit * factor}), ring, problem, x, 600, 0.1))
        spread = [np.abs(rows - rows.mean(0)).max() for rows in (found[0], found[-1])]
        assert (spread[1] < spread[0]) == shrinks


@pytest.mark.parametrize("algorithm", ["gasloc", "noloco"])
def test_refusals(algorithm: str) -> None:
    wrong = {
        "submodel.capacities": ([1.0, 0.5], "trains whole models only, because the outer momentum"),
        "peers.final_merge": (True, "does not go with peers.final_merge = True, because peers move by their own"),
        "algorithm": ({"name": algorithm, "gama": 1}, "gama"),
    }
    for key, (value, sentence) in wrong.items():
        with pytest.raises(ConfigError, match=sentence):
            resolve(parse(decentralized({"algorithm": algorithm} | {key: value})))
    with pytest.raises(ConfigError, match="because only its columns sum to 1"):
        (GASLoC({}) if algorithm == "gasloc" else NoLoCo({})).check(pushing(5))


@pytest.mark.parametrize("algorithm", ["gasloc", "noloco"])
@pytest.mark.parametrize("stacked", [True, False])
def test_same_bits_on_any_number_of_workers(algorithm: str, stacked: bool, tmp_path: Path) -> None:
    changes = {
        "algorithm": algorithm,
        "peers.topology": "random-match",
        "train.momentum": 0.5,
        "engine.modes": [{"capacity": 1.0, "stacked": stacked, "padding": stacked}],
    }
    alone, several = (
        run(decentralized(changes | {"engine.workers": workers}), out=tmp_path / f"{workers}") for workers in (0, 2)
    )
    assert_same(alone, several)
    losses = [record["loss"] for record in alone.metrics]
    assert losses[-1] < losses[0]
