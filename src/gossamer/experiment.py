"""From a configuration to finished runs: build the parts, run or resume, one directory a run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from gossamer import config as configuration
from gossamer.algorithms.base import Algorithm
from gossamer.checkpoint import Checkpoints
from gossamer.clientstore import ClientStore
from gossamer.config import Config, ModeOptions
from gossamer.engines.base import Task, TrainOptions, VariantMode
from gossamer.engines.local.measure import choose_modes
from gossamer.errors import ConfigError, GossamerError, Interrupted, nearest, storage_errors
from gossamer.planning import Capacities, Planner
from gossamer.profiling.costs import Costs
from gossamer.registry import resolve
from gossamer.rounds import Loop, LoopOptions, Observer
from gossamer.runlog import RunLog, Sink, new_directory, read_config, read_metrics
from gossamer.sinks import MLflowSink, TensorBoardSink, WandbSink
from gossamer.spans import Spans
from gossamer.submodel import Cutter
from gossamer.workloads.base import Workload

EXPERIMENT = "experiment.yaml"


@dataclass
class Run:
    """What a run left.

    Attributes:
        directory: the run directory; of several runs (methods, seeds), the directory that holds theirs.
        metrics: one dict a round; of several runs, all of them, each with its ``"run"`` (sub-directory).
        params: ``{name: tensor}`` of the final global model; of several runs, those of the first.
        runs: the single runs, in order.
    """

    directory: Path
    metrics: list[dict[str, Any]]
    params: dict[str, Tensor]
    runs: list[Run] = field(default_factory=list)


@dataclass
class Hooks:
    """What a caller may attach to a run: an observer for each single run, listeners of spans."""

    observer: Callable[[str, int], Observer | None] = lambda name, num_rounds: None
    spans: Callable[[], Spans] = Spans


def run(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    hooks: Hooks | None = None,
) -> Run:
    """Run an experiment.

    Args:
        source: path of a YAML file, or a dict.
        overrides: ``key.path=value`` strings.
        out: the directory to make; None: ``runs/<name>-<time>``.

    Raises:
        GossamerError: its message says what is wrong and what to do; work done is committed.
    """
    data = configuration.load(source, overrides)
    singles = configuration.expand(data)
    with storage_errors(Path(out) if out is not None else Path("runs")):
        directory = Path(out) if out is not None else new_directory(Path("runs"), str(data.get("name", "run")))
        directory.mkdir(parents=True, exist_ok=True)
    if list(singles) != [""]:
        _write_experiment(directory, data)
    return _run_all(directory, singles, hooks or Hooks())


def resume(directory: str | Path, hooks: Hooks | None = None) -> Run:
    """Continue a run from its last commit, or all unfinished runs of an experiment.

    Raises:
        ConfigError: the directory holds no run.
        CheckpointError: no commit is valid.
    """
    directory = Path(directory)
    if not (directory / EXPERIMENT).exists():
        read_config(directory)  # says so where this is no run directory
        return _run_all(directory, {"": {}}, hooks or Hooks())
    data = configuration.load(directory / EXPERIMENT)
    return _run_all(directory, configuration.expand(data), hooks or Hooks())


def _write_experiment(directory: Path, data: Mapping[str, Any]) -> None:
    path = directory / EXPERIMENT
    if path.exists():
        raise ConfigError(f"{str(directory)!r} already holds an experiment: resume it, or choose another --out")
    with storage_errors(path):
        path.write_text(yaml.safe_dump(dict(data), sort_keys=False))


def _run_all(directory: Path, singles: Mapping[str, Mapping[str, Any]], hooks: Hooks) -> Run:
    """Run or resume every single run below `directory`, in order."""
    runs = []
    with stop_on_signals() as stop_requested:
        for name, data in singles.items():
            where = directory / name if name else directory
            started = (where / "config.yaml").exists()
            config = configuration.parse(read_config(where) if started else data)
            try:
                runs.append(_run_single(config, where, started, name or config.name, hooks, stop_requested))
            except Interrupted as stop:
                raise Interrupted(f"{stop}; resume with: gossamer resume {directory}") from None
            except GossamerError as error:
                error.args = (f"{name}: {error}" if name else str(error),)
                raise
    if list(singles) == [""]:
        return runs[0]
    metrics = [{"run": name} | record for name, one in zip(singles, runs, strict=True) for record in one.metrics]
    return Run(directory, metrics, runs[0].params, runs)


def _run_single(
    config: Config, directory: Path, resumed: bool, name: str, hooks: Hooks, stop_requested: Callable[[], bool]
) -> Run:
    parts = build(config)
    sinks = make_sinks(config.log.sinks, directory)
    if resumed:
        log = RunLog.open(directory, sinks)
    else:
        log = RunLog.create(directory, parts.config.model_dump(mode="json"), sinks=sinks)
    checkpoints = Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep)
    latest = checkpoints.latest()
    for message in latest.damaged if latest is not None else ():
        log.log_event("checkpoint-damaged", message=message)
    engine, store = parts.start_engine(directory)
    try:
        loop = parts.loop(engine, store, log, checkpoints)
        loop.observer, loop.spans = hooks.observer(name, config.rounds), hooks.spans()
        loop.stop_requested = engine.stop_requested = stop_requested
        if latest is not None:
            loop.restore(latest)
        elif resumed:  # killed before its first commit
            log.truncate(dict.fromkeys(log.offsets(), 0))
        loop.run()
        row = engine.read()["x"][0]
    finally:
        engine.close()
        log.close()
    return Run(directory, read_metrics(directory), parts.workload.layout.views(row))


@dataclass(frozen=True)
class Parts:
    """The parts of a run before it starts, and its resolved configuration."""

    config: Config
    workload: Workload
    algorithm: Algorithm
    task: Task
    planner: Planner

    def start_engine(self, directory: Path) -> tuple[Any, ClientStore | None]:
        """Start the engine from the initial model, with a store for private state if the algorithm keeps some."""
        state = self.algorithm.init(self.workload.init(self.config.seed)[None])
        store = None
        if self.algorithm.client_arrays:
            store = ClientStore(directory / "clients", keep=self.config.checkpoint.keep)
            store.restore({})
            for name in self.algorithm.client_arrays:
                store.declare(name, self.workload.layout.d)
        options = self.config.engine
        engine_class = resolve("engine", options.name)
        workers = default_workers() if options.workers == "auto" else options.workers
        block_size = None if options.block_size == "auto" else options.block_size
        return engine_class(self.task, state, store, workers=workers, block_size=block_size), store

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
        cutter=Cutter(workload.layout, resolve("strategy", sub.strategy), sub.stride, config.seed),
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
    return Parts(config, workload, algorithm, task, planner)


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
    if rule in ("smallest", "largest"):
        factor = min(sub.capacities) if rule == "smallest" else max(sub.capacities)
        changes |= {"capacities": [1.0], "shares": None}
        if "model" in workload:
            model = workload["model"] if isinstance(workload["model"], Mapping) else {"name": workload["model"]}
            workload["model"] = {**model, "width": model.get("width", 1.0) * factor}
        elif factor != 1.0:
            raise ConfigError(
                f"algorithm {name!r} scales workload.model.width, which workload {workload['name']!r} does not have"
            )
    default_mask = getattr(algorithm, "default_label_mask", "none")
    if workload["name"] == "image-classification":
        workload.setdefault("label_mask", default_mask)
    if sub.mask_labels is None:
        changes["mask_labels"] = default_mask != "none"
    settled: dict[str, Any] = {"submodel": sub.model_copy(update=changes), "workload": workload}
    if rule in ("smallest", "largest"):  # the resolved file must settle to itself
        settled["algorithm"] = {**config.algorithm, "name": "fedavg"}
    return config.model_copy(update=settled)


def _modes(config: Config, task: Task) -> tuple[VariantMode, ...]:
    """Return the pinned modes, or measure."""
    given = config.engine.modes
    if given == "auto":
        state = task.algorithm.init(task.workload.init(config.seed)[None])
        return choose_modes(task, state)
    by_capacity = {mode.capacity: mode for mode in given}
    if set(by_capacity) != set(task.capacities):
        raise ConfigError(
            f"engine.modes names capacities {sorted(by_capacity)} but the run has {list(task.capacities)}: name each"
            " once, or set engine.modes to auto"
        )
    return tuple(VariantMode(**by_capacity[c].model_dump(exclude={"capacity"})) for c in task.capacities)


def make_sinks(names: Sequence[str], directory: Path) -> list[Sink]:
    """Open the trackers that the configuration names.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoardSink(directory / "tensorboard"),
        "mlflow": lambda: MLflowSink("gossamer", directory.name),
        "wandb": lambda: WandbSink("gossamer", directory.name, directory),
    }
    for name in names:
        if name not in makers:
            raise ConfigError(
                f"unknown entry {name!r} in log.sinks{nearest(name, makers)} (known: {', '.join(makers)})"
            )
    return [makers[name]() for name in names]


def split(plugin: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split a plug-in section into its name and its options."""
    return plugin["name"], {key: value for key, value in plugin.items() if key != "name"}


def default_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a polite request to stop; the second SIGINT interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
