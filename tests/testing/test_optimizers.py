"""The contract of optimizers: what ships keeps it, and each way to break it is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.algorithms.optimizers import SGD, Optimizer, OptimizerTraits
from gossamer.errors import ContractError
from gossamer.registry import BUILTIN, resolve
from gossamer.testing import check_optimizer


@pytest.mark.parametrize("name", BUILTIN["optimizer"])
def test_what_ships(name: str) -> None:
    check_optimizer(resolve("optimizer", name)({}))


def test_options() -> None:
    check_optimizer(SGD({"momentum": 0.9, "dampening": 0.5}))


class Undeclared(SGD):
    """Makes a moment that its traits do not name."""

    def init(self, x: Tensor) -> dict[str, Tensor]:
        return {"more": torch.zeros_like(x)}


class Misshapen(SGD):
    """Makes a moment of another shape."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.traits = OptimizerTraits(moments=("mean",))

    def init(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": torch.zeros(len(x), 2)}


class Centred(SGD):
    """Mixes rows."""

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        super().step(x, grad - grad.mean(0), moments, lr)


class Writing(SGD):
    """Writes to the gradient."""

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        super().step(x, grad.mul_(2), moments, lr)


class Lazy(SGD):
    """Does nothing."""

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        pass


class Unwritten(Optimizer):
    """Has no step."""


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Undeclared, "init has the arrays .'more'., declared are"),
        (Misshapen, "init"),
        (Centred, "step is not row-wise: 'x' of row 0 differs"),
        (Writing, "step must not change the gradient: work on a copy"),
        (Lazy, "step must change x in place: it is as it was after two steps"),
    ],
)
def test_broken_optimizers(broken: type[Optimizer], message: str) -> None:
    with pytest.raises(ContractError, match=f"^{message}"):
        check_optimizer(broken({}))


def test_without_a_step() -> None:
    with pytest.raises(TypeError, match="step"):
        Unwritten({})  # type: ignore[abstract]
