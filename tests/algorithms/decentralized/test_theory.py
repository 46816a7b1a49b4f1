"""What theory says of decentralized algorithms: exactness, invariants, and where one method is another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_decentralized import Quadratics, Rows, built, drive, models, pushing, quadratics, start

from gossamer.algorithms.decentralized.ceca import DSGDCECA
from gossamer.algorithms.decentralized.choco import ChocoSGD
from gossamer.algorithms.decentralized.diffusion import D2, ExactDiffusion
from gossamer.algorithms.decentralized.dsgd import DSGD, GossipPGA, QuasiGlobalMomentum
from gossamer.algorithms.decentralized.pushsum import StochasticGradientPush
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.topology import build

CWA = {"order": "combine-while-adapt"}


def distance(problem: Quadratics, x: Rows) -> float:
    """Squared distance of all models from the optimum."""
    return float(((x - problem.optimum) ** 2).sum())


def still(n: int, d: int = 3) -> Quadratics:
    """Losses without gradients."""
    return Quadratics(np.zeros((n, d, d)), np.zeros((n, d)))


class TestExactness:
    """Unequal losses, a constant step: DSGD stops short of the optimum, corrected methods reach it."""

    N = 9
    PROBLEM, START = quadratics(N, 1), start(N, 1)

    @pytest.mark.parametrize(("options", "least"), [({}, 1e-2), (CWA, 1e-2)])
    def test_dsgd_keeps_its_bias(self, options: dict[str, Any], least: float) -> None:
        found = models(drive(DSGD(options), build("ring", self.N), self.PROBLEM, self.START, 2000, 0.05))
        assert distance(self.PROBLEM, found[-1]) > least
        assert distance(self.PROBLEM, found[-1]) == pytest.approx(distance(self.PROBLEM, found[-2]), rel=1e-9)

    @pytest.mark.parametrize(
        ("method", "name", "steps"),
        [
            (DSGT, "ring", 1),
            (DSGT, "ring", 4),
            (DSGT, "one-peer-exp", 2),
            (DSGT, "od-equidyn", 1),
            (ExactDiffusion, "ring", 1),
            (ExactDiffusion, "star", 1),
            (D2, "ring", 1),
        ],
    )
    def test_corrected_methods_are_exact(self, method: Callable[..., Any], name: str, steps: int) -> None:
        found = drive(method({}), build(name, self.N), self.PROBLEM, self.START, 1500, 0.05, steps)
        assert distance(self.PROBLEM, models(found)[-1]) <= 1e-20

    @pytest.mark.parametrize("method", [ExactDiffusion, D2])
    def test_several_steps_would_not_be_exact(self, method: Any) -> None:
        """Why `one_step_only` is set: what is corrected is the mixing's bias, not the local drift."""
        found = models(drive(method({}), build("ring", self.N), self.PROBLEM, self.START, 1500, 0.05, steps=4))
        assert distance(self.PROBLEM, found[-1]) > 1e-4
        assert distance(self.PROBLEM, found[-1]) == pytest.approx(distance(self.PROBLEM, found[-2]), rel=1e-6)
        assert method.traits.one_step_only

    @pytest.mark.parametrize(("method", "survives"), [(DSGT, True), (ExactDiffusion, False)])
    def test_merging_now_and_then(self, method: Any, survives: bool) -> None:
        """Why `no_merge` is set: the correction wants the same W in all rounds."""
        algorithm = method({})
        algorithm.traits = replace(algorithm.traits, merge_every=5)
        found = models(drive(algorithm, build("ring", self.N), self.PROBLEM, self.START, 600, 0.05))[-1]
        assert (distance(self.PROBLEM, found) < 1e-12) is survives
        assert (algorithm.traits.no_merge is None) is survives

    def test_d2_diverges_below_a_third(self) -> None:
        """A hypercube of dimension 3 with equal weights has the eigenvalue -1/2."""
        problem, x = quadratics(8, 1), start(8, 1)
        assert np.abs(models(drive(D2({}), build("hypercube", 8), problem, x, 300, 0.05))[-1]).max() > 1e3
        fine = models(drive(ExactDiffusion({}), build("hypercube", 8), problem, x, 1500, 0.05))
        assert distance(problem, fine[-1]) <= 1e-20

    def test_tracking_wants_lazy_mixings_where_the_step_is_above_its_limit(self) -> None:
        """At step 0.1 tracking diverges on EquiStatic, but neither on its lazy version nor on an exponential graph."""
        n = 12
        problem, x, found = quadratics(n, 2), start(n, 2), []
        equistatic = [build("d-equistatic", n, M=2, lazy=lazy) for lazy in (False, True)]
        for graph in (*equistatic, build("static-exp", n)):
            found.append(distance(problem, models(drive(DSGT({}), graph, problem, x, 300, 0.1))[-1]))
        assert found[0] > 1e3
        assert max(found[1:]) < 1e-15
        unstable, stable = (graph.tracking_limit() for graph in equistatic)
        assert unstable is not None
        assert stable is not None
        assert unstable < 0.1 * 0.5 < 0.1 * 2.0 < stable  # times the least and the largest curvature
        assert f"is below {unstable:.3g}, " in DSGT({}).check(equistatic[0])[0]


