"""Convergence curves drawn from logs alone: mean over seeds, band from the lowest to the highest seed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from gossamer.errors import ConfigError, nearest
from gossamer.options import Options, parse_options
from gossamer.reports.curves import FEW, X_AXES, Curve, Line, Numbers, XAxis, find_runs, group, main_metric, summarize
from gossamer.reports.images import require_image, save
from gossamer.storage.strict_yaml import read_yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Sequence[Line | None]]
"""For each panel the line of each curve, or None where the curve has no data for it."""

PANEL_INCHES = (4.2, 3.1)
LEGEND_INCHES = 0.2  # height of each row of the legend
NOTE_CHARACTERS = 19  # characters per inch of the notes below the panels
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")  # of curves of too few points for a line
MIN_DECADES = 1.5  # from which on an axis is logarithmic unless it is told otherwise
METRIC_LABELS = {
    "accuracy": "Test accuracy",
    "validation_accuracy": "Validation accuracy",
    "accuracy_peers.mean": "Mean test accuracy of peers",
    "loss": "Test loss",
    "train_loss": "Training loss",
    "lr": "Learning rate",
    "consensus_distance": "Root mean square distance from the mean",
    "relative_distance": "Distance from the mean, relative",
    "gradient_norm": "Gradient norm at the mean",
    "peers_squared_distance": "Mean squared distance from the optimum",
}


class PanelOptions(Options):
    """One panel of a figure.

    Attributes:
        metric: key of the records, dotted where nested; None: an accuracy if one is logged, else train_loss.
        x: quantity on the x axis.
        title: text above the panel.
        log_x, log_y: whether the axis is logarithmic; None: if the curves' last x, or their values (accuracies
            excepted), span one and a half decades.
        y_min, y_max: limits of the y axis; None: those of the data.
        reference: key of a number that every record has, such as unigram_bits, drawn as a dotted line.
        methods: names of the curves to draw; None: all.
    """

    metric: str | None = None
    x: Literal["round", "seconds", "simulated", "bytes", "flops", "samples", "tokens"] = "round"
    title: str | None = None
    log_x: bool | None = None
    log_y: bool | None = None
    y_min: float | None = None
    y_max: float | None = None
    reference: str | None = None
    methods: list[str] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> PanelOptions:
        if self.y_min is not None and self.y_max is not None and self.y_min >= self.y_max:
            raise ValueError(f"y_min {self.y_min} is not below y_max {self.y_max}: swap or correct them")
        if self.log_y and self.y_min is not None and self.y_min <= 0:
            raise ValueError(f"y_min {self.y_min} is not on a logarithmic axis: give a number above 0")
        return self


class FigureOptions(Options):
    """A figure: panels side by side.

    Attributes:
        panels: panels from left to right.
        title: text above all panels.
        size: width and height of the whole figure in inches; None: what the panels need.
    """

    panels: list[PanelOptions] = Field(min_length=1)
    title: str | None = None
    size: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _large_enough(self) -> FigureOptions:
        if self.size is not None and not 1 <= min(self.size) <= max(self.size) <= 100:
            raise ValueError(f"size {self.size} must be a width and a height between 1 and 100 inches")
        return self


def plot(
    directories: Sequence[str | Path],
    x: str | None,
    metric: str | None,
    output: str | Path,
    spec: str | Path | None = None,
) -> Path:
    """Draw the runs below `directories` into a file, and return its path.

    Args:
        x: round (the default), seconds, simulated, bytes, flops, samples or tokens.
        metric: key of the records, dotted where nested; None: accuracy if it is logged, else train_loss.
        output: path that ends in .png, .svg or .pdf; its folder is created if needed.
        spec: path of a YAML file of `FigureOptions`, instead of `x` and `metric`.

    Raises:
        ConfigError: no run or no round is found, an option or a metric is unknown.
        StorageError: the file cannot be written.
    """
    require_image(Path(output))
    options = _options(x, metric, spec)
    curves = group(find_runs(directories))
    return save(lambda: draw(curves, options), Path(output), dpi=200)


def _options(x: str | None, metric: str | None, spec: str | Path | None) -> FigureOptions:
    if spec is None:
        panel = parse_options(PanelOptions, {"metric": metric} | ({} if x is None else {"x": x}), "")
        return FigureOptions(panels=[panel])
    if x is not None or metric is not None:
        raise ConfigError(f"{str(spec)!r} names the axes of its panels: give either a spec, or x and metric")
    data = read_yaml(Path(spec), "the plot's spec")
    try:
        return parse_options(FigureOptions, data, "")
    except ConfigError as error:
        raise ConfigError(f"{spec}: {error}") from None


def draw(curves: Sequence[Curve], options: FigureOptions) -> Figure:
    """Draw `curves` into every panel, with one legend above all of them.

    Raises:
        ConfigError: no run has logged a panel's metric or its x axis, or a panel names an unknown method.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    num_panels = len(options.panels)
    size = options.size or (PANEL_INCHES[0] * num_panels, PANEL_INCHES[1])
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    curves = _chosen(curves, options.panels)
    metrics = [panel.metric if panel.metric is not None else _default_metric(curves) for panel in options.panels]
    panels = [_with_scales(panel, curves, metric) for panel, metric in zip(options.panels, metrics, strict=True)]
    drawn = [_lines(panel, curves, metric) for panel, metric in zip(panels, metrics, strict=True)]
    labels = _labels(curves, drawn)
    for ax, panel, metric, lines in zip(axes, panels, metrics, drawn, strict=True):
        if not any(lines):
            raise _nothing_to_draw(curves, metric, panel.x)
        _draw_panel(ax, panel, metric, dict(zip(labels, lines, strict=True)))
        if panel.reference is not None:
            _draw_reference(ax, curves, panel.reference)
    notes = _notes(curves, panels, metrics, drawn)
    if notes:
        figure.supxlabel(textwrap.fill("; ".join(notes), int(size[0] * NOTE_CHARACTERS)), fontsize=7, color="0.35")
    num_rows = _add_legend(figure, axes, options.title)
    if options.size is None:
        figure.set_size_inches(size[0], size[1] + LEGEND_INCHES * num_rows)
    return figure


