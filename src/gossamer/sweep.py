"""Sweeps: a grid of settings times seeds, one run each, side by side on one Ray cluster; one table and one figure."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from gossamer import experiment
from gossamer.config import loading as configuration
from gossamer.config.objects import put_in
from gossamer.config.plugins import as_mapping
from gossamer.config.resolve import resolve
from gossamer.engines.stopping import stop_on_signals
from gossamer.errors import ConfigError, GossamerError, Interrupted, storage_errors, warn
from gossamer.registry import OBJECT, giving, is_trusting, trusting
from gossamer.reports import summary
from gossamer.reports.curves import find_runs, group, main_metric
from gossamer.round_record import lower_is_better
from gossamer.storage.experiment_file import hold_experiment
from gossamer.storage.runlog import CONFIG, new_directory
from gossamer.storage.strict_yaml import parse_yaml
from gossamer.storage.tables import aligned, as_csv

Row = dict[str, Any]
"""One run: its method (if there are any) and overrides, seed, metric, final, best, seconds, directory, error."""

ENGINES = ("ray", "local")
RESULTS, TABLE, FIGURE = "results.json", "results.csv", "results.png"
STOPPED = "stopped: run the sweep again with the same --out"


@dataclass
class Sweep:
    """What a sweep left.

    Attributes:
        directory: holds one directory a run, the table as results.json and results.csv, and the figure.
        rows: one a run, in the order of the grid.
        figure: the curves; None if no run has logged any.
        labels: ``{name of a method: what it is called}``.
    """

    directory: Path
    rows: list[Row]
    figure: Path | None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The runs of a sweep.

    Attributes:
        experiment: the configuration with all points of the grid as its methods.
        singles: ``{sub-directory: configuration}``.
        cells: ``{sub-directory: what its row says about method, overrides and seed}``.
        labels: ``{name of a method: what its curve is called}``.
    """

    experiment: dict[str, Any]
    singles: dict[str, dict[str, Any]]
    cells: dict[str, Row]
    labels: dict[str, str]

    def label(self, name: str) -> str:
        """Return what the curve of the run in a sub-directory is called."""
        return self.labels[name.rpartition("/")[0]]


def sweep(
    source: str | Path | Mapping[str, Any],
    settings: Sequence[str],
    seeds: Sequence[int] | None = None,
    engine: str = "ray",
    out: str | Path | None = None,
    num_parallel: int | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    trust: bool = False,
    *,
    model: Any = None,
    data: Any = None,
    partition: Any = None,
) -> Sweep:
    """Run all points of a grid with all seeds; begun runs in `out` are resumed. A run that fails costs its row only.

    Objects that have no name are known to this process alone, so a sweep of them has the engine "local".

    Args:
        source: path of a YAML file, or a dict.
        settings: ``key.path=value,value,...``.
        seeds: seeds of every point; None: those of the configuration.
        engine: "ray": every run is a task of one CPU; "local": one run after the other in this process.
        out: the directory; None: ``runs/<name>-<time>``.
        num_parallel: most runs at once on Ray; None: as many as there are CPUs.
        on_row: callback for every run that ends.
        trust: see `experiment.run`.
        model, data, partition: of every run, names or objects, see `gossamer.run`.

    Raises:
        ConfigError: a setting, or a configuration of the grid, is wrong; `out` holds something else.
    """
    if engine not in ENGINES:
        raise ConfigError(f"unknown --engine {engine!r} of a sweep: give {' or '.join(ENGINES)}")
    if num_parallel is not None and (num_parallel < 1 or engine == "local"):
        raise ConfigError(f"--parallel {num_parallel}: give a number >= 1, together with --engine ray")
    objects: dict[str, Any] = {}
    if any(one is not None for one in (model, data, partition)):
        source = configuration.load(source)
        objects = put_in(source, model, data, partition)
    own = [name for name in objects if name.startswith(OBJECT)]
    if own and engine != "local":
        raise ConfigError(
            f"{own[0]!r} is an object of this process, which tasks of Ray cannot import: give engine='local'"
        )
    grid = make_grid(source, settings, seeds)
    with trusting(trust), giving(objects):
        for name, single in grid.singles.items():
            warn(resolve(configuration.parse(single)).warnings, grid.label(name))
        return _run_grid(grid, engine, out, num_parallel, on_row)


