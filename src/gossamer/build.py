"""Assembles the parts of a run from a resolved configuration: data loaded, rounds planned, modes chosen."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.algorithms.base import Algorithm
from gossamer.config import diagnosis
from gossamer.config.buffers import require_averages
from gossamer.config.clock import goes_by_the_clock, wall_clock
from gossamer.config.communication import check_codecs, require_whole_downlink
from gossamer.config.inputs import configuration_inputs, run_id
from gossamer.config.offload import engine_offload, require_plain_commits
from gossamer.config.optimizers import require_moments
from gossamer.config.personal import require_holdings
from gossamer.config.replays import replaying
from gossamer.config.resolve import Resolved, resolve
from gossamer.config.schema import Config, ModeOptions
from gossamer.engines.base import NO_HOOKS, Engine, EngineHooks, EngineSetup
from gossamer.engines.task import Task
from gossamer.engines.training.modes import measured_modes, modes_by_rule
from gossamer.engines.updating import require_metric
from gossamer.errors import ConfigError, plugin_errors
from gossamer.memory import require_memory
from gossamer.planning.assignment import Capacities, assign_devices, devices_of_capacities
from gossamer.planning.base import Planner
from gossamer.planning.clients import ClientPlanner
from gossamer.planning.peers import PeerPlanner
from gossamer.profiling.storing import Commits
from gossamer.registry import OBJECT, resolve_function
from gossamer.rounds import Loop, LoopOptions
from gossamer.simulation.costs import Costs
from gossamer.simulation.counting import count_variants
from gossamer.simulation.cuts import check_cuts
from gossamer.simulation.devices import DeviceShare
from gossamer.storage.client_store import CLIENTS, ClientStore
from gossamer.storage.runlog import RunLog
from gossamer.task import held_variants, make_task, on_device, workload_of
from gossamer.workloads.base import Workload
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.held import ToldWorkload

MAX_STEPS = 1 << 31  # of a participant in a round, which plans count in 32 bits
WORKER_BYTES = 10_000_000  # of a process of its own, at least


@dataclass(frozen=True)
class Parts:
    """The parts of a run before it starts, and its resolved configuration.

    Attributes:
        warnings: sentences about what is allowed, but hardly meant; logged when the run starts.
    """

    config: Config
    task: Task
    planner: Planner
    engine_class: Any
    warnings: tuple[str, ...] = ()

    @property
    def workload(self) -> Workload:
        """The task's workload."""
        return self.task.workload

    @property
    def algorithm(self) -> Algorithm:
        """The task's algorithm."""
        return self.task.algorithm

    @property
    def inputs(self) -> dict[str, Any]:
        """What the results depend on, for commits, see `gossamer.config.inputs`."""
        topology = self.task.topology
        found = {
            "configuration": configuration_inputs(self.config.model_dump(mode="json")),
            "data": self.workload.digest(),
        }
        return found if topology is None else {**found, "topology": topology.digest()}

    def start_engine(self, directory: Path, hooks: EngineHooks = NO_HOOKS) -> tuple[Engine, ClientStore | None]:
        """Start the engine from the initial model, with a store for private state if clients keep some."""
        options, x = self.config.engine, self.workload.init(self.config.seed)
        block_size = None if options.block_size == "auto" else options.block_size
        if self.config.replay is not None and self.config.clients is not None:  # single ones are left out
            block_size = 1
        hooks = replaying(self.config, self.inputs, self.workload.num_clients, hooks)
        counts_cpus = self.engine_class.is_remote and options.workers == "auto"
        plain, paths = self.config.model_dump(mode="json"), [os.path.abspath(path) for path in sys.path]
        setup = EngineSetup(
            workers=0 if counts_cpus else num_workers(self.config, self.workload),
            block_size=block_size,
            hooks=hooks,
            straggler_seconds=options.straggler_seconds,
            address=options.address,
            kit=None if options.kit is None else Path(options.kit),
            recipe={"factory": "gossamer.task:task_of", "config": plain, "paths": paths, "run": run_id(plain)},
            directory=directory,
            clock=wall_clock(self.config),
            offload=engine_offload(self.config.offload),
        )
        if self.task.topology is not None:
            return self.engine_class.of_peers(self.task, x, setup), None
        store = None
        if self.task.stored_arrays:
            store = ClientStore(directory / CLIENTS, keep=self.config.checkpoint.keep, dtype=x.dtype)
            for name, width in self.task.stored_arrays.items():
                store.declare(name, width)
        return self.engine_class(self.task, self.task.initial_state(x), store, setup), store

    @property
    def _own_models(self) -> tuple[int, int]:
        """Participants whose own models are evaluated, and local steps after which they are once more."""
        evaluation = self.config.evaluation
        if self.config.clients is None:
            return evaluation.num_peers, 0
        has_own = self.task.personal or evaluation.fine_tune_steps
        return evaluation.num_clients if has_own else 0, evaluation.fine_tune_steps

    def loop(self, engine: Engine, store: ClientStore | None, log: RunLog, checkpoints: Commits) -> Loop:
        """Assemble the loop."""
        config = self.config
        is_real = config.engine.name == "network" and config.engine.peers_file is not None
        return Loop(
            engine=engine,
            workload=self.workload,
            planner=self.planner,
            log=log,
            checkpoints=checkpoints,
            store=store,
            options=LoopOptions(
                num_rounds=config.rounds,
                quorum=None if is_real else config.population.quorum,
                evaluate_every=config.evaluation.every,
                evaluate_variants=self.task.levels if config.evaluation.by_capacity else {},
                evaluate_held=held_variants(self.task) if config.evaluation.by_holding else {},
                # Others keep what a peer or the observer has yet to commit, which is one phase at most.
                commit_every_seconds=0.0 if is_real else config.checkpoint.every_seconds,
                evaluate_own=self._own_models,
                stop=config.stop,
            ),
            warnings=self.warnings,
            advice=lambda: diagnosis.advice(config, self.task),
        )


