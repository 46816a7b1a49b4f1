"""A table and a figure of rounds of other sizes, extrapolated from a recorded run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.errors import ConfigError
from gossamer.profiling.exports import rounds_of
from gossamer.profiling.scale import Scaled, extrapolate, jobs_of
from gossamer.profiling.trace import Trace
from gossamer.reports.images import save
from gossamer.reports.profile import MAX_ROUNDS, as_time
from gossamer.storage.runlog import read_config
from gossamer.storage.tables import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PARTICIPANTS = 1_000_000


def parse_sizes(text: str) -> list[int]:
    """Return the numbers in a list such as ``100,1000``.

    Raises:
        ConfigError: it is none, or one is out of range.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > MAX_PARTICIPANTS:
        raise ConfigError(f"--scale {text}: give numbers from 1 to {MAX_PARTICIPANTS:,}, such as 100,1000")
    return sizes


def scale(directory: Path, trace: Trace, sizes: Sequence[int], workers: int | None = None) -> list[Scaled]:
    """Extrapolate a recorded run to other numbers of participants.

    Args:
        workers: that train; None: as many as were recorded.

    Raises:
        ConfigError: it is not a federation's.
        DataError: no worker trained in it.
    """
    clients = read_config(directory).get("clients")
    if clients is None:
        raise ConfigError("--scale is for runs with clients, and this one has peers: leave it out")
    jobs = jobs_of(rounds_of(trace, MAX_ROUNDS))
    return [extrapolate(jobs, clients["per_round"], size, workers or jobs.workers) for size in sizes]


def render(found: Sequence[Scaled], as_json: bool = False) -> str:
    """Return a table, or JSON."""
    if as_json:
        return json.dumps([asdict(one) | {"seconds": one.seconds._asdict()} for one in found], indent=2)
    rows = [("participants", "workers", "round", "90 % of rounds", "bottleneck", "busy")]
    for one in found:
        interval = f"{as_time(one.seconds.lo)} to {as_time(one.seconds.hi)}"
        busy = ", ".join(f"{name} {share:.0%}" for name, share in one.shares.items())
        size = f"{one.participants:,}", str(one.workers)
        rows.append((*size, as_time(one.seconds.mean), interval, one.bottleneck, busy))
    return f"Extrapolated; nothing of this size ran.\n\n{aligned(rows)}"


def draw(found: Sequence[Scaled], output: Path) -> Path:
    """Draw the length of a round against the number of participants, with the names of bottlenecks."""

    def figure() -> Figure:
        """Draw."""
        from matplotlib import figure as figures

        made = figures.Figure(figsize=(5.5, 3.6), layout="constrained")
        panel, ordered = made.subplots(), sorted(found, key=lambda one: one.participants)
        sizes = [one.participants for one in ordered]
        panel.plot(sizes, [one.seconds.mean for one in ordered], marker="o", markersize=4)
        panel.fill_between(sizes, [one.seconds.lo for one in ordered], [one.seconds.hi for one in ordered], alpha=0.2)
        for one in ordered:
            place = one.participants, one.seconds.mean
            panel.annotate(one.bottleneck, place, (4, -12), textcoords="offset points", fontsize=8)
        panel.set(xscale="log", yscale="log", xlabel="Participants a round", ylabel="Seconds a round, extrapolated")
        panel.grid(True)
        return made

    return save(figure, output)
