"""Tables and figures of a profiled run, and of what a device would change."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigError
from gossamer.profiling.advice import Verdict, is_nothing_worth, judge, path_shares
from gossamer.profiling.clocks import Clock
from gossamer.profiling.devices import Device
from gossamer.profiling.exports import rounds_of
from gossamer.profiling.graphs import graph_of
from gossamer.profiling.offload import STAGES, Stage, costs_of, move
from gossamer.profiling.outliers import Outlier, find_outliers
from gossamer.profiling.replay import Graph, Interval, bootstrap, replay, slack
from gossamer.profiling.trace import ABSENT, SIDE_CAR, UNATTRIBUTED, WAIT, Round, Segment, Trace, stage_totals
from gossamer.profiling.verification import MAX_DELAY, delay_of
from gossamer.reports.images import save
from gossamer.storage.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROUNDS = 30  # that are replayed
IDLE = {WAIT: "0.9", UNATTRIBUTED: "0.75", ABSENT: "1.0"}  # grey levels
COLOURS = {  # of stages, the same in all figures; after Tol, https://sronpersonalpages.nl/~pault
    "train": "#4477aa",
    "send": "#ee6677",
    "evaluate": "#228833",
    "aggregate": "#66ccee",
    "mix": "#332288",
    "receive": "#ee8866",
    "extract": "#44bb99",
    "plan": "#ccbb44",
    "coordinate": "#aa3377",
    "exchange": "#999933",
    "serialise": "#ddaa33",
    "log": "#882255",
    "commit": "#000000",
    "combine": "#77aadd",
    "compress": "#004488",
    "update": "#bb5566",
}
OTHER_COLOUR = "#997700"
MAX_SHOWN = 10  # stages in a legend


@dataclass(frozen=True)
class StageTime:
    """A stage over all threads and rounds.

    Attributes:
        stage: its name.
        seconds, share: time, and as a share of all threads' time.
        cpu_seconds, delay_seconds: processor time, and time of waiting for a processor.
        num_bytes: that it worked on.
        path_share: its share of a round's longest path, on average.
        slack_seconds: by how much it could take longer in a round without the round becoming longer, at least.
    """

    stage: str
    seconds: float
    share: float
    cpu_seconds: float
    delay_seconds: float
    num_bytes: int
    path_share: float
    slack_seconds: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a run went.

    Attributes:
        num_rounds, seconds: whole rounds, and how long they took in all.
        round_seconds: of one: mean, and the bounds of its 90 % interval.
        replay_error: relative difference between replayed and recorded rounds, the largest.
        stages: the largest first.
        processes: ``{thread: {stage: seconds}}``.
        slow: processes that are slower than the others in a stage.
        clocks: those of `Trace` that are not the driver's.
    """

    num_rounds: int
    seconds: float
    round_seconds: Interval
    replay_error: float
    stages: list[StageTime]
    processes: dict[str, dict[str, float]]
    slow: list[Outlier]
    clocks: dict[str, Clock]


def examine(trace: Trace) -> Profile:
    """Add up where the time of a run went."""
    rounds = rounds_of(trace, MAX_ROUNDS)
    graphs = [graph_of(one) for one in rounds]
    schedules = [replay(graph) for graph in graphs]
    errors = [abs(found.seconds / one.seconds - 1) for found, one in zip(schedules, rounds, strict=True)]
    shares, spare = [path_shares(graph) for graph in graphs], defaultdict[str, list[float]](list)
    for graph, schedule in zip(graphs, schedules, strict=True):
        least: dict[str, float] = {}
        for node, seconds in zip(graph.nodes, slack(graph, schedule), strict=True):
            least[node.kind] = min(seconds, least.get(node.kind, seconds))
        for kind, seconds in least.items():
            spare[kind].append(seconds)
    totals = stage_totals(trace.rounds)
    whole = sum(one.end for kind, one in totals.items() if kind != ABSENT)
    stages = [
        StageTime(
            kind,
            one.end,
            one.end / whole if kind != ABSENT else 0.0,
            one.cpu,
            one.delay,
            one.num_bytes,
            fmean(share.get(kind, 0.0) for share in shares),
            max(0.0, median(spare.get(kind, [0.0]))),
        )
        for kind, one in sorted(totals.items(), key=lambda item: -item[1].end)
    ]
    processes: dict[str, dict[str, float]] = {}
    for lane, segments in ((lane, own) for one in trace.rounds for lane, own in one.lanes.items()):
        sums = processes.setdefault(lane.name, defaultdict(float))
        for segment in segments:
            sums[segment.kind] += segment.seconds
    lengths = [one.seconds for one in trace.rounds]
    return Profile(
        len(trace.rounds),
        sum(lengths),
        bootstrap(lengths),
        max(errors),
        stages,
        {name: dict(sums) for name, sums in sorted(processes.items())},
        find_outliers(trace.rounds),
        {name: clock for name, clock in trace.clocks.items() if clock.offset},
    )


