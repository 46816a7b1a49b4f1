"""Rounds of participants on a network: slow versions of what it computes, and what becomes the bottleneck."""

from __future__ import annotations

import math
from dataclasses import replace

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigError
from gossamer.profiling.deployment import (
    LINKS,
    MIXING,
    OWN_LINKS,
    SERVER,
    TRAINING,
    Deployment,
    Devices,
    Network,
    Parts,
    devices_of,
    federated_seconds,
    gossip_seconds,
)
from gossamer.profiling.scale import REST


def network(edges: list[tuple[int, int, float, float]]) -> Network:
    """Return a network of links (node, node, latency, bandwidth)."""
    graph = networkx.Graph()
    for a, b, latency, bandwidth in edges:
        graph.add_edge(a, b, latency_seconds=latency, bandwidth_bytes_per_second=bandwidth)
    return Network.of(graph)


LINE = network([(0, 1, 0.1, 10.0), (1, 2, 0.2, 5.0)])


class TestNetwork:
    def test_one_message_takes_latencies_and_its_slowest_link(self) -> None:
        seconds, slowest = LINE.seconds(np.array([0]), np.array([2]), np.array([20.0]))
        assert seconds == pytest.approx([0.1 + 0.2 + 20 / 5])
        assert slowest.tolist() == [1]

    def test_messages_share_a_link_but_not_its_other_direction(self) -> None:
        seconds, _ = LINE.seconds(np.array([0, 0, 1, 2]), np.array([1, 1, 0, 2]), np.array([10.0, 30.0, 5.0, 9.0]))
        assert seconds == pytest.approx([0.1 + 4, 0.1 + 4, 0.1 + 0.5, 0.0])

    def test_the_centre_is_nearest_to_all(self) -> None:
        assert LINE.centre == 1

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000))
    def test_is_what_a_slow_version_says(self, seed: int) -> None:
        draws = np.random.default_rng(seed)
        graph = networkx.connected_watts_strogatz_graph(7, 3, 0.5, seed=seed)
        made = network([(a, b, draws.uniform(0.1, 1), draws.uniform(1, 9)) for a, b in graph.edges])
        sender, receiver = draws.integers(7, size=(2, 12))
        sizes = draws.uniform(1, 5, 12)
        load = dict[int, float]()
        routes = [made.routes[pair] for pair in zip(sender.tolist(), receiver.tolist(), strict=True)]
        for route, size in zip(routes, sizes, strict=True):
            for arc in route:
                load[arc] = load.get(arc, 0.0) + size
        number = len(made.names)
        expected = [
            sum(made.latency_seconds[arc % number] for arc in route)
            + max((load[arc] / made.bandwidth[arc % number] for arc in route), default=0.0)
            for route in routes
        ]
        assert made.seconds(sender, receiver, sizes)[0] == pytest.approx(expected)

    def test_refused(self) -> None:
        lonely = networkx.Graph([(0, 1), (2, 3)])
        with pytest.raises(ConfigError, match="4 nodes that do not all reach each other"):
            Network.of(lonely)
        with pytest.raises(ConfigError, match="its edges are directed"):
            Network.of(networkx.DiGraph([(0, 1), (1, 0)]))
        with pytest.raises(ConfigError, match="the link 0 - 1 has no latency_seconds"):
            Network.of(networkx.Graph([(0, 1)]))
        with pytest.raises(ConfigError, match="a network of 1 nodes has no links: give two"):
            Network.of(networkx.empty_graph(1))

    @pytest.mark.parametrize(
        ("latency", "bandwidth", "why"),
        [
            (-0.1, 9.0, "latency_seconds of edge .0, 1. is -0.1, but must be in"),
            (0.1, 0.0, "bandwidth_bytes_per_second of edge .0, 1. is 0, but must be in"),
            (0.1, -9.0, "is -9, but must be in"),
            (0.1, math.nan, "is nan, but must be in"),
            ("soon", 9.0, "'soon', is not a number"),
        ],
    )
    def test_links_that_cannot_be_are_refused(self, latency: float | str, bandwidth: float, why: str) -> None:
        graph = networkx.Graph()
        graph.add_edge(0, 1, latency_seconds=latency, bandwidth_bytes_per_second=bandwidth)
        with pytest.raises(ConfigError, match=why):
            Network.of(graph)


