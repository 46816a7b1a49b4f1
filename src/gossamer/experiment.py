"""Running and resuming experiments: one directory a run, stopped politely, continued from the last commit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from gossamer.build import Parts, build
from gossamer.config import loading as configuration
from gossamer.config.resolve import Resolved, resolve
from gossamer.engines.base import EngineHooks
from gossamer.errors import ConfigError, EngineError, GossamerError, Interrupted, storage_errors, warn
from gossamer.profiling.spans import Spans
from gossamer.round_record import Observer
from gossamer.storage.checkpoint import Checkpoint, Checkpoints
from gossamer.storage.runlog import CONFIG, EXPERIMENT, RunLog, new_directory, read_config, read_metrics
from gossamer.storage.sinks import make_sinks


@dataclass(repr=False)
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


# Where a run that has begun may go on: what changes no bits.
MOVABLE = tuple(f"engine.{key}" for key in ("name", "workers", "block_size", "address", "straggler_seconds"))


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
    resolved = {name: resolve(configuration.parse(single)) for name, single in singles.items()}
    for name, one in resolved.items():  # before the first of them runs for hours
        _warn(name, one)
    directory = Path(out) if out is not None else new_directory(Path("runs"), str(data.get("name", "run")))
    if (directory / EXPERIMENT).exists() or (directory / CONFIG).exists():
        raise ConfigError(f"{str(directory)!r} already holds a run: resume it, or choose another --out")

    def keep_experiment() -> None:
        """Write what several runs were expanded from, beside their directories."""
        path = directory / EXPERIMENT
        if list(singles) != [""] and not path.exists():
            with storage_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
                path.write_text(yaml.safe_dump(dict(data), sort_keys=False))

    try:
        return _run_all(directory, singles, hooks or Hooks(), resolved, keep_experiment)
    except GossamerError:
        if out is None:
            with suppress(OSError):  # a directory that holds nothing, because the configuration was refused
                directory.rmdir()
        raise


def resume(directory: str | Path, hooks: Hooks | None = None, overrides: Sequence[str] = ()) -> Run:
    """Continue a run from its last commit, or all unfinished runs of an experiment.

    Args:
        directory: of the run or the experiment.
        hooks: see `Hooks`.
        overrides: ``key=value`` strings, for this time; the keys are those of `MOVABLE`, which change no bits.

    Raises:
        ConfigError: the directory holds no run, or an override is of another key.
        CheckpointError: no commit is valid.
    """
    directory = Path(directory)
    for override in overrides:
        if override.partition("=")[0] not in MOVABLE:
            raise ConfigError(
                f"override {override!r}: a run that has begun can only change {', '.join(MOVABLE)}: start another run"
            )
    if not (directory / EXPERIMENT).exists():
        read_config(directory)  # says so where this is no run directory
        return _run_all(directory, {"": {}}, hooks or Hooks(), overrides=overrides)
    data = configuration.load(directory / EXPERIMENT)
    return _run_all(directory, configuration.expand(data), hooks or Hooks(), overrides=overrides)


def _run_all(
    directory: Path,
    singles: Mapping[str, Mapping[str, Any]],
    hooks: Hooks,
    resolved: dict[str, Resolved] | None = None,
    before_writing: Callable[[], None] = lambda: None,
    overrides: Sequence[str] = (),
) -> Run:
    """Run or resume every single run below `directory`, in order."""
    runs = []
    with stop_on_signals() as stop_requested:
        for name, data in singles.items():
            where = directory / name if name else directory
            has_begun = (where / CONFIG).exists()
            config = configuration.parse(configuration.load(read_config(where) if has_begun else data, overrides))
            ready = None if resolved is None or has_begun else resolved.pop(name, None)  # it may hold a large graph
            try:
                ready = ready or resolve(config)
                runs.append(_run_single(ready, where, name, hooks, stop_requested, before_writing))
            except Interrupted as stop:
                written = directory.exists()
                remedy = f"resume with: gossamer resume {directory}" if written else "nothing was written: run it again"
                raise Interrupted(f"{stop}; {remedy}") from None
            except GossamerError as error:
                error.args = (f"{name}: {error}" if name else str(error),)
                raise
    if list(singles) == [""]:
        return runs[0]
    metrics = [{"run": name} | record for name, one in zip(singles, runs, strict=True) for record in one.metrics]
    return Run(directory, metrics, runs[0].params, runs)


def _warn(name: str, found: Resolved | Parts) -> None:
    """Issue the warnings of a run, with its name where it is one of several."""
    warn(found.warnings, found.config.name if name else "")


def _run_single(
    resolved: Resolved,
    directory: Path,
    name: str,
    hooks: Hooks,
    stop_requested: Callable[[], bool],
    before_writing: Callable[[], None],
) -> Run:
    resumed = (directory / CONFIG).exists()
    parts = build(resolved)
    _warn(name, parts)
    config = parts.config
    if stop_requested():
        raise Interrupted("stopped before the first round")
    sinks = make_sinks(config.log.sinks, directory)
    before_writing()
    if resumed:
        log = RunLog.open(directory, sinks)
    else:
        log = RunLog.create(directory, parts.config.model_dump(mode="json"), sinks=sinks)
    with closing(log):
        checkpoints = Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep)
        latest = checkpoints.latest()
        if latest is not None and latest.round >= config.rounds:
            row = parts.final_model({"x": latest.arrays["state.x"]})
        else:
            row = _run_rounds(parts, directory, log, checkpoints, latest, name or config.name, hooks, stop_requested)
    return Run(directory, read_metrics(directory), parts.workload.params_of(row))


def _run_rounds(
    parts: Parts,
    directory: Path,
    log: RunLog,
    checkpoints: Checkpoints,
    latest: Checkpoint | None,
    name: str,
    hooks: Hooks,
    stop_requested: Callable[[], bool],
) -> Tensor:
    """Start the engine, run what is left from `latest` on, and return the final flat model [d]."""
    engine, store = parts.start_engine(directory, EngineHooks(stop_requested, log.log_event))
    with closing(engine):
        loop = parts.loop(engine, store, log, checkpoints)
        loop.observer, loop.spans = hooks.observer(name, parts.config.rounds), hooks.spans()
        if latest is not None:
            loop.restore(latest)  # cuts the logs, so what was damaged is told afterwards
            for message in latest.damaged:
                log.log_event("checkpoint-damaged", message=message)
        else:  # new, or killed before its first commit
            log.truncate(dict.fromkeys(log.offsets(), 0))
            if store is not None:
                store.restore({})
        try:
            loop.run()
        except EngineError as error:
            for note in vars(error).get("__notes__", ()):  # the traceback of a worker
                log.log_event("worker-failed", message=str(error), traceback=note)
            raise
        return parts.final_model(engine.read())


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a polite request to stop; the second SIGINT interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        """Ask the run to stop; asked twice, interrupt it."""
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
