"""Says of each stage of a recorded run what a device would save, and how sure that is.

A verdict holds for all values of the device's numbers within their bounds, and for 90 % of resampled rounds: "win" if
the round would be shorter by `WORTH` or more even at the worst bounds, "lose" if it would not be at the best ones, else
"cannot tell". A round never gets shorter where a number gets worse, so looking at both ends is enough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from gossamer.profiling.devices import Device
from gossamer.profiling.graphs import ARRIVE
from gossamer.profiling.offload import (
    BACKGROUND,
    STAGES,
    SYNCHRONOUS,
    Costs,
    Moved,
    Stage,
    costs_of,
    move,
    numbers_of,
)
from gossamer.profiling.replay import Graph, Interval, Node, bootstrap_change, replay

WIN, LOSE, CANNOT_TELL = "win", "lose", "cannot tell"
WORTH = 0.01  # share of the round that must be saved to be worth it
BEST, VALUE, WORST = 0.0, 0.5, 1.0  # places between a number's bounds
SEARCHED = (1e-3, 1e3)  # slowdowns among which break-even is looked for
HALF_LINE_RATE = 0.5  # share of the line rate beyond which the kernel's TCP is too much for a card's cores


@dataclass(frozen=True)
class Advice:
    """Whether one of the four advices of arXiv 2301.06070 is met; None: it says nothing here."""

    name: str
    is_met: bool | None
    why: str


@dataclass(frozen=True)
class Verdict:
    """What moving one stage would do. Times are means of a round.

    Attributes:
        stage, mode, engine: what is moved, how (see `Stage`), and to which engine, if it is no core.
        verdict, reason: one of win, lose, cannot tell; and a sentence.
        change: of the round's length at the device's values, as a share of it, with the interval of resampled rounds.
        best, worst: the same at the best and the worst bounds.
        deciding: assumed numbers on which the verdict depends.
        seconds: of the stage on the host, as in the given graphs.
        freed_cpu_seconds, link_bytes: of the host's processors, and across the link.
        memory_bytes: that the host's memory reads and writes less: those of the stage, of which its `touches` tell,
            without those that cross the link. Derived, not measured.
        utilisation: share of the round in which the device's busiest core or engine works.
        critical_path: share of each kind of work on the longest path after the move.
        break_even_slowdown: at which the round is as long as before; None: it does not depend on it, or at none.
        break_even_bytes: above which an engine saves time on a piece; None: no engine, or at no size.
        start_seconds: which an engine needs once a run, and which is in no other number.
        advice: the four advices.
    """

    stage: str
    mode: str
    engine: str | None
    verdict: str
    reason: str
    change: Interval
    best: Interval
    worst: Interval
    deciding: list[str]
    seconds: float
    freed_cpu_seconds: float
    link_bytes: float
    memory_bytes: float
    utilisation: float
    critical_path: dict[str, float]
    break_even_slowdown: float | None
    break_even_bytes: float | None
    start_seconds: float
    advice: list[Advice]

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        intervals = {"change": self.change, "best": self.best, "worst": self.worst}
        return asdict(self) | {name: interval._asdict() for name, interval in intervals.items()}


def judge(graphs: Sequence[Graph], device: Device, stages: Sequence[Stage] = STAGES) -> list[Verdict]:
    """Judge every stage that was recorded, the largest effect first.

    Args:
        graphs: of recorded rounds, at least one.
    """
    recorded = {node.kind for graph in graphs for node in graph.nodes}
    found = [_judge(graphs, device, stage) for stage in stages if stage.is_in(recorded)]
    return sorted(found, key=lambda one: (one.verdict == LOSE, one.change.mean))


def is_nothing_worth(verdicts: Sequence[Verdict]) -> bool:
    """Say whether no stage is, or may be, worth moving."""
    return all(one.verdict == LOSE for one in verdicts)


def _judge(graphs: Sequence[Graph], device: Device, stage: Stage) -> Verdict:
    nodes = [node for graph in graphs for node in graph.nodes if node.kind in stage.kinds]
    kinds = tuple(sorted({node.kind for node in nodes}))
    engine, numbers = device.engine_for(kinds, stage.direction), numbers_of(device, stage, kinds)
    before = [replay(graph).seconds for graph in graphs]

    def moved_at(place: Mapping[str, float]) -> list[Moved]:
        """Return all rounds with the stage moved."""
        costs = costs_of(device, stage, kinds, place)
        return [move(graph, stage, costs) for graph in graphs]

    def change_at(place: Mapping[str, float]) -> Interval:
        """Return the change of the round."""
        return bootstrap_change(before, [one.seconds for one in moved_at(place)])

    at_value = moved_at({})
    change = bootstrap_change(before, [one.seconds for one in at_value])
    best, worst = (change_at(dict.fromkeys(numbers, place)) for place in (BEST, WORST))
    verdict, deciding = _verdict(best, worst), list[str]()
    if verdict == CANNOT_TELL:
        deciding = _deciding(device, numbers, change_at)
    costs, count = costs_of(device, stage, kinds, {}), len(graphs)
    seconds, num_bytes = sum(node.seconds for node in nodes), sum(node.num_bytes for node in nodes)
    break_even_bytes = _break_even_bytes(costs, stage, seconds, num_bytes)
    is_slower = engine is None and device.numbers[stage.slowdown].lo >= 1
    utilisation = fmean(one.device_seconds / max(one.seconds, 1e-12) for one in at_value)
    return Verdict(
        stage=stage.name,
        mode=stage.mode,
        engine=engine,
        verdict=verdict,
        reason=_reason(verdict, stage, best, worst, deciding, is_slower),
        change=change,
        best=best,
        worst=worst,
        deciding=deciding,
        seconds=seconds / count,
        freed_cpu_seconds=sum(one.freed_seconds for one in at_value) / count,
        link_bytes=sum(one.link_bytes for one in at_value) / count,
        memory_bytes=(sum(map(stage.touched, nodes)) - sum(one.link_bytes for one in at_value)) / count,
        utilisation=utilisation,
        critical_path=path_shares(at_value[len(at_value) // 2].graph),
        break_even_slowdown=None if engine else _break_even_slowdown(graphs, stage, costs, fmean(before)),
        break_even_bytes=break_even_bytes,
        start_seconds=device.engines[engine].numbers["start"].value if engine else 0.0,
        advice=_advice(stage, device, engine, at_value, before, nodes, break_even_bytes),
    )


def _verdict(best: Interval, worst: Interval) -> str:
    if worst.hi <= -WORTH:
        return WIN
    return LOSE if best.lo > -WORTH else CANNOT_TELL


Changes = Callable[[Mapping[str, float]], Interval]


def _deciding(device: Device, numbers: Sequence[str], change_at: Changes) -> list[str]:
    """Name the assumed numbers on which a verdict depends, where the others have their best or worst bounds."""

    def number(name: str) -> Any:
        """Return a number of the device or of an engine."""
        engine, _, own = name.rpartition(".")
        return (device.engines[engine].numbers if engine else device.numbers)[own]

    assumed = [name for name in numbers if number(name).is_assumed]
    found = []
    for name in assumed:
        low, high = (change_at({name: place}) for place in (BEST, WORST))
        if (low.lo <= -WORTH) != (high.hi <= -WORTH):
            found.append(name)
    return found or assumed


def _reason(
    verdict: str, stage: Stage, best: Interval, worst: Interval, deciding: Sequence[str], is_slower: bool
) -> str:
    shown = f"{100 * best.mean:+.1f} % at the best bounds, {100 * worst.mean:+.1f} % at the worst"
    if verdict == WIN:
        return f"the round is shorter at all bounds: {shown}"
    if verdict == LOSE:
        if stage.mode == SYNCHRONOUS and is_slower:
            return f"the thread waits for a slower core, which never saves time, only the host's processors: {shown}"
        return f"the round is not shorter by {100 * WORTH:g} % at any bounds: {shown}"
    because = f", and {', '.join(deciding)} {'is' if len(deciding) == 1 else 'are'} assumed" if deciding else ""
    return f"the sign depends on the device: {shown}{because}"


def _break_even_slowdown(graphs: Sequence[Graph], stage: Stage, costs: Costs, before: float) -> float | None:
    """Return the slowdown up to which the mean round is no longer than before."""
    some = graphs[:: max(1, len(graphs) // 5)]
    before = fmean(replay(graph).seconds for graph in some) if len(some) < len(graphs) else before

    def is_longer(slowdown: float) -> bool:
        """Say whether rounds are longer than before."""
        changed = costs._replace(slowdown=slowdown)
        return fmean(move(graph, stage, changed).seconds for graph in some) > before * (1 + 1e-9)

    low, high = SEARCHED
    if is_longer(low):
        return None
    if not is_longer(high):
        return high
    for _ in range(20):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if is_longer(middle) else (middle, high)
    return low


def _break_even_bytes(costs: Costs, stage: Stage, seconds: float, num_bytes: float) -> float | None:
    """Return the size above which an engine is quicker than the host; None: at none."""
    if costs.engine is None or not num_bytes:
        return None
    latency, per_byte = costs.engine
    gained = seconds / num_bytes - per_byte - costs.link_seconds_per_byte * (1 + stage.returns)
    return (costs.submit + latency + 2 * costs.link_latency) / gained if gained > 0 else None


def _advice(
    stage: Stage,
    device: Device,
    engine: str | None,
    moved: Sequence[Moved],
    before: Sequence[float],
    nodes: Sequence[Node],
    break_even: float | None,
) -> list[Advice]:
    piece_bytes = fmean(node.num_bytes for node in nodes)
    utilisation = max(one.device_seconds / length for one, length in zip(moved, before, strict=True))
    rate = max(one.link_bytes / length for one, length in zip(moved, before, strict=True))
    if engine is None:
        first = Advice("A1", None, f"{device.name} has no engine for {stage.name}")
    elif break_even is None:
        first = Advice("A1", False, f"engine {engine} is slower than the host at every size")
    else:
        is_met = piece_bytes > break_even
        first = Advice("A1", is_met, f"pieces of {piece_bytes:,.0f} bytes, break-even at {break_even:,.0f}")
    if stage.mode == BACKGROUND:
        why = f"nothing waits for it, and the device is busy {utilisation:.1%} of a round"
        second = Advice("A2", utilisation < 1, why)
    else:
        second = Advice("A2", False, "the round waits for it")
    limit = HALF_LINE_RATE * device.numbers["line_rate"].value
    if stage.mode == SYNCHRONOUS:
        fourth = Advice("A4", False, "every message stops at the device on its way from the host to the wire")
    elif rate > limit and stage.mode != BACKGROUND:
        fourth = Advice("A4", False, f"{rate:,.0f} bytes/s are more than half of the line rate")
    else:
        fourth = Advice("A4", True, "no message stops at the device on its way to the wire")
    arrived = sum(node.num_bytes for node in nodes if node.kind == ARRIVE) / len(moved)
    return [first, second, _endpoint(moved, arrived), fourth]


def _endpoint(moved: Sequence[Moved], arrived: float) -> Advice:
    """Return A3 of a stage with which so many bytes a round end at the device instead of the host."""
    crossing = fmean(one.link_bytes for one in moved)
    if not arrived:
        return Advice(
            "A3", False, f"messages come to the host, so {crossing:,.0f} bytes a round cross the link to the device"
        )
    why = f"participants send to the device, and {crossing:,.0f} bytes a round cross its link instead of {arrived:,.0f}"
    return Advice("A3", crossing < arrived, why)


def path_shares(graph: Graph) -> dict[str, float]:
    """Return each kind's share of the longest path, the largest first."""
    found: dict[str, float] = defaultdict(float)
    schedule = replay(graph)
    for number in schedule.critical_path():
        found[graph.nodes[number].kind] += graph.nodes[number].seconds
    total = schedule.seconds or 1.0
    found["delay of messages"] = max(0.0, schedule.seconds - sum(found.values()))
    return {kind: s / total for kind, s in sorted(found.items(), key=lambda one: -one[1]) if s > 0}
