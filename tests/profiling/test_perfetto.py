"""Perfetto's own trace processor opens what is exported, and finds what was recorded, to the nanosecond."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

import gossamer
from gossamer.cli.main import app
from gossamer.profiling.torch_recording import recorded_operations
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, WAIT, read_trace
from trace_processor import TraceProcessor, compiled

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 200}, "model": "softmax"}
COMMON: dict[str, Any] = {"workload": IMAGES, "rounds": 3, "train": {"lr": 0.1}, "profile": True}
CLIENTS = {"clients": {"num": 8, "per_round": 6}, "communication": {"uplink": {"name": "top-k", "share": 0.2}}}
PEERS = {"peers": {"num": 8, "topology": "ring"}}
Open = Callable[[bytes], TraceProcessor]
FACTS = {"perfetto": ("debug.bytes", "debug.cpu_ns", 1), "chrome": ("args.bytes", "args.cpu_us", 1000)}


class Recorded(NamedTuple):
    """What the files of a trace hold: a slow reading of them that shares nothing with the package's.

    Attributes:
        stages: nanoseconds and bytes of each stage, in whole rounds; what no span covers is left out.
        rounds: nanoseconds of each.
        messages: of each message, where its sender and its receiver begin: thread, and nanoseconds in all rounds.
    """

    stages: dict[str, tuple[int, int]]
    rounds: list[int]
    messages: Counter[tuple[tuple[int, int], tuple[int, int]]]


def read_slowly(directory: Path) -> Recorded:
    """Read a trace of processes of one machine; each thread has a number of its own."""
    lines = [json.loads(line) for path in (directory / "trace").iterdir() for line in path.read_text().splitlines()]
    windows = sorted((one["round"], one["begin_ns"], one["end_ns"]) for one in lines if "round" in one)
    stages: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    messages: Counter[tuple[tuple[int, int], tuple[int, int]]] = Counter()
    before = 0
    for _, begin, end in windows:
        inside = [one for one in lines if isinstance(one, list) and one[3] > begin and one[2] < end]
        ends: dict[str, dict[str, tuple[int, int]]] = {"send": {}, "receive": {}}
        for thread in {one[1] for one in inside}:
            spans = [one for one in inside if one[1] == thread]
            cuts = {min(max(at, begin), end) for one in spans for at in one[2:4]} | {begin, end}
            seen = []
            for left, right in pairwise(sorted(cuts)):
                around = [one for one in spans if one[2] <= left and right <= one[3]]
                if around:
                    innermost = max(around, key=lambda one: (one[2], -one[3]))
                    stages[innermost[0]][0] += right - left
                    if innermost not in seen:
                        seen.append(innermost)
                        stages[innermost[0]][1] += innermost[6]
                        if innermost[0] in ends and innermost[7]:
                            ends[innermost[0]][innermost[7]] = thread, before + left - begin
        messages.update((ends["send"][key], ends["receive"][key]) for key in ends["send"].keys() & ends["receive"])
        before += end - begin
    return Recorded(
        {kind: (lasted, size) for kind, (lasted, size) in stages.items()},
        [end - begin for _, begin, end in windows],
        messages,
    )


@pytest.fixture(scope="module")
def open_trace(pytestconfig: pytest.Config) -> Open:
    """Compile the trace processor once, and keep it for the next time."""
    assert pytestconfig.cache is not None
    return compiled(pytestconfig.cache.mkdir("trace-processor"))


@pytest.fixture(scope="module", params=[CLIENTS, PEERS], ids=["clients", "peers"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a run of two workers, and export it by the command, as ``run.perfetto`` and ``run.chrome``."""
    directory = tmp_path_factory.mktemp("run")
    gossamer.run(COMMON | request.param | {"engine": {"workers": 2}}, out=directory)
    return export(directory)


def export(directory: Path) -> Path:
    """Export the trace of a run into its directory by the command."""
    exports = [argument for kind in FACTS for argument in (f"--{kind}", str(directory / f"run.{kind}"))]
    result = CliRunner().invoke(app, ["profile", str(directory), *exports])
    assert result.exit_code == 0, result.output
    return directory


@pytest.fixture(params=FACTS)
def opened(request: pytest.FixtureRequest, recorded: Path, open_trace: Open) -> tuple[TraceProcessor, str]:
    """Open an export, and say of which kind it is."""
    processor = open_trace((recorded / f"run.{request.param}").read_bytes())
    processor.query("include perfetto module slices.with_context")
    return processor, request.param


def complaints(processor: TraceProcessor) -> list[tuple[Any, ...]]:
    """Return what the trace processor did not understand, or left out."""
    return processor.query("select name, idx, severity, value from stats where severity != 'info' and value > 0")


def test_nothing_is_refused_or_lost(opened: tuple[TraceProcessor, str]) -> None:
    processor, _ = opened
    assert complaints(processor) == []
    ((slices, unfinished, overlapping),) = processor.query("select count(), sum(dur < 0), sum(depth > 0) from slice")
    assert slices > 100
    assert (unfinished, overlapping) == (0, 0)


