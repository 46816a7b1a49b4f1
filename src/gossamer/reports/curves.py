"""Curves from run directories: runs grouped by method, and mean and range of a metric over their seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.errors import ConfigError, warn
from gossamer.round_record import numbers
from gossamer.storage.runlog import (
    CONFIG,
    ENVIRONMENT,
    EXPERIMENT,
    METRICS,
    read_config,
    read_metrics,
    run_directories,
)

Numbers = NDArray[np.float64]

NUM_GRID_POINTS = 200
FEW = 2  # points that are no curve
RUN_SPECIFIC = ("seed", "engine", "checkpoint", "log")  # sections that may differ between seeds of one method


@dataclass(frozen=True)
class XAxis:
    """A quantity on the x axis: keys of the records that are added up, label, and units, largest first."""

    keys: tuple[str, ...]
    label: str
    units: tuple[tuple[float, str], ...] = ()


_SECONDS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))
_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))
_FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))
_COUNTS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"), (1.0, ""))
X_AXES = {
    "round": XAxis(("round",), "Round"),
    "seconds": XAxis(("wall_seconds",), "Wall-clock time", _SECONDS),
    "simulated": XAxis(("simulated_seconds",), "Simulated time", _SECONDS),
    "bytes": XAxis(("total_bytes_up", "total_bytes_down"), "Communication, up and down", _BYTES),
    "flops": XAxis(("total_client_flops",), "Client computation", _FLOPS),
    "samples": XAxis(("total_samples",), "Training samples", _COUNTS),
    "tokens": XAxis(("total_tokens",), "Training tokens", _COUNTS),
}
COMPUTED = ("flops", "simulated")  # those that depend on the count of FLOPs


@dataclass(frozen=True)
class SingleRun:
    """A run directory's logs.

    Attributes:
        directory: the run directory.
        source: directory of the experiment of the run, or else the directory asked for.
        config: resolved configuration.
        records: for each round a flat ``{dotted name: number}`` of the finite numbers.
    """

    directory: Path
    source: Path
    config: dict[str, Any]
    records: list[dict[str, float]]

    @property
    def name(self) -> str:
        """Name of the method, or of the configuration."""
        return str(self.config.get("name", self.directory.name))


@dataclass(frozen=True)
class Curve:
    """The runs of one method that differ in their seeds, or of the peers that trained together."""

    label: str
    runs: list[SingleRun]

    @property
    def unit(self) -> str:
        """What its runs are: those of a "seed" each, or of a "peer"."""
        return "seed" if _peer(self.runs[0]) is None else "peer"


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn.

    Attributes:
        x, mean, low, high: float64 [points]; low and high are the minimum and the maximum over seeds.
        count: int64 [points], number of seeds that have begun and not ended there.
        num_seeds: number of seeds in it.
        is_incomplete: whether some seed's x leaves out operations whose FLOPs are not known.
    """

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers
    count: NDArray[np.int64]
    num_seeds: int
    is_incomplete: bool = False

    @property
    def is_partial(self) -> NDArray[np.bool_]:
        """Where some seed has not begun or has ended, bool [points]."""
        return self.count < self.num_seeds


def find_runs(directories: Sequence[str | Path]) -> list[SingleRun]:
    """Read the single runs in or below `directories` (at most three levels down), each once, in order.

    Raises:
        ConfigError: a directory does not exist or holds no run, or no run has logged a round.
        DataError: a log is malformed.
    """
    runs: dict[Path, SingleRun] = {}
    for given in map(Path, directories):
        if not os.path.isdir(given):
            raise ConfigError(f"no directory {str(given)!r}: name one that 'gossamer run' made")
        try:
            found = {path.resolve(): path for path in sorted(run_directories(given), key=_started)}
            runs |= {real: _read_run(path, given) for real, path in found.items() if real not in runs}
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename!r} ({error.strerror}): check its permissions") from error
        if not found:
            raise ConfigError(
                f"no run in or below {str(given)!r} (no directory with {CONFIG} and {METRICS}):"
                " name one that 'gossamer run' made"
            )
    logged = [run for run in runs.values() if run.records]
    if not logged:
        raise ConfigError(
            f"no round is logged yet in {', '.join(map(str, directories))}: wait until a round is finished"
        )
    empty = [str(run.directory) for run in runs.values() if not run.records]
    if empty:
        warn([f"no round is logged yet in {', '.join(empty)}: left out"])
    return logged


