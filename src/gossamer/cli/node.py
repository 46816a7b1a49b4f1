"""The command line of machines that keep their data: ``gossamer node server | client | status | ...``."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.following import Quiet, follow, plan_of, to_stderr
from gossamer.cli.plug_ins import Trust, plug_ins
from gossamer.cli.provision import provision
from gossamer.errors import ConfigError

if TYPE_CHECKING:
    from gossamer.engines.task import Task
    from gossamer.experiment import Hooks, Run

app = typer.Typer(no_args_is_help=True, help="Train with machines that keep their data to themselves.")

app.command()(provision)

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
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory; a run that is there goes on. Default: runs/<name>-<time>."),
    ] = None,
    quiet: Quiet = False,
    trust: Trust = False,
) -> None:
    """Be the server: run an experiment with clients that dial; the last line of the output is its directory."""
    from gossamer import experiment
    from gossamer.storage.runlog import CONFIG, EXPERIMENT

    changes = ["engine.name=network", f"engine.address={listen}"]
    begun = out if out is not None and any((out / name).exists() for name in (CONFIG, EXPERIMENT)) else None

    def start(hooks: Hooks) -> Run:
        """Run, or go on."""
        if begun is not None:
            return experiment.resume(begun, hooks, changes)
        return experiment.run(file, [*(overrides or ()), *changes], out, hooks)

    with plug_ins(trust):
        follow(start, lambda: plan_of(file, overrides), quiet)


@app.command()
def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server to dial.")],
    number: Annotated[
        int | None, typer.Option("--id", metavar="K", help="Number of this client, with --data; default: 0.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Its own data: a folder, a .csv, .parquet or .npz file, or module:attr."),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(metavar="K,...", help="Be these clients, each with its part of the experiment's own data."),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of this node; default: client-K.")] = None,
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
    trust: Trust = False,
) -> None:
    """Be a client: dial the server, and train for it until the run is over."""
    if (simulate is None) == (data is None) or (simulate is not None and number is not None):
        raise ConfigError("a client has its own data, or a part of the experiment's: give --data SPEC, or --simulate K")
    clients = [number or 0] if simulate is None else _numbers(simulate)
    with plug_ins(trust, own=trust):
        _take_part(
            server,
            name or f"client-{clients[0]}",
            clients=clients,
            make_task=_task_maker(clients[0], data),
            directory=directory,
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


def _take_part(server: str, name: str, **options: Any) -> None:
    """Be a node of a server, see `ClientNode`."""
    from gossamer.engines.network.client import ClientNode
    from gossamer.engines.network.processes import SECRET
    from gossamer.engines.stopping import stop_on_signals
    from gossamer.transport import Client

    def dial(hello: Mapping[str, Any], seconds: float) -> Client:
        """Join the server."""
        return Client(server, name=name, hello=hello, timeout_seconds=seconds)

    secret = os.environ.pop(SECRET, "")
    with stop_on_signals() as stop:
        ClientNode(dial=dial, secret=secret, tell=to_stderr, stop=stop, **options).run()


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


def _task_maker(client: int, data: str | None) -> Callable[[Mapping[str, Any]], Task]:
    """Return what rebuilds the task of a resolved configuration, with data of the client's own if it has some."""
    import torch

    from gossamer.engines.memory import keep_freed_memory
    from gossamer.task import held_task_of, task_of
    from gossamer.workloads.held import spec_of

    torch.set_num_threads(1)
    keep_freed_memory()
    if data is None:
        return task_of
    dataset = spec_of(data)
    return lambda config: held_task_of(config, client, dataset)
