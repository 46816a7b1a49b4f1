"""Steps by gradients that are left in two factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from federation import SINGLY, configure, modes
from gossamer import run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.local_steps import LocalSteps
from gossamer.engines.training.batches import Part
from gossamer.engines.training.steps import add_product_, differentiate, gradients
from gossamer.engines.training.trainer import may_leave_products
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.leaves import Leaves


@given(
    st.integers(2, 9), st.integers(1, 20), st.integers(1, 40), st.integers(1, 90), st.integers(1, 9), st.integers(0, 99)
)
def test_a_product_of_few_rows_has_the_bits_of_many(
    num_rows: int, batch: int, outputs: int, inputs: int, active: int, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    shapes = (outputs, batch), (batch, inputs)
    rows = torch.randn(num_rows, outputs * inputs + 19, generator=source)
    left, right = (torch.randn(num_rows, *shape, generator=source) for shape in shapes)

    def weight_of(rows: torch.Tensor) -> torch.Tensor:  # as it lies in a flat row, between others
        return rows[:, 16 : 16 + outputs * inputs].view(-1, outputs, inputs)

    active = min(active, num_rows)
    kept = max(active, 2)
    few, many = rows.clone(), rows.clone()
    add_product_(weight_of(few), left[:kept], right[:kept], -0.1, active)
    add_product_(weight_of(many), left, right, -0.1, num_rows)
    assert torch.equal(few[:active], many[:active])
    assert torch.equal(few[active:], rows[active:])
    assert torch.allclose(weight_of(many), weight_of(rows) - 0.1 * left @ right, atol=1e-5)


def test_a_weight_may_be_both_left_in_products_and_in_the_graph() -> None:
    """Twice in products and once in the graph: all of it is its gradient; what nothing depends on has none."""
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
    assert "unused" not in grads

    again = weight.detach().clone().requires_grad_()
    usual = (x @ again.t()).relu().sum() + ((x @ again.t()) ** 2).sum() + again.square().sum()
    assert torch.allclose(found, torch.autograd.grad(usual, again)[0], rtol=1e-5, atol=1e-5)
    assert leaves.take_products() == []


def test_a_parameter_that_only_one_part_of_a_batch_uses() -> None:
    """Its gradient is that of the part, whether it comes first or last."""
    both, one = torch.randn(3), torch.randn(3)
    x = torch.randn(4, 3)

    def loss(batch: Mapping[str, Any]) -> Tensor:
        value = (batch["x"] * params["both"]).sum()
        return value + 5 * params["one"].sum() if batch["uses_one"] else value

    for uses in ([True, False], [False, True]):
        params = {name: value.clone().requires_grad_() for name, value in {"both": both, "one": one}.items()}
        parts = [Part({"x": x[2 * n : 2 * n + 2], "uses_one": uses[n]}, torch.tensor(0.5)) for n in range(2)]
        value, grads, _ = differentiate(loss, parts, Leaves(params), LocalSteps(), "cpu")
        assert torch.allclose(value, 0.5 * ((x * both).sum() + 5 * one.sum()))
        assert torch.allclose(grads["both"], 0.5 * x.sum(0))
        assert torch.equal(grads["one"], torch.full((3,), 2.5))


class OwnLoss(ImageClassification):
    """A loss that asks for gradients itself: sharpness-aware minimisation in one step of ascent."""

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Return the loss a little uphill."""
        with torch.no_grad():
            confident = self.logits(params, batch).softmax(-1)
        assert confident.isfinite().all()
        found = torch.autograd.grad(super().loss(params, batch), list(params.values()))
        uphill = {name: value + 0.01 * grad for (name, value), grad in zip(params.items(), found, strict=True)}
        return super().loss(uphill, batch)


@pytest.mark.parametrize("model", ["softmax", {"name": "mlp", "hidden": [8]}, {"name": "cnn", "width": 0.1}])
def test_losses_of_the_users_own_get_plain_parameters(tmp_path: Path, model: Any) -> None:
    """They may ask for gradients by all parameters; those of a class here leave products, but not without a graph."""
    usual = build(parse(configure({"workload.model": model})))
    assert may_leave_products(usual.task)
    config = configure({"workload.model": model, "workload.name": f"{__name__}:OwnLoss"} | modes(**SINGLY))
    assert not may_leave_products(build(parse(config)).task)
    uphill = run(config, out=tmp_path / "uphill").params
    assert all(value.isfinite().all() for value in uphill.values())

    views = usual.workload.layout.views(usual.workload.init(0))
    samples, constants = usual.workload.batch(np.zeros(1, dtype=np.int64), np.zeros((1, 1), dtype=np.int64))
    batch = {key: value[0] for key, value in (samples | constants).items()}
    leaves = Leaves({name: value.clone().requires_grad_() for name, value in views.items()}, factored=True)
    with torch.no_grad():
        assert torch.equal(usual.workload.logits(leaves, batch), usual.workload.logits(views, batch))
    assert leaves.take_products() == []
