"""FIARSE: every client trains the largest weights of the whole model, chosen one by one (full-size masks)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gossamer.aggregate.codecs import Bitmap
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.federated import FedAvg
from gossamer.submodel import Layout


class PartialLayer(NamedTuple):
    """How many numbers of one parameter a client trains: `num_trained` of those in ``[start, stop)`` of a row."""

    start: int
    stop: int
    num_trained: int


class FIARSE(FedAvg):
    """FIARSE (Wu et al., NeurIPS 2024, arXiv 2407.19389): sub-models made of the weights that matter most.

    At the start of a round a client of a capacity gets, of every layer, the k weights that are largest in absolute
    value; theta is the least of them. It computes with ``w * [|w| >= theta]`` and steps along the biased gradient

        g * (1 + 2 theta |w| / (|w| + theta)^2) * [|w| >= theta]

    (threshold-controlled biased gradient descent), g being the gradient by what it computed with. Every weight moves by
    the mean change of the clients that got it; weights that nobody got stay.

    **Full-size.** Single weights are masked, not channels, and dense kernels do not skip zeros: a client holds and
    multiplies the whole model whatever its capacity, and that is what is counted and held against its device's memory.
    Bytes are those of the whole model, too, plus one bit a weight for the mask on the way up.

    [M] Each matrix or convolution has a theta of its own, and k is the number of weights that its window of that
    capacity would have, so that as many are trained as by other methods; vectors, such as biases, are trained whole.
    The authors' public code has one theta for the model, or for each stage of a network, biases included, and another
    k. [M] Weight decay acts where the mask is 1. Weights as large as theta are all trained, so a matrix of zeros is.
    """

    traits = replace(
        FedAvg.traits,
        uplink={"x": "mean", "mask": "mean"},
        codecs={"mask": Bitmap()},
        strategy="static",
        capacities="given",
        default_label_mask="zero",
        default_scaler=False,
        full_size=True,
        no_compression=(
            "a change is divided by the weight of those who trained it in this round, and a codec would send it in"
            " another, or to other weights"
        ),
        transforms_parameters=True,
    )

    layers: tuple[PartialLayer, ...] = ()  # of the capacity that it is bound to; none: everything is trained

    def of_capacity(self, layout: Layout, capacity: float) -> Self:
        """Return the algorithm as participants of a capacity run it."""
        bound = copy.copy(self)
        bound.layers = partial_layers(layout, capacity)
        return bound

    def thresholds(self, x: Tensor) -> Tensor:
        """Return theta of every number of rows [s, d]: 0 where all of a layer is trained."""
        found = torch.zeros_like(x)
        for start, stop, num_trained in self.layers:
            place = stop - start - num_trained  # in ascending order; NumPy finds it several times as fast as torch
            least = np.partition(x[:, start:stop].abs().cpu().numpy(), place, axis=1)[:, place]
            found[:, start:stop] = torch.from_numpy(least).to(found)[:, None]
        return found

    def evaluated(self, x: Tensor) -> Tensor:
        """Return what a row [d] is as the model of the capacity: 0 where it is masked."""
        return masked(x, self.thresholds(x[None])[0]) if self.layers else x

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model to train, and its thresholds; stacked clients may share one row."""
        x = state["x"]
        thresholds = self.thresholds(x[:1]).expand_as(x) if x.stride(0) == 0 else self.thresholds(x)
        return super().begin(state, client_state) | {"threshold": thresholds}

    def forward(self, x: Tensor, carry: Mapping[str, Tensor]) -> Tensor:
        """Return what the loss is given instead of x, with the biased gradient of the class; any one shape."""
        if not self.layers:
            return x
        found: Tensor = _Gate.apply(x, carry["threshold"])  # type: ignore[no-untyped-call]
        return found

    def decayed(self, carry: Mapping[str, Tensor], grad: Tensor) -> Tensor:
        """Return the gradient with weight decay, which leaves masked weights alone."""
        return super().decayed({"x": masked(carry["x"], carry["threshold"])} if self.weight_decay else carry, grad)

    def shrink_(self, carry: Mapping[str, Tensor], share: float) -> None:
        """Take a share of the weights away that are not masked."""
        carry["x"].sub_(masked(carry["x"], carry["threshold"]), alpha=share)

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return by how much each model changed, and 1 where the client got the weight, otherwise 0."""
        mask = (state["x"].abs() >= carry["threshold"]).to(state["x"])
        return {"x": carry["x"].sub_(state["x"]), "mask": mask}, self.private(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move every weight by the mean change of those that got it, times ``server_lr``."""
        reached = inbox["mask"] > 0
        change = torch.where(reached, inbox["x"] / inbox["mask"], 0.0)
        return super().update(state, {"x": change, "held": reached}, num_clients)


class _Gate(torch.autograd.Function):
    """``w * [|w| >= theta]``, with the gradient that FIARSE steps along."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        """Mask."""
        ctx.save_for_backward(weight, threshold)
        return masked(weight, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the biased gradient, g (1 + 2 q (1 - q)) with q = theta / (|w| + theta); 0 / 0 is 0."""
        weight, threshold = ctx.saved_tensors
        size = weight.abs()
        q = threshold / (size + threshold).clamp_min_(torch.finfo(size.dtype).tiny)
        biased = torch.addcmul(grads[0], grads[0], torch.addcmul(q, q, q, value=-1), value=2)
        return torch.where(size < threshold, 0.0, biased), None


def masked(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return a weight with 0 where it is smaller than theta; what is not a number stays so."""
    return torch.where(weight.abs() < threshold, 0.0, weight)


def partial_layers(layout: Layout, capacity: float) -> tuple[PartialLayer, ...]:
    """Return how much of each weight matrix or convolution is trained, of those that are not trained whole."""
    found = []
    for start, shape, small in zip(layout.offsets, layout.shapes, layout.cut(capacity).shapes, strict=True):
        size, num_trained = math.prod(shape), math.prod(small)
        if len(shape) > 1 and num_trained < size:
            found.append(PartialLayer(start, start + size, num_trained))
    return tuple(found)
