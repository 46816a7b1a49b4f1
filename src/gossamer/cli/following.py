"""What a command that runs experiments shows: progress, warnings, and as its last line the directory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.plug_ins import plug_ins
from gossamer.errors import GossamerWarning

if TYPE_CHECKING:
    from gossamer.experiment import Hooks, Run
    from gossamer.reports.progress import Display, Plan

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress; warnings are shown all the same.")]


def to_stderr(line: str) -> None:
    """Write a line to standard error."""
    typer.echo(line, err=True)


@contextmanager
def warnings_to(write: Callable[[str], None]) -> Iterator[None]:
    """Give each `GossamerWarning` to `write`, as one line and once; other warnings are shown as before."""
    told, show_others = set[str](), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        """Show a warning."""
        line = f"warning: {message}"
        if not issubclass(category, GossamerWarning):
            show_others(message, category, *where, **more)
        elif line not in told:
            told.add(line)
            write(line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def follow(start: Callable[[Hooks], Run], plan: Callable[[], Plan], quiet: bool) -> None:
    """Start or resume runs, show their progress, and print their directory.

    Args:
        plan: returns the runs that there are to be, see `gossamer.reports.progress.Plan`.
        quiet: whether nothing but warnings is shown.
    """
    from gossamer.engines.collective.environment import is_leader
    from gossamer.experiment import Hooks

    display: AbstractContextManager[Display | None] = nullcontext()
    if not quiet and is_leader():
        from rich.console import Console

        from gossamer.cli.progress import ProgressDisplay, ProgressLines

        on_terminal = sys.stderr.isatty()
        display = ProgressDisplay(plan(), Console(stderr=True)) if on_terminal else ProgressLines(plan, to_stderr)
    with display as shown, warnings_to(to_stderr if shown is None else shown.print):
        finished = start(
            Hooks() if shown is None else Hooks(observer=shown.observer, tell=shown.print, show=shown.clients)
        )
    if not is_leader():
        return
    for one in finished.runs or [finished]:
        if one.stop_reason:
            name = f"{one.directory.relative_to(finished.directory)}: " if finished.runs else ""
            typer.echo(f"{name}ended after round {len(one.metrics)}: {one.stop_reason}", err=True)
    if finished.runs:
        from gossamer.reports import summary

        typer.echo(summary.render([finished.directory]))
    typer.echo(finished.directory)


def run_or_go_on(
    file: Path, overrides: Sequence[str], changes: Sequence[str], out: Path | None, quiet: bool, trust: bool
) -> None:
    """Run an experiment as `follow` does; go on with the run in `out`, if there is one.

    Args:
        file: experiment as YAML.
        overrides: ``key=value`` entries of a run that begins.
        changes: those of this process, whether the run begins or goes on.
        out: run directory; None: a new one.
        quiet: see `follow`.
        trust: whether any code may be named.
    """
    from gossamer import experiment
    from gossamer.storage.runlog import CONFIG, EXPERIMENT

    begun = out if out is not None and any((out / name).exists() for name in (CONFIG, EXPERIMENT)) else None

    def start(hooks: Hooks) -> Run:
        """Run, or go on."""
        if begun is not None:
            return experiment.resume(begun, hooks, changes)
        return experiment.run(file, [*overrides, *changes], out, hooks)

    with plug_ins(trust):
        follow(start, lambda: plan_of(file, list(overrides)), quiet)


def plan_of(file: Path, overrides: list[str] | None = None) -> Plan:
    """Return the runs of an experiment's file."""
    from gossamer.config import loading

    singles = loading.expand(loading.load(file, overrides or ()))
    return {name: rounds if isinstance(rounds := one.get("rounds"), int) else 0 for name, one in singles.items()}
