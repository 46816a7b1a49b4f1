"""Commands that read what runs left: ``gossamer export``."""

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
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file.")] = False,
    trust: Trust = False,
) -> None:
    """Write the model of a run's last commit, moments of BatchNorm included; the last line is the file's path."""
    from gossamer.results.export import export as write
    from gossamer.results.loading import load

    with plug_ins(trust):
        loaded = load(directory, run=run, trust=trust)
        typer.echo(write(loaded, output, capacity=capacity, peer=peer, force=force))
