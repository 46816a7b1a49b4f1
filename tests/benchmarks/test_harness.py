"""Which trials of benchmarks count, by made-up counters: nothing here is timed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from harness import Gate, Trials, all_quiet, start, summary, timed
from quiet import Reading, Usage, descendants, is_quiet, read, together, tree_ticks, usage, wait_until_quiet

QUIET = Usage(seconds=10.0, own=19.0, others=0.3)
STARVED = Usage(seconds=10.0, own=13.0, others=6.9)
UNKNOWN = Usage(seconds=10.0, own=19.0, others=None)


def readings(*others: float, seconds: float = 10.0) -> Callable[[], Reading]:
    """Return what reads the counters before and after each of several trials, in which others used so many seconds."""

    def instants() -> Iterator[Reading]:
        """Yield two readings a trial."""
        now = Reading(seconds=100.0, cores=2, counted=200.0, idle=40.0, own=20.0)
        for used in others:
            yield now
            own, passed = 1.5 * seconds - used, 2 * seconds
            now = Reading(now.seconds + seconds, 2, now.counted + passed, now.idle + passed - own - used, now.own + own)
            yield now

    source = instants()
    return lambda: next(source)


class Waiting:
    """Notes that the gate waits, instead of waiting."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, patience: float, max_share: float) -> None:
        self.times += 1


class TestUsage:
    BEFORE = Reading(seconds=100.0, cores=2, counted=200.0, idle=40.0, own=20.0)

    def test_others_used_what_was_neither_idle_nor_ours(self) -> None:
        found = usage(self.BEFORE, Reading(seconds=110.0, cores=2, counted=220.0, idle=41.0, own=34.0))
        assert found == Usage(seconds=10.0, own=14.0, others=5.0)
        assert found.share == pytest.approx(0.5)

    def test_rounding_makes_no_negative_seconds(self) -> None:
        assert usage(self.BEFORE, Reading(101.0, 2, 202.0, 40.02, 22.0)).others == 0.0

    @pytest.mark.parametrize("counted", [200.0, 210.0, 400.0])
    def test_counters_that_miss_the_time_tell_nothing(self, counted: float) -> None:
        assert usage(self.BEFORE, Reading(110.0, 2, counted, 40.0, 39.0)).others is None

    def test_ticks_may_miss_a_little(self) -> None:
        assert usage(self.BEFORE, Reading(110.0, 2, 219.0, 41.0, 39.0)).others == 0.0

    def test_stretches_add_up(self) -> None:
        assert together([QUIET, STARVED]) == pytest.approx(Usage(20.0, 32.0, 7.2))
        assert together([QUIET, UNKNOWN]).others is None

    def test_no_counters_tell_nothing(self) -> None:
        assert usage(None, self.BEFORE).share is None


class TestIsQuiet:
    @pytest.mark.parametrize(
        ("others", "expected"), [(0.0, True), (0.5, True), (0.6, False), (10.0, False), (None, None)]
    )
    def test_by_the_share_of_a_core(self, others: float | None, expected: bool | None) -> None:
        assert is_quiet(Usage(10.0, 15.0, others), max_share=0.05) is expected

    def test_the_steps_of_the_counters_are_forgiven(self) -> None:
        assert is_quiet(Usage(0.2, 0.4, 0.03)) is True
        assert is_quiet(Usage(0.2, 0.2, 0.2)) is False

    def test_an_idle_core_of_ones_own_is_no_fault(self) -> None:
        assert is_quiet(Usage(10.0, own=2.0, others=0.1)) is True


class TestTree:
    PROCESSES = {1: (0, 100), 10: (1, 5), 11: (10, 7), 12: (11, 9), 20: (1, 50), 21: (20, 60)}

    @pytest.mark.parametrize(("root", "expected"), [(10, 21), (12, 9), (20, 110), (1, 231), (99, 0)])
    def test_adds_up_a_process_and_its_descendants(self, root: int, expected: int) -> None:
        assert tree_ticks(self.PROCESSES, root) == expected

    def test_reads_what_the_kernel_tells(self, tmp_path: Path) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        (tmp_path / "stat").write_text("cpu  500 20 300 9000 70 6 4 30 8 0\ncpu0 1 2\ncpu1 1 2\nintr 5\n")
        for process, (parent, used) in self.PROCESSES.items():
            (tmp_path / str(process)).mkdir()
            fields = ["S", str(parent), *["0"] * 9, str(used), "1", "2", "3", "20", "0"]
            (tmp_path / str(process) / "stat").write_text(f"{process} (a name) with (brackets) {' '.join(fields)}\n")
        (tmp_path / "uptime").write_text("1 2\n")
        found = read(root=10, proc=tmp_path)
        assert found is not None
        assert found[1:] == pytest.approx((2, 9930 / ticks, 9070 / ticks, (21 + 3 * 6) / ticks))
        assert sorted(descendants(10, tmp_path)) == [11, 12]

    def test_there_may_be_nothing_to_read(self, tmp_path: Path) -> None:
        assert read(root=1, proc=tmp_path) is None


