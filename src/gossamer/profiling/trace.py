"""Reads the trace of a run: what each thread did in each whole round, without gaps.

Where spans are nested, a moment belongs to the innermost one. What no span covers is an `UNATTRIBUTED` segment, so the
segments of a thread add up to the round; before a process's first span and after its last it is `ABSENT`. A thread
that serves the main one of its process, as of a pool, waits between its spans.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gossamer.errors import DataError
from gossamer.profiling.clocks import Clock, Ends, clocks_of
from gossamer.profiling.recorder import FIELDS, FORMAT, VERSION

UNATTRIBUTED, WAIT = "unattributed", "wait"
ABSENT = "absent"
DRIVER, SIDE_CAR, PEER = "driver", "side-car", "peer"  # processes, by what they record as, or stand for
FIRST = (DRIVER, "client-0")  # names of a node's process, which is called as the node is
HEADER = {"process": str, "pid": int, "host": str, "boot": str, "monotonic_ns": int, "unix_ns": int}


class Span(NamedTuple):
    """A span as it was recorded, see `recorder.FIELDS`; processor time and delay include those of spans inside it."""

    kind: str
    thread: int
    begin_ns: int
    end_ns: int
    cpu_ns: int
    delay_ns: int
    num_bytes: int
    message: str


class Lane(NamedTuple):
    """One thread of one process.

    Attributes:
        name: unique in a trace, such as ``worker-2``, or ``worker-2.1`` of another thread of that.
        process, pid, thread: what it is, and its numbers.
        is_main: whether it is the main thread of its process.
    """

    name: str
    process: str
    pid: int
    thread: int
    is_main: bool = True

    @property
    def leads(self) -> bool:
        """Whether it is the thread that runs the rounds."""
        return self.process == DRIVER and self.is_main


@dataclass(frozen=True)
class Segment:
    """A stretch of one thread that belongs to one span, or to none.

    Attributes:
        kind: stage.
        begin, end: seconds since the round began.
        cpu, delay: seconds of processor time, and of waiting for a processor.
        num_bytes: that the span worked on; of a span in several segments, in its first.
        message: what links the segments of a sender and a receiver; "": nothing.
    """

    kind: str
    begin: float
    end: float
    cpu: float = 0.0
    delay: float = 0.0
    num_bytes: int = 0
    message: str = ""

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end - self.begin

    @property
    def quiet_seconds(self) -> float:
        """Length without the time of waiting for a processor."""
        return max(min(self.cpu, self.seconds), self.seconds - self.delay)


@dataclass(frozen=True)
class Round:
    """One whole round.

    Attributes:
        number: counted from 1.
        seconds: how long it took.
        lanes: the segments of each thread that did something, in order, without gaps from 0 to `seconds`.
        unix_ns: time of day at which it began.
    """

    number: int
    seconds: float
    lanes: dict[Lane, list[Segment]]
    unix_ns: int = 0


@dataclass(frozen=True)
class Trace:
    """A run's rounds.

    Attributes:
        rounds: whole rounds, by their numbers; of one that was repeated, the last.
        clocks: of each process against the driver's, by the messages between their machines; where these do not go both
            ways, by the time of day of both.
    """

    rounds: list[Round]
    clocks: dict[str, Clock] = field(default_factory=dict)


class _Timeline:
    """The spans of one thread, by their begins, outer ones first."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns))
        self._begins = [span.begin_ns for span in self.spans]
        self._ends = list(accumulate((span.end_ns for span in self.spans), max))  # the latest so far

    def within(self, begin_ns: int, end_ns: int) -> list[Span]:
        """Return the spans that reach into a window."""
        low, high = bisect_right(self._ends, begin_ns), bisect_left(self._begins, end_ns)
        return [span for span in self.spans[low:high] if span.end_ns > begin_ns]


@dataclass(frozen=True)
class _File:
    header: dict[str, Any]
    spans: list[Span]
    rounds: list[tuple[int, int, int]]


