"""Progress on a terminal: a bar over the rounds of the current run, and one line for every finished run.

It draws on every report of progress, never from a thread of its own, because engines fork workers meanwhile.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gossamer.reports.progress import RunObserver

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
