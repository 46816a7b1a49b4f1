"""Progress of a run, in the words of a line, and a display that rewrites this line, as for notebooks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

from gossamer.reports.curves import main_metric

REWRITE_SECONDS = 0.5


class Display(Protocol):
    """What shows the progress of runs."""

    def advance(self, rounds: float, status: str) -> None:
        """Show that so many rounds are done, the last of them in part, and what there is to say."""
        ...

    def finish(self, summary: str) -> None:
        """Show the line of a finished run."""
        ...


class LineDisplay:
    """Rewrites one line of the standard output, and leaves one for every finished run."""

    def __init__(self) -> None:
        self._written_at, self._width = 0.0, 0

    def advance(self, rounds: float, status: str) -> None:
        """Rewrite the line, unless that was done just now."""
        if time.monotonic() - self._written_at >= REWRITE_SECONDS:
            self._write(status)
            self._written_at = time.monotonic()

    def finish(self, summary: str) -> None:
        """Replace the line by a last one."""
        self._write(summary)
        sys.stdout.write("\n")
        self._width = 0

    def _write(self, line: str) -> None:
        sys.stdout.write("\r" + line.ljust(self._width))
        sys.stdout.flush()
        self._width = len(line)


class RunObserver:
    """Watches one run for a display."""

    def __init__(self, display: Display, name: str, num_rounds: int) -> None:
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
        from rich.filesize import decimal

        facts = []
        if self._accuracy is not None:
            facts.append(f"accuracy {self._accuracy:.1%}")
        elif loss is not None:
            facts.append(f"loss {loss:.4g}")
        return [*facts, decimal(num_bytes)] if num_bytes else facts