def test_stages_and_bytes_are_those_recorded(opened: tuple[TraceProcessor, str], recorded: Path) -> None:
    processor, kind = opened
    key, _, _ = FACTS[kind]
    rows = processor.query(
        f"select name, sum(dur), sum(coalesce(extract_arg(arg_set_id, '{key}'), 0)) from thread_slice group by name"
    )
    expected = read_slowly(recorded)
    assert {"train", "send", "receive", "evaluate"} <= expected.stages.keys()
    idle = {WAIT, UNATTRIBUTED, ABSENT}
    found = {name: (lasted, size) for name, lasted, size in rows if name not in idle}
    assert found == {name: facts for name, facts in expected.stages.items() if name not in idle}
    assert sum(size for _, size in found.values()) > 0


def test_each_thread_fills_the_rounds(opened: tuple[TraceProcessor, str], recorded: Path) -> None:
    processor, kind = opened
    trace, lasted = read_trace(recorded), read_slowly(recorded).rounds
    expected: dict[tuple[str, str], int] = defaultdict(int)
    for one, length in zip(trace.rounds, lasted, strict=True):
        for lane in one.lanes:
            expected[lane.name.partition(".")[0], lane.name] += length
    rows = processor.query("select process_name, thread_name, sum(dur) from thread_slice group by utid")
    assert {(process, thread): length for process, thread, length in rows} == expected
    assert {"driver", "worker-0"} <= {process for process, _ in expected}
    if kind == "perfetto":
        rounds = processor.query(
            "select s.name, dur from slice s join track t on track_id = t.id where t.name = 'rounds'"
        )
        assert rounds == [(f"round {number}", length) for number, length in enumerate(lasted, start=1)]


def test_processor_time_is_that_of_the_trace(opened: tuple[TraceProcessor, str], recorded: Path) -> None:
    processor, kind = opened
    _, key, nanoseconds = FACTS[kind]
    rows = processor.query(
        f"select name, sum(extract_arg(arg_set_id, '{key}')), count() from thread_slice group by name"
    )
    expected: dict[str, float] = defaultdict(float)
    for segment in (one for each in read_trace(recorded).rounds for own in each.lanes.values() for one in own):
        expected[segment.kind] += 1e9 * segment.cpu
    assert {name for name, _, _ in rows} == expected.keys()
    for name, found, count in rows:
        assert nanoseconds * (found or 0) == pytest.approx(expected[name], abs=count)  # each is rounded


def test_flows_join_sender_and_receiver(opened: tuple[TraceProcessor, str], recorded: Path) -> None:
    processor, _ = opened
    rows = processor.query(
        "select a.name sent, a.thread_name sender, a.ts leaves, b.name got, b.thread_name receiver, b.ts comes"
        " from flow join thread_slice a on slice_out = a.id join thread_slice b on slice_in = b.id"
    )
    assert {(sent, got) for sent, _, _, got, _, _ in rows} == {("send", "receive")}
    numbers = {lane.name: lane.thread for one in read_trace(recorded).rounds for lane in one.lanes}
    found = Counter(((numbers[a], sent), (numbers[b], got)) for _, a, sent, _, b, got in rows)
    assert found == read_slowly(recorded).messages
    assert found.total() >= 6  # three rounds of a job or more, there and back


@pytest.mark.parametrize("kind", FACTS)
def test_operations_of_torch_lie_below_spans(kind: str, with_torch: Path, open_trace: Open) -> None:
    processor = open_trace((with_torch / f"run.{kind}").read_bytes())
    assert complaints(processor) == []
    processor.query("include perfetto module slices.with_context")
    counts = Counter(one.name for one in recorded_operations(with_torch))
    rows = processor.query("select name, count() from thread_slice where category = 'torch' group by name")
    assert dict(rows) == counts
    assert counts["aten::sum"] > 0
    around = "select p.category, p.name from thread_slice s left join slice p on s.parent_id = p.id"
    parents = Counter(processor.query(f"{around} where s.category = 'torch'"))
    assert {name for category, name in parents if category != "torch"} <= {"train", "extract", "serialise", "compress"}
    assert parents[None, "train"] > 0
    assert processor.query(f"{around} where coalesce(s.category, '') != 'torch' and s.depth > 0") == []


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a run with torch.profiler, and export it."""
    directory = tmp_path_factory.mktemp("torch")
    config = COMMON | CLIENTS | {"rounds": 1, "engine": {"workers": 2}, "profile": {"torch": True}}
    gossamer.run(config, out=directory)
    return export(directory)


def test_what_is_no_trace_is_refused_by_it(open_trace: Open) -> None:
    with pytest.raises(ValueError, match="Unknown trace type"):
        open_trace(b"no trace of anything")
