"""Puts what torch.profiler recorded of a run below the spans in which it happened, for Chrome's JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gossamer.errors import DataError
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, WAIT, Lane, Segment, Trace

DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
IDLE = (WAIT, UNATTRIBUTED, ABSENT)
DEVICES = 1_000_000  # from which processes of devices are numbered


class Operation(NamedTuple):
    """Something that torch.profiler recorded; begin_ns: by the time of day."""

    name: str
    category: str
    process: int
    thread: int
    begin_ns: int
    lasts_ns: int


def read_operations(path: Path) -> list[Operation]:
    """Read a file that ``torch.profiler.profile.export_chrome_trace`` wrote.

    Raises:
        DataError: it is none.
    """
    try:
        found = json.loads(path.read_text())
        base = int(found["baseTimeNanoseconds"])
        return [
            Operation(
                str(one["name"]),
                str(one.get("cat", "")),
                int(one["pid"]),
                int(one["tid"]),
                base + (begin := round(1e3 * float(one["ts"]))),
                round(1e3 * (float(one["ts"]) + float(one["dur"]))) - begin,
            )
            for one in found["traceEvents"]
            if one.get("ph") == "X" and type(one.get("pid")) is int and type(one.get("tid")) is int
        ]
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}): check its name") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise DataError(
            f"{str(path)!r} is no trace of torch.profiler: give what its export_chrome_trace wrote, uncompressed"
        ) from None


def events_of(trace: Trace, places: Mapping[Lane, tuple[int, int]], path: Path) -> list[dict[str, Any]]:
    """Return the operations of a file as Chrome's events, in microseconds; those between rounds are left out.

    An operation of a recorded thread lies in the span in which it began, and ends with it at the latest. Those of
    devices have tracks of their own.

    Args:
        trace: the run's.
        places: process and thread of each lane in the export.
        path: of the file.

    Raises:
        DataError: it is no trace of torch.profiler, or none of this run.
    """
    found = [_event(*one, places) for one in _placed(trace, read_operations(path))]
    if not found:
        raise DataError(
            f"nothing in {str(path)!r} happened in a thread of a recorded round: give a profile that was taken while"
            " this run went on, in one of its processes"
        )
    return found


def _placed(trace: Trace, operations: list[Operation]) -> Iterator[tuple[Operation, Lane | None, float, float]]:
    """Yield operations, their threads, and where they begin and end in all rounds in a row, in seconds."""
    ordered, at, before = sorted(operations, key=lambda one: (one.begin_ns, -one.lasts_ns)), 0, 0.0
    for one in trace.rounds:
        lanes = {(lane.pid, lane.thread): lane for lane in one.lanes}
        while at < len(ordered) and ordered[at].begin_ns < one.unix_ns + 1e9 * one.seconds:
            operation, at = ordered[at], at + 1
            begin = (operation.begin_ns - one.unix_ns) / 1e9
            lane = lanes.get((operation.process, operation.thread))
            end = min(begin + operation.lasts_ns / 1e9, one.seconds)
            if begin < 0:
                continue
            if lane is not None:
                around = _around(one.lanes[lane], begin)
                if around is not None:
                    yield operation, lane, before + begin, before + min(end, around.end)
            elif operation.category in DEVICE_KINDS:
                yield operation, None, before + begin, before + end
        before += one.seconds


def _around(segments: list[Segment], seconds: float) -> Segment | None:
    """Return the busy segment in which a moment lies; None: there is none."""
    found = next((one for one in segments if one.begin <= seconds < one.end), None)
    return None if found is None or found.kind in IDLE else found


def _event(
    operation: Operation, lane: Lane | None, begin: float, end: float, places: Mapping[Lane, tuple[int, int]]
) -> dict[str, Any]:
    process, thread = (DEVICES + operation.process, operation.thread) if lane is None else places[lane]
    begin_ns, end_ns = round(1e9 * begin), round(1e9 * end)  # ends are rounded alike, so what is nested stays so
    when = {"ph": "X", "ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3}
    return when | {"name": operation.name, "cat": "torch", "pid": process, "tid": thread}
