"""Running and resuming experiments: one directory a run, stopped politely, continued from the last commit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.build import Parts, build
from gossamer.config import loading as configuration
from gossamer.config.diagnosis import diagnose
from gossamer.config.inputs import END, MOVABLE, configuration_inputs, require_end, require_same
from gossamer.config.offload import stored_offload
from gossamer.config.recording import recorded
from gossamer.config.resolve import Resolved, resolve
from gossamer.engines.base import EngineHooks
from gossamer.engines.collective.environment import is_restarted
from gossamer.engines.collective.serving import on_all_ranks
from gossamer.engines.collective.world import require_collective
from gossamer.engines.network.outbox import is_awaited
from gossamer.engines.stopping import StopRequest, stop_on_signals
from gossamer.engines.training.mixing import merged_model
from gossamer.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    GossamerError,
    Interrupted,
    StorageError,
    warn,
)
from gossamer.memory import memory_errors
from gossamer.profiling.spans import Spans
from gossamer.profiling.storing import stored_elsewhere
from gossamer.registry import errors_of_plug_ins, trusting
from gossamer.results.description import describe_model
from gossamer.round_record import Observer
from gossamer.storage.checkpoint import Checkpoint, Checkpoints, commits_in
from gossamer.storage.disk import DirectoryLock
from gossamer.storage.experiment_file import hold_experiment, read_experiment, replace_experiment
from gossamer.storage.model_file import DESCRIPTION
from gossamer.storage.runlog import (
    CHECKPOINTS,
    CONFIG,
    EXPERIMENT,
    RunLog,
    new_directory,
    read_config,
    read_metrics,
    require_vacant,
)
from gossamer.storage.sinks import TrackedRun, make_sinks


@dataclass(repr=False)
class Run:
    """What a run left.

    Attributes:
        directory: the run directory; of several runs (methods, seeds), the directory that holds theirs.
        metrics: one dict a round; of several runs, all of them, each with its ``"run"`` (sub-directory).
        params: ``{name: tensor}`` of the final global model; of several runs, those of the first.
        runs: the single runs, in order.
        stop_reason: why the run ended before its last round, as its configuration's ``stop`` says; "": it did not.
    """

    directory: Path
    metrics: list[dict[str, Any]]
    params: dict[str, Tensor]
    runs: list[Run] = field(default_factory=list)
    stop_reason: str = ""

    def __repr__(self) -> str:
        """Return three lines: directory; rounds and last metrics; size of the model and number of runs."""
        last = self.metrics[-1] if self.metrics else {}
        names = (
            list(last)[list(last).index("train_loss") :] if "train_loss" in last else []
        )  # what was spent stands before
        shown = [f"{name} {last[name]:.4g}" for name in names if isinstance(last[name], float)]
        size = f"{sum(value.numel() for value in self.params.values()):,} parameters in {len(self.params)} tensors"
        return "\n".join(
            (
                f"Run in {self.directory}",
                ", ".join([f"{len(self.metrics)} rounds", *shown]),
                f"{size}, of the first of {len(self.runs)} runs" if self.runs else size,
            )
        )


@dataclass
class Hooks:
    """What a caller may attach to a run.

    Attributes:
        observer: called for each single run, with its name and number of rounds; returns what watches it.
        spans: returns what listens to the spans of a single run.
        is_ended: whether the run that goes on shall end after its round, as if it had no more of them.
        tell: gets lines about who joins and leaves a run of real clients.
        show: gets a table of real clients, once a second, see `gossamer.engines.network.state.table_of`.
    """

    observer: Callable[[str, int], Observer | None] = lambda name, num_rounds: None
    spans: Callable[[], Spans] = Spans
    is_ended: Callable[[], bool] = lambda: False
    tell: Callable[[str], None] = lambda line: None
    show: Callable[[Sequence[Mapping[str, Any]]], None] = lambda clients: None

    def of_engine(self, log: RunLog, stop: StopRequest) -> EngineHooks:
        """Return those of the engine of a run with this log."""
        return EngineHooks(
            lambda: stop() or self.is_ended(), log.log_event, stop.is_overdue, tell=self.tell, show=self.show
        )


def run(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    hooks: Hooks | None = None,
    trust: bool = False,
) -> Run:
    """Run an experiment.

    Args:
        source: path of a YAML file, or a dict.
        overrides: ``key.path=value`` strings.
        out: the directory to make; None: ``runs/<name>-<time>``.
        trust: whether the configuration may name any code, because it is your own, see `gossamer.registry`.

    Raises:
        GossamerError: its message says what is wrong and what to do; work done is committed.
    """
    with trusting(trust), errors_of_plug_ins(), stop_on_signals() as stop:
        known = partial(configuration.load, source, overrides)
        found = on_all_ranks(lambda: _run(source, overrides, out, hooks or Hooks(), stop), known, stop)
        return found or Run(Path(out or "runs"), [], {})


def _run(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    out: str | Path | None,
    hooks: Hooks,
    stop: StopRequest,
) -> Run:
    with stop.at_once():
        data = configuration.load(source, overrides)
        singles = configuration.expand(data)
        resolved = {name: resolve(configuration.parse(single)) for name, single in singles.items()}
    for name, one in resolved.items():  # before the first of them runs for hours
        _warn(name, one)
    directory = Path(out) if out is not None else new_directory(Path("runs"), str(data.get("name", "run")))
    if is_restarted() and any((directory / name).exists() for name in (EXPERIMENT, CONFIG)):
        return _resume(directory, hooks, stop)
    require_vacant(directory)
    try:
        return _run_all(directory, singles, hooks, stop, resolved, experiment=data)
    except GossamerError:
        if out is None:
            with suppress(OSError):  # a directory that holds nothing, because the configuration was refused
                directory.rmdir()
        raise


def resume(
    directory: str | Path,
    hooks: Hooks | None = None,
    overrides: Sequence[str] = (),
    restart: bool = False,
    trust: bool = False,
) -> Run:
    """Continue a run from its last commit, or all unfinished runs of an experiment.

    Args:
        directory: of the run or the experiment.
        hooks: see `Hooks`.
        overrides: ``key=value`` strings. The keys are those of `MOVABLE`, for this time, and ``rounds``, from now on,
            if nothing depends on the number of rounds: the bits are those of a run that had as many from its start.
        restart: whether to erase the log of a run that cannot be continued, and to train it anew.
        trust: see `run`.

    Raises:
        ConfigError: the directory holds no run, or an override is of another key.
        CheckpointError: no commit is valid, or configuration, data or logs are not those of the last one.
    """
    directory = Path(directory)
    for override in overrides:
        if override.partition("=")[0] not in (*MOVABLE, END):
            known = ", ".join((*MOVABLE, END))
            raise ConfigError(f"override {override!r}: a run that has begun can only change {known}: start another run")
    with trusting(trust), errors_of_plug_ins(), stop_on_signals() as stop:
        shared = {"directory": str(directory), "overrides": list(overrides)}
        lead = partial(_resume, directory, hooks or Hooks(), stop, overrides, restart)
        return on_all_ranks(lead, lambda: shared, stop) or Run(directory, [], {})


def _resume(
    directory: Path, hooks: Hooks, stop: StopRequest, overrides: Sequence[str] = (), restart: bool = False
) -> Run:
    singles: Mapping[str, Mapping[str, Any]] = {"": {}}
    if os.path.exists(directory / EXPERIMENT):
        singles = configuration.expand(_move_end_of_all(directory, overrides))
    else:
        read_config(directory)  # says so where this is no run directory
    return _run_all(directory, singles, hooks, stop, {}, overrides, restart)


def _move_end_of_all(directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of an experiment, with another number of rounds if `overrides` have one."""
    data, ends = read_experiment(directory), [one for one in overrides if one.partition("=")[0] == END]
    if not ends:
        return data
    if own := [name for name, method in (data.get("methods") or {}).items() if END in method]:
        raise ConfigError(f"override {ends[0]!r}: methods.{own[0]} has rounds of its own: resume its runs one by one")
    moved = configuration.load(data, ends)
    for name in configuration.expand(moved):
        if (directory / name / CONFIG).exists():
            commits = commits_in(directory / name / CHECKPOINTS)
            require_end(read_config(directory / name), moved[END], commits[0][0][0] if commits else 0)
    replace_experiment(directory, moved)
    return moved


