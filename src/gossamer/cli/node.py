"""The command line of nodes: ``gossamer node provision``."""

from __future__ import annotations

import typer

from gossamer.cli.provision import provision

app = typer.Typer(no_args_is_help=True, help="Train between machines that trust each other by certificates only.")

app.command()(provision)
