"""What is known of a device to which work of a host could be moved, each number with bounds, source and tag."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigError, nearest
from gossamer.storage.strict_yaml import read_yaml

TAGS = ("measured", "vendor", "derived", "assumed")
UNITS = {  # of the numbers that every profile has
    "cores": "cores",
    "slowdown_cpu": "times",  # of a core of the device against one of the host, with cached arithmetic
    "slowdown_stream": "times",  # with streams through memory
    "slowdown_matrix": "times",  # with products of matrices
    "slowdown_copy": "times",  # with copies
    "slowdown_crypto": "times",  # with encryption
    "memory_bandwidth": "bytes/s",
    "link_bandwidth": "bytes/s",  # between host and device
    "link_latency": "s",
    "submit": "s",  # of the host's processor, for each piece of work handed over
    "line_rate": "bytes/s",  # of the network
}
ENGINE_UNITS = {"throughput": "bytes/s", "latency": "s", "start": "s"}
KEYS = ("value", "lo", "hi", "unit", "source", "tag")
DIRECTIONS = ("compress", "decompress", "encrypt", "decrypt", "checksum")


@dataclass(frozen=True)
class Number:
    """A number between bounds.

    Attributes:
        value, lo, hi: the number and its bounds.
        unit, source: of the number, and where it is from.
        tag: one of `TAGS`.
    """

    value: float
    lo: float
    hi: float
    unit: str
    source: str
    tag: str

    @property
    def is_assumed(self) -> bool:
        """Whether nobody measured it, or told it."""
        return self.tag == "assumed"


@dataclass(frozen=True)
class Accelerator:
    """Hardware for one kind of work.

    Attributes:
        kinds: stages that it can do.
        directions: in which, of `DIRECTIONS`.
        numbers: those of `ENGINE_UNITS`; ``start`` is taken once a run.
    """

    kinds: tuple[str, ...]
    directions: tuple[str, ...]
    numbers: dict[str, Number]


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        name, description: what it is.
        numbers: those of `UNITS`.
        engines: its accelerators.
    """

    name: str
    description: str
    numbers: dict[str, Number]
    engines: dict[str, Accelerator]

    def engine_for(self, kinds: Iterable[str], direction: str) -> str | None:
        """Return the name of the engine that does one of these stages in a direction; None: there is none."""
        wanted = set(kinds)
        found = (n for n, one in self.engines.items() if wanted & set(one.kinds) and direction in one.directions)
        return next(found, None)


def device_names() -> list[str]:
    """List the devices that ship here."""
    folder = resources.files("gossamer.profiling") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def is_path(name: str) -> bool:
    """Say whether the name of a device is the path of its file."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def read_device(name: str) -> Device:
    """Read a device that ships here by its name, or any other by the path of its YAML file.

    Raises:
        ConfigError: there is none, or a number lacks its unit, source, bounds or tag, or contradicts itself.
    """
    return device_of(f"device {name!r}", read_numbers(name))


def read_numbers(name: str) -> Any:
    """Read the file of a device, and check nothing in it.

    Raises:
        ConfigError: there is none.
    """
    if not is_path(name) and name not in (known := device_names()):
        raise ConfigError(
            f"unknown device {name!r}{nearest(name, known)} (known: {', '.join(known)}; or give the path of a"
            " YAML file)"
        )
    path = Path(name) if is_path(name) else resources.files("gossamer.profiling") / "profiles" / f"{name}.yaml"
    return read_yaml(path, "device")


def device_of(where: str, data: Any) -> Device:
    """Return the device that the content of a file describes.

    Args:
        where: what errors call it.

    Raises:
        ConfigError: see `read_device`.
    """
    allowed = {"name", "description", "numbers", "engines"}
    if not isinstance(data, Mapping) or not {"name", "description", "numbers"} <= data.keys() or data.keys() - allowed:
        raise ConfigError(f"{where} has other keys than {', '.join(sorted(allowed))}: correct the file")
    engines = data.get("engines") or {}
    if not isinstance(engines, Mapping):
        raise ConfigError(f"{where}: engines is no mapping: give each engine a name")
    return Device(
        str(data["name"]),
        str(data["description"]),
        _numbers(where, data["numbers"], UNITS),
        {str(key): _engine(f"{where}, engine {key!r}", value) for key, value in engines.items()},
    )


def _engine(where: str, data: Any) -> Accelerator:
    if not isinstance(data, Mapping) or data.keys() != {"kinds", "directions", "numbers"}:
        raise ConfigError(f"{where}: give it kinds, directions and numbers, and nothing else")
    directions, kinds = ([data[key]] if isinstance(data[key], str) else data[key] for key in ("directions", "kinds"))
    if not isinstance(directions, list) or not set(directions) <= set(DIRECTIONS):
        raise ConfigError(f"{where}: directions {directions!r} are none of {', '.join(DIRECTIONS)}: correct them")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ConfigError(f"{where}: kinds {kinds!r} is no list of names of stages: correct it")
    return Accelerator(tuple(kinds), tuple(directions), _numbers(where, data["numbers"], ENGINE_UNITS))


def _numbers(where: str, data: Any, units: Mapping[str, str]) -> dict[str, Number]:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: numbers is no mapping: give {', '.join(units)}")
    if missing := [key for key in units if key not in data]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}: add each, with bounds, source and tag")
    if unknown := [str(key) for key in data if key not in units]:
        raise ConfigError(f"{where} has an unknown number {unknown[0]!r}{nearest(unknown[0], units)}: leave it out")
    return {key: _number(f"{where}, {key}", data[key], unit) for key, unit in units.items()}


def _number(where: str, data: Any, unit: str) -> Number:
    if not isinstance(data, Mapping) or data.keys() - set(KEYS):
        raise ConfigError(f"{where} = {data!r}: give {', '.join(KEYS)}")
    if missing := [key for key in KEYS if data.get(key) in (None, "")]:
        raise ConfigError(f"{where} has no {missing[0]}: add it")
    numbers = [data[key] for key in ("value", "lo", "hi")]
    if any(isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 1e18 for one in numbers):
        raise ConfigError(f"{where}: value, lo and hi {numbers} must be numbers >= 0")
    value, lo, hi = map(float, numbers)
    if not lo <= value <= hi:
        raise ConfigError(f"{where}: lo {lo:g} <= value {value:g} <= hi {hi:g} does not hold: correct the bounds")
    if unit != "s" and lo <= 0:
        raise ConfigError(f"{where}: lo {lo:g} must be above 0: correct it")
    if data["unit"] != unit:
        raise ConfigError(f"{where} is in {data['unit']!r}, not {unit!r}: convert it")
    if data["tag"] not in TAGS:
        raise ConfigError(f"{where} has the unknown tag {data['tag']!r}: give one of {', '.join(TAGS)}")
    return Number(value, lo, hi, unit, str(data["source"]), str(data["tag"]))
