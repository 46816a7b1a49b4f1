"""Gradients, and local steps along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.algorithms.carries import Views
from gossamer.algorithms.optimizers import NUM_STEPS
from gossamer.engines.local_steps import LocalSteps
from gossamer.engines.task import Variant
from gossamer.engines.training.batches import Part
from gossamer.engines.training.rows import equal_runs
from gossamer.workloads.leaves import Leaves

Products = list[tuple[str, Tensor, Tensor]]


class Stretch(NamedTuple):
    """Rows, next to each other, that take the same number of steps, where that changes their learning rate.

    `rows` is None where they are all rows that gradients have.
    """

    rows: slice | None
    num_steps: int
    views: Views

    @classmethod
    def of(cls, views: Views, steps: NDArray[np.int32], *, by_length: bool) -> list[Self]:
        """Return the stretches of the first rows, which take `steps` steps, of views of all.

        Args:
            by_length: whether the number of steps changes something; otherwise all rows are one stretch.
        """
        runs = equal_runs(steps) if by_length else [(0, len(steps))]
        is_all = len(runs) == 1 and len(steps) > 1  # of a single row there are two gradients, see `_train_stacked`
        return [
            cls(
                None if is_all else slice(low, high),
                int(steps[low]),
                {parameter: {name: view[low:high] for name, view in own.items()} for parameter, own in views.items()},
            )
            for low, high in runs
        ]


def differentiate(
    loss: Callable[[dict[str, Any]], Tensor], parts: Sequence[Part], leaves: Leaves, local: LocalSteps, device: str
) -> tuple[Tensor, Arrays, Products]:
    """Differentiate a loss, part by part of a batch.

    Args:
        loss: callback that returns the loss of a part: a scalar, or one of each row.
        device: device of the leaves.

    Returns:
        value of the loss; gradients and products, see `gradients`.
    """
    scale = local.loss_scale
    value, total, products = _differentiate_part(loss, parts[0], leaves, local, device)
    for part in parts[1:]:
        more, grads, products = _differentiate_part(loss, part, leaves, local, device)
        value = value + more
        total |= {name: total[name] + grad if name in total else grad for name, grad in grads.items()}
    if scale != 1:
        total = {name: grad / scale for name, grad in total.items()}
    return value, total, products


def _differentiate_part(
    loss: Callable[[dict[str, Any]], Tensor], part: Part, leaves: Leaves, local: LocalSteps, device: str
) -> tuple[Tensor, Arrays, Products]:
    """Return what `differentiate` does, of one part; gradients are multiplied by `local.loss_scale`."""
    if local.is_mixed:
        with local.autocast(device):
            value = loss(part.batch)
    else:
        value = loss(part.batch)
    if value.dtype.itemsize < 4:  # sums of which would be coarse
        value = value.float()
    if part.share is not None:
        value = value * (part.share[: len(value)] if value.dim() else part.share).to(value)
    summed = value.sum() if value.dim() else value
    grads, products = gradients(summed * local.loss_scale if local.loss_scale != 1 else summed, leaves)
    return value.detach(), grads, products


def take_step(variant: Variant, stretches: Sequence[Stretch], grads: Arrays, lr: float, step: int) -> None:
    """Take a local step, counted from 0, along gradients [s, *shape] of the rows of all stretches, or more rows."""
    schedule, steppers = variant.local_steps.schedule, variant.steppers
    for rows, num_steps, views in stretches:
        rate = lr if schedule.is_flat else lr * schedule.factor(step, num_steps)
        own = next(iter(views.values()))
        if NUM_STEPS in own:  # one array for all parameters
            own[NUM_STEPS].add_(1)
        for name, grad in grads.items():
            if variant.takes_turns and not variant.is_trained(name, step, num_steps):
                continue
            algorithm, factor = steppers[name]
            if not factor:
                continue
            step_in_place(algorithm, views[name], grad if rows is None else grad[rows], rate * factor)


def gradients(loss: Tensor, leaves: Leaves) -> tuple[Arrays, Products]:
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
    elif active is None or active == len(left):
        weight[: len(left)].baddbmm_(left, right, alpha=alpha)
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