def _run_all(
    directory: Path,
    singles: Mapping[str, Mapping[str, Any]],
    hooks: Hooks,
    stop: StopRequest,
    resolved: dict[str, Resolved],
    overrides: Sequence[str] = (),
    restart: bool = False,
    experiment: Mapping[str, Any] | None = None,
) -> Run:
    """Run or resume every single run below `directory`, in order.

    Args:
        experiment: what several runs were expanded from, to be kept beside their directories; None: it is.
    """
    runs: list[Run] = []
    held: DirectoryLock | None = None
    with ExitStack() as stack, memory_errors():
        for name, data in singles.items():
            where, parts = directory / name, None
            try:
                if not (where / CONFIG).exists():
                    ready = resolved.pop(name, None)  # it may hold a large graph
                    with stop.at_once():
                        parts = build(ready or resolve(configuration.parse(configuration.load(data, overrides))))
                if name and held is None:
                    held = stack.enter_context(closing(hold_experiment(directory, experiment)))
                if parts is None:
                    runs.append(_continue(where, name, hooks, stop, overrides, restart))
                else:
                    runs.append(_begin(parts, where, name, hooks, stop))
            except (Interrupted, KeyboardInterrupt) as error:
                told = str(error) if isinstance(error, Interrupted) else "interrupted at once, without a commit"
                written = any((directory / name).exists() for name in (EXPERIMENT, CONFIG))
                remedy = f"resume with: {resume_command(directory)}" if written else "nothing was written: run it again"
                raise Interrupted(f"{told}; {remedy}") from None
            except GossamerError as error:
                if held is not None and not runs and not where.exists():
                    held.close(discard=True)
                error.args = (f"{name}: {error}" if name else str(error),)
                raise
    if list(singles) == [""]:
        return runs[0]
    metrics = [{"run": name} | record for name, one in zip(singles, runs, strict=True) for record in one.metrics]
    return Run(directory, metrics, runs[0].params, runs)


