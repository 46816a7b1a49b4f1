"""Sinks that pass a run's metrics on to a tracker: TensorBoard, MLflow, Weights & Biases; see docs/trackers.md.

Each is a thin adapter that imports its tracker when it is created. The trackers come with the extra ``tracking``. Tests
replace them by modules of the same signatures, and use the real ones where they are installed: they were tried with
tensorboard 2.21.0, mlflow-skinny 3.17.2 (files) and wandb 0.31.0 (offline), without a server.

Every finite number of a record becomes a scalar; nested objects are named ``outer/inner``, and lists, text and null are
left out. The step is the record's ``round``. A run that is resumed goes on as the same run of its tracker, and the
rounds since the last commit are sent again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gossamer.errors import ConfigError, GossamerError, nearest, one_line
from gossamer.registry import import_optional
from gossamer.round_record import numbers
from gossamer.storage.disk import write_atomically
from gossamer.storage.runlog import EXPERIMENT, Sink
from gossamer.storage.strict_yaml import dump_yaml, read_yaml

TRACKERS = "trackers.json"  # in a run's directory: {tracker: what it calls the run}
MAX_DEPTH = 2  # of a run's directory below that of its experiment: method and seed
MAX_PARAMETER = 500  # characters of a value that every MLflow takes
PARAMETERS = 100  # that MLflow takes at a time


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers are told of it.

    Attributes:
        directory: its directory.
        config: its resolved configuration, of plain values.
        round: rounds that are done and committed; None: it begins.
        experiment: name of the experiment.
        group: what its runs have in common: the name of the experiment's directory.
        name: method and seed, such as ``"fedavg/seed-0"``; of a single run the name of its directory.
    """

    directory: Path
    config: Mapping[str, Any]
    round: int | None
    experiment: str
    group: str
    name: str

    @classmethod
    def of(cls, directory: Path, config: Mapping[str, Any], round: int | None) -> TrackedRun:
        """Return the run in a directory, named by its place below that of its experiment."""
        directory = directory.absolute()
        whole = next((one for one in [*directory.parents][:MAX_DEPTH] if (one / EXPERIMENT).is_file()), None)
        if whole is None:
            return cls(directory, config, round, str(config.get("name", "run")), directory.name, directory.name)
        experiment = str(read_yaml(whole / EXPERIMENT, "experiment").get("name", "run"))
        return cls(directory, config, round, experiment, whole.name, directory.relative_to(whole).as_posix())

    @property
    def tags(self) -> list[str]:
        """Algorithm, workload, data set and model, as far as there are some."""
        workload = self.config.get("workload", {})
        given = [self.config.get("algorithm"), workload, workload.get("dataset"), workload.get("model")]
        names = [one.get("name") if isinstance(one, Mapping) else one for one in given]
        return list(dict.fromkeys(name for name in names if isinstance(name, str)))

    @property
    def parameters(self) -> dict[str, Any]:
        """The configuration by dotted keys; lists of mappings stay lists."""
        return dict(_flattened(self.config, ""))

    def known(self, tracker: str) -> str | None:
        """Return what a tracker calls the run that is continued; None: it begins."""
        return None if self.round is None else self._identifiers().get(tracker)

    def remember(self, tracker: str, identifier: str) -> None:
        """Note what a tracker calls the run.

        Raises:
            StorageError: the disk refuses the write.
        """
        found = self._identifiers() | {tracker: identifier}
        write_atomically(self.directory / TRACKERS, json.dumps(found) + "\n")

    def _identifiers(self) -> dict[str, str]:
        try:
            found = json.loads((self.directory / TRACKERS).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or damaged: another run is begun
            return {}
        return found if isinstance(found, dict) else {}


def _flattened(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class TrackerSink:
    """Passes the scalars of each record on to a tracker, at its round.

    Raises (when made):
        ConfigError: the tracker is not installed.
    """

    def __init__(self, send: Callable[[dict[str, float], int], Any], close: Callable[[], Any]) -> None:
        self._send, self.close = send, close

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the scalars of `record`."""
        self._send(scalars(record), int(record["round"]))


class TensorBoardSink(TrackerSink):
    """Writes TensorBoard event files to the run's folder ``tensorboard``, the configuration as text."""

    def __init__(self, run: TrackedRun) -> None:
        module = _tracker("torch.utils.tensorboard", "tensorboard")
        next_round = (run.round or 0) + 1  # what was logged from there on is replaced
        writer = module.SummaryWriter(log_dir=str(run.directory / "tensorboard"), purge_step=next_round)
        if run.round is None:
            text = "".join(f"    {line}\n" for line in dump_yaml(dict(run.config)).splitlines())
            writer.add_text("configuration", f"{run.name} ({', '.join(run.tags)})\n\n{text}")

        def send(values: dict[str, float], round: int) -> None:
            """Write each scalar."""
            for name, value in values.items():
                writer.add_scalar(name, value, round)

        super().__init__(send, writer.close)


class MLflowSink(TrackerSink):
    """Logs to an MLflow tracking server or folder, at MLFLOW_TRACKING_URI or MLflow's default, as one MLflow run."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow, known = _tracker("mlflow", "mlflow"), run.known("mlflow")
        mlflow.set_experiment(run.experiment)
        if known is not None:
            mlflow.start_run(run_id=known)
        else:
            tags = {"group": run.group, "directory": str(run.directory), **dict.fromkeys(run.tags, "true")}
            run.remember("mlflow", mlflow.start_run(run_name=run.name, tags=tags).info.run_id)
            texts = [(name, _text(value)[:MAX_PARAMETER]) for name, value in run.parameters.items()]
            for first in range(0, len(texts), PARAMETERS):
                mlflow.log_params(dict(texts[first : first + PARAMETERS]))
        super().__init__(lambda values, round: mlflow.log_metrics(values, step=round), mlflow.end_run)


class WandbSink(TrackerSink):
    """Logs to Weights & Biases as one run, which ignores a round below one that it already has."""

    def __init__(self, run: TrackedRun) -> None:
        started = _tracker("wandb", "wandb").init(
            project=run.experiment,
            group=run.group,
            name=run.name,
            id=run.known("wandb"),
            resume="allow",
            config=run.parameters,
            tags=run.tags,
            dir=str(run.directory),
        )
        run.remember("wandb", started.id)
        super().__init__(lambda values, round: started.log(values, step=round), started.finish)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of `record` by name, nested ones as ``outer/inner``, without ``round``."""
    return {name: value for name, value in numbers(record, "/") if name != "round"}


def _tracker(module: str, package: str) -> ModuleType:
    try:
        return import_optional(f"tracker {package!r}", module)
    except ImportError as error:
        raise ConfigError(
            f"the tracker {package!r} cannot be imported ({error}): pip install 'gossamer[tracking]', or leave it out"
        ) from error


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def make_sinks(names: Sequence[str], run: TrackedRun) -> list[Sink]:
    """Create the trackers that the configuration names.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed, or that does not start.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorBoardSink(run),
        "mlflow": lambda: MLflowSink(run),
        "wandb": lambda: WandbSink(run),
    }
    for name in names:
        if name not in makers:
            raise ConfigError(
                f"unknown entry {name!r} in log.sinks{nearest(name, makers)} (known: {', '.join(makers)})"
            )
    return [_started(name, makers[name]) for name in names]


def _started(name: str, make: Callable[[], Sink]) -> Sink:
    try:
        return make()
    except GossamerError:
        raise
    except Exception as error:  # no server, no login, no place to write: each tracker has errors of its own
        raise ConfigError(
            f"the tracker {name!r} cannot start ({one_line(error)}): see to it, or leave it out of log.sinks"
        ) from error
