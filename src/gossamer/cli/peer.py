"""``gossamer node peer`` and ``gossamer node observer``: a decentralized run between machines, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.following import Quiet, run_or_go_on
from gossamer.cli.plug_ins import Trust
from gossamer.errors import ConfigError

File = Annotated[Path, typer.Argument(metavar="FILE", help="Experiment as YAML, the same at all peers.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Entries to replace, the same at all peers.")
]
Addresses = Annotated[
    Path,
    typer.Option(
        "--peers", metavar="ADDRESSES.yaml", help="HOST:PORT of all peers; or a folder that those of one machine share."
    ),
]
Listen = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="Where others dial; port 0: any that is free. Default: as in ADDRESSES.yaml."
    ),
]
KitFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="This node's start-up kit, see provision; needed beyond this machine."),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Run directory; a run that is there goes on. Default: runs/<name>-<time>."),
]
Number = Annotated[
    int | None, typer.Option("--id", metavar="K", help="Number of this peer, from 0 on; default: that of the kit.")
]

Data = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Its own data: a folder, a .csv, .parquet or .npz file, or module:attr. Default: its part of FILE's.",
    ),
]


def peer(
    file: File,
    peers: Addresses,
    overrides: Overrides = None,
    number: Number = None,
    data: Data = None,
    listen: Listen = None,
    kit: KitFolder = None,
    out: Out = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Be a peer: train its own model, and exchange it with its neighbours; the last line is its run directory."""
    if number is None:
        if kit is None:
            raise ConfigError("which peer this is is not known: give --id K, or the --kit DIR of a peer")
        from gossamer.transport.authentication import load_kit

        number = load_kit(kit, "peer").number
    changes = [f"engine.peer={number}", *_changes(peers, listen, kit)]
    if data is not None:
        from gossamer.workloads.held import spec_of

        changes.append(f"engine.data={json.dumps(spec_of(data))}")
    run_or_go_on(file, overrides or (), changes, out, quiet, trust)


def observer(
    file: File,
    peers: Addresses,
    overrides: Overrides = None,
    listen: Listen = None,
    kit: KitFolder = None,
    out: Out = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Collect what all peers become: log, evaluate and keep the mean of their models; it trains nothing."""
    run_or_go_on(file, overrides or (), _changes(peers, listen, kit), out, quiet, trust)


def _changes(peers: Path, listen: str | None, kit: Path | None) -> list[str]:
    changes = ["engine.name=network", f"engine.peers_file={peers.absolute()}"]
    changes += [] if listen is None else [f"engine.address={listen}"]
    return changes + ([] if kit is None else [f"engine.kit={kit.absolute()}"])
