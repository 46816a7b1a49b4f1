"""Copying between a full model's flat row and a sub-model's, by slices where windows are slices.

A rolling or static window is at most two segments an axis, so a parameter is a handful of rectangles and a copy
runs at memory speed; windows of many segments (random ones) go through index tensors instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ConfigError, nearest
from gossamer.submodel.layout import Dim, Layout
from gossamer.submodel.strategies import Strategy
from gossamer.submodel.windows import Window, window_length

MAX_RECTANGLES = 16

Segments = tuple[tuple[int, int], ...]
Slices = tuple[slice, ...]
Modules = frozenset[str] | None
Rectangle = tuple[Slices, Slices]  # where in the full parameter, where in the sub-model's


def dim_segments(dim: Dim, size: int, windows: Mapping[str, Window]) -> Segments:
    """Return the ``[start, stop)`` segments of one parameter dimension of `size` that `windows` select."""
    if not dim.cuttable or dim.axis is None:
        return ((0, size),)
    window = windows[dim.axis]
    if window.is_full:
        return ((0, size),)
    step = window.width * dim.inner
    return tuple(
        (block * step + start * dim.inner, block * step + stop * dim.inner)
        for block in range(dim.outer)
        for start, stop in window.segments
    )


def _rectangles(segments: list[Segments]) -> list[Rectangle]:
    """Pair every rectangle of the full parameter with its place in the sub-model's."""
    per_dim: list[list[tuple[slice, slice]]] = []
    for dim in segments:
        position, pairs = 0, []
        for start, stop in dim:
            pairs.append((slice(start, stop), slice(position, position + stop - start)))
            position += stop - start
        per_dim.append(pairs)
    return [(tuple(g for g, _ in combo), tuple(s for _, s in combo)) for combo in itertools.product(*per_dim)]


@dataclass(frozen=True)
class Piece:
    """Where a sub-model's parameter lies in the full one: rectangles, or an open mesh where these are many."""

    name: str
    rectangles: list[Rectangle]
    mesh: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, name: str, segments: list[Segments]) -> Piece:
        """Build from the segments of every dimension."""
        if np.prod([len(dim) for dim in segments], dtype=np.int64) <= MAX_RECTANGLES:
            return cls(name, _rectangles(segments), None)
        indices = [np.concatenate([np.arange(start, stop) for start, stop in dim]) for dim in segments]
        return cls(name, [], tuple(torch.from_numpy(mesh) for mesh in np.ix_(*indices)))

    def read(self, full: Tensor, sub: Tensor) -> None:
        """Copy the window of `full` into `sub`."""
        if self.mesh is not None:
            sub.copy_(full[self.mesh])
        for where, here in self.rectangles:
            sub[here].copy_(full[where])

    def write(self, full: Tensor, sub: Tensor) -> None:
        """Copy `sub` into the window of `full`."""
        if self.mesh is not None:
            full[self.mesh] = sub
        for where, here in self.rectangles:
            full[where].copy_(sub[here])

    def add(self, full: Tensor, sub: Tensor, weight: float) -> None:
        """Add ``weight * sub`` to the window of `full`."""
        if self.mesh is not None:
            full[self.mesh] += sub * weight
        for where, here in self.rectangles:
            full[where].add_(sub[here], alpha=weight)

    def fill_add(self, full: Tensor, addend: Tensor | float) -> None:
        """Add one number, or a tensor that broadcasts, to the window of `full`."""
        if self.mesh is not None:
            full[self.mesh] += addend
        for where, _ in self.rectangles:
            full[where] += addend


