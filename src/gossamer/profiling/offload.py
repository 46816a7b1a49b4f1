"""Moves one stage of a recorded round to a device: the graph of the round that would be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gossamer.errors import ConfigError, nearest
from gossamer.profiling.devices import Device
from gossamer.profiling.graphs import ARRIVE
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
        sends_nothing, returns_nothing: kinds whose bytes do not cross the link on the way there, or back, because they
            are there already, or stay there.
        needs: kind without which there is nothing to be moved; "": any of `kinds` will do.
        touches: how often memory is read or written for a byte of its work, at least: derived from what the stage does,
            and not measured.
    """

    name: str
    kinds: tuple[str, ...]
    mode: str
    slowdown: str
    direction: str = ""
    passes: tuple[str, ...] = ()
    returns: float = 1.0
    sends_nothing: tuple[str, ...] = ()
    returns_nothing: tuple[str, ...] = ()
    needs: str = ""
    touches: float = 2.0

    def is_in(self, kinds: Collection[str]) -> bool:
        """Say whether a run that recorded these kinds has the stage."""
        return self.needs in kinds if self.needs else not set(self.kinds).isdisjoint(kinds)

    def touched(self, node: Node) -> float:
        """Return the bytes of memory that a piece reads and writes, see `touches`; of a digest they are read once."""
        return node.num_bytes * (1.0 if node.kind == "digest" else self.touches)

    def crossing(self, node: Node) -> tuple[float, float]:
        """Return the bytes of a piece that cross the link, there and back."""
        back = 0.0 if node.kind in self.returns_nothing else node.num_bytes * self.returns
        return 0.0 if node.kind in self.sends_nothing else float(node.num_bytes), back


