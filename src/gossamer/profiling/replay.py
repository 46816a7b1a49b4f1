"""Replays a round: when each piece of work would begin and end if its pieces took other times.

Work is a graph. Nodes with the same resource run one after another, in the order of the list, as they were recorded
(`replay`: the longest path, by sums and maxima alone, so that no node begins earlier where another takes longer); or
share it like the flows of a link (`replay_shared`); or are put into another order by a list scheduler (`list_schedule`,
which may take longer where work takes less time: Graham, 1969). Time is in seconds from 0.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000


class Node(NamedTuple):
    """A piece of work.

    Attributes:
        resource: what it occupies, such as a thread, a core or a link.
        kind: stage.
        seconds: how long it takes.
        cpu: seconds of processor time.
        num_bytes: that it works on.
    """

    resource: str
    kind: str
    seconds: float
    cpu: float = 0.0
    num_bytes: int = 0


class Edge(NamedTuple):
    """Says that a node begins `seconds` or more after the end of another."""

    source: int
    target: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Graph:
    """Work, in an order in which every node follows those that it depends on.

    Attributes:
        nodes: the work.
        edges: dependencies besides the order of nodes of one resource.
    """

    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)

    def add(self, node: Node, after: Iterable[int | tuple[int, float]] = ()) -> int:
        """Append a node that follows others, each a number, or a number and seconds; return its own number."""
        self.nodes.append(node)
        number = len(self.nodes) - 1
        pairs = (one if isinstance(one, tuple) else (one, 0.0) for one in after)
        self.edges.extend(Edge(source, number, seconds) for source, seconds in pairs)
        return number

    def scaled(self, factor: Callable[[Node], float]) -> Graph:
        """Return the graph with each node's times multiplied by what `factor` returns for it."""
        scaled = ((node, factor(node)) for node in self.nodes)
        return Graph([n._replace(seconds=n.seconds * by, cpu=n.cpu * by) for n, by in scaled], self.edges)


@dataclass(frozen=True)
class Schedule:
    """When nodes begin and end.

    Attributes:
        begins, ends: seconds, of each node.
        causes: the node by which each was held up last, -1 for none.
    """

    begins: list[float]
    ends: list[float]
    causes: list[int]

    @property
    def seconds(self) -> float:
        """When the last node ends."""
        return max(self.ends, default=0.0)

    def critical_path(self) -> list[int]:
        """Return the nodes on a longest path, in order."""
        if not self.ends:
            return []
        at, path = int(np.argmax(self.ends)), []
        while at >= 0:
            path.append(at)
            at = self.causes[at]
        return path[::-1]


def replay(graph: Graph) -> Schedule:
    """Return when nodes begin and end in the recorded order; linear in the size of the graph."""
    before = _predecessors(graph)
    begins, ends, causes = [], list[float](), []
    for number, node in enumerate(graph.nodes):
        begin, cause = 0.0, -1
        for source, seconds in before[number]:
            if (at := ends[source] + seconds) >= begin:
                begin, cause = at, source
        begins.append(begin)
        ends.append(begin + node.seconds)
        causes.append(cause)
    return Schedule(begins, ends, causes)


def slack(graph: Graph, schedule: Schedule) -> list[float]:
    """Return by how many seconds each node could end later without a later end of all."""
    latest = [schedule.seconds] * len(graph.nodes)
    before = _predecessors(graph)
    for number in range(len(graph.nodes) - 1, -1, -1):
        begin = latest[number] - graph.nodes[number].seconds
        for source, seconds in before[number]:
            latest[source] = min(latest[source], begin - seconds)
    return [late - end for late, end in zip(latest, schedule.ends, strict=True)]


def _predecessors(graph: Graph, pooled: Collection[str] = ()) -> list[list[tuple[int, float]]]:
    """Return what each node follows, and after how many seconds; nodes of pooled resources do not follow another."""
    before: list[list[tuple[int, float]]] = [[] for _ in graph.nodes]
    for source, target, seconds in graph.edges:
        if source >= target:
            raise ValueError(f"node {target} depends on node {source}, which does not stand before it")
        before[target].append((source, seconds))
    last: dict[str, int] = {}
    for number, node in enumerate(graph.nodes):
        if node.resource in last and node.resource not in pooled:
            before[number].append((last[node.resource], 0.0))
        last[node.resource] = number
    return before


@dataclass(frozen=True)
class LogGP:
    """A way for messages, in the LogGP model (Alexandrov et al., 1995): b bytes take o + L + b G + o.

    Attributes:
        resource: the link.
        latency: L, seconds.
        overhead: o, seconds of the sender's processor, and of the receiver's.
        seconds_per_byte: G; transfers follow one another on a link.
    """

    resource: str
    latency: float
    overhead: float
    seconds_per_byte: float


def transfer(graph: Graph, path: LogGP, sender: str, receiver: str, num_bytes: int, after: Iterable[int] = ()) -> int:
    """Append a transfer; return the node at whose end the receiver has the message."""
    sent = graph.add(Node(sender, "send", path.overhead, path.overhead, num_bytes), after)
    link = graph.add(Node(path.resource, "transfer", num_bytes * path.seconds_per_byte, 0.0, num_bytes), [sent])
    received = Node(receiver, "receive", path.overhead, path.overhead, num_bytes)
    return graph.add(received, [(link, path.latency)])


