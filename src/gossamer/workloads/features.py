"""Layers of named parameters, and scale-and-shift features, by which the outputs y of frozen ones are adapted.

An output becomes ``gamma y + beta`` (SSF; Lian et al., arXiv 2210.08823).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gossamer.workloads import stacked

Features = Mapping[str, tuple[Tensor, Tensor]]


class Modulated(dict[str, Tensor]):
    """A model's parameters, and what becomes of the outputs of its layers.

    Attributes:
        features: ``{layer: (gamma, beta)}`` of shapes that broadcast to the layer's output.
    """

    def __init__(self, params: Mapping[str, Tensor], features: Features) -> None:
        """Take the parameters and the features."""
        super().__init__(params)
        self.features = features


def modulated(params: Mapping[str, Tensor], layer: str, y: Tensor) -> Tensor:
    """Return the output y of a layer, scaled and shifted where its parameters are `Modulated`."""
    found = params.features.get(layer) if isinstance(params, Modulated) else None
    return y if found is None else y * found[0] + found[1]


def linear(params: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    """Apply the linear layer of a name to the last dimension."""
    return modulated(params, layer, stacked.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"]))


def normalised(params: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    """Apply the layer normalisation of a name to the last dimension."""
    return modulated(params, layer, stacked.layer_norm(x, params[f"{layer}.weight"], params[f"{layer}.bias"]))
