"""Least squares and logistic regression: the data model, losses, metrics and optima, each against a slow version."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

import gossamer
from gossamer.errors import ConfigError, GossamerWarning
from gossamer.testing import check_workload
from gossamer.workloads import convex
from gossamer.workloads.base import Workload, add_sums
from gossamer.workloads.convex import BLOCK, LeastSquares, LogisticRegression

Convex = LeastSquares | LogisticRegression
SMALL = {"dim": 3, "num_samples": 12}
PROBLEMS: dict[str, tuple[type[Convex], dict[str, Any]]] = {
    "least-squares": (LeastSquares, SMALL | {"heterogeneity": 0.5}),
    "logistic": (LogisticRegression, SMALL | {"regulariser": "none"}),
    "logistic-l2": (LogisticRegression, SMALL | {"regulariser": "l2", "regularisation": 0.1}),
    "logistic-nonconvex": (LogisticRegression, SMALL | {"regulariser": "nonconvex", "regularisation": 0.1}),
}
CONVEX = [name for name in PROBLEMS if name != "logistic-nonconvex"]


def make(kind: type[Convex], num_clients: int = 5, seed: int = 0, partition: Any = "iid", **options: Any) -> Convex:
    return kind(options, num_clients=num_clients, partition=partition, seed=seed)


def build(problem: str, num_clients: int = 5, **options: Any) -> Convex:
    kind, chosen = PROBLEMS[problem]
    return make(kind, num_clients, **chosen | options)


def whole_data(workload: Convex) -> tuple[Tensor, Tensor]:
    """Return the features [n, m, dim] and targets [n, m] of all clients."""
    clients = np.arange(workload.num_clients, dtype=np.int64)
    positions = np.tile(np.arange(workload.options.num_samples, dtype=np.int64), (len(clients), 1))
    samples = workload.batch(clients, positions).samples
    return samples["features"], samples["target"]


def measured(workload: Convex, x: Tensor) -> dict[str, float]:
    return workload.metrics(
        add_sums([workload.evaluate({"x": x}, {}, chunk) for chunk in range(workload.num_evaluation_chunks)])
    )


def slow_objective(workload: Convex, x: Tensor) -> Tensor:
    """The mean over clients of their mean losses, one sample and one coordinate at a time, as the formulas say."""
    total, options = torch.zeros((), dtype=torch.float64), workload.options
    for features, targets in zip(*whole_data(workload), strict=True):
        for h, target in zip(features.double(), targets.double(), strict=True):
            predicted = sum(h[j] * x[j] for j in range(len(x)))
            if isinstance(workload, LeastSquares):
                total = total + (predicted - target) ** 2 / 2
            else:
                total = total + torch.log(1 + torch.exp(-target * predicted))
    total = total / workload.num_clients / options.num_samples
    kind, weight = getattr(options, "regulariser", "none"), getattr(options, "regularisation", 0.0)
    for value in x:
        if kind == "l2":
            total = total + weight * value**2 / 2
        if kind == "nonconvex":
            total = total + weight * value**2 / (1 + value**2)
    return total


# ---- the contract


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_keeps_the_contract(problem: str, precision: str) -> None:
    workload = build(problem, precision=precision)
    check_workload(workload)
    dtype = torch.float64 if precision == "double" else torch.float32
    features, targets = whole_data(workload)
    assert workload.init(0).dtype == features.dtype == targets.dtype == dtype
    loss = workload.loss({"x": workload.init(0)[:3]}, {"features": features[0], "target": targets[0]})
    assert loss.dtype == dtype


def test_it_is_a_workload() -> None:
    workload: Workload = make(LeastSquares, partition={"name": "iid"}, **SMALL)
    assert not workload.init(3).any()
    with pytest.raises(IndexError, match="position 12 exceeds the 12 samples"):
        workload.batch(np.array([0]), np.array([[0, 12]]))


# ---- the data


@given(
    clients=st.lists(st.integers(0, 2 * BLOCK + 4), min_size=1, max_size=4), seed=st.integers(0, 2), problem=st.data()
)
def test_a_clients_data_depends_on_seed_and_client_alone(clients: list[int], seed: int, problem: Any) -> None:
    """In whatever order clients are asked for, alone or together, and however many others there are."""
    kind, options = PROBLEMS[problem.draw(st.sampled_from(sorted(PROBLEMS)))]
    whole = whole_data(make(kind, 2 * BLOCK + 5, seed, **options))
    fewer = make(kind, max(clients) + 1, seed, **options)
    for client in clients:
        samples = fewer.batch(np.array([client]), np.arange(12)[None]).samples
        assert torch.equal(samples["features"][0], whole[0][client])
        assert torch.equal(samples["target"][0], whole[1][client])


def test_clients_and_seeds_differ() -> None:
    features, targets = whole_data(build("least-squares", 2 * BLOCK))
    assert len(torch.unique(features)) == features.numel()
    assert len(torch.unique(targets)) == targets.numel()
    kind, options = PROBLEMS["least-squares"]
    others, _ = whole_data(make(kind, 2 * BLOCK, seed=1, **options))
    assert not set(others.flatten().tolist()) & set(features.flatten().tolist())


def test_single_precision_rounds_the_same_data() -> None:
    double, single = (whole_data(build("least-squares", precision=kind)) for kind in ("double", "single"))
    assert all(torch.equal(wide.float(), narrow) for wide, narrow in zip(double, single, strict=True))


def test_least_squares_is_drawn_as_stated() -> None:
    """Without noise every client's own model fits exactly; these spread by the heterogeneity; noise is added."""
    chosen = {"dim": 4, "num_samples": 30, "heterogeneity": 0.5}
    exact, noisy = (make(LeastSquares, 400, **chosen, noise=noise) for noise in (0.0, 2.0))
    features, targets = whole_data(exact)
    own = torch.linalg.lstsq(features, targets[..., None]).solution[..., 0]
    torch.testing.assert_close((features @ own[..., None])[..., 0], targets, rtol=0, atol=1e-10)
    spread = (own - torch.from_numpy(exact.planted)).flatten()
    assert abs(float(spread.square().mean()) / 0.25 - 1) < 5 * math.sqrt(2 / len(spread))
    noise = ((whole_data(noisy)[1] - targets) / 2).flatten()
    for values in (features.flatten(), noise):
        assert abs(float(values.mean())) < 5 / math.sqrt(len(values))
        assert abs(float(values.square().mean()) - 1) < 5 * math.sqrt(2 / len(values))


