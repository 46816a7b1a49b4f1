"""Writes traces as the recorder does, from a few times; and what is asked of those that were recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.profiling.recorder import FIELDS, FORMAT, VERSION
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, Round

MS = 1_000_000  # nanoseconds
Written = tuple[str, float, float]


def header(process: str, pid: int, **changes: Any) -> dict[str, Any]:
    """Return the header of a file."""
    found = {"format": FORMAT, "version": VERSION, "process": process, "pid": pid, "host": "h", "boot": "b"}
    return found | {"fields": list(FIELDS), "monotonic_ns": 0, "unix_ns": pid} | changes


def span(
    kind: str,
    begin: float,
    end: float,
    cpu: float | None = None,
    num_bytes: int = 0,
    message: str = "",
    delay: float = 0.0,
) -> list:
    """Return a span; times in milliseconds. Without `cpu` it used a processor whenever it did not wait for one."""
    used = end - begin - delay if cpu is None else cpu
    return [kind, 1, round(begin * MS), round(end * MS), round(used * MS), round(delay * MS), num_bytes, message]


def write(
    directory: Path,
    process: str,
    spans: Sequence[list],
    rounds: Sequence[tuple[int, float, float]] = (),
    pid: int = 1,
    **changes: Any,
) -> Path:
    """Write the file of one process; rounds are numbers, begins and ends in milliseconds."""
    (directory / "trace").mkdir(exist_ok=True, parents=True)
    marks = [{"round": n, "begin_ns": round(begin * MS), "end_ns": round(end * MS)} for n, begin, end in rounds]
    lines = [header(process, pid, **changes), *sorted(spans, key=lambda one: one[3]), *marks]
    path = directory / "trace" / f"{process}-{pid}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def unattributed(one: Round) -> float:
    """Return the share of a round of which no span says what its processes' main threads did."""
    own = [segment for lane, segments in one.lanes.items() if lane.is_main for segment in segments]
    present = sum(segment.seconds for segment in own if segment.kind != ABSENT)
    return sum(segment.seconds for segment in own if segment.kind == UNATTRIBUTED) / present
