"""Which channels and which weights a sequence of windows reaches."""

from __future__ import annotations

import math

import torch

from gossamer.submodel.cut import Cut, count_shapes
from gossamer.submodel.layout import Layout


class Coverage:
    """Marks what the windows seen so far held.

    A weight does not vary along dimensions without an axis (kernels), so marks are kept without them and weighted.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        shapes = count_shapes(layout)
        self._held = {
            name: torch.zeros(shape, dtype=torch.bool) for name, shape in zip(layout.names, shapes, strict=True)
        }
        self._counts = dict.fromkeys(self._held, 0)
        self._channels = {axis: torch.zeros(layout.widths[axis], dtype=torch.bool) for axis in layout.cut_axes}
        self._seen: set[tuple[tuple[tuple[int, int], ...], ...]] = set()

    def add(self, cut: Cut) -> None:
        """Mark what `cut` holds."""
        key = tuple(window.segments for window in cut.windows.values())
        if key in self._seen:
            return
        self._seen.add(key)
        for axis, window in cut.windows.items():
            for start, stop in window.segments:
                self._channels[axis][start:stop] = True
        for piece in cut.count_pieces:
            held = self._held[piece.name]
            regions = [piece.mesh] if piece.mesh is not None else [where for where, _ in piece.rectangles]
            for region in regions:
                part = held[region]
                self._counts[piece.name] += part.numel() - int(torch.count_nonzero(part))
                held[region] = True

    @property
    def channels(self) -> float:
        """Share of the channels of all axes, each axis counted alike, that some window held."""
        shares = [float(mask.double().mean()) for mask in self._channels.values()]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def weights(self) -> float:
        """Share of all parameters that some window held."""
        held = 0
        for name, shape in zip(self._layout.names, self._layout.shapes, strict=True):
            held += self._counts[name] * (math.prod(shape) // self._held[name].numel())
        return held / self._layout.num_parameters

    def mask(self, name: str) -> torch.Tensor:
        """Return a copy of the marks of parameter `name`, bool, size 1 along dimensions without an axis."""
        return self._held[name].clone()
