"""The recorder: nothing while it is off, each process its file, and runs whose bits it does not change."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.proto import parse_length_prefixed

import gossamer
from gossamer.profiling import recorder
from gossamer.profiling.chakra import COMPUTE, RECEIVE, SCHEMA, SEND, messages, write_chakra
from gossamer.profiling.exports import pieces_of, write_chrome, write_goal
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, WAIT, read_trace, stage_totals
from gossamer.reports.profile import examine
from gossamer.storage.runlog import read_config
from traces import unattributed

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 300}, "model": "softmax"}
CLIENTS: dict[str, Any] = {
    "workload": IMAGES,
    "clients": {"num": 8, "per_round": 6},
    "communication": {"uplink": {"name": "top-k", "share": 0.2}},
}
PEERS: dict[str, Any] = {"workload": IMAGES, "peers": {"num": 8, "topology": "ring"}}
IDLE = {WAIT, UNATTRIBUTED, ABSENT}
COMMON: dict[str, Any] = {"rounds": 5, "train": {"lr": 0.1, "epochs": 2}, "checkpoint": {"every_seconds": 0}}


@pytest.fixture(scope="module", params=[("clients", 0), ("clients", 2), ("peers", 2)], ids=str)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run and record clients or peers, in one process or three."""
    kind, workers = request.param
    config = {"clients": CLIENTS, "peers": PEERS}[kind] | COMMON | {"engine": {"workers": workers}, "profile": True}
    return gossamer.run(config, out=tmp_path_factory.mktemp(kind) / "run").directory


class TestRuns:
    def test_every_thread_adds_up_to_the_round(self, recorded: Path) -> None:
        for one in read_trace(recorded).rounds:
            for segments in one.lanes.values():
                assert sum(segment.seconds for segment in segments) == pytest.approx(one.seconds, rel=1e-3)

    def test_little_is_unattributed(self, recorded: Path) -> None:
        """Below 1 % where a round takes more than some milliseconds; a gap between spans would be in every round."""
        assert min(map(unattributed, read_trace(recorded).rounds)) < 0.1

    def test_all_rounds_and_processes_are_there(self, recorded: Path) -> None:
        trace = read_trace(recorded)
        assert [one.number for one in trace.rounds] == [1, 2, 3, 4, 5]
        num_files = len(list((recorded / "trace").iterdir()))
        assert len({lane.pid for one in trace.rounds for lane in one.lanes}) == num_files  # a worker may have no job
        has_workers = read_config(recorded)["engine"]["workers"] > 0
        assert (num_files > 1) == has_workers

    def test_stages_are_named(self, recorded: Path) -> None:
        kinds = set(stage_totals(read_trace(recorded).rounds))
        assert {"plan", "train", "evaluate", "log", "checkpoint"} <= kinds
        assert {"aggregate", "compress"} <= kinds or "mix" in kinds

    def test_the_replayed_round_is_the_recorded_one(self, recorded: Path) -> None:
        assert examine(read_trace(recorded)).replay_error < 0.01

    def test_chrome_has_no_overlaps_and_equal_totals(self, recorded: Path, tmp_path: Path) -> None:
        trace = read_trace(recorded)
        write_chrome(trace, tmp_path / "chrome.json")
        events = json.loads((tmp_path / "chrome.json").read_text())["traceEvents"]
        totals: dict[str, float] = {}
        last: dict[tuple[int, int], float] = {}
        for event in (one for one in events if one["ph"] == "X"):
            track = event["pid"], event["tid"]
            assert event["ts"] >= last.get(track, 0.0) - 1e-3
            last[track] = event["ts"] + event["dur"]
            totals[event["name"]] = totals.get(event["name"], 0.0) + event["dur"] / 1e6
        assert totals == pytest.approx({kind: one.seconds for kind, one in stage_totals(trace.rounds).items()})

    def test_goal_has_a_receive_for_every_send(self, recorded: Path, tmp_path: Path) -> None:
        trace = read_trace(recorded)
        write_goal(trace, tmp_path / "run.goal")
        sends, receives, calculated = parse_goal((tmp_path / "run.goal").read_text())
        assert sends == receives
        busy = sum(one.seconds for kind, one in stage_totals(trace.rounds).items() if kind not in IDLE)
        assert calculated / 1e9 >= 0.99 * busy

    def test_chakra_reads_equal_totals(self, recorded: Path, tmp_path: Path) -> None:
        trace = read_trace(recorded)
        paths = write_chakra(trace, tmp_path / "run")
        totals: dict[str, float] = defaultdict(float)
        sends, receives = set[tuple[int, int, int, int]](), set[tuple[int, int, int, int]]()
        for rank, path in enumerate(paths):
            assert path.name == f"run.{rank}.et"
            for number, node in enumerate(parse_chakra(path)):
                assert (node.id, list(node.data_deps)) == (number, [number - 1] if number else [])
                attributes = {one.name: getattr(one, one.WhichOneof("value")) for one in node.attr}
                if node.type == COMPUTE:
                    assert attributes == {"is_cpu_op": True}
                    totals[node.name] += node.duration_micros
                else:
                    ends = tuple(attributes[f"comm_{what}"] for what in ("src", "dst", "tag", "size"))
                    assert ends[node.type == RECEIVE] == rank
                    (sends if node.type == SEND else receives).add(ends)
        assert sends == receives
        expected: dict[str, float] = defaultdict(float)
        for piece in pieces_of(trace):
            expected[piece.segment.kind] += 1e6 * piece.segment.seconds
        num_pieces = sum(1 for _ in pieces_of(trace))
        assert totals == pytest.approx(expected, abs=num_pieces)  # each is rounded to a microsecond
        busy = {kind: 1e6 * one.seconds for kind, one in stage_totals(trace.rounds).items() if kind not in IDLE}
        assert {kind: totals[kind] for kind in busy} == pytest.approx(busy, abs=num_pieces)


