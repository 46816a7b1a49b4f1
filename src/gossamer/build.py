"""From a checked configuration to the parts of a run: plug-ins found, data loaded, everything open settled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.algorithms.base import Algorithm
from gossamer.checkpoint import Checkpoints
from gossamer.clientstore import ClientStore
from gossamer.config import Config, ModeOptions
from gossamer.engines.base import Task, TrainOptions, VariantMode
from gossamer.engines.local.measure import choose_modes
from gossamer.errors import ConfigError, RegistryError
from gossamer.planning import Capacities, Planner, assign_devices, devices_of_capacities
from gossamer.profiling.costs import Costs, count_variants
from gossamer.profiling.devices import DeviceShare
from gossamer.registry import resolve
from gossamer.rounds import Loop, LoopOptions
from gossamer.runlog import RunLog
from gossamer.submodel import Cutter
from gossamer.workloads.base import Workload


@dataclass(frozen=True)
class Parts:
    """The parts of a run before it starts, and its resolved configuration."""

    config: Config
    workload: Workload
    algorithm: Algorithm
    task: Task
    planner: Planner
    engine_class: Any

    def start_engine(self, directory: Path) -> tuple[Any, ClientStore | None]:
        """Start the engine from the initial model, with a store for private state if the algorithm keeps some."""
        state = self.algorithm.init(self.workload.init(self.config.seed)[None])
        store = None
        if self.algorithm.client_arrays:
            store = ClientStore(directory / "clients", keep=self.config.checkpoint.keep)
            for name in self.algorithm.client_arrays:
                store.declare(name, self.workload.layout.d)
        options = self.config.engine
        workers = default_workers() if options.workers == "auto" else options.workers
        block_size = None if options.block_size == "auto" else options.block_size
        return self.engine_class(self.task, state, store, workers=workers, block_size=block_size), store

    def loop(self, engine: Any, store: ClientStore | None, log: RunLog, checkpoints: Checkpoints) -> Loop:
        """Assemble the loop."""
        config = self.config
        return Loop(
            engine=engine,
            workload=self.workload,
            planner=self.planner,
            log=log,
            checkpoints=checkpoints,
            store=store,
            options=LoopOptions(
                num_rounds=config.rounds,
                quorum=config.clients.quorum,
                evaluate_every=config.evaluation.every,
                evaluate_capacities=self.task.capacities if config.evaluation.by_capacity else (),
                commit_every_seconds=config.checkpoint.every_seconds,
            ),
        )


def build(config: Config) -> Parts:
    """Load data, make the model, and settle everything that the configuration leaves open.

    Raises:
        GossamerError: an unknown plug-in, contradictory options, missing or malformed data.
    """
    engine_class = resolve("engine", config.engine.name)
    algorithm_name, algorithm_options = split(config.algorithm)
    algorithm_class = resolve("algorithm", algorithm_name)
    config = settle(config, algorithm_class)
    train, sub = config.train, config.submodel
    algorithm = algorithm_class(algorithm_options, momentum=train.momentum, weight_decay=train.weight_decay)
    require_whole_models(config, algorithm)
    workload_name, workload_options = split(config.workload)
    clients = config.clients
    workload: Workload = resolve("workload", workload_name)(
        workload_options, num_clients=clients.num, partition=clients.partition, seed=config.seed
    )
    levels = sorted(zip(sub.capacities, sub.shares or [1.0] * len(sub.capacities), strict=True))
    capacities = Capacities([c for c, _ in levels], [s for _, s in levels], sub.assignment, clients.num, config.seed)
    assert sub.strategy is not None
    assert sub.mask_labels is not None
    assert sub.scaler is not None
    task = Task(
        workload=workload,
        algorithm=algorithm,
        cutter=Cutter(workload.layout, resolve("strategy", sub.strategy), sub.stride, config.seed, sub.offsets),
        train=TrainOptions(train.batch_size, train.clip_norm),
        seed=config.seed,
        capacities=capacities.levels,
        modes=(VariantMode(),) * len(levels),
        scaler=sub.scaler,
        count_labels=sub.mask_labels and workload.num_labels > 0,
    )
    planner = Planner(
        seed=config.seed,
        num_rounds=config.rounds,
        num_samples=workload.num_samples,
        per_round=clients.per_round,
        sampler=resolve("sampler", clients.sampler),
        capacities=capacities,
        costs=count_costs(config, task, capacities),
        weighting=clients.weighting,
        epochs=train.epochs,
        steps=train.steps,
        batch_size=train.batch_size,
        lr=train.lr,
        schedule=train.schedule,
        deadline_seconds=clients.deadline_seconds,
        over_selection=clients.over_selection,
    )
    task = replace(task, modes=_modes(config, task))
    modes = [ModeOptions(capacity=c, **dict(mode)) for c, mode in zip(task.capacities, task.modes, strict=True)]
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"modes": modes})})
    return Parts(config, workload, algorithm, task, planner, engine_class)


def count_costs(config: Config, task: Task, capacities: Capacities) -> Costs:
    """Count what each capacity costs, and give every client its device.

    Raises:
        ConfigError: a sub-model does not fit a device that trains it.
    """
    devices = assign_devices(
        config.devices or [DeviceShare(profile=config.device)],
        config.submodel.assignment,
        config.clients.num,
        config.seed,
    )
    variants = count_variants(
        task.workload,
        task.algorithm,
        task.cutter,
        task.capacities,
        batch_size=task.train.batch_size,
        scaler=task.scaler,
    )
    costs = Costs(variants, devices)
    costs.check_memory(devices_of_capacities(devices, capacities, config.clients.num))
    return costs


def check(config: Config) -> None:
    """Find every plug-in that is needed and settle the configuration, before anything is loaded or written.

    Raises:
        ConfigError: a plug-in is unknown, or the algorithm contradicts the configuration.
    """
    settled = settle(config, resolve("algorithm", config.algorithm["name"]))
    assert settled.submodel.strategy is not None
    named = {
        "engine": config.engine.name,
        "strategy": settled.submodel.strategy,
        "sampler": config.clients.sampler,
        "workload": config.workload["name"],
        "partition": config.clients.partition["name"],
    }
    for kind, name in named.items():
        resolve(kind, name)


def settle(config: Config, algorithm: Any) -> Config:
    """Fill in what the algorithm decides: strategy, label masks, and capacities of the baselines.

    Raises:
        ConfigError: the algorithm contradicts the configuration.
    """
    sub, rule = config.submodel, getattr(algorithm, "capacities", "one")
    name = config.algorithm["name"]
    fixed = getattr(algorithm, "strategy", None)
    if fixed is not None and sub.strategy not in (None, fixed):
        raise ConfigError(
            f"submodel.strategy = {sub.strategy!r} contradicts algorithm {name!r}, which is {fixed!r} by definition:"
            " leave submodel.strategy out, or use algorithm 'fedavg'"
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
    default_mask = getattr(algorithm, "default_label_mask", "none")
    defaults = _workload_defaults(workload["name"])
    for option, value in (("model", defaults.get("model")), ("label_mask", default_mask)):
        if option in defaults:
            workload.setdefault(option, value)
    if rule in ("smallest", "largest"):
        factor = min(sub.capacities) if rule == "smallest" else max(sub.capacities)
        changes |= {"capacities": [1.0], "shares": None}
        if "model" in workload:
            model = workload["model"] if isinstance(workload["model"], Mapping) else {"name": workload["model"]}
            width = model.get("width", 1.0)
            if isinstance(width, bool) or not isinstance(width, int | float):
                raise ConfigError(
                    f"workload.model.width = {width!r} is not a number: give a share in (0, 1], such as 0.5"
                )
            workload["model"] = {**model, "width": width * factor}
        elif factor != 1.0:
            raise ConfigError(
                f"algorithm {name!r} scales workload.model.width, which workload {workload['name']!r} does not have"
            )
    if sub.scaler is None:
        changes["scaler"] = getattr(algorithm, "default_scaler", True)
    if sub.mask_labels is None:
        changes["mask_labels"] = default_mask != "none"
    devices = settle_devices(config, rule)
    changed = {"submodel": sub.model_copy(update=changes), "workload": workload, "devices": devices}
    return config.model_copy(update=changed)


def settle_devices(config: Config, rule: str) -> list[DeviceShare] | None:
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
    is_settled = all(device.share is not None for device in devices)
    if is_settled and rule in ("smallest", "largest") and tuple(sub.capacities) == (1.0,):
        return devices
    shares = dict(zip(sub.capacities, sub.shares or [1.0] * len(sub.capacities), strict=True))
    tied = [(device, device.capacity) for device in devices if device.capacity is not None]
    if {c for _, c in tied} != set(shares) or any(device.share not in (None, shares[c]) for device, c in tied):
        raise ConfigError(
            f"devices of capacities {sorted(c for _, c in tied)} do not fit submodel.capacities = {sorted(shares)}:"
            " give one device for each capacity, and shares in submodel.shares only"
        )
    return [device.model_copy(update={"share": shares[capacity]}) for device, capacity in tied]


def require_whole_models(config: Config, algorithm: Any) -> None:
    """Refuse sub-models, and means over different holders, where `algorithm` (or its class) gives a reason.

    Raises:
        ConfigError: capacities other than 1, or label rows that only some clients hold.
    """
    sub, name = config.submodel, config.algorithm["name"]
    reason: str | None = getattr(algorithm, "whole_models_only", None)
    kept: tuple[str, ...] = getattr(algorithm, "client_arrays", ())
    if reason is not None and sub.mask_labels:
        raise ConfigError(
            f"algorithm {name!r} needs all participants to hold all coordinates, because {reason}: set"
            f" submodel.mask_labels to false instead of {sub.mask_labels}"
        )
    if reason is None and kept:
        reason = "what it keeps on a client belongs to the coordinates of one window"
    if reason is not None and tuple(sub.capacities) != (1.0,):
        raise ConfigError(
            f"algorithm {name!r} trains whole models only, because {reason}: set submodel.capacities to [1.0] instead"
            f" of {sub.capacities}"
        )


def _workload_defaults(name: str) -> dict[str, Any]:
    """Return the default of every option that a workload declares by its `Options`; {} where it has none.

    A workload that cannot be found has none, either: `check` and `build` say what is wrong with it.
    """
    try:
        fields = resolve("workload", name).Options.model_fields
    except (RegistryError, AttributeError):
        return {}
    return {option: field.default for option, field in fields.items() if not field.is_required()}


def _modes(config: Config, task: Task) -> tuple[VariantMode, ...]:
    """Return the pinned modes, or measure."""
    given = config.engine.modes
    if given == "auto":
        state = task.algorithm.init(task.workload.init(config.seed)[None])
        return choose_modes(task, state)
    by_capacity = {mode.capacity: mode for mode in given}
    if len(given) != len(by_capacity) or set(by_capacity) != set(task.capacities):
        raise ConfigError(
            f"engine.modes names capacities {sorted(mode.capacity for mode in given)} but the run has"
            f" {list(task.capacities)}: name each once, or set engine.modes to auto"
        )
    ragged = bool((task.workload.num_samples % task.train.batch_size != 0).any())
    for mode in given:
        if mode.stacked and not getattr(task.algorithm, "stackable", True):
            raise ConfigError(
                f"engine.modes stacks capacity {mode.capacity}, but algorithm {config.algorithm['name']!r} trains"
                " participants one by one: use auto"
            )
        if mode.stacked and (not task.workload.supports_stacking or (ragged and not mode.padding)):
            raise ConfigError(
                f"engine.modes stacks capacity {mode.capacity}, whose batches differ or cannot be stacked: use auto"
            )
        if mode.padding and not task.workload.supports_padding:
            raise ConfigError(
                f"engine.modes pads capacity {mode.capacity}, but the model mixes samples of a batch: use auto"
            )
    return tuple(VariantMode(**by_capacity[c].model_dump(exclude={"capacity"})) for c in task.capacities)


def split(plugin: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split a plug-in section into its name and its options."""
    return plugin["name"], {key: value for key, value in plugin.items() if key != "name"}


def default_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
