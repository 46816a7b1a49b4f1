"""Windows that follow the model."""

from __future__ import annotations

import torch

from federation import configure, digest, mixed
from gossamer import experiment
from gossamer.aggregate import selective_mean
from gossamer.submodel import Cutter, Dim, Layout, SubModel, extract
from gossamer.submodel.magnitude import by_magnitude, magnitude

LAYOUT = Layout.of(
    {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4)},
    {"a.weight": ("a", None), "a.bias": ("a",), "b.weight": ("label", "a")},
)


def model(rows: list[float]) -> torch.Tensor:
    return LAYOUT.flatten(
        {
            "a.weight": torch.tensor(rows)[:, None] * torch.ones(4, 3),
            "a.bias": torch.full((4,), 9.0),
            "b.weight": torch.ones(2, 4),
        }
    )


class TestRank:
    def test_by_the_weights_that_produce_a_channel(self) -> None:
        assert by_magnitude(LAYOUT, model([0.5, -2.0, 1.0, 0.0]))["a"].tolist() == [1, 2, 0, 3]

    def test_among_equals_the_first(self) -> None:
        assert by_magnitude(LAYOUT, model([1.0, 2.0, -1.0, 1.0]))["a"].tolist() == [1, 0, 2, 3]

    def test_blocks_of_a_dimension_add_up(self) -> None:
        """A fused projection [3 x heads x 2] ranks heads by all their rows."""
        layout = Layout.of({"qkv": (12, 5)}, {"qkv": (Dim("head", outer=3, inner=2), None)})
        weight = torch.zeros(3, 2, 2, 5)
        weight[0, 0], weight[2, 1] = 1.0, 1.5
        assert by_magnitude(layout, layout.flatten({"qkv": weight.view(12, 5)}))["head"].tolist() == [1, 0]


class TestCutter:
    def test_windows_hold_the_largest_channels(self) -> None:
        cutter = Cutter(LAYOUT, magnitude, 1, 0)
        first, second = (cutter.order(model(rows)) for rows in ([0.5, -2.0, 1.0, 0.0], [0.5, 0.0, 1.0, 3.0]))
        assert cutter.cut(0.5, 0, 0, first).windows["a"].indices.tolist() == [1, 2]
        assert cutter.cut(0.5, 0, 7, second).windows["a"].indices.tolist() == [2, 3]
        assert cutter.cut(0.5, 0, 0, first).windows["a"].indices.tolist() == [1, 2]  # nothing was remembered

    def test_of_the_parameters_that_are_extracted_from(self) -> None:
        params = LAYOUT.views(model([0.5, 0.0, 1.0, 3.0]))
        axes = dict(zip(LAYOUT.names, LAYOUT.axes, strict=True))
        sub = extract(params, axes, 0.5, 0, strategy="magnitude")
        assert sub.windows["a"].indices.tolist() == [2, 3]
        assert sub.params["a.weight"][:, 0].tolist() == [1.0, 3.0]

    def test_of_parameters_that_are_being_trained(self) -> None:
        params = {name: torch.nn.Parameter(value) for name, value in LAYOUT.views(model([0.5, 0.0, 1.0, 3.0])).items()}
        axes = dict(zip(LAYOUT.names, LAYOUT.axes, strict=True))
        sub = extract(params, axes, 0.5, 0, strategy="magnitude")
        assert sub.windows["a"].indices.tolist() == [2, 3]
        trained = SubModel(
            {name: torch.nn.Parameter(value + 1) for name, value in sub.params.items()}, sub.windows, 0.5
        )
        new = selective_mean(params, axes, [(trained, 2.0, None)])
        assert new["a.weight"][:, 0].tolist() == [0.5, 0.0, 2.0, 4.0]
        assert not any(value.requires_grad for value in new.values())


class TestFederation:
    def test_same_bits_in_any_number_of_processes(self, tmp_path: object) -> None:
        changes = mixed("fedavg") | {"submodel.strategy": "magnitude"}
        models = []
        for workers in (0, 1, 2):
            data = configure(changes | {"engine.workers": workers, "evaluation": {"by_capacity": True}})
            models.append(experiment.run(data, out=f"{tmp_path}/{workers}"))
        assert len({digest(run.params) for run in models}) == 1
        accuracies = [[record["accuracy_by_capacity"] for record in run.metrics] for run in models]
        assert accuracies[0] == accuracies[1] == accuracies[2]