def render(profile: Profile, as_json: bool = False) -> str:
    """Return a profile as tables, or as JSON."""
    if as_json:
        clocks = {
            name: {"offset": offset, "error": error if math.isfinite(error) else None}
            for name, (offset, error) in profile.clocks.items()
        }
        return json.dumps(asdict(profile) | {"clocks": clocks}, indent=2)
    mean, lo, hi = profile.round_seconds
    head = (
        f"{profile.num_rounds} rounds, {as_time(profile.seconds)}; a round takes {as_time(mean)}"
        f" (90 % interval of the mean: {as_time(lo)} to {as_time(hi)})"
    )
    rows = [("stage", "time", "share", "CPU", "delay", "bytes", "of critical path", "slack a round")]
    rows += [
        (
            one.stage,
            as_time(one.seconds),
            f"{one.share:.1%}",
            as_time(one.cpu_seconds),
            as_time(one.delay_seconds),
            f"{one.num_bytes:,}",
            f"{one.path_share:.1%}",
            "-" if one.stage in (WAIT, ABSENT) else as_time(one.slack_seconds),
        )
        for one in profile.stages
    ]
    lanes = [("process", "busy", "waiting", "unattributed", "most of it")]
    for name, sums in profile.processes.items():
        total = (sum(sums.values()) - sums.get(ABSENT, 0.0)) or 1.0
        busy = {kind: seconds for kind, seconds in sums.items() if kind not in IDLE}
        most = sorted(busy.items(), key=lambda item: -item[1])[:3]
        busy_share, waiting, unattributed = (
            f"{share / total:.1%}" for share in (sum(busy.values()), sums.get(WAIT, 0.0), sums.get(UNATTRIBUTED, 0.0))
        )
        told = ", ".join(f"{kind} {as_time(seconds)}" for kind, seconds in most)
        lanes.append((name, busy_share, waiting, unattributed, told))
    tail = f"Replayed rounds differ from recorded ones by {profile.replay_error:.2%} at most."
    if profile.clocks:
        tail += f" Clocks against the driver's: {', '.join(map(_clock_text, profile.clocks.items()))}."
    slow = [
        f"{one.process} takes {one.ratio.mean:.2f} times as long for a piece of {one.stage} as the others"
        f" ({one.ratio.lo:.2f} to {one.ratio.hi:.2f}): {as_time(one.seconds)} a round."
        for one in profile.slow
    ]
    return "\n\n".join((head, aligned(rows), aligned(lanes), *(["\n".join(slow)] if slow else []), tail))


def _clock_text(item: tuple[str, Clock]) -> str:
    name, clock = item
    error = f"with an error of {as_time(clock.error)} at most" if math.isfinite(clock.error) else "by the time of day"
    return f"{name} {clock.offset:+.6f} s {error}"


