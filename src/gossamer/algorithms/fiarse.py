"""FIARSE: every client trains the largest weights of the whole model, chosen one by one (full-size masks)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from gossamer.aggregate.codecs import Bitmap
from gossamer.algorithms.base import Arrays, Uplink
from gossamer.algorithms.federated import FedAvg
from gossamer.submodel import Layout


class Share(NamedTuple):
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

    [M] Masks are chosen layer by layer, as in one of the two variants of the authors' public code, and k is the number
    of weights that the layer's window of that capacity would have, so that as many are trained as by other methods;
    biases and normalisation, which are vectors, are trained whole. [M] Weight decay acts where the mask is 1.
    """

    uplink: Mapping[str, Uplink] = {"x": "mean", "mask": "mean"}
    strategy = "whole"
    capacities = "given"
    default_label_mask = "zero"
    default_scaler: ClassVar[bool] = False
    codecs: ClassVar[Mapping[str, Any]] = {"mask": Bitmap()}

    shares: tuple[Share, ...] = ()  # of the capacity that it is bound to; none: everything is trained

    def of_capacity(self, layout: Layout, capacity: float) -> Self:
        """Return the algorithm as participants of a capacity run it."""
        bound = type(self).__new__(type(self))
        bound.__dict__ |= self.__dict__ | {"shares": shares_of(layout, capacity)}
        return bound

    def thresholds(self, x: Tensor) -> Tensor:
        """Return theta of every number of rows [s, d]: 0 where all of a layer is trained."""
        found = torch.zeros_like(x)
        for start, stop, num_trained in self.shares:
            sizes = x[:, start:stop].abs()
            found[:, start:stop] = sizes.kthvalue(stop - start - num_trained + 1, dim=1, keepdim=True).values
        return found

    def evaluated(self, x: Tensor) -> Tensor:
        """Return what a row [d] is as the model of the capacity: 0 where it is masked."""
        return torch.where(x.abs() >= self.thresholds(x[None])[0], x, 0.0)

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        """Return a copy of the model to train, and its thresholds; stacked clients may share one row."""
        x = state["x"]
        thresholds = self.thresholds(x[:1]).expand_as(x) if x.stride(0) == 0 else self.thresholds(x)
        return super().begin(state, client_state) | {"threshold": thresholds}

    def forward(self, x: Tensor, carry: Mapping[str, Tensor]) -> Tensor:
        """Return what the loss is given instead of x, with the biased gradient of the class; any one shape."""
        found: Tensor = _Gate.apply(x, carry["threshold"])  # type: ignore[no-untyped-call]
        return found

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        """One step of SGD; weight decay leaves masked weights alone."""
        if self.weight_decay:
            kept = carry["x"].abs() >= carry["threshold"]
            grad = grad.add(carry["x"] * kept, alpha=self.weight_decay)
        if self.momentum:
            grad = carry["momentum"].mul_(self.momentum).add_(grad)
        carry["x"].sub_(grad, alpha=lr)
        return carry

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return by how much each model changed, and 1 where the client got the weight, otherwise 0."""
        mask = (state["x"].abs() >= carry["threshold"]).to(carry["x"])
        return {"x": carry["x"].sub_(state["x"]), "mask": mask}, {}

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Move every weight by the mean change of those that got it, times ``server_lr``."""
        reached = inbox["mask"] > 0
        change = torch.where(reached, inbox["x"] / inbox["mask"], 0.0)
        held = reached if inbox["held"] is None else reached & inbox["held"]
        return super().update(state, {"x": change, "held": held}, num_clients)


class _Gate(torch.autograd.Function):
    """``w * [|w| >= theta]``, with the gradient that FIARSE steps along."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        """Mask."""
        ctx.save_for_backward(weight, threshold)
        return torch.where(weight.abs() >= threshold, weight, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the biased gradient; where theta is 0 it is the gradient itself."""
        weight, threshold = ctx.saved_tensors
        size = weight.abs()
        gain = (2 * threshold * size).div_((size + threshold).square_().clamp_min_(torch.finfo(size.dtype).tiny))
        return torch.where(size >= threshold, grads[0] * gain.add_(1.0), 0.0), None


def shares_of(layout: Layout, capacity: float) -> tuple[Share, ...]:
    """Return how much of each weight matrix or convolution is trained, of those that are not trained whole."""
    found = []
    for start, shape, small in zip(layout.offsets, layout.shapes, layout.cut(capacity).shapes, strict=True):
        size, num_trained = math.prod(shape), math.prod(small)
        if len(shape) > 1 and num_trained < size:
            found.append(Share(start, start + size, num_trained))
    return tuple(found)
