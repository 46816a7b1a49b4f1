"""Federated averaging by hand: local SGD, the server's step, and what the sub-model methods fix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.aggregate import Part, combine
from gossamer.algorithms.federated import (
    AllLargest,
    AllSmallest,
    FedAvg,
    FederatedDropout,
    FedRolex,
    HeteroFL,
)
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN, resolve
from gossamer.submodel import Layout, cut_of
from gossamer.submodel.windows import Window

PLAIN = (
    *("fedavg", "fedrolex", "heterofl", "federated-dropout", "fjord", "all-smallest", "all-largest"),
    *("hetlora", "flexlora", "fednova", "fedadam", "fedyogi", "fedadagrad", "diloco", "fedper", "fedbn"),
    *("streaming-diloco", "soup", "creamfl"),
    *("dsgd", "gossip-pga", "d2", "exact-diffusion", "push-sum", "choco-sgd", "dsgd-ceca", "gasloc", "noloco"),
)
SIZE = 16
LAYOUT = Layout.of({"w": (SIZE,)}, {"w": ("a",)})
CUT = cut_of(LAYOUT, {"a": Window(SIZE, ((0, SIZE),))})
# Client i minimises curvature[i] / 2 * |x - centre[i]|^2.
CURVATURE = [1.0, 0.5, 2.0]
CENTRE = [3.0, -1.0, 0.5]
WEIGHT = [10.0, 30.0, 5.0]
STEPS = [1, 4, 2]
LR = 0.125


def start(seed: int = 0) -> Tensor:
    """Return what training starts with."""
    return torch.randn(1, SIZE, generator=torch.Generator().manual_seed(seed))


def local_change(algorithm: FedAvg, state: dict[str, Tensor], client: int) -> Tensor:
    """What one client returns after its steps."""
    received = {name: state[name] for name in algorithm.traits.downlink or ()}
    carry = algorithm.begin(received, {})
    for _ in range(STEPS[client]):
        carry = algorithm.step(carry, CURVATURE[client] * (carry["x"] - CENTRE[client]), LR)
    payload, private = algorithm.end(received, {}, carry, STEPS[client], LR)
    assert private == {}
    assert set(payload) == {"x"} == set(algorithm.traits.uplink)
    return payload["x"]


def one_round(algorithm: FedAvg, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A round of all clients through the functions that an engine calls."""
    before = {name: array.clone() for name, array in state.items()}
    rows = [local_change(algorithm, state, client)[0] * WEIGHT[client] for client in range(3)]
    assert all(torch.equal(state[name], array) for name, array in before.items()), "training changed the state"
    inbox = combine(LAYOUT, algorithm.traits.uplink, [Part(CUT, {"x": sum(rows)}, sum(WEIGHT), None)])
    return algorithm.update(state, inbox, 3)


def slow_round(x: float, velocity: float, **options: float) -> tuple[float, float]:
    """The same for one coordinate, in plain numbers."""
    change = 0.0
    for client in range(3):
        local, buffer = x, 0.0
        for _ in range(STEPS[client]):
            gradient = CURVATURE[client] * (local - CENTRE[client]) + options.get("weight_decay", 0.0) * local
            buffer = options.get("momentum", 0.0) * buffer + gradient
            local -= LR * buffer
        change += WEIGHT[client] * (local - x) / sum(WEIGHT)
    velocity = options.get("server_momentum", 0.0) * velocity + change
    return x + options.get("server_lr", 1.0) * velocity, velocity


def make(**options: float) -> FedAvg:
    """Make an algorithm."""
    server = {name: value for name, value in options.items() if name.startswith("server")}
    return FedAvg(server, **{name: value for name, value in options.items() if name not in server})


class TestRounds:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"momentum": 0.9},
            {"weight_decay": 0.1},
            {"momentum": 0.5, "weight_decay": 0.01},
            {"server_lr": 0.5},
            {"server_momentum": 0.9},
            {"server_lr": 1.5, "server_momentum": 0.5, "momentum": 0.9, "weight_decay": 0.1},
        ],
    )
    def test_equal_a_slow_version(self, options: dict[str, float]) -> None:
        algorithm = make(**options)
        state = algorithm.init(start())
        expected = [(float(value), 0.0) for value in start()[0]]
        for _ in range(4):
            state = one_round(algorithm, state)
            expected = [slow_round(x, velocity, **options) for x, velocity in expected]
            np.testing.assert_allclose(state["x"][0], [x for x, _ in expected], rtol=1e-5, atol=1e-6)
            if "server_momentum" in options:
                np.testing.assert_allclose(state["velocity"][0], [v for _, v in expected], rtol=1e-5, atol=1e-6)

    def test_state_only_where_it_is_needed(self) -> None:
        x = start()
        assert set(make().init(x)) == {"x"}
        assert set(make(server_momentum=0.1).init(x)) == {"x", "velocity"}
        assert set(make().begin({"x": x}, {})) == {"x"}
        assert set(make(momentum=0.1).begin({"x": x}, {})) == {"x", "momentum"}
        assert make().init_client(x) == {}
        assert make().traits.client_arrays == ()