class TestMeans:
    """Doubly stochastic mixings keep the mean, so it moves by -lr times the mean gradient."""

    @pytest.mark.parametrize(
        "algorithm",
        [
            DSGD({}),
            DSGD(CWA),
            GossipPGA({"period": 3}),
            DSGT({}),
            ExactDiffusion({}),
            D2({}),
            StochasticGradientPush({}),
            ChocoSGD({"gamma": 0.5}),
            ChocoSGD({"compressor": "sign"}),
            DSGDCECA({}),
        ],
        ids=lambda each: type(each).__name__,
    )
    @given(n=st.integers(2, 9), seed=st.integers(0, 100))
    @settings(max_examples=8, deadline=None)
    def test_move_by_the_mean_gradient(self, algorithm: Any, n: int, seed: int) -> None:
        graph = built("ceca" if algorithm.traits.joint else "ring", n, seed)
        problem, x = quadratics(n, seed), start(n, seed)
        found = models(drive(algorithm, graph, problem, x, 8, 0.05))
        for before, after in itertools.pairwise(found):
            expected = before.mean(0) - 0.05 * problem.gradients(before).mean(0)
            np.testing.assert_allclose(after.mean(0), expected, atol=1e-10)

    def test_drift_where_only_rows_sum_to_one(self) -> None:
        graph, problem, x = build("el-local", 8, degree=2), still(8), start(8)
        found = models(drive(DSGD({}), graph, problem, x, 30, 0.1))
        assert np.abs(found[-1].mean(0) - x.mean(0)).max() > 1e-2
        (warning,) = DSGD({}).check(graph)
        assert "the mean of the models drifts" in warning

    @given(n=st.integers(2, 10), seed=st.integers(0, 100))
    @settings(max_examples=15, deadline=None)
    def test_push_sum_reaches_the_mean_of_directed_graphs(self, n: int, seed: int) -> None:
        graph, x = pushing(n, seed), start(n, seed)
        states = drive(StochasticGradientPush({}), graph, still(n), x, 400, 0.1)
        np.testing.assert_allclose(models(states)[-1], np.tile(x.mean(0), (n, 1)), atol=1e-9)
        assert float(states[-1]["weight"].sum()) == pytest.approx(n)
        assert states[-1]["weight"].shape == (n, 1)

    @given(n=st.integers(2, 40), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_ceca_agrees_after_a_cycle(self, n: int, seed: int) -> None:
        x = start(n, seed)
        num_rounds = math.ceil(math.log2(n))
        found = models(drive(DSGDCECA({}), build("ceca", n), quadratics(n), x, num_rounds, 0.0))
        np.testing.assert_allclose(found[-1], np.tile(x.mean(0), (n, 1)), atol=1e-12)
        assert np.ptp(found[-2], axis=0).max() > 1e-6


class TestOneMethodIsAnother:
    N = 6
    PROBLEM, START = quadratics(N, 4), start(N, 4)

    def run(self, algorithm: Any, name: str = "ring", steps: int = 2) -> Rows:
        return models(drive(algorithm, build(name, self.N), self.PROBLEM, self.START, 12, 0.1, steps))

    def test_choco_without_compression_is_dsgd(self) -> None:
        found = self.run(ChocoSGD({"compressor": "none", "gamma": 1.0}, momentum=0.5))
        np.testing.assert_allclose(found, self.run(DSGD({}, momentum=0.5)), atol=1e-12)

    def test_push_of_doubly_stochastic_mixings_is_dsgd(self) -> None:
        found = self.run(StochasticGradientPush({}, momentum=0.5), "static-exp")
        np.testing.assert_allclose(found, self.run(DSGD({}, momentum=0.5), "static-exp"), atol=1e-12)

    @pytest.mark.parametrize(("name", "period"), [("complete", 5), ("ring", 1)])
    def test_gossip_pga_that_always_averages_is_parallel_sgd(self, name: str, period: int) -> None:
        found = self.run(GossipPGA({"period": period}), name, steps=1)
        x, expected = self.START.mean(0) - 0.1 * self.PROBLEM.gradients(self.START).mean(0), []
        for _ in range(12):
            expected.append(np.tile(x, (self.N, 1)))
            x = x - 0.1 * self.PROBLEM.gradients(expected[-1]).mean(0)
        np.testing.assert_allclose(found[1:], np.stack(expected), atol=1e-12)

    def test_quasi_global_momentum_of_a_complete_graph_is_quasi_hyperbolic_momentum(self) -> None:
        """QHM (Ma and Yarats, arXiv 1810.06801): decay b = mu + (1 - mu) beta, nu = beta / b, rate lr / (1 - beta)."""
        beta, mu, lr = 0.6, 0.8, 0.1
        algorithm = QuasiGlobalMomentum({"mu": mu}, momentum=beta)
        alike = np.tile(self.START.mean(0), (self.N, 1))
        found = models(drive(algorithm, build("complete", self.N), self.PROBLEM, alike, 15, lr))
        decay, x, m = mu + (1 - mu) * beta, alike[0], np.zeros(3)
        for round in range(1, 16):
            gradient = self.PROBLEM.gradients(np.tile(x, (self.N, 1))).mean(0)
            m = decay * m + (1 - decay) * gradient
            x = x - lr / (1 - beta) * ((1 - beta / decay) * gradient + beta / decay * m)
            np.testing.assert_allclose(found[round], np.tile(x, (self.N, 1)), atol=1e-12)

    def test_both_orders_agree_without_gradients(self) -> None:
        ways = [models(drive(DSGD(each), build("ring", 5), still(5), start(5), 6, 0.1)) for each in ({}, CWA)]
        np.testing.assert_allclose(*ways, atol=1e-14)
        assert np.abs(self.run(DSGD({})) - self.run(DSGD(CWA))).max() > 1e-2


class TestIdling:
    """Peers whose local work failed: no steps, but they mix."""

    METHODS = [DSGD({}), DSGD(CWA), DSGD({"mix_momentum": True}, momentum=0.5), QuasiGlobalMomentum({}, momentum=0.9)]
    METHODS += [
        DSGT({}),
        ExactDiffusion({}),
        StochasticGradientPush({}),
        ChocoSGD({"compressor": "none"}),
        DSGDCECA({}),
    ]

    @pytest.mark.parametrize("algorithm", METHODS, ids=lambda each: type(each).__name__)
    def test_all_of_them_agree_on_the_mean(self, algorithm: Any) -> None:
        graph, x = build("ceca" if algorithm.traits.joint else "complete", 4), start(4)
        found = models(drive(algorithm, graph, quadratics(4), x, 400, 0.1, steps=0))
        # Quasi-global momentum takes the mixing for movement, and moves on by it: its mean is kept all the same.
        np.testing.assert_allclose(found[-1], np.tile(x.mean(0), (4, 1)), atol=1e-10)

    @pytest.mark.parametrize("algorithm", METHODS, ids=lambda each: type(each).__name__)
    def test_one_of_them_does_not_move_the_mean_by_itself(self, algorithm: Any) -> None:
        """In the first round, when no method has a memory yet."""
        graph, problem, x = build("ceca" if algorithm.traits.joint else "ring", 4), quadratics(4), start(4)
        found = models(drive(algorithm, graph, problem, x, 1, 0.1, steps=[1, 0, 1, 1]))
        gradient = problem.gradients(x)
        expected = x.mean(0) - 0.1 * (gradient.sum(0) - gradient[1]) / 4
        np.testing.assert_allclose(found[1].mean(0), expected, atol=1e-12)

    @pytest.mark.parametrize("method", [DSGT, ExactDiffusion])
    def test_a_lapse_is_made_up_for(self, method: Any) -> None:
        """The fixed point does not depend on who idled on the way."""
        problem, graph = quadratics(5), build("ring", 5)
        algorithm, state = method({}), None
        x = start(5)
        first = drive(algorithm, graph, problem, x, 7, 0.1, steps=[1, 1, 0, 1, 1])[-1]
        algorithm.init = lambda x: {name: value.clone() for name, value in first.items()}
        state = drive(algorithm, graph, problem, x, 600, 0.1)[-1]
        assert distance(problem, state["x"].numpy()) < 1e-18


class TestConsensusStep:
    @pytest.mark.parametrize(("name", "n"), [("ring", 8), ("star", 12), ("complete", 16), ("u-equistatic", 24)])
    def test_the_default_converges_with_the_default_codec(self, name: str, n: int) -> None:
        x = start(n, d=60)
        found = models(drive(ChocoSGD({}), build(name, n), still(n, 60), x, 300, 0.1))
        spread = np.linalg.norm(found - found.mean(1, keepdims=True), axis=(1, 2))
        assert spread[-1] < 0.1 * spread[0]
        np.testing.assert_allclose(found[-1].mean(0), x.mean(0), atol=1e-10)

    def test_a_large_one_diverges(self) -> None:
        found = models(drive(ChocoSGD({"gamma": 1.0}), build("ring", 8), still(8, 60), start(8, d=60), 100, 0.1))
        assert np.ptp(found[-1], axis=0).max() > np.ptp(found[0], axis=0).max()


class TestHeld:
    """Sub-models: what nobody near held stays as it is."""

    HELD = torch.tensor([[True, False], [True, True]])
    INBOX = {"held": HELD, "lr": 0.5}

    def test_in_the_place_of_the_state(self) -> None:
        sent = {"x": torch.tensor([[1.0, -0.0], [3.0, 4.0]])}
        inbox = self.INBOX | {"x": torch.full((2, 2), 9.0), "sent": sent}
        new = DSGD({}).update({}, inbox, 2)["x"]
        assert new.tolist() == [[9.0, 0.0], [9.0, 9.0]]
        assert math.copysign(1.0, float(new[0, 1])) == -1.0

    def test_in_a_place_of_its_own(self) -> None:
        x, momentum = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)
        state = {"x": x, "momentum": momentum, "steps": torch.full((2, 1), 2.0)}
        inbox = self.INBOX | {"half": torch.zeros(2, 2), "sent": {"half": torch.full((2, 2), 7.0)}}
        new = QuasiGlobalMomentum({}, momentum=0.5).update(state, inbox, 2)
        assert new["x"].tolist() == [[0.0, 2.0], [0.0, 0.0]]
        assert new["momentum"].tolist() == [[1.0, 1.0], [2.0, 2.5]]