MEANWHILE = (UNATTRIBUTED, "wait", "send", "receive", "coordinate", "exchange")
STAGES = (
    Stage(
        "aggregation",
        ("aggregate", "combine"),
        PIPELINED,
        "slowdown_stream",
        passes=MEANWHILE,
        sends_nothing=("combine",),
        returns_nothing=("aggregate",),
        touches=3.0,  # a sum is read and written, too
    ),
    Stage("mixing", ("mix",), PIPELINED, "slowdown_matrix", passes=(UNATTRIBUTED, "exchange")),
    Stage("codec", ("compress", "quantise"), SYNCHRONOUS, "slowdown_cpu", "compress"),
    Stage("compression", ("deflate", "zstd"), SYNCHRONOUS, "slowdown_cpu", "compress", returns=0.9),
    Stage("checksum", ("checksum", "digest"), SYNCHRONOUS, "slowdown_cpu", "checksum", returns=0.0, touches=1.0),
    Stage("encryption", ("encrypt",), SYNCHRONOUS, "slowdown_crypto", "encrypt"),
    Stage("checkpoint", ("checkpoint", "digest"), BACKGROUND, "slowdown_copy", returns=0.0, sends_nothing=("digest",)),
    Stage("logging", ("log",), BACKGROUND, "slowdown_cpu", returns=0.0),
    Stage(  # the device is an endpoint: what participants send ends there, and the mean alone goes on to the host
        "relay",
        (ARRIVE, "aggregate", "combine"),
        PIPELINED,
        "slowdown_stream",
        passes=MEANWHILE,
        sends_nothing=(ARRIVE, "aggregate", "combine"),
        returns_nothing=(ARRIVE, "aggregate"),
        needs=ARRIVE,
    ),
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
        submit_seconds_per_byte: of the host for each byte that it hands over, where it copies them itself.
        take, take_seconds_per_byte: of the host for each answer, and each byte of it, likewise.
    """

    slowdown: float
    cores: int
    memory_seconds_per_byte: float
    link_seconds_per_byte: float
    link_latency: float
    submit: float
    engine: tuple[float, float] | None = None
    submit_seconds_per_byte: float = 0.0
    take: float = 0.0
    take_seconds_per_byte: float = 0.0


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
    mode = SYNCHRONOUS if blocking else stage.mode
    pieces, moving = _pieces(graph, stage, mode), _Moving(costs, mode)
    threads = {name: i for i, name in enumerate(dict.fromkeys(node.resource for node in graph.nodes))}
    edges: dict[int, list[Edge]] = {}
    for edge in graph.edges:
        edges.setdefault(edge.target, []).append(edge)
    number_of: list[int] = []
    for number, node in enumerate(graph.nodes):
        before: list[int | tuple[int, float]] = [(number_of[e.source], e.seconds) for e in edges.get(number, ())]
        first, piece = pieces.get(number, (-1, None))
        if piece is None and first >= 0:
            number_of.append(number_of[first])
            continue
        if not (mode == PIPELINED and (piece is not None or node.kind in stage.passes)):
            before += moving.joined(node.resource)
        if piece is None:
            number_of.append(moving.graph.add(node, before))
        else:
            number_of.append(moving.hand_over(piece, threads[node.resource], before))
    for thread in list(moving.waiting):
        moving.graph.add(Node(thread, "wait", 0.0), moving.joined(thread))
    device = max(moving.busy.values(), default=0.0)
    cycle = max(device + moving.copying, moving.link)
    return Moved(moving.graph, moving.freed, moving.link_bytes, device, cycle, frozenset(threads))


class _Piece(NamedTuple):
    """What is handed over at once: its work, and bytes that cross the link, there and back."""

    work: Node
    there: float
    back: float


def _pieces(graph: Graph, stage: Stage, mode: str) -> dict[int, tuple[int, _Piece | None]]:
    """Return, of each node that is moved, the first one of its piece, and of that the piece.

    In the background one span is one piece, with whatever of the stage is nested in it; else each node is one.
    """
    firsts, members = dict[int, int](), dict[int, list[Node]]()
    last: dict[str, int] = {}  # node of a thread, if that is moved
    for number, node in enumerate(graph.nodes):
        if node.kind not in stage.kinds:
            last.pop(node.resource, None)
            continue
        first = firsts[last[node.resource]] if mode == BACKGROUND and node.resource in last else number
        firsts[number] = last[node.resource] = first
        firsts[first] = first
        members.setdefault(first, []).append(node)
    found: dict[int, tuple[int, _Piece | None]] = {number: (first, None) for number, first in firsts.items()}
    for first, nodes in members.items():
        seconds, cpu, num_bytes = (sum(column) for column in zip(*(node[2:] for node in nodes), strict=True))
        crossing = [stage.crossing(node) for node in nodes]
        work = Node(nodes[0].resource, nodes[0].kind, seconds, cpu, num_bytes)
        found[first] = first, _Piece(work, sum(there for there, _ in crossing), sum(back for _, back in crossing))
    return found


class _Moving:
    """A round while a stage of it is moved; for its sums see `Moved`."""

    def __init__(self, costs: Costs, mode: str) -> None:
        self._costs, self._mode, self.graph = costs, mode, Graph()
        self.busy: dict[str, float] = {}
        self.freed = self.link_bytes = self.copying = self.link = 0.0
        self.waiting: dict[str, list[tuple[int, float]]] = {}  # of threads: what ends a piece, and the host's for it

    def joined(self, thread: str) -> list[int | tuple[int, float]]:
        """Return what a thread waits for that needs the results of its pieces."""
        ends, found = self.waiting.pop(thread, []), list[int | tuple[int, float]]()
        found += [(end, self._costs.link_latency) for end, _ in ends]
        if taking := sum(seconds for _, seconds in ends):
            found = [self.graph.add(Node(thread, "receive", taking, taking), found)]
        return found

    def hand_over(self, piece: _Piece, thread: int, before: Sequence[int | tuple[int, float]]) -> int:
        """Add a piece; return the node by which the host hands it over."""
        costs, node, graph = self._costs, piece.work, self.graph
        submitting = costs.submit + piece.there * costs.submit_seconds_per_byte
        submit = graph.add(Node(node.resource, "submit", submitting, submitting, round(piece.there)), before)
        there, back = (size * costs.link_seconds_per_byte for size in (piece.there, piece.back))
        sending = Node(f"{TO_DEVICE}, {node.resource}", "transfer", there, 0.0, round(piece.there))
        sent = graph.add(sending, [submit])
        where, seconds = _work(node, costs, thread)
        self.busy[where] = self.busy.get(where, 0.0) + seconds
        self.copying += there + 2 * costs.link_latency if self._mode == BACKGROUND else 0.0
        done = graph.add(Node(where, node.kind, seconds, 0.0, node.num_bytes), [(sent, costs.link_latency)])
        returning = Node(f"{FROM_DEVICE}, {node.resource}", "transfer", back, 0.0, round(piece.back))
        returned, taking = graph.add(returning, [done]), costs.take + piece.back * costs.take_seconds_per_byte
        # In the background the host waits for the copy alone: it may not change what is not copied yet.
        end = sent if self._mode == BACKGROUND else returned
        self.waiting.setdefault(node.resource, []).append((end, taking))
        self.link += max(there, back)
        self.freed += node.cpu - submitting - taking
        self.link_bytes += piece.there + piece.back
        return submit


def _work(node: Node, costs: Costs, thread: int) -> tuple[str, float]:
    """Return where a piece runs, and for how long."""
    if costs.engine is not None:
        latency, seconds_per_byte = costs.engine
        return "engine", latency + node.num_bytes * seconds_per_byte
    own = max(costs.slowdown * node.cpu, node.num_bytes * costs.memory_seconds_per_byte)
    return f"{CORE} {thread % costs.cores}", own + max(0.0, node.seconds - node.cpu)