def _lines(panel: PanelOptions, curves: Sequence[Curve], metric: str) -> list[Line | None]:
    """Return the line of each curve that a panel draws."""
    log_x, log_y = bool(panel.log_x), bool(panel.log_y)
    return [
        summarize(curve.runs, metric, panel.x, log_x=log_x, log_y=log_y) if _draws(panel, curve) else None
        for curve in curves
    ]


def _with_scales(panel: PanelOptions, curves: Sequence[Curve], metric: str) -> PanelOptions:
    """Return the panel with scales for the axes that it leaves open."""
    lines = [line for line in _lines(panel, curves, metric) if line]
    scales = {
        "log_x": _spans_decades([line.x[-1:] for line in lines]),
        "log_y": _spans_decades([line.mean for line in lines])
        and "accuracy" not in metric
        and (panel.y_min is None or panel.y_min > 0),
    }
    return panel.model_copy(update={name: log for name, log in scales.items() if vars(panel)[name] is None})


def _spans_decades(values: Sequence[Numbers]) -> bool:
    found = np.concatenate([*values, np.ones(0)])
    found = found[~np.isnan(found)]
    return bool(len(found) and found.min() > 0 and math.log10(found.max() / found.min()) >= MIN_DECADES)


def _draws(panel: PanelOptions, curve: Curve) -> bool:
    return panel.methods is None or curve.label in panel.methods


