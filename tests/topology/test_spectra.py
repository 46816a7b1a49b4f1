"""Consensus rates: transforms, iterations and closed forms against dense decompositions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import rng, topology
from gossamer.errors import ConfigError
from gossamer.topology import Schedule, Shift, Sparse, Topology, TopologyOptions, spectra
from gossamer.topology.base import Floats
from gossamer.topology.weights import symmetric

STATIC = [
    "ring",
    "grid",
    "torus",
    "hypercube",
    "star",
    "complete",
    "static-exp",
    "half-random",
    "erdos-renyi",
    "geometric",
    "random-regular",
    "small-world",
    "d-equistatic",
    "u-equistatic",
]


def dense_rate(matrix: Floats) -> float:
    """Return ||W - J||_2 as it is defined."""
    return float(np.linalg.norm(matrix - 1.0 / len(matrix), 2))


@st.composite
def shifts(draw: st.DrawFn) -> Shift:
    n = draw(st.integers(2, 60))
    offsets = sorted(draw(st.sets(st.integers(1, n - 1), min_size=1, max_size=min(n - 1, 6))))
    raw = np.array(draw(st.lists(st.floats(0.01, 1), min_size=len(offsets), max_size=len(offsets))))
    return Shift(n, tuple(offsets), tuple((raw / (raw.sum() + 0.3)).tolist()))


class TestCirculants:
    @given(mixing=shifts())
    def test_transform_equals_decomposition(self, mixing: Shift) -> None:
        dense = mixing.dense()
        values = spectra.circulant_spectrum(mixing)
        waves = np.exp(2j * np.pi * np.outer(np.arange(mixing.n), np.arange(mixing.n)) / mixing.n)
        np.testing.assert_allclose(dense @ waves, waves * values, atol=1e-12)
        assert spectra.norm([mixing]) == pytest.approx(dense_rate(dense), abs=1e-12)
        assert spectra.min_real_part(mixing) == pytest.approx(np.linalg.eigvals(dense).real.min(), abs=1e-9)

    def test_static_exponential(self) -> None:
        """Ying et al., proposition 1: (t - 1) / (t + 1) for even n, less for odd n."""
        for n in range(2, 300):
            found = topology.build("static-exp", n)
            assert found.bound is not None
            if n % 2 == 0:
                assert found.consensus_rate() == pytest.approx(found.bound, abs=1e-12)
            else:
                assert found.consensus_rate() < found.bound - 1e-9

    def test_ring(self) -> None:
        for n in (3, 4, 17, 1000):
            expected = max(abs(1 + 2 * math.cos(2 * math.pi * k / n)) / 3 for k in range(1, n))
            assert topology.build("ring", n).consensus_rate() == pytest.approx(expected, abs=1e-12)

    def test_one_peer_exponential(self) -> None:
        for n in [*range(2, 40), 64, 100, 128, 139]:
            found = topology.build("one-peer-exp", n)
            length = found.schedule.cycle
            assert length == math.ceil(math.log2(n))
            product = np.linalg.multi_dot([np.eye(n), *(found.mixing(r).dense() for r in range(length)), np.eye(n)])
            if n & (n - 1) == 0:
                assert found.period == length
                assert dense_rate(product) < 1e-14
            else:
                assert found.period is None
                assert found.consensus_rate() ** length == pytest.approx(dense_rate(product), abs=1e-12)
                assert found.consensus_rate() > 0.05


class TestStatic:
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize("name", STATIC)
    def test_rate_and_least_real_part(self, name: str, lazy: bool) -> None:
        found = topology.build(name, 16, seed=3, lazy=lazy)
        dense = found.mixing(0).dense()
        assert found.consensus_rate() == pytest.approx(dense_rate(dense), abs=1e-12)
        least = found.min_real_part()
        assert least == pytest.approx(np.linalg.eigvals(dense).real.min(), abs=1e-7)
        if lazy:
            assert least is not None
            assert least > -1e-12
            plain = topology.build(name, 16, seed=3).mixing(0)
            np.testing.assert_allclose(dense, (np.eye(16) + plain.dense()) / 2, atol=1e-14)

    def test_equistatic_reaches_below_zero_and_lazy_mends_it(self) -> None:
        found = topology.build("u-equistatic", 300, M=9)
        least = found.min_real_part()
        assert least is not None
        assert least < -0.4
        assert topology.build("u-equistatic", 300, M=9, lazy=True).min_real_part() >= 0

    @pytest.mark.parametrize(("name", "n"), [("torus", 2500), ("hypercube", 2048), ("star", 1700)])
    def test_iterations_equal_closed_forms(self, name: str, n: int) -> None:
        found = topology.build(name, n)
        assert n > spectra.MAX_EXACT
        assert spectra.norm([found.mixing(0)]) == pytest.approx(found.consensus_rate(), abs=1e-8)

    def test_iterations_equal_transforms(self) -> None:
        shift = topology.build("d-equistatic", 1700, M=6).mixing(0)
        edges = shift.edges()
        sparse = Sparse.of_edges(1700, edges.receiver, edges.sender, edges.weight)
        assert not sparse.is_symmetric
        assert spectra.norm([sparse]) == pytest.approx(spectra.norm([shift]), abs=1e-7)
        with pytest.raises(ConfigError, match="n = 1700 peers are too many for the spectrum of a sparse mixing"):
            spectra.min_real_part(sparse)

    def test_least_eigenvalue_by_iterations(self) -> None:
        found = topology.build("torus", 1600, rows=40)
        expected = (1 + 2 * math.cos(math.pi) + 2 * math.cos(math.pi)) / 5
        assert found.min_real_part() == pytest.approx(expected, abs=1e-8)

    def test_products(self) -> None:
        pair = [topology.build(name, 12, seed=1).mixing(0) for name in ("grid", "d-equistatic")]
        assert spectra.norm(pair) == pytest.approx(dense_rate(pair[1].dense() @ pair[0].dense()), abs=1e-12)

    def test_all_eigenvalues_of_a_large_matrix_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="n = 2500 peers exceed the limit of 1500 for all eigenvalues"):
            spectra.spectrum(topology.build("grid", 2500).mixing(0))


class TestRandom:
    @pytest.mark.sweep(keep=0.34)
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize(
        ("name", "n", "parameters"),
        [
            ("random-match", 4, {}),
            ("random-match", 10, {}),
            ("random-match", 31, {}),
            ("el-oracle", 4, {"degree": 3}),
            ("el-oracle", 10, {"degree": 3}),
            ("el-oracle", 31, {"degree": 6}),
        ],
    )
    def test_closed_forms_within_monte_carlo_error(
        self, name: str, n: int, parameters: dict[str, int], lazy: bool
    ) -> None:
        found = topology.build(name, n, seed=1, lazy=lazy, **parameters)
        project = np.eye(n) - 1 / n
        mean = np.zeros((n, n))
        for round in range(600):
            w = found.mixing(round).dense()
            mean += w.T @ project @ w / 600
        expected = project * found.consensus_rate() ** 2
        np.testing.assert_allclose(mean, expected, atol=0.06)
        assert np.trace(mean) / (n - 1) == pytest.approx(found.consensus_rate() ** 2, rel=0.02, abs=1e-9)

    def test_el_local_is_estimated(self) -> None:
        found = topology.build("el-local", 40, degree=4)
        project = np.eye(40) - 1 / 40
        squares = [np.linalg.norm(project @ found.mixing(round).dense()) ** 2 / 39 for round in range(200)]
        assert found.consensus_rate() == pytest.approx(math.sqrt(np.mean(squares)), rel=0.05)
        assert found.bound is None

    @pytest.mark.parametrize(("n", "is_lazy"), [(17, False), (17, True), (90, False)])
    def test_a_family_of_ones_own_in_its_worst_direction(self, n: int, is_lazy: bool) -> None:
        """A ring whose edges fail with probability 0.3: 0.972 for n = 17, where the mean over directions is 0.66."""
        share = 0.5 if is_lazy else 1.0
        first = np.arange(n)

        def draw(round: int) -> Sparse:
            kept = first[rng.generator(0, "failing-ring", round).random(n) > 0.3]
            return symmetric(n, kept, (kept + 1) % n, np.full(len(kept), 1 / 3))

        schedule = Schedule(draw, cycle=None)
        found = Topology("mine", n, 0, TopologyOptions(), "random", schedule.lazy() if is_lazy else schedule)
        slowest, c = 2.0 - 2.0 * math.cos(2.0 * math.pi / n), share / 3  # W = I - c L, and L^2 = 2 L of each edge alone
        expected = math.sqrt(1 - 2 * c * 0.7 * slowest + c**2 * (0.49 * slowest**2 + 0.21 * 2 * slowest))
        rate, error = found.consensus_rate(), found.consensus_rate_error
        assert 0 < error < 1e-3
        assert rate == pytest.approx(expected, abs=4 * error)
        assert found.estimate() < rate - 0.2

    @pytest.mark.parametrize("name", ["random-match", "ou-equidyn", "od-equidyn"])
    def test_samples_agree_with_closed_forms(self, name: str) -> None:
        found = topology.build(name, 70)  # by iterations
        assert (found.consensus_rate_error, found.n > spectra.MAX_SAMPLED) == (0.0, True)
        rate, error = found._sampled_rate
        assert rate == pytest.approx(found.consensus_rate(), abs=4 * error)
        assert error < 0.02

    def test_estimates_of_ceca_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'ceca' contracts nothing by itself"):
            topology.build("ceca", 6).estimate()


def diverges(matrix: Floats, step: float) -> bool:
    """Say whether gradient tracking on the loss x^2 / 2 of every peer moves away from its optimum."""
    x = np.random.default_rng(0).standard_normal(len(matrix))
    y, last = np.zeros(len(x)), np.zeros(len(x))
    for _ in range(1500):
        y, last = y + x - last, x
        x, y = matrix @ (x - step * y), matrix @ y
    return float(np.abs(x).max()) > 1.0


class TestTracking:
    @pytest.mark.parametrize(
        ("name", "n", "parameters"),
        [
            ("u-equistatic", 60, {"M": 4}),
            ("d-equistatic", 60, {"M": 9}),  # complex eigenvalues
            ("hypercube", 64, {}),
            ("ring", 10, {}),
            ("static-exp", 300, {}),
            ("grid", 12, {"lazy": True}),
        ],
        ids=str,
    )
    def test_the_limit_parts_what_converges_from_what_does_not(
        self, name: str, n: int, parameters: dict[str, Any]
    ) -> None:
        found = topology.build(name, n, seed=1, **parameters)
        limit, dense = found.tracking_limit(), found.mixing(0).dense()
        assert limit is not None
        assert [diverges(dense, limit * share) for share in (0.5, 0.95, 1.06)] == [False, False, True]
        assert found.tracking_limit(lazy=True) == pytest.approx(
            spectra.tracking_limit((1 + np.linalg.eigvals(dense).astype(complex)) / 2), rel=1e-3
        )

    @pytest.mark.parametrize("rho", [0.45, 0.6, 0.9, 1.0])
    def test_of_a_negative_eigenvalue(self, rho: float) -> None:
        assert spectra.tracking_limit(np.array([1.0 + 0j, 0.3, -rho])) == pytest.approx(1 / rho - rho, abs=1e-9)

    def test_where_it_is_not_told(self) -> None:
        assert topology.build("base", 10).tracking_limit() is None
        assert topology.build("ceca", 2).tracking_limit() is None
