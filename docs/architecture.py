"""Draws docs/architecture.png, the way of a round's data: ``python docs/architecture.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

BLUE, GREEN, ORANGE, GREY = "#0072B2", "#009E73", "#D55E00", "#555555"
WIDTH, GAP = 3.2, 1.45  # of a step, and between two of them

# step, modules, what it passes on to the next one
STEPS = (
    ("plan", "planning/clients.py\nplanning/peers.py\nsimulation/", "RoundPlan"),
    ("train", "engines/server.py\nengines/peers.py", "sums or\npayloads"),
    ("exchange", "aggregate/ (server)\ntopology/ (peers)", "inbox"),
    ("update", "algorithms/", "state"),
    ("evaluate", "workloads/", "metrics"),
    ("log", "round_record.py\nstorage/runlog.py", "offsets"),
    ("commit", "storage/checkpoint.py,\nclient_store.py", ""),
)


def left(step: int) -> float:
    """Return where a step's box begins."""
    return step * (WIDTH + GAP)


def box(panel: Axes, x: float, y: float, width: float, height: float, colour: str, **style: object) -> None:
    """Draw a rounded box."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", ec=colour, **style)
    panel.add_patch(shape)


def arrow(panel: Axes, start: tuple[float, float], end: tuple[float, float], label: str, colour: str = GREY) -> None:
    """Draw an arrow, with its label above it, or to its right if it is vertical."""
    panel.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    )
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    if start[0] == end[0]:
        panel.text(x + 0.1, y, label, ha="left", va="center", fontsize=9, color=colour)
    else:
        panel.text(x, y + 0.1, label, ha="center", va="bottom", fontsize=9, color=colour)


def main() -> None:
    """Draw the figure."""
    right = left(len(STEPS)) - GAP
    figure = plt.figure(figsize=(15.6, 6.2))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set(xlim=(-0.35, right + 0.35), ylim=(-4.3, 4.4))
    panel.axis("off")

    box(panel, -0.2, 3.0, right + 0.4, 1.0, BLUE, fc="#eaf3f9", lw=1.4)
    panel.text(0.1, 3.5, "rounds.py", fontsize=12, family="monospace", va="center", color=BLUE, weight="bold")
    panel.text(2.6, 3.5, "the loop: calls each step, checks the quorum, commits", fontsize=10.5, va="center")

    phase = left(1) - 0.12
    box(panel, phase, -0.3, left(4) - GAP + 0.12 - phase, 2.1, GREY, fc="none", lw=1.1, ls=(0, (4, 3)))
    panel.text(left(4) - GAP, 1.9, "for each phase of the round", fontsize=9, color=GREY, ha="right", va="bottom")
    for number, (name, modules, passed) in enumerate(STEPS):
        x = left(number)
        box(panel, x, 0.0, WIDTH, 1.45, GREEN, fc="#eaf6f1", lw=1.4)
        panel.text(x + WIDTH / 2, 1.2, f"{number + 1} {name}", ha="center", va="center", fontsize=11.5, weight="bold")
        panel.text(x + WIDTH / 2, 0.5, modules, ha="center", va="center", fontsize=7.8, family="monospace")
        if passed:
            arrow(panel, (x + WIDTH, 0.72), (x + WIDTH + GAP, 0.72), passed)

    arrow(panel, (left(0) + 0.6, 1.45), (left(0) + 0.6, 3.0), "a TimedPlan\nfor each phase")
    arrow(panel, (left(1) + 0.9, 1.45), (left(1) + 0.9, 3.0), "TrainReport")
    arrow(panel, (left(4) + 0.9, 1.45), (left(4) + 0.9, 3.0), "Sums")
    arrow(panel, (left(5) + 0.9, 3.0), (left(5) + 0.9, 1.45), "Record")
    arrow(panel, (left(6) + 0.9, 3.0), (left(6) + 0.9, 1.45), "Progress")

    low, end = -4.1, left(4) - GAP + 0.25
    box(panel, -0.25, low, end + 0.25, 2.3, ORANGE, fc="#fcf1ea", lw=1.4)
    panel.text(0.05, low + 1.9, "processes that train", fontsize=10.5, va="center", color=ORANGE, weight="bold")
    panel.text(
        4.6,
        low + 1.9,
        "forked workers of engines/local/, or actors of engines/ray/; both run engines/training/:",
        fontsize=9.2,
        va="center",
    )
    inner = (
        ("worker.py", "one message, one reply;\nresults into a slot"),
        ("trainer.py", "Algorithm.begin, end;\none by one or stacked"),
        ("batches.py", "samples of a block:\nWorkload.batch"),
        ("steps.py", "Workload.loss,\nAlgorithm.step"),
    )
    for number, (module, text) in enumerate(inner):
        x = 0.1 + number * 4.5
        box(panel, x, low + 0.25, 3.5, 1.2, ORANGE, fc="white", lw=1.0)
        panel.text(x + 1.75, low + 1.15, module, ha="center", va="center", fontsize=8.2, family="monospace")
        panel.text(x + 1.75, low + 0.62, text, ha="center", va="center", fontsize=8.6)
        if number:
            panel.annotate(
                "", (x, low + 0.85), (x - 0.92, low + 0.85), arrowprops={"arrowstyle": "-|>", "color": ORANGE}
            )
    arrow(panel, (left(1) + 0.6, 0.0), (left(1) + 0.6, low + 2.3), "Job", ORANGE)
    arrow(panel, (left(1) + 1.7, low + 2.3), (left(1) + 1.7, 0.0), "BlockResult", ORANGE)

    for step, files in ((5, "metrics.jsonl\nevents.jsonl"), (6, "checkpoints/\nclients/")):
        x = left(step)
        box(panel, x, low + 0.65, WIDTH, 1.0, GREY, fc="#f2f2f2", lw=1.1)
        panel.text(x + WIDTH / 2, low + 1.15, files, ha="center", va="center", fontsize=8.6, family="monospace")
        arrow(panel, (x + 0.9, 0.0), (x + 0.9, low + 1.65), ("one line", "arrays, manifest")[step - 5])
    panel.text(left(5), low + 0.25, "the run directory", fontsize=9.5, color=GREY)

    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