def _chosen(curves: Sequence[Curve], panels: Sequence[PanelOptions]) -> list[Curve]:
    """Return the curves that some panel draws.

    Raises:
        ConfigError: a panel names an unknown method.
    """
    known = [curve.label for curve in curves]
    for name in (name for panel in panels for name in panel.methods or () if name not in known):
        raise ConfigError(f"no curve {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
    return [curve for curve in curves if any(_draws(panel, curve) for panel in panels)]


def _labels(curves: Sequence[Curve], drawn: Lines) -> list[str]:
    """Return each curve's label for the legend, with its number of seeds, or of peers, where numbers differ."""
    seeds = [max(line.num_seeds for line in lines if line) if any(lines) else 0 for lines in zip(*drawn, strict=True)]
    if len(set(seeds) - {0}) == 1:
        return [curve.label for curve in curves]
    return [f"{c.label} ({count} {c.unit}{'s' * (count != 1)})" for c, count in zip(curves, seeds, strict=True)]


def _draw_panel(ax: Axes, panel: PanelOptions, metric: str, lines: Mapping[str, Line | None]) -> None:
    factor, unit = _unit(X_AXES[panel.x], max(float(line.x[-1]) for line in lines.values() if line))
    for index, (label, line) in enumerate(lines.items()):
        if line is None:
            continue
        x, colour = line.x / factor, COLOURS[index % len(COLOURS)]
        if len(x) <= FEW:
            ax.plot(x, line.mean, color=colour, linestyle="none", marker=MARKERS[index % len(MARKERS)], label=label)
            ax.vlines(x, line.low, line.high, color=colour, alpha=0.5)
            continue
        style, partial = LINE_STYLES[index % len(LINE_STYLES)], line.is_partial
        ends = partial | np.append(partial[1:], False) | np.append(False, partial[:-1])  # joined to the rest
        ax.plot(x, np.where(partial, np.nan, line.mean), color=colour, linestyle=style, label=label)
        if partial.any():
            ax.plot(x, np.where(ends, line.mean, np.nan), color=colour, linestyle=style, alpha=0.4)
        if line.num_seeds > 1:
            ax.fill_between(x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    incomplete = ", incomplete" if any(line.is_incomplete for line in lines.values() if line) else ""
    ax.set(xlabel=X_AXES[panel.x].label + incomplete + unit, title=panel.title or "")
    _format_axes(ax, metric, panel)


def _draw_reference(ax: Axes, curves: Sequence[Curve], name: str) -> None:
    """Draw the mean of a logged number as a horizontal line.

    Raises:
        ConfigError: no record has the number.
    """
    values = [record[name] for curve in curves for run in curve.runs for record in run.records if name in record]
    if not values:
        raise ConfigError(f"no record has the reference {name!r}{nearest(name, _logged(curves))}: leave it out")
    ax.axhline(sum(values) / len(values), color="0.3", linestyle=":", linewidth=1.2, label=name.replace("_", " "))


def _notes(curves: Sequence[Curve], panels: Sequence[PanelOptions], metrics: Sequence[str], drawn: Lines) -> list[str]:
    """Return the notes below the figure."""
    notes = []
    present = [line for lines in drawn for line in lines if line]
    counts, units = {line.num_seeds for line in present}, {curve.unit for curve in curves if len(curve.runs) > 1}
    unit = units.pop() if len(units) == 1 else "run"
    if counts != {1}:
        number = f"{counts.pop()} {unit}s" if len(counts) == 1 else f"the {unit}s"
        geometric = [bool(panel.log_y) for panel in panels]
        mean = "geometric mean" if all(geometric) else "mean (geometric where y is logarithmic)"
        mean = mean if any(geometric) else "mean"
        notes.append(f"lines: {mean} over {number}, bands: lowest to highest {unit}")
        is_curve = [any(line and len(line.x) > FEW for line in lines) for lines in drawn]
        by_round = [panel.x == "round" or not curved for panel, curved in zip(panels, is_curve, strict=True)]
        if not all(by_round):
            where = "except against rounds, " if any(by_round) else ""
            notes.append(f"{where}{unit}s are interpolated on a common grid")
    if any(line.is_partial.any() for line in present):
        notes.append(f"pale: some {unit} has ended before, or begins later")
    for metric, panel, lines in zip(metrics, panels, drawn, strict=True):
        missing = [c.label for c, line in zip(curves, lines, strict=True) if not line and _draws(panel, c)]
        notes += [f"without {metric}: {', '.join(missing)}"] if missing else []
    return notes


def _default_metric(curves: Sequence[Curve]) -> str:
    return main_metric(_logged(curves))


def _logged(curves: Sequence[Curve]) -> set[str]:
    return {key for curve in curves for run in curve.runs for record in run.records for key in record}


def _nothing_to_draw(curves: Sequence[Curve], metric: str, x: str) -> ConfigError:
    known = _logged(curves)
    missing = [key for key in X_AXES[x].keys if key not in known]
    if metric in known and missing:
        return ConfigError(
            f"x = {x!r} needs {missing[0]!r}, which no record has: choose another of {', '.join(X_AXES)}"
        )
    if metric in known:
        return ConfigError(f"no record has both {metric!r} and x = {x!r}: choose another x")
    return ConfigError(
        f"no record has a number {metric!r}{nearest(metric, known)} (there are: {', '.join(sorted(known))})"
    )


def _unit(axis: XAxis, largest: float) -> tuple[float, str]:
    """Return the factor of the largest unit that the data reach, and its name for the label."""
    if not axis.units:
        return 1.0, ""
    factor, name = next((unit for unit in axis.units if largest >= unit[0]), axis.units[-1])
    return factor, f" ({name})" if name else ""


def _format_axes(ax: Axes, metric: str, panel: PanelOptions) -> None:
    from matplotlib.ticker import (
        EngFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        PercentFormatter,
        StrMethodFormatter,
    )

    label = METRIC_LABELS.get(metric, metric.replace("_by_capacity.", " at capacity ").replace("_", " "))
    label = label[0].upper() + label[1:]
    lowest, highest = ax.dataLim.y0, ax.dataLim.y1
    if "accuracy" in metric and lowest >= 0 and highest <= 1:
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
        label += " (%)"
    elif "bytes" in metric or "flops" in metric:
        ax.yaxis.set_major_formatter(EngFormatter(unit="B" if "bytes" in metric else "FLOP"))
    if panel.log_y:
        ax.set_yscale("log")
    ax.set_ylabel(label)
    ax.set_ylim(panel.y_min, panel.y_max)
    ax.grid(True)
    ax.margins(x=0.02)
    if panel.log_x:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())  # labels between the decades would overlap
        if ax.dataLim.x1 < 100 * ax.dataLim.x0:  # few decades to be labelled
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    elif panel.x == "round":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _add_legend(figure: Figure, axes: Iterable[Axes], title: str | None) -> int:
    """Add one legend above all panels, in as few rows as fit; return the number of rows, including the title."""
    handles: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for num_columns in range(len(handles), 0, -1):
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=num_columns,
            frameon=False,
            handlelength=2.6,
            title=title,  # a title of the figure would lie under the legend
        )
        if num_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    return -(-len(handles) // num_columns) + (title is not None)