def test_labels_are_drawn_with_the_probability_of_the_clients_own_model() -> None:
    """At every level of h.x* the share of positive labels is the sigmoid; with heterogeneity it is nearer to a half."""
    workload = make(LogisticRegression, 100, dim=4, num_samples=500, heterogeneity=0.0)
    features, targets = whole_data(workload)
    assert set(targets.unique().tolist()) == {-1.0, 1.0}
    score = (features @ torch.from_numpy(workload.planted)).flatten()
    positive = (targets.flatten() == 1).double()
    for low in (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0):
        level = (score >= low) & (score < low + 1)
        expected = torch.sigmoid(score[level])
        deviation = math.sqrt(float((expected * (1 - expected)).sum()))
        assert abs(float(positive[level].sum() - expected.sum())) < 5 * deviation
    other = make(LogisticRegression, 100, dim=4, num_samples=500, heterogeneity=3.0)
    certain = score.abs() > 2
    for one, least, most in ((workload, 0.9, 1.0), (other, 0.5, 0.8)):
        agrees = (whole_data(one)[1].flatten() == score.sign()).double()
        assert least < float(agrees[certain].mean()) < most


def test_a_hundred_thousand_clients() -> None:
    workload = make(LeastSquares, 100_000, num_samples=5)
    samples = workload.batch(np.array([99_999, 7]), np.array([[0], [4]])).samples
    assert samples["features"].shape == (2, 1, 10)
    assert workload._is_generated.sum() == 2  # of the 1,563 blocks
    assert abs(measured(workload, torch.from_numpy(workload.planted))["loss"] - 0.5) < 5 / math.sqrt(2 * 500_000)
    assert workload._is_generated.all()


# ---- loss and metrics


@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_metrics_equal_a_slow_version(problem: str, precision: str) -> None:
    workload = build(problem, precision=precision)
    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    found = measured(workload, x)
    leaf = x.clone().requires_grad_()
    expected = slow_objective(workload, leaf)
    (gradient,) = torch.autograd.grad(expected, leaf)
    expected = expected.detach()
    assert found["loss"] == pytest.approx(float(expected), rel=1e-12)
    assert found["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)
    if problem == "logistic-nonconvex":
        assert found.keys() == {"loss", "gradient_norm"}
        return
    assert workload.optimum is not None
    best = workload.optimum.x
    assert found["squared_distance"] == pytest.approx(float((x - best).square().sum()), rel=1e-12)
    assert found["optimality_gap"] == pytest.approx(float(expected - slow_objective(workload, best)), rel=1e-11)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_of_clients_average_to_the_gradient(problem: str) -> None:
    """Each client's full batch, stacked, at one model: the exact gradient, whatever the order of the samples."""
    workload = build(problem)
    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    rows = x.repeat(5, 1).requires_grad_()
    features, targets = whole_data(workload)
    losses = workload.loss({"x": rows}, {"features": features[:, order], "target": targets[:, order]})
    (gradients,) = torch.autograd.grad(losses.sum(), rows)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(slow_objective(workload, leaf), leaf)
    torch.testing.assert_close(gradients.mean(0), expected, rtol=1e-12, atol=0)


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, dtype=torch.float64)
    for problem in PROBLEMS:
        whole = build(problem, 7)
        monkeypatch.setattr(convex, "CHUNK_FEATURES", 100)
        parts = build(problem, 7)
        monkeypatch.undo()
        assert (whole.num_evaluation_chunks, parts.num_evaluation_chunks) == (1, 3)
        assert measured(parts, x) == pytest.approx(measured(whole, x), rel=1e-12)


