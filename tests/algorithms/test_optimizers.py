"""Optimizers of local steps, against those of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.algorithms.carries import carry_views
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.fiarse import FIARSE
from gossamer.algorithms.optimizers import NUM_STEPS, Optimizer
from gossamer.errors import ConfigError
from gossamer.registry import resolve
from gossamer.submodel import Layout

SHAPES = {"conv.weight": (5, 3, 2, 2), "hidden.weight": (7, 5), "hidden.bias": (7,), "output.weight": (3, 7)}
LAYOUT = Layout.of(SHAPES, {name: (None,) * len(shape) for name, shape in SHAPES.items()})
NUM_STEPS_TRIED, NUM_ROWS, LR = 50, 3, 0.02
TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "dampening": 0.4}),
    ("adam", {}),
    ("adam", {"betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1}),
    ("adamw", {}),
    ("adamw", {"betas": (0.9, 0.95), "amsgrad": True, "weight_decay": 0.3}),
    ("adagrad", {}),
    ("adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3, "weight_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True, "weight_decay": 0.1}),
    ("muon", {}),
    ("muon", {"nesterov": False, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw", "momentum": 0.8}),
]
EVERY = pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random rows, 0 between parameters."""
    drawn = torch.randn(NUM_ROWS, LAYOUT.d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    kept = torch.zeros_like(drawn)
    kept[:, LAYOUT.coordinates] = drawn[:, LAYOUT.coordinates]
    return kept


def make(name: str, options: Mapping[str, Any], kind: type[FedAvg] = FedAvg, keeps_moments: bool = False) -> FedAvg:
    """Return an algorithm with an optimizer."""
    return kind({}).with_optimizer(resolve("optimizer", name)(options), keeps_moments)


def train(algorithm: FedAvg, carry: Arrays, layout: Layout, seeds: range) -> Tensor:
    """Take local steps as an engine does, on some rows of a carry, and return the models."""
    views = carry_views(layout, carry)
    for seed in seeds:
        if NUM_STEPS in carry:
            carry[NUM_STEPS] += 1
        for name, grad in layout.views(layout_rows(seed, layout, carry["x"])).items():
            shape = SHAPES[name]
            algorithm.of_parameter(name, shape).step(views[name], grad, LR)
    return carry["x"]


def layout_rows(seed: int, layout: Layout, like: Tensor) -> Tensor:
    """Return gradients of the models of a layout, of as many rows as there are."""
    found = rows(seed, like.dtype)[: len(like)].clone()
    return LAYOUT.reorder_(found, layout)


def oracle(name: str, options: Mapping[str, Any], x: Tensor, seeds: range) -> Tensor:
    """Return a row [d] after steps of torch's own optimizers."""
    params = {key: torch.nn.Parameter(view.clone()) for key, view in LAYOUT.views(x).items()}
    if name == "muon":
        matrices = [value for value in params.values() if value.dim() == 2]
        others = [value for value in params.values() if value.dim() != 2]
        optimizers = [torch.optim.Muon(matrices, lr=LR, **options), torch.optim.AdamW(others, lr=LR)]
    else:
        optimizers = [TORCH[name](params.values(), lr=LR, **options)]
    for seed in seeds:
        for key, grad in LAYOUT.views(rows(seed, x.dtype)[0]).items():
            params[key].grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return LAYOUT.flatten({key: value.detach() for key, value in params.items()})


STEPS = range(1, NUM_STEPS_TRIED + 1)


class TestSteps:
    @EVERY
    @pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
    def test_are_those_of_torch(self, name: str, options: dict[str, Any], channels_last: bool) -> None:
        layout = LAYOUT.as_channels_last if channels_last else LAYOUT
        algorithm, x = make(name, options), rows(0)
        carry = algorithm.begin({"x": LAYOUT.reorder_(x.clone(), layout)}, {})
        found = layout.reorder_(train(algorithm, carry, layout, STEPS), LAYOUT)[0]
        expected = oracle(name, options, x[0], STEPS)
        assert float((found - expected).norm() / expected.norm()) < 1e-6
        assert float((found - x[0]).norm() / x[0].norm()) > 1e-2, "it was not moved at all"
        assert torch.equal(found, found * (x[0] != 0)), "what lies between parameters must stay 0"

    @EVERY
    def test_in_double_precision(self, name: str, options: dict[str, Any]) -> None:
        algorithm, x = make(name, options), rows(0, torch.float64)
        found = train(algorithm, algorithm.begin({"x": x}, {}), LAYOUT, STEPS)[0]
        expected = oracle(name, options, x[0], STEPS)
        assert float((found - expected).norm() / expected.norm()) < (1e-6 if name == "adagrad" else 1e-9)

    @EVERY
    def test_a_row_has_the_same_bits_alone(self, name: str, options: dict[str, Any]) -> None:
        algorithm, x = make(name, options), rows(0)
        together = train(algorithm, algorithm.begin({"x": x}, {}), LAYOUT, STEPS)
        alone = train(algorithm, algorithm.begin({"x": x[:1]}, {}), LAYOUT, STEPS)
        assert torch.equal(together[:1], alone)

    @EVERY
    def test_kept_moments_go_on(self, name: str, options: dict[str, Any]) -> None:
        """Rounds of clients who keep their moments are one of all steps, whatever number of these each row took."""
        algorithm, x = make(name, options, keeps_moments=True), rows(0)
        private = algorithm.init_client(x)
        assert sorted(private) == sorted(algorithm.traits.client_arrays)
        first = algorithm.begin({"x": x}, private)
        before = {key: value.clone() for key, value in private.items()}
        train(algorithm, first, LAYOUT, range(1, 6))
        assert all(torch.equal(value, before[key]) for key, value in private.items()), "begin must copy moments"
        moved = first["x"].clone()
        _, private = algorithm.end({"x": x}, private, first, 5, LR)
        joined = {key: torch.cat([private[key][:1], before[key][1:]]) for key in private}  # row 1 is a newcomer
        second = algorithm.begin({"x": torch.cat([moved[:1], x[1:]])}, joined)
        found = train(algorithm, second, LAYOUT, range(6, 9))
        expected = oracle(name, options, x[0], range(1, 9))
        assert float((found[0] - expected).norm() / expected.norm()) < 1e-6
        fresh = train(algorithm, algorithm.begin({"x": x}, before), LAYOUT, range(6, 9))
        assert torch.equal(found[1], fresh[1])

    @EVERY
    def test_gradients_are_left_alone(self, name: str, options: dict[str, Any]) -> None:
        optimizer: Optimizer = resolve("optimizer", name)(options)
        x, grad = rows(0)[:, :64].view(NUM_ROWS, 8, 8), rows(1)[:, :64].view(NUM_ROWS, 8, 8)
        before, moments = grad.clone(), optimizer.init(rows(0)[:, :64])
        views = {key: value.view(NUM_ROWS, 8, 8) if value.shape[1] > 1 else value + 1 for key, value in moments.items()}
        optimizer.step(x, grad, views, LR)
        assert torch.equal(grad, before)


def test_the_rest_beside_muon_has_a_rate_of_its_own() -> None:
    x, plain = rows(0), make("muon", {})
    slower = make("muon", {"adamw": {"lr_factor": 0.5, "weight_decay": 0.0}})
    moved = [train(one, one.begin({"x": x}, {}), LAYOUT, range(1, 2)) - x for one in (plain, slower)]
    views = [LAYOUT.views(change) for change in moved]
    assert torch.equal(views[0]["hidden.weight"], views[1]["hidden.weight"])
    assert torch.allclose(views[1]["hidden.bias"].abs(), torch.full((), 0.5 * LR), rtol=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_masked_weights_do_not_decay(name: str) -> None:
    """FIARSE's weights below the threshold stay where they are."""
    algorithm, x = make(name, {"weight_decay": 0.5}, FIARSE).of_capacity(LAYOUT, 1.0), rows(0)
    carry = algorithm.begin({"x": x}, {})
    carry["threshold"].fill_(1.0)
    if NUM_STEPS in carry:
        carry[NUM_STEPS] += 1
    algorithm.step(carry, torch.zeros_like(x), LR)
    is_masked = x.abs() < 1.0
    assert torch.equal(carry["x"][is_masked], x[is_masked])
    assert float(carry["x"][~is_masked].abs().sum()) < float(x[~is_masked].abs().sum())


def test_a_scale_of_bias_correction() -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient: the moments count their steps."""
    algorithm, x = make("adam", {}), rows(0)
    moved = train(algorithm, algorithm.begin({"x": x}, {}), LAYOUT, range(1, 2)) - x
    assert torch.allclose(moved[:, LAYOUT.coordinates].abs(), torch.tensor(LR), rtol=1e-3)
    assert math.isclose(float(algorithm.begin({"x": x}, {})[NUM_STEPS].sum()), 0.0)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("adamw", {"beta": 1}, "unknown key 'train.optimizer.beta'; did you mean 'betas'?"),
        ("adam", {"betas": (0.9, 1.0)}, "betas = [0.9, 1.0]: give two numbers from 0 to below 1"),
        ("adam", {"betas": (0.9,)}, "train.optimizer.betas"),
        ("sgd", {"nesterov": True}, "nesterov = True needs a momentum and no dampening, not 0.0 and 0.0"),
        ("sgd", {"dampening": 0.5}, "dampening = 0.5 is that of a momentum, which is 0: set it, too"),
        ("rmsprop", {"alpha": 2}, "train.optimizer.alpha = 2"),
        (
            "muon",
            {"adamw": {"lr": 1}},
            "unknown key 'train.optimizer.adamw.lr' (known here: amsgrad, betas",
        ),
        ("adagrad", {"weight_decay": -1}, "train.optimizer.weight_decay = -1"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("optimizer", name)(options)
    assert expected in str(caught.value)
