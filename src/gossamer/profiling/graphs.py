"""Makes the graph of a recorded round: what ran after what, in which thread, and who waited for whose message."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

from gossamer.profiling.replay import Edge, Graph, Node
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, WAIT, Lane, Round, Segment

RECEIVE, SEND = "receive", "send"
ARRIVE = "arrive"  # a receive, where the sender is another machine
NODES = ("client", "peer")  # processes that stand for machines of their own
AROUND = (UNATTRIBUTED, "coordinate", "exchange", "evaluate", "train", "mix")  # what may stand between wait and receive


class Arrival(NamedTuple):
    """A message that was waited for, or that lay ready.

    Attributes:
        lane, place: whose segment begins once it is there.
        sender, sent: the segment that sends it.
        seconds: from the begin of that; None: it was there before the receiver looked.
    """

    lane: Lane
    place: int
    sender: Lane
    sent: int
    seconds: float | None


def graph_of(one: Round, *, is_quiet: bool = False, marks_arrivals: bool = False) -> Graph:
    """Return the graph of a round.

    A wait that a message ended takes no time of its own: what follows it begins when that message is there, a constant
    delay after its sender began to send. Any other wait lasts as long as it did. The last node belongs to the driver.

    Args:
        is_quiet: leave out for how long threads waited for a processor: what is left is the round that a machine with
            a processor for each thread would have had.
        marks_arrivals: give what is received from other machines the kind `ARRIVE`.
    """
    arriving = _from_nodes(one) if marks_arrivals else set[tuple[Lane, int]]()
    elastic, arrivals = messages_of(one, is_quiet=is_quiet)
    lasts = {lane: _last(lane, segments) for lane, segments in one.lanes.items()}
    ready = median([a.seconds for a in arrivals if a.seconds is not None] or [0.0])
    order = sorted(
        (segment.begin, number, place, lane)
        for number, (lane, segments) in enumerate(one.lanes.items())
        for place, segment in enumerate(segments)
    )
    graph = Graph()
    numbers, leaving = dict[tuple[Lane, int], int](), dict[tuple[Lane, int], int]()
    for _, _, place, lane in order:
        segment, is_elastic = one.lanes[lane][place], (lane, place) in elastic
        if place <= lasts[lane]:
            seconds = 0.0 if is_elastic else segment.quiet_seconds if is_quiet else segment.seconds
            if segment.kind == SEND:  # of which the message leaves at the begin
                leaving[lane, place] = graph.add(Node(lane.name, SEND, 0.0))
            kind = ARRIVE if (lane, place) in arriving else segment.kind
            node = Node(lane.name, kind, seconds, min(segment.cpu, seconds), segment.num_bytes)
            numbers[lane, place] = graph.add(node)
    for lane, place, sender, sent, delay in arrivals:
        if (sender, sent) not in leaving or (lane, place) not in numbers:  # it is not received in this round
            continue
        source, target = leaving[sender, sent], leaving.get((lane, place), numbers[lane, place])
        recorded = one.lanes[lane][place].begin - one.lanes[sender][sent].begin
        if source < target:
            graph.edges.append(Edge(source, target, max(0.0, min(ready, recorded) if delay is None else delay)))
    return graph


def messages_of(one: Round, *, is_quiet: bool = False) -> tuple[set[tuple[Lane, int]], list[Arrival]]:
    """Return the waits that a message ended, each a thread and the place of its segment, and all messages received.

    Args:
        is_quiet: leave out for how long a receiver that was woken waited for a processor.
    """
    sends = {
        segment.message: (lane, place)
        for lane, segments in one.lanes.items()
        for place, segment in enumerate(segments)
        if segment.kind == SEND
    }
    elastic, arrivals = set[tuple[Lane, int]](), list[Arrival]()
    for lane, segments in one.lanes.items():
        if not lane.leads and segments[0].kind in (UNATTRIBUTED, ABSENT):
            elastic.add((lane, 0))  # it was idle, or did not exist yet
        _match(one, lane, segments, sends, elastic, arrivals)
    if is_quiet:
        arrivals = [_quiet(arrival, one) for arrival in arrivals]
    return elastic, arrivals


def _from_nodes(one: Round) -> set[tuple[Lane, int]]:
    """Return what other machines sent: nodes of the run, or, where one process has a trace, those who have none."""
    process_of = {
        segment.message: lane.process
        for lane, segments in one.lanes.items()
        for segment in segments
        if segment.kind == SEND
    }
    unknown = NODES[0] if len({lane.process for lane in one.lanes}) == 1 else ""
    return {
        (lane, place)
        for lane, segments in one.lanes.items()
        for place, segment in enumerate(segments)
        if segment.kind == RECEIVE and lane.process not in NODES and process_of.get(segment.message, unknown) in NODES
    }


def _quiet(arrival: Arrival, one: Round) -> Arrival:
    """Return an arrival without the time that its receiver, once woken, waited for a processor."""
    if arrival.seconds is None:
        return arrival
    return arrival._replace(seconds=max(0.0, arrival.seconds - one.lanes[arrival.lane][arrival.place - 1].delay))


def _last(lane: Lane, segments: list[Segment]) -> int:
    """Return the place of a thread's last segment that matters: the rest of the round it may have been idle."""
    if lane.leads:
        return len(segments) - 1
    return max(
        (place for place, one in enumerate(segments) if one.kind not in (WAIT, UNATTRIBUTED, ABSENT)), default=-1
    )


def _match(
    one: Round,
    lane: Lane,
    segments: list[Segment],
    sends: dict[str, tuple[Lane, int]],
    elastic: set[tuple[Lane, int]],
    arrivals: list[Arrival],
) -> None:
    """Find out which of a thread's waits were ended by a message, and by which."""
    waits: list[int] = []  # since the last segment that is neither a wait nor around one
    for place, segment in enumerate(segments):
        if segment.kind == WAIT:
            waits.append(place)
        elif segment.kind == RECEIVE and segment.message in sends:
            sender, sent = sends[segment.message]
            began = one.lanes[sender][sent].begin
            blocked = [wait for wait in waits if segments[wait].end > began]
            if blocked and segments[waits[0]].begin <= began:
                elastic.update((lane, wait) for wait in waits)
                last = waits[-1]
                arrivals.append(Arrival(lane, last + 1, sender, sent, segments[last].end - began))
            else:
                arrivals.append(Arrival(lane, place, sender, sent, None))
            waits = []
        elif segment.kind not in AROUND:
            waits = []