@given(score=st.floats(-700, 700))
@example(score=-21.0)
@example(score=36.0)
def test_the_logistic_loss_keeps_its_digits(score: float) -> None:
    """Far out on either side as well, where a threshold or an overflow would spoil an optimum."""
    batch = {"features": torch.ones(1, 1, dtype=torch.float64), "target": torch.ones(1, dtype=torch.float64)}
    workload = make(LogisticRegression, 1, dim=1, num_samples=1, regulariser="none")
    x = torch.tensor([score], dtype=torch.float64, requires_grad=True)
    loss = workload.loss({"x": x}, batch)
    (slope,) = torch.autograd.grad(loss, x)
    tail = math.exp(-abs(score))
    assert float(loss.detach()) == pytest.approx(max(-score, 0) + math.log1p(tail), rel=1e-14, abs=0)
    assert float(slope) == pytest.approx(-(tail if score > 0 else 1) / (1 + tail), rel=1e-14, abs=0)


def test_metrics_of_peers() -> None:
    workload = build("least-squares")
    assert workload.optimum is not None
    rows = torch.randn(4, workload.layout.d, generator=torch.Generator().manual_seed(0)).double()
    expected = np.mean([sum((row[j] - workload.optimum.x[j]) ** 2 for j in range(3)) for row in rows])
    assert workload.peer_metrics(rows) == {"peers_squared_distance": pytest.approx(float(expected), rel=1e-12)}
    assert build("logistic-nonconvex").peer_metrics(rows) == {}


# ---- the optimum


def test_the_optimum_of_least_squares_equals_a_library() -> None:
    workload = build("least-squares")
    features, targets = whole_data(workload)
    expected = np.linalg.lstsq(features.reshape(-1, 3).numpy(), targets.reshape(-1).numpy(), rcond=None)[0]
    assert workload.optimum is not None
    np.testing.assert_allclose(workload.optimum.x.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("problem", ["logistic", "logistic-l2"])
def test_the_optimum_of_logistic_regression_equals_a_library(problem: str) -> None:
    workload = build(problem)

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(x).requires_grad_()
        value = slow_objective(workload, leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0].numpy()

    expected = minimize(value_and_gradient, np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    assert workload.optimum is not None
    np.testing.assert_allclose(workload.optimum.x.numpy(), expected, atol=1e-6)


@given(
    problem=st.sampled_from(CONVEX),
    seed=st.integers(0, 3),
    step=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    length=st.sampled_from([1e-4, 1e-2, 1.0]),
    heterogeneity=st.sampled_from([0.0, 0.3]),
    num_clients=st.integers(3, 8),
)
def test_the_optimum_is_stationary_and_least(
    problem: str, seed: int, step: list[float], length: float, heterogeneity: float, num_clients: int
) -> None:
    kind, options = PROBLEMS[problem]
    workload = make(kind, num_clients, seed, **options | {"heterogeneity": heterogeneity, "num_samples": 40})
    assert workload.optimum is not None
    best = measured(workload, workload.optimum.x)
    assert best["gradient_norm"] <= 1e-12
    assert (best["optimality_gap"], best["loss"]) == (0.0, workload.optimum.loss)
    other = workload.optimum.x + length * torch.tensor(step, dtype=torch.float64)
    assert measured(workload, other)["loss"] >= best["loss"] - 1e-15


def test_clients_that_agree_share_their_optimum() -> None:
    """Without noise and heterogeneity the planted model is the optimum of all together and of every one."""
    workload = build("least-squares", noise=0.0, heterogeneity=0.0)
    assert workload.optimum is not None
    np.testing.assert_allclose(workload.optimum.x.numpy(), workload.planted, rtol=1e-12)
    assert workload.optimum.loss < 1e-25
    for features, targets in zip(*whole_data(workload), strict=True):
        own = np.linalg.lstsq(features.numpy(), targets.numpy(), rcond=None)[0]
        np.testing.assert_allclose(own, workload.planted, rtol=1e-12)


def test_the_least_loss_follows_its_distribution() -> None:
    """2 N loss / noise^2 of a least-squares fit to N samples is chi-squared with N - dim degrees of freedom."""
    num_clients, num_samples, dim, noise = 60, 50, 10, 3.0
    workload = make(LeastSquares, num_clients, dim=dim, num_samples=num_samples, noise=noise)
    assert workload.optimum is not None
    total = num_clients * num_samples
    chi_squared = 2 * total * workload.optimum.loss / noise**2
    assert abs(chi_squared - (total - dim)) < 5 * math.sqrt(2 * (total - dim))
    squared_error = float(np.square(workload.optimum.x.numpy() - workload.planted).sum()) / noise**2
    assert abs(squared_error * total - dim) < 5 * math.sqrt(2 * dim)


@pytest.mark.parametrize("problem", CONVEX)
def test_gradient_descent_reaches_the_optimum(problem: str) -> None:
    workload = build(problem, num_samples=60)
    features, targets = whole_data(workload)
    x, step = torch.zeros(3, dtype=torch.float64), 0.5 if problem == "least-squares" else 3.0
    for _ in range(300):
        rows = x.repeat(5, 1).requires_grad_()
        losses = workload.loss({"x": rows}, {"features": features, "target": targets})
        x = x - step * torch.autograd.grad(losses.sum(), rows)[0].mean(0)
    assert measured(workload, x)["squared_distance"] < 1e-20
    assert workload.peer_metrics(torch.cat([x, torch.zeros(13)]).repeat(2, 1))["peers_squared_distance"] < 1e-20
    assert abs(measured(workload, x)["optimality_gap"]) < 1e-15


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LeastSquares, {"dim": 10, "num_samples": 4}),  # fewer equations than unknowns
        (LogisticRegression, {"dim": 10, "num_samples": 4, "regulariser": "none"}),  # separable: the best is infinite
    ],
    ids=str,
)
def test_no_optimum_is_made_up(kind: type[Convex], options: dict[str, Any]) -> None:
    """What is measured by it is left out, and all else is there."""
    workload = make(kind, 2, **options)
    with pytest.warns(GossamerWarning, match="optimality_gap and squared_distance are not measured"):
        assert workload.optimum is None
    assert set(measured(workload, torch.ones(10))) == {"loss", "gradient_norm"}
    assert workload.peer_metrics(torch.ones(2, workload.layout.d)) == {}