@dataclass(frozen=True)
class Cut:
    """The windows of one sub-model on a full layout, ready to copy in both directions.

    Attributes:
        full: the layout of the whole model.
        sub: the layout of the sub-model, which may lack parameters of the whole one.
        windows: one per cuttable axis.
    """

    full: Layout
    sub: Layout
    windows: Mapping[str, Window]

    @cached_property
    def is_full(self) -> bool:
        """Whether the sub-model is the whole model."""
        return self.sub.names == self.full.names and all(window.is_full for window in self.windows.values())

    @cached_property
    def pieces(self) -> list[Piece]:
        """Where each parameter of the sub-model lies in the full one."""
        return self._pieces(self.full.shapes)

    @cached_property
    def count_pieces(self) -> list[Piece]:
        """`pieces` for holder counts, whose dimensions without an axis (such as kernels) have size 1."""
        return self._pieces(count_shapes(self.full))

    def _pieces(self, shapes: Sequence[tuple[int, ...]]) -> list[Piece]:
        held = frozenset(self.sub.names)
        return [
            Piece.of(name, [dim_segments(dim, size, self.windows) for dim, size in zip(dims, shape, strict=True)])
            for name, shape, dims in zip(self.full.names, shapes, self.full.axes, strict=True)
            if name in held
        ]

    def read(self, x: Tensor, out: Tensor) -> Tensor:
        """Copy the sub-model out of a full row `x` [d] into `out` [d_sub] and return `out`."""
        if self.is_full:
            return out.copy_(x)
        source, target = self.full.views(x), self.sub.views(out)
        for piece in self.pieces:
            piece.read(source[piece.name], target[piece.name])
        return out

    def write(self, target: Tensor, row: Tensor) -> None:
        """Copy `row` [d_sub] into the coordinates of a full row `target` [d] that the sub-model holds."""
        if self.is_full:
            target.copy_(row)
            return
        goal, source = self.full.views(target), self.sub.views(row)
        for piece in self.pieces:
            piece.write(goal[piece.name], source[piece.name])

    def add_(self, target: Tensor, row: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * row`` [d_sub] to the coordinates of a full row `target` [d] that the sub-model holds."""
        if self.is_full:
            target.add_(row, alpha=weight)
            return
        goal, source = self.full.views(target), self.sub.views(row)
        for piece in self.pieces:
            piece.add(goal[piece.name], source[piece.name], weight)


def count_shapes(layout: Layout) -> list[tuple[int, ...]]:
    """Shapes of per-coordinate holder counts; they do not vary along dimensions without an axis, which shrink to 1."""
    return [
        tuple(1 if dim.axis is None else size for dim, size in zip(dims, shape, strict=True))
        for dims, shape in zip(layout.axes, layout.shapes, strict=True)
    ]


class Cutter:
    """Cuts sub-models from one layout with one strategy; the last cuts are remembered."""

    def __init__(
        self,
        layout: Layout,
        strategy: Strategy,
        stride: int,
        seed: int,
        offsets: Mapping[str, int] | None = None,
        *,
        full_size: bool = False,
    ) -> None:
        """Bind a strategy to a layout.

        Args:
            stride: channels by which moving windows move a round.
            seed: seed of random windows.
            offsets: ``{axis: channels}``, additional offset of the windows of an axis; 0 for those left out.
            full_size: whether everybody holds the whole model, whatever the capacity.

        Raises:
            ConfigError: an offset for an axis that the layout does not have.
        """
        self.layout, self.strategy, self.stride, self.seed = layout, strategy, stride, seed
        self.full_size = full_size
        self.offsets = dict.fromkeys(layout.cut_axes, 0) | dict(offsets or {})
        if unknown := [axis for axis in self.offsets if axis not in layout.cut_axes]:
            raise ConfigError(
                f"unknown axis {unknown[0]!r} in submodel.offsets{nearest(unknown[0], layout.cut_axes)}"
                f" (the model's axes: {', '.join(layout.cut_axes)})"
            )
        self._sub_layout = lru_cache(maxsize=256)(self._make_sub_layout)
        self._groups = lru_cache(maxsize=64)(self._make_groups)
        self._shared_cut = lru_cache(maxsize=256)(self._make)

    def sub_layout(self, capacity: float, modules: Modules = None) -> Layout:
        """Return the layout of any sub-model of `capacity`; its shapes do not depend on round or client.

        Args:
            modules: the modules that are held, see `Layout.of_modules`; None: all.
        """
        return self._sub_layout(self._held(capacity), modules)

    def shares_window(self, capacity: float) -> bool:
        """Whether all clients of `capacity` have the same cut in a round."""
        return self.strategy.shared or self._held(capacity) == 1.0

    def cut(
        self,
        capacity: float,
        round: int,
        client: int,
        order: Mapping[str, Tensor] | None = None,
        modules: Modules = None,
    ) -> Cut:
        """Return the cut of `client` in `round`; windows of an axis are the same, whatever modules are held.

        Args:
            order: result of `order` for the model at the start of the round; needed only where the strategy ranks.
            modules: the modules that are held; None: all.
        """
        capacity = self._held(capacity)
        if self.strategy.rank is not None:
            assert order is not None, "this strategy ranks channels, so their order is needed"
            return self._cut_ranked(capacity, order, modules)
        if self.shares_window(capacity):
            return self._shared_cut(capacity, round, 0, modules)
        return self._make(capacity, round, client, modules)

    def order(self, x: Tensor) -> dict[str, Tensor]:
        """Return the order of channels by the model x [d], see `Strategy.rank`; nothing where the strategy has none."""
        return {} if self.strategy.rank is None else dict(self.strategy.rank(self.layout, x))

    def _cut_ranked(self, capacity: float, order: Mapping[str, Tensor], modules: Modules) -> Cut:
        windows = {}
        for axis in self.layout.cut_axes:
            width = self.layout.widths[axis]
            first = order[axis][: window_length(width, capacity)]
            windows[axis] = Window.of_indices(width, np.sort(first.numpy()))
        return Cut(self.layout, self._of_modules(modules).windowed(windows), windows)

    def _of_modules(self, modules: Modules) -> Layout:
        return self.layout if modules is None else self.layout.of_modules(modules)

    def _make_sub_layout(self, capacity: float, modules: Modules) -> Layout:
        return self._of_modules(modules).cut(capacity)

    def _held(self, capacity: float) -> float:
        """Return the share of every axis that participants of a capacity hold."""
        return 1.0 if self.full_size else capacity

    def _make_groups(self, capacity: float) -> Mapping[str, Hashable]:
        if self.strategy.groups is None:
            return {axis: axis for axis in self.layout.cut_axes}
        return self.strategy.groups(self.layout, capacity)

    def _make(self, capacity: float, round: int, client: int, modules: Modules = None) -> Cut:
        windows, groups = {}, self._groups(capacity)
        for axis in self.layout.cut_axes:
            width = self.layout.widths[axis]
            windows[axis] = self.strategy.choose(
                width,
                window_length(width, capacity),
                round=round,
                stride=self.stride,
                offset=self.offsets[axis],
                seed=self.seed,
                client=client,
                group=groups[axis],
            )
        return Cut(self.layout, self._of_modules(modules).windowed(windows), windows)
