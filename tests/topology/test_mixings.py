"""Mixings: all ways to ask one agree with each other, with its edges, and with a loop over peers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gossamer import topology
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN
from gossamer.topology import BlockAverage, Matching, Mixing, Shift, Sparse

GENERATED = sorted(set(BUILTIN["topology"]) - {"file"})


def slow_apply(mixing: Mixing, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mix peer by peer from the list of edges."""
    mixed = x * mixing.self_weights()[:, None]
    edges = mixing.edges()
    for receiver, sender, weight in zip(edges.receiver, edges.sender, edges.weight, strict=True):
        mixed[receiver] += weight * x[sender]
    return mixed


def built(name: str, n: int, seed: int, **parameters: Any) -> topology.Topology:
    """Build a topology, or give the example up if its graph cannot be."""
    try:
        return topology.build(name, n, seed, **parameters)
    except ConfigError:
        assume(False)
        raise


@given(
    name=st.sampled_from(GENERATED),
    n=st.integers(2, 40),
    seed=st.integers(0, 2**40),
    round=st.integers(0, 1000),
    lazy=st.booleans(),
    data=st.data(),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_all_views_of_a_mixing_agree(name: str, n: int, seed: int, round: int, lazy: bool, data: Any) -> None:
    found = built(name, n, seed, **({"lazy": True} if lazy else {}))
    mixing = found.mixing(round)
    dense, rows = mixing.dense(), n * mixing.rows_per_site
    x = np.random.default_rng(seed % 1000).standard_normal((rows, 3))
    before = x.copy()
    mixed = mixing.apply(x)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_allclose(mixed, dense @ x, atol=1e-13)
    np.testing.assert_allclose(mixing.apply(torch.from_numpy(x)).numpy(), mixed, atol=0)
    single = mixing.apply(x.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, mixed, atol=1e-5)
    lo = data.draw(st.integers(0, n))
    hi = data.draw(st.integers(lo, n))
    step = mixing.rows_per_site
    for state, whole in ((x, mixed), (x.astype(np.float32), single)):
        np.testing.assert_array_equal(mixing.rows(state, lo, hi), whole[step * lo : step * hi])
    if step == 1:
        np.testing.assert_allclose(slow_apply(mixing, x), mixed, atol=1e-13)
    edges = mixing.edges()
    order = np.lexsort((edges.sender, edges.receiver))
    assert (order == np.arange(len(order))).all()
    assert (edges.receiver != edges.sender).all()
    for i in range(n):
        assert mixing.recv_ranks(i) == sorted(edges.sender[edges.receiver == i].tolist())
        assert mixing.send_ranks(i) == sorted(edges.receiver[edges.sender == i].tolist())
    degrees = [len(ranks(i)) for i in range(n) for ranks in (mixing.recv_ranks, mixing.send_ranks)]
    assert mixing.max_degree == max(degrees)
    assert mixing.is_symmetric == bool(np.allclose(dense, dense.T, atol=1e-12))
    assert (dense >= -1e-15).all()
    np.testing.assert_allclose(dense.sum(1), 1.0, atol=1e-12)
    if mixing.stochasticity == "doubly":
        np.testing.assert_allclose(dense.sum(0), 1.0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(GENERATED) - {"ceca"}))
def test_transpose_and_lazy(name: str) -> None:
    mixing = topology.build(name, 16, seed=2).mixing(3)
    np.testing.assert_allclose(mixing.transposed().dense(), mixing.dense().T, atol=1e-14)
    np.testing.assert_allclose(mixing.lazy(0.25).dense(), 0.75 * np.eye(16) + 0.25 * mixing.dense(), atol=1e-14)


@pytest.mark.parametrize("name", GENERATED)
def test_the_draw_depends_on_seed_and_round_only(name: str) -> None:
    one, other = (topology.build(name, 32 if "hypercube" in name else 36, seed=5) for _ in range(2))
    forwards = [one.mixing(round).digest() for round in range(8)]
    backwards = [other.mixing(round).digest() for round in reversed(range(8))][::-1]
    assert forwards == backwards
    assert len(forwards[0]) == 32
    if one.kind == "random":
        assert len(set(forwards)) > 1
        again = topology.build(name, one.n, seed=6)
        assert [again.mixing(round).digest() for round in range(8)] != forwards


class TestDigest:
    def test_tells_mixings_apart(self) -> None:
        pairs = Matching(np.array([1, 0, 3, 2]), 0.5)
        others: list[Mixing] = [
            pairs,
            Matching(np.array([2, 3, 0, 1]), 0.5),
            Matching(np.array([1, 0, 3, 2]), 0.25),
            Shift(4, (1,), (0.5,)),
            Shift(4, (3,), (0.5,)),
            Shift(5, (1,), (0.5,)),
            BlockAverage(2, 2, 1),
            BlockAverage(1, 2, 2),
            BlockAverage(1, 4, 1),
            topology.build("star", 4).mixing(0),
            topology.build("ceca", 4).mixing(0),
            topology.build("ceca", 4).mixing(1),
        ]
        assert len({mixing.digest() for mixing in others}) == len(others)
        assert pairs.digest() == Matching(np.array([1, 0, 3, 2]), 0.5).digest()


