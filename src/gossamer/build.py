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
from gossamer.errors import ConfigError
from gossamer.planning import Capacities, Planner
from gossamer.profiling.costs import Costs
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
            costs=Costs(
                self.workload,
                self.algorithm,
                self.task.cutter,
                self.task.capacities,
                config.train.batch_size,
                config.device,
            ),
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
    if algorithm.client_arrays and tuple(sub.capacities) != (1.0,):
        raise ConfigError(
            f"algorithm {algorithm_name!r} keeps state on clients, which fits whole models only: set"
            f" submodel.capacities to [1.0] instead of {sub.capacities}"
        )
    workload_name, workload_options = split(config.workload)
    clients = config.clients
    workload: Workload = resolve("workload", workload_name)(
        workload_options, num_clients=clients.num, partition=clients.partition, seed=config.seed
    )
    levels = sorted(zip(sub.capacities, sub.shares or [1.0] * len(sub.capacities), strict=True))
    capacities = Capacities([c for c, _ in levels], [s for _, s in levels], sub.assignment, clients.num, config.seed)
    assert sub.strategy is not None
    assert sub.mask_labels is not None
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
        weighting=clients.weighting,
        epochs=train.epochs,
        steps=train.steps,
        batch_size=train.batch_size,
        lr=train.lr,
        schedule=train.schedule,
    )
    task = replace(task, modes=_modes(config, task))
    modes = [ModeOptions(capacity=c, **dict(mode)) for c, mode in zip(task.capacities, task.modes, strict=True)]
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"modes": modes})})
    return Parts(config, workload, algorithm, task, planner, engine_class)


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
    if rule == "one" and sub.strategy is None and tuple(sub.capacities) != (1.0,):
        raise ConfigError(
            f"algorithm {name!r} trains whole models but submodel.capacities = {sub.capacities}: choose fedrolex,"
            " heterofl or federated-dropout, or give submodel.strategy"
        )
    default_mask = getattr(algorithm, "default_label_mask", "none")
    if workload["name"] == "image-classification":
        workload.setdefault("model", "mlp")
        workload.setdefault("label_mask", default_mask)
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
    if sub.mask_labels is None:
        changes["mask_labels"] = default_mask != "none"
    return config.model_copy(update={"submodel": sub.model_copy(update=changes), "workload": workload})


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