def parse_chakra(path: Path) -> list[Any]:
    """Return the nodes of a file."""
    data = BytesIO(path.read_bytes())
    assert parse_length_prefixed(messages()["GlobalMetadata"], data).version == SCHEMA
    nodes = []
    while (node := parse_length_prefixed(messages()["Node"], data)) is not None:
        nodes.append(node)
    return nodes


def parse_goal(text: str) -> tuple[list, list, int]:
    """Return (sender, receiver, bytes, tag) of sends and of receives, sorted, and the sum of calc in nanoseconds."""
    head, *blocks = text.strip().split("\n\n")
    assert head == f"num_ranks {len(blocks)}"
    sends, receives, calculated = [], [], 0
    for rank, block in enumerate(blocks):
        first, *lines, last = block.split("\n")
        assert (first, last) == (f"rank {rank} {{", "}")
        known = set[str]()
        for line in lines:
            label, _, rest = line.partition(": ")
            words = rest.split()
            if not words:
                label, _, required = line.partition(" requires ")
                assert {label, required} <= known
                continue
            known.add(label)
            if words[0] == "calc":
                calculated += int(words[1])
            else:
                size, other, tag = int(words[1].removesuffix("b")), int(words[3]), int(words[5])
                assert words[2:5:2] == [{"send": "to", "recv": "from"}[words[0]], "tag"]
                pair = (rank, other) if words[0] == "send" else (other, rank)
                (sends if words[0] == "send" else receives).append((*pair, size, tag))
    return sorted(sends), sorted(receives), calculated


@pytest.mark.parametrize(("config", "workers"), [(CLIENTS, 0), (CLIENTS, 2), (PEERS, 2)], ids=["0", "2", "peers"])
def test_recording_changes_no_bits(tmp_path: Path, config: dict[str, Any], workers: int) -> None:
    common = config | COMMON | {"rounds": 2, "engine": {"workers": workers}}
    plain, recorded = (gossamer.run(common | {"profile": on}, out=tmp_path / str(on)) for on in (False, True))
    assert all(plain.params[name].equal(value) for name, value in recorded.params.items())
    assert not list((plain.directory / "trace").iterdir())
    assert len(list((recorded.directory / "trace").iterdir())) in ({1} if not workers else {2, 1 + workers})


def test_a_recorded_run_can_be_resumed_with_or_without(tmp_path: Path) -> None:
    config = PEERS | COMMON | {"rounds": 2, "engine": {"workers": 0}, "profile": True}
    directory = gossamer.run(config, out=tmp_path / "run").directory
    gossamer.resume(directory, overrides=["rounds=3", "profile=false"])
    assert [one.number for one in read_trace(directory).rounds] == [1, 2]
    gossamer.resume(directory, overrides=["rounds=4"])
    assert [one.number for one in read_trace(directory).rounds] == [1, 2, 4]


def test_a_slow_stage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10**9

    def tell() -> int:
        """Return the time of a clock that goes on by a millisecond whenever it is read."""
        nonlocal now
        now += 10**6
        return now

    monkeypatch.setattr(recorder.time, "monotonic_ns", tell)
    with recorder.recording(tmp_path / "trace"):
        for number in range(1, 4):
            with recorder.round_span(number):
                with recorder.span("train"):
                    pass
                with recorder.span("mix"):
                    now += 20 * 10**6
    trace = read_trace(tmp_path)
    assert stage_totals(trace.rounds)["mix"].seconds == pytest.approx(3 * 0.021)
    assert examine(trace).stages[0].stage == "mix"


def test_processor_time_is_that_of_the_thread(tmp_path: Path) -> None:
    with recorder.recording(tmp_path / "trace"), recorder.round_span(1):
        began = time.thread_time()
        with recorder.span("train"):
            while time.thread_time() - began < 0.05:
                pass
        used = time.thread_time() - began
        with recorder.span("wait"):
            time.sleep(0.02)
    totals = stage_totals(read_trace(tmp_path).rounds)
    assert totals["train"].cpu == pytest.approx(used, rel=0.02)
    assert totals["wait"].cpu < 0.005


