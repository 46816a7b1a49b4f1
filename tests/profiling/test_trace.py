"""Traces: no gaps, innermost spans, whole rounds; and what is refused in one sentence."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import DataError
from gossamer.profiling.trace import ABSENT, UNATTRIBUTED, read_trace, stage_totals
from gossamer.reports.profile import examine, render
from traces import header, span, write


def test_every_thread_adds_up_to_the_round(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("plan", 1, 3), span("train", 4, 9), span("wait", 5, 8)], [(1, 0, 10)])
    (one,) = read_trace(tmp_path).rounds
    (segments,) = one.lanes.values()
    found = [(s.kind, round(1e3 * s.begin, 6), round(1e3 * s.end, 6)) for s in segments]
    gaps = [(UNATTRIBUTED, 0, 1), (UNATTRIBUTED, 3, 4), (UNATTRIBUTED, 9, 10)]
    spans = [("plan", 1, 3), ("train", 4, 5), ("wait", 5, 8), ("train", 8, 9)]
    assert found == sorted(gaps + spans, key=lambda item: item[1])
    assert one.seconds == pytest.approx(0.01)


def test_processor_time_and_bytes_are_those_of_the_span_alone(tmp_path: Path) -> None:
    spans = [span("train", 0, 10, cpu=8, num_bytes=7), span("compress", 2, 4, cpu=2, num_bytes=5)]
    write(tmp_path, "driver", spans, [(1, 0, 10)])
    totals = stage_totals(read_trace(tmp_path).rounds)
    assert totals["train"].cpu == pytest.approx(0.006)
    assert totals["compress"].cpu == pytest.approx(0.002)
    assert (totals["train"].num_bytes, totals["compress"].num_bytes) == (7, 5)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=12))
def test_nested_spans_of_any_shape_leave_no_gap(tmp_path_factory: pytest.TempPathFactory, shapes: list) -> None:
    spans, at = [], 0
    for gap, length in shapes:
        begin, end = at + gap, at + gap + 3 * length
        spans += [span("train", begin, end), span("extract", begin + length, begin + 2 * length)]
        at = end
    directory = tmp_path_factory.mktemp("run")
    write(directory, "driver", spans, [(1, 5, at + 20)])
    (one,) = read_trace(directory).rounds
    for segments in one.lanes.values():
        assert sum(s.seconds for s in segments) == pytest.approx(one.seconds, rel=1e-9)
        assert all(a.end == b.begin for a, b in pairwise(segments))


def test_a_torn_line_and_a_round_without_an_end_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "driver", [span("plan", 1, 3), span("train", 11, 13)], [(1, 0, 10)])
    path.write_text(path.read_text() + '["train", 1, 140')
    trace = read_trace(tmp_path)
    assert [one.number for one in trace.rounds] == [1]
    assert "train" not in stage_totals(trace.rounds)


def test_of_a_repeated_round_the_last_counts(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("plan", 1, 3), span("plan", 21, 25)], [(1, 0, 10), (1, 20, 30)])
    (one,) = read_trace(tmp_path).rounds
    assert stage_totals([one])["plan"].seconds == pytest.approx(0.004)


def test_clocks_of_other_machines_are_shifted_by_the_time_of_day(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("plan", 1, 3)], [(1, 0, 10)], monotonic_ns=0, unix_ns=10**18)
    ahead = 5 * 10**9
    spans = [span("train", 5000 + 4, 5000 + 8)]
    write(tmp_path, "actor", spans, pid=2, boot="other", monotonic_ns=ahead, unix_ns=10**18)
    trace = read_trace(tmp_path)
    assert trace.clocks == {"driver": (0.0, 0.0), "actor-0": (5.0, math.inf)}
    (lane,) = (lane for lane in trace.rounds[0].lanes if lane.process == "actor")
    assert [s.kind for s in trace.rounds[0].lanes[lane]] == [ABSENT, "train", ABSENT]


def test_messages_both_ways_set_the_clocks_of_machines(tmp_path: Path) -> None:
    """The actor's clock is 5 s ahead; a message takes 1 ms there, and 3 ms back."""
    ahead = 5000
    spans = [span("send", 1, 1.5, message="a<1"), span("receive", 8.5, 9, message="a>1")]
    write(tmp_path, "driver", spans, [(1, 0, 10)], monotonic_ns=0, unix_ns=10**18)
    spans = [span("receive", ahead + 1.5, ahead + 2, message="a<1"), span("send", ahead + 6, ahead + 7, message="a>1")]
    write(tmp_path, "actor", spans, pid=2, boot="other", monotonic_ns=0, unix_ns=10**18)
    trace = read_trace(tmp_path)
    assert trace.clocks["actor-0"] == pytest.approx((4.999, 0.002), abs=1e-9)
    told = render(examine(trace))
    assert json.loads(render(examine(trace), as_json=True))["clocks"]["actor-0"]["error"] == pytest.approx(0.002)
    assert "Clocks against the driver's: actor-0 +4.999000 s with an error of 2 ms at most." in told