def _warn(name: str, found: Resolved | Parts) -> None:
    """Issue the warnings of a run, with its name where it is one of several."""
    warn(found.warnings, found.config.name if name else "")


def resume_command(directory: Path) -> str:
    """Return the command that resumes a run or an experiment, as a shell takes it."""
    return f"gossamer resume {shlex.quote(str(directory))}"


def _begin(parts: Parts, directory: Path, name: str, hooks: Hooks, stop: StopRequest) -> Run:
    """Run from the first round on; what fails before the first commit leaves nothing behind."""
    _warn(name, parts)
    inputs = parts.inputs
    log = RunLog.create(directory, parts.config.model_dump(mode="json"))
    with closing(log):
        checkpoints = Checkpoints(directory / CHECKPOINTS, parts.config.checkpoint.keep, inputs)
        try:
            with errors_of_plug_ins(), recorded(parts.config.profile, directory):
                return _run_rounds(parts, directory, log, checkpoints, None, name, hooks, stop)
        except GossamerError as error:
            if checkpoints.is_empty and not isinstance(error, Interrupted | StorageError):
                log.close(discard=True)
            raise


def _continue(
    directory: Path, name: str, hooks: Hooks, stop: StopRequest, overrides: Sequence[str], restart: bool
) -> Run:
    """Run from the last commit on, whose configuration, data and logs must be those of now."""

    def prepare() -> Parts:
        """Build the run."""
        with stop.at_once():
            return build(resolve(config))

    with closing(RunLog.open(directory)) as log:
        written = read_config(directory)
        config = configuration.parse(configuration.load(written, overrides))
        inputs, parts = {"configuration": configuration_inputs(written)}, None
        checkpoints = Checkpoints(directory / CHECKPOINTS, config.checkpoint.keep, inputs)
        try:
            latest = checkpoints.latest()
            log.check(None if latest is None else latest.logs)
            if latest is not None:
                require_same(latest.inputs, inputs)
                require_end(written, config.rounds, latest.round, latest.progress.get("stop_reason", ""))
                parts = prepare()
                require_same(latest.inputs, parts.inputs | inputs)
        except CheckpointError as error:
            if not restart:
                again = f"{resume_command(directory)} --restart"
                raise CheckpointError(f"{error}, or erase its log and train anew with: {again}") from error
            latest = None
            checkpoints.clear()
            log.erase()
        parts = parts or prepare()
        if config.rounds != written[END]:
            log.write_config(written | {END: config.rounds})
        _warn(name, parts)
        if config.engine.device != written["engine"].get("device"):
            warn([f"engine.device = {config.engine.device!r} changes the last bits from here on"], name)
        checkpoints.inputs = parts.inputs | inputs
        with recorded(config.profile, directory):
            return _run_rounds(parts, directory, log, checkpoints, latest, name, hooks, stop)


