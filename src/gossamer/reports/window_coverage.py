"""Channels and weights that a configuration's windows will reach, computed before it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.build import Parts, build
from gossamer.config import loading as configuration
from gossamer.config.resolve import resolve
from gossamer.config.schema import Config, EngineOptions
from gossamer.engines.task import Variant, VariantMode
from gossamer.errors import ConfigError, warn
from gossamer.plan import RoundPlan
from gossamer.reports.images import save
from gossamer.reports.plots import COLOURS
from gossamer.submodel import Cut, covering
from gossamer.submodel.coverage import Coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

ALL = "participants"
PANEL_INCHES = (4.4, 3.4)
MAX_ROUNDS = 1_000_000
NUM_POINTS = 60  # of a curve, evenly spaced on its logarithmic axis


@dataclass(frozen=True)
class Reach:
    """Coverage by the windows of one capacity, or of all participants as they are planned.

    Attributes:
        capacity: capacity in (0, 1], or `ALL` for the participants of the plan, each with its own.
        channels, weights: shares that are reached within all rounds.
        channels_after, weights_after: number of rounds after which every channel or weight is reached; None: more
            than all rounds.
        bound: number of rounds within which the strategy guarantees to reach every weight; None: no guarantee.
        curve: (rounds, share of channels, share of weights), evenly spaced on a logarithmic axis.
    """

    capacity: float | str
    channels: float
    weights: float
    channels_after: int | None
    weights_after: int | None
    bound: int | None
    curve: list[tuple[int, float, float]]


@dataclass(frozen=True)
class MethodCoverage:
    """The coverage of one method.

    Attributes:
        method: name; "" where the experiment has only one.
        strategy: name of the window strategy.
        rounds: number of rounds.
        reaches: coverage by capacity, ascending, `ALL` last.
        matrix: name of the largest parameter that two axes cut, and a mask of what the smallest capacity reaches; None:
            there is no such parameter.
        masks_labels: whether rows of labels are averaged over the clients with that label only.
    """

    method: str
    strategy: str
    rounds: int
    reaches: list[Reach]
    matrix: tuple[str, Tensor] | None
    masks_labels: bool


def examine(source: str | Path, overrides: Sequence[str] = (), rounds: int | None = None) -> list[MethodCoverage]:
    """Compute the coverage of every method of an experiment, with its first seed, without training.

    Args:
        source: path of the YAML file.
        overrides: ``key.path=value`` strings.
        rounds: number of rounds; None: that of the experiment.

    Raises:
        GossamerError: the configuration is wrong, or its data is missing.
    """
    data = configuration.load(source, overrides)
    found: dict[str, MethodCoverage] = {}
    for name, single in configuration.expand(data).items():
        method = name.rpartition("/")[0] if data.get("seeds") is not None else name
        if method not in found:
            found[method] = _examine_one(method, configuration.parse(single), rounds)
    return list(found.values())


def _examine_one(method: str, config: Config, rounds: int | None) -> MethodCoverage:
    resolved = resolve(config)
    unmeasured = EngineOptions.model_validate({"modes": VariantMode()})
    parts = build(replace(resolved, config=resolved.config.model_copy(update={"engine": unmeasured})))
    warn(parts.warnings, method)
    if parts.task.cutter.strategy.rank is not None:
        raise ConfigError(
            f"windows of strategy {parts.config.submodel.strategy!r} follow the model as it is trained: its coverage is"
            " not known before the run"
        )
    if parts.task.cutter.full_size:
        raise ConfigError(
            f"algorithm {config.algorithm['name']!r} masks single weights by the model as it is trained, not channels:"
            " its coverage is not known before the run"
        )
    num_rounds = config.rounds if rounds is None else rounds
    if not 1 <= num_rounds <= MAX_ROUNDS:
        raise ConfigError(f"coverage of {num_rounds} rounds: give --rounds from 1 to {MAX_ROUNDS}")
    reaches, matrix = [], None
    for variant in parts.task.variants:
        reach, coverage = _follow(parts, num_rounds, variant)
        reaches.append(reach)
        if matrix is None:
            matrix = _largest_matrix(parts, coverage)
    reaches.append(_follow(parts, num_rounds, None)[0])
    assert parts.config.submodel.strategy is not None
    return MethodCoverage(method, parts.config.submodel.strategy, num_rounds, reaches, matrix, parts.task.count_labels)


def _follow(parts: Parts, num_rounds: int, variant: Variant | None) -> tuple[Reach, Coverage]:
    """Mark round after round what all participants would hold if they had `variant`; None: what each of them has."""
    layout, strategy = parts.workload.layout, parts.config.submodel.strategy
    coverage, now = Coverage(layout), 0.0  # simulated seconds: who is available, and in time, depends on them
    points = {round(num_rounds ** (point / NUM_POINTS)) for point in range(NUM_POINTS + 1)}
    curve: list[tuple[int, float, float]] = []
    channels_after = weights_after = None
    channels = weights = 0.0
    for number in range(num_rounds):
        if weights_after is None:
            if variant is not None and variant.shares_window:
                coverage.add(parts.task.cut(variant, number))
            else:
                phases = parts.planner.phases(number, now)
                now += sum(phase.costs.simulated_seconds for phase in phases)
                for cut in _cuts(parts, phases[-1].plan, variant):
                    coverage.add(cut)
            channels, weights = coverage.channels, coverage.weights
            channels_after = number + 1 if channels_after is None and channels == 1.0 else channels_after
            weights_after = number + 1 if weights == 1.0 else None
        if number + 1 in points:
            curve.append((number + 1, channels, weights))
    bound, label = None, ALL if variant is None else variant.capacity
    if strategy == "covering" and variant is not None and not covering.unreachable(layout, variant.capacity):
        bound = covering.period(layout, variant.capacity)
    return Reach(label, channels, weights, channels_after, weights_after, bound, curve), coverage


def _cuts(parts: Parts, plan: RoundPlan, variant: Variant | None) -> Iterator[Cut]:
    """Yield the distinct cuts of a round's participants."""
    task, seen = parts.task, set[int]()
    for client, index in zip(plan.client.tolist(), plan.variant.tolist(), strict=True):
        held = task.variants[index] if variant is None else variant
        if not held.shares_window:
            yield task.cut(held, plan.round, client)
        elif held.index not in seen:
            seen.add(held.index)
            yield task.cut(held, plan.round)


