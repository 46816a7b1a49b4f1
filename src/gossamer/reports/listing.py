"""The runs below a directory: how far they are, and whether they can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from gossamer.errors import ConfigError, GossamerError
from gossamer.reports.curves import main_metric
from gossamer.round_record import numbers
from gossamer.storage.checkpoint import peek
from gossamer.storage.disk import is_locked
from gossamer.storage.runlog import CHECKPOINTS, METRICS, read_config, read_metrics, run_directories
from gossamer.storage.tables import aligned


@dataclass(frozen=True)
class ListedRun:
    """A run directory.

    Attributes:
        name: path below the directory that was asked for.
        state: "running" (a process works on it), "finished", "stopped" (it can be resumed), or "damaged".
        rounds: rounds that are logged.
        num_rounds: rounds in all; None: its configuration cannot be read.
        metrics: numbers of the last record that has some, by dotted name.
        age_seconds: seconds since a round was logged.
        num_bytes: size of all its files.
        reason: what is damaged, or why it ended before its last round.
    """

    name: str
    state: Literal["running", "finished", "stopped", "damaged"]
    rounds: int
    num_rounds: int | None
    metrics: dict[str, float]
    age_seconds: float
    num_bytes: int
    reason: str = ""


def list_runs(directory: str | Path) -> list[ListedRun]:
    """List the runs in or below a directory, at most three levels down, by their names.

    A lock is tried to see whether a run goes on; so a process that trains must not list its own runs.

    Raises:
        ConfigError: there is no such directory.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(
            f"no directory {str(directory)!r}: name one below which there are runs, as in: gossamer runs ."
        )
    return [_look_at(path, str(path.relative_to(directory))) for path in run_directories(directory)]


def render(runs: Sequence[ListedRun], as_json: bool = False) -> str:
    """Return runs as a table, or as JSON."""
    if as_json:
        return json.dumps([asdict(run) for run in runs], indent=2)
    if not runs:
        return "no runs"
    rows = [["run", "state", "rounds", "metric", "value", "age", "size", ""]]
    for run in runs:
        metric = main_metric(run.metrics) if run.metrics else ""
        value = f"{run.metrics[metric]:.4g}" if metric in run.metrics else ""
        done = f"{run.rounds}/{'?' if run.num_rounds is None else run.num_rounds}"
        age = str(timedelta(seconds=round(run.age_seconds)))
        rows.append([run.name, run.state, done, metric, value, age, _size(run.num_bytes), run.reason])
    return aligned(rows)


def _look_at(path: Path, name: str) -> ListedRun:
    files = [file.stat() for file in path.rglob("*") if file.is_file()]
    age = time.time() - (path / METRICS).stat().st_mtime
    config, records, reason = dict[str, Any](), list[dict[str, Any]](), ""
    state: Literal["running", "finished", "stopped", "damaged"] = "stopped"
    try:
        config, records = read_config(path), read_metrics(path)
        done, progress = peek(path / CHECKPOINTS)
        reason = str(progress.get("stop_reason") or "")
        if done >= config["rounds"] or reason:
            state = "finished"
    except GossamerError as error:
        state, reason = "damaged", str(error)
    if is_locked(path):
        state, reason = "running", ""
    evaluated = [record for record in records if main_metric(record) != "train_loss"]
    shown = (evaluated or records or [{}])[-1]
    return ListedRun(
        name=name,
        state=state,
        rounds=records[-1]["round"] if records else 0,
        num_rounds=config.get("rounds"),
        metrics=dict(numbers(shown, ".")),
        age_seconds=age,
        num_bytes=sum(file.st_size for file in files),
        reason=reason,
    )


def _size(num_bytes: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} bytes"
