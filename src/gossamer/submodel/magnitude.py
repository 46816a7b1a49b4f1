"""Windows that follow the model: the channels whose weights are largest.

FedMP (Jiang et al., ICDE 2022) prunes for every client the filters with the smallest sums of absolute weights, as its
server ranks them at the start of a round. Channels are taken whole and a group of tied axes together, so a client
really stores, computes and sends its share only. What the paper does about the pruned rest (a residual model a client)
is not part of a strategy: here the selective mean leaves what nobody held as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.submodel.layout import Dim, Layout
from gossamer.submodel.strategies import Strategy, static


def by_magnitude(layout: Layout, x: Tensor) -> Mapping[str, Tensor]:
    """Rank channels by the mean absolute value of the weights that produce them; among equals the first one wins.

    Args:
        x: the flat model, float32 [d].

    Returns:
        ``{axis: int64 [width]}``, the largest first.
    """
    scores = {axis: torch.zeros(layout.widths[axis], dtype=torch.float64) for axis in layout.cut_axes}
    views = layout.views(x)
    for name, dims in zip(layout.names, layout.axes, strict=True):
        if len(dims) > 1 and dims[0].axis in scores:  # a weight's first dimension is what it produces
            scores[dims[0].axis] += _mean_along(views[name], dims[0])
    return {axis: torch.argsort(score, descending=True, stable=True) for axis, score in scores.items()}


def _mean_along(weight: Tensor, dim: Dim) -> Tensor:
    """Return the mean absolute weight of each channel along the first dimension, float64 [width]."""
    rows = weight.abs().flatten(1).mean(1, dtype=torch.float64)
    return rows.view(dim.outer, -1, dim.inner).mean((0, 2))


# Without a model, the first channels.
magnitude = Strategy(
    static.choose,
    shared=True,
    rank=by_magnitude,
    unused=("stride", "offsets"),
    about="FedMP (Jiang et al., ICDE 2022): the channels with the largest weights at the start of a round.",
)
