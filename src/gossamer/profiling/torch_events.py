"""Puts what torch.profiler recorded of a run below the spans in which it happened."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gossamer.errors import DataError
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, WAIT, Lane, Segment, Trace

DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
IDLE = (WAIT, UNATTRIBUTED, ABSENT)


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


class Placed(NamedTuple):
    """An operation on the timeline of all rounds in a row, in nanoseconds; lane None: it is a device's."""

    operation: Operation
    lane: Lane | None
    begin_ns: int
    end_ns: int


def operations_of(trace: Trace, path: Path) -> list[Placed]:
    """Return the operations of a file where they belong, see `place`.

    Raises:
        DataError: it is no trace of torch.profiler, or none of this run.
    """
    found = place(trace, read_operations(path))
    if not found:
        raise DataError(
            f"nothing in {str(path)!r} happened in a thread of a recorded round: give a profile that was taken while"
            " this run went on, in one of its processes"
        )
    return found


def place(trace: Trace, operations: list[Operation]) -> list[Placed]:
    """Put operations where they belong; those between rounds, and of other processes, are left out.

    An operation of a recorded thread lies in the span in which it began, and ends with it at the latest, and with the
    operation around it. Those of devices have tracks of their own.
    """
    around: dict[Lane | tuple[int, int], list[int]] = {}
    found = []
    for one in _placed(trace, operations):
        track = one.lane or (one.operation.process, one.operation.thread)
        ends = around.setdefault(track, [])
        while ends and ends[-1] <= one.begin_ns:
            ends.pop()
        ends.append(min([one.end_ns, *ends[-1:]]))
        found.append(one._replace(end_ns=ends[-1]))
    return found


def _placed(trace: Trace, operations: list[Operation]) -> Iterator[Placed]:
    """Yield operations in their order, and outer ones first."""
    ordered, at, before = sorted(operations, key=lambda one: (one.begin_ns, -one.lasts_ns)), 0, 0.0
    for one in trace.rounds:
        lanes = {(lane.pid, lane.thread): lane for lane in one.lanes}
        while at < len(ordered) and ordered[at].begin_ns < one.unix_ns + 1e9 * one.seconds:
            operation, at = ordered[at], at + 1
            begin = (operation.begin_ns - one.unix_ns) / 1e9
            end = min(begin + operation.lasts_ns / 1e9, one.seconds)
            lane = lanes.get((operation.process, operation.thread))
            around = None if lane is None else _around(one.lanes[lane], begin)
            if around is not None:
                end = min(end, around.end)
            if begin >= 0 and (around is not None or (lane is None and operation.category in DEVICE_KINDS)):
                yield Placed(operation, lane, round(1e9 * (before + begin)), round(1e9 * (before + end)))
        before += one.seconds


def _around(segments: list[Segment], seconds: float) -> Segment | None:
    """Return the busy segment in which a moment lies; None: there is none."""
    found = segments[max(0, bisect_right(segments, seconds, key=lambda one: one.begin) - 1)]
    return found if found.begin <= seconds < found.end and found.kind not in IDLE else None
