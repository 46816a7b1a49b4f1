"""One pass over a configuration: plug-ins found, what is left open filled in, contradictions refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer import registry
from gossamer import topology as topologies
from gossamer.algorithms.base import Algorithm, require_no_momentum
from gossamer.algorithms.checks import find_algorithm, require_algorithm, require_phases
from gossamer.config.communication import fill_in_communication, has_codec
from gossamer.config.offload import require_offload
from gossamer.config.optimizers import make_optimizer, with_optimizer
from gossamer.config.personal import require_personal
from gossamer.config.recording import require_torch_profiler
from gossamer.config.rules import (
    check_peers,
    require_importable,
    require_population,
    require_selection,
    require_whole_models,
)
from gossamer.config.schema import Config
from gossamer.config.unused import unused_options
from gossamer.errors import ConfigError, RegistryError, plugin_errors, require_attributes
from gossamer.options import parse_options
from gossamer.simulation.devices import DeviceShare
from gossamer.submodel.strategies import find_strategy
from gossamer.submodel.windows import window_length
from gossamer.topology import Topology
from gossamer.workloads.base import find_workload
from gossamer.workloads.parts import LoRAOptions

ENGINE = ("is_remote", "train", "exchange", "evaluate", "measure", "read", "write", "close")


@dataclass(frozen=True)
class Resolved:
    """A configuration in which nothing is left open but what the data tell, and what was made to find that out.

    Attributes:
        config: the configuration, with what the algorithm decides filled in and paths of files absolute.
        algorithm: the algorithm.
        topology: topology by which peers mix; None: there is a server.
        engine_class: class of the engine.
        warnings: sentences about what is allowed, but hardly meant.
    """

    config: Config
    algorithm: Algorithm
    topology: Topology | None
    engine_class: Any
    warnings: tuple[str, ...]


def resolve(config: Config) -> Resolved:
    """Find every plug-in, fill in what the algorithm decides, and refuse what contradicts itself; loads no data.

    Raises:
        ConfigError: a plug-in is unknown, the algorithm contradicts the configuration, or theory the topology.
    """
    algorithm = make_algorithm(config)
    require_population(config, algorithm)
    require_personal(config, algorithm)
    require_selection(config, algorithm)
    require_offload(config, has_codec=has_codec(config, algorithm))
    require_torch_profiler(config)
    filled = fill_in(config, algorithm)
    engine_class = registry.resolve("engine", filled.engine.name)
    require_attributes(f"engine {filled.engine.name!r}", engine_class, ENGINE)
    assert filled.submodel.strategy is not None
    find_strategy(filled.submodel.strategy)
    find_workload(filled.workload["name"])
    registry.resolve_function("partition", filled.population.partition["name"])
    if filled.clients is not None:
        registry.resolve_function("sampler", filled.clients.sampler)
    if engine_class.is_remote:
        require_importable(filled)
    filled = _with_absolute_paths(filled)
    topology = build_topology(filled)
    warnings: tuple[str, ...] = ()
    if topology is not None:
        filled = _with_topology(filled, topology)
        warnings = check_peers(filled, algorithm, topology)
    warnings += unused_options(filled, algorithm, engine_class)
    return Resolved(filled, algorithm, topology, engine_class, warnings)


def make_algorithm(config: Config) -> Algorithm:
    """Make the algorithm of a configuration, resolved or not.

    Raises:
        ConfigError: it is unknown, its options are wrong, it lacks a method, or its traits are wrong.
    """
    name, options = split(config.algorithm)
    make: Any = find_algorithm(name)
    given = make_optimizer(config)
    with plugin_errors(f"algorithm {name!r}"):
        decay = given.optimizer.weight_decay
        algorithm: Algorithm = make(options, momentum=given.momentum, weight_decay=decay)
    require_algorithm(f"algorithm {name!r}", algorithm)
    require_phases(f"algorithm {name!r}", algorithm)
    require_no_momentum(f"algorithm {name!r}", algorithm.traits, given.momentum)
    return with_optimizer(config, algorithm, given)


def build_topology(config: Config) -> Topology | None:
    """Build the peers' topology, from a name and parameters or from a file; None where there is a server.

    Raises:
        ConfigError: see `topology.find`, or it has another number of peers than ``peers.num``.
    """
    if config.peers is None:
        return None
    (name, parameters), num = split(config.peers.topology), config.peers.num
    found = topologies.find(name, parameters, default_n=num, default_seed=config.seed)
    if num not in (None, found.n):
        raise ConfigError(
            f"peers.num = {num}, but topology {name!r} has n = {found.n} peers: leave peers.num out, or set it to"
            f" {found.n}"
        )
    return found


def _with_topology(config: Config, topology: Topology) -> Config:
    """Return the configuration with the topology's number of peers, and its files named from the root."""
    assert config.peers is not None
    given = dict(config.peers.topology)
    if topologies.is_file(given["name"]):
        given["name"] = str(Path(given["name"]).absolute())
    if isinstance(given.get("path"), str):
        given["path"] = str(Path(given["path"]).absolute())
    peers = config.peers.model_copy(update={"topology": given, "num": topology.n})
    return config.model_copy(update={"peers": peers})