def _started(directory: Path) -> str:
    """Return the start time of a run, by which methods keep their order in the experiment."""
    try:
        return str(json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))["started"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _read_run(directory: Path, given: Path) -> SingleRun:
    records = [dict(numbers(record, ".")) for record in read_metrics(directory)]
    return SingleRun(directory, (_experiment(directory) or given).resolve(), read_config(directory), records)


def _experiment(directory: Path) -> Path | None:
    """Return the experiment of a run directory ``experiment[/method][/seed]``, if there is one."""
    parents = directory.resolve().parents[:2]
    return next((parent for parent in parents if (parent / EXPERIMENT).is_file()), None)


def main_metric(logged: Collection[str]) -> str:
    """Return the metric that tells most, of those that were logged: an accuracy, or else the training loss."""
    return next((name for name in ("accuracy", "validation_accuracy") if name in logged), "train_loss")


def group(runs: Sequence[SingleRun]) -> list[Curve]:
    """Group runs into curves: those of one experiment and one name.

    Runs that were started one by one form a curve if they are below one of the directories asked for and differ in
    their seeds only; else each is a curve. So do the runs of the peers of one configuration, wherever they are. Curves
    of equal name are labelled with their directories.
    """
    by_method: dict[tuple[Path, str, str], list[SingleRun]] = {}
    for run in runs:
        among = "" if _peer(run) is None else json.dumps(_settings(run), sort_keys=True, default=str)
        by_method.setdefault((Path() if among else run.source, run.name, among), []).append(run)
    groups: list[list[SingleRun]] = []
    for together in by_method.values():
        groups += [together] if _differ_in_seed_only(together) else [[replace(r, source=r.directory)] for r in together]
    names = [together[0].name for together in groups]
    folders = [together[0].source for together in groups]
    labels = [
        name if names.count(name) == 1 else f"{name} ({folder.name})"
        for name, folder in zip(names, folders, strict=True)
    ]
    if len(set(labels)) < len(labels):
        labels = [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]
    return [Curve(label, together) for label, together in zip(labels, groups, strict=True)]


def _differ_in_seed_only(runs: Sequence[SingleRun]) -> bool:
    if _experiment(runs[0].directory) is not None:
        return True
    settings = [_settings(run) for run in runs]
    seeds = [(run.config.get("seed"), _peer(run)) for run in runs]
    return len(set(seeds)) == len(seeds) and all(setting == settings[0] for setting in settings)


def _settings(run: SingleRun) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in RUN_SPECIFIC}


def _peer(run: SingleRun) -> int | None:
    """Return the number of the peer whose run it is; None: it is that of all participants."""
    engine = run.config.get("engine")
    return engine.get("peer") if isinstance(engine, dict) else None


def summarize(
    runs: Sequence[SingleRun], metric: str, x: str, *, log_x: bool = False, log_y: bool = False
) -> Line | None:
    """Return mean and range of `metric` over the seeds of a curve, or None where no run has both `metric` and `x`.

    At each x value, the seeds count that have begun and not ended there. Over rounds, those are used that all of these
    have logged. Over any other x the seeds have different x values: each is interpolated on one grid, unless none has
    more than two points, which are taken in order.

    Args:
        log_x: whether seeds are interpolated on a logarithmic x axis; x values of 0 are left out.
        log_y: whether seeds are interpolated on a logarithmic y axis and their mean is the geometric one, which is 0
            where some seed is not above 0.
    """
    keys = X_AXES[x].keys
    seeds = []
    for run in runs:
        usable = [record for record in run.records if metric in record and all(key in record for key in keys)]
        at = np.array([sum(record[key] for key in keys) for record in usable])
        values = np.array([record[metric] for record in usable])
        kept = at > 0 if log_x else np.isfinite(at)
        if kept.any():
            seeds.append((at[kept], values[kept]))
    if not seeds:
        return None
    grid, table = _on_rounds(seeds) if x == "round" else _on_grid(seeds, log_x, log_y)
    if not len(grid):
        return None
    count, is_geometric = (~np.isnan(table)).sum(axis=0), log_y and len(seeds) > 1
    with np.errstate(divide="ignore", invalid="ignore"):  # where all seeds have ended before another begins
        mean = np.nansum(np.log(np.maximum(table, 0.0)) if is_geometric else table, axis=0) / count
    low, high = np.fmin.reduce(table), np.fmax.reduce(table)
    is_incomplete = x in COMPUTED and any("num_uncounted_operations" in one for run in runs for one in run.records)
    return Line(grid, np.exp(mean) if is_geometric else mean, low, high, count, len(seeds), is_incomplete)


def _on_rounds(seeds: Sequence[tuple[Numbers, Numbers]]) -> tuple[Numbers, Numbers]:
    """Return the rounds that all seeds have logged which have begun and not ended, [m], and values [seeds, m]."""
    grid = np.unique(np.concatenate([at for at, _ in seeds]))
    table = np.full((len(seeds), len(grid)), np.nan)
    gaps = np.zeros(len(grid), dtype=bool)
    for row, (at, values) in zip(table, seeds, strict=True):
        row[np.searchsorted(grid, at)] = values
        gaps |= np.isnan(row) & (at[0] < grid) & (grid < at[-1])
    return grid[~gaps], table[:, ~gaps]


def _on_grid(seeds: Sequence[tuple[Numbers, Numbers]], log_x: bool, log_y: bool) -> tuple[Numbers, Numbers]:
    """Return x values [m] and interpolated values [seeds, m], NaN before a seed's first and after its last x."""
    longest = max(len(at) for at, _ in seeds)
    if len(seeds) == 1:
        return seeds[0][0], seeds[0][1][None]
    if longest <= FEW:
        padded = np.full((2, len(seeds), longest), np.nan)
        for row, (at, values) in enumerate(seeds):
            padded[:, row, : len(at)] = at, values
        return np.nanmean(padded[0], axis=0), padded[1]
    ends = np.array([at[[0, -1]] for at, _ in seeds])
    space = np.geomspace if log_x else np.linspace
    grid = np.unique(np.concatenate([space(ends.min(), ends.max(), NUM_GRID_POINTS), ends.ravel()]))
    to_x = np.log if log_x else np.asarray
    table = np.empty((len(seeds), len(grid)))
    for row, (at, values) in enumerate(seeds):
        least = values[values > 0].min(initial=np.inf) if log_y else -np.inf  # on the way to 0, what is below is 0
        known = np.log(np.maximum(values, np.finfo(float).tiny)) if log_y else values
        found = np.interp(to_x(grid), to_x(at), known, left=np.nan, right=np.nan)
        found = np.exp(found) if log_y else found
        table[row] = np.where(found < least * (1 - 1e-9), 0.0, found)
    return grid, table
