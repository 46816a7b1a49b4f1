"""Writes a trace for other programs: Chrome's JSON, Perfetto's TrackEvent, and GOAL, the input of LogGOPSim."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import ConfigError, storage_errors
from gossamer.profiling.graphs import RECEIVE, SEND, messages_of
from gossamer.profiling.torch_events import events_of
from gossamer.profiling.trace import ABSENT, WAIT, Lane, Round, Segment, Trace


def write_chrome(trace: Trace, path: Path, torch_path: Path | None = None) -> None:
    """Write JSON for chrome://tracing: one track a thread, without overlaps, and arrows for messages; microseconds.

    Args:
        torch_path: what torch.profiler exported of the run, see `events_of`; None: nothing.

    Raises:
        DataError: that cannot be used.
        StorageError: the disk refuses it.
    """
    events: list[dict[str, Any]] = []
    processes = _processes(trace)
    for lane, (process, thread) in processes.items():
        where = {"ph": "M", "pid": process, "tid": thread}
        events.append(where | {"name": "thread_name", "args": {"name": lane.name}})
        if not thread:
            events.append(where | {"name": "process_name", "args": {"name": lane.name}})
    for begin, lane, segment in _all(trace):
        process, thread = processes[lane]
        where = {"pid": process, "tid": thread, "ts": 1e6 * (begin + segment.begin), "name": segment.kind}
        facts = {"bytes": segment.num_bytes, "cpu_us": 1e6 * segment.cpu, "delay_us": 1e6 * segment.delay}
        events.append(where | {"ph": "X", "dur": 1e6 * segment.seconds, "args": facts})
        if segment.message and segment.kind in (SEND, RECEIVE):
            ends = {"ph": "s"} if segment.kind == SEND else {"ph": "f", "bp": "e"}
            events.append(where | ends | {"name": "message", "cat": "message", "id": segment.message})
    if torch_path is not None:
        events += events_of(trace, processes, torch_path)
    with storage_errors(path):
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def write_perfetto(trace: Trace, path: Path) -> None:
    """Write Perfetto's TrackEvent: one track a thread, and flows for messages; nanoseconds.

    Raises:
        ConfigError: the package perfetto is not installed.
        StorageError: the disk refuses it.
    """
    try:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
        from perfetto.trace_builder.proto_builder import TraceProtoBuilder
    except ImportError:
        raise ConfigError("--perfetto needs the package perfetto: pip install 'gossamer[trace]'") from None
    builder, sequence = TraceProtoBuilder(), 1
    tracks = {lane: number for number, lane in enumerate(_processes(trace), start=1)}
    flows: dict[str, int] = {}
    for lane, track in tracks.items():
        described = builder.add_packet()
        described.track_descriptor.uuid, described.track_descriptor.name = track, lane.name
    for begin, lane, segment in _all(trace):
        for kind, at in (
            (TrackEvent.TYPE_SLICE_BEGIN, segment.begin),
            (TrackEvent.TYPE_SLICE_END, segment.end),
        ):
            packet = builder.add_packet()
            packet.timestamp, packet.trusted_packet_sequence_id = round(1e9 * (begin + at)), sequence
            event = packet.track_event
            event.type, event.track_uuid = kind, tracks[lane]
            if kind == TrackEvent.TYPE_SLICE_BEGIN:
                event.name = segment.kind
                if segment.message and segment.kind in (SEND, RECEIVE):
                    flow = flows.setdefault(segment.message, len(flows) + 1)
                    (event.flow_ids if segment.kind == SEND else event.terminating_flow_ids).append(flow)
    with storage_errors(path):
        path.write_bytes(builder.serialize())


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
    return {lane: number for number, lane in enumerate(_processes(trace))}


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


def _processes(trace: Trace) -> dict[Lane, tuple[int, int]]:
    """Number the processes and threads of a trace."""
    lanes = dict.fromkeys(lane for one in trace.rounds for lane in one.lanes)
    found: dict[int, list[Lane]] = {}
    for lane in lanes:
        found.setdefault(lane.pid, []).append(lane)
    return {lane: (number, own.index(lane)) for number, own in enumerate(found.values()) for lane in own}


def _all(trace: Trace) -> Iterator[tuple[float, Lane, Segment]]:
    """Yield every segment with its thread and the seconds at which its round begins, one round behind the other."""
    begin = 0.0
    for one in trace.rounds:
        yield from ((begin, lane, segment) for lane, segments in one.lanes.items() for segment in segments)
        begin += one.seconds


def rounds_of(trace: Trace, most: int) -> list[Round]:
    """Return up to `most` rounds, evenly spaced; without the first, which warms up, where there are four or more."""
    rounds = trace.rounds[1:] if len(trace.rounds) >= 4 else trace.rounds
    places = [number * len(rounds) // min(most, len(rounds)) for number in range(min(most, len(rounds)))]
    return [rounds[place] for place in places]
