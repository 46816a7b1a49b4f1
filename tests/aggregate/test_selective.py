"""The selective mean against loops over single coordinates, and the properties that the paper asks for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.aggregate import SelectiveMean, label_dims, scale_rows_, selective_mean
from gossamer.errors import ConfigError
from gossamer.registry import resolve
from gossamer.submodel import LABEL_AXIS, Axes, Cutter, Dim, Layout, SubModel, extract, layout_of
from gossamer.submodel.strategies import rolling, window

NUM_LABELS = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "conv.weight": (6, 2, 3, 3),
    "norm.bias": (6,),
    "hidden.weight": (5, 6 * 4),
    "output.weight": (NUM_LABELS, 5),
    "output.bias": (NUM_LABELS,),
    "decoder.weight": (5, NUM_LABELS),
    "temperature": (),
}
AXES: Axes = {
    "conv.weight": ("conv", None, None, None),
    "norm.bias": ("conv",),
    "hidden.weight": ("hidden", Dim("conv", inner=4)),
    "output.weight": (LABEL_AXIS, "hidden"),
    "output.bias": (LABEL_AXIS,),
    "decoder.weight": ("hidden", LABEL_AXIS),
    "temperature": (),
}
LAYOUT = Layout.of(SHAPES, AXES)
Contribution = tuple[SubModel, float, Any]


def params_of(seed: int, whole: bool = True) -> dict[str, Tensor]:
    """Parameters that are whole numbers, so that sums are exact whatever their order."""
    source = torch.Generator().manual_seed(seed)
    if whole:
        return {name: torch.randint(-99, 99, shape, generator=source).float() for name, shape in SHAPES.items()}
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def trained(capacity: float, round: int, strategy: str, client: int, whole: bool = True) -> SubModel:
    """A sub-model whose parameters have changed."""
    return extract(params_of(100 + client, whole), AXES, capacity, round, strategy, client=client)


def owned_labels(labels: Any) -> set[int]:
    """Return the labels that a mask, a list or None (all of them) names."""
    if labels is None:
        return set(range(NUM_LABELS))
    if isinstance(labels, Tensor) and labels.dtype == torch.bool:
        return {i for i in range(NUM_LABELS) if labels[i]}
    return {int(label) for label in labels}


def positions(spec: Any, size: int, windows: Mapping[str, Any]) -> list[int]:
    """Where the entries of a sub-model's dimension lie in the whole model's."""
    if isinstance(spec, Dim):
        return [channel * spec.inner + i for channel in windows[spec.axis].indices for i in range(spec.inner)]
    return windows[spec].indices.tolist() if spec in windows else list(range(size))


def slow_mean(params: Mapping[str, Tensor], contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Equation 4 of FedRolex, coordinate by coordinate, in double precision."""
    result = {}
    for name, shape in SHAPES.items():
        total, weights = np.zeros(shape), np.zeros(shape)
        for sub, weight, labels in contributions:
            owned, values = owned_labels(labels), sub.params[name].numpy()
            where = [positions(spec, size, sub.windows) for spec, size in zip(AXES[name], shape, strict=True)]
            for here in itertools.product(*(range(len(dim)) for dim in where)):
                there = tuple(dim[i] for dim, i in zip(where, here, strict=True))
                named = zip(AXES[name], there, strict=True)
                if all(index in owned for spec, index in named if spec == LABEL_AXIS):
                    total[there] += weight * float(values[here])
                    weights[there] += weight
        mean = torch.from_numpy(total) / torch.from_numpy(weights)
        result[name] = torch.where(torch.from_numpy(weights) > 0, mean.float(), params[name])
    return result


