"""Gradients, and local steps along them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.workloads.base import Leaves


def gradients(loss: Tensor, leaves: Leaves) -> tuple[Arrays, list[tuple[str, Tensor, Tensor]]]:
    """Differentiate `loss` by `leaves`.

    Returns:
        gradients, none of a leaf on which the loss does not depend, as in PyTorch, nor of one that left all of it in
        products; (weight, left [..., o, b], right [..., b, i]) of those.
    """
    products = leaves.take_products()
    sought: list[Any] = [*leaves.values(), *(product.output for product in products)]
    found = torch.autograd.grad(loss, sought, allow_unused=True)
    grads = {name: grad for name, grad in zip(leaves, found[: len(leaves)], strict=True) if grad is not None}
    factors = [
        (product.weight, grad.mT if product.is_transposed else grad, product.input)
        for product, grad in zip(products, found[len(leaves) :], strict=True)
        if grad is not None
    ]
    return grads, factors


def add_product_(weight: Tensor, left: Tensor, right: Tensor, alpha: float, active: int | None = None) -> None:
    """Add ``alpha * left @ right`` to a weight [o, i], or to the first `active` of [s, o, i]; then s >= 2 factors."""
    if weight.dim() == 2:
        weight.addmm_(left, right, alpha=alpha)
    else:  # in place whoever is active, because a product of one row, or to other memory, may round differently
        idle = weight[active : len(left)].clone()
        weight[: len(left)].baddbmm_(left, right, alpha=alpha)
        weight[active : len(left)] = idle


def step_in_place(algorithm: Algorithm, carry: Arrays, grad: Tensor, lr: float) -> None:
    """Take one step on views; what the algorithm returns as new tensors is copied back."""
    stepped = algorithm.step(carry, grad, lr)
    if stepped is not carry:
        for name, value in stepped.items():
            if value is not carry[name]:
                carry[name].copy_(value)


def clip(grads: Arrays, clip_norm: float) -> Arrays:
    """Clip one gradient, spread over tensors, to a Euclidean norm of at most `clip_norm`."""
    spread = list(grads.values())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(spread)))
    factor = (clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
    return dict(zip(grads, torch._foreach_mul(spread, factor), strict=True))


def clip_rows(grads: Arrays, clip_norm: float) -> Arrays:
    """Clip each client's gradient, spread over tensors [s, ...], to a Euclidean norm of at most `clip_norm`."""
    squares = torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0)
    factor = (clip_norm / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
    return {name: grad * factor.view(-1, *(1,) * (grad.dim() - 1)) for name, grad in grads.items()}