def _with_absolute_paths(config: Config) -> Config:
    """Return the configuration with the files of data and partitions named from the root, if plug-ins are built in."""

    def absolute(kind: str, spec: Any) -> Any:
        """Return a plug-in's section with its path named from the root."""
        name = spec.get("name") if isinstance(spec, Mapping) else None
        if not isinstance(name, str) or name not in registry.BUILTIN[kind]:
            return spec
        given = {key: spec[key] for key in ("path", "test_path", "weights") if isinstance(spec.get(key), str)}
        return {**spec, **{key: str(Path(path).absolute()) for key, path in given.items()}}

    section = "clients" if config.peers is None else "peers"
    population = config.population.model_copy(update={"partition": absolute("partition", config.population.partition)})
    workload = dict(config.workload)
    for kind in ("dataset", "model"):
        if kind in workload:
            workload[kind] = absolute(kind, workload[kind])
    replay = None if config.replay is None else str(Path(config.replay).absolute())
    offload = config.offload and config.offload.with_absolute_path()
    update = {section: population, "workload": workload, "replay": replay, "offload": offload}
    return config.model_copy(update=update)


def fill_in(config: Config, algorithm: Any) -> Config:
    """Fill in what the algorithm decides: strategy, label masks, error feedback, and capacities of the baselines.

    Raises:
        ConfigError: the algorithm contradicts the configuration.
    """
    sub, train, rule = config.submodel, config.train, algorithm.traits.capacities
    name, fixed = config.algorithm["name"], algorithm.traits.strategy
    if fixed is not None and sub.strategy not in (None, fixed):
        raise ConfigError(
            f"submodel.strategy = {sub.strategy!r} contradicts algorithm {name!r}, which is {fixed!r} by definition:"
            " leave submodel.strategy out, or use algorithm 'fedavg'"
        )
    reason = algorithm.traits.no_offsets
    if reason is not None and any(sub.offsets.values()):
        raise ConfigError(
            f"submodel.offsets = {sub.offsets} does not go with algorithm {name!r}, because {reason}: leave it out"
        )
    changes: dict[str, Any] = {"strategy": sub.strategy or fixed or "static"}
    workload = dict(config.workload)
    if rule in ("one", "given"):
        require_whole_models(config, algorithm)
    if rule == "one" and sub.strategy is None and tuple(sub.capacities) != (1.0,):
        raise ConfigError(
            f"algorithm {name!r} trains whole models but submodel.capacities = {sub.capacities}: choose fedrolex,"
            " heterofl or federated-dropout, or give submodel.strategy"
        )
    default_mask = algorithm.traits.default_label_mask
    defaults = _workload_defaults(workload["name"])
    for option, value in (("model", defaults.get("model")), ("label_mask", default_mask)):
        if option in defaults:
            workload.setdefault(option, value)
    if rule in ("smallest", "largest"):
        factor = min(sub.capacities) if rule == "smallest" else max(sub.capacities)
        changes |= {"capacities": [1.0], "shares": None}
        rates = [rate for capacity, rate in train.lr_by_capacity.items() if capacity == factor]
        train = train.model_copy(update={"lr_by_capacity": {1.0: rates[0]} if rates else {}})
        workload = _of_capacity(workload, factor, name)
    if sub.scaler is None:
        changes["scaler"] = algorithm.traits.default_scaler
    if sub.mask_labels is None:
        changes["mask_labels"] = default_mask != "none"
    sections = {"submodel": sub.model_copy(update=changes), "workload": workload, "train": train}
    sections |= {"devices": fill_in_devices(config, rule), "communication": fill_in_communication(config, algorithm)}
    return config.model_copy(update=sections)