class TestRefused:
    def test_no_trace(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has no trace: run it with --profile"):
            read_trace(tmp_path)

    @pytest.mark.parametrize("run", ["seed-0", "rolling/seed-0"])
    def test_several_runs(self, run: str, tmp_path: Path) -> None:
        (tmp_path / run).mkdir(parents=True)
        write(tmp_path / run, "driver", [span("plan", 1, 3)], [(1, 0, 10)])
        with pytest.raises(DataError, match=f"holds several runs: give one of them, such as .*{run}"):
            read_trace(tmp_path)

    def test_no_whole_round(self, tmp_path: Path) -> None:
        write(tmp_path, "driver", [span("plan", 1, 3)])
        with pytest.raises(DataError, match="no whole round"):
            read_trace(tmp_path)

    @pytest.mark.parametrize("text", ["", "[1]\n", '{"traceEvents": []}\n', "\x00\xff\n", '{"format": "other"}\n'])
    def test_a_foreign_trace(self, tmp_path: Path, text: str) -> None:
        write(tmp_path, "driver", [], [(1, 0, 10)])
        (tmp_path / "trace/other.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"other.jsonl' is no trace of gossamer"):
            read_trace(tmp_path)

    def test_another_version(self, tmp_path: Path) -> None:
        write(tmp_path, "driver", [], [(1, 0, 10)], version=99)
        with pytest.raises(DataError, match="version 99, not 1"):
            read_trace(tmp_path)

    @pytest.mark.parametrize("line", ['["plan", 1, 2]', '{"a": 1}', "no", '["plan", 1, 0, 1, 1, 0, 0, 5]'])
    def test_a_damaged_line(self, tmp_path: Path, line: str) -> None:
        path = write(tmp_path, "driver", [], [(1, 0, 10)])
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(DataError, match="line 3 of"):
            read_trace(tmp_path)

    def test_a_clock_that_runs_backwards(self, tmp_path: Path) -> None:
        path = write(tmp_path, "driver", [span("train", 5, 6)], [(1, 0, 10)])
        path.write_text(path.read_text() + json.dumps(span("log", 2, 3)) + "\n")
        with pytest.raises(DataError, match="a span of 'log' ends at 3000000 ns, before 6000000 ns"):
            read_trace(tmp_path)

    def test_a_header_without_a_clock(self, tmp_path: Path) -> None:
        path = write(tmp_path, "driver", [])
        path.write_text(json.dumps({k: v for k, v in header("driver", 1).items() if k != "unix_ns"}) + "\n")
        with pytest.raises(DataError, match="is no trace"):
            read_trace(tmp_path)


def test_long_traces_are_read_in_linear_time(tmp_path: Path) -> None:
    spans, rounds = [], []
    for number in range(2000):
        at = 10.0 * number
        spans += [span("plan", at, at + 1), span("train", at + 1, at + 9), span("wait", at + 2, at + 8)]
        rounds.append((number + 1, at, at + 10))
    write(tmp_path, "driver", spans, rounds)
    began = time.process_time()
    found = read_trace(tmp_path).rounds
    assert time.process_time() - began < 2
    assert {segment.kind for own in found[1000].lanes.values() for segment in own} == {
        "plan",
        "train",
        "wait",
        UNATTRIBUTED,
    }
