"""Writes a trace for other programs: Chrome's JSON, Perfetto's TrackEvent, and GOAL, the input of LogGOPSim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import ConfigError, storage_errors
from gossamer.profiling.graphs import RECEIVE, SEND, messages_of
from gossamer.profiling.torch_events import Placed
from gossamer.profiling.trace import ABSENT, WAIT, Lane, Round, Segment, Trace

DEVICES = 1_000_000  # from which processes of devices are numbered


def write_chrome(trace: Trace, path: Path, operations: Sequence[Placed] = ()) -> None:
    """Write JSON for chrome://tracing: one track a thread, without overlaps, and arrows for messages; microseconds.

    Args:
        operations: what torch.profiler recorded of the run, below its spans.

    Raises:
        StorageError: the disk refuses it.
    """
    events: list[dict[str, Any]] = []
    numbers = _numbers(trace)
    for lane, (process, thread) in numbers.items():
        where = {"ph": "M", "pid": process, "tid": thread}
        events.append(where | {"name": "thread_name", "args": {"name": lane.name}})
        if process == thread:
            events.append(where | {"name": "process_name", "args": {"name": lane.name}})
    for lane, slice_ in _slices(trace):
        segment, (process, thread) = slice_.segment, numbers[lane]
        where = {"pid": process, "tid": thread, "ts": slice_.begin_ns / 1e3, "name": segment.kind}
        facts = {"bytes": segment.num_bytes, "cpu_us": 1e6 * segment.cpu, "delay_us": 1e6 * segment.delay}
        events.append(where | {"ph": "X", "dur": (slice_.end_ns - slice_.begin_ns) / 1e3, "args": facts})
        if slice_.flow is not None:
            ends = {"ph": "s"} if segment.kind == SEND else {"ph": "f", "bp": "e"}
            events.append(where | ends | {"name": "message", "cat": "message", "id": slice_.flow})
    for one in operations:
        device = DEVICES + one.operation.process, one.operation.thread
        process, thread = device if one.lane is None else numbers[one.lane]
        where = {"pid": process, "tid": thread, "ts": one.begin_ns / 1e3, "name": one.operation.name}
        events.append(where | {"ph": "X", "dur": (one.end_ns - one.begin_ns) / 1e3, "cat": "torch"})
    with storage_errors(path):
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def write_perfetto(trace: Trace, path: Path, operations: Sequence[Placed] = ()) -> None:
    """Write Perfetto's TrackEvent: processes, threads, rounds, and flows for messages; nanoseconds.

    Bytes, processor time and time of waiting for a processor are debug annotations, where they are not 0.

    Args:
        operations: what torch.profiler recorded of the run, below its spans.

    Raises:
        ConfigError: the package perfetto is not installed.
        StorageError: the disk refuses it.
    """
    try:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder
    except ImportError:
        raise ConfigError("--perfetto needs the package perfetto: pip install 'gossamer[trace]'") from None
    builder = TraceProtoBuilder()

    def event(kind: int, at_ns: int, track: int) -> Any:
        """Add an event, and return it."""
        packet = builder.add_packet()
        packet.timestamp, packet.trusted_packet_sequence_id = at_ns, 1
        packet.track_event.type, packet.track_event.track_uuid = kind, track
        return packet.track_event

    numbers = _numbers(trace)
    for track, own in enumerate(_described(builder, trace, numbers, operations), start=1):
        ends: list[int] = []
        for one in sorted(own, key=lambda one: (one.begin_ns, -one.end_ns)):  # outer ones first, as spans are in `own`
            while ends and ends[-1] <= one.begin_ns:
                event(TrackEvent.TYPE_SLICE_END, ends.pop(), track)
            _fill(event(TrackEvent.TYPE_SLICE_BEGIN, one.begin_ns, track), one)
            ends.append(one.end_ns)
        while ends:
            event(TrackEvent.TYPE_SLICE_END, ends.pop(), track)
    with storage_errors(path):
        path.write_bytes(builder.serialize())


def _described(
    builder: Any, trace: Trace, numbers: dict[Lane, tuple[int, int]], operations: Sequence[Placed]
) -> Iterable[list[_Slice | Placed]]:
    """Describe tracks, of threads, rounds and devices, whose ids count from 1; return what each holds."""
    found: dict[object, list[_Slice | Placed]] = {}
    for lane, (process, thread) in numbers.items():
        described = builder.add_packet().track_descriptor
        described.uuid = len(found) + 1
        described.thread.pid, described.thread.tid, described.thread.thread_name = process, thread, lane.name
        if process == thread:
            described = builder.add_packet().track_descriptor
            described.uuid = -process % 2**64
            described.process.pid, described.process.process_name = process, lane.name
        found[lane] = []
    for lane, slice_ in _slices(trace):
        found[lane].append(slice_)
    names: dict[object, str] = {"rounds": "rounds"}
    found["rounds"] = list(_round_slices(trace))
    for one in operations:
        track: object = one.lane or (one.operation.process, one.operation.thread)
        if track not in found:
            found[track], names[track] = [], f"device {one.operation.process}, stream {one.operation.thread}"
        found[track].append(one)
    for number, track in enumerate(found, start=1):
        if track in names:
            described = builder.add_packet().track_descriptor
            described.uuid, described.name = number, names[track]
    return found.values()


def _fill(event: Any, one: _Slice | Placed) -> None:
    """Write what is known of a slice into the event at which it begins."""
    if isinstance(one, Placed):
        event.name = one.operation.name
        event.categories.append("torch")
        return
    segment = one.segment
    event.name = segment.kind
    facts = {"bytes": segment.num_bytes, "cpu_ns": 1e9 * segment.cpu, "delay_ns": 1e9 * segment.delay}
    for name, value in facts.items():
        if round(value):
            event.debug_annotations.add(name=name, int_value=round(value))
    if one.flow is not None:
        (event.flow_ids if segment.kind == SEND else event.terminating_flow_ids).append(one.flow)


class Link(NamedTuple):
    """A message that one thread sends and another receives.

    Attributes:
        other: the thread at the other end.
        tag: number of the message.
        num_bytes: its size, 1 at least.
        is_sent: whether it is seen from its sender.
    """

    other: Lane
    tag: int
    num_bytes: int
    is_sent: bool


class Piece(NamedTuple):
    """A piece of work, and the message that is sent or received with it; begin: in seconds, of all rounds in a row."""

    lane: Lane
    begin: float
    segment: Segment
    link: Link | None


def pieces_of(trace: Trace) -> Iterator[Piece]:
    """Yield all work, of each thread in its order; waits for messages, and absences, are left out."""
    tags: dict[str, int] = {}
    begin = 0.0
    for one in trace.rounds:
        elastic, arrivals = messages_of(one)
        ends: dict[str, tuple[Lane, Lane, int]] = {}
        for arrival in arrivals:
            sent = one.lanes[arrival.sender][arrival.sent]
            ends[sent.message] = arrival.sender, arrival.lane, max(1, sent.num_bytes)
        for lane, segments in one.lanes.items():
            for place, segment in enumerate(segments):
                is_last_wait = segment.kind == WAIT and place == len(segments) - 1
                if (lane, place) in elastic or is_last_wait or segment.kind == ABSENT:
                    continue
                link = None
                if segment.kind in (SEND, RECEIVE) and segment.message in ends:
                    sender, receiver, size = ends[segment.message]
                    tag, is_sent = tags.setdefault(segment.message, len(tags)), segment.kind == SEND
                    link = Link(receiver if is_sent else sender, tag, size, is_sent)
                yield Piece(lane, begin + segment.begin, segment, link)
        begin += one.seconds


def ranks_of(trace: Trace) -> dict[Lane, int]:
    """Number the threads of a trace."""
    return {lane: number for number, lane in enumerate(_numbers(trace))}


def write_goal(trace: Trace, path: Path) -> None:
    """Write GOAL: each thread is a rank, whose work is ``calc`` in nanoseconds; waits for messages are left out.

    Raises:
        StorageError: the disk refuses it.
    """
    ranks = ranks_of(trace)
    lines: dict[Lane, list[str]] = {lane: [] for lane in ranks}
    for piece in pieces_of(trace):
        if piece.link is not None:
            verb, way = ("send", "to") if piece.link.is_sent else ("recv", "from")
            other, tag = ranks[piece.link.other], piece.link.tag
            lines[piece.lane].append(f"{verb} {piece.link.num_bytes}b {way} {other} tag {tag}")
        lines[piece.lane].append(f"calc {round(1e9 * piece.segment.seconds)}")
    text = [f"num_ranks {len(ranks)}"]
    for lane, rank in ranks.items():
        text.append(f"\nrank {rank} {{")
        for number, line in enumerate(lines[lane], start=1):
            text.append(f"l{number}: {line}")
            text += [f"l{number} requires l{number - 1}"] if number > 1 else []
        text.append("}")
    with storage_errors(path):
        path.write_text("\n".join(text) + "\n")


class _Slice(NamedTuple):
    """A segment on a timeline of all rounds in a row, in nanoseconds.

    Attributes:
        flow: number of the message that is sent or received with it; None: there is none, or no other end of it.
    """

    begin_ns: int
    end_ns: int
    segment: Segment
    flow: int | None


def _numbers(trace: Trace) -> dict[Lane, tuple[int, int]]:
    """Number the processes and threads of a trace, as Linux does: a process has the number of its first thread."""
    lanes = dict.fromkeys(lane for one in trace.rounds for lane in one.lanes)
    found: dict[str, list[Lane]] = {}  # by names, since processes of several machines may have one number
    for lane in lanes:
        found.setdefault(lane.name.partition(".")[0], []).append(lane)
    numbers, first = dict[Lane, tuple[int, int]](), 1
    for own in found.values():
        numbers |= {lane: (first, first + place) for place, lane in enumerate(own)}
        first += len(own)
    return numbers


def _slices(trace: Trace) -> Iterator[tuple[Lane, _Slice]]:
    """Yield every segment with its thread, one round behind the other."""
    ends, begin = _message_ends(trace), 0.0
    for one in trace.rounds:
        for lane, segments in one.lanes.items():
            for segment in segments:
                begins, stops = (round(1e9 * (begin + at)) for at in (segment.begin, segment.end))
                yield lane, _Slice(begins, stops, segment, ends.get(id(segment)))
        begin += one.seconds


def _round_slices(trace: Trace) -> Iterator[_Slice]:
    """Yield the rounds themselves."""
    begin = 0.0
    for one in trace.rounds:
        whole = Segment(f"round {one.number}", 0.0, one.seconds)
        yield _Slice(round(1e9 * begin), round(1e9 * (begin + one.seconds)), whole, None)
        begin += one.seconds


def _message_ends(trace: Trace) -> dict[int, int]:
    """Number the messages whose both ends are there; return the numbers by the ids of the segments at which they begin.

    A node may be ahead of the one whose rounds count, so the ends may lie in different rounds.
    """
    firsts: dict[str, dict[str, tuple[float, Segment]]] = {SEND: {}, RECEIVE: {}}
    begin = 0.0
    for one in trace.rounds:
        for segment in (each for segments in one.lanes.values() for each in segments):
            if segment.message and segment.kind in firsts:
                at = begin + segment.begin
                before = firsts[segment.kind].setdefault(segment.message, (at, segment))
                if at < before[0]:
                    firsts[segment.kind][segment.message] = at, segment
        begin += one.seconds
    found = dict[int, int]()
    for number, (message, (sent_at, sent)) in enumerate(firsts[SEND].items(), start=1):
        got_at, got = firsts[RECEIVE].get(message, (sent_at, sent))
        if sent_at < got_at:
            found |= {id(sent): number, id(got): number}
    return found


def rounds_of(trace: Trace, most: int) -> list[Round]:
    """Return up to `most` rounds, evenly spaced; without the first, which warms up, where there are four or more."""
    rounds = trace.rounds[1:] if len(trace.rounds) >= 4 else trace.rounds
    places = [number * len(rounds) // min(most, len(rounds)) for number in range(min(most, len(rounds)))]
    return [rounds[place] for place in places]
