"""Commands that read the trace of a run: ``gossamer profile | offload``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli.plug_ins import Trust, plug_ins

if TYPE_CHECKING:
    from gossamer.profiling.trace import Trace

Runs = Annotated[
    list[Path],
    typer.Argument(
        metavar="DIR...", help="A run that was recorded, by gossamer run --profile; or several directories of nodes."
    ),
]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run that was recorded, by gossamer run --profile.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


Chrome = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the trace as JSON for chrome://tracing.")]
Perfetto = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the trace for ui.perfetto.dev; needs perfetto.")
]
Goal = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the trace as GOAL, for LogGOPSim.")]
Chakra = Annotated[
    Path | None, typer.Option(metavar="PREFIX", help="Write the trace for ASTRA-sim, as PREFIX.<rank>.et.")
]
Torch = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Add what torch.profiler exported to --chrome and --perfetto."),
]


def profile(
    directories: Runs,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Draw a round as .png, .svg or .pdf.")
    ] = None,
    chrome: Chrome = None,
    perfetto: Perfetto = None,
    goal: Goal = None,
    chakra: Chakra = None,
    torch: Torch = None,
    scale: Annotated[
        str | None, typer.Option(metavar="N,M,...", help="Extrapolate to so many participants a round, instead.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --scale: workers; default: as recorded.")
    ] = None,
    links: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --scale: each on a machine of its own, in this network (GraphML)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a recorded run went: by stage, along the critical path, and by process."""
    from gossamer.errors import ConfigError
    from gossamer.reports import profile as reports
    from gossamer.reports import scaling
    from gossamer.reports.images import require_image
    from gossamer.reports.nodes import read_nodes

    if output is not None:
        require_image(output)
    exports = {"chrome": chrome, "perfetto": perfetto, "goal": goal, "chakra": chakra}
    _require_effect(scale, {"workers": workers, "links": links}, torch, exports)
    sizes = None if scale is None else scaling.parse_sizes(scale)
    if sizes is not None and len(directories) > 1:
        raise ConfigError(f"--scale extrapolates one run, and {len(directories)} directories are given: give one")
    directory, trace = directories[0], read_nodes(directories)
    if sizes is not None:
        if links is None:
            found = scaling.scale(directory, trace, sizes, workers)
        else:
            found = scaling.deploy(directory, trace, sizes, links)
        typer.echo(scaling.render(found, as_json))
        if output is not None:
            typer.echo(scaling.draw(found, output), err=as_json)
        return
    typer.echo(reports.render(reports.examine(trace), as_json))
    for path in _export(directory, trace, exports, torch):
        typer.echo(path, err=as_json)
    if output is not None:
        typer.echo(reports.draw_timeline(trace, output), err=as_json)


def _require_effect(
    scale: str | None, of_scale: Mapping[str, int | Path | None], torch: Path | None, exports: Mapping[str, Path | None]
) -> None:
    """Refuse options that others leave without effect.

    Raises:
        ConfigError: there is one.
    """
    from gossamer.errors import ConfigError

    given = {name: value for name, value in of_scale.items() if value is not None}
    if scale is None and given:
        name, value = next(iter(given.items()))
        raise ConfigError(f"--{name} {value} changes nothing without --scale: give both, or neither")
    if len(given) > 1:
        raise ConfigError("--workers are of this machine, and with --links nobody trains here: give one of them")
    if torch is not None and exports["chrome"] is None and exports["perfetto"] is None:
        raise ConfigError(
            f"--torch {torch} changes nothing without --chrome or --perfetto: give one of them, or neither"
        )
    exported = [name for name, path in exports.items() if path is not None]
    if scale is not None and exported:
        raise ConfigError(f"--{exported[0]} exports the recorded trace, and --scale extrapolates it: give one of them")


def _export(directory: Path, trace: Trace, exports: Mapping[str, Path | None], torch: Path | None) -> Iterator[Path]:
    """Write a trace for other programs, and yield the files."""
    from gossamer.profiling.chakra import write_chakra
    from gossamer.profiling.exports import write_chrome, write_goal, write_perfetto
    from gossamer.profiling.torch_events import operations_of, place
    from gossamer.profiling.torch_recording import recorded_operations

    writers: dict[str, Callable[[Trace, Path], None]] = {"goal": write_goal}
    if exports["chrome"] is not None or exports["perfetto"] is not None:
        operations = place(trace, recorded_operations(directory)) if torch is None else operations_of(trace, torch)
        writers["chrome"] = partial(write_chrome, operations=operations)
        writers["perfetto"] = partial(write_perfetto, operations=operations)
    for name, path in exports.items():
        if path is not None and name == "chakra":
            yield from write_chakra(trace, path)
        elif path is not None:
            writers[name](trace, path)
            yield path


def offload(
    directory: Run,
    device: Annotated[str, typer.Option(metavar="NAME", help="A device that ships here, or the path of a YAML file.")],
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Judge this stage alone, such as aggregation or checkpoint.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Draw a round before and after, of the first stage."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the experiment some more, with a side-car that does the stage.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=3, metavar="N", help="With --verify: rounds of each of six runs; default: 9.")
    ] = None,
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Say what moving each stage of a recorded run to a SmartNIC would save, and how sure that is."""
    from gossamer.errors import ConfigError
    from gossamer.profiling.devices import read_device
    from gossamer.profiling.offload import STAGES, stage_named
    from gossamer.profiling.trace import read_trace
    from gossamer.reports import profile as reports
    from gossamer.reports.images import require_image

    if output is not None:
        require_image(output)
    for name, value in (("rounds", rounds), ("trust", trust or None)):
        if not verify and value is not None:
            raise ConfigError(f"--{name} changes nothing without --verify: give both, or neither")
    found, stages = read_device(device), STAGES if stage is None else (stage_named(stage),)
    trace = read_trace(directory)
    verdicts = reports.offload(trace, found, stages)
    if stage is not None and not verdicts:
        raise ConfigError(f"no span of stage {stage!r} was recorded in {str(directory)!r}: leave out --stage")
    if verify:
        from gossamer.cli.verify import render, stage_to_verify, verification

        kind = stage_to_verify(verdicts)
        with plug_ins(trust):
            typer.echo(render(verification(directory, device, kind, rounds or 9), kind, found.name, as_json))
        return
    typer.echo(reports.render_offload(verdicts, found, reports.delay_share(trace), as_json))
    if output is not None and verdicts:
        drawn = reports.draw_offload(trace, found, stage_named(verdicts[0].stage), output)
        typer.echo(drawn, err=as_json)
