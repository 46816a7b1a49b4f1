"""Sinks that pass a run's metrics on to a tracker: TensorBoard, MLflow, Weights & Biases.

Each is a thin adapter that imports its tracker when it is created. The trackers come with the extra ``tracking``; tests
replace them by fake modules and check the calls. They were tried by hand with tensorboard 2.21.0, mlflow-skinny 3.17.2
(files) and wandb 0.31.0 (offline), without a server.

Every finite number of a record becomes a scalar; nested objects are named ``outer/inner``, and lists, text and null are
left out. The step is the record's ``round``. After a resume, the rounds since the last commit are sent again.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gossamer.errors import ConfigError, GossamerError, nearest, one_line
from gossamer.storage.runlog import Sink


class TensorBoardSink:
    """Writes TensorBoard event files."""

    def __init__(self, directory: Path) -> None:
        """Write to `directory`.

        Raises:
            ConfigError: tensorboard is not installed.
        """
        self._writer = _tracker("torch.utils.tensorboard", "tensorboard").SummaryWriter(log_dir=str(directory))

    def log(self, record: Mapping[str, Any]) -> None:
        """Write each scalar of `record` at its round."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, int(record["round"]))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class MLflowSink:
    """Logs to an MLflow tracking server or folder as one MLflow run."""

    def __init__(self, experiment: str, run_name: str, tracking_uri: str | None = None) -> None:
        """Start an MLflow run, without `tracking_uri` at MLFLOW_TRACKING_URI or MLflow's default.

        Raises:
            ConfigError: mlflow is not installed.
        """
        self._mlflow = _tracker("mlflow", "mlflow")
        if tracking_uri is not None:
            self._mlflow.set_tracking_uri(tracking_uri)
        self._mlflow.set_experiment(experiment)
        self._mlflow.start_run(run_name=run_name)

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the scalars of `record` at its round."""
        self._mlflow.log_metrics(scalars(record), step=int(record["round"]))

    def close(self) -> None:
        """End the MLflow run."""
        self._mlflow.end_run()


class WandbSink:
    """Logs to Weights & Biases as one run."""

    def __init__(self, project: str, run_name: str, directory: Path | None = None) -> None:
        """Start a W&B run whose local files go to `directory`.

        Raises:
            ConfigError: wandb is not installed.
        """
        wandb = _tracker("wandb", "wandb")
        self._run = wandb.init(project=project, name=run_name, dir=None if directory is None else str(directory))

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the scalars of `record` at its round; W&B ignores a round below one that it already has."""
        self._run.log(scalars(record), step=int(record["round"]))

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of `record` by name, nested ones as ``outer/inner``, without ``round``."""
    return {name: value for name, value in _walk(record, "") if name != "round"}


def _walk(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def _tracker(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the tracker {package!r} cannot be imported ({error}): pip install 'gossamer[tracking]', or leave it out"
        ) from error


def make_sinks(names: Sequence[str], directory: Path) -> list[Sink]:
    """Create the trackers that the configuration names.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed, or that does not start.
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
