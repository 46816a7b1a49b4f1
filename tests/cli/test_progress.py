"""Progress on a terminal: what stands beside the bar, and the line that a finished run leaves."""

from __future__ import annotations

import io
import itertools
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from gossamer.cli import progress
from gossamer.cli.progress import LINE_SECONDS, ProgressDisplay, ProgressLines
from gossamer.reports import progress as reports_progress
from gossamer.reports.progress import Part, fitting


class Clock:
    """Time that a test moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    monkeypatch.setattr(reports_progress, "time", made)
    return made


class Screen:
    """A terminal whose lines are kept as they were drawn."""

    def __init__(self, width: int = 140) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=width)

    def lines(self) -> list[str]:
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())
        return [re.sub("[━╸╺ ]{2,}", " ", line).strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def screen() -> Screen:
    return Screen()


def record(round: int, **more: Any) -> dict[str, Any]:
    return {"round": round, "total_bytes_up": 1000 * round, "total_bytes_down": 500 * round, "train_loss": 0.5} | more


def test_round_participants_accuracy_bytes_and_time_left(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay({"": 10}, screen.console) as display:
        observer = display.observer("digits", 10)
        clock.now += 10
        observer.on_block(0, 3, 6)
        assert screen.lines()[-1] == "digits 0/10 rounds 3/6 trained 0:03:10 left"
        clock.now += 10
        observer.on_round(record(1, accuracy=0.8765))
        assert screen.lines()[-1] == "digits 1/10 rounds 3/6 trained accuracy 87.6% 1.5 kB 0:03:00 left"


def test_rounds_done_before_a_resume_do_not_shorten_the_estimate(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay({"": 10}, screen.console) as display:
        observer = display.observer("digits", 20)
        clock.now += 5
        observer.on_block(10, 4, 4)
        assert screen.lines()[-1].endswith("11/20 rounds 4/4 trained 0:00:45 left")


def test_last_accuracy_stays_through_rounds_without_evaluation(screen: Screen, clock: Clock) -> None:
    evaluated: list[dict[str, Any]] = [{}, {"accuracy": 0.5}, {}, {"accuracy": None}]
    with ProgressDisplay({"": 10}, screen.console) as display:
        observer = display.observer("digits", 5)
        for number, more in enumerate(evaluated, start=1):
            clock.now += 1
            observer.on_round(record(number, **more))
            assert ("loss 0.5" if number == 1 else "accuracy 50.0%") in screen.lines()[-1]


def test_position_among_several_runs_and_a_line_for_each(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay({"fedavg/seed-0": 1, "fedavg/seed-1": 1}, screen.console) as display:
        assert screen.lines() == ["[1/2] preparing"]
        observer = display.observer("fedavg/seed-0", 1)
        assert screen.lines()[-1] == "[1/2] fedavg/seed-0"
        clock.now += 75
        observer.on_round(record(1, accuracy=0.9))
        assert "fedavg/seed-0: 1 rounds in 0:01:15, accuracy 90.0%, 1.5 kB, 0:01:15 left for 1 more" in screen.lines()
        assert screen.lines()[-1] == "[2/2] preparing"
        display.observer("fedavg/seed-1", 1).on_round(record(1))
    assert "[2/2] fedavg/seed-1" in "\n".join(screen.lines())
    assert "[3/2]" not in "\n".join(screen.lines())


def test_drawing_is_rare_however_many_blocks_there_are(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay({"": 10}, screen.console) as display:
        observer = display.observer("digits", 1)
        before = len(screen.lines())
        for done in range(1, 1001):
            clock.now += 0.001
            observer.on_block(0, done, 1000)
        assert 5 <= len(screen.lines()) - before <= 11


def test_no_thread_stands_while_engines_fork(screen: Screen) -> None:
    before = threading.active_count()
    with ProgressDisplay({"": 10}, screen.console):
        assert threading.active_count() == before


@pytest.mark.parametrize("width", [60, 80, 140])
def test_one_line_however_narrow_the_terminal(clock: Clock, width: int) -> None:
    screen = Screen(width)
    names = ["federated-dropout-of-a-long-name/seed-0", "fedavg/seed-0"]
    with ProgressDisplay(dict.fromkeys(names, 1000), screen.console) as display:
        for name in names:
            observer = display.observer(name, 1000)
            for number in range(1, 4):
                clock.now += 30.0
                observer.on_block(number - 1, 99, 100)
                clock.now += 30.0
                observer.on_round(record(number, accuracy=0.1234))
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", drawn) if line.strip()]
    assert max(map(len, lines)) <= width
    assert screen.file.getvalue().count("\x1b[1A") <= 1  # a second line would be drawn over at each refresh
    last = lines[-1]
    assert last.startswith("[2/2] fedavg/seed-0 ")
    assert "3/1000 rounds" in last
    assert last.rstrip().endswith(" left")
    assert ("99/100 trained" in last) == (width == 140)
    assert ("accuracy 12.3%" in last) == (width > 60)
    assert ("4.5 kB" in last) == (width == 140)


class TestLines:
    """What a pipe or a log file gets."""

    def test_a_line_every_few_seconds_and_one_at_the_end_of_each_run(self, clock: Clock) -> None:
        written: list[tuple[float, str]] = []
        plan = {"a/seed-0": 40, "b/seed-0": 40}
        with ProgressLines(lambda: plan, lambda line: written.append((clock.now, line))) as display:
            for name in plan:
                observer = display.observer(name, 40)
                for number in range(1, 41):
                    clock.now += 0.25
                    observer.on_block(number - 1, 5, 5)
                    clock.now += 0.25
                    observer.on_round(record(number, accuracy=0.5))
        assert [line for _, line in written] == [
            "[1/2] a/seed-0: 10/40 rounds, 5/5 trained, accuracy 50.0%, 15.0 kB, 0:00:35 left",
            "[1/2] a/seed-0: 20/40 rounds, 5/5 trained, accuracy 50.0%, 30.0 kB, 0:00:30 left",
            "[1/2] a/seed-0: 30/40 rounds, 5/5 trained, accuracy 50.0%, 45.0 kB, 0:00:25 left",
            "a/seed-0: 40 rounds in 0:00:20, accuracy 50.0%, 60.0 kB, 0:00:20 left for 1 more",
            "[2/2] b/seed-0: 10/40 rounds, 5/5 trained, accuracy 50.0%, 15.0 kB, 0:00:15 left",
            "[2/2] b/seed-0: 20/40 rounds, 5/5 trained, accuracy 50.0%, 30.0 kB, 0:00:10 left",
            "[2/2] b/seed-0: 30/40 rounds, 5/5 trained, accuracy 50.0%, 45.0 kB, 0:00:05 left",
            "b/seed-0: 40 rounds in 0:00:20, accuracy 50.0%, 60.0 kB",
        ]
        times = [now for now, line in written if line.startswith("[")]
        assert min(later - sooner for sooner, later in itertools.pairwise(times)) >= LINE_SECONDS

    def test_a_quick_run_is_one_line(self, clock: Clock) -> None:
        written: list[str] = []
        observer = ProgressLines(lambda: {"": 2}, written.append).observer("digits", 2)
        for number in (1, 2):
            clock.now += 0.1
            observer.on_round(record(number, accuracy=0.5))
        assert written == ["digits: 2 rounds in 0:00:00, accuracy 50.0%, 3.0 kB"]

    def test_runs_that_a_resume_skips_are_counted(self, clock: Clock) -> None:
        written: list[str] = []
        display = ProgressLines(lambda: {"a": 5, "b": 5, "c": 5}, written.append)
        observer = display.observer("b", 5)
        clock.now += 10.0
        observer.on_round(record(1))
        assert written == ["[2/3] b: 1/5 rounds, loss 0.5, 1.5 kB, 0:01:30 left"]


def test_what_does_not_fit_is_left_out_by_rank() -> None:
    parts = [Part(0, "12/20"), Part(3, "trained"), Part(1, "90%"), Part(2, "bytes")]
    assert fitting(parts, 100) == "12/20  trained  90%  bytes"
    assert fitting(parts, 17) == "12/20  90%  bytes"
    assert fitting(parts, 16) == "12/20  90%"
    assert fitting(parts, 8) == "12/20"
    assert fitting(parts, 4) == ""


def test_clients_are_a_table_above_the_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=8)
    row = {"name": "a", "samples": 1200, "heard_seconds": 3.4, "bytes_up": 2_500_000, "bytes_down": 0}
    rows = [{"client": client, "state": "idle", **row} for client in range(9)]
    rows[7]["state"] = "away"
    with ProgressDisplay({"": 2}, console) as display:
        display.observer("", 2)
        display.clients(rows)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert re.search(r"7 +a +1,200 +away +3 s ago +2\.5 MB +0\.0 MB", shown)
    assert "5 more" in shown
