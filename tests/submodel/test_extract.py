"""Extraction from a dictionary of tensors: a small residual network as a user would write it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import submodel
from gossamer.errors import ConfigError, RegistryError
from gossamer.submodel import LABEL_AXIS, Axes, Dim, extract, layout_of, window

# The block's input is added to its output, so "stem" ties three layers together.
SHAPES: dict[str, tuple[int, ...]] = {
    "stem.weight": (8, 3, 3, 3),
    "stem.bias": (8,),
    "inside.weight": (6, 8, 3, 3),
    "back.weight": (8, 6, 1, 1),
    "output.weight": (5, 8 * 4),
    "output.bias": (5,),
}
AXES: Axes = {
    "stem.weight": ("stem", None, None, None),
    "stem.bias": ("stem",),
    "inside.weight": ("inside", "stem", None, None),
    "back.weight": ("stem", "inside", None, None),
    "output.weight": (LABEL_AXIS, Dim("stem", inner=4)),
    "output.bias": (LABEL_AXIS,),
}
STRATEGIES = ["rolling", "static", "random"]


def network() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=source) for name, shape in SHAPES.items()}


def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
    x = F.conv2d(x, params["stem.weight"], params["stem.bias"], padding=1)
    x = x + F.conv2d(F.relu(F.conv2d(F.relu(x), params["inside.weight"], padding=1)), params["back.weight"])
    return F.linear(F.adaptive_avg_pool2d(x, 2).flatten(1), params["output.weight"], params["output.bias"])


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestEveryStrategy:
    def test_parameters_are_those_of_the_windows(self, strategy: str) -> None:
        params = network()
        sub = submodel.extract(params, AXES, capacity=0.5, round=6, strategy=strategy, seed=3, client=4)
        stem, inside = (torch.from_numpy(sub.windows[axis].indices) for axis in ("stem", "inside"))
        flat = torch.cat([torch.arange(4) + 4 * channel for channel in stem.tolist()])
        expected = {
            "stem.weight": params["stem.weight"][stem],
            "stem.bias": params["stem.bias"][stem],
            "inside.weight": params["inside.weight"][inside][:, stem],
            "back.weight": params["back.weight"][stem][:, inside],
            "output.weight": params["output.weight"][:, flat],
            "output.bias": params["output.bias"],
        }
        assert list(sub.params) == list(SHAPES)
        assert all(torch.equal(sub.params[name], value) for name, value in expected.items())
        assert sub.capacity == 0.5
        assert set(sub.windows) == {"stem", "inside"}

    def test_windows_are_those_of_the_public_function(self, strategy: str) -> None:
        sub = extract(network(), AXES, 0.4, 5, strategy, seed=3, client=4, stride=2)
        for axis, width in (("stem", 8), ("inside", 6)):
            expected = window(strategy, width, 0.4, 5, stride=2, seed=3, client=4, group=axis)
            assert sub.windows[axis] == expected

    def test_the_sub_model_is_a_network(self, strategy: str) -> None:
        """Dropping the other channels is the same as setting them to zero."""
        params, x = network(), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        sub = extract(params, AXES, 0.5, 5, strategy, client=1)
        stem = torch.zeros(8).index_fill_(0, torch.from_numpy(sub.windows["stem"].indices), 1.0)
        inside = torch.zeros(6).index_fill_(0, torch.from_numpy(sub.windows["inside"].indices), 1.0)
        masked = params | {
            "stem.weight": params["stem.weight"] * stem[:, None, None, None],
            "stem.bias": params["stem.bias"] * stem,
            "inside.weight": params["inside.weight"] * inside[:, None, None, None],
            "back.weight": params["back.weight"] * stem[:, None, None, None],
        }
        assert torch.allclose(logits(sub.params, x), logits(masked, x), atol=1e-4)

    @pytest.mark.parametrize("round", [0, 5])
    def test_capacity_one_is_the_same_function(self, strategy: str, round: int) -> None:
        params, x = network(), torch.randn(2, 3, 4, 4)
        sub = extract(params, AXES, 1.0, round, strategy, client=2)
        assert all(torch.equal(sub.params[name], params[name]) for name in params)
        assert torch.equal(logits(sub.params, x), logits(params, x))

    @pytest.mark.parametrize("capacity", [0.5, 1.0])
    def test_no_memory_is_shared(self, strategy: str, capacity: float) -> None:
        params = network()
        before = {name: tensor.clone() for name, tensor in params.items()}
        sub = extract(params, AXES, capacity, 2, strategy)
        for tensor in sub.params.values():
            tensor.fill_(float("nan"))
        assert all(torch.equal(params[name], before[name]) for name in params)


class TestOptions:
    def test_default_is_rolling_by_one(self) -> None:
        sub = extract(network(), AXES, 0.5, 3)
        assert sub.windows["stem"].indices.tolist() == [3, 4, 5, 6]
        assert sub.windows["inside"].indices.tolist() == [3, 4, 5]

    @pytest.mark.parametrize(("stride", "expected"), [(4, [4, 5, 6, 7]), (-1, [0, 1, 2, 7]), (0, [0, 1, 2, 3])])
    def test_stride(self, stride: int, expected: list[int]) -> None:
        assert extract(network(), AXES, 0.5, 1, stride=stride).windows["stem"].indices.tolist() == expected

    def test_parameters_that_require_gradients(self) -> None:
        params = {name: tensor.requires_grad_() for name, tensor in network().items()}
        assert not any(tensor.requires_grad for tensor in extract(params, AXES, 0.5, 3).params.values())

    def test_parameters_in_any_memory_format(self) -> None:
        params = network()
        odd = {n: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for n, t in params.items()}
        expected, found = extract(params, AXES, 0.5, 3).params, extract(odd, AXES, 0.5, 3).params
        assert all(torch.equal(found[name], expected[name]) for name in params)


class TestRefused:
    @pytest.mark.parametrize("capacity", [0, -1, 1.5, float("nan")])
    def test_capacity(self, capacity: float) -> None:
        with pytest.raises(ConfigError, match="is outside"):
            extract(network(), AXES, capacity, 0)
        with pytest.raises(ConfigError, match="is outside"):
            extract({"w": torch.zeros(2)}, {"w": (None,)}, capacity, 0)

    def test_strategy(self) -> None:
        with pytest.raises(RegistryError, match="unknown strategy 'statics'; did you mean 'static'"):
            extract(network(), AXES, 0.5, 0, strategy="statics")

    @pytest.mark.parametrize(
        ("axes", "expected"),
        [
            ({"stem.bias": ()}, "parameter 'stem.bias' has shape (8,) but 0 axes"),
            ({"stem.bias": ("inside",)}, "axis 'inside' of parameter 'inside.weight' has size 6"),
        ],
    )
    def test_axes(self, axes: dict[str, Any], expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            extract(network(), {**AXES, **axes}, 0.5, 0)
        assert expected in str(caught.value)

    def test_other_types(self) -> None:
        params = network() | {"stem.bias": torch.zeros(8, dtype=torch.float64)}
        with pytest.raises(ConfigError, match=r"parameter 'stem.bias' is torch.float64: sub-models are cut from"):
            layout_of(params, AXES)
