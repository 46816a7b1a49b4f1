"""Finite-time graphs: exact in so many rounds, for every n, with no more peers than promised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import topology
from gossamer.errors import ConfigError
from gossamer.topology import Joint, Mixing, finite
from gossamer.topology.base import Floats

FINITE = {
    "simple-base": (finite.simple_base, finite.simple_base_length),
    "base": (finite.base, finite.base_length),
    "hyper-hypercube": (finite.hyper_hypercube, finite.hyper_hypercube_length),
}


def start_of(n: int) -> Floats:
    return np.random.default_rng(n).standard_normal((n, 2))


def error_after(mixings: list[Mixing], x: Floats) -> float:
    state = x
    for mixing in mixings:
        state = mixing.apply(state)
    return float(np.abs(state - x.mean(0)).max())


def is_smooth(n: int, k: int) -> bool:
    for divisor in range(2, k + 2):
        while n % divisor == 0:
            n //= divisor
    return n == 1


def max_rounds(n: int, k: int) -> int:
    """Return floor(2 log_{k+1} n + 2) by integers: the largest t with (k+1)^(t - 2) <= n^2."""
    rounds = 2
    while (k + 1) ** (rounds - 1) <= n * n:
        rounds += 1
    return rounds


def check_promises(mixing: Mixing, k: int) -> None:
    edges = mixing.edges()
    peers = np.bincount(edges.receiver, minlength=mixing.n)
    assert mixing.max_degree == peers.max() <= k
    pairs = dict(zip(zip(edges.receiver, edges.sender, strict=True), edges.weight, strict=True))
    assert all(pairs[j, i] == weight for (i, j), weight in pairs.items())
    assert mixing.self_weights().min() > -1e-15


@pytest.mark.sweep(keep=0.15)
@pytest.mark.parametrize("residue", range(7))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", sorted(FINITE))
def test_exact_for_every_n(name: str, k: int, residue: int) -> None:
    draw, length = FINITE[name]
    for n in range(2 + residue, 401, 7):
        if name == "hyper-hypercube" and not is_smooth(n, k):
            with pytest.raises(ConfigError, match=f"needs n = {n} to have no prime factor above k \\+ 1 = {k + 1}"):
                length(n, k)
            continue
        num_rounds = length(n, k)
        assert num_rounds <= max_rounds(n, k)
        mixings = [draw(n, k, round) for round in range(num_rounds)]
        x = start_of(n)
        assert error_after(mixings, x) < 1e-12, n
        if num_rounds > 1:
            assert error_after(mixings[:-1], x) > 1e-6, n  # the last round is needed
        if n % 5 == 0 or n > 390:
            for mixing in mixings:
                check_promises(mixing, k)


@pytest.mark.parametrize(("n", "k"), [(243, 2), (244, 2), (3**6, 2), (3**8 + 1, 2), (4**6, 3), (125, 4), (4999, 1)])
def test_powers_that_logarithms_get_wrong(n: int, k: int) -> None:
    """The logarithm of 243 to base 3 is 4.999... in floating point, which once cost a degree."""
    assert math.log(243, 3) != 5
    mixings = [finite.base(n, k, round) for round in range(finite.base_length(n, k))]
    for mixing in mixings:
        check_promises(mixing, k)
    assert error_after(mixings, start_of(n)) < 1e-12
    if is_smooth(n, k):
        assert len(mixings) == finite.hyper_hypercube_length(n, k)


class TestNumbers:
    def test_digits(self) -> None:
        assert finite.digits(243, 2) == [(1, 5)]
        assert finite.digits(242, 2) == [(2, 4), (2, 3), (2, 2), (2, 1), (2, 0)]
        for k in (1, 2, 3, 9):
            for n in range(1, 300):
                found = finite.digits(n, k)
                assert sum(a * (k + 1) ** p for a, p in found) == n
                assert all(1 <= a <= k for a, _ in found)

    @given(n=st.integers(1, 5000), k=st.integers(1, 12))
    def test_fewest_factors(self, n: int, k: int) -> None:
        found = finite.factors(n, k)
        assert (found is not None) == is_smooth(n, k)
        if found is not None:
            assert math.prod(found) == n
            assert all(2 <= factor <= k + 1 for factor in found)
            reached, num_factors = {1}, 0
            while n not in reached:  # breadth first over products of more and more factors
                reached = {a * f for a in reached for f in range(2, k + 2) if n % (a * f) == 0}
                num_factors += 1
            assert len(found) == num_factors

    def test_smooth_part(self) -> None:
        assert finite.smooth_part(2**3 * 3 * 5 * 7, 3) == 24
        assert finite.smooth_part(101, 3) == 1


class TestShape:
    def test_base_is_shorter_than_simple_base_somewhere_and_never_longer(self) -> None:
        lengths = [(finite.base_length(n, 1), finite.simple_base_length(n, 1)) for n in range(2, 401)]
        assert all(base <= simple for base, simple in lengths)
        assert sum(base < simple for base, simple in lengths) > 20

    def test_five_peers_in_pairs(self) -> None:
        """5 = 4 + 1: two rounds among the four; the fifth meets one of them; two rounds again."""
        mixings = [finite.simple_base(5, 1, round) for round in range(finite.simple_base_length(5, 1))]
        assert [sorted(zip(*mixing.edges()[:2], strict=True)) for mixing in mixings] == [
            [(0, 1), (1, 0), (2, 3), (3, 2)],
            [(0, 2), (1, 3), (2, 0), (3, 1)],
            [(0, 4), (4, 0)],
            [(0, 1), (1, 0), (2, 3), (3, 2)],
            [(0, 2), (1, 3), (2, 0), (3, 1)],
        ]
        assert set(mixings[2].edges().weight) == {0.8}

    def test_cycles_repeat(self) -> None:
        for name in ("base", "ceca", "one-peer-exp"):
            found = topology.build(name, 16)
            assert found.period is not None
            assert found.mixing(found.period + 1).digest() == found.mixing(1).digest()
            x = np.random.default_rng(0).standard_normal((16, 2))
            state = found.mixing(0).start(x)
            for round in range(5 * found.period, 6 * found.period):
                state = found.mixing(round).apply(state)
            np.testing.assert_allclose(found.mixing(0).read(state), np.tile(x.mean(0), (16, 1)), atol=1e-14)
            assert found.consensus_rate() == 0.0

    def test_a_large_one(self) -> None:
        n, k = 100_003, 1
        mixings = [finite.base(n, k, round) for round in range(finite.base_length(n, k))]
        assert error_after(mixings, start_of(n)) < 1e-12
        assert max(mixing.max_degree for mixing in mixings) == 1

    def test_lazy_is_no_longer_exact(self) -> None:
        lazy = topology.build("base", 6, lazy=True)
        assert (lazy.period, lazy.schedule.cycle) == (None, topology.build("base", 6).period)
        assert 0.0 < lazy.consensus_rate() < 1.0


def slow_ceca(x: Floats) -> list[Floats]:
    """Follow the published steps peer by peer; return x after each."""
    n, m = len(x), 0
    y, steps = x.copy(), []
    for bit in bin(n - 1)[2:]:
        old_x, old_y = x.copy(), y.copy()
        x, y = x.copy(), y.copy()
        for i in range(n):
            if bit == "1":
                r = old_x[(i - m - 1) % n]
                x[i], y[i] = (old_x[i] + r) / 2, ((m + 1) * r + m * old_y[i]) / (2 * m + 1)
            else:
                r = old_y[(i - m) % n]
                x[i], y[i] = ((m + 1) * old_x[i] + m * r) / (2 * m + 1), (old_y[i] + r) / 2
        m = 2 * m + int(bit)
        steps.append(x)
    return steps


class TestCeca:
    def test_exact_in_the_least_number_of_rounds_for_every_n(self) -> None:
        for n in [*range(2, 401), 1023, 1024, 1025, 99_991]:
            found = topology.build("ceca", n)
            assert found.period == math.ceil(math.log2(n))
            x = start_of(n)
            state = found.mixing(0).start(x)
            for round in range(found.period):
                mixing = found.mixing(round)
                state = mixing.apply(state)
                assert mixing.max_degree == 1
            assert np.abs(mixing.read(state) - x.mean(0)).max() < 1e-12, n

    @pytest.mark.parametrize("n", [2, 3, 6, 11, 16, 21])
    def test_agrees_with_the_loop(self, n: int) -> None:
        found, x = topology.build("ceca", n), start_of(n)
        state = found.mixing(0).start(x)
        for round, expected in enumerate(slow_ceca(x)):
            state = found.mixing(round).apply(state)
            np.testing.assert_allclose(found.mixing(round).read(state), expected, atol=1e-14)

    def test_state_by_peer_or_by_row(self) -> None:
        mixing = topology.build("ceca", 6).mixing(1)
        x = np.random.default_rng(0).standard_normal((6, 2, 3))
        flat = x.reshape(12, 3)
        np.testing.assert_array_equal(mixing.apply(flat).reshape(6, 2, 3), mixing.apply(x))
        np.testing.assert_array_equal(mixing.rows(x, 1, 3), mixing.apply(x)[1:3])
        np.testing.assert_array_equal(mixing.read(flat), mixing.read(x))
        with pytest.raises(ConfigError, match="give 12 rows"):
            mixing.apply(x[:, 0])

    def test_what_y_held_before_a_cycle_does_not_count(self) -> None:
        mixing = topology.build("ceca", 6).mixing(0)
        x = np.random.default_rng(0).standard_normal((6, 2, 3))
        other = x.copy()
        other[:, 1] = 7.0
        np.testing.assert_array_equal(mixing.apply(x), mixing.apply(other))

    def test_what_is_sent(self) -> None:
        found = topology.build("ceca", 6)  # n - 1 = 101 in binary
        rounds = [found.mixing(round) for round in range(3)]
        assert all(isinstance(mixing, Joint) for mixing in rounds)
        assert [(mixing.message, mixing.offset) for mixing in rounds if isinstance(mixing, Joint)] == [
            ("x", 1),
            ("y", 1),
            ("x", 3),
        ]

    def test_lazy_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"ceca.lazy = True"):
            topology.build("ceca", 6, lazy=True)
        with pytest.raises(ConfigError, match="lazy version of the joint mixing"):
            topology.build("ceca", 6).mixing(0).lazy()
