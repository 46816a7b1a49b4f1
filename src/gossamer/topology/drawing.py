"""Figures of topologies: the graph or its first rounds, the spectrum, and the convergence to the mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.topology.base import Floats, Mixing
from gossamer.topology.consensus import measure
from gossamer.topology.spectra import MAX_EXACT, spectrum
from gossamer.topology.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROUNDS = 6  # side by side
MAX_ON_CIRCLE = 120  # peers drawn as points; of more, the entries of W are drawn
MAX_MARKS = 200_000  # entries of W
MEASURED_ROUNDS = 200
PANEL_INCHES = (3.0, 3.1)
DARK, LIGHT, ACCENT = "#0072B2", "0.6", "#D55E00"


def draw(topology: Topology) -> Figure:
    """Return a figure, in the style of the caller.

    Raises:
        ConfigError: there are too many edges to list.
    """
    from matplotlib.figure import Figure

    cycle = topology.schedule.cycle
    num_rounds = min(MAX_ROUNDS, cycle or MAX_ROUNDS)
    mixings = [topology.mixing(round) for round in range(num_rounds)]
    has_spectrum = cycle == 1 and (mixings[0].kind == "shift" or topology.n <= MAX_EXACT)
    num_panels = num_rounds + has_spectrum + 1
    figure = Figure(figsize=(PANEL_INCHES[0] * num_panels, PANEL_INCHES[1]), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)
    positions = _positions(mixings[0], is_static=cycle == 1)
    for round, mixing in enumerate(mixings):
        _draw_graph(panels[0, round], mixing, positions)
        panels[0, round].set_title("graph" if cycle == 1 else f"round {round}")
    if has_spectrum:
        _draw_spectrum(panels[0, num_rounds], mixings[0])
    _draw_consensus(panels[0, -1], topology)
    figure.suptitle(f"{topology.name}, n = {topology.n}")
    return figure


def _positions(mixing: Mixing, is_static: bool) -> Floats:
    """Return the position of each peer, float64 [n, 2]: on a circle, or by springs for an irregular static graph."""
    n = mixing.n
    angle = 2.0 * np.pi * np.arange(n) / n
    circle = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    if mixing.kind != "sparse" or not is_static or n > MAX_ON_CIRCLE:
        return circle
    import networkx

    edges = mixing.edges()
    graph = networkx.Graph(zip(edges.receiver.tolist(), edges.sender.tolist(), strict=True))
    found = networkx.spring_layout(graph, pos={i: tuple(circle[i]) for i in range(n)}, iterations=200, seed=0)
    return np.array([found[i] for i in range(n)])


def _draw_graph(panel: Axes, mixing: Mixing, positions: Floats) -> None:
    from matplotlib.collections import LineCollection

    edges = mixing.edges() if mixing.n * mixing.max_degree <= 2 * MAX_MARKS else None
    panel.set_aspect("equal")
    if mixing.n <= MAX_ON_CIRCLE and edges is not None:
        panel.set_axis_off()
        lines: Any = np.stack([positions[edges.sender], positions[edges.receiver]], axis=1)
        strongest = edges.weight.max(initial=1e-12)
        widths = 0.3 + 1.2 * edges.weight / strongest
        panel.add_collection(LineCollection(lines, colors=LIGHT, linewidths=widths.tolist(), zorder=1))
        panel.scatter(positions[:, 0], positions[:, 1], s=max(4.0, 600.0 / mixing.n), color=DARK, zorder=2)
    elif edges is not None and len(edges.weight) <= MAX_MARKS:
        size = max(0.05, 2e4 / mixing.n**2)
        panel.scatter(edges.sender, edges.receiver, s=size, color=DARK, linewidths=0, rasterized=True)
        panel.set(xlim=(-0.5, mixing.n - 0.5), ylim=(mixing.n - 0.5, -0.5), xlabel="sender", ylabel="receiver")
    else:
        panel.set_axis_off()
        panel.text(0.5, 0.5, f"{mixing.kind}, degree {mixing.max_degree}", ha="center", transform=panel.transAxes)


def _draw_spectrum(panel: Axes, mixing: Mixing) -> None:
    values = spectrum(mixing)
    angle = np.linspace(0.0, 2.0 * np.pi, 200)
    panel.plot(np.cos(angle), np.sin(angle), color=LIGHT, linewidth=0.8)
    shown = values[:: max(1, len(values) // 20_000)]
    panel.scatter(shown.real, shown.imag, s=6, color=DARK, linewidths=0, rasterized=len(shown) > 2_000)
    panel.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), xlabel="real part", ylabel="imaginary part")
    panel.set_aspect("equal")
    panel.set_title("eigenvalues")


def _draw_consensus(panel: Axes, topology: Topology) -> None:
    distances = measure(topology, MEASURED_ROUNDS).distances
    rounds = np.arange(len(distances))
    panel.plot(rounds, np.maximum(distances, 1e-17), color=DARK, label="measured")
    if topology.bound:
        promised = topology.bound**rounds
        panel.plot(rounds, np.maximum(promised, distances.min(initial=1.0) / 10), "--", color=ACCENT, label="bound")
        panel.legend(loc="best")
    panel.set(yscale="log", xlabel="round", ylabel="relative distance to the mean")
    panel.set_title("consensus")
    panel.grid(True)
