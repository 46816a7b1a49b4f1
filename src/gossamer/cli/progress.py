"""Progress: a bar over the rounds of the current run on a terminal, a line now and then in a pipe or a log file.

Both draw on reports of progress, never from a thread of their own, because engines fork workers meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from gossamer.reports.progress import Display, Part, Plan, RunObserver, fitting

REFRESH_SECONDS = 0.1
LINE_SECONDS = 5.0  # least time between two lines
MIN_BAR = 8  # columns
ROOM_BELOW = 4  # lines of the terminal that a table leaves free
COLUMNS = ("client", "name", "samples", "state", "heard", "sent", "received")
TITLE_SHARE = 0.4  # of the columns, at most


class ProgressLines(Display):
    """Prints a line every few seconds, and one at the end of each run: plain text, for pipes and log files."""

    def __init__(self, plan: Callable[[], Plan], write: Callable[[str], None]) -> None:
        """Prepare; `plan` is asked when the first run starts."""
        super().__init__()
        self._plan, self._write, self._written_at = plan, write, time.monotonic()

    def observer(self, name: str, num_rounds: int) -> RunObserver:
        """Start the next run, and return the observer that shows it."""
        self.plan = self.plan or self._plan()
        return super().observer(name, num_rounds)

    def show(self, name: str, rounds: float, num_rounds: int, parts: Sequence[Part]) -> None:
        """Write a line, unless the last one is fresh."""
        if time.monotonic() - self._written_at >= LINE_SECONDS:
            self.print(f"{self.title(name)}: {', '.join(part.text for part in parts)}")

    def print(self, line: str) -> None:
        """Write a line."""
        self._written_at = time.monotonic()
        self._write(line)


class _BarsBelowClients(Progress):
    """Bars, and above them a table of clients, if there is one."""

    clients: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the table and the bars."""
        if self.clients is not None:
            yield self.clients
        yield from super().get_renderables()


def clients_table(rows: Sequence[Mapping[str, Any]], most: int) -> Table:
    """Return a table of real clients, see `gossamer.engines.network.state.table_of`, of `most` rows at most.

    Those who are away come first, then those at work.
    """
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("name", "state") else "right")
    shown = sorted(rows, key=lambda row: ("away", "at work", "idle").index(row["state"]))[: max(1, most)]
    for row in sorted(shown, key=lambda row: int(row["client"])):
        sizes = (f"{row[name] / 1e6:,.1f} MB" for name in ("bytes_up", "bytes_down"))
        texts = (
            str(row["client"]),
            row["name"],
            f"{row['samples']:,}",
            row["state"],
            f"{row['heard_seconds']:.0f} s ago",
        )
        table.add_row(*map(Text, (*texts, *sizes)))
    if len(shown) < len(rows):
        table.add_row("...", f"{len(rows) - len(shown)} more")
    return table


class ProgressDisplay(Display):
    """Draws one run's bar at a time on a terminal."""

    def __init__(self, plan: Plan, console: Console) -> None:
        """Prepare the bars of the runs of `plan` on `console`."""
        super().__init__()
        self.plan, self._drawn_at = plan, 0.0
        self._bars = _BarsBelowClients(
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
        self._bar = self._bars.add_task(self.title("preparing"), total=1, status="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def observer(self, name: str, num_rounds: int) -> RunObserver:
        """Start the next run's bar, and return the observer that fills it."""
        made = super().observer(name, num_rounds)
        self._show(description=self._fitting_title(name), total=num_rounds, completed=0, status="", force=True)
        return made

    def show(self, name: str, rounds: float, num_rounds: int, parts: Sequence[Part]) -> None:
        """Fill the bar up to `rounds`, and show beside it as many of `parts` as there is room for."""
        title = self._fitting_title(name)
        room = self._bars.console.width - len(title) - MIN_BAR - 2
        self._show(description=title, completed=rounds, status=fitting(parts, room))

    def clients(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Draw a table of real clients above the bar."""
        self._bars.clients = clients_table(rows, self._bars.console.height - ROOM_BELOW) if rows else None
        self._bars.refresh()

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._bars.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def end(self, summary: str, gained: float, seconds: float) -> None:
        """Print the line of a run that has ended above the bar."""
        super().end(summary, gained, seconds)
        if self.index < len(self.plan):
            self._show(description=self._fitting_title("preparing"), completed=0, status="", force=True)

    def _fitting_title(self, name: str) -> str:
        title, most = self.title(name), max(MIN_BAR, int(TITLE_SHARE * self._bars.console.width))
        return title if len(title) <= most else f"{title[: most - 1]}…"

    def _show(self, force: bool = False, **fields: Any) -> None:
        self._bars.update(self._bar, **fields)
        if force or time.monotonic() - self._drawn_at >= REFRESH_SECONDS:
            self._bars.refresh()
            self._drawn_at = time.monotonic()