class TestTrials:
    def test_a_starved_trial_is_discarded_and_counted(self) -> None:
        trials = Trials[str](asked=2)
        assert [trials.add("slow", STARVED), trials.add("one", QUIET), trials.add("two", QUIET)] == [False, True, True]
        assert trials.results == ["one", "two"]
        assert trials.discarded == ["slow"]
        assert trials.report() == {"accepted": 2, "discarded": 1, "quiet": True}

    def test_where_none_counts_the_discarded_are_shown(self) -> None:
        trials = Trials[str](asked=1)
        trials.add("slow", STARVED)
        assert (trials.results, trials.quiet) == (["slow"], False)

    def test_what_nothing_is_known_of_counts_and_is_said(self) -> None:
        trials = Trials[str](asked=1)
        assert trials.add("one", UNKNOWN)
        assert trials.quiet is None

    def test_one_disturbed_contender_disturbs_all(self) -> None:
        assert all_quiet([True, True]) is True
        assert all_quiet([True, None]) is None
        assert all_quiet([None, False, True]) is False


class TestGate:
    def test_repeats_what_was_disturbed(self) -> None:
        wait = Waiting()
        gate = Gate(attempts=3, reader=readings(0.1, 8.0, 0.2), wait=wait)
        results = iter(["first", "disturbed", "second"])
        trials = gate.gated(lambda: next(results), repeats=2)
        assert trials.accepted == ["first", "second"]
        assert trials.discarded == ["disturbed"]
        assert (wait.times, gate.quiet) == (1, True)
        report = gate.report()["gate"]
        assert (report["asked"], report["accepted"], report["discarded"]) == (2, 2, 1)
        assert report["shares_discarded"] == pytest.approx([0.8, 0.8, 0.8])

    def test_gives_up_after_its_attempts_and_says_so(self) -> None:
        wait, calls = Waiting(), []
        gate = Gate(attempts=3, reader=readings(*[5.0] * 6), wait=wait)
        trials = gate.gated(lambda: calls.append(None), repeats=2)
        assert (len(calls), wait.times) == (6, 4)
        assert trials.accepted == []
        assert gate.report()["quiet"] is False

    def test_fewer_than_asked_is_not_quiet(self) -> None:
        gate = Gate(attempts=2, reader=readings(0.0, 5.0, 5.0), wait=Waiting())
        assert len(gate.gated(lambda: None, repeats=2).accepted) == 1
        assert gate.quiet is False

    def test_keeps_contenders_in_turn(self) -> None:
        used = {"ours": iter([QUIET, STARVED, QUIET]), "theirs": iter([QUIET, QUIET])}
        order: list[str] = []

        def trial(name: str) -> tuple[str, Usage]:
            """Return who was measured, and how it went."""
            order.append(name)
            return name, next(used[name])

        gate = Gate(wait=Waiting())
        measures = {name: lambda name=name: trial(name) for name in used}
        found = gate.interleave(measures, 2, used=lambda result: result[1])
        assert order == ["ours", "theirs", "ours", "ours", "theirs"]
        assert {name: len(one.accepted) for name, one in found.items()} == {"ours": 2, "theirs": 2}

    def test_calls_no_goal_met_where_it_was_not_quiet(self) -> None:
        gate = Gate(attempts=1, reader=readings(0.1, 5.0), wait=Waiting())
        gate.gated(lambda: None)
        assert gate.goal(0.8, 0.9)["met"] is True
        assert gate.goal(1.0, 0.9)["met"] is False
        assert gate.goal(0.8, 0.9, quiet=False)["met"] is None
        gate.gated(lambda: None)
        assert gate.goal(0.8, 0.9)["met"] is None


class TestWaiting:
    def test_ends_when_others_are_quiet(self) -> None:
        slept: list[float] = []
        reader = readings(0.9, 0.5, 0.0, 0.0, seconds=1.0)
        assert wait_until_quiet(20.0, 0.05, reader, slept.append)
        assert len(slept) == 3

    def test_ends_when_it_has_waited_enough(self) -> None:
        slept: list[float] = []
        assert not wait_until_quiet(5.0, 0.05, readings(*[0.9] * 9, seconds=1.0), slept.append)
        assert len(slept) == 5


def run(seconds: list[float], first: float, used: Usage, start_used: Usage) -> dict[str, object]:
    """Return what a contender reports."""
    return {
        "round_seconds": seconds,
        "first_round_seconds": first,
        "usage": {"timed": used, "first": start_used},
        "versions": {"torch": "2"},
    }


class TestSummary:
    def test_is_of_the_accepted_trials_alone(self) -> None:
        trials = Trials[dict[str, object]](asked=3)
        for seconds, first, used, start_used in (
            ([1.0, 2.0, 9.0], 5.0, QUIET, STARVED),
            ([8.0, 8.0, 8.0], 9.0, STARVED, STARVED),
            ([3.0, 4.0, 5.0], 3.0, QUIET, QUIET),
            ([2.0, 3.0, 4.0], 4.0, QUIET, QUIET),
        ):
            one = run(seconds, first, used, start_used)
            trials.add(one, timed(one))
        found = summary({"ours": trials})["ours"]
        assert (found["seconds_per_round"], found["range"]) == (3.0, [2.0, 4.0])
        assert (found["accepted"], found["discarded"], found["quiet"]) == (3, 1, True)
        assert (found["first_round_seconds"], found["quiet_starts"]) == (3.5, 2)

    def test_a_start_that_was_never_quiet_is_told(self) -> None:
        trials = Trials[dict[str, object]](asked=1)
        trials.add(run([1.0], 5.0, QUIET, STARVED), QUIET)
        assert start(trials)["quiet_starts"] == 0
        assert start(trials)["first_round_seconds"] == 5.0
