"""The command line of topologies: ``gossamer topology list | show | measure``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.plug_ins import Trust, plug_ins
from gossamer.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="List, describe and measure the graphs on which peers mix.")

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="Name of a topology, or path of a YAML file, of GraphML or of a list of edges."
    ),
]
Peers = Annotated[int | None, typer.Option("-n", metavar="N", help="Number of peers; not needed with a file.")]
Parameters = Annotated[
    list[str] | None, typer.Option("-p", metavar="KEY=VALUE", help="A parameter, such as -p M=9; may be repeated.")
]
TopologySeed = Annotated[
    int | None, typer.Option("--seed", metavar="S", help="Seed of all draws; default: that of the file, or 0.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command("list")
def list_topologies(as_json: Json = False) -> None:
    """List all topologies with kind, degree, minimum n and consensus rate."""
    from gossamer.topology import report

    rows = report.catalogue()
    typer.echo(_json(rows) if as_json else report.render_catalogue(rows))


@app.command()
def show(
    name: Name,
    n: Peers = None,
    parameters: Parameters = None,
    seed: TopologySeed = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also draw this .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Describe a topology: degree, symmetry, consensus rate and bound, period, spectrum; and draw it."""
    from gossamer.topology import drawing, find, report

    with plug_ins(trust, own=trust):
        topology = find(name, _parse(parameters, n, seed))
    if output is not None:
        from gossamer.reports.images import require_image, save

        require_image(output)
    facts = report.describe(topology)
    typer.echo(_json(facts) if as_json else report.render(facts))
    if output is not None:
        typer.echo(save(lambda: drawing.draw(topology), output), err=as_json)


@app.command()
def measure(
    name: Name,
    n: Peers = None,
    parameters: Parameters = None,
    rounds: Annotated[int, typer.Option(metavar="R", help="Maximum number of rounds.")] = 1000,
    seed: TopologySeed = None,
    as_json: Json = False,
    trust: Trust = False,
) -> None:
    """Mix a random vector until all peers agree to 1e-10, and compare the rate with the bound."""
    from gossamer.topology import find, report

    with plug_ins(trust, own=trust):
        topology = find(name, _parse(parameters, n, seed))
    facts = report.measured(topology, rounds, start_seed=topology.seed)
    typer.echo(_json(facts) if as_json else report.render(facts))


def _parse(parameters: list[str] | None, n: int | None, seed: int | None) -> dict[str, Any]:
    """Return ``KEY=VALUE`` words, n and seed as a mapping, with values parsed as YAML.

    Raises:
        ConfigError: a word is not of this form.
    """
    from gossamer.storage.strict_yaml import parse_yaml

    parsed: dict[str, Any] = {"n": n, "seed": seed}
    for word in parameters or ():
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise ConfigError(f"parameter {word!r} is not of the form KEY=VALUE: write -p M=9")
        if parsed.get(key) is not None:
            raise ConfigError(f"parameter {word!r} gives {key} twice: keep one of them")
        parsed[key] = parse_yaml(value, f"parameter {word!r}")
    return parsed


def _json(found: Any) -> str:
    import json

    return json.dumps(found, indent=2)
