"""The configuration: YAML or a dict, checked into frozen models; an unknown key names the nearest known one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options
from gossamer.profiling.devices import DeviceProfile, DeviceShare, Profile, check_devices
from gossamer.sections import (
    CheckpointOptions,
    ClientsOptions,
    EngineOptions,
    EvaluationOptions,
    LogOptions,
    PeersOptions,
    Plugin,
    SubmodelOptions,
    TrainConfig,
    as_mapping,
    default_workload,
)


class Config(Options):
    """One experiment. `methods` maps a name to overrides; every method runs with every seed.

    Either `clients` of a server train, or `peers` without one. `device` is what every participant has; `devices` lists
    several, by share or by capacity.
    """

    name: str = "run"
    seed: int = Field(default=0, ge=0)
    seeds: list[int] | None = None
    rounds: int = Field(ge=1)
    workload: Annotated[Plugin, BeforeValidator(default_workload)]
    clients: ClientsOptions | None = None
    peers: PeersOptions | None = None
    train: TrainConfig
    algorithm: Plugin = {"name": "fedavg"}
    submodel: SubmodelOptions = SubmodelOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    device: Profile = DeviceProfile()
    devices: list[DeviceShare] | None = None
    engine: EngineOptions = EngineOptions()
    log: LogOptions = LogOptions()
    methods: dict[str, dict[str, Any]] | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("use letters, digits, '.', '_' and '-', because it names a directory")
        return value

    @field_validator("devices")
    @classmethod
    def _one_kind_of_devices(cls, value: list[DeviceShare] | None) -> list[DeviceShare] | None:
        if value is not None:
            check_devices(value)
        return value

    @model_validator(mode="after")
    def _device_or_devices(self) -> Config:
        if self.devices is not None and self.device != DeviceProfile():
            raise ValueError(
                f"device {self.device.name!r} contradicts devices, which give every client one: leave device out"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _clients_or_peers(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = [name for name in ("clients", "peers") if data.get(name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) if given else 'neither clients nor peers'} are given: give clients (they have a"
                " server) or peers (they have a topology), and not both"
            )
        return {"algorithm": "dsgd", **data} if given == ["peers"] else data

    @property
    def population(self) -> ClientsOptions | PeersOptions:
        """The section of those who train: clients or peers."""
        found = self.peers if self.clients is None else self.clients
        assert found is not None
        return found

    @model_validator(mode="after")
    def _collective_for_peers(self) -> Config:
        if self.engine.collective is not None and self.peers is None:
            raise ValueError(
                f"engine.collective = {self.engine.collective!r} lets Ray's actors send peers' rows to each other, but"
                " there are no peers: set it to null"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _engine_by_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("engine"), str):
            return {**data, "engine": {"name": data["engine"]}}
        return data


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file (or take a dict) and apply ``key.path=value`` overrides, without checking it.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or an override is malformed.
    """
    if isinstance(source, Mapping):
        data: Any = dict(source)
    else:
        path = Path(source)
        try:
            with path.open() as file:  # not its text, so that errors name it
                data = yaml.safe_load(file)
        except FileNotFoundError:
            raise ConfigError(f"no configuration file {str(path)!r}: give the path of a YAML file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read configuration file {str(path)!r} ({error}): give the path of a YAML file"
            ) from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{str(path)!r} must hold a mapping of keys to values, not {data!r}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.path=value")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
        if key == "seed" and data.get("seeds") is not None:
            raise ConfigError(f"override {override!r} has no effect beside seeds = {data['seeds']}: set seeds=[{text}]")
        data = with_value(data, key.split("."), value)
    return dict(data)


def with_value(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy of nested `data` in which the entry at `path` is `value`; a plug-in's bare name becomes a mapping.

    Raises:
        ConfigError: the path leads through a value that is no mapping.
    """
    if len(path) == 1:
        return {**data, path[0]: value}
    below = as_mapping(data.get(path[0], {}))
    if below is None:
        below = {}
    if not isinstance(below, Mapping):
        raise ConfigError(f"cannot set {'.'.join(path)!r}: {path[0]!r} is {below!r}, not a mapping")
    return {**data, path[0]: with_value(below, path[1:], value)}


def merge(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with nested `overrides`; dotted keys lead into sections, a new plug-in replaces the old one."""
    merged: dict[str, Any] = dict(data)
    for key, value in overrides.items():
        path, below = key.split("."), as_mapping(merged.get(key))
        if isinstance(value, Mapping) and len(path) == 1 and isinstance(below, Mapping) and "name" not in value:
            merged[key] = merge(below, value)
        else:
            merged = with_value(merged, path, value)
    return merged


def parse(data: Mapping[str, Any]) -> Config:
    """Check a configuration.

    Raises:
        ConfigError: the first thing that is wrong, in one sentence.
    """
    config = parse_options(Config, data, "")
    if config.seeds is not None and (not config.seeds or len(set(config.seeds)) != len(config.seeds)):
        raise ConfigError(f"seeds = {config.seeds!r}: give a list of distinct seeds, or a single seed")
    if config.seeds is not None and min(config.seeds) < 0:
        raise ConfigError(f"seeds = {config.seeds!r}: seeds are >= 0")
    return config


def expand(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``{sub-directory: configuration}`` of the single runs behind `data`; the key is "" if there is one only.

    Every method's and seed's configuration is checked before anything runs.

    Raises:
        ConfigError: one of them is wrong.
    """
    config = parse(data)
    shared = {key: value for key, value in data.items() if key not in ("methods", "seeds")}
    methods = config.methods if config.methods is not None else {"": {}}
    if not methods:
        raise ConfigError("methods = {}: name at least one method, or leave the key out")
    runs: dict[str, dict[str, Any]] = {}
    for method, overrides in methods.items():
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"methods.{method} must be a mapping of overrides, not {overrides!r}")
        if reserved := {"name", "seed", "seeds", "methods"} & set(overrides):
            raise ConfigError(
                f"methods.{method} sets {sorted(reserved)}, which belong to the whole experiment: move them up"
            )
        if method and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", method):
            raise ConfigError(
                f"methods.{method!r}: use letters, digits, '.', '_' and '-', because it names a directory"
            )
        for seed in config.seeds if config.seeds is not None else [config.seed]:
            single = merge(shared, overrides) | {"seed": seed}
            if method:
                single["name"] = method
            parse(single)
            parts = [method] if method else []
            parts += [f"seed-{seed}"] if config.seeds is not None else []
            runs["/".join(parts)] = single
    return runs