def read_trace(directory: Path, nodes: Mapping[str, Path] = MappingProxyType({}), name: str = DRIVER) -> Trace:
    """Read the trace of a run; an incomplete last line of a file, and rounds without an end, are left out.

    Args:
        directory: the run's, whose rounds count.
        nodes: folders into which others recorded that took part in it, by names.
        name: of the process that runs the rounds.

    Raises:
        DataError: there is no trace, or those of several runs; no whole round; a file is no trace, or its clock ran
            backwards.
    """
    files = _read_files(directory / "trace")
    if not files:
        if below := sorted(directory.glob("*/*/trace")) or sorted(directory.glob("*/trace")):
            one = str(below[0].parent)
            raise DataError(f"{str(directory)!r} holds several runs: give one of them, such as {one!r}")
        if not directory.is_dir():
            raise DataError(f"no directory {str(directory)!r}: name one that 'gossamer run' made")
        raise DataError(f"{str(directory)!r} has no trace: run it with --profile")
    drivers = [file for file in files if file.header["process"] == DRIVER]
    if not any(file.rounds for file in drivers):
        raise DataError(f"the trace of {str(directory)!r} has no whole round: let the run get further")
    names = [name if one == DRIVER else one for one in _names(files)]
    for node, folder in nodes.items():
        own = _read_files(folder)
        if not own:
            raise DataError(f"{str(folder)!r} holds no trace: run all nodes with profile: true")
        names += [node if one in FIRST else f"{node}:{one}" for one in _names(own)]
        files += [_of_node(one) for one in own]
    of_boots = _clocks(files, drivers[0])
    clocks = {name: of_boots[file.header["boot"]] for name, file in zip(names, files, strict=True)}
    windows: dict[int, tuple[int, int]] = {}
    for driver in drivers:
        for number, begin, end in driver.rounds:
            shift = round(of_boots[driver.header["boot"]].offset * 1e9)
            windows[number] = begin - shift, end - shift
    lanes = dict(_lanes(files, names, clocks))
    day = drivers[0].header["unix_ns"] - drivers[0].header["monotonic_ns"]
    rounds = [_round(number, *windows[number], lanes) for number in sorted(windows)]
    return Trace([replace(one, unix_ns=windows[one.number][0] + day) for one in rounds], clocks)


def _read_files(folder: Path) -> list[_File]:
    return [_read_file(path) for path in sorted(folder.glob("*.jsonl"))]


def _of_node(file: _File) -> _File:
    """Return the file of another node, which does not run the rounds."""
    is_driver = file.header["process"] == DRIVER
    return replace(file, header=file.header | {"process": PEER}, rounds=[]) if is_driver else file


def _read_file(path: Path) -> _File:
    try:
        *lines, _ = path.read_bytes().decode("utf-8", "replace").split("\n")  # what follows the last newline is torn
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}): check its permissions") from None
    header = _json(lines[0]) if lines else None
    is_ours = isinstance(header, dict) and header.get("format") == FORMAT
    if not is_ours or any(type(header.get(key)) is not kind for key, kind in HEADER.items()):  # type: ignore[union-attr]
        raise DataError(f"{str(path)!r} is no trace of gossamer: move it away")
    assert isinstance(header, dict)
    if header.get("version") != VERSION or header.get("fields") != list(FIELDS):
        raise DataError(
            f"{str(path)!r} is a trace of version {header.get('version')!r}, not {VERSION}: read it with the gossamer"
            " that wrote it"
        )
    spans, rounds = [], []
    for number, line in enumerate(lines[1:], start=2):
        found = _json(line)
        if isinstance(found, dict) and {"round", "begin_ns", "end_ns"} <= found.keys():
            rounds.append((int(found["round"]), int(found["begin_ns"]), int(found["end_ns"])))
        elif isinstance(found, list) and [type(one) for one in found] == [str, int, int, int, int, int, int, str]:
            spans.append(Span(*found))
        else:
            raise DataError(f"line {number} of {str(path)!r} is no span: restore the trace, or move it away")
    _check_clock(path, spans)
    return _File(header, spans, rounds)


def _check_clock(path: Path, spans: Iterable[Span]) -> None:
    last: dict[int, int] = defaultdict(int)
    for span in spans:
        if span.end_ns < span.begin_ns or span.end_ns < last[span.thread]:
            raise DataError(
                f"in {str(path)!r} a span of {span.kind!r} ends at {span.end_ns} ns, before"
                f" {max(span.begin_ns, last[span.thread])} ns: its clock ran backwards, so record the run again"
            )
        last[span.thread] = span.end_ns


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _names(files: Sequence[_File]) -> list[str]:
    """Name processes by their kind and, in the order in which they began, a number."""
    order = sorted(range(len(files)), key=lambda number: files[number].header["unix_ns"])
    counts: dict[str, int] = defaultdict(int)
    names = [""] * len(files)
    for number in order:
        kind = files[number].header["process"]
        names[number] = f"{kind}-{counts[kind]}" if kind != DRIVER or counts[kind] else kind
        counts[kind] += 1
    return names


def _clocks(files: Sequence[_File], driver: _File) -> dict[str, Clock]:
    """Return the clock of each boot against the driver's."""
    machines: dict[str, Ends] = {}
    by_time_of_day: dict[str, float] = {}
    ahead = driver.header["monotonic_ns"] - driver.header["unix_ns"]
    for file in files:
        boot = file.header["boot"]
        by_time_of_day[boot] = (file.header["monotonic_ns"] - file.header["unix_ns"] - ahead) / 1e9
        ends = machines.setdefault(boot, Ends())
        for span in file.spans:
            if span.message and span.kind in ("send", "receive"):
                is_sent = span.kind == "send"
                ends.note(span.message, span.begin_ns if is_sent else span.end_ns, is_sent=is_sent)
    return clocks_of(machines, driver.header["boot"], by_time_of_day)


