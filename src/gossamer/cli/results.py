"""Commands that read what runs left: ``gossamer export | runs | table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.plug_ins import Trust, plug_ins


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run, or a directory of runs.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File to write: .safetensors.")],
    run: Annotated[str | None, typer.Option(metavar="NAME", help="One of several runs, such as fedavg/seed-0.")] = None,
    capacity: Annotated[
        float, typer.Option(metavar="SHARE", help="The sub-model of this capacity, at the last round's windows.")
    ] = 1.0,
    peer: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="The model of this peer instead of the merged one.")
    ] = None,
    client: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="The model of this client, with the parameters it keeps.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file.")] = False,
    trust: Trust = False,
) -> None:
    """Write the model of a run's last commit, moments of BatchNorm included; the last line is the file's path."""
    from gossamer.results.export import export as write
    from gossamer.results.loading import load

    with plug_ins(trust):
        loaded = load(directory, run=run, trust=trust)
        typer.echo(write(loaded, output, capacity=capacity, peer=peer, client=client, force=force))


def runs(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs below a directory: running, finished, stopped or damaged, how far, and what they reached."""
    from gossamer.reports import listing

    typer.echo(listing.render(listing.list_runs(directory), as_json))


def table(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR", help="Run directories, or directories of runs.")],
    format: Annotated[str, typer.Option(metavar="NAME", help="text, csv, markdown or latex.")] = "text",
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Key of the records, such as accuracy_peers.min; default: accuracy."),
    ] = None,
    target: Annotated[
        float | None, typer.Option(metavar="VALUE", help="Also show the rounds and simulated seconds to this value.")
    ] = None,
) -> None:
    """Compare methods, a row each: mean and deviation over seeds of what they reached, and what that took."""
    from gossamer.reports import summary

    typer.echo(summary.render(directories, format, metric, target))