def _run_grid(
    grid: Grid, engine: str, out: str | Path | None, num_parallel: int | None, on_row: Callable[[Row], None]
) -> Sweep:
    name = str(grid.experiment.get("name", "sweep"))
    directory = Path(out) if out is not None else new_directory(Path("runs"), name)
    rows = {name: {**cell, "error": STOPPED} for name, cell in grid.cells.items()}
    with stop_on_signals() as stop, closing(hold_experiment(directory, grid.experiment)):
        for name, outcome in _outcomes(grid, directory, engine, num_parallel, stop):
            where = {"directory": str(directory / name)}
            warn(outcome.pop("warnings", ()), grid.label(name))
            rows[name] = {**grid.cells[name], "error": None, **outcome, **where}
            _write(directory, list(rows.values()))
            on_row(rows[name])
        _write(directory, list(rows.values()))
        return Sweep(directory, list(rows.values()), _draw(directory, grid.labels), grid.labels)


def require_all_done(found: Sweep) -> None:
    """Say how many runs were stopped, or failed.

    Raises:
        Interrupted: some were stopped.
        GossamerError: some failed.
    """
    errors = [row["error"] for row in found.rows if row.get("error")]
    again = f"run the sweep again with --out {shlex.quote(str(found.directory))}"
    if STOPPED in errors:
        raise Interrupted(f"{errors.count(STOPPED)} of {len(found.rows)} runs were stopped: {again}")
    if errors:
        raise GossamerError(
            f"{len(errors)} of {len(found.rows)} runs failed (see their error): mend that, then {again}"
        )


def parse_seeds(text: str | None) -> list[int] | None:
    """Read ``0,1,2``.

    Raises:
        ConfigError: it is no list of seeds.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--seeds {text!r}: give numbers >= 0 with commas between them, such as 0,1,2")
    return [int(seed) for seed in text.split(",")]


def make_grid(
    source: str | Path | Mapping[str, Any], settings: Sequence[str], seeds: Sequence[int] | None = None
) -> Grid:
    """Return the runs of a sweep; a setting of one value applies to all of them, and names none.

    Raises:
        ConfigError: a setting is malformed, or a configuration of the grid is wrong.
    """
    data = configuration.load(source)
    values = dict[str, list[Any]]()
    for setting in settings:
        key, found = _values(setting)
        if key in values:
            raise ConfigError(f"{key!r} is given twice: write {key}=value,value")
        values[key] = found
    for key, found in values.items():
        if len(found) == 1:
            data = configuration.with_value(data, key.split("."), found[0])
    varied = {key: found for key, found in values.items() if len(found) > 1}
    data["seeds"] = list(seeds) if seeds is not None else data.get("seeds") or [data.get("seed", 0)]
    data.pop("seed", None)
    given = data.get("methods") or {"": {}}
    points = [dict(zip(varied, chosen, strict=True)) for chosen in product(*varied.values())]
    methods, about, labels = dict[str, Any](), dict[str, Row](), dict[str, str]()
    for (method, overrides), point in product(given.items(), points):
        label = ", ".join([*([method] if method else []), *_texts(point)])
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-")
        if name in methods:
            raise ConfigError(f"{label!r} is in the grid twice: name every value once")
        methods[name], labels[name] = {**overrides, **point}, label
        about[name] = {**({"method": method} if method else {}), **point}
    if list(methods) != [""]:
        data["methods"] = methods
    singles = configuration.expand(data)
    cells = {name: {**about[name.rpartition("/")[0]], "seed": one["seed"]} for name, one in singles.items()}
    return Grid(data, singles, cells, labels)


def _values(setting: str) -> tuple[str, list[Any]]:
    """Read ``key.path=value,value,...``; commas inside brackets belong to a value."""
    key, separator, text = setting.partition("=")
    try:
        values = parse_yaml(f"[{text}]", repr(setting))
    except ConfigError:
        raise ConfigError(f"setting {setting!r}: {text!r} is no list of YAML values") from None
    if not separator or not key or not values:
        raise ConfigError(f"setting {setting!r} is not of the form key.path=value,value")
    if key in ("seed", "seeds"):
        raise ConfigError(f"setting {setting!r}: give the seeds of a sweep with --seeds")
    return key, values


def _texts(point: Mapping[str, Any]) -> Iterator[str]:
    """Yield ``key=value`` of each entry, with the last part of its key where that tells it from the others."""
    short = [key.rpartition(".")[2] for key in point]
    for (key, value), last in zip(point.items(), short, strict=True):
        yield f"{last if short.count(last) == 1 else key}={_text(value)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- the runs


def _outcomes(
    grid: Grid, directory: Path, engine: str, num_parallel: int | None, stop: Callable[[], bool]
) -> Iterator[tuple[str, Row]]:
    """Run everything; yield each run's sub-directory and what its row says about how it ended."""
    where = {"name": "local"} if engine == "local" else {"name": "local", "workers": 0, "address": None}
    messages = {
        name: json.dumps(
            {"config": single | {"engine": {**(as_mapping(single.get("engine")) or {}), **where}}}
            | {"directory": str((directory / name).resolve()), "trust": is_trusting()}
        )
        for name, single in grid.singles.items()
    }
    if engine == "ray":
        from gossamer.engines.ray.tasks import run_tasks

        address = configuration.parse(next(iter(grid.singles.values()))).engine.address
        replies = run_tasks("gossamer.sweep:run_one", messages, address=address, num_parallel=num_parallel, stop=stop)
        for name, reply in replies:
            if isinstance(reply, str):
                yield name, json.loads(reply)
            elif not stop():
                yield name, {"error": _sentence(reply)}
        return
    for name, message in messages.items():
        if stop():
            return
        outcome = json.loads(run_one(message))
        yield name, outcome
        if outcome.get("error") == STOPPED:  # the run itself took the request to stop
            return