def as_time(seconds: float) -> str:
    """Return a time with its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us" if seconds >= 1e-9 else "0 us"


# ---- what a device would change


def offload(trace: Trace, device: Device, stages: Sequence[Stage] = STAGES) -> list[Verdict]:
    """Judge what moving each stage of a run to a device would do.

    Neither a stage nor the rest of a round has the time for which threads waited for a processor: a device would seem
    to save it, and so would an idle machine.

    Raises:
        ConfigError: a side-car did a stage of it already.
    """
    rounds = rounds_of(trace, MAX_ROUNDS)
    moved = [one.number for one in rounds if any(lane.process == SIDE_CAR for lane in one.lanes)]
    if moved:
        raise ConfigError(
            f"in round {moved[0]} a side-car does a stage of this run already, and what it does would be moved once"
            " more: give a run that was recorded without offload"
        )
    return judge([graph_of(one, is_quiet=True, marks_arrivals=True) for one in rounds], device, stages)


def delay_share(trace: Trace) -> float:
    """Return for which share of a round, on average, that of its threads waited for a processor that did most."""
    return fmean(delay_of(one) for one in rounds_of(trace, MAX_ROUNDS))


def render_offload(verdicts: Sequence[Verdict], device: Device, delay: float, as_json: bool = False) -> str:
    """Return verdicts as a table and a sentence for each, or as JSON.

    Args:
        delay: see `delay_share`; above `MAX_DELAY` a caveat tells it.
    """
    nothing, caveat = is_nothing_worth(verdicts), None
    if delay > MAX_DELAY:
        caveat = (
            f"While it was recorded, threads waited for a processor for up to {delay:.1%} of a round (mean of rounds):"
            " that time is left out of all numbers here, which are less sure than those of a quiet machine."
        )
    if as_json:
        plain = {"device": device.name, "delay_share": delay, "caveat": caveat, "nothing_worth_offloading": nothing}
        return json.dumps(plain | {"stages": [one.as_json() for one in verdicts]}, indent=2)
    rows = [
        (
            "stage",
            "verdict",
            "round",
            "90 % interval",
            "host CPU freed",
            "link bytes",
            "DRAM bytes*",
            "device busy",
            "break-even",
        )
    ]
    for one in verdicts:
        if one.engine is not None:
            even = "-" if one.break_even_bytes is None else f"{one.break_even_bytes:,.0f} bytes"
        else:
            even = "-" if one.break_even_slowdown is None else f"slowdown {one.break_even_slowdown:.3g}"
        interval = f"{100 * one.change.lo:+.1f} to {100 * one.change.hi:+.1f} %"
        freed = f"{'-' if one.freed_cpu_seconds < 0 else ''}{as_time(abs(one.freed_cpu_seconds))}"
        moved = f"{one.link_bytes:,.0f}", f"{0 - one.memory_bytes:+,.0f}", f"{one.utilisation:.1%}"
        rows.append((one.stage, one.verdict, f"{100 * one.change.mean:+.1f} %", interval, freed, *moved, even))
    told = []
    for one in verdicts:
        marks = {True: "met", False: "broken", None: "does not apply"}
        advice = "; ".join(f"{each.name} {marks[each.is_met]}: {each.why}" for each in one.advice)
        start = f"; its engine needs {as_time(one.start_seconds)} once a run" if one.start_seconds else ""
        told.append(f"{one.stage} ({one.mode}): {one.verdict}, {one.reason}{start}.\n  {advice}.")
    head = f"Moved to {device.name}: {device.description}. Rounds are replayed; nothing ran on such a device."
    note = "* of the host's memory: derived from the bytes that a stage works on, not measured."
    parts = [head, aligned(rows), note, "\n".join(told)] if verdicts else [head]
    return "\n\n".join([*parts, *([caveat] if caveat else []), *(["Nothing is worth offloading."] if nothing else [])])


# ---- figures


def draw_timeline(trace: Trace, output: Path) -> Path:
    """Draw what each thread does in the round of median length."""
    return save(lambda: _figure([(f"round {(one := _typical(trace.rounds)).number}", _bars(one))]), output)


def draw_offload(trace: Trace, device: Device, stage: Stage, output: Path) -> Path:
    """Draw the round of median length before and after a stage is moved."""
    one = _typical(rounds_of(trace, MAX_ROUNDS))
    graph = graph_of(one, is_quiet=True, marks_arrivals=True)
    kinds = tuple(sorted({node.kind for node in graph.nodes} & set(stage.kinds)))
    after = move(graph, stage, costs_of(device, stage, kinds, {})).graph
    panels = [
        ("as it was, without waits for processors", _replayed(graph)),
        (f"{stage.name} on {device.name}", _replayed(after)),
    ]
    return save(lambda: _figure(panels), output)


Bars = Mapping[str, Sequence[Segment]]


def _typical(rounds: Sequence[Round]) -> Round:
    return sorted(rounds, key=lambda one: one.seconds)[len(rounds) // 2]


def _bars(one: Round) -> Bars:
    return {lane.name: segments for lane, segments in sorted(one.lanes.items())}


def _replayed(graph: Graph) -> Bars:
    found, schedule = defaultdict[str, list[Segment]](list), replay(graph)
    for node, begin, end in zip(graph.nodes, schedule.begins, schedule.ends, strict=True):
        found[node.resource].append(Segment(node.kind, begin, end))
    return dict(sorted(found.items()))


def _figure(panels: Sequence[tuple[str, Bars]]) -> Figure:
    from matplotlib import figure as figures
    from matplotlib.patches import Patch

    totals: dict[str, float] = defaultdict(float)
    for segment in (one for _, bars in panels for own in bars.values() for one in own):
        totals[segment.kind] += segment.seconds
    kinds = [kind for kind in sorted(totals, key=lambda kind: -totals[kind]) if kind not in IDLE]
    colours = dict.fromkeys(kinds, OTHER_COLOUR) | COLOURS | IDLE
    height = sum(0.28 * len(bars) + 0.9 for _, bars in panels)
    figure = figures.Figure(figsize=(9, height + 0.6), layout="constrained")
    heights = [len(bars) + 1 for _, bars in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, bars) in zip(axes, panels, strict=True):
        _draw_bars(panel, title, bars, colours)
    axes[-1].set_xlabel("Milliseconds since the round began")
    shown = [kind for kind in [*kinds[:MAX_SHOWN], *IDLE] if kind in totals]
    patches: list[Any] = [Patch(color=colours[kind], label=kind) for kind in shown]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _draw_bars(panel: Axes, title: str, bars: Bars, colours: Mapping[str, str]) -> None:
    for row, segments in enumerate(bars.values()):
        ranges = [(1e3 * one.begin, 1e3 * one.seconds) for one in segments]
        panel.broken_barh(ranges, (row - 0.4, 0.8), facecolors=[colours[one.kind] for one in segments])
    panel.set_yticks(range(len(bars)), list(bars))
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_title(title, loc="left")