class TestLocalSteps:
    @pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.01), (0.9, 0.01)])
    def test_are_those_of_torch(self, momentum: float, weight_decay: float) -> None:
        algorithm = make(momentum=momentum, weight_decay=weight_decay)
        parameter = torch.nn.Parameter(start().clone())
        optimizer = torch.optim.SGD(
            [parameter], lr=0.3, momentum=momentum, weight_decay=weight_decay, foreach=False, fused=False
        )
        carry = algorithm.begin({"x": start()}, {})
        for seed in range(1, 6):
            parameter.grad = start(seed)
            optimizer.step()
            carry = algorithm.step(carry, start(seed), 0.3)
            assert torch.equal(carry["x"], parameter.detach())

    @given(st.just(0.0) | st.floats(1e-9, 0.99), st.floats(0, 0.5), st.integers(1, 4))
    def test_are_coordinatewise(self, momentum: float, weight_decay: float, rows: int) -> None:
        """Called for each piece of a row, or for many rows, a step does the same."""
        algorithm = make(momentum=momentum, weight_decay=weight_decay)
        x, gradients = start().expand(rows, -1).contiguous(), [start(seed).expand(rows, -1) for seed in range(1, 4)]
        whole = algorithm.begin({"x": x}, {})
        pieces = [algorithm.begin({"x": x[:1, low : low + 4]}, {}) for low in range(0, SIZE, 4)]
        for gradient in gradients:
            whole = algorithm.step(whole, gradient, 0.3)
            pieces = [algorithm.step(p, gradient[:1, 4 * i : 4 * i + 4], 0.3) for i, p in enumerate(pieces)]
        joined = torch.cat([piece["x"] for piece in pieces], dim=1)
        assert torch.allclose(whole["x"], joined.expand(rows, -1), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", BUILTIN["algorithm"])
    @pytest.mark.parametrize("train", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
    def test_are_plain_where_they_say_so(self, name: str, train: dict[str, float]) -> None:
        try:
            algorithm = resolve("algorithm", name)({}, **train)
        except ConfigError:
            return
        plain = name in PLAIN and not train
        assert algorithm.is_plain_sgd == plain
        if plain:
            x, grad = torch.randn(1, 5), torch.randn(1, 5)
            assert torch.equal(algorithm.step({"x": x.clone()}, grad, 0.3)["x"], x.sub(grad, alpha=0.3))

    def test_gradients_are_left_alone(self) -> None:
        algorithm, gradient = make(momentum=0.9, weight_decay=0.1), start(1)
        carry = algorithm.begin({"x": start()}, {})
        for _ in range(2):
            algorithm.step(carry, gradient, 0.3)
        assert torch.equal(gradient, start(1))


class TestServer:
    @pytest.mark.parametrize("options", [{}, {"server_lr": 0.5}, {"server_lr": 0.5, "server_momentum": 0.75}])
    def test_what_nobody_holds_keeps_its_bits(self, options: dict[str, float]) -> None:
        algorithm = make(**options)
        x = start()
        x[0, -1], x[0, 0] = -0.0, -0.0
        state = algorithm.init(x.clone())
        slow_x, slow_velocity = x[0].double(), torch.zeros(SIZE, dtype=torch.float64)
        masks = [torch.arange(SIZE) < SIZE // 2, torch.arange(SIZE) % 2 == 0, torch.arange(SIZE) < SIZE // 4]
        for number, held in enumerate(masks):
            change = torch.where(held, start(number + 1)[0], 0.0)
            before = {name: array.clone() for name, array in state.items()}
            state = algorithm.update(state, {"x": change, "held": held}, 3)
            for name, array in state.items():
                assert array.shape == (1, SIZE)
                kept, was = array[0, ~held], before[name][0, ~held]
                assert torch.equal(kept.view(torch.int32), was.view(torch.int32))
            moved = options.get("server_momentum", 0.0) * slow_velocity + change
            slow_velocity = torch.where(held, moved, slow_velocity)
            slow_x = torch.where(held, slow_x + options.get("server_lr", 1.0) * moved, slow_x)
            assert torch.allclose(state["x"][0].double(), slow_x, atol=1e-5)
        assert torch.signbit(state["x"][0, -1])

    def test_a_full_mask_is_no_mask(self) -> None:
        results = []
        for held in (None, torch.ones(SIZE, dtype=torch.bool)):
            algorithm = make(server_lr=0.5, server_momentum=0.5)
            state = algorithm.init(start())
            for seed in (1, 2):
                state = algorithm.update(state, {"x": start(seed)[0], "held": held}, 3)
            results.append(state)
        assert torch.allclose(results[0]["x"], results[1]["x"], atol=1e-6)
        assert torch.equal(results[0]["velocity"], results[1]["velocity"])


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"server_rl": 1}, "unknown key 'algorithm.server_rl'; did you mean 'server_lr'?"),
            ({"server_lr": 0}, "algorithm.server_lr = 0: input should be greater than 0"),
            ({"server_momentum": 1}, "algorithm.server_momentum = 1: input should be less than 1"),
            ({"server_momentum": -0.1}, "algorithm.server_momentum = -0.1"),
        ],
    )
    def test_wrong_ones(self, options: dict[str, Any], expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            FedRolex(options)
        assert expected in str(caught.value)

    @pytest.mark.parametrize(
        ("preset", "strategy", "capacities", "label_mask"),
        [
            (FedAvg, None, "one", "none"),
            (FedRolex, "rolling", "given", "zero"),
            (HeteroFL, "static", "given", "zero"),
            (FederatedDropout, "random", "given", "zero"),
            (AllSmallest, None, "smallest", "zero"),
            (AllLargest, None, "largest", "zero"),
        ],
    )
    def test_presets(self, preset: type[FedAvg], strategy: str | None, capacities: str, label_mask: str) -> None:
        traits = preset.traits
        assert (traits.strategy, traits.capacities, traits.default_label_mask) == (strategy, capacities, label_mask)
        algorithm = preset({"server_lr": 0.5, "server_momentum": 0.25}, momentum=0.5, weight_decay=0.1)
        assert (algorithm.options.server_lr, algorithm.options.server_momentum) == (0.5, 0.25)
        assert (algorithm.momentum, algorithm.weight_decay) == (0.5, 0.1)
        assert (algorithm.traits.uplink, algorithm.traits.downlink) == ({"x": "mean"}, ("x",))
