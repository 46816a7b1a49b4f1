"""Progress on a terminal: what stands beside the bar, and the line that a finished run leaves."""

from __future__ import annotations

import io
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from gossamer.cli import progress
from gossamer.cli.progress import ProgressDisplay
from gossamer.reports import progress as reports_progress


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

    def __init__(self) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=True, width=140)

    def lines(self) -> list[str]:
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())
        return [re.sub("[━╸╺ ]{2,}", " ", line).strip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def screen() -> Screen:
    return Screen()


def record(round: int, **more: Any) -> dict[str, Any]:
    return {"round": round, "total_bytes_up": 1000 * round, "total_bytes_down": 500 * round, "train_loss": 0.5} | more


def test_round_participants_accuracy_bytes_and_time_left(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay(1, screen.console) as display:
        observer = display.observer("digits", 10)
        clock.now += 10
        observer.on_block(0, 3, 6)
        assert screen.lines()[-1] == "digits 0/10 rounds 3/6 trained 0:03:10 left"
        clock.now += 10
        observer.on_round(record(1, accuracy=0.8765))
        assert screen.lines()[-1] == "digits 1/10 rounds 3/6 trained accuracy 87.6% 1.5 kB 0:03:00 left"


def test_rounds_done_before_a_resume_do_not_shorten_the_estimate(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay(1, screen.console) as display:
        observer = display.observer("digits", 20)
        clock.now += 5
        observer.on_block(10, 4, 4)
        assert screen.lines()[-1].endswith("11/20 rounds 4/4 trained 0:00:45 left")


def test_last_accuracy_stays_through_rounds_without_evaluation(screen: Screen, clock: Clock) -> None:
    evaluated: list[dict[str, Any]] = [{}, {"accuracy": 0.5}, {}, {"accuracy": None}]
    with ProgressDisplay(1, screen.console) as display:
        observer = display.observer("digits", 5)
        for number, more in enumerate(evaluated, start=1):
            clock.now += 1
            observer.on_round(record(number, **more))
            assert ("loss 0.5" if number == 1 else "accuracy 50.0%") in screen.lines()[-1]


def test_position_among_several_runs_and_a_line_for_each(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay(2, screen.console) as display:
        assert screen.lines() == ["[1/2] preparing"]
        observer = display.observer("fedavg/seed-0", 1)
        assert screen.lines()[-1] == "[1/2] fedavg/seed-0"
        clock.now += 75
        observer.on_round(record(1, accuracy=0.9))
        assert "fedavg/seed-0: 1 rounds in 0:01:15, accuracy 90.0%, 1.5 kB" in screen.lines()
        assert screen.lines()[-1] == "[2/2] preparing"
        display.observer("fedavg/seed-1", 1).on_round(record(1))
    assert "[2/2] fedavg/seed-1" in "\n".join(screen.lines())
    assert "[3/2]" not in "\n".join(screen.lines())


def test_drawing_is_rare_however_many_blocks_there_are(screen: Screen, clock: Clock) -> None:
    with ProgressDisplay(1, screen.console) as display:
        observer = display.observer("digits", 1)
        before = len(screen.lines())
        for done in range(1, 1001):
            clock.now += 0.001
            observer.on_block(0, done, 1000)
        assert 5 <= len(screen.lines()) - before <= 11


def test_no_thread_stands_while_engines_fork(screen: Screen) -> None:
    before = threading.active_count()
    with ProgressDisplay(1, screen.console):
        assert threading.active_count() == before
