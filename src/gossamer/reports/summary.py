"""A row a method: mean and standard deviation over seeds of what runs reached, and what that took, from logs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gossamer.errors import ConfigError, nearest
from gossamer.reports.curves import X_AXES, Curve, SingleRun, find_runs, group, main_metric
from gossamer.round_record import lower_is_better
from gossamer.storage.tables import FORMATS, as_csv

NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A quantity of every run.

    Attributes:
        name: heading, also in CSV.
        value: returns it of a run; None: the run has none.
        units: factors and names, largest first; () where numbers are written as they are.
        is_computed: whether it depends on FLOPs, of which some may not be counted.
    """

    name: str
    value: Callable[[SingleRun], float | None]
    units: Sequence[tuple[float, str]] = ()
    is_computed: bool = False


def render(
    directories: Sequence[str | Path],
    format: str = "text",
    metric: str | None = None,
    target: float | None = None,
    labels: Mapping[str, str] | None = None,
) -> str:
    """Return a table of the runs in or below directories, as text.

    Args:
        directories: directories of runs.
        format: text, csv, markdown or latex; csv has numbers in basic units, mean and deviation by themselves.
        metric: key of the records, dotted where nested; None: an accuracy if one is logged, else train_loss.
        target: value of the metric; then also the rounds and simulated seconds that it took to reach it.
        labels: ``{name of a method: what its row is called}``.

    Raises:
        ConfigError: the format or the metric is unknown, or there is no run.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown --format {format!r}{nearest(format, FORMATS)}: give {', '.join(FORMATS)}")
    if target is not None and not math.isfinite(target):
        raise ConfigError(f"--target {target}: give a finite number")
    runs = find_runs(directories)
    logged = dict.fromkeys(name for run in runs for record in run.records for name in record)
    metric = main_metric(logged) if metric is None else metric
    if metric not in logged:
        raise ConfigError(f"no run has logged {metric!r}{nearest(metric, logged)} (there are: {', '.join(logged)})")
    curves, columns = group(runs), _columns(metric, target)
    names = [(labels or {}).get(curve.label) or curve.label for curve in curves]
    if format == "csv":
        return as_csv(_numbers(curves, columns, names)).rstrip("\n")
    rows = [["method", "seeds", *(column.name for column in columns)]]
    for name, curve in zip(names, curves, strict=True):
        rows.append([name, str(len(curve.runs)), *(_cell(curve, column) for column in columns)])
    return FORMATS[format](rows)


def _columns(metric: str, target: float | None) -> list[Column]:
    """Return what the table says of each run."""
    lower = lower_is_better(metric)
    best = min if lower else max

    def values(run: SingleRun) -> list[float]:
        """Return all values of the metric."""
        return [record[metric] for record in run.records if metric in record]

    def total(axis: str) -> Callable[[SingleRun], float | None]:
        """Return what gives the last value of a quantity of an x axis."""

        def of_run(run: SingleRun) -> float | None:
            """Return it."""
            found = [run.records[-1].get(key) for key in X_AXES[axis].keys]
            known = [value for value in found if value is not None]
            return sum(known) if len(known) == len(found) else None

        return of_run

    def reached(key: str) -> Callable[[SingleRun], float | None]:
        """Return what gives a quantity of the first round that reaches the target."""
        assert target is not None
        sign = -1.0 if lower else 1.0
        return lambda run: next(
            (one.get(key) for one in run.records if metric in one and sign * one[metric] >= sign * target), None
        )

    found = [
        Column(f"{metric} final", lambda run: next(reversed(values(run)), None)),
        Column(f"{metric} best", lambda run: best(values(run), default=None)),
        Column("rounds", total("round")),
        Column("bytes", total("bytes"), X_AXES["bytes"].units),
        Column("FLOPs", total("flops"), X_AXES["flops"].units, is_computed=True),
        Column("simulated seconds", total("simulated"), X_AXES["simulated"].units, is_computed=True),
    ]
    if target is not None:
        seconds, units = reached("simulated_seconds"), X_AXES["simulated"].units
        found.append(Column(f"rounds to {target:g}", reached("round")))
        found.append(Column(f"simulated seconds to {target:g}", seconds, units, is_computed=True))
    return found


def _cell(curve: Curve, column: Column) -> str:
    """Return mean ± standard deviation, with the number of seeds where only some have a value."""
    values = _values(curve, column)
    if not values:
        return NOTHING
    mean = float(np.mean(values))
    fitting = [(factor, unit) for factor, unit in column.units if abs(mean) >= factor]
    factor, unit = (fitting or list(column.units[-1:]) or [(1.0, "")])[0]
    deviation = f" ± {np.std(values, ddof=1) / factor:.2g}" if len(values) > 1 else ""
    some = f" ({len(values)} of {len(curve.runs)})" if len(values) < len(curve.runs) else ""
    records = (record for run in curve.runs for record in run.records)
    is_incomplete = column.is_computed and any("num_uncounted_operations" in record for record in records)
    return f"{'> ' if is_incomplete else ''}{mean / factor:.4g}{deviation}{f' {unit}' if unit else ''}{some}"


def _numbers(curves: Sequence[Curve], columns: Sequence[Column], names: Sequence[str]) -> list[list[str]]:
    """Return rows for CSV: numbers in full, in basic units."""
    kinds = ("mean", "deviation", "count")
    rows = [["method", "seeds", *(f"{column.name} {kind}" for column in columns for kind in kinds)]]
    for name, curve in zip(names, curves, strict=True):
        row = [name, str(len(curve.runs))]
        for column in columns:
            values = _values(curve, column)
            deviation = repr(float(np.std(values, ddof=1))) if len(values) > 1 else ""
            row += [repr(float(np.mean(values))) if values else "", deviation, str(len(values))]
        rows.append(row)
    return rows


def _values(curve: Curve, column: Column) -> list[float]:
    return [value for value in map(column.value, curve.runs) if value is not None]
