"""Extrapolates a recorded round to participants that each have a machine of their own, behind links that they share.

Participants stand at the nodes of a network, and their messages take its quickest routes. How long they train is drawn
from the record, times how much slower their device is. All messages of a direction are on the way at once: each takes
the latencies of its route, and as long as the busiest link there needs for all that crosses it. That is what fair
sharing comes to where messages are equal and begin together, and an upper bound elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError
from gossamer.profiling.replay import Interval
from gossamer.profiling.scale import NUM_DRAWS, REST, Scaled
from gossamer.topology.files import attribute_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TRAINING, LINKS, OWN_LINKS, SERVER, MIXING = "training", "links", "participants' own links", "server", "mixing"
ATTRIBUTES = ("latency_seconds", "bandwidth_bytes_per_second")


@dataclass(frozen=True)
class Network:
    """Nodes, and what is known of the links between them; each direction of a link has all of its bandwidth.

    Attributes:
        num_nodes: nodes.
        ends: int64 [l, 2], the nodes of each link.
        names: of the links.
        latency_seconds, bandwidth: float64 [l], seconds, and bytes a second.
    """

    num_nodes: int
    ends: Ints
    names: tuple[str, ...]
    latency_seconds: Floats
    bandwidth: Floats

    @classmethod
    def of(cls, graph: Any) -> Network:
        """Take a networkx graph whose edges have `ATTRIBUTES`.

        Raises:
            ConfigError: an edge lacks one, or has one that is out of range, or nodes cannot reach each other; or the
                graph is directed.
        """
        import networkx

        if networkx.is_directed(graph):
            raise ConfigError("its edges are directed, and a link here is the same both ways: give an undirected graph")
        plain = networkx.Graph(graph)
        number = {node: index for index, node in enumerate(plain)}
        if len(number) < 2:
            raise ConfigError(f"a network of {len(number)} nodes has no links: give two nodes or more, and their links")
        if not networkx.is_connected(plain):
            raise ConfigError(
                f"a network of {len(number)} nodes that do not all reach each other: give a connected one"
            )
        for a, b, told in plain.edges(data=True):
            if missing := [name for name in ATTRIBUTES if told.get(name, "") == ""]:
                raise ConfigError(f"the link {a} - {b} has no {missing[0]}: give it to every edge of the graph")
        edges = list(plain.edges(data=True))
        return cls(
            len(number),
            np.array([[number[a], number[b]] for a, b, _ in edges], dtype=np.int64),
            tuple(f"{a} - {b}" for a, b, _ in edges),
            *(attribute_of("its links", edges, name) for name in ATTRIBUTES),
        )

    @cached_property
    def routes(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """The links of the quickest route between any two nodes: l or, against its direction, l + num_links."""
        import networkx

        graph, arcs = networkx.Graph(), dict[tuple[int, int], int]()
        for link, (a, b) in enumerate(self.ends.tolist()):
            graph.add_edge(a, b, weight=self.latency_seconds[link])
            arcs[a, b], arcs[b, a] = link, link + len(self.ends)
        paths = networkx.all_pairs_dijkstra_path(graph)
        return {(a, b): tuple(arcs[step] for step in pairwise(path)) for a, each in paths for b, path in each.items()}

    @cached_property
    def centre(self) -> int:
        """The node from which the sum of latencies to all others is least."""
        total = np.zeros(self.num_nodes)
        for (a, _), route in self.routes.items():
            total[a] += sum(self.latency_seconds[arc % len(self.ends)] for arc in route)
        return int(total.argmin())

    def seconds(self, sender: Ints, receiver: Ints, num_bytes: Floats) -> tuple[Floats, Ints]:
        """Return how long messages that begin together are on the way.

        Args:
            sender, receiver: int64 [m], nodes.
            num_bytes: float64 [m].

        Returns:
            float64 [m], and int64 [m], the link that each waits for most; -1: none.
        """
        pair = sender * self.num_nodes + receiver
        size = np.bincount(pair, weights=num_bytes, minlength=self.num_nodes**2)
        used, load = np.flatnonzero(np.bincount(pair, minlength=self.num_nodes**2)), np.zeros(2 * len(self.ends))
        for one in used.tolist():
            load[list(self.routes[divmod(one, self.num_nodes)])] += size[one]
        busy = load / np.tile(self.bandwidth, 2)
        seconds, slowest = np.zeros(self.num_nodes**2), np.full(self.num_nodes**2, -1)
        for one in used.tolist():
            if route := self.routes[divmod(one, self.num_nodes)]:
                arc = max(route, key=lambda arc: busy[arc])
                latency = sum(self.latency_seconds[each % len(self.ends)] for each in route)
                seconds[one], slowest[one] = busy[arc] + latency, arc % len(self.ends)
        return seconds[pair], slowest[pair]


@dataclass(frozen=True)
class Parts:
    """What a round of n participants consists of; one array or number for each of the things that may be slow.

    Attributes:
        training: float64 [n], seconds for which each trains.
        down, up: float64 [n], seconds on the network from and to the server; of peers float64 [m], of each message.
        own_down, own_up: float64 [n], seconds on each participant's own link.
        handling: seconds of the server for an update, or of a peer for mixing.
        rest: seconds besides.
    """

    training: Floats
    down: Floats
    up: Floats
    own_down: Floats
    own_up: Floats
    handling: float
    rest: float

    def without(self) -> Iterator[tuple[str, Parts]]:
        """Yield each thing that may be slow, and the round as if it took no time."""
        yield TRAINING, replace(self, training=0 * self.training)
        yield LINKS, replace(self, down=0 * self.down, up=0 * self.up)
        yield OWN_LINKS, replace(self, own_down=0 * self.own_down, own_up=0 * self.own_up)
        yield SERVER, replace(self, handling=0.0)
        yield REST, replace(self, rest=0.0)


def federated_seconds(parts: Parts) -> float:
    """Return the length of a round with a server, which handles updates one by one as they arrive."""
    arrivals = np.sort(parts.down + parts.own_down + parts.training + parts.own_up + parts.up)
    return float((arrivals + parts.handling * np.arange(len(arrivals), 0, -1)).max()) + parts.rest


def gossip_seconds(parts: Parts, sender: Ints, receiver: Ints) -> float:
    """Return the length of a round of peers, who train, send, and mix what has come.

    Args:
        sender, receiver: int64 [m], of each message.
    """
    sent, complete = parts.training + parts.own_up, parts.training.copy()
    np.maximum.at(complete, receiver, sent[sender] + parts.up)
    return float((complete + parts.own_down).max()) + parts.handling + parts.rest


@dataclass(frozen=True)
class Devices:
    """What is drawn for each participant: kinds of devices, float64 [k] each.

    Attributes:
        shares: relative numbers.
        slowdown: how much longer each trains than the machine of the record.
        upload, download: bytes a second of its own link.
        latency_seconds: of its own link.
    """

    shares: Floats
    slowdown: Floats
    upload: Floats
    download: Floats
    latency_seconds: Floats

    @classmethod
    def of_host(cls) -> Devices:
        """Machines such as that of the record, whose own links take no time."""
        one, never = np.ones(1), np.full(1, np.inf)
        return cls(one, one, never, never, np.zeros(1))


@dataclass(frozen=True)
class Deployment:
    """Participants on a network.

    Attributes:
        network, devices: see there.
        job_seconds: how long participants of the record trained, one entry each.
        handling: see `Parts`.
        rest: seconds of the record's rounds besides.
        bytes_up, bytes_down: of a participant in a round; of peers, of one message up.
    """

    network: Network
    devices: Devices
    job_seconds: Sequence[float]
    handling: float
    rest: Sequence[float]
    bytes_up: float
    bytes_down: float

    def scaled(self, participants: int, messages: tuple[Ints, Ints] | None = None, seed: int = 0) -> Scaled:
        """Return a round of another size.

        Args:
            participants: their number.
            messages: int64 [m] each, senders and receivers of peers' messages; None: there is a server.
            seed: of places, devices and jobs.
        """
        totals, saved, links = list[float](), dict[str, list[float]](), np.zeros(len(self.network.names))
        for draw in range(NUM_DRAWS):
            source = np.random.default_rng([seed, draw])
            parts, slowest = self._drawn(participants, messages, source)

            def seconds(one: Parts) -> float:
                """Return the length of a round."""
                return federated_seconds(one) if messages is None else gossip_seconds(one, *messages)

            totals.append(seconds(parts))
            for name, fewer in parts.without():
                saved.setdefault(MIXING if name == SERVER and messages is not None else name, []).append(
                    totals[-1] - seconds(fewer)
                )
            waits = slowest >= 0
            links += np.bincount(slowest[waits], weights=parts.up[waits], minlength=len(links))
        total = fmean(totals)
        shares = {name: fmean(values) / total for name, values in saved.items()}
        ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
        bottleneck = next(iter(ordered))
        if bottleneck == LINKS and links.any():
            bottleneck = f"link {self.network.names[int(links.argmax())]}"
        lo, hi = np.quantile(totals, [0.05, 0.95])
        return Scaled(participants, None, Interval(total, float(lo), float(hi)), bottleneck, ordered)

    def _drawn(
        self, participants: int, messages: tuple[Ints, Ints] | None, source: np.random.Generator
    ) -> tuple[Parts, Ints]:
        """Return what a round consists of, and the link that each message waits for most."""
        devices, place = self.devices, source.integers(self.network.num_nodes, size=participants)
        kind = source.choice(len(devices.shares), participants, p=devices.shares / devices.shares.sum())
        training = source.choice(np.asarray(self.job_seconds), participants) * devices.slowdown[kind]
        rest, latency = float(source.choice(np.asarray(self.rest))), devices.latency_seconds[kind]
        upload, download = self.bytes_up / devices.upload[kind], self.bytes_down / devices.download[kind]
        if messages is None:
            server = np.full(participants, self.network.centre)
            down, _ = self.network.seconds(server, place, np.full(participants, self.bytes_down))
            up, slowest = self.network.seconds(place, server, np.full(participants, self.bytes_up))
            return Parts(training, down, up, download + latency, upload, self.handling, rest), slowest
        sender, receiver = messages
        up, slowest = self.network.seconds(place[sender], place[receiver], np.full(len(sender), self.bytes_up))
        sent, received = (np.bincount(end, minlength=participants) for end in messages)
        own = received * self.bytes_up / devices.download[kind], sent * upload + latency
        return Parts(training, np.zeros(0), up, own[0], own[1], self.handling, rest), slowest


def devices_of(kinds: Sequence[Mapping[str, float]], host_flops_per_second: float) -> Devices:
    """Return devices from profiles, each with a share and the rates of `gossamer.simulation.devices.DeviceProfile`.

    Args:
        host_flops_per_second: speed at which the machine of the record trained.
    """

    def column(name: str) -> Floats:
        """Return a number of all kinds."""
        return np.array([one[name] for one in kinds], dtype=np.float64)

    return Devices(
        column("share"),
        host_flops_per_second / column("flops_per_second"),
        column("upload_bytes_per_second"),
        column("download_bytes_per_second"),
        column("latency_seconds"),
    )