def build(config: Config | Resolved, data: Any = None) -> Parts:
    """Load data, make the model, and assemble a run.

    Args:
        config: the configuration; unless it is resolved already, it is now.
        data: data of an equal workload, see `Workload`; None: it is loaded.

    Raises:
        GossamerError: an unknown plug-in, contradictory options, missing or malformed data.
    """
    resolved = resolve(config) if isinstance(config, Config) else config
    config, algorithm = resolved.config, resolved.algorithm
    workload = workload_of(config, data)
    if resolved.engine_class.is_remote:
        require_loadable(config, workload)
    check_sizes(config, algorithm, workload, is_remote=resolved.engine_class.is_remote)
    if wall_clock(config) is not None:
        told: Any = ToldWorkload(workload)
        workload = told
    require_holdings(config, algorithm, workload)
    task = make_task(config, algorithm, resolved.topology, workload)
    dtype = (initial := workload.init(config.seed)).dtype
    require_metric(task, initial)
    require_precision(config, dtype)
    require_averages(config, task.algorithm, workload)
    require_plain_commits(config.offload, task.stored_arrays)
    require_moments(config.algorithm["name"], task.variants[0].algorithm, workload.layout)
    planner = make_planner(config, task)
    warnings = resolved.warnings + workload.warnings + workload.warnings_of(config.train.step_size)
    warnings += accumulation_warnings(config, workload)
    require_whole_downlink(task)
    warnings += check_codecs(config, workload.layout, dtype.itemsize)
    warnings += check_cuts(workload.layout, planner.costs[0].variants)
    if uncounted := sorted({name for costs in planner.costs for name in costs.uncounted}):
        warnings += (
            f"client FLOPs, and simulated seconds of computation, leave out {', '.join(uncounted)}, for which there is"
            " no formula",
        )
    if config.engine.modes == "auto":
        flops = [variant.flops_per_sample for variant in planner.costs[0].variants]
        modes = modes_by_rule(task, flops, expected_participants(config, planner))
        task = task.with_modes(on_device(modes, config.engine.device))
    elif config.engine.modes == "measured":
        found = measured_modes(task, task.initial_state(initial))
        task = task.with_modes(on_device(found, config.engine.device))
    else:
        check_modes(task, config.algorithm["name"])
    pinned = [
        ModeOptions(capacity=one.capacity, holding=one.holding.name if one.holding else None, **dict(one.mode))
        for one in task.variants
    ]
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"modes": pinned})})
    return Parts(config, task, planner, resolved.engine_class, warnings)