def same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Say whether two states have the same names, shapes and float32 bits."""
    return list(found) == list(expected) and all(
        found[name].shape == expected[name].shape
        and torch.equal(found[name].view(torch.int32), expected[name].view(torch.int32))
        for name in expected
    )


LABELS = st.none() | st.lists(st.integers(0, NUM_LABELS - 1), max_size=5)
MASKS = st.lists(st.booleans(), min_size=NUM_LABELS, max_size=NUM_LABELS).map(torch.tensor)
WHO = st.lists(
    st.tuples(st.sampled_from([1.0, 0.7, 0.5, 0.2]), st.integers(1, 9), LABELS | MASKS), min_size=1, max_size=5
)


class TestAgainstLoops:
    @given(st.sampled_from(["rolling", "static", "random"]), st.integers(0, 12), WHO)
    def test_exactly_equal_for_whole_numbers(self, strategy: str, round: int, who: list[Any]) -> None:
        contributions = [
            (trained(capacity, round, strategy, client), float(weight), labels)
            for client, (capacity, weight, labels) in enumerate(who)
        ]
        params = params_of(0)
        before = {name: tensor.clone() for name, tensor in params.items()}
        found = selective_mean(params, AXES, contributions)
        assert all(torch.equal(found[name], value) for name, value in slow_mean(params, contributions).items())
        assert list(found) == list(SHAPES)
        assert same_bits(params, before)

    @pytest.mark.parametrize("strategy", ["rolling", "static", "random"])
    def test_real_numbers_and_not_fedavg(self, strategy: str) -> None:
        capacities, weights = [1.0, 0.7, 0.5, 0.2], [0.3, 12.5, 4.0, 1.1]
        labels: list[Any] = [None, [0, 1], [1], [0]]
        subs = [trained(capacity, 4, strategy, i, whole=False) for i, capacity in enumerate(capacities)]
        contributions = list(zip(subs, weights, labels, strict=True))
        params = params_of(0, whole=False)
        found, expected = selective_mean(params, AXES, contributions), slow_mean(params, contributions)
        blind = slow_mean(params, [(sub, weight, None) for sub, weight, _ in contributions])
        for name in SHAPES:
            assert torch.allclose(found[name], expected[name], atol=1e-5)
            naive = sum(w * params[name] for w in weights[1:]) / sum(weights)
            if name != "temperature":
                assert not torch.allclose(found[name], naive, atol=1e-2)
            if name.startswith(("output", "decoder")):
                assert not torch.allclose(found[name], blind[name], atol=1e-2)


class TestFedAvg:
    def test_four_whole_clients_that_return_0_1_2_3_give_one_and_a_half(self) -> None:
        params = params_of(0)
        contributions = []
        for value in range(4):
            sub = extract(params, AXES, 1.0, 1)
            for tensor in sub.params.values():
                tensor.fill_(value)
            contributions.append((sub, 1.0, None))
        for tensor in selective_mean(params, AXES, contributions).values():
            assert torch.equal(tensor, torch.full_like(tensor, 1.5))

    @pytest.mark.parametrize("labels", [None, list(range(NUM_LABELS)), torch.ones(NUM_LABELS, dtype=torch.bool)])
    def test_whole_models_with_all_labels(self, labels: Any) -> None:
        weights = [3.0, 5.0, 0.5]
        subs = [trained(1.0, 2, "rolling", client, whole=False) for client in range(3)]
        found = selective_mean(params_of(0), AXES, [(s, w, labels) for s, w in zip(subs, weights, strict=True)])
        for name in SHAPES:
            mean = sum(w * s.params[name].double() for w, s in zip(weights, subs, strict=True)) / sum(weights)
            assert torch.allclose(found[name].double(), mean, atol=1e-6)

    def test_order_is_irrelevant_up_to_rounding(self) -> None:
        contributions = [
            (trained(capacity, 4, "rolling", client, whole=False), 0.1 + client, labels)
            for client, (capacity, labels) in enumerate([(1.0, [0]), (0.7, None), (0.5, [1, 2]), (0.2, [3])])
        ]
        params = params_of(0, whole=False)
        expected = selective_mean(params, AXES, contributions)
        for order in itertools.permutations(contributions):
            found = selective_mean(params, AXES, order)
            assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in SHAPES)


class TestNobody:
    def test_no_contribution_changes_no_bit(self) -> None:
        params = params_of(0, whole=False)
        params["norm.bias"].fill_(-0.0)
        assert same_bits(selective_mean(params, AXES, []), params)

    def test_coordinates_that_nobody_holds_keep_their_bits(self) -> None:
        params = {name: torch.full(shape, -0.0) for name, shape in SHAPES.items()}
        sub = trained(0.5, 0, "static", 0)
        for tensor in sub.params.values():
            tensor.fill_(7.0)
        found = selective_mean(params, AXES, [(sub, 2.0, None)])
        assert found["norm.bias"].tolist() == [7, 7, 7, 0, 0, 0]
        assert torch.signbit(found["norm.bias"]).tolist() == [False] * 3 + [True] * 3
        assert torch.signbit(found["hidden.weight"])[2:].all()
        assert torch.signbit(found["hidden.weight"])[:, 12:].all()

    def test_even_values_that_are_not_finite(self) -> None:
        params = params_of(0)
        params["norm.bias"][4] = torch.nan
        found = selective_mean(params, AXES, [(trained(0.5, 0, "static", 0), 2.0, None)])
        assert found["norm.bias"].isnan().tolist() == [False] * 4 + [True, False]

    def test_rows_of_labels_that_nobody_owns(self) -> None:
        params = params_of(0, whole=False)
        contributions = [(trained(1.0, 0, "static", 1), 1.0, [2]), (trained(0.7, 0, "static", 2), 1.0, [2, 0])]
        found = selective_mean(params, AXES, contributions)
        for label, owned in enumerate([True, False, True, False]):
            rows = {"output.weight": label, "output.bias": label, "decoder.weight": (slice(None), label)}
            for name, row in rows.items():
                assert torch.equal(found[name][row], params[name][row]) != owned
        assert not torch.equal(found["conv.weight"], params["conv.weight"])

    def test_results_are_new_tensors(self) -> None:
        params = params_of(0)
        for contributions in ([], [(trained(1.0, 0, "static", 0), 1.0, None)]):
            for name, tensor in selective_mean(params, AXES, contributions).items():
                tensor.fill_(torch.nan)
                assert not params[name].isnan().any()


class TestRefused:
    @pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
    def test_weights(self, weight: float) -> None:
        with pytest.raises(ConfigError, match=r"weight .* of a contribution is not positive and finite"):
            selective_mean(params_of(0), AXES, [(trained(0.5, 0, "static", 0), weight, None)])

    @pytest.mark.parametrize("labels", [[4], [-1], torch.tensor([0, 9])])
    def test_labels_out_of_range(self, labels: Any) -> None:
        with pytest.raises(ConfigError, match=r"label -?\d is outside 0..3"):
            selective_mean(params_of(0), AXES, [(trained(0.5, 0, "static", 0), 1.0, labels)])

    @pytest.mark.parametrize("size", [3, 5])
    def test_masks_of_another_length(self, size: int) -> None:
        mask = torch.ones(size, dtype=torch.bool)
        with pytest.raises(ConfigError, match=rf"mask of shape \({size},\) does not fit 4 labels"):
            selective_mean(params_of(0), AXES, [(trained(0.5, 0, "static", 0), 1.0, mask)])

    def test_labels_without_a_label_axis(self) -> None:
        params, axes = {"w": torch.zeros(3)}, {"w": ("a",)}
        with pytest.raises(ConfigError, match="check the axis named 'label'"):
            selective_mean(params, axes, [(extract(params, axes, 1.0, 0), 1.0, [0])])


class TestFlatRows:
    """What the engines use: weighted rows of participants that share a cut."""

    def test_label_dims(self) -> None:
        assert label_dims(LAYOUT) == {"output.weight": 0, "output.bias": 0, "decoder.weight": 1}

    @pytest.mark.parametrize("capacity", [1.0, 0.5])
    def test_scale_rows(self, capacity: float) -> None:
        layout = LAYOUT.cut(capacity)
        rows, weights = torch.ones(2, layout.d), torch.tensor([2.0, 3.0])
        label_weights = torch.tensor([[2.0, 0.0, 2.0, 2.0], [0.0, 3.0, 3.0, 0.0]])
        assert scale_rows_(layout, rows, weights, label_weights) is rows
        views = layout.views(rows)
        for i in range(2):
            assert (views["conv.weight"][i] == weights[i]).all()
            assert views["temperature"][i] == weights[i]
            assert (views["output.weight"][i] == label_weights[i][:, None]).all()
            assert torch.equal(views["output.bias"][i], label_weights[i])
            assert (views["decoder.weight"][i] == label_weights[i]).all()
        plain = scale_rows_(layout, torch.ones(2, layout.d), weights, None)
        assert torch.equal(plain, weights[:, None].expand(2, layout.d))

    @pytest.mark.parametrize("strategy", ["rolling", "static", "random"])
    @pytest.mark.parametrize("with_labels", [False, True])
    def test_equals_the_mean_over_dictionaries(self, strategy: str, with_labels: bool) -> None:
        cutter, total = Cutter(LAYOUT, resolve("strategy", strategy), 1, 0), SelectiveMean(LAYOUT)
        owned = [[0, 1], [1], [0, 1], [0]]
        contributions: list[Contribution] = []
        for client, capacity in enumerate([0.7, 0.7, 0.2, 0.5]):
            sub = trained(capacity, 3, strategy, client)
            weight, labels = client + 1.0, owned[client] if with_labels else None
            contributions.append((sub, weight, labels))
            cut = cutter.cut(capacity, 3, client)
            row = cut.sub.flatten(sub.params)[None]
            label_weights = torch.zeros(1, NUM_LABELS)
            label_weights[0, owned[client]] = weight
            given = label_weights if with_labels else None
            scale_rows_(cut.sub, row, torch.tensor([weight]), given)
            total.add(cut, row[0], weight, None if given is None else given[0])
        mean, held = total.result()
        expected = slow_mean({key: torch.zeros(shape) for key, shape in SHAPES.items()}, contributions)
        assert all(torch.equal(view, expected[key]) for key, view in LAYOUT.views(mean).items())
        assert held is not None
        marked = slow_mean({key: torch.full(shape, torch.nan) for key, shape in SHAPES.items()}, contributions)
        assert all(torch.equal(~view, marked[key].isnan()) for key, view in LAYOUT.views(held).items())
        if with_labels:
            assert not LAYOUT.views(held)["output.bias"][2:].any()

    def test_held_is_none_if_all_coordinates_are(self) -> None:
        cut, total = Cutter(LAYOUT, rolling, 1, 0).cut(1.0, 0, 0), SelectiveMean(LAYOUT)
        total.add(cut, torch.full((LAYOUT.d,), 6.0), 4.0)
        mean, held = total.result()
        assert held is None
        assert (LAYOUT.views(mean)["hidden.weight"] == 1.5).all()

    def test_layout_of_a_dictionary(self) -> None:
        assert layout_of(params_of(0), AXES) == LAYOUT
        assert window("static", 6, 0.5, 0) == trained(0.5, 0, "static", 0).windows["conv"]


@pytest.mark.parametrize("modules", [("a", "b"), ("b",)])
def test_rows_of_several_label_axes_have_weights_of_their_own(modules: tuple[str, ...]) -> None:
    """Two clients, of whom the second has no label of the second axis: against sums by hand, also of a part."""
    axes: Axes = {"a.x": ("label:digit", None), "b.x": (None, "label:motion"), "b.free": (None,)}
    layout = Layout.of({"a.x": (2, 2), "b.x": (2, 3), "b.free": (4,)}, axes)
    part, labels = layout.of_modules(modules), torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 0]]).float()
    weights = torch.tensor([2.0, 3.0])
    rows = scale_rows_(
        part, torch.stack([torch.full((part.d,), 5.0), torch.full((part.d,), 7.0)]), weights, labels * weights[:, None]
    )
    total = SelectiveMean(layout)
    cut = Cutter(layout, resolve("strategy", "static"), 1, 0).cut(1.0, 0, 0, modules=frozenset(modules))
    for row, weight, own in zip(rows, weights, labels, strict=True):
        total.add(cut, row, float(weight), own * weight)
    mean, held = total.result()
    assert held is not None
    views, there = layout.views(mean), layout.views(held)
    assert views["b.free"].tolist() == [pytest.approx((2 * 5 + 3 * 7) / 5)] * 4
    assert views["b.x"].tolist() == [[5.0, 0.0, 5.0]] * 2  # of motions, nobody has the second
    assert there["b.x"].tolist() == [[True, False, True]] * 2
    expected = [[pytest.approx(31 / 5)] * 2, [7.0] * 2] if "a" in modules else [[0.0] * 2] * 2
    assert views["a.x"].tolist() == expected