def _largest_matrix(parts: Parts, coverage: Coverage) -> tuple[str, Tensor] | None:
    layout = parts.workload.layout
    sizes = {}
    for name, dims in zip(layout.names, layout.axes, strict=True):
        if sum(dim.cuttable for dim in dims) >= 2:
            sizes[name] = coverage.mask(name).numel()
    if not sizes:
        return None
    name = max(sizes, key=lambda one: sizes[one])
    mask = coverage.mask(name)
    return name, mask.reshape(mask.shape[0], -1)


def render(found: Sequence[MethodCoverage], as_json: bool) -> str:
    """Return a table for each method, or one JSON object for all, without the matrices."""
    if as_json:
        names = ("strategy", "rounds", "masks_labels", "reaches")
        methods = {one.method: {name: asdict(one)[name] for name in names} for one in found}
        return json.dumps({"methods": methods}, indent=2)
    lines: list[str] = []
    for one in found:
        name = f"{one.method}: " if one.method else ""
        lines += [f"{name}strategy {one.strategy}, {one.rounds} rounds"]
        lines += [
            f"  {'capacity':>12}  {'channels':>8}  {'weights':>8}  {'all channels':>12}  {'all weights':>12}  bound"
        ]
        for reach in one.reaches:
            label = reach.capacity if isinstance(reach.capacity, str) else f"{reach.capacity:g}"
            lines.append(
                f"  {label:>12}  {reach.channels:>8.1%}  {reach.weights:>8.1%}  {_after(reach.channels_after):>12}"
                f"  {_after(reach.weights_after):>12}  {'-' if reach.bound is None else reach.bound}"
            )
        lines.append("")
    lines.append(f"{ALL}: as planned, each with its own capacity; the other rows: if all had that capacity")
    if any(one.masks_labels for one in found):
        lines.append("rows of labels count as reached, though only clients that hold a label train its row")
    return "\n".join(lines)


def _after(rounds: int | None) -> str:
    return "never" if rounds is None else f"round {rounds}"


def draw(found: Sequence[MethodCoverage], output: Path) -> Path:
    """Draw for every method the share of weights reached over the rounds, and the coverage of its largest matrix.

    Returns:
        path of the image.

    Raises:
        ConfigError: the format of `output` is not supported.
        StorageError: the image cannot be written.
    """
    return save(lambda: _figure(found), output)


def _figure(found: Sequence[MethodCoverage]) -> Figure:
    from matplotlib import figure as figures

    figure = figures.Figure(figsize=(2 * PANEL_INCHES[0], PANEL_INCHES[1] * len(found)), layout="constrained")
    for one, (curves, marks) in zip(found, figure.subplots(len(found), 2, squeeze=False), strict=True):
        _draw_curves(curves, one)
        _draw_matrix(marks, one)
    return figure


def _draw_curves(panel: Axes, one: MethodCoverage) -> None:
    for number, reach in enumerate(one.reaches):
        planned = isinstance(reach.capacity, str)
        panel.plot(
            [point[0] for point in reach.curve],
            [100 * point[2] for point in reach.curve],
            color="black" if planned else COLOURS[number % (len(COLOURS) - 1)],
            linestyle=":" if planned else "-",
            label="participants as planned" if planned else f"all of capacity {reach.capacity:g}",
        )
    panel.set(xscale="log", xlabel="Rounds", ylabel="Weights reached (%)", ylim=(0, 103))
    panel.set_title(f"{one.method}: {one.strategy}" if one.method else one.strategy)
    panel.grid(True)
    panel.legend(loc="best", fontsize=8)


def _draw_matrix(panel: Axes, one: MethodCoverage) -> None:
    if one.matrix is None:
        panel.set_axis_off()
        return
    name, mask = one.matrix
    panel.imshow(mask.numpy(), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest", aspect="auto")
    panel.set(xlabel="input channel", ylabel="output channel")
    smallest = one.reaches[0].capacity
    share = f"{100 * float(mask.double().mean()):.1f} %"
    panel.set_title(f"{name}\ncapacity {smallest:g}: {share} after {one.rounds} rounds")
