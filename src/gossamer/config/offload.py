"""The section ``offload``: which stage a side-car does, as which device; and what it is refused for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from gossamer.errors import ConfigError, nearest
from gossamer.options import Options
from gossamer.profiling.devices import Device, is_path, read_device
from gossamer.profiling.offload import Costs, Offload, Stage, costs_of, stage_of_kind

IN_ENGINE = ("aggregate", "mix", "compress")  # stages that an engine hands over; the others are the run's own
STORED = ("checkpoint", "checksum", "log")
ENGINES = {"local": (*IN_ENGINE, *STORED), "ray": ("aggregate", *STORED)}  # which of them hands over what

ABSENT = {  # why a run does not have a stage
    "aggregate": "peers have no server that aggregates in this experiment",
    "mix": "clients of a server do not mix in this experiment",
    "compress": "nothing that is sent in this experiment goes through a codec",
}


class OffloadOptions(Options):
    """A stage that a side-car process does in the place of the run's own ones; it changes no bits.

    Attributes:
        stage: aggregate (what clients return, at their server), mix (peers' rows), compress (what a codec makes of
            what participants send), checksum (of the files of a commit), checkpoint or log.
        device: what the side-car stands for: the name of a device that ships here (``gossamer offload``), or the path
            of a YAML file.
        engine: accelerator of the device that does the stage; None: one that can, or else the device's cores.
    """

    stage: Literal["aggregate", "mix", "compress", "checksum", "checkpoint", "log"]
    device: str
    engine: str | None = None

    def with_absolute_path(self) -> OffloadOptions:
        """Return the same with the device's file, if it is one, named from the root."""
        if not is_path(self.device):
            return self
        return self.model_copy(update={"device": str(Path(self.device).absolute())})


def require_plain_commits(options: OffloadOptions | None, stored_arrays: Collection[str]) -> None:
    """Refuse commits by a side-car where clients keep private state, whose files follow a commit.

    Raises:
        ConfigError: they do.
    """
    if options is not None and options.stage == "checkpoint" and stored_arrays:
        raise ConfigError(
            f"offload.stage = 'checkpoint', but clients keep private state ({', '.join(stored_arrays)}), the files of"
            " which follow each commit: choose another stage, or leave offload out"
        )


def offload_of(options: OffloadOptions | None) -> Offload | None:
    """Return the stage, and what it costs on the device; None: no stage is moved.

    Raises:
        ConfigError: the device is unknown, lacks the engine, or is quicker than this machine can be.
    """
    if options is None:
        return None
    device, stage = read_device(options.device), stage_of_kind(options.stage)
    engine = device.engine_for((options.stage,), stage.direction) if stage.direction else None
    if options.engine is not None and options.engine != engine:
        known = f"its engines are {', '.join(device.engines)}" if device.engines else "it has no engines"
        raise ConfigError(
            f"offload.engine = {options.engine!r}, but device {device.name!r} has no such engine for"
            f" {options.stage}{nearest(options.engine, device.engines)} ({known}): leave offload.engine out"
        )
    return Offload(stage, _emulated(device, stage, options.stage))


def engine_offload(options: OffloadOptions | None) -> Offload | None:
    """Return the stage if it is one that an engine hands over, see `offload_of`."""
    return offload_of(options) if options is not None and options.stage in IN_ENGINE else None


def stored_offload(options: OffloadOptions | None) -> Offload | None:
    """Return the stage if it is one that the run itself hands over, see `offload_of`."""
    return offload_of(options) if options is not None and options.stage not in IN_ENGINE else None


def _emulated(device: Device, stage: Stage, kind: str) -> Costs:
    """Return the costs at the device's values."""
    costs = costs_of(device, stage, (kind,), {})
    if costs.engine is None and costs.slowdown < 1:
        raise ConfigError(
            f"device {device.name!r} does {kind} {1 / costs.slowdown:.3g} times as quickly as this machine"
            f" ({stage.slowdown} = {costs.slowdown:g}), which a process of this machine cannot emulate: judge it by"
            " gossamer offload, or give a slowdown of 1 or more"
        )
    return costs


def require_offload(config: Any, *, has_codec: bool) -> None:
    """Refuse a stage that the run does not have, or whose engine cannot hand it over.

    Args:
        config: the run's configuration.
        has_codec: whether a codec compresses what participants send.

    Raises:
        ConfigError: see above, and `offload_of`.
    """
    options: OffloadOptions | None = config.offload
    if options is None:
        return
    engine, where = config.engine.name, f"offload.stage = {options.stage!r}"
    own = ("mix" if config.clients is None else "aggregate", *(["compress"] if has_codec else []), *STORED)
    if engine not in ENGINES:
        raise ConfigError(
            f"{where}, but engine {engine!r} hands nothing to a side-car: choose engine {' or '.join(ENGINES)}, or"
            " leave offload out"
        )
    possible = ", ".join(stage for stage in own if stage in ENGINES[engine])
    if options.stage not in own:
        raise ConfigError(f"{where}, but {ABSENT[options.stage]}: its stages are {possible}")
    if options.stage not in ENGINES[engine]:
        raise ConfigError(
            f"{where}, but engine {engine!r} hands it to no side-car, because actors on any machine do it, where what"
            f" they work on lies: choose engine local, or one of {possible}"
        )
    offload_of(options)
