"""The configuration: YAML or a dict, checked into frozen models; an unknown key names the nearest known one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from gossamer.engines.base import VariantMode
from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options
from gossamer.planning import ScheduleOptions
from gossamer.profiling.devices import DeviceProfile, DeviceShare, Profile, check_devices
from gossamer.submodel.windows import check_capacity


def _as_mapping(value: Any) -> Any:
    """Read a bare name as ``{"name": name}``."""
    return {"name": value} if isinstance(value, str) else value


def _named(value: Any) -> Any:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("give a name, or a mapping with a name and options")
    return dict(value)


def _default_workload(value: Any) -> Any:
    """Most workloads are image classification: its name may be left out."""
    return {"name": "image-classification", **value} if isinstance(value, Mapping) else value


Plugin = Annotated[dict[str, Any], BeforeValidator(_named), BeforeValidator(_as_mapping)]
"""A plug-in: its name, or a mapping of ``name`` and the plug-in's own options."""


class ModeOptions(VariantMode):
    """How one capacity is trained; filled in by measurement unless given."""

    capacity: float


class EngineOptions(Options):
    """Where training runs. `workers` and `block_size` change no bits; `modes` do, and are written once chosen."""

    name: str = "local"
    workers: int | Literal["auto"] = "auto"
    block_size: int | Literal["auto"] = "auto"
    modes: list[ModeOptions] | Literal["auto"] = "auto"

    @field_validator("workers", "block_size")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if value != "auto" and value < 0:
            raise ValueError("give 'auto' or a number >= 0")
        return value

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: Any) -> Any:
        if value != "auto" and (value < 1 or value & (value - 1)):
            raise ValueError("give 'auto' or a power of two")
        return value


class ClientsOptions(Options):
    """The registered clients and how they are chosen.

    Attributes:
        num: registered clients.
        per_round: participants a round.
        partition: how the data is split.
        sampler: how participants are chosen among those who are available.
        weighting: aggregation weights: number of samples, or equal.
        quorum: least share of the updates that a round waits for (`per_round`, or all who were available where these
            were fewer) which must be in time and usable.
        deadline_seconds: simulated seconds after which a round ends; who would take longer does not train. None: never.
        over_selection: how many times `per_round` clients are chosen (rounded up), of whom the first `per_round` to
            finish in simulated time take part.
    """

    num: int = Field(ge=1)
    per_round: int = Field(ge=1)
    partition: Plugin = {"name": "iid"}
    sampler: str = "uniform"
    weighting: Literal["samples", "equal"] = "samples"
    quorum: float = Field(default=0.5, ge=0, le=1)
    deadline_seconds: float | None = Field(default=None, gt=0)
    over_selection: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _enough(self) -> ClientsOptions:
        if self.per_round > self.num:
            raise ValueError(
                f"clients.per_round {self.per_round} exceeds clients.num {self.num}: sample at most all of them"
            )
        return self


class TrainConfig(Options):
    """Local training: SGD with momentum and weight decay, for `epochs` or `steps`."""

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=10, ge=1)
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    schedule: ScheduleOptions = ScheduleOptions()

    @model_validator(mode="before")
    @classmethod
    def _one_epoch(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("epochs") is None and data.get("steps") is None:
            return {**data, "epochs": 1}
        return data

    @model_validator(mode="after")
    def _not_both(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"train.epochs = {self.epochs} contradicts train.steps = {self.steps}: give one of them")
        return self


class SubmodelOptions(Options):
    """Capacities of clients and how their windows are chosen.

    Attributes:
        capacities: the levels, each in (0, 1].
        shares: share of the clients at each level; None: equal shares.
        assignment: fixed once, or drawn anew each round ("dynamic").
        strategy: window strategy; None: the algorithm's own.
        stride: channels by which a rolling window moves a round.
        offsets: ``{axis: channels}`` by which an axis's windows are moved besides.
        scaler: multiply a sub-model's activations by 1 / capacity while training; None: whatever the algorithm does.
        mask_labels: average label rows over the clients that hold the label; None: whatever suits the algorithm.
    """

    capacities: list[float] = [1.0]
    shares: list[float] | None = None
    assignment: Literal["fixed", "dynamic"] = "fixed"
    strategy: str | None = None
    stride: int = 1
    offsets: dict[str, int] = {}
    scaler: bool | None = None
    mask_labels: bool | None = None

    @field_validator("capacities")
    @classmethod
    def _levels(cls, value: list[float]) -> list[float]:
        if not value:
            raise ValueError("give at least one capacity")
        for capacity in value:
            try:
                check_capacity(capacity)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        if len(set(value)) != len(value):
            raise ValueError("name every capacity once, and their frequencies in submodel.shares")
        return value

    @model_validator(mode="after")
    def _matching(self) -> SubmodelOptions:
        if self.shares is not None:
            if len(self.shares) != len(self.capacities):
                raise ValueError(
                    f"submodel.shares has {len(self.shares)} entries for {len(self.capacities)} capacities"
                )
            if min(self.shares) < 0 or sum(self.shares) <= 0:
                raise ValueError(f"submodel.shares {self.shares} must be >= 0 and not all 0")
        return self


class EvaluationOptions(Options):
    """When and what to evaluate: the whole model every `every` rounds; with `by_capacity`, every sub-model size too."""

    every: int = Field(default=1, ge=1)
    by_capacity: bool = False


class CheckpointOptions(Options):
    """Commits: least seconds between two (0: after every round) and how many are kept."""

    every_seconds: float = Field(default=30.0, ge=0)
    keep: int = Field(default=2, ge=2)


class LogOptions(Options):
    """Trackers besides the run directory's own logs: any of "tensorboard", "mlflow", "wandb"."""

    sinks: list[str] = []


class Config(Options):
    """One experiment. `methods` maps a name to overrides; every method runs with every seed.

    `device` is what every client has; `devices` lists several, by share or by capacity.
    """

    name: str = "run"
    seed: int = Field(default=0, ge=0)
    seeds: list[int] | None = None
    rounds: int = Field(ge=1)
    workload: Annotated[Plugin, BeforeValidator(_default_workload)]
    clients: ClientsOptions
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
            data = yaml.safe_load(path.read_text())
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
    below = _as_mapping(data.get(path[0], {}))
    if below is None:
        below = {}
    if not isinstance(below, Mapping):
        raise ConfigError(f"cannot set {'.'.join(path)!r}: {path[0]!r} is {below!r}, not a mapping")
    return {**data, path[0]: with_value(below, path[1:], value)}


def merge(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with nested `overrides`; dotted keys lead into sections, a new plug-in replaces the old one."""
    merged: dict[str, Any] = dict(data)
    for key, value in overrides.items():
        path, below = key.split("."), _as_mapping(merged.get(key))
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
