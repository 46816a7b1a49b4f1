"""The command line: ``gossamer run | resume | sweep | plot | coverage | describe | profile | offload | node ...``.

Results go to standard output, everything else to standard error: progress is a bar on a terminal, else a line now and
then.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gossamer.cli import node, offload, profile, results, topology
from gossamer.cli.following import Quiet, follow, plan_of, to_stderr, warnings_to
from gossamer.cli.plug_ins import Trust, plug_ins
from gossamer.errors import GossamerError

CLOSED_PIPE = 141  # exit code where whoever read the output is gone: 128 + SIGPIPE, as shells have it


class Commands(TyperGroup):
    """The commands; a `GossamerError` becomes one line and the exit code, a `GossamerWarning` one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse arguments without text, such as those of a shell's variable that is not set, which would be paths."""
        for before, one in zip(["", *args], args, strict=False):
            if not one or (one.startswith("--") and one.endswith("=")):
                ctx.fail(f"There is no text {f'after {before!r}' if not one else f'in {one!r}'}: give a value.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with warnings_to(to_stderr):
                return super().invoke(ctx)
        except GossamerError as error:
            to_stderr(re.sub(r"\S{500,}", lambda word: f"{word[0][:200]}...", f"error: {error}"))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("error: interrupted", err=True)
            raise typer.Exit(130) from None


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Train one model over many machines that do not share their data.",
)

app.add_typer(topology.app, name="topology")
app.add_typer(node.app, name="node")
app.add_typer(offload.app, name="offload")


def _print_version(asked: bool) -> None:
    if asked:
        from gossamer import __version__

        typer.echo(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Accept the options before a command."""


Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="Where gradients are computed, such as cuda; for engine.device=NAME.")
]
Directories = Annotated[list[Path], typer.Argument(metavar="DIR", help="Run directories, or directories of runs.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Experiment as YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Entries to replace, such as train.lr=0.1.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to train; short for engine.name=NAME.")
    ] = None,
    device: Device = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Drop again whom the clock dropped in this run of real clients, or in peers' runs below.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run directory; default: runs/<name>-<time>.")] = None,
    recorded: Annotated[
        bool, typer.Option("--profile", help="Record where the time goes; for gossamer profile.")
    ] = False,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Run an experiment; the last line of the output is its directory."""
    from gossamer import experiment

    changes = _changes(overrides, engine, device)
    changes += [] if replay is None else [f"replay={replay}"]
    changes += ["profile=true"] if recorded else []
    with plug_ins(trust):
        follow(lambda hooks: experiment.run(file, changes, out, hooks), lambda: plan_of(file, changes), quiet)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run or an experiment that was stopped.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Engine entries to replace, or rounds=400."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to train from now on; short for engine.name=NAME.")
    ] = None,
    device: Device = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Train anew, and erase the log of, a run that cannot be continued."),
    ] = False,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Continue a run from its last commit, or all unfinished runs of an experiment."""
    from gossamer import experiment
    from gossamer.storage.runlog import EXPERIMENT

    changes = _changes(overrides, engine, device)
    whole = directory / EXPERIMENT
    with plug_ins(trust):
        follow(
            lambda hooks: experiment.resume(directory, hooks, changes, restart),
            lambda: plan_of(whole) if os.path.exists(whole) else {},
            quiet,
        )


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Experiment as YAML.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=A,B,...", help="What to vary, such as train.lr=0.1,0.01.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Seeds of every combination; default: those of the experiment."),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="ray: in parallel, one CPU a run; local: one after another.")
    ] = "ray",
    device: Device = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory of new or unfinished runs.")] = None,
    parallel: Annotated[
        int | None, typer.Option(metavar="N", help="Maximum number of parallel runs; default: one for each CPU.")
    ] = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Run every combination of settings with every seed; prints one table, and as its last line the directory."""
    from gossamer import sweep as sweeps

    progress = (lambda row: None) if quiet else (lambda row: to_stderr(sweeps.line(row)))
    with plug_ins(trust):
        found = sweeps.sweep(
            file, _changes(settings, None, device), sweeps.parse_seeds(seeds), engine, out, parallel, progress
        )
    typer.echo(sweeps.summarize(found))
    typer.echo(found.directory)
    sweeps.require_all_done(found)


@app.command()
def plot(
    directories: Directories,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Image to write: .png, .svg or .pdf.")],
    x: Annotated[
        str | None,
        typer.Option(
            "--x", metavar="AXIS", help="round (the default), seconds, simulated, bytes, flops, samples or tokens."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Key of the records, such as accuracy_by_capacity.0.25; default: accuracy."),
    ] = None,
    spec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Panels as YAML, instead of --x and --metric.")
    ] = None,
) -> None:
    """Draw convergence curves from logs; the last line of the output is the image's path."""
    from gossamer.reports import plots

    typer.echo(plots.plot(directories, x, metric, output, spec))


@app.command()
def coverage(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Experiment as YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Entries to replace, such as submodel.stride=4.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Number of rounds; default: that of the experiment.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also draw this .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust: Trust = False,
) -> None:
    """Show which channels and weights the windows of an experiment will reach, without running it."""
    from gossamer.reports import images, window_coverage

    if output is not None:
        images.require_image(output)
    with plug_ins(trust, own=trust):
        found = window_coverage.examine(file, overrides or (), rounds)
    typer.echo(window_coverage.render(found, as_json))
    if output is not None:
        typer.echo(window_coverage.draw(found, output))


@app.command()
def describe(
    kind: Annotated[str | None, typer.Argument(metavar="KIND", help="Such as algorithm, topology or config.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Such as fedavg, or module:attribute.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    trust: Trust = False,
) -> None:
    """Show what a configuration may name, and every option of it."""
    from gossamer.reports import reference

    with plug_ins(trust, own=trust):
        typer.echo(reference.as_json(kind, name) if as_json else reference.render(kind, name))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is installed, what this machine has, and what should be changed."""
    from gossamer.cli.doctor import examine, render

    typer.echo(render(examine(), as_json))


for command in (profile.profile, results.export, results.runs, results.table):
    app.command()(command)


def _changes(overrides: list[str] | None, engine: str | None, device: str | None) -> list[str]:
    given = {"engine.name": engine, "engine.device": device}
    return [*(overrides or ()), *(f"{key}={value}" for key, value in given.items() if value is not None)]


def main() -> None:
    """Entry point of the console script."""
    atexit.register(gc.freeze)  # or Python looks for cycles among all that was imported before it ends
    for name in ("stdin", "stdout", "stderr"):
        if vars(sys)[name] is None:  # it was closed by whoever started this: a file of the run would get its number
            vars(sys)[name] = os.fdopen(os.open(os.devnull, os.O_RDWR), "r+")
    for number in (signal.SIGTERM, signal.SIGHUP):  # until a run handles them, and in other commands
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        app(prog_name="gossamer")
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # of which click and rich make the code 1
            sys.exit(CLOSED_PIPE)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        typer.echo(f"error: cannot write the output ({error.strerror}): free space, or redirect it elsewhere", err=True)
        # Python flushes its buffers at exit: discard them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


if __name__ == "__main__":
    main()
