"""Moves one stage of a recorded round to a device: the graph of the round that would be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gossamer.errors import ConfigError, nearest
from gossamer.profiling.devices import Device
from gossamer.profiling.replay import Edge, Graph, Node, replay
from gossamer.profiling.trace import UNATTRIBUTED

TO_DEVICE, FROM_DEVICE, CORE = "link to the device", "link from the device", "core"
SYNCHRONOUS, PIPELINED, BACKGROUND = "synchronous", "pipelined", "background"


@dataclass(frozen=True)
class Stage:
    """A stage that could run elsewhere.

    Attributes:
        name: what it is called.
        kinds: of the spans that belong to it.
        mode: whether the thread waits for each piece of it (synchronous), goes on up to what needs its result
            (pipelined), or does not wait (background).
        slowdown: name of the device's number by which its processor time grows.
        direction: in which an engine would do it; "": no engine could.
        passes: kinds that a pipelined stage's thread goes on with.
        returns: share of its bytes that come back.
    """

    name: str
    kinds: tuple[str, ...]
    mode: str
    slowdown: str
    direction: str = ""
    passes: tuple[str, ...] = ()
    returns: float = 1.0


MEANWHILE = (UNATTRIBUTED, "wait", "send", "receive", "coordinate", "exchange")
STAGES = (
    Stage("aggregation", ("aggregate",), PIPELINED, "slowdown_stream", passes=("aggregate", *MEANWHILE)),
    Stage("mixing", ("mix",), PIPELINED, "slowdown_matrix", passes=("mix", UNATTRIBUTED)),
    Stage("codec", ("compress", "quantise"), SYNCHRONOUS, "slowdown_cpu", "compress"),
    Stage("compression", ("deflate", "zstd"), SYNCHRONOUS, "slowdown_cpu", "compress", returns=0.9),
    Stage("checksum", ("checksum", "digest"), SYNCHRONOUS, "slowdown_cpu", "checksum", returns=0.0),
    Stage("encryption", ("encrypt",), SYNCHRONOUS, "slowdown_crypto", "encrypt"),
    Stage("checkpoint", ("checkpoint", "digest"), BACKGROUND, "slowdown_copy", returns=0.0),
    Stage("logging", ("log",), BACKGROUND, "slowdown_cpu", returns=0.0),
)


def stage_named(name: str) -> Stage:
    """Return a stage.

    Raises:
        ConfigError: there is none of this name.
    """
    known = {stage.name: stage for stage in STAGES}
    if name not in known:
        raise ConfigError(f"unknown stage {name!r}{nearest(name, known)}: give one of {', '.join(known)}")
    return known[name]


def stage_of_kind(kind: str) -> Stage:
    """Return the stage to which spans of a kind belong.

    Raises:
        ConfigError: there is none.
    """
    for stage in STAGES:
        if kind in stage.kinds:
            return stage
    raise ConfigError(f"no stage that could run elsewhere records {kind!r}")


class Costs(NamedTuple):
    """What one piece of work costs on a device; its numbers at one place between their bounds.

    Attributes:
        slowdown: factor of processor time.
        cores: number of cores.
        memory_seconds_per_byte: least time a byte on a core.
        link_seconds_per_byte, link_latency: of the link, each way.
        submit: seconds of the host for each piece.
        engine: None, or latency and seconds a byte of an engine that does it instead of a core.
    """

    slowdown: float
    cores: int
    memory_seconds_per_byte: float
    link_seconds_per_byte: float
    link_latency: float
    submit: float
    engine: tuple[float, float] | None = None


class Offload(NamedTuple):
    """A stage, and what it costs on the device that is to do it."""

    stage: Stage
    costs: Costs


def costs_of(device: Device, stage: Stage, kinds: tuple[str, ...], place: Mapping[str, float]) -> Costs:
    """Return the costs of a stage on a device.

    Args:
        kinds: those of the stage's that were recorded.
        place: of each number, 0 for its best bound, 0.5 for its value, 1 for its worst; 0.5 where it is not named.
    """

    def at(name: str, engine: str = "") -> float:
        """Return a number at its place."""
        numbers = device.engines[engine].numbers if engine else device.numbers
        number, where = numbers[name], place.get(f"{engine}.{name}" if engine else name, 0.5)
        more_is_better = number.unit in ("bytes/s", "cores")
        best, worst = (number.hi, number.lo) if more_is_better else (number.lo, number.hi)
        return number.value if where == 0.5 else best if where == 0 else worst

    name = device.engine_for(kinds, stage.direction) if stage.direction else None
    return Costs(
        at(stage.slowdown),
        int(at("cores")),
        1 / at("memory_bandwidth"),
        1 / at("link_bandwidth"),
        at("link_latency"),
        at("submit"),
        None if name is None else (at("latency", name), 1 / at("throughput", name)),
    )


def numbers_of(device: Device, stage: Stage, kinds: tuple[str, ...]) -> list[str]:
    """Name the numbers that the costs of a stage depend on; ``engine.name`` for those of an engine."""
    name = device.engine_for(kinds, stage.direction) if stage.direction else None
    shared = ["link_bandwidth", "link_latency", "submit"]
    if name is None:
        return [stage.slowdown, "cores", "memory_bandwidth", *shared]
    return [f"{name}.latency", f"{name}.throughput", *shared]


@dataclass(frozen=True)
class Moved:
    """A round with a stage moved.

    Attributes:
        graph: its work.
        freed_seconds: processor time of the host that is not needed any more, in sum.
        link_bytes: that cross the link between host and device, both ways.
        device_seconds: how long its busiest core, or its engine, works.
        cycle_seconds: least time from one round to the next: the device's, and in the background that of a copy, too,
            which is not begun before what was copied last is done; and that of all transfers of a direction.
        threads: of the host, which the round waits for.
    """

    graph: Graph
    freed_seconds: float
    link_bytes: float
    device_seconds: float
    cycle_seconds: float
    threads: frozenset[str]

    @property
    def seconds(self) -> float:
        """How long the round lasts; where rounds follow one another, no less than the device needs for each."""
        ends = zip(self.graph.nodes, replay(self.graph).ends, strict=True)
        return max(self.cycle_seconds, *(end for node, end in ends if node.resource in self.threads))


def move(graph: Graph, stage: Stage, costs: Costs, *, blocking: bool = False) -> Moved:
    """Move a stage to a device.

    Its pieces go over the link to the device, run there on the core (or the engine) that serves their thread, in their
    order, and what they return comes back. In each direction transfers of a thread follow one another; those of several
    do not wait for the turn that they had as recorded, but the round takes no less than all of them need. The part of a
    piece that was not processor time, such as waiting for a disk, takes there as long as here.

    Args:
        blocking: whether the thread waits for each piece, whatever the stage's mode is.
    """
    moved, freed, link_bytes = Graph(), 0.0, 0.0
    busy: dict[str, float] = {}
    copying = link = 0.0
    number_of: list[int] = []
    pending: list[tuple[int, str]] = []  # node that ends a piece, and the thread that needs it
    threads = {name: i for i, name in enumerate(dict.fromkeys(node.resource for node in graph.nodes))}
    edges: dict[int, list[Edge]] = {}
    for edge in graph.edges:
        edges.setdefault(edge.target, []).append(edge)
    mode = SYNCHRONOUS if blocking else stage.mode
    for number, node in enumerate(graph.nodes):
        before: list[int | tuple[int, float]] = [(number_of[e.source], e.seconds) for e in edges.get(number, ())]
        is_moved = node.kind in stage.kinds
        goes_on = mode == PIPELINED and (is_moved or node.kind in stage.passes)
        if not goes_on:
            before += [(end, costs.link_latency) for end, thread in pending if thread == node.resource]
            pending = [one for one in pending if one[1] != node.resource]
        if not is_moved:
            number_of.append(moved.add(node, before))
            continue
        submit = moved.add(Node(node.resource, "submit", costs.submit, costs.submit, node.num_bytes), before)
        crossing, back = node.num_bytes * costs.link_seconds_per_byte, node.num_bytes * stage.returns
        there = Node(f"{TO_DEVICE}, {node.resource}", "transfer", crossing, 0.0, node.num_bytes)
        sent = moved.add(there, [submit])
        where, seconds = _work(node, costs, threads[node.resource])
        busy[where] = busy.get(where, 0.0) + seconds
        copying += crossing + 2 * costs.link_latency if mode == BACKGROUND else 0.0
        done = moved.add(Node(where, node.kind, seconds, 0.0, node.num_bytes), [(sent, costs.link_latency)])
        here = Node(f"{FROM_DEVICE}, {node.resource}", "transfer", crossing * stage.returns, 0.0, round(back))
        link += crossing * max(1.0, stage.returns)
        returned = moved.add(here, [done])
        # In the background the host waits for the copy alone: it may not change what is not copied yet.
        pending.append((sent if mode == BACKGROUND else returned, node.resource))
        freed += node.cpu - costs.submit
        link_bytes += node.num_bytes + back
        number_of.append(submit)
    for thread in dict.fromkeys(thread for _, thread in pending):
        ends = [(end, costs.link_latency) for end, one in pending if one == thread]
        moved.add(Node(thread, "wait", 0.0), ends)
    device = max(busy.values(), default=0.0)
    return Moved(moved, freed, link_bytes, device, max(device + copying, link), frozenset(threads))


def _work(node: Node, costs: Costs, thread: int) -> tuple[str, float]:
    """Return where a piece runs, and for how long."""
    if costs.engine is not None:
        latency, seconds_per_byte = costs.engine
        return "engine", latency + node.num_bytes * seconds_per_byte
    own = max(costs.slowdown * node.cpu, node.num_bytes * costs.memory_seconds_per_byte)
    return f"{CORE} {thread % costs.cores}", own + max(0.0, node.seconds - node.cpu)