def require_precision(config: Config, dtype: torch.dtype) -> None:
    """Refuse a workload whose parameters, of `dtype`, do not go with the precision of training.

    Raises:
        ConfigError: it trains in float64 where the loss is to be computed in less, or in float32 where it may not.
    """
    name, precision = config.workload["name"], config.train.precision
    if precision == "float64" and dtype != torch.float64:
        raise ConfigError(
            f"train.precision = 'float64', but workload {name!r} trains in {str(dtype).removeprefix('torch.')}: set"
            " workload.precision to double if it has that option, or give its class an argument dtype and use it"
        )
    if precision not in ("float32", "float64") and dtype == torch.float64:
        raise ConfigError(
            f"train.precision = {precision!r} is for float32, but workload {name!r} trains in float64: set"
            " workload.precision to single"
        )


def accumulation_warnings(config: Config, workload: Workload) -> tuple[str, ...]:
    """Return what is hardly meant about steps of several batches, a sentence each."""
    train = config.train
    if train.accumulate == 1:
        return ()
    if int(workload.num_samples.max()) <= train.batch_size:
        largest = int(workload.num_samples.max())
        return (
            f"train.accumulate = {train.accumulate} changes nothing, because nobody has more than {largest} samples,"
            f" one batch of train.batch_size = {train.batch_size}: leave it out, or correct it",
        )
    if not workload.traits.supports_padding:
        return (
            f"train.accumulate = {train.accumulate} differs from one batch of {train.step_size} samples, because the"
            " model mixes the samples of a batch",
        )
    return ()


def require_loadable(config: Config, workload: Workload) -> None:
    """Refuse, on an engine whose processes load data of their own, data that are read from an object of this process.

    Raises:
        ConfigError: they are.
    """
    found, spec = vars(workload).get("data"), config.workload.get("dataset")
    name = spec.get("name") if isinstance(spec, Mapping) else spec
    if isinstance(found, ImageData) and found.is_lazy and isinstance(name, str) and name.startswith(OBJECT):
        raise ConfigError(
            f"data {name!r} are read while training from an object of this process, which the processes of engine"
            f" {config.engine.name!r} cannot import: name data in files, such as data={{'name': 'arrays', 'path':"
            " ...}}, or a function of a module that returns an ImageData"
        )


def make_planner(config: Config, task: Task) -> Planner:
    """Return what plans the rounds of clients, or of peers."""
    train, clients, peers, sub = config.train, config.clients, config.peers, config.submodel
    shares = [share for _, share in sorted(zip(sub.capacities, sub.shares or [1.0] * len(sub.capacities), strict=True))]
    workload, levels = task.workload, tuple(task.levels)
    held: dict[str, Any] = {}
    if workload.holdings:
        everybody = np.arange(workload.num_clients, dtype=np.int64)
        held = {"holdings": workload.client_holdings(everybody), "num_holdings": len(workload.holdings)}
    capacities = Capacities(levels, shares, sub.assignment, workload.num_clients, config.seed, **held)
    shared: dict[str, Any] = {
        "num_rounds": config.rounds,
        "num_samples": task.workload.num_samples,
        "capacities": capacities,
        "costs": count_costs(config, task, capacities),
        "batch_size": train.step_size,
        **{name: vars(train)[name] for name in ("epochs", "steps", "lr", "schedule")},
    }
    if peers is not None:
        assert task.topology is not None
        every = peers.merge_every or task.algorithm.traits.merge_every
        overlaps = [phase.algorithm.traits.overlaps for phase in task.phases]
        graph: dict[str, Any] = {"topology": task.topology, "merge_every": every, "final_merge": peers.final_merge}
        return PeerPlanner(**shared, **graph, overlaps=overlaps, own=config.engine.peer)
    assert clients is not None
    found = resolve_function("sampler", clients.sampler)

    def sampler(seed: int, round: int, num_clients: int, count: int) -> Any:
        """Return what the sampler does, as integers."""
        with plugin_errors(f"clients.sampler {clients.sampler!r}"):
            return np.asarray(found(seed, round, num_clients, count), dtype=np.int64)

    return ClientPlanner(
        **shared,
        seed=config.seed,
        per_round=clients.per_round,
        sampler=sampler,
        weighting=clients.weighting,
        deadline_seconds=math.inf if clients.deadline_seconds is None else clients.deadline_seconds,
        over_selection=clients.over_selection,
        drops_late=not goes_by_the_clock(config),
    )