def run_one(message: str) -> str:
    """Run or resume one run.

    Args:
        message: JSON with its ``config`` and ``directory``, and whether to ``trust`` it, see `experiment.run`.

    Returns:
        JSON of its metric, final, best and seconds, or of its error; and of its warnings.
    """
    described = json.loads(message)
    directory, trust = Path(described["directory"]), described["trust"]
    outcome: Row
    with warnings.catch_warnings(record=True) as issued:
        try:
            if (directory / CONFIG).exists():
                run = experiment.resume(directory, trust=trust)
            else:
                run = experiment.run(described["config"], out=directory, trust=trust)
            outcome = _summary(run.metrics)
        except Interrupted:
            outcome = {"error": STOPPED}
        except Exception as error:  # whatever it is, the other runs go on
            outcome = {"error": _sentence(error)}
    return json.dumps(outcome | {"warnings": [str(each.message) for each in issued]})


def _summary(metrics: Sequence[Mapping[str, Any]]) -> Row:
    metric = main_metric({name for record in metrics for name in record})
    best = min if lower_is_better(metric) else max
    values = [record[metric] for record in metrics if record.get(metric) is not None]
    if not values:
        return {"seconds": metrics[-1]["wall_seconds"]}
    return {"metric": metric, "final": values[-1], "best": best(values), "seconds": metrics[-1]["wall_seconds"]}


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, GossamerError) else f"{type(error).__name__}: {text}"


# ---- what is kept


def _write(directory: Path, rows: Sequence[Row]) -> None:
    names = columns(rows)
    cells = [["" if row.get(name) is None else _text(row[name]) for name in names] for row in rows]
    with storage_errors(directory):
        (directory / RESULTS).write_text(json.dumps(rows, indent=1) + "\n")
        (directory / TABLE).write_text(as_csv([names, *cells]))


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of a table of rows: what was chosen, how it ended, and where it lies."""
    last = ("metric", "final", "best", "seconds", "directory", "error")
    chosen = dict.fromkeys(name for row in rows for name in row if name not in last)
    return [*chosen, *last]


def render(rows: Sequence[Row]) -> str:
    """Return rows as an aligned table."""
    names = [name for name in columns(rows) if any(row.get(name) is not None for row in rows)]
    return aligned([names, *([_cell(row.get(name)) for name in names] for row in rows)])


def line(row: Row) -> str:
    """Return a row as one line: what was chosen, how it ended."""
    return ", ".join(f"{name} {_cell(value)}" for name, value in row.items() if value is not None)


def summarize(found: Sweep) -> str:
    """Return a table of a row for each method or combination, and one of the runs that failed or were stopped."""
    failed = [row for row in found.rows if row.get("error")]
    parts = [render(failed)] if failed else []
    with suppress(ConfigError):  # no run has logged a round
        parts.insert(0, summary.render([found.directory], labels=found.labels))
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else _text(value)


def _draw(directory: Path, labels: Mapping[str, str]) -> Path | None:
    """Draw the runs' curves, labelled by their overrides."""
    from gossamer.reports import images, plots

    try:
        curves = group(find_runs([directory]))
        named = [replace(curve, label=labels.get(curve.label) or curve.label) for curve in curves]
        options = plots.FigureOptions(panels=[plots.PanelOptions()])
        return images.save(lambda: plots.draw(named, options), directory / FIGURE, dpi=200)
    except ConfigError:  # no run has logged what could be drawn
        return None
