"""Static graphs and random rounds: who is linked to whom, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import registry, topology
from gossamer.errors import ConfigError, RegistryError
from gossamer.topology import Matching, Mixing, Schedule, Topology, TopologyOptions, onepeer, randomgraphs, weights


def graph_of(found: topology.Topology, round: int = 0) -> Any:
    edges = found.mixing(round).edges()
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(found.n))
    graph.add_edges_from(zip(edges.sender.tolist(), edges.receiver.tolist(), strict=True))
    return graph


def slow_metropolis(graph: Any) -> np.ndarray[Any, Any]:
    n = graph.number_of_nodes()
    matrix = np.zeros((n, n))
    for i, j in graph.edges:
        matrix[i, j] = matrix[j, i] = 1 / (1 + max(graph.degree(i), graph.degree(j)))
    np.fill_diagonal(matrix, 1 - matrix.sum(1))
    return matrix


class TestClassic:
    @pytest.mark.parametrize(("n", "shape"), [(4, (2, 2)), (6, (2, 3)), (35, (5, 7)), (36, (6, 6)), (300, (15, 20))])
    def test_grid_of_any_rectangle(self, n: int, shape: tuple[int, int]) -> None:
        found = topology.build("grid", n)
        expected = networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(*shape))
        assert (found.facts["rows"], found.facts["columns"]) == shape
        np.testing.assert_allclose(found.mixing(0).dense(), slow_metropolis(expected), atol=1e-15)

    @pytest.mark.parametrize("shape", [(3, 3), (3, 5), (4, 6)])
    def test_torus(self, shape: tuple[int, int]) -> None:
        expected = networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(*shape, periodic=True))
        found = topology.build("torus", math.prod(shape), rows=shape[0])
        np.testing.assert_allclose(found.mixing(0).dense(), slow_metropolis(expected), atol=1e-15)

    def test_hypercube(self) -> None:
        dense = topology.build("hypercube", 16).mixing(0).dense()
        for i in range(16):
            for j in range(16):
                assert dense[i, j] == pytest.approx(0.2 if (i ^ j).bit_count() <= 1 else 0.0)

    @pytest.mark.parametrize("n", [2, 3, 9])
    def test_star_and_complete(self, n: int) -> None:
        star, complete = (topology.build(name, n).mixing(0) for name in ("star", "complete"))
        np.testing.assert_allclose(star.dense(), slow_metropolis(networkx.star_graph(n - 1)), atol=1e-15)
        np.testing.assert_allclose(complete.dense(), np.full((n, n), 1 / n), atol=1e-15)
        assert star.max_degree == complete.max_degree == n - 1

    @pytest.mark.parametrize(
        ("name", "n", "parameters", "message"),
        [
            ("grid", 17, {}, "'grid' cannot arrange n = 17 peers in a rectangle of 2 or more rows: take n = 1[68]"),
            ("torus", 14, {}, "'torus' cannot arrange n = 14 peers in a rectangle of 3 or more rows: take n = 15"),
            ("grid", 12, {"rows": 5}, r"grid.rows = 5 does not arrange n = 12"),
            ("grid", 12, {"rows": 12}, r"grid.rows = 12 does not arrange n = 12"),
            ("hypercube", 12, {}, "'hypercube' needs a power of two, not n = 12: take 8 or 16"),
            ("ring", 2, {}, "topology 'ring' with n = 2: n must be a whole number, 3 or more"),
            ("hyper-hypercube", 10, {"k": 3}, "n = 10 to have no prime factor above k \\+ 1 = 4"),
            ("half-random", 5001, {}, "'half-random' with n = 5001 peers has about 6251250 edges"),
            ("random-regular", 7, {"degree": 3}, "no graph has n = 7 peers of degree 3 each"),
            ("random-regular", 4, {"degree": 4}, "no graph has n = 4 peers of degree 4 each"),
            ("el-oracle", 7, {"degree": 3}, "no graph has n = 7 peers of degree 3 each"),
            ("el-local", 4, {"degree": 4}, r"el-local.degree = 4 is not below n = 4"),
            ("small-world", 9, {"degree": 3}, r"small-world.degree = 3 with n = 9: take an even degree below n"),
            ("erdos-renyi", 60, {"probability": 0.01}, "100 draws of 'erdos-renyi' with n = 60 were all disconnected"),
            ("geometric", 60, {"radius": 0.05}, "100 draws of 'geometric' .* disconnected: raise the radius"),
            ("ring", 9, {"lasy": True}, r"unknown key 'ring.lasy'; did you mean 'lazy'\?"),
            ("od-equidyn", 9, {"m": 3}, r"unknown key 'od-equidyn.m'.*\(known here: M, eta, lazy, p, rho\)"),
            ("od-equidyn", 9, {"eta": 1.5}, r"od-equidyn.eta = 1.5: "),
            ("base", 9, {"k": 0}, r"base.k = 0: "),
        ],
        ids=lambda value: value if isinstance(value, str) and " " not in value else "",
    )
    def test_refusals(self, name: str, n: int, parameters: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            topology.build(name, n, **parameters)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(registry.BUILTIN["topology"]) - {"file"}))
class TestEveryName:
    @pytest.mark.sweep(keep=0.2)
    @pytest.mark.parametrize("n", [1, 0, -3, 2.5, True, "8", None])
    def test_number_of_peers(self, name: str, n: Any) -> None:
        with pytest.raises(ConfigError, match=f"topology '{name}'"):
            topology.build(name, n)

    def test_least_number_is_what_the_family_says(self, name: str) -> None:
        family = registry.resolve("topology", name)
        degree = {"degree": family.minimum - 1} if "degree" in family.options.model_fields else {}
        if name in ("small-world",):
            degree = {"degree": 2}
        found = topology.build(name, family.minimum, **degree)
        assert found.mixing(0).n == family.minimum
        with pytest.raises(ConfigError, match=f"{family.minimum} or more"):
            topology.build(name, family.minimum - 1)

    def test_rounds_from_zero(self, name: str) -> None:
        with pytest.raises(ConfigError, match="round -1 is below 0"):
            topology.build(name, 16).mixing(-1)


def test_unknown_name() -> None:
    with pytest.raises(RegistryError, match="unknown topology 'od-equdyn'; did you mean 'od-equidyn'"):
        topology.build("od-equdyn", 8)


def test_a_plug_in_must_be_a_family() -> None:
    with registry.trusting(), pytest.raises(ConfigError, match="is a type, not a Family"):
        topology.build("collections:OrderedDict", 8)
    assert topology.build("gossamer.topology.classic:ring", 8).mixing(0).max_degree == 2


def test_more_peers_than_memory() -> None:
    def draw(round: int) -> Mixing:
        raise MemoryError

    found = Topology("mine", 3, 0, TopologyOptions(), "random", Schedule(draw, cycle=None))
    with pytest.raises(ConfigError, match="topology 'mine' with n = 3 needs more memory than there is: lower n"):
        found.mixing(0)


class TestPairs:
    def test_numbers_of_pairs(self) -> None:
        first, second = randomgraphs.pair_of_number(np.arange(45))
        assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(i, j) for j in range(10) for i in range(j)]
        far = np.array([10**6 * (10**6 - 1) // 2 - 1, 10**6 * (10**6 - 1) // 2 - 10**6 + 1])
        first, second = randomgraphs.pair_of_number(far)
        assert (first.tolist(), second.tolist()) == ([999_998, 0], [999_999, 999_999])

    @pytest.mark.parametrize("probability", [0.1, 0.5, 0.9, 1.0])
    def test_every_pair_is_as_likely(self, probability: float) -> None:
        counts: Counter[tuple[int, int]] = Counter()
        source = np.random.default_rng(0)
        for _ in range(2000):
            first, second = randomgraphs.bernoulli_edges(6, probability, source)
            counts.update(zip(first.tolist(), second.tolist(), strict=True))
        assert set(counts) == {(i, j) for j in range(6) for i in range(j)}
        assert all(abs(count / 2000 - probability) < 0.06 for count in counts.values())

    @given(n=st.integers(2, 40), degree=st.integers(0, 39), seed=st.integers(0, 1000))
    def test_regular_graphs(self, n: int, degree: int, seed: int) -> None:
        source = np.random.default_rng(seed)
        if degree >= n or n * degree % 2:
            with pytest.raises(ConfigError, match="no graph has"):
                randomgraphs.regular_edges(n, degree, source)
            return
        first, second = randomgraphs.regular_edges(n, degree, source)
        assert (first < second).all()
        assert len({*zip(first.tolist(), second.tolist(), strict=True)}) == len(first)
        assert (np.bincount(np.concatenate([first, second]), minlength=n) == degree).all()

    @given(n=st.integers(2, 60), count=st.integers(1, 59), seed=st.integers(0, 1000))
    def test_distinct_others(self, n: int, count: int, seed: int) -> None:
        count = min(count, n - 1)
        others = onepeer._distinct_others(n, count, np.random.default_rng(seed)).reshape(n, count)
        for i, mine in enumerate(others.tolist()):
            assert len({*mine, i}) == count + 1
            assert all(0 <= j < n for j in mine)


class TestRandomGraphs:
    @pytest.mark.parametrize("name", ["erdos-renyi", "half-random", "geometric", "random-regular", "small-world"])
    def test_connected_with_metropolis_weights_and_another_for_each_seed(self, name: str) -> None:
        digests = set()
        for seed in range(6):
            found = topology.build(name, 40, seed=seed)
            graph = graph_of(found).to_undirected()
            assert networkx.is_connected(graph)
            np.testing.assert_allclose(found.mixing(7).dense(), slow_metropolis(graph), atol=1e-15)
            digests.add(found.mixing(0).digest())
        assert len(digests) == 6

    def test_resampled_until_connected(self) -> None:
        found = [topology.build("erdos-renyi", 30, seed=seed, probability=0.1).resamples for seed in range(12)]
        assert max(found) > 0
        assert min(found) == 0

    def test_number_of_edges(self) -> None:
        pairs = 200 * 199 / 2
        half = graph_of(topology.build("half-random", 200)).number_of_edges() / 2
        assert half == pytest.approx(pairs / 2, rel=0.03)
        sparse = graph_of(topology.build("erdos-renyi", 200)).number_of_edges() / 2
        assert sparse == pytest.approx(200 * math.log(200), rel=0.2)
        assert graph_of(topology.build("small-world", 200, degree=6)).number_of_edges() == 1200
        assert {d for _, d in graph_of(topology.build("random-regular", 50, degree=5)).in_degree()} == {5}

    def test_unrewired_small_world_is_a_lattice(self) -> None:
        graph = graph_of(topology.build("small-world", 11, degree=4, probability=0.0))
        assert set(graph.successors(0)) == {1, 2, 9, 10}


class TestEveryRound:
    @pytest.mark.parametrize("n", [2, 9, 10])
    def test_matchings_are_uniform(self, n: int) -> None:
        found = topology.build("random-match", n)
        partners: Counter[int] = Counter()
        for round in range(3000):
            mixing = found.mixing(round)
            assert isinstance(mixing, Matching)
            assert (mixing.partner[mixing.partner] == np.arange(n)).all()
            assert (mixing.partner == np.arange(n)).sum() == n % 2
            partners[int(mixing.partner[0])] += 1
        choices = n if n % 2 else n - 1
        assert len(partners) == choices
        assert all(abs(count / 3000 - 1 / choices) < 0.03 for count in partners.values())

    def test_el_oracle(self) -> None:
        found = topology.build("el-oracle", 20, degree=3)
        for round in range(5):
            graph = graph_of(found, round)
            assert {d for _, d in graph.in_degree()} == {3}
            assert set(found.mixing(round).edges().weight) == {0.25}

    def test_el_local_is_only_row_stochastic(self) -> None:
        found = topology.build("el-local", 20, degree=3)
        mixing = found.mixing(2)
        assert (mixing.stochasticity, mixing.is_symmetric) == ("row", False)
        assert {len(mixing.send_ranks(i)) for i in range(20)} == {3}
        for i in range(20):
            heard = mixing.recv_ranks(i)
            np.testing.assert_allclose(mixing.dense()[i, [i, *heard]], 1 / (1 + len(heard)))
        assert np.abs(mixing.dense().sum(0) - 1).max() > 0.1
        drift = topology.measure(found, 200).mean_drift
        assert drift > 1e-3
        assert topology.measure(topology.build("el-oracle", 20, degree=3), 200).mean_drift < 1e-12


class TestWeights:
    @pytest.mark.parametrize(
        ("graph", "rate"),
        [
            (networkx.cycle_graph(8), None),
            (networkx.star_graph(6), None),
            (networkx.hypercube_graph(3), None),
            (networkx.complete_graph(5), 0.0),
        ],
        ids=["cycle", "star", "hypercube", "complete"],
    )
    def test_fastest_for_graphs_with_equal_edges(self, graph: Any, rate: float | None) -> None:
        """With all edges alike one weight is best: 2 / (l_2 + l_n) of the Laplacian (Xiao and Boyd, 2004)."""
        graph = networkx.convert_node_labels_to_integers(graph)
        laplacian = np.sort(np.linalg.eigvalsh(networkx.laplacian_matrix(graph).toarray().astype(float)))
        low, high = laplacian[1], laplacian[-1]
        found = topology.build("file", graph=graph, weights="fastest")
        expected = (high - low) / (high + low) if rate is None else rate
        assert found.consensus_rate() == pytest.approx(expected, abs=2e-3)

    def test_fastest_beats_metropolis(self) -> None:
        graph = networkx.barbell_graph(5, 2)
        rates = [topology.build("file", graph=graph, weights=w).consensus_rate() for w in ("metropolis", "fastest")]
        assert rates[1] < rates[0] - 0.01

    def test_fastest_is_for_small_graphs(self) -> None:
        with pytest.raises(ConfigError, match=r"weights = 'fastest' for n = 301 peers exceeds the limit of 300"):
            topology.build("file", graph=networkx.path_graph(301), weights="fastest")

    def test_connectivity(self) -> None:
        one, other = np.array([0, 1, 2]), np.array([1, 2, 0])
        assert weights.is_connected(3, one, other, directed=True)
        assert not weights.is_connected(3, one[:2], other[:2], directed=True)
        assert weights.is_connected(3, one[:2], other[:2])
        assert not weights.is_connected(4, one, other)


def test_el_local_by_sender_keeps_the_sum() -> None:
    found = topology.build("el-local", n=12, seed=5, degree=3, averaging="sender")
    for number in range(4):
        mixing = found.mixing(number)
        assert mixing.stochasticity == "column"
        assert mixing.dense().sum(axis=0) == pytest.approx(np.ones(12), abs=1e-12)
        assert (np.count_nonzero(mixing.dense(), axis=0) == 4).all()  # three others and itself, a quarter each