def test_processor_time_of_spans_is_that_of_the_system(tmp_path: Path) -> None:
    """Of a thread that is nearly always in a span, of many lengths, some nested, some asleep."""
    with recorder.recording(tmp_path / "trace"), recorder.round_span(1):
        before = resource.getrusage(resource.RUSAGE_THREAD)
        for number in range(12):
            with recorder.span("train"):
                with recorder.span("compress"):
                    use_processor(0.003 * (number % 4))
                use_processor(0.02)
            with recorder.span("wait"):
                time.sleep(0.0002)
        after = resource.getrusage(resource.RUSAGE_THREAD)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = sum(one.cpu for one in stage_totals(read_trace(tmp_path).rounds).values())
    assert found == pytest.approx(used, rel=0.02, abs=0.002)


def test_waiting_for_a_processor_is_told_apart_from_sleeping(tmp_path: Path) -> None:
    """By the system's own count, in the innermost span; where it is short, some of it may fall to the next one."""
    if not Path("/proc/thread-self/schedstat").exists():
        pytest.skip("the system does not say how long a thread waits for a processor")

    def delay() -> float:
        """Return for how long this thread has waited, in seconds."""
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9

    with recorder.recording(tmp_path / "trace"), recorder.round_span(1):
        before = delay()
        for _ in range(20):
            with recorder.span("train"):
                use_processor(0.005)
            with recorder.span("wait"):
                time.sleep(0.001)
        waited = delay() - before
    totals = stage_totals(read_trace(tmp_path).rounds)
    assert sum(one.delay for one in totals.values()) == pytest.approx(waited, rel=0.1, abs=0.005)


def use_processor(seconds: float) -> None:
    """Keep the thread busy for so much processor time."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def test_a_wait_at_the_begin_of_a_span_is_that_of_the_span_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel takes the processor from a thread that computes when that calls it next, here to read its clock."""
    read = time.thread_time_ns

    def preempted() -> int:
        """Return the thread's processor time, after which it is away for 30 ms."""
        used = read()
        time.sleep(0.03)
        return used

    with recorder.recording(tmp_path / "trace"), recorder.round_span(1), recorder.span("train"):
        inner = recorder.span("serialise")
        monkeypatch.setattr(recorder.time, "thread_time_ns", preempted)
        inner.__enter__()
        monkeypatch.undo()
        inner.__exit__(None, None, None)
    totals = stage_totals(read_trace(tmp_path).rounds)
    assert totals["train"].seconds >= 0.03
    assert totals["serialise"].seconds < 0.03


def test_a_forked_process_writes_a_file_of_its_own(tmp_path: Path) -> None:
    with recorder.recording(tmp_path / "trace"), recorder.round_span(1):
        child = os.fork()
        if not child:
            with recorder.span("train"):
                pass
            recorder.flush()
            os._exit(0)
        with recorder.span("wait"):
            os.waitpid(child, 0)
    (one,) = read_trace(tmp_path).rounds
    assert {lane.process: {s.kind for s in own} - {UNATTRIBUTED, ABSENT} for lane, own in one.lanes.items()} == {
        "driver": {"wait"},
        "worker": {"train"},
    }


def test_nothing_is_made_while_it_is_off() -> None:
    assert not recorder.is_on()
    assert recorder.span("train") is recorder.span("mix") is recorder.round_span(1)
    recorder.count_bytes(lambda: pytest.fail("bytes are not counted"))
    recorder.flush()


def test_a_process_that_is_killed_leaves_its_whole_rounds(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        with recorder.recording(tmp_path / "trace"):
            for number in range(1, 4):
                with recorder.round_span(number):
                    with recorder.span("train"):
                        pass
                    if number == 3:
                        recorder.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (path,) = (tmp_path / "trace").iterdir()
    path.write_bytes(path.read_bytes()[:-5])  # as the disk may have been left
    trace = read_trace(tmp_path)
    assert [one.number for one in trace.rounds] == [1, 2]
    assert examine(trace).num_rounds == 2


def test_a_span_that_another_thread_ends_is_not_recorded(tmp_path: Path) -> None:
    """As that of a generator which is thrown away; nor does anything of a recorder that is closed matter."""
    with recorder.recording(tmp_path / "trace"):
        left = recorder.span("send")
        left.__enter__()
        thread = threading.Thread(target=lambda: left.__exit__(None, None, None))
        thread.start()
        thread.join()
        with recorder.round_span(1), recorder.span("train"):
            pass
        late = recorder.span("log")
        late.__enter__()
    late.__exit__(None, None, None)
    assert set(stage_totals(read_trace(tmp_path).rounds)) <= {"train", UNATTRIBUTED}


def test_a_round_that_fails_is_not_noted(tmp_path: Path) -> None:
    def fail() -> None:
        """Record two rounds, of which the second fails."""
        with recorder.recording(tmp_path / "trace"):
            with recorder.round_span(1):
                pass
            with recorder.round_span(2):
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not recorder.is_on()
    assert [one.number for one in read_trace(tmp_path).rounds] == [1]
