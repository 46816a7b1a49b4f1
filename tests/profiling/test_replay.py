"""Replay: closed forms, other programs' answers on random graphs, and what must hold of every graph."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from gossamer.profiling.replay import (
    Edge,
    Graph,
    LogGP,
    Node,
    bootstrap,
    bootstrap_change,
    fair_share,
    list_schedule,
    replay,
    replay_shared,
    slack,
    transfer,
)

EXACT = 1e-9  # seconds


def random_graph(seed: int, num_nodes: int = 40, num_resources: int = 4) -> Graph:
    """Return a graph with edges to later nodes."""
    draws = np.random.default_rng(seed)
    graph = Graph()
    for number in range(num_nodes):
        sources = draws.choice(number, size=min(number, int(draws.integers(0, 3))), replace=False) if number else []
        after = [(int(source), float(draws.choice([0.0, draws.random()]))) for source in sources]
        graph.add(Node(f"r{draws.integers(num_resources)}", "work", float(draws.random())), after)
    return graph


def longest_path(graph: Graph) -> float:
    """Return the length of the longest path as networkx finds it."""
    found = nx.MultiDiGraph()
    last: dict[str, int] = {}
    for number, node in enumerate(graph.nodes):
        found.add_edge(("begin", number), ("end", number), weight=node.seconds)
        if node.resource in last:
            found.add_edge(("end", last[node.resource]), ("begin", number), weight=0.0)
        last[node.resource] = number
    for source, target, seconds in graph.edges:
        found.add_edge(("end", source), ("begin", target), weight=seconds)
    length: float = nx.dag_longest_path_length(found)
    return length


def simulated(graph: Graph) -> float:
    """Return when all is done as SimPy simulates it: each resource takes its nodes first in, first out."""
    world = simpy.Environment()
    done = [world.event() for _ in graph.nodes]
    before: list[list[Edge]] = [[edge for edge in graph.edges if edge.target == n] for n in range(len(graph.nodes))]

    def worker(numbers: list[int]):  # type: ignore[no-untyped-def]
        for number in numbers:
            for edge in before[number]:
                yield done[edge.source]
            ready = max([ends[edge.source] + edge.seconds for edge in before[number]], default=0.0)
            yield world.timeout(max(0.0, ready - world.now))
            yield world.timeout(graph.nodes[number].seconds)
            ends[number] = world.now
            done[number].succeed()

    ends: dict[int, float] = {}
    for resource in {node.resource for node in graph.nodes}:
        world.process(worker([n for n, node in enumerate(graph.nodes) if node.resource == resource]))
    world.run()
    return max(ends.values())


class TestClosedForms:
    @pytest.mark.parametrize(("a", "b"), [(0.3, 0.7), (0.7, 0.3), (0.5, 0.5)])
    def test_pipeline(self, a: float, b: float) -> None:
        graph, n = Graph(), 9
        for _ in range(n):
            first = graph.add(Node("a", "a", a))
            graph.add(Node("b", "b", b), [first])
        assert replay(graph).seconds == pytest.approx(a + b + (n - 1) * max(a, b), abs=EXACT)

    def test_serial(self) -> None:
        graph = Graph()
        for number in range(10):
            graph.add(Node("one", "work", 0.1 * number))
        assert replay(graph).seconds == pytest.approx(4.5, abs=EXACT)

    def test_fork_and_join(self) -> None:
        graph = Graph()
        fork = graph.add(Node("driver", "plan", 0.2))
        branches = [graph.add(Node(f"worker-{n}", "train", n), [fork]) for n in (1, 5, 3)]
        graph.add(Node("driver", "update", 0.3), branches)
        assert replay(graph).seconds == pytest.approx(0.2 + 5 + 0.3, abs=EXACT)

    def test_one_link(self) -> None:
        graph, path = Graph(), LogGP("link", latency=2e-6, overhead=3e-6, seconds_per_byte=1e-9)
        transfer(graph, path, "a", "b", 10_000)
        assert replay(graph).seconds == pytest.approx(3e-6 + 2e-6 + 10_000e-9 + 3e-6, abs=EXACT)

    def test_amdahl(self) -> None:
        serial, parallel, workers = 1.0, 8.0, 4
        graph = Graph()
        first = graph.add(Node("driver", "serial", serial))
        for n in range(workers):
            graph.add(Node(f"worker-{n}", "parallel", parallel / workers), [first])
        speedup = (serial + parallel) / replay(graph).seconds
        assert speedup == pytest.approx(1 / (1 / 9 + (8 / 9) / workers), abs=EXACT)


class TestAgainstOthers:
    def test_networkx_and_simpy_agree_on_500_graphs(self) -> None:
        for seed in range(500):
            graph = random_graph(seed, num_nodes=20)
            seconds = replay(graph).seconds
            assert longest_path(graph) == pytest.approx(seconds, abs=EXACT)
            assert simulated(graph) == pytest.approx(seconds, abs=EXACT)

    @pytest.mark.parametrize("seed", range(5))
    def test_nothing_shared_is_the_recorded_order(self, seed: int) -> None:
        graph = random_graph(seed)
        assert replay_shared(graph, ()).ends == pytest.approx(replay(graph).ends, abs=EXACT)

    def test_an_edge_backwards_is_refused(self) -> None:
        with pytest.raises(ValueError, match="node 0 depends on node 1"):
            replay(Graph([Node("a", "x", 1.0), Node("b", "x", 1.0)], [Edge(1, 0)]))


class TestProperties:
    @given(st.integers(0, 2**20), st.integers(0, 39), st.floats(1, 10))
    def test_no_end_is_earlier_where_a_node_takes_longer(self, seed: int, number: int, factor: float) -> None:
        graph = random_graph(seed)
        slow = list(graph.nodes)
        slow[number] = slow[number]._replace(seconds=factor * slow[number].seconds)
        before, after = replay(graph).ends, replay(Graph(slow, graph.edges)).ends
        assert all(late >= early for early, late in zip(before, after, strict=True))

    @given(st.integers(0, 2**20))
    def test_twice_the_times_is_twice_the_round(self, seed: int) -> None:
        graph = random_graph(seed)
        twice = graph.scaled(lambda node: 2.0)
        doubled = Graph(twice.nodes, [edge._replace(seconds=2 * edge.seconds) for edge in graph.edges])
        assert replay(doubled).seconds == 2 * replay(graph).seconds

    @given(st.integers(0, 2**20))
    def test_names_of_resources_do_not_matter(self, seed: int) -> None:
        graph = random_graph(seed)
        names = {f"r{n}": f"other-{(n * 3) % 4}" for n in range(4)}
        renamed = Graph([node._replace(resource=names[node.resource]) for node in graph.nodes], graph.edges)
        assert replay(renamed) == replay(graph)

    @given(st.integers(0, 2**20))
    def test_slack_is_what_a_node_may_take_longer(self, seed: int) -> None:
        graph = random_graph(seed, num_nodes=12)
        schedule = replay(graph)
        for number, spare in enumerate(slack(graph, schedule)):
            for extra, is_later in ((0.999 * spare, False), (spare + 0.01, True)):
                slow = list(graph.nodes)
                slow[number] = slow[number]._replace(seconds=slow[number].seconds + extra)
                assert (replay(Graph(slow, graph.edges)).seconds > schedule.seconds + EXACT) == is_later

    @given(st.integers(0, 2**20))
    def test_the_critical_path_is_as_long_as_the_round(self, seed: int) -> None:
        graph = random_graph(seed)
        schedule = replay(graph)
        path = schedule.critical_path()
        assert schedule.begins[path[0]] == 0.0
        assert schedule.ends[path[-1]] == schedule.seconds
        assert all(schedule.causes[late] == early for early, late in pairwise(path))


class TestShared:
    def test_two_equal_transfers_take_twice_as_long(self) -> None:
        assert fair_share([0, 0], [1e6, 1e6], 1e6) == pytest.approx([2, 2], abs=EXACT)

    def test_a_late_transfer_slows_the_rest_of_an_early_one(self) -> None:
        # 1 s alone, then half the speed each: the first has 1 of 2 MB left and takes 2 s for it.
        assert fair_share([0, 1], [2e6, 3e6], 1e6) == pytest.approx([3, 5], abs=EXACT)

    def test_a_link_that_is_always_busy_ends_when_all_bytes_are_through(self) -> None:
        sizes = np.random.default_rng(0).random(50) * 1e6
        assert max(fair_share([0.0] * 50, list(sizes), 1e6)) == pytest.approx(sizes.sum() / 1e6, abs=1e-6)


class TestListScheduling:
    def test_is_within_grahams_bound(self) -> None:
        for seed in range(50):
            graph = random_graph(seed, num_resources=1)
            longest = replay(Graph([n._replace(resource=str(i)) for i, n in enumerate(graph.nodes)], graph.edges))
            work = sum(node.seconds for node in graph.nodes)
            found = list_schedule(graph, {"r0": 3})
            assert max(longest.seconds, work / 3) - EXACT <= found.seconds <= work / 3 + longest.seconds + EXACT

    def test_no_more_nodes_run_at_once_than_there_is_room_for(self) -> None:
        graph = random_graph(3, num_resources=1)
        found = list_schedule(graph, {"r0": 2})
        for begin in found.begins:
            assert sum(b <= begin < e for b, e in zip(found.begins, found.ends, strict=True)) <= 2


class TestBootstrap:
    def test_equal_rounds_leave_no_doubt(self) -> None:
        assert bootstrap([2.0] * 8) == (2.0, 2.0, 2.0)
        assert bootstrap_change([2.0] * 8, [1.0] * 8) == (-0.5, -0.5, -0.5)

    def test_the_interval_holds_the_true_mean_as_often_as_it_says(self) -> None:
        draws, inside = np.random.default_rng(1), 0
        for number in range(200):
            _, lo, hi = bootstrap(draws.normal(1.0, 0.2, 40), seed=number)
            inside += lo <= 1.0 <= hi
        assert 0.82 <= inside / 200 <= 0.95
