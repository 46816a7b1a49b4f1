"""Writes a trace for other programs: Chrome's JSON, Perfetto's TrackEvent, and GOAL, the input of LogGOPSim."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigError, storage_errors
from gossamer.profiling.graphs import RECEIVE, SEND, messages_of
from gossamer.profiling.trace import ABSENT, WAIT, Lane, Round, Segment, Trace


def write_chrome(trace: Trace, path: Path) -> None:
    """Write JSON for chrome://tracing: one track a thread, without overlaps, and arrows for messages; microseconds.

    Raises:
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


def write_goal(trace: Trace, path: Path) -> None:
    """Write GOAL: each thread is a rank, whose work is ``calc`` in nanoseconds; waits for messages are left out.

    Raises:
        StorageError: the disk refuses it.
    """
    ranks = {lane: number for number, lane in enumerate(_processes(trace))}
    lines: dict[Lane, list[str]] = {lane: [] for lane in ranks}
    tags: dict[str, int] = {}
    for one in trace.rounds:
        elastic, arrivals = messages_of(one)
        senders = {one.lanes[a.sender][a.sent].message: a.sender for a in arrivals}
        receivers = {one.lanes[a.sender][a.sent].message: a.lane for a in arrivals}
        sizes = {one.lanes[a.sender][a.sent].message: one.lanes[a.sender][a.sent].num_bytes for a in arrivals}
        for lane, segments in one.lanes.items():
            for place, segment in enumerate(segments):
                if (
                    (lane, place) in elastic
                    or (segment.kind == WAIT and place == len(segments) - 1)
                    or segment.kind == ABSENT
                ):
                    continue
                size = max(1, sizes.get(segment.message, 0))
                if segment.kind == RECEIVE and segment.message in senders:
                    tag = tags.setdefault(segment.message, len(tags))
                    lines[lane].append(f"recv {size}b from {ranks[senders[segment.message]]} tag {tag}")
                if segment.kind == SEND and segment.message in receivers:
                    tag = tags.setdefault(segment.message, len(tags))
                    lines[lane].append(f"send {size}b to {ranks[receivers[segment.message]]} tag {tag}")
                lines[lane].append(f"calc {round(1e9 * segment.seconds)}")
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
