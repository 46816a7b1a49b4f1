"""What must hold for every strategy, every model and every round, whatever the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import rng
from gossamer.aggregate import SelectiveMean, label_dims
from gossamer.algorithms.federated import FedAvg
from gossamer.registry import BUILTIN, resolve
from gossamer.submodel import Cutter, Layout
from gossamer.workloads.models import CNN
from gossamer.workloads.resnet import PreActResNet18
from gossamer.workloads.transformer import TextClassifier, Transformer

STRATEGIES = sorted(BUILTIN["strategy"])
CAPACITIES = (0.25, 0.5, 1.0)
ROUNDS = (0, 1, 2, 7, 31, 100)
NUM_LABELS = 10
SMALL: dict[str, Any] = {"stream": 16, "num_heads": 4, "hidden": 24, "num_blocks": 2}


def models() -> dict[str, tuple[Any, Tensor]]:
    """Return small models and inputs for them."""
    source = torch.Generator().manual_seed(0)
    characters = torch.randint(NUM_LABELS, (4, 6), generator=source)
    return {
        "cnn": (CNN((1, 28, 28), NUM_LABELS, width=0.25), torch.rand(4, 1, 28, 28, generator=source)),
        "resnet": (PreActResNet18((3, 8, 8), NUM_LABELS, width=0.125), torch.rand(4, 3, 8, 8, generator=source)),
        "transformer by heads": (Transformer(6, NUM_LABELS, **SMALL), characters),
        "transformer inside heads": (Transformer(6, NUM_LABELS, cut="head-dim", **SMALL), characters),
        "transformer with its stream": (Transformer(6, NUM_LABELS, cut_stream=True, **SMALL), characters),
        "classifier of texts": (TextClassifier((6,), NUM_LABELS, NUM_LABELS, cut_stream=True, **SMALL), characters),
    }


MODELS = models()


def layout_and_row(model: Any) -> tuple[Layout, Tensor]:
    """Return a model that no longer is as it began, with zeros of both signs."""
    layout = Layout.of(model.shapes, model.axes)
    x = layout.flatten(model.init(rng.generator(3, "init-model")))
    x += 0.02 * torch.randn(layout.d, generator=torch.Generator().manual_seed(1))
    x[::7], x[3::7] = 0.0, -0.0
    return layout, layout.flatten(layout.views(x))


def cutter_and_order(layout: Layout, strategy: str, x: Tensor) -> tuple[Cutter, Mapping[str, Tensor]]:
    cutter = Cutter(layout, resolve("strategy", strategy), 1, 5)
    return cutter, cutter.order(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
class TestEveryStrategy:
    def test_a_client_of_capacity_1_computes_the_global_models_function(self, name: str, strategy: str) -> None:
        model, images = MODELS[name]
        layout, x = layout_and_row(model)
        expected = model.apply(layout.views(x), images)
        cutter, order = cutter_and_order(layout, strategy, x)
        for number in ROUNDS:
            cut = cutter.cut(1.0, number, client=number, order=order)
            held = cut.read(x, torch.zeros(cut.sub.d))
            assert (model.apply(cut.sub.views(held), images) - expected).abs().max() < 1e-5

    def test_tied_dimensions_hold_the_same_channels(self, name: str, strategy: str) -> None:
        """What a sub-model holds of each parameter is exactly the rows and columns of its windows."""
        model, _ = MODELS[name]
        layout, x = layout_and_row(model)
        cutter, order = cutter_and_order(layout, strategy, x)
        for number in ROUNDS[:4]:
            cut = cutter.cut(0.5, number, client=number, order=order)
            marked = cut.sub.views(cut.read(x, torch.zeros(cut.sub.d)))
            for parameter, full in layout.views(x).items():
                expected = full
                for position, dim in enumerate(layout.axes[layout.names.index(parameter)]):
                    if dim.axis in cut.windows:
                        nested = expected.unflatten(position, (dim.outer, -1, dim.inner))
                        channels = torch.from_numpy(cut.windows[dim.axis].indices)
                        expected = nested.index_select(position + 1, channels).flatten(position, position + 2)
                assert torch.equal(marked[parameter], expected)


def changed(layout: Layout, strategy: str, order: list[int], labels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Average updates of six clients of mixed capacity into `x`, in this order; return the model and what was held."""
    (cutter, channels), total = cutter_and_order(layout, strategy, x), SelectiveMean(layout)
    held = torch.zeros(layout.d, dtype=torch.bool)
    for client in order:
        cut = cutter.cut(CAPACITIES[client % 2], 4, client, channels)
        change = torch.randn(cut.sub.d, generator=torch.Generator().manual_seed(client))
        weight = 1.0 + client
        total.add_params(cut, cut.sub.views(change), weight, labels[client])
        marks = torch.zeros(layout.d)
        cut.add_(marks, torch.ones(cut.sub.d))
        held |= marks > 0
    mean, mask = total.result()
    inbox: dict[str, Any] = {"x": mean, "held": mask}
    return FedAvg({}).update({"x": x[None].clone()}, inbox, 6)["x"][0], held


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
class TestAggregation:
    LABELS = torch.zeros(6, NUM_LABELS, dtype=torch.bool)
    LABELS[:, 2:5] = True
    ORDER = [0, 1, 2, 3, 4, 5]

    def test_what_nobody_held_keeps_its_bits(self, name: str, strategy: str) -> None:
        layout, x = layout_and_row(MODELS[name][0])
        new, held = changed(layout, strategy, self.ORDER, self.LABELS, x)
        assert not held.all()
        assert torch.equal(new[~held].view(torch.int32), x[~held].view(torch.int32))

    def test_rows_of_absent_classes_keep_their_bits(self, name: str, strategy: str) -> None:
        layout, x = layout_and_row(MODELS[name][0])
        new, _ = changed(layout, strategy, self.ORDER, self.LABELS, x)
        before, after = layout.views(x.view(torch.int32)), layout.views(new.view(torch.int32))
        absent = ~self.LABELS[0]
        rows = label_dims(layout)
        assert {"output.weight", "output.bias"} <= set(rows)
        assert ("embedding.weight" in rows) == name.startswith("transformer")
        for parameter, position in rows.items():
            assert position == 0
            assert torch.equal(after[parameter][absent], before[parameter][absent])
            assert not torch.equal(after[parameter][~absent], before[parameter][~absent])

    def test_the_order_of_clients_is_irrelevant(self, name: str, strategy: str) -> None:
        layout, x = layout_and_row(MODELS[name][0])
        one, _ = changed(layout, strategy, self.ORDER, self.LABELS, x)
        other, _ = changed(layout, strategy, [3, 5, 0, 4, 2, 1], self.LABELS, x)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