class TestShift:
    def test_by_hand(self) -> None:
        x = np.array([[1.0], [2.0], [4.0], [8.0]])
        mixing = Shift(4, (1,), (0.25,))  # j sends to j + 1
        np.testing.assert_allclose(mixing.apply(x)[:, 0], [0.75 + 2, 1.5 + 0.25, 3 + 0.5, 6 + 1])
        assert (mixing.send_ranks(3), mixing.recv_ranks(0)) == ([0], [3])
        assert mixing.dense()[0, 3] == 0.25


class TestState:
    MIXING = Shift(4, (1,), (0.25,))

    def test_any_shape_with_a_row_a_peer(self) -> None:
        x = np.random.default_rng(0).standard_normal((4, 2, 3))
        whole = self.MIXING.apply(x)
        assert whole.shape == x.shape
        np.testing.assert_array_equal(whole[:, 1, 2], self.MIXING.apply(x[:, 1, 2].copy()))
        assert self.MIXING.rows(x, 2, 2).shape == (0, 2, 3)
        assert self.MIXING.apply(np.zeros((4, 0))).shape == (4, 0)

    def test_tensors_stay_detached_and_strided_ones_are_understood(self) -> None:
        x = torch.arange(24, dtype=torch.float64).view(6, 4).T.requires_grad_()
        mixed = self.MIXING.apply(x)
        assert not mixed.requires_grad
        np.testing.assert_allclose(mixed.numpy(), self.MIXING.dense() @ x.detach().numpy())

    def test_read_only_arrays(self) -> None:
        x = np.ones((4, 2))
        x.flags.writeable = False
        np.testing.assert_allclose(self.MIXING.apply(x), 1.0)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.zeros((5, 2)), "state of shape \\(5, 2\\): give 4 rows"),
            (np.zeros((2, 2, 1)), "give 4 rows"),
            (np.float64(1.0), "cannot mix"),
            (np.zeros((4, 2), dtype=np.int64), "cannot mix int64: give a float32"),
            (torch.zeros(4, dtype=torch.float16), "cannot mix torch.float16"),
            ([[1.0]] * 4, "cannot mix list"),
        ],
        ids=["rows", "product of rows", "scalar", "int64", "float16", "list"],
    )
    def test_wrong_states(self, x: Any, message: str) -> None:
        with pytest.raises((ConfigError, TypeError), match=message):
            self.MIXING.apply(x)

    @pytest.mark.parametrize(("lo", "hi"), [(-1, 2), (3, 2), (0, 5)])
    def test_wrong_rows(self, lo: int, hi: int) -> None:
        with pytest.raises(ConfigError, match=f"rows {lo}:{hi} are not within 0:4"):
            self.MIXING.rows(np.zeros((4, 1)), lo, hi)

    @pytest.mark.parametrize("name", ["ring", "random-match", "complete", "star", "ceca"])
    def test_wrong_peer(self, name: str) -> None:
        mixing = topology.build(name, 6).mixing(0)
        for ask in (mixing.send_ranks, mixing.recv_ranks):
            for i in (-1, 6):
                with pytest.raises(ConfigError, match=f"peer {i} is outside 0..5"):
                    ask(i)


class TestSize:
    def test_dense_is_refused_beyond_the_limit(self) -> None:
        assert topology.build("ring", 500).mixing(0).dense().shape == (500, 500)
        with pytest.raises(ConfigError, match=r"a dense matrix of n = 5001 peers exceeds the limit of 5000"):
            topology.build("ring", 5001).mixing(0).dense()
        with pytest.raises(ConfigError, match="n = 2501 peers exceeds the limit of 2500"):
            topology.build("ceca", 2501).mixing(0).dense()

    def test_edges_are_refused_where_they_fill_the_memory(self) -> None:
        mixing = topology.build("complete", 1_000_000).mixing(0)
        with pytest.raises(ConfigError, match="a list of 999999000000 edges exceeds the limit"):
            mixing.edges()
        assert mixing.max_degree == 999_999

    @pytest.mark.parametrize("name", ["od-equidyn", "ou-equidyn", "random-match", "base", "static-exp", "complete"])
    def test_a_million_peers(self, name: str) -> None:
        n = 1_000_000
        mixing = topology.build(name, n, seed=1).mixing(4)
        x = np.zeros((n, 1), dtype=np.float32)
        x[123_456] = 1.0
        column = mixing.apply(x)[:, 0]
        assert column.sum(dtype=np.float64) == pytest.approx(1.0, rel=1e-5)
        if name != "complete":
            assert set(np.flatnonzero(column)) - {123_456} == set(mixing.send_ranks(123_456))


class TestSums:
    def test_weights_that_do_not_sum(self) -> None:
        one, other = np.array([0]), np.array([1])
        with pytest.raises(ConfigError, match=r"the weights of column 0 sum to 0.5, not 1"):
            Sparse.of_edges(2, one, other, np.array([0.5]))
        row = Sparse.of_edges(2, one, other, np.array([0.5]), stochasticity="row")
        np.testing.assert_allclose(row.dense(), [[0.5, 0.5], [0.0, 1.0]])
        column = Sparse.of_edges(2, one, other, np.array([0.5]), stochasticity="column")
        np.testing.assert_allclose(column.dense(), [[1.0, 0.5], [0.0, 0.5]])
        assert (row.transposed().stochasticity, column.transposed().stochasticity) == ("column", "row")