def _of_capacity(workload: dict[str, Any], factor: float, algorithm: str) -> dict[str, Any]:
    """Return a workload whose whole model is what a capacity leaves, of its low-rank factors or of its widths.

    Raises:
        ConfigError: there are neither, or these options are wrong.
    """
    if workload.get("lora"):
        lora = parse_options(LoRAOptions, workload["lora"], "workload.lora")
        rank = window_length(lora.rank, factor)
        changed = {"rank": rank, "alpha": lora.alpha * rank / lora.rank}  # the factor before B A stays
        return workload | {"lora": lora.model_copy(update=changed).model_dump(mode="json")}
    if "model" in workload:
        model = workload["model"] if isinstance(workload["model"], Mapping) else {"name": workload["model"]}
        width = model.get("width", 1.0)
        if isinstance(width, bool) or not isinstance(width, int | float):
            raise ConfigError(f"workload.model.width = {width!r} is not a number: give a share in (0, 1], such as 0.5")
        return workload | {"model": {**model, "width": width * factor}}
    if factor != 1.0:
        raise ConfigError(
            f"algorithm {algorithm!r} scales workload.model.width, which workload {workload['name']!r} does not have"
        )
    return workload


def fill_in_devices(config: Config, rule: str) -> list[DeviceShare] | None:
    """Give devices that are tied to capacities the shares of these.

    So the clients of a baseline, which changes the capacities, have the devices that they have in the other methods.

    Args:
        rule: the algorithm's ``capacities``; "smallest" and "largest" are baselines.

    Raises:
        ConfigError: devices and capacities do not fit each other.
    """
    devices, sub = config.devices, config.submodel
    if devices is None or devices[0].capacity is None:
        return devices
    is_filled = all(device.share is not None for device in devices)
    if is_filled and rule in ("smallest", "largest") and tuple(sub.capacities) == (1.0,):
        return devices
    shares = dict(zip(sub.capacities, sub.shares or [1.0] * len(sub.capacities), strict=True))
    tied = [(device, device.capacity) for device in devices if device.capacity is not None]
    if {c for _, c in tied} != set(shares) or any(device.share not in (None, shares[c]) for device, c in tied):
        raise ConfigError(
            f"devices of capacities {sorted(c for _, c in tied)} do not fit submodel.capacities = {sorted(shares)}:"
            " give one device for each capacity, and shares in submodel.shares only"
        )
    return [device.model_copy(update={"share": shares[capacity]}) for device, capacity in tied]


def _workload_defaults(name: str) -> dict[str, Any]:
    """Return the default of every option that a workload declares by its `Options`; {} where it has none.

    A workload that cannot be found has none, either: `resolve` says what is wrong with it.
    """
    try:
        fields = registry.resolve("workload", name).Options.model_fields
    except (RegistryError, AttributeError):
        return {}
    return {option: field.default for option, field in fields.items() if not field.is_required()}


def split(plugin: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split a plug-in section into its name and its options."""
    return plugin["name"], {key: value for key, value in plugin.items() if key != "name"}
