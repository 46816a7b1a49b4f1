"""Sub-models of a dictionary of parameters, for use on their own (the engines work on flat rows, see `cut.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.submodel.cut import Cut, Cutter
from gossamer.submodel.layout import Axes, Layout
from gossamer.submodel.strategies import find_strategy
from gossamer.submodel.windows import Window, check_capacity


@dataclass(frozen=True)
class SubModel:
    """Parameters that one client holds, and where they lie in the whole model.

    Attributes:
        params: ``{name: tensor}``, copies of the windows of the whole model's tensors.
        windows: ``{axis: window}`` of every axis that a capacity cuts.
        capacity: the share of each width.
    """

    params: dict[str, Tensor]
    windows: dict[str, Window]
    capacity: float


def layout_of(params: Mapping[str, Tensor], axes: Axes) -> Layout:
    """Return the flat layout of a dictionary of tensors.

    Raises:
        ConfigError: shapes and axes do not fit, or a parameter is not float32.
    """
    for name, tensor in params.items():
        if tensor.dtype != torch.float32:
            raise ConfigError(f"parameter {name!r} is {tensor.dtype}: sub-models are cut from float32 parameters")
    return Layout.of({name: tuple(tensor.shape) for name, tensor in params.items()}, axes)


@torch.no_grad()
def extract(
    params: Mapping[str, Tensor],
    axes: Axes,
    capacity: float,
    round: int,
    strategy: str = "rolling",
    seed: int = 0,
    client: int = 0,
    stride: int = 1,
) -> SubModel:
    """Cut a sub-model out of `params`.

    Args:
        params: ``{name: float32 tensor}``; a strategy that ranks channels does so by them.
        axes: ``{name: (axis, ...)}``, one axis name, `Dim` or None per dimension.
        capacity: share of each width, in (0, 1].
        round, strategy, seed, client, stride: see `window`; every axis is its own width group.

    Raises:
        ConfigError: a capacity outside (0, 1], an unknown strategy, axes that do not fit the shapes.
    """
    check_capacity(capacity)
    layout = layout_of(params, axes)
    cutter = Cutter(layout, find_strategy(strategy), stride, seed)
    order = cutter.order(layout.flatten(params)) if cutter.strategy.rank is not None else None
    cut = cutter.cut(capacity, round, client, order)
    held = {name: torch.empty(shape) for name, shape in zip(cut.sub.names, cut.sub.shapes, strict=True)}
    for piece in cut.pieces:
        piece.read(params[piece.name], held[piece.name])
    return SubModel(held, dict(cut.windows), capacity)


def cut_of(layout: Layout, windows: Mapping[str, Window]) -> Cut:
    """Return the `Cut` that `windows` make of `layout`."""
    return Cut(layout, layout.windowed(windows), windows)
