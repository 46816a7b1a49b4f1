"""Sinks that pass a run's metrics on to a tracker: TensorBoard, MLflow, Weights & Biases.

Each is a thin adapter that imports its tracker when it is created. The trackers come with the extra ``tracking``; tests
replace them by fake modules and check the calls. They were tried by hand with tensorboard 2.21.0, mlflow-skinny 3.17.2
(files) and wandb 0.31.0 (offline), without a server.

Every finite number of a record becomes a scalar; nested objects are named ``outer/inner``, and lists, text and null are
left out. The step is the record's ``round``. After a resume, the rounds since the last commit are sent again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gossamer.errors import ConfigError, GossamerError, nearest, one_line
from gossamer.round_record import numbers
from gossamer.storage.runlog import Sink


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
    """Writes TensorBoard event files to a directory."""

    def __init__(self, directory: Path) -> None:
        writer = _tracker("torch.utils.tensorboard", "tensorboard").SummaryWriter(log_dir=str(directory))

        def send(values: dict[str, float], round: int) -> None:
            """Write each scalar."""
            for name, value in values.items():
                writer.add_scalar(name, value, round)

        super().__init__(send, writer.close)


class MLflowSink(TrackerSink):
    """Logs to an MLflow tracking server or folder, at MLFLOW_TRACKING_URI or MLflow's default, as one MLflow run."""

    def __init__(self, experiment: str, run_name: str) -> None:
        mlflow = _tracker("mlflow", "mlflow")
        mlflow.set_experiment(experiment)
        mlflow.start_run(run_name=run_name)
        super().__init__(lambda values, round: mlflow.log_metrics(values, step=round), mlflow.end_run)


class WandbSink(TrackerSink):
    """Logs to Weights & Biases as one run, which ignores a round below one that it already has."""

    def __init__(self, project: str, run_name: str, directory: Path) -> None:
        run = _tracker("wandb", "wandb").init(project=project, name=run_name, dir=str(directory))
        super().__init__(lambda values, round: run.log(values, step=round), run.finish)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of `record` by name, nested ones as ``outer/inner``, without ``round``."""
    return {name: value for name, value in numbers(record, "/") if name != "round"}


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
