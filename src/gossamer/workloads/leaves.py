"""The parameters that are being trained, and gradients of linear layers that are left in two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Product(NamedTuple):
    """The gradient of a linear layer by its weight, in two factors: that by its output, and its input.

    Attributes:
        weight: name of the parameter, [o, i] or [s, o, i].
        output: where the gradient by the output arrives.
        input: [b, i] or [s, b, i].
        is_transposed: whether the output is [..., b, o], rather than [..., o, b].
    """

    weight: str
    output: GradientEdge
    input: Tensor
    is_transposed: bool


class Leaves(dict[str, Tensor]):
    """The parameters that are being trained; where they are `factored`, the gradient of a weight need not be made.

    A layer may then keep a weight out of the graph and leave a `Product` instead, which is added to whatever else that
    weight's gradient is.
    """

    def __init__(self, params: Mapping[str, Tensor], *, factored: bool = False) -> None:
        """Take the parameters, each of which requires a gradient."""
        super().__init__(params)
        self.factored = factored
        self._products: list[Product] = []

    @property
    def params(self) -> dict[str, Tensor]:
        """What a loss is given: these where it may leave products, otherwise a plain dict."""
        return self if self.factored else dict(self)

    def leave_product(self, weight: str, output: Tensor, input: Tensor, *, is_transposed: bool) -> None:
        """Note what a layer made of its input, before anything overwrites it; `output` is no view. See `Product`."""
        self._products.append(Product(weight, get_gradient_edge(output), input.detach(), is_transposed))

    def take_products(self) -> list[Product]:
        """Return the products left since the last call."""
        taken, self._products = self._products, []
        return taken