def fair_share(arrivals: Sequence[float], sizes: Sequence[float], rate: float) -> list[float]:
    """Return when transfers end that share a link equally at each moment.

    Args:
        arrivals: seconds.
        sizes: bytes of each.
        rate: bytes a second of the link.
    """
    graph = Graph()
    for number, (arrival, size) in enumerate(zip(arrivals, sizes, strict=True)):
        source = graph.add(Node(f"source-{number}", "wait", arrival))
        graph.add(Node("link", "transfer", size / rate), [source])
    return replay_shared(graph, {"link"}).ends[1::2]


def replay_shared(graph: Graph, shared: Iterable[str]) -> Schedule:
    """Replay with resources whose nodes run at the same time, each at an equal share of the speed.

    Other resources are as in `replay`. A node's seconds are those that it takes alone.
    """
    pooled = set(shared)
    after: list[list[tuple[int, float]]] = [[] for _ in graph.nodes]
    missing = [0] * len(graph.nodes)
    for target, sources in enumerate(_predecessors(graph, pooled)):
        missing[target] = len(sources)
        for source, seconds in sources:
            after[source].append((target, seconds))
    begins, ends, causes = [0.0] * len(graph.nodes), [0.0] * len(graph.nodes), [-1] * len(graph.nodes)
    ready = [(0.0, number) for number, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []  # end, node, of resources that are not shared
    left: dict[str, dict[int, float]] = defaultdict(dict)  # seconds of work left at full speed
    now = 0.0
    while ready or running or any(left.values()):
        finish = [(now + min(work.values()) * len(work), name) for name, work in left.items() if work]
        at = min([ready[0][0]] if ready else [], default=np.inf)
        at = min(at, running[0][0] if running else np.inf, min(finish)[0] if finish else np.inf)
        for work in left.values():
            for number in work:
                work[number] -= (at - now) / len(work)
        now, done = float(at), list[int]()
        for end, name in finish:
            if end <= now:
                number = min(left[name], key=lambda one: left[name][one])
                del left[name][number]
                done.append(number)
        while running and running[0][0] <= now:
            done.append(heapq.heappop(running)[1])
        for number in done:
            ends[number] = now
            for target, seconds in after[number]:
                missing[target] -= 1
                if now + seconds >= begins[target]:
                    begins[target], causes[target] = now + seconds, number
                if not missing[target]:
                    heapq.heappush(ready, (begins[target], target))
        while ready and ready[0][0] <= now:
            begin, number = heapq.heappop(ready)
            node = graph.nodes[number]
            if node.resource in pooled:
                left[node.resource][number] = node.seconds
            else:
                heapq.heappush(running, (begin + node.seconds, number))
    return Schedule(begins, ends, causes)


def list_schedule(graph: Graph, capacities: Mapping[str, int]) -> Schedule:
    """Schedule anew: what is ready runs as soon as its resource is free, the longest way to the end first.

    Edges are kept, the recorded order is not.

    Args:
        capacities: how many nodes a resource runs at once; 1 for those that are not named.
    """
    before: list[list[tuple[int, float]]] = [[] for _ in graph.nodes]
    after: list[list[tuple[int, float]]] = [[] for _ in graph.nodes]
    for source, target, seconds in graph.edges:
        before[target].append((source, seconds))
        after[source].append((target, seconds))
    rest = [0.0] * len(graph.nodes)
    for number in range(len(graph.nodes) - 1, -1, -1):
        rest[number] = graph.nodes[number].seconds + max((s + rest[t] for t, s in after[number]), default=0.0)
    begins, ends, causes = [0.0] * len(graph.nodes), [0.0] * len(graph.nodes), [-1] * len(graph.nodes)
    missing = [len(one) for one in before]
    ready = {number: 0.0 for number, count in enumerate(missing) if not count}
    free = {node.resource: [(0.0, -1)] * capacities.get(node.resource, 1) for node in graph.nodes}
    while ready:
        possible = {number: max(at, free[graph.nodes[number].resource][0][0]) for number, at in ready.items()}
        number = min(possible, key=lambda one: (possible[one], -rest[one], one))
        at, slots = ready.pop(number), free[graph.nodes[number].resource]
        idle_since, holder = heapq.heappop(slots)
        if idle_since > at:
            causes[number] = holder
        begins[number] = possible[number]
        ends[number] = begins[number] + graph.nodes[number].seconds
        heapq.heappush(slots, (ends[number], number))
        for target, _ in after[number]:
            missing[target] -= 1
            if not missing[target]:
                arrivals = [(ends[source] + seconds, source) for source, seconds in before[target]]
                ready[target], causes[target] = max(arrivals)
    return Schedule(begins, ends, causes)


class Interval(NamedTuple):
    """A mean, and bounds within which 90 % of the means of resampled rounds lie."""

    mean: float
    lo: float
    hi: float


def bootstrap(values: Sequence[float] | NDArray[np.float64], seed: int = 0, share: float = 0.9) -> Interval:
    """Return the mean of values of single rounds, and its interval by the percentile bootstrap."""
    found = np.asarray(values, dtype=np.float64)
    means = found[_resamples(len(found), seed)].mean(1)
    lo, hi = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(found.mean()), float(lo), float(hi))


def bootstrap_change(before: Sequence[float], after: Sequence[float], seed: int = 0, share: float = 0.9) -> Interval:
    """Return by which share of it the mean of paired rounds changes, and its interval by the percentile bootstrap."""
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    drawn = _resamples(len(old), seed)
    changes = new[drawn].mean(1) / old[drawn].mean(1) - 1
    lo, hi = np.quantile(changes, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(new.mean() / old.mean() - 1), float(lo), float(hi))


def _resamples(number: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, number, (NUM_RESAMPLES, number))