def expected_participants(config: Config, planner: Planner) -> list[float]:
    """Return how many participants of each variant a round has on average."""
    number = len(planner.num_samples) if config.clients is None else config.clients.per_round
    return [number * share for share in planner.capacities.variant_shares]


def count_costs(config: Config, task: Task, capacities: Capacities) -> list[Costs]:
    """Count what each capacity costs in each phase of a round, and give every client its device.

    Raises:
        ConfigError: a sub-model does not fit a device that trains it.
    """
    devices = assign_devices(
        config.devices or [DeviceShare(profile=config.device)],
        config.submodel.assignment,
        task.workload.num_clients,
        config.seed,
    )
    pairs = devices_of_capacities(devices, capacities, task.workload.num_clients)
    found = []
    for phase in task.phases:
        variants = count_variants(
            task.workload,
            phase.algorithm,
            phase.variants,
            batch_size=min(config.train.batch_size, task.batch_size),
            scaler=task.scaler,
            bytes_per_number=task.workload.init(task.seed).itemsize,
        )
        found.append(Costs(variants, devices))
        found[-1].check_memory(pairs)
    return found


def check_sizes(config: Config, algorithm: Algorithm, workload: Workload, *, is_remote: bool) -> None:
    """Refuse, by lower bounds, what this machine could not hold if nothing else were there, before it is made.

    Raises:
        ConfigError: the model with what training needs, the workers, or the order of a round's samples are too large.
    """
    d, train, workers = workload.layout.d, config.train, 0 if is_remote else num_workers(config, workload)
    num_rows = 1 if config.peers is None or is_remote else workload.num_clients
    num_arrays = len(algorithm.traits.downlink or algorithm.traits.uplink)
    rows = num_rows * num_arrays + 2 * max(1, workers)  # a copy that is trained and its gradient, in each process
    whose = f"{num_rows:,} peers" if num_rows > 1 else "the model"
    what = f"training {whose} of {d:,} parameters in {max(1, workers)} process{'es' if workers > 1 else ''}"
    remedy = "take a smaller model, fewer peers or fewer engine.workers"
    number_bytes = 8 if train.precision == "float64" else 4
    require_memory(number_bytes * d * rows + WORKER_BYTES * workers, what, remedy)
    longest = int(workload.num_samples.max())
    per_epoch = -(-longest // train.step_size)
    steps = train.steps if train.steps is not None else (train.epochs or 1) * per_epoch
    given = f"train.steps = {train.steps}" if train.steps is not None else f"train.epochs = {train.epochs}"
    if steps >= MAX_STEPS:
        raise ConfigError(f"{given} asks for {steps:,} steps of a participant and round: give less than {MAX_STEPS:,}")
    order = 8 * steps * min(train.step_size, longest)
    require_memory(order, f"{given}: the order of {steps:,} batches of samples", "take fewer steps a round")


def num_workers(config: Config, workload: Workload) -> int:
    """Return the number of processes, or actors, to start: no more than there are participants."""
    given, clients = config.engine.workers, config.clients
    wanted = default_workers() if given == "auto" else given
    chosen = workload.num_clients if clients is None else clients.over_selection * clients.per_round
    return int(min(wanted, chosen, workload.num_clients))


def check_modes(task: Task, algorithm: str) -> None:
    """Refuse modes that workload or algorithm do not allow.

    Raises:
        ConfigError: there is one.
    """
    ragged = bool((task.workload.num_samples % task.batch_size != 0).any())
    for variant in task.variants:
        mode, name = variant.mode, variant.name
        if mode.stacked and not task.is_stackable:
            raise ConfigError(
                f"engine.modes stacks capacity {name}, but algorithm {algorithm!r} trains"
                " participants one by one: use auto"
            )
        if mode.stacked and (not task.workload.traits.supports_stacking or (ragged and not mode.padding)):
            raise ConfigError(
                f"engine.modes stacks capacity {name}, whose batches differ or cannot be stacked: use auto"
            )
        if mode.padding and not task.workload.traits.supports_padding:
            raise ConfigError(f"engine.modes pads capacity {name}, but the model mixes samples of a batch: use auto")


def default_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
