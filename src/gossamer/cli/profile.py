"""Commands that read the trace of a run: ``gossamer profile | offload``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run that was recorded, by gossamer run --profile.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def profile(
    directory: Run,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Draw a round as .png, .svg or .pdf.")
    ] = None,
    chrome: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the trace as JSON for chrome://tracing.")
    ] = None,
    perfetto: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the trace for ui.perfetto.dev; needs perfetto.")
    ] = None,
    goal: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the trace as GOAL, for LogGOPSim.")] = None,
    chakra: Annotated[
        Path | None, typer.Option(metavar="PREFIX", help="Write PREFIX.<rank>.et, Chakra execution traces.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="N,M,...", help="Extrapolate to so many participants a round, instead.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --scale: workers; default: as recorded.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show where the time of a recorded run went: by stage, along the critical path, and by process."""
    from gossamer.errors import ConfigError
    from gossamer.profiling import exports
    from gossamer.profiling.chakra import write_chakra
    from gossamer.profiling.trace import read_trace
    from gossamer.reports import profile as reports
    from gossamer.reports import scaling
    from gossamer.reports.images import require_image

    if output is not None:
        require_image(output)
    if scale is None and workers is not None:
        raise ConfigError(f"--workers {workers} changes nothing without --scale: give both, or neither")
    given = {"chrome": chrome, "perfetto": perfetto, "goal": goal, "chakra": chakra}
    exported = [name for name, path in given.items() if path]
    if scale is not None and exported:
        raise ConfigError(f"--{exported[0]} exports the recorded trace, and --scale extrapolates it: give one of them")
    sizes = None if scale is None else scaling.parse_sizes(scale)
    trace = read_trace(directory)
    if sizes is not None:
        found = scaling.scale(directory, trace, sizes, workers)
        typer.echo(scaling.render(found, as_json))
        if output is not None:
            typer.echo(scaling.draw(found, output), err=as_json)
        return
    typer.echo(reports.render(reports.examine(trace), as_json))
    writers = (exports.write_chrome, chrome), (exports.write_perfetto, perfetto), (exports.write_goal, goal)
    for write, path in writers:
        if path is not None:
            write(trace, path)
            typer.echo(path, err=as_json)
    for path in () if chakra is None else write_chakra(trace, chakra):
        typer.echo(path, err=as_json)
    if output is not None:
        typer.echo(reports.draw_timeline(trace, output), err=as_json)


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
    as_json: AsJson = False,
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
    found, stages = read_device(device), STAGES if stage is None else (stage_named(stage),)
    trace = read_trace(directory)
    verdicts = reports.offload(trace, found, stages)
    if stage is not None and not verdicts:
        raise ConfigError(f"no span of stage {stage!r} was recorded in {str(directory)!r}: leave out --stage")
    typer.echo(reports.render_offload(verdicts, found, as_json))
    if output is not None and verdicts:
        drawn = reports.draw_offload(trace, found, stage_named(verdicts[0].stage), output)
        typer.echo(drawn, err=as_json)
