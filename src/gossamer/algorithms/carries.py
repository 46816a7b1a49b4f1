"""What local steps work on, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.submodel import Layout

Views = dict[str, Arrays]  # {parameter: {name: [s, *shape], or [s, 1] of scalars}}


def carry_views(layout: Layout, carry: Mapping[str, Tensor]) -> Views:
    """Return views of what local steps work on, [s, d] or [s, 1] each, by parameter."""
    views = {
        name: dict.fromkeys(layout.names, value) if value.shape[1] == 1 else layout.views(value)
        for name, value in carry.items()
    }
    return {parameter: {name: view[parameter] for name, view in views.items()} for parameter in layout.names}


def given_to_loss(algorithm: Algorithm, x: Mapping[str, Tensor], carries: Mapping[str, Arrays]) -> Mapping[str, Tensor]:
    """Return the parameters that a loss is given: x, unless the algorithm puts something in their place.

    Args:
        x: ``{parameter: tensor}``.
        carries: ``{parameter: {name: tensor}}``, what local steps work on.
    """
    if not algorithm.traits.transforms_parameters:
        return x
    return {name: algorithm.forward(value, carries[name]) for name, value in x.items()}
