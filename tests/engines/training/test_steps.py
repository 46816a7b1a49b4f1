"""Steps by gradients that are left in two factors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engines.training.steps import add_product_, gradients
from gossamer.workloads.base import Leaves


@given(
    st.integers(2, 9), st.integers(1, 20), st.integers(1, 40), st.integers(1, 90), st.integers(1, 9), st.integers(0, 99)
)
def test_a_product_of_few_rows_has_the_bits_of_many(
    num_rows: int, batch: int, outputs: int, inputs: int, active: int, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    weight, left, right = (
        torch.randn(num_rows, *shape, generator=source)
        for shape in ((outputs, inputs), (outputs, batch), (batch, inputs))
    )
    active = min(active, num_rows)
    kept = max(active, 2)
    few, many = weight.clone(), weight.clone()
    add_product_(few, left[:kept], right[:kept], -0.1, active)
    add_product_(many, left, right, -0.1, num_rows)
    assert torch.equal(few[:active], many[:active])
    assert torch.equal(few[active:], weight[active:])
    assert torch.allclose(many, weight - 0.1 * left @ right, atol=1e-5)


def test_a_weight_may_be_both_left_in_products_and_in_the_graph() -> None:
    """Twice in products and once in the graph: all of it is its gradient; what nothing depends on is zero."""
    weight, unused, x = torch.randn(3, 4), torch.randn(2), torch.randn(5, 4)
    leaves = Leaves({name: value.requires_grad_() for name, value in {"w": weight, "unused": unused}.items()})
    bias = torch.zeros(3, requires_grad=True)
    row_major = torch.nn.functional.linear(x, weight.detach(), bias)
    leaves.leave_product("w", row_major, x, is_transposed=True)
    column_major = torch.addmm(bias[:, None], weight.detach(), x.t())
    leaves.leave_product("w", column_major, x, is_transposed=False)
    never_used = torch.nn.functional.linear(x, weight.detach(), bias)
    leaves.leave_product("w", never_used, x, is_transposed=True)
    loss = row_major.relu_().sum() + (column_major**2).sum() + weight.square().sum()
    grads, factors = gradients(loss, leaves)
    found = grads["w"] + sum(left @ right for _, left, right in factors)
    assert len(factors) == 2
    assert torch.equal(grads["unused"], torch.zeros(2))

    again = weight.detach().clone().requires_grad_()
    usual = (x @ again.t()).relu().sum() + ((x @ again.t()) ** 2).sum() + again.square().sum()
    assert torch.allclose(found, torch.autograd.grad(usual, again)[0], rtol=1e-5, atol=1e-5)
    assert leaves.take_products() == []
