"""``gossamer node provision``: certificates, tokens and start-up kits of a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def provision(
    file: Annotated[Path, typer.Argument(metavar="FEDERATION.yaml", help="Name, hosts of the server, and nodes.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where the federation is kept; made if needed.")
    ],
    renew: Annotated[
        list[str] | None,
        typer.Option("--renew", metavar="NODE", help="Give a node a new kit, and refuse its old one; may be repeated."),
    ] = None,
    revoke: Annotated[
        list[str] | None,
        typer.Option("--revoke", metavar="NODE", help="Keep a node out until it is renewed; may be repeated."),
    ] = None,
) -> None:
    """Make a start-up kit for each node of a federation that has none; the last line is the directory."""
    from gossamer.transport.provisioning import provision as make

    for one in make(file, output, renew or (), revoke or ()):
        until = "kept out" if one.state == "revoked" else f"expires {one.expires}"
        typer.echo(f"{one.node:<20} {one.kind:<7} {one.state:<8} {until:<19} {one.kit or ''}".rstrip())
    typer.echo(output)
