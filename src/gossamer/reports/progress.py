"""Progress of runs: what is said of one, how long all of them will take, and a display that rewrites a line of it."""

from __future__ import annotations

import itertools
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self

from gossamer.reports.curves import main_metric

REWRITE_SECONDS = 0.5

Plan = Mapping[str, int]
"""The runs of an experiment in their order: names, and numbers of rounds."""


class Part(NamedTuple):
    """A piece of what is said of a run; of equal rank the first is kept longer where there is little room."""

    rank: int
    text: str


class Display(ABC):
    """Shows one run at a time, and how long all of them will take; use it as a context manager around them."""

    def __init__(self) -> None:
        """Prepare; `plan` is set later."""
        self.plan: Plan = {}
        self.index = 0  # of the current run
        self._began = time.monotonic()
        self._before = 0.0  # rounds of runs that have ended, as far as they were run here

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def observer(self, name: str, num_rounds: int) -> RunObserver:
        """Start the next run, and return the observer that shows it."""
        self.index = [*self.plan].index(name) if name in self.plan else self.index
        return RunObserver(self, name, num_rounds)

    def seconds_left(self, seconds: float, gained: float, left: float) -> float:
        """Return how many seconds the current run and those after it will take.

        Args:
            seconds, gained: time and rounds of the current run so far.
            left: rounds that it has left.
        """
        later = sum([*self.plan.values()][self.index + 1 :])
        a_round = (time.monotonic() - self._began) / (self._before + gained)
        return seconds / gained * left + a_round * later

    def clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show a table of real clients, where there is a place for one; by default not."""
        return

    def title(self, text: str) -> str:
        """Return the name of a run, with its number where there are several."""
        return f"[{self.index + 1}/{len(self.plan)}] {text}" if len(self.plan) > 1 else text

    def end(self, summary: str, gained: float, seconds: float) -> None:
        """Print the line of a run that has ended after `gained` rounds in `seconds`."""
        number = len(self.plan) - self.index - 1
        rest = f", {duration(self.seconds_left(seconds, gained, 0.0))} left for {number} more" if number > 0 else ""
        self.print(summary + rest)
        self._before += gained
        self.index += 1

    @abstractmethod
    def show(self, name: str, rounds: float, num_rounds: int, parts: Sequence[Part]) -> None:
        """Show that `rounds` of the current run are done, the last of them in part."""

    @abstractmethod
    def print(self, line: str) -> None:
        """Print a line that stays."""


class LineDisplay(Display):
    """Rewrites one line of the standard output, as for notebooks, and leaves one for every finished run."""

    def __init__(self) -> None:
        super().__init__()
        self._written_at, self._width = 0.0, 0

    def show(self, name: str, rounds: float, num_rounds: int, parts: Sequence[Part]) -> None:
        """Rewrite the line, unless that was done just now."""
        if time.monotonic() - self._written_at >= REWRITE_SECONDS:
            self._write("  ".join(part.text for part in parts))
            self._written_at = time.monotonic()

    def print(self, line: str) -> None:
        """Replace the line by a last one."""
        self._write(line)
        sys.stdout.write("\n")
        self._width = 0

    def _write(self, line: str) -> None:
        sys.stdout.write("\r" + line.ljust(self._width))
        sys.stdout.flush()
        self._width = len(line)


class RunObserver:
    """Watches one run for a `Display`."""

    def __init__(self, display: Display, name: str, num_rounds: int) -> None:
        """Watch the run `name` of `num_rounds` rounds."""
        self._display, self._name, self._num_rounds = display, name, num_rounds
        self._began = time.monotonic()
        self._first_round: int | None = None  # number of rounds done before a resume
        self._record: Mapping[str, Any] = {}
        self._trained = ""
        self._metric: str | None = None  # the last known; not every round is evaluated

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
            self._metric = f"{metric.replace('_', ' ')} {record[metric]:.1%}"
        if record["round"] < self._num_rounds:
            self._draw(record["round"])
            return
        seconds = time.monotonic() - self._began
        facts = [part.text for part in self._facts()]
        told = ", ".join([f"{self._num_rounds} rounds in {duration(seconds)}", *facts])
        self._display.end(f"{self._name}: {told}", self._num_rounds - self._first_round, seconds)

    def _draw(self, position: float) -> None:
        assert self._first_round is not None
        gained, seconds = position - self._first_round, time.monotonic() - self._began
        parts = [Part(0, f"{int(position)}/{self._num_rounds} rounds"), Part(4, self._trained), *self._facts()]
        if gained > 0:
            left = self._display.seconds_left(seconds, gained, self._num_rounds - position)
            parts.append(Part(1, f"{duration(left)} left"))
        self._display.show(self._name, position, self._num_rounds, [part for part in parts if part.text])

    def _facts(self) -> list[Part]:
        """Return the last metric and the traffic."""
        from rich.filesize import decimal

        loss = self._record.get("train_loss")
        num_bytes = self._record.get("total_bytes_up", 0) + self._record.get("total_bytes_down", 0)
        shown = self._metric if self._metric is not None or loss is None else f"loss {loss:.4g}"
        return [*([Part(2, shown)] if shown else []), *([Part(3, decimal(num_bytes))] if num_bytes else [])]


def duration(seconds: float) -> str:
    """Return a time such as ``"0:03:10"``."""
    return str(timedelta(seconds=round(seconds)))


def fitting(parts: Sequence[Part], columns: int) -> str:
    """Join the parts of lowest rank, as many as fit, in the order in which they are given."""
    ranked = sorted(parts, key=lambda part: part.rank)
    ends = itertools.accumulate(len(part.text) + 2 for part in ranked)
    kept = [part for part, end in zip(ranked, ends, strict=True) if end - 2 <= columns]
    return "  ".join(part.text for part in parts if part in kept)
