"""EquiTopo: basis graphs, the theorem, the literal scan of OU-EquiDyn, exact contraction, the paper's numbers."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import topology
from gossamer.errors import ConfigError
from gossamer.topology import Matching, Shift, equitopo, measure
from gossamer.topology.base import Floats

STATIC = ["d-equistatic", "u-equistatic"]
DYNAMIC = ["od-equidyn", "ou-equidyn", "od-equidyn-complete", "ou-equidyn-complete"]


def basis(n: int, u: int) -> Floats:
    """Return A^(u) as it is defined, entry by entry: what j sends goes to j + u."""
    matrix = np.eye(n) / n
    for j in range(n):
        matrix[(j + u) % n, j] += (n - 1) / n
    return matrix


def literal_scan(n: int, v: int, start: int) -> list[int]:
    """Match i and i + v in the order start, start + 1, ... where both are free."""
    partner = list(range(n))
    free = [True] * n
    for step in range(n):
        i = (start + step) % n
        j = (i + v) % n
        if free[i] and free[j]:
            partner[i], partner[j] = j, i
            free[i] = free[j] = False
    return partner


def worst_contraction(mixings: list[Floats]) -> float:
    """Return the root of the largest eigenvalue of the mean of W^T P W."""
    n = len(mixings[0])
    project = np.eye(n) - 1 / n
    mean = sum(w.T @ project @ w for w in mixings) / len(mixings)
    return math.sqrt(np.linalg.eigvalsh(mean).max())


class TestBasis:
    @pytest.mark.parametrize("n", [2, 3, 7, 12])
    def test_mean_of_all_is_the_average(self, n: int) -> None:
        everything = sum(basis(n, u) for u in range(1, n)) / (n - 1)
        np.testing.assert_allclose(everything, np.full((n, n), 1 / n), atol=1e-15)
        shift = equitopo.mean_of_basis(n, np.arange(1, n), undirected=False)
        np.testing.assert_allclose(shift.dense(), np.full((n, n), 1 / n), atol=1e-15)

    @given(
        n=st.integers(2, 20), shifts=st.lists(st.integers(1, 10**6), min_size=1, max_size=12), undirected=st.booleans()
    )
    def test_mean_of_some(self, n: int, shifts: list[int], undirected: bool) -> None:
        drawn = np.array([u % (n - 1) + 1 for u in shifts])
        expected = sum(basis(n, int(u)) for u in drawn) / len(drawn)
        expected = (expected + expected.T) / 2 if undirected else expected
        shift = equitopo.mean_of_basis(n, drawn, undirected)
        np.testing.assert_allclose(shift.dense(), expected, atol=1e-15)
        assert shift.max_degree <= len(drawn) * (2 if undirected else 1)

    @pytest.mark.parametrize("name", STATIC)
    def test_static_is_the_mean_of_its_draw(self, name: str) -> None:
        shifts, _ = equitopo.draw_basis(30, 5, seed=7)
        expected = sum(basis(30, int(u)) for u in shifts) / 5
        expected = expected if name.startswith("d") else (expected + expected.T) / 2
        np.testing.assert_allclose(topology.build(name, 30, seed=7, M=5).mixing(9).dense(), expected, atol=1e-15)


class TestNumberOfGraphs:
    def test_theorem_rounds_up(self) -> None:
        exact = 8 * math.log(2 * 300 / 0.05) / (3 * 0.25)
        assert equitopo.theorem_num_graphs(300, 0.5, 0.05) == int(exact) + 1 == 101
        found = topology.build("d-equistatic", 300, rho=0.5, p=0.05)
        assert (found.facts["M"], found.bound) == (101, 0.5)

    def test_default_is_the_papers(self) -> None:
        assert topology.build("od-equidyn", 300).facts["M"] == math.floor(5 * math.log(300)) == 28
        assert topology.build("u-equistatic", 300, M=9).facts["M"] == 9

    @pytest.mark.parametrize("name", STATIC)
    def test_theorem_holds_far_more_often_than_promised(self, name: str) -> None:
        """At p = 1/2 and n = 101 at least half the draws keep the rate; as the bound is loose, all but a few do."""
        rates = [topology.build(name, 101, seed=seed, rho=0.6, p=0.5).consensus_rate() for seed in range(100)]
        assert sum(rate <= 0.6 for rate in rates) >= 50
        assert max(rates) > 0.25  # a rate of random graphs, not of the complete one

    def test_theorem_is_inverted(self) -> None:
        for num_graphs in (50, 500):
            rho = equitopo.theorem_rate(300, num_graphs, 0.1)
            assert rho is not None
            assert equitopo.theorem_num_graphs(300, rho * (1 + 1e-12), 0.1) == num_graphs
        assert equitopo.theorem_rate(300, 9, 0.1) is None

    def test_both_ways_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"d-equistatic: give either M = 3 or rho = 0.5"):
            topology.build("d-equistatic", 30, M=3, rho=0.5)


class TestConnected:
    @staticmethod
    def first_draw(n: int, num_graphs: int, seed: int) -> list[int]:
        drawn: list[int] = equitopo.rng.generator(seed, "topology-basis").integers(1, n, size=num_graphs).tolist()
        return drawn

    def test_common_divisors_are_drawn_again_and_counted(self) -> None:
        num_resampled = 0
        for seed in range(60):
            found = topology.build("d-equistatic", 12, seed=seed, M=2)
            is_bad = math.gcd(12, *self.first_draw(12, 2, seed)) > 1
            assert (found.resamples > 0) == is_bad
            num_resampled += is_bad
            assert found.consensus_rate() < 1 - 1e-3
        assert 10 < num_resampled < 50

    def test_what_would_have_happened(self) -> None:
        assert np.linalg.norm(equitopo.mean_of_basis(12, np.array([4, 6]), False).dense() - 1 / 12, 2) == (
            pytest.approx(1.0)
        )

    def test_never_for_primes(self) -> None:
        assert {topology.build("od-equidyn", 13, seed=seed, M=1).resamples for seed in range(50)} == {0}


class TestScan:
    def test_closed_form_for_all_small_sizes(self) -> None:
        for n in range(2, 41):
            for v in range(1, n):
                for start in {0, 1, n // 2, n - 1}:
                    found = equitopo.scan_matching(n, v, start)
                    assert found.tolist() == literal_scan(n, v, start), (n, v, start)
                assert equitopo.num_pairs(n, v) == len(equitopo.scan_sources(n, v))

    @given(n=st.integers(2, 3000), v=st.integers(1, 10**6), start=st.integers(0, 10**6))
    def test_closed_form_for_large_ones(self, n: int, v: int, start: int) -> None:
        v, start = v % (n - 1) + 1, start % n
        assert equitopo.scan_matching(n, v, start).tolist() == literal_scan(n, v, start)
        assert equitopo.num_pairs(n, v) == len(equitopo.scan_sources(n, v))


class TestRounds:
    def test_od(self) -> None:
        found = topology.build("od-equidyn", 30, seed=3, M=4, eta=0.3)
        shifts, _ = equitopo.draw_basis(30, 4, seed=3)
        drawn: Counter[int] = Counter()
        for round in range(300):
            mixing = found.mixing(round)
            assert isinstance(mixing, Shift)
            (v,) = mixing.offsets
            drawn[v] += 1
            np.testing.assert_allclose(mixing.dense(), 0.7 * np.eye(30) + 0.3 * basis(30, v), atol=1e-15)
        assert set(drawn) == set(shifts.tolist())
        expected = {v: 75 * count for v, count in Counter(shifts.tolist()).items()}
        assert all(abs(drawn[v] - expected[v]) < 40 for v in expected)

    def test_ou(self) -> None:
        found = topology.build("ou-equidyn", 31, seed=3, M=4, eta=0.3)
        shifts, _ = equitopo.draw_basis(31, 4, seed=3)
        for round in range(20):
            mixing = found.mixing(round)
            assert isinstance(mixing, Matching)
            matched = np.flatnonzero(mixing.partner != np.arange(31))
            distances = {int((mixing.partner[i] - i) % 31) for i in matched}
            assert any(distances == {int(v), int(31 - v)} for v in shifts)
            assert mixing.weight == pytest.approx(0.3 * 30 / 31)

    @pytest.mark.parametrize("name", DYNAMIC[2:])
    def test_complete_ones_use_all_shifts(self, name: str) -> None:
        found = topology.build(name, 6)
        seen = {tuple(found.mixing(round).dense().round(6).ravel()) for round in range(400)}
        assert len(seen) == (5 if name.startswith("od") else len(self.matchings(6)))

    @staticmethod
    def matchings(n: int) -> set[tuple[int, ...]]:
        return {tuple(literal_scan(n, v, start)) for v in range(1, n) for start in range(n)}


class TestContraction:
    @pytest.mark.sweep(keep=0.34)
    @pytest.mark.parametrize("eta", [0.2, 0.5, 0.9])
    @pytest.mark.parametrize("n", [2, 3, 12, 13])
    def test_closed_forms_equal_enumeration(self, n: int, eta: float) -> None:
        shifts = np.array([1, 1, n - 1, n // 2])
        for drawn in (shifts, np.arange(1, n)):
            directed = [(1 - eta) * np.eye(n) + eta * basis(n, int(v)) for v in drawn]
            weight = eta * (n - 1) / n
            undirected = [
                Matching(np.array(literal_scan(n, int(v), start)), weight).dense() for v in drawn for start in range(n)
            ]
            assert equitopo.od_rate(n, drawn, eta) == pytest.approx(worst_contraction(directed), abs=1e-7)
            assert equitopo.ou_rate(n, drawn, eta) == pytest.approx(worst_contraction(undirected), abs=1e-7)

    @pytest.mark.parametrize("eta", [0.25, 0.5, 0.8])
    def test_complete_od_equals_the_papers_closed_form_and_simulation(self, eta: float) -> None:
        n = 300
        found = topology.build("od-equidyn-complete", n, eta=eta)
        expected = (1 - eta) ** 2 + eta**2 * (1 - 2 / n)
        assert found.consensus_rate() ** 2 == pytest.approx(expected, rel=1e-12)
        assert found.estimate(400) ** 2 == pytest.approx(expected, rel=0.02)

    def test_best_eta(self) -> None:
        for n in (3, 10, 300):
            best = min(1.0, n / (2.0 * (n - 1)))  # over all basis graphs
            rate = equitopo.od_rate(n, np.arange(1, n), best)
            assert all(
                rate < equitopo.od_rate(n, np.arange(1, n), eta) for eta in (best - 0.05, best + 0.05) if eta < 1
            )

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize("eta", [0.3, 0.5])
    @pytest.mark.parametrize("name", DYNAMIC)
    def test_bounds_hold(self, name: str, eta: float) -> None:
        for seed in range(5):
            found = topology.build(name, 60, seed=seed, eta=eta)
            rho = found.facts.get("rho_of_basis", 0.0)
            slope = 2 if name.startswith("od") else 4 / 3
            assert found.bound == pytest.approx(math.sqrt(1 - slope * eta * (1 - eta) * (1 - rho)))
            assert found.consensus_rate() <= found.bound
            assert found.estimate(200) <= found.consensus_rate() * 1.02

    def test_bounds_at_one_half(self) -> None:
        rho = topology.build("d-equistatic", 60, seed=1, M=9).consensus_rate()
        assert topology.build("od-equidyn", 60, seed=1, M=9).bound == pytest.approx(math.sqrt((1 + rho) / 2))
        rho = topology.build("u-equistatic", 60, seed=1, M=9).consensus_rate()
        assert topology.build("ou-equidyn", 60, seed=1, M=9).bound == pytest.approx(math.sqrt((2 + rho) / 3))

    @pytest.mark.parametrize("name", DYNAMIC)
    def test_lazy_halves_eta(self, name: str) -> None:
        lazy, half = topology.build(name, 30, lazy=True, eta=0.5), topology.build(name, 30, eta=0.25)
        assert lazy.consensus_rate() == pytest.approx(half.consensus_rate(), rel=1e-12)
        np.testing.assert_allclose(lazy.mixing(4).dense(), half.mixing(4).dense(), atol=1e-15)
        assert lazy.bound is not None
        assert lazy.consensus_rate() <= lazy.bound


class TestPublishedNumbers:
    """Rounds to a relative 1e-15 at n = 300, of one draw in the paper; few basis graphs scatter much more than many."""

    @pytest.mark.parametrize(
        ("name", "parameters", "published", "tolerance"),
        [
            ("d-equistatic", {}, 38, 0.25),
            ("d-equistatic", {"M": 9}, 91, 0.5),
            ("od-equidyn", {"M": 9}, 251, 0.5),
            ("ou-equidyn", {"M": 9}, 149, 0.5),
            ("od-equidyn-complete", {}, 72, 0.1),
            ("ou-equidyn-complete", {}, 114, 0.05),
        ],
        ids=str,
    )
    def test_rounds(self, name: str, parameters: dict[str, int], published: int, tolerance: float) -> None:
        rounds = []
        for seed in range(8):
            found = measure(topology.build(name, 300, seed=seed, **parameters), 1000, seed, 1e-15).rounds
            assert found is not None
            rounds.append(found)
        assert min(rounds) <= published <= max(rounds)
        assert np.mean(rounds) == pytest.approx(published, rel=tolerance)

    def test_ou_is_slower_than_a_uniform_matching(self) -> None:
        complete, uniform = topology.build("ou-equidyn-complete", 300), topology.build("random-match", 300)
        assert uniform.consensus_rate() == pytest.approx(0.707, abs=2e-3)
        assert complete.estimate(1000) == pytest.approx(0.746, abs=3e-3)
        assert complete.consensus_rate() > complete.estimate(1000) + 0.005

    def test_rate_does_not_grow_with_n(self) -> None:
        rates = [topology.build("d-equistatic", n).consensus_rate() for n in (1_000, 10_000, 1_000_000)]
        rings = [topology.build("ring", n).consensus_rate() for n in (1_000, 10_000, 1_000_000)]
        assert max(rates) < 0.6
        assert all(one < other for one, other in pairwise(rings))
        assert rings[2] > 1 - 1e-10