def test_regularised_logistic_regression_has_an_optimum_of_separable_samples() -> None:
    """One at which whole Newton steps from zero do not arrive."""
    options = {"num_samples": 5, "heterogeneity": 3.0, "regulariser": "l2", "regularisation": 1e-6}
    workload = make(LogisticRegression, 3, seed=8, **options)
    assert workload.optimum is not None
    assert measured(workload, workload.optimum.x)["gradient_norm"] <= 1e-12


# ---- in a run


def test_a_federation_descends_as_theory_says(tmp_path: Path) -> None:
    """One full-batch step of every client a round is gradient descent: the error shrinks by I - lr H every time."""
    options = {"dim": 3, "num_samples": 20, "heterogeneity": 0.5, "precision": "single"}
    run = gossamer.run(
        {
            "name": "descent",
            "rounds": 6,
            "workload": {"name": "gossamer.workloads.convex:LeastSquares", **options},
            "clients": {"num": 4, "per_round": 4},
            "train": {"lr": 0.3, "batch_size": 20},
            "algorithm": "fedavg",
            "engine": {"workers": 0, "modes": [{"capacity": 1.0}]},
        },
        out=tmp_path / "run",
    )
    workload = make(LeastSquares, 4, **options)
    features = whole_data(workload)[0].double().reshape(-1, 3)
    assert workload.optimum is not None
    contraction = torch.eye(3, dtype=torch.float64) - 0.3 * features.T @ features / len(features)
    for number, record in enumerate(run.metrics, start=run.metrics[0]["round"]):
        error = torch.linalg.matrix_power(contraction, number) @ -workload.optimum.x
        assert record["squared_distance"] == pytest.approx(float(error.square().sum()), rel=1e-4)
    assert run.metrics[-1]["squared_distance"] < 0.05 * run.metrics[0]["squared_distance"]


# ---- errors


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LeastSquares, {"partition": "dirichlet"}, "'dirichlet', but every client of this workload generates its own"),
        (LeastSquares, {"partition": {"name": "iid", "min_samples": 2}}, "set workload.heterogeneity"),
        (LeastSquares, {"dims": 3}, "unknown key 'workload.dims'; did you mean 'dim'"),
        (LeastSquares, {"noise": -1.0}, "workload.noise = -1.0"),
        (LogisticRegression, {"regulariser": "none", "regularisation": 0.1}, "has no effect without a regulariser"),
        (LeastSquares, {"precision": "half"}, "workload.precision = 'half'"),
        (LeastSquares, {"num_samples": 10**15}, "do not fit into memory: lower clients.num"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(kind: type[Convex], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(kind, **options)
