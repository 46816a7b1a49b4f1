"""``gossamer offload calibrate``, beside ``gossamer offload DIR``, which `gossamer.cli.profile` has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gossamer.cli import profile

OF_RUNS = "DIR"


class Offload(TyperGroup):
    """Commands of ``gossamer offload``; what is none of them is the directory of a run, or an option of that."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command about runs in front where no other is named."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [OF_RUNS, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command, whose usage line does not name it twice."""
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == OF_RUNS else name, command, rest


app = typer.Typer(cls=Offload, help="Say what moving each stage of a recorded run to a SmartNIC would save.")
app.command(OF_RUNS)(profile.offload)


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Device file to write, as YAML.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Device whose numbers stand where none is read; default: measure this host."),
    ] = None,
    stress_ng: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="HOST CARD", help="Read slowdowns from stress-ng --metrics --yaml, written on each."),
    ] = None,
    doca_bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read an engine's throughput from doca_bench's CSV.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --doca-bench: column of the throughput.")
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="With --doca-bench: engine of the device.")] = "deflate",
    perftest: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Read the link from what ib_write_bw or ib_write_lat printed; repeatable."),
    ] = None,
) -> None:
    """Measure this host, or take over what tools measured on a card, and write a device file."""
    from gossamer.errors import ConfigError
    from gossamer.profiling import calibration

    if output.exists():
        raise ConfigError(f"{str(output)!r} exists: choose another file, or remove it")
    if doca_bench is None and column is not None:
        raise ConfigError(f"--column {column} changes nothing without --doca-bench: give both, or neither")
    numbers = {} if stress_ng is None else calibration.read_stress_ng(*stress_ng)
    for path in perftest or []:
        numbers |= calibration.read_perftest(path)
    throughput = {} if doca_bench is None else {engine: calibration.read_doca_bench(doca_bench, column)}
    made = calibration.made_device(output.stem, base, numbers, throughput)
    calibration.write_device(output, made)
    typer.echo(output)
