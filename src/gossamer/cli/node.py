"""The command line of machines that keep their data: ``gossamer node server | client | status | ...``."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.following import Quiet, run_or_go_on, to_stderr
from gossamer.cli.peer import observer, peer
from gossamer.cli.plug_ins import Trust, plug_ins
from gossamer.cli.provision import provision
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.engines.task import Task
    from gossamer.transport.authentication import Kit
    from gossamer.transport.policy import Policy

app = typer.Typer(no_args_is_help=True, help="Train with machines that keep their data to themselves.")

app.command()(provision)
app.command()(peer)
app.command()(observer)

KitFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="This node's start-up kit, see provision; needed beyond this machine."),
]
ServerAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="The server to dial; default: that of the kit.")
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What the server may ask for; default: all that gossamer includes."),
]
Number = Annotated[
    int | None,
    typer.Option("--id", metavar="K", help="Number of this client, with --data; default: that of the kit, or 0."),
]
Simulated = Annotated[
    str | None, typer.Option(metavar="K,...", help="Be these clients, each with its part of the experiment's own data.")
]
TraceFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Record where the time goes, into a folder; for gossamer profile."),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def server(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Experiment as YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Entries to replace, such as train.lr=0.1.")
    ] = None,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where clients dial; port 0: any that is free.")
    ] = "127.0.0.1:8443",
    kit: KitFolder = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory; a run that is there goes on. Default: runs/<name>-<time>."),
    ] = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Be the server: run an experiment with clients that dial; the last line of the output is its directory."""
    changes = ["engine.name=network", f"engine.address={listen}"]
    changes += [] if kit is None else [f"engine.kit={kit.absolute()}"]
    run_or_go_on(file, overrides or (), changes, out, quiet, trust)


@app.command()
def client(
    server: ServerAddress = None,
    kit: KitFolder = None,
    policy: PolicyFile = None,
    number: Number = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Its own data: a folder, a .csv, .parquet or .npz file, or module:attr."),
    ] = None,
    simulate: Simulated = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name; default: that of the kit, or client-K.")
    ] = None,
    directory: Annotated[
        Path, typer.Option(metavar="DIR", help="Where private state is kept from round to round.")
    ] = Path("gossamer-node"),
    patience: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long to look for a server that is away; default: for ever."),
    ] = None,
    linger: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for another run after one has ended.")
    ] = 10.0,
    profile: TraceFolder = None,
    trust: Trust = False,
) -> None:
    """Be a client: dial the server, and train for it until the run is over."""
    if (simulate is None) == (data is None) or (simulate is not None and number is not None):
        raise ConfigError("a client has its own data, or a part of the experiment's: give --data SPEC, or --simulate K")
    if trust and policy is not None:
        raise ConfigError(f"--trust lets the server ask for anything, and --policy {policy} does not: give one of them")
    from gossamer.transport.authentication import load_kit
    from gossamer.transport.policy import Policy

    own = None if kit is None else load_kit(kit, "client")
    clients = [(own and own.number) or 0 if number is None else number] if simulate is None else _numbers(simulate)
    rules = None if trust else Policy.load(policy)
    with plug_ins(trust, own=trust or rules != Policy() or ":" in (data or "")):
        _take_part(
            server,
            name,
            own,
            profile,
            clients=clients,
            make_task=_task_maker(clients[0], data, rules),
            directory=directory,
            policy=rules,
            patience_seconds=math.inf if patience is None else patience,
            linger_seconds=linger,
            is_simulated=data is None,
        )


@app.command()
def status(directory: RunDirectory, as_json: Json = False) -> None:
    """Show who is there, and whom a server of this machine waits for."""
    from gossamer.engines.network import state

    found = state.read(directory)
    typer.echo(json.dumps(found) if as_json else state.render(found))


@app.command()
def stop(directory: RunDirectory) -> None:
    """Ask a server of this machine to stop; what is done is committed, and the same ``server`` command goes on."""
    from gossamer.engines.network import state

    os.kill(state.read(directory)["process"], signal.SIGTERM)


def _take_part(server: str | None, name: str | None, kit: Kit | None, trace: Path | None, **options: Any) -> None:
    """Be a node of a server, see `ClientNode`.

    Raises:
        ConfigError: no server is named, or the kit is another node's.
    """
    from gossamer.engines.network.children import SECRET
    from gossamer.engines.network.client import ClientNode
    from gossamer.engines.stopping import stop_on_signals
    from gossamer.errors import storage_errors
    from gossamer.profiling.recorder import recording
    from gossamer.transport import Client
    from gossamer.transport.audit import AUDIT, AuditLog

    address = server or (None if kit is None else kit.server)
    node = name or (f"client-{options['clients'][0]}" if kit is None else kit.node)
    if address is None:
        raise ConfigError("no server is named: give --server HOST:PORT, or the --kit DIR of a federation that has one")
    if kit is not None and node != kit.node:
        raise ConfigError(f"--name {node} is not the name of the kit, {kit.node!r}: leave it out")
    with storage_errors(options["directory"]):
        options["directory"].mkdir(parents=True, exist_ok=True)

    def dial(hello: Mapping[str, Any], seconds: float) -> Client:
        """Join the server."""
        credentials = None if kit is None else kit.credentials()
        return Client(
            address, name=node, hello=hello, credentials=credentials, audit=log.record, timeout_seconds=seconds
        )

    secret = os.environ.pop(SECRET, "")
    with closing(AuditLog(options["directory"] / AUDIT)) as log, stop_on_signals() as stop, recording(trace, "client"):
        ClientNode(dial=dial, secret=secret, tell=to_stderr, stop=stop, audit=log.record, **options).run()


def _numbers(given: str) -> list[int]:
    """Return the numbers of clients.

    Raises:
        ConfigError: they are none.
    """
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        raise ConfigError(f"--simulate {given!r}: give numbers of clients, such as 3 or 0,1,2") from None
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise ConfigError(f"--simulate {given!r}: give every client once, by its number from 0 on")
    return numbers


def _task_maker(client: int, data: str | None, policy: Policy | None) -> Callable[[Mapping[str, Any]], Task]:
    """Return what rebuilds the task of a resolved configuration, with data of the client's own if it has some.

    Args:
        policy: what is refused; None: nothing.
    """
    import torch

    from gossamer.memory import keep_freed_memory
    from gossamer.task import held_task_of, task_of
    from gossamer.workloads.held import spec_of

    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = None if data is None else spec_of(data)
    chosen = dataset.get("name") if isinstance(dataset, Mapping) else dataset

    def make(config: Mapping[str, Any]) -> Task:
        """Rebuild the task."""
        return task_of(config) if data is None else held_task_of(config, client, dataset)

    def make_within(config: Mapping[str, Any]) -> Task:
        """Rebuild the task, if the policy accepts it."""
        assert policy is not None
        policy.check(config, own=() if data is None else ("workload.dataset", "clients.partition"))
        with policy.enforced(own=[chosen] if isinstance(chosen, str) else []):
            return make(config)

    return make if policy is None else make_within