def _lanes(files: Sequence[_File], names: list[str], clocks: dict[str, Clock]) -> Iterator[tuple[Lane, _Timeline]]:
    for file, name in zip(files, names, strict=True):
        shift = round(clocks[name].offset * 1e9)
        threads: dict[int, list[Span]] = defaultdict(list)
        for span in file.spans:
            threads[span.thread].append(
                span._replace(begin_ns=span.begin_ns - shift, end_ns=span.end_ns - shift) if shift else span
            )
        main = file.header.get("thread", next(iter(threads), 0))
        for number, (thread, spans) in enumerate(sorted(threads.items(), key=lambda item: item[0] != main)):
            lane_name = name if number == 0 else f"{name}.{number}"
            yield Lane(lane_name, file.header["process"], file.header["pid"], thread, number == 0), _Timeline(spans)


def _round(number: int, begin_ns: int, end_ns: int, lanes: dict[Lane, _Timeline]) -> Round:
    found = {}
    for lane, timeline in lanes.items():
        inside = timeline.within(begin_ns, end_ns)
        if inside:
            segments = [_since(begin_ns, one) for one in _segments(inside, begin_ns, end_ns)]
            found[lane] = segments if lane.leads else _with_absence(segments, inside, timeline.spans)
            if not lane.is_main:
                found[lane] = [replace(s, kind=WAIT) if s.kind == UNATTRIBUTED else s for s in found[lane]]
    return Round(number, (end_ns - begin_ns) / 1e9, found)


def _with_absence(segments: list[Segment], inside: list[Span], spans: list[Span]) -> list[Segment]:
    """Mark what a thread leaves open before its first span of all, and after its last."""
    absent = [
        inside[0] is spans[0] and segments[0].kind == UNATTRIBUTED,
        inside[-1] is spans[-1] and segments[-1].kind == UNATTRIBUTED,
    ]
    for place, is_absent in zip((0, -1), absent, strict=True):
        if is_absent:
            segments[place] = replace(segments[place], kind=ABSENT)
    return segments


def _since(origin_ns: int, piece: tuple[int, int, Span | None, float, bool]) -> Segment:
    begin_ns, end_ns, span, share, is_first = piece
    begin, end = (begin_ns - origin_ns) / 1e9, (end_ns - origin_ns) / 1e9
    if span is None:
        return Segment(UNATTRIBUTED, begin, end)
    cpu, delay = (share * value / 1e9 for value in (span.cpu_ns, span.delay_ns))
    return Segment(span.kind, begin, end, cpu, delay, span.num_bytes if is_first else 0, span.message)


def _segments(spans: list[Span], begin_ns: int, end_ns: int) -> Iterator[tuple[int, int, Span | None, float, bool]]:
    """Cut a window into pieces; yield begin, end, whose own each is, its share of that, and whether it is the first."""
    pieces: list[tuple[int, int, int]] = []  # begin, end, number of the span, -1 for none
    open_spans: list[int] = []
    at = begin_ns

    def advance(until: int) -> None:
        """Give what lies before `until` to whoever is open."""
        nonlocal at
        until = min(until, end_ns)
        while open_spans and spans[open_spans[-1]].end_ns <= until:
            last = open_spans.pop()
            if spans[last].end_ns > at:
                pieces.append((at, spans[last].end_ns, last))
                at = spans[last].end_ns
        if until > at:
            pieces.append((at, until, open_spans[-1] if open_spans else -1))
            at = until

    own = [[span.cpu_ns, span.delay_ns] for span in spans]
    for number, span in enumerate(spans):
        advance(max(span.begin_ns, begin_ns))
        if open_spans:
            parent = own[open_spans[-1]]
            parent[0], parent[1] = parent[0] - span.cpu_ns, parent[1] - span.delay_ns
        open_spans.append(number)
    advance(end_ns)
    totals: dict[int, int] = defaultdict(int)
    for begin, end, number in pieces:
        totals[number] += end - begin
    seen = set[int]()
    for begin, end, number in pieces:
        if number < 0:
            yield begin, end, None, 0.0, False
            continue
        span = spans[number]
        cpu, delay = (max(0, value) for value in own[number])
        clipped = max(0, min(span.end_ns, end_ns) - max(span.begin_ns, begin_ns))
        inside = clipped / max(1, span.end_ns - span.begin_ns)  # a span that reaches beyond the round
        share = inside * (end - begin) / totals[number]
        yield begin, end, span._replace(cpu_ns=cpu, delay_ns=delay), share, number not in seen
        seen.add(number)


def stage_totals(rounds: Sequence[Round]) -> dict[str, Segment]:
    """Add up the segments of each stage over all threads of some rounds; as segments that begin at 0."""
    found: dict[str, Segment] = {}
    for segment in (one for each in rounds for lane in each.lanes.values() for one in lane):
        before = found.get(segment.kind, Segment(segment.kind, 0.0, 0.0))
        found[segment.kind] = replace(
            before,
            end=before.end + segment.seconds,
            cpu=before.cpu + segment.cpu,
            delay=before.delay + segment.delay,
            num_bytes=before.num_bytes + segment.num_bytes,
        )
    return found
