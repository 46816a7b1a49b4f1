"""Progress on a terminal: a bar over the rounds of the current run, and one line for every finished run.

It draws on every report of progress, never from a thread of its own, because engines fork workers meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn

from gossamer.reports.curves import main_metric

REFRESH_SECONDS = 0.1


class ProgressDisplay:
    """Draws one run's bar at a time; use it as a context manager around all of them."""

    def __init__(self, num_runs: int, console: Console) -> None:
        """Prepare the bars of `num_runs` runs on `console`."""
        self._num_runs, self._index, self._drawn_at = num_runs, 0, 0.0
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
            expand=True,
        )
        self._bar = self._bars.add_task(self._title("preparing"), total=1, status="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def observer(self, name: str, num_rounds: int) -> RunObserver:
        """Start the next run's bar, and return the observer that fills it."""
        self._show(description=self._title(name), total=num_rounds, completed=0, status="", force=True)
        self._index += 1
        return RunObserver(self, name, num_rounds)

    def advance(self, rounds: float, status: str) -> None:
        """Fill the bar up to `rounds`, the last of them in part, and show `status` beside it."""
        self._show(completed=rounds, status=status)

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def finish(self, summary: str) -> None:
        """Print the line of a finished run above the bar."""
        self.print(summary)
        if self._index < self._num_runs:
            self._show(description=self._title("preparing"), completed=0, status="", force=True)

    def _title(self, text: str) -> str:
        return f"[{self._index + 1}/{self._num_runs}] {text}" if self._num_runs > 1 else text

    def _show(self, force: bool = False, **fields: Any) -> None:
        self._bars.update(self._bar, **fields)
        if force or time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
            self._bars.refresh()
            self._drawn_at = time.monotonic()


class RunObserver:
    """Watches one run for a `ProgressDisplay`."""

    def __init__(self, display: ProgressDisplay, name: str, num_rounds: int) -> None:
        """Watch the run `name` of `num_rounds` rounds."""
        self._display, self._name, self._num_rounds = display, name, num_rounds
        self._began = time.monotonic()
        self._first_round: int | None = None  # number of rounds done before a resume
        self._record: Mapping[str, Any] = {}
        self._trained = ""
        self._accuracy: float | None = None  # the last known; not every round is evaluated

    def on_block(self, round: int, done: int, total: int) -> None:
        """Show how many participants of a round (counted from 0) are trained."""
        if self._first_round is None:
            self._first_round = round
        self._trained = f"{done}/{total} trained"
        self._draw(round + done / total)

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Show a finished round; after the last one print a line that stays."""
        if self._first_round is None:
            self._first_round = record["round"] - 1
        self._record = record
        metric = main_metric(record)
        if metric != "train_loss" and record[metric] is not None:
            self._accuracy = record[metric]
        self._draw(record["round"])
        if record["round"] == self._num_rounds:
            seconds = timedelta(seconds=round(time.monotonic() - self._began))
            self._display.finish(
                f"{self._name}: " + ", ".join([f"{self._num_rounds} rounds in {seconds}", *self._facts()])
            )

    def _draw(self, position: float) -> None:
        assert self._first_round is not None
        gained = position - self._first_round
        left = (time.monotonic() - self._began) / gained * (self._num_rounds - position) if gained > 0 else None
        remaining = "" if left is None else f"{timedelta(seconds=round(left))} left"
        parts = [f"{int(position)}/{self._num_rounds} rounds", self._trained, *self._facts(), remaining]
        self._display.advance(position, "  ".join(part for part in parts if part))

    def _facts(self) -> list[str]:
        """Return the last metrics and the traffic."""
        loss = self._record.get("train_loss")
        num_bytes = self._record.get("total_bytes_up", 0) + self._record.get("total_bytes_down", 0)
        facts = []
        if self._accuracy is not None:
            facts.append(f"accuracy {self._accuracy:.1%}")
        elif loss is not None:
            facts.append(f"loss {loss:.4g}")
        return [*facts, decimal(num_bytes)] if num_bytes else facts