def _run_rounds(
    parts: Parts,
    directory: Path,
    log: RunLog,
    checkpoints: Checkpoints,
    latest: Checkpoint | None,
    name: str,
    hooks: Hooks,
    stop: StopRequest,
) -> Run:
    """Start the engine, and run what is left from `latest` on."""
    config = parts.config
    require_collective(config.engine.name)
    is_finished = latest is not None and (latest.round >= config.rounds or bool(latest.progress.get("stop_reason")))
    if not (is_finished and (directory / DESCRIPTION).exists()):
        describe_model(directory, parts.workload)
    if latest is not None and is_finished and not is_awaited(directory, config.rounds):
        row, reason = merged_model(latest.arrays["state.x"]), latest.progress.get("stop_reason", "")
        return Run(directory, read_metrics(directory), parts.workload.params_of(row), stop_reason=reason)
    tracked = TrackedRun.of(directory, config.model_dump(mode="json"), latest.round if latest else None)
    log.sinks = make_sinks(config.log.sinks, tracked)
    with stored_elsewhere(stored_offload(config.offload), log, checkpoints) as commits, ExitStack() as stack:
        engine, store = parts.start_engine(directory, hooks.of_engine(log, stop))
        stack.enter_context(closing(engine))
        loop = parts.loop(engine, store, log, commits)
        loop.observer, loop.spans = hooks.observer(name or config.name, config.rounds), hooks.spans()
        if latest is not None:
            loop.restore(latest)  # cuts the logs, so what was damaged is told afterwards
            for message in latest.damaged:
                log.log_event("checkpoint-damaged", message=message)
            warn((f"{message}; the commit before it is used" for message in latest.damaged), name)
        else:  # new, or killed before its first commit
            log.erase()
            if store is not None:
                store.restore({})
        try:
            loop.run()
        except Interrupted:
            if stop() or not hooks.is_ended():
                raise
        except EngineError as error:
            for note in vars(error).get("__notes__", ()):  # the traceback of a worker
                log.log_event("worker-failed", message=str(error), traceback=note)
            raise
        row, reason = engine.model(), loop.progress.stop_reason
    metrics = read_metrics(directory)
    told = diagnose(config, parts.task, metrics)
    for message in told:
        log.log_event("warning", message=message)
    warn(told, name)
    return Run(directory, metrics, parts.workload.params_of(row), stop_reason=reason)
