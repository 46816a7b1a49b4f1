"""The contract of an optimizer of local steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.algorithms.optimizers import NUM_STEPS, Optimizer
from gossamer.config.optimizers import require_optimizer
from gossamer.testing.requirements import require, require_arrays, require_declared

NUM_ROWS, WIDTH, LR = 3, 35, 0.1
SHAPES = ((WIDTH,), (5, 7))


def check_optimizer(optimizer: Optimizer) -> None:
    """Check an optimizer against `gossamer.algorithms.optimizers.Optimizer`.

    Args:
        optimizer: the optimizer, made with any options.

    Raises:
        ContractError: it breaks the contract.

    Example:
        >>> from gossamer.algorithms.optimizers import AdamW
        >>> check_optimizer(AdamW({}))
        >>> class Meddling(AdamW):
        ...     def step(self, x, grad, moments, lr):
        ...         super().step(x, grad.mul_(2), moments, lr)
        >>> check_optimizer(Meddling({}))
        Traceback (most recent call last):
        gossamer.errors.ContractError: step must not change the gradient: work on a copy
    """
    require_declared(require_optimizer, optimizer)
    x = _random(0)
    moments = optimizer.init(x.clone())
    counted = {NUM_STEPS} if optimizer.traits.counts_steps else set()
    names = {*optimizer.traits.moments, *counted}
    require(
        set(moments) == names,
        f"init has the arrays {sorted(moments)}, declared are {sorted(names)}: return those, or correct the traits",
    )
    for some, width in ((counted, 1), (names - counted, WIDTH)):
        require_arrays({name: moments[name] for name in some}, some, (NUM_ROWS, width), "init", torch.float32)
    for shape in SHAPES:
        _check_steps(optimizer.of_parameter("weight", shape), x, moments, shape)


def _random(seed: int) -> Tensor:
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _check_steps(optimizer: Optimizer, x: Tensor, moments: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    """Two steps of all rows, and of each alone, must give the same bits."""
    together = _stepped(optimizer, x, moments, slice(None), shape)
    for row in range(NUM_ROWS):
        rows = slice(row, row + 1)
        for name, alone in _stepped(optimizer, x, moments, rows, shape).items():
            require(
                torch.equal(together[name][rows], alone),
                f"step is not row-wise: {name!r} of row {row} differs when it is given alone: compute each row from"
                " that row only",
            )
    require(not torch.equal(together["x"], x), "step must change x in place: it is as it was after two steps")


def _stepped(
    optimizer: Optimizer, x: Tensor, moments: Mapping[str, Tensor], rows: slice, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Return some rows of x and of the moments after two steps."""
    flat = {name: value[rows].clone() for name, value in {**moments, "x": x}.items()}
    views = {name: value if value.shape[1] == 1 else value.view(-1, *shape) for name, value in flat.items()}
    own = views.pop("x")
    for number in (1, 2):
        grad = _random(number)[rows].view(-1, *shape)
        given = grad.clone()
        if NUM_STEPS in views:
            views[NUM_STEPS].add_(1)
        optimizer.step(own, given, views, LR)
        require(torch.equal(given, grad), "step must not change the gradient: work on a copy")
    return flat