def parts(number: int, seed: int) -> Parts:
    """Return parts of a round, drawn."""
    draws = np.random.default_rng(seed)
    return Parts(*(draws.uniform(0, 1, number) for _ in range(5)), handling=0.05, rest=0.3)


@given(st.integers(1, 20), st.integers(0, 1000))
def test_a_server_handles_updates_as_they_arrive(number: int, seed: int) -> None:
    made, now = parts(number, seed), 0.0
    for arrival in sorted(made.down + made.own_down + made.training + made.own_up + made.up):
        now = max(now, arrival) + made.handling
    assert federated_seconds(made) == pytest.approx(now + made.rest)


def test_peers_wait_for_what_they_are_sent() -> None:
    nothing = np.zeros(3)
    made = Parts(
        np.array([1.0, 5.0, 2.0]), nothing, np.array([0.5, 0.25]), nothing, np.array([0.0, 1.0, 0.0]), 0.1, 0.0
    )
    sender, receiver = np.array([1, 2]), np.array([0, 1])
    assert gossip_seconds(made, sender, receiver) == pytest.approx(5.0 + 1.0 + 0.5 + 0.1)
    assert gossip_seconds(replace(made, training=nothing), sender, receiver) == pytest.approx(1.0 + 0.5 + 0.1)


QUICK = Deployment(
    network([(0, 1, 1e-6, 1e12), (1, 2, 1e-6, 1e12)]), Devices.of_host(), [1e-3], 1e-9, [1e-6], 1000.0, 1000.0
)
KIND = {"share": 1.0, "flops_per_second": 1e9, "latency_seconds": 0.0}
RATES = {"upload_bytes_per_second": 1e3, "download_bytes_per_second": 1e9}


@pytest.mark.parametrize(
    ("changes", "bottleneck"),
    [
        ({}, TRAINING),
        ({"network": network([(0, 1, 1e-6, 1e12), (1, 2, 1e-6, 1e4)])}, "link 1 - 2"),
        ({"handling": 1.0}, SERVER),
        ({"rest": [50.0]}, REST),
        ({"devices": devices_of([KIND | RATES], 1e9)}, OWN_LINKS),
        (
            {"devices": devices_of([KIND | RATES | {"flops_per_second": 1.0, "upload_bytes_per_second": 1e9}], 1e9)},
            TRAINING,
        ),
    ],
)
def test_the_bottleneck_is_named(changes: dict, bottleneck: str) -> None:
    found = replace(QUICK, **changes).scaled(40)
    assert found.bottleneck == bottleneck
    assert next(iter(found.shares)) == (LINKS if bottleneck.startswith("link ") else bottleneck)
    assert next(iter(found.shares.values())) > 0.5
    assert found.seconds.lo <= found.seconds.mean <= found.seconds.hi


def test_peers_mix() -> None:
    ring = np.arange(40), (np.arange(40) + 1) % 40
    found = replace(QUICK, handling=2.0).scaled(40, ring)
    assert found.bottleneck == MIXING
    assert found.seconds.mean == pytest.approx(2.0 + 1e-3, rel=1e-3)


def test_more_participants_fill_links() -> None:
    slow = replace(QUICK, network=network([(0, 1, 0.01, 1e4), (1, 2, 0.01, 1e4)]))
    found = [slow.scaled(number).seconds.mean for number in (10, 100, 1000, 10_000)]
    assert found == sorted(found)
    assert found[3] / found[2] == pytest.approx(10, rel=0.1)
