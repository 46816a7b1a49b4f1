"""Low-rank factors of clients of unequal rank, averaged by a server that sees every client's: HetLoRA and FlexLoRA.

Both are for `gossamer.workloads.parts`: the rank is the axis that capacities cut, and a client holds the first rows of
A and columns of B, as many as its capacity leaves. Averaged over the holders of each coordinate instead, which needs no
rows, they are under ``algorithm: heterofl``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.federated import FedAvg
from gossamer.errors import ConfigError
from gossamer.submodel import Layout

NEGLIGIBLE = 1e-6  # relative; products of single precision have no singular values below


class Factors(NamedTuple):
    """Where the factors of one weight lie in a row: A [rank, i] and B [o, rank]."""

    a: slice
    b: slice
    rank: int

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return A [p, rank, i] and B [p, o, rank] of rows [p, d]."""
        return rows[:, self.a].reshape(len(rows), self.rank, -1), rows[:, self.b].reshape(len(rows), -1, self.rank)


class HetLoRA(FedAvg):
    """HetLoRA (Cho et al., arXiv 2401.06432): truncation, zero-padding, and the mean weighted by sparsity.

    The server pads every client's factors with zeros to the full rank and takes sum_k p_k A_k and sum_k p_k B_k over
    *all* participants, so rows and columns that few hold shrink from round to round. p_k is proportional to the
    Frobenius norm of B_k A_k, of each weight that has factors by itself, or, with ``weights="samples"``, to the
    client's weight (plain zero-padding). [M] Nobody's coordinates keep their values, because zeros in both factors
    would have no gradient ever after; where all products are 0, and for whatever else is trained, p_k follows the
    clients' weights. The paper's self-pruning of ranks is left out: a client's rank is that of its capacity.
    """

    class Options(BaseAlgorithm.Options):
        """Options of HetLoRA.

        Attributes:
            weights: what the mean of factors is weighted by.
        """

        weights: Literal["norm", "samples"] = "norm"

    traits = replace(
        FedAvg.traits,
        uplink={"x": "rows"},
        strategy="static",
        capacities="given",
        no_offsets="clients hold the first rows and columns of the factors",
        no_compression="clients send their factors, and not changes of them that could be averaged",
    )
    _factors: tuple[Factors, ...] = ()

    def of_model(self, layout: Layout) -> HetLoRA:
        """Return the algorithm for the low-rank factors of a layout.

        Raises:
            ConfigError: it has none.
        """
        bound = copy.copy(self)
        bound._factors = factors_of(layout)
        if not bound._factors:
            raise ConfigError(
                f"{type(self).__name__} averages low-rank factors, and the model has none: give workload.lora"
            )
        return bound

    def init(self, x: Tensor) -> Arrays:
        """Return the model."""
        return {"x": x}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return each trained model; moments that the client keeps."""
        return {"x": carry["x"]}, self.private(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the mean of the clients' models, weighted as the class says."""
        rows, weights = inbox["x"], shares(inbox["weights"])
        mean = weights @ rows
        if self.options.weights == "norm":
            for factors in self._factors:
                norms = product_norms(*factors.of(rows))
                if norms.any():
                    for part in (factors.a, factors.b):
                        mean[part] = shares(norms) @ rows[:, part]
        return where_held(inbox["held"], {"x": mean[None]}, state)


class FlexLoRA(HetLoRA):
    """FlexLoRA (Bai et al., arXiv 2402.11505): the mean of the products, divided anew by its singular values.

    The server takes W = sum_k p_k B_k A_k of each weight that has factors, p_k by the clients' weights, and W = U S V^T
    . The new B is U S and the new A is V^T, of as many columns and rows as the full rank; since these are ordered by S,
    a client that gets the first r has the best factors of its rank (Eckart and Young). Products of small clients lack
    what they did not get, so that shrinks, too. What is trained besides is averaged. [M] Signs are such that the
    largest entry of a row of A is positive; where W has a smaller rank, B is 0 and A keeps its rows.
    """

    class Options(BaseAlgorithm.Options):
        """No options."""

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the factors of the mean product, and the mean of the rest."""
        rows, weights = inbox["x"], shares(inbox["weights"])
        new = where_held(inbox["held"], {"x": (weights @ rows)[None]}, state)["x"]
        for factors in self._factors:
            old, (a, b) = factors.of(state["x"])[0][0], factors.of(rows)
            left = (b * weights[:, None, None]).movedim(0, 1).flatten(1)
            a, b = divided(left, a.flatten(0, 1), old)
            new[0, factors.a], new[0, factors.b] = a.flatten(), b.flatten()
        return {"x": new}


def factors_of(layout: Layout) -> tuple[Factors, ...]:
    """Return where the low-rank factors of a layout lie."""
    where = {
        name: (slice(start, start + math.prod(shape)), shape)
        for name, start, shape in zip(layout.names, layout.offsets, layout.shapes, strict=True)
    }
    layers = [name.removesuffix(".lora_A") for name in layout.names if name.endswith(".lora_A")]
    return tuple(
        Factors(where[f"{layer}.lora_A"][0], where[f"{layer}.lora_B"][0], where[f"{layer}.lora_A"][1][0])
        for layer in layers
    )


def shares(weights: Tensor) -> Tensor:
    """Return weights divided by their sum."""
    return weights / weights.sum()


def product_norms(a: Tensor, b: Tensor) -> Tensor:
    """Return ``||B A||_F`` of factors A [p, r, i] and B [p, o, r], without making the products: the trace of Grams."""
    return ((b.mT @ b) * (a @ a.mT)).sum((1, 2)).clamp_min(0).sqrt()


def divided(left: Tensor, right: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [rank, i] and B [o, rank], of which B A is the best approximation of a product of that rank.

    Args:
        left, right: float32 [o, k] and [k, i], the product.
        old: A of before [rank, i], whose rows stay where the product has a smaller rank.
    """
    rank, (left, right) = len(old), (left.double(), right.double())
    if len(right) < min(len(left), right.shape[1]):  # then a small matrix has the same singular values
        (outer, upper), (inner, lower) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        u, v = outer @ u, v @ inner.mT
    else:
        u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    is_there = s > NEGLIGIBLE * s[0]
    a = torch.where(is_there[:, None], v * signs, old.double())
    b = torch.where(is_there, u * signs[:, 0] * s, 0.0)
    return a.to(old.dtype), b.to(old.dtype)
