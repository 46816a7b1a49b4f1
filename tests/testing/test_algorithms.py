"""The contract of algorithms: what ships here passes, and every way of breaking it is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.algorithms.decentralized.choco import ChocoSGD
from gossamer.algorithms.decentralized.dsgd import DSGD, QuasiGlobalMomentum
from gossamer.algorithms.decentralized.pushsum import StochasticGradientPush
from gossamer.algorithms.decentralized.tracking import DSGT
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.fednova import FedNova
from gossamer.algorithms.fedopt import FedAdagrad
from gossamer.algorithms.fedprox import FedProx
from gossamer.algorithms.scaffold import Scaffold
from gossamer.registry import BUILTIN, resolve
from gossamer.testing import check_algorithm
from gossamer.testing.algorithms import SMALL


@pytest.mark.parametrize("name", BUILTIN["algorithm"])
def test_what_ships(name: str) -> None:
    momentum = 0.9 if name == "quasi-global-momentum" else 0.0
    options = {"fragments": 2} if name == "streaming-diloco" else {}
    algorithm = resolve("algorithm", name)(options, momentum=momentum)
    check_algorithm(algorithm.of_model(SMALL) if options else algorithm)


@pytest.mark.parametrize(
    "algorithm",
    [
        FedAvg({}, momentum=0.9, weight_decay=0.1),
        FedAvg({"server_lr": 0.5, "server_momentum": 0.9}),
        FedProx({"mu": 0.5}, momentum=0.9, weight_decay=0.1),
        Scaffold({"server_lr": 0.5}, weight_decay=0.1),
        FedNova({"mu": 0.5, "server_momentum": 0.9}, momentum=0.9),
        FedAdagrad({"beta1": 0.5}),
        DSGD({}, momentum=0.9, weight_decay=0.1),
        ChocoSGD({}, momentum=0.9),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_options(algorithm: Algorithm) -> None:
    check_algorithm(algorithm)


class Aliasing(FedAvg):
    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"]}


class Normalising(FedAvg):
    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        return super().step(carry, grad / grad.norm(), lr)


class Centring(FedAvg):
    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        payload, private = super().end(*arguments)
        return {"x": payload["x"] - payload["x"].mean(0)}, private


class Forgetting(FedAvg):
    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        return {}, {}


class Careless(FedAvg):
    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        return {"x": state["x"] * 0.5 + inbox["x"]}


class Idle(FedAvg):
    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        return {"x": state["x"]}


class Overwriting(Scaffold):
    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        payload, private = super().end(state, client_state, carry, steps, lr)
        return payload, {"control": client_state["control"].copy_(private["control"])}


class Sharing(Scaffold):
    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        payload, _ = super().end(state, client_state, carry, steps, lr)
        return payload, {"control": payload["control"]}


class Wide(FedNova):
    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        payload, private = super().end(*arguments)
        return payload | {"normaliser": payload["x"] * 0}, private


class Counting(FedNova):
    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        payload, private = super().end(*arguments)
        return payload | {"normaliser": torch.arange(1.0, len(payload["x"]) + 1)[:, None]}, private


class Unknown(FedAvg):
    traits = replace(FedAvg.traits, downlink=("x", "velocity"))


class Undeclared(Scaffold):
    traits = replace(Scaffold.traits, client_arrays=("control", "history"))


class Misspelt(FedAvg):
    stackabel = False


class Unkept(StochasticGradientPush):
    def init_client(self, x: Tensor) -> Arrays:
        return {"weight": x}


class Stateless(DSGT):
    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        payload, private = super().end(*arguments)
        return payload, private | {"history": payload["x"]}


class Borrowing(DSGD):
    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"]}


class Reusing(QuasiGlobalMomentum):
    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["momentum"].mul_(0.5)
        return super().step(carry, grad, lr)


class Together(DSGD):
    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        payload, private = super().end(*arguments)
        return {"x": payload["x"] - payload["x"].mean(0)}, private


class Gossiping(DSGD):
    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        return {"x": inbox["x"] - inbox["x"].mean(0)}


class Clipping(DSGD):
    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        return {"x": inbox["x"] / inbox["x"].norm(dim=1, keepdim=True)}


class Dropping(DSGD):
    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        return {}


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (Aliasing, "begin must copy 'x'"),
        (Normalising, "step is not coordinatewise: 'x' differs"),
        (Centring, "end is not row-wise: 'x' of row 0 differs"),
        (Forgetting, "the payload of end has the arrays"),
        (Careless, "update must leave the coordinates alone"),
        (Idle, "update must change the model"),
        (Overwriting, "end must not change 'control'"),
        (Sharing, "payload 'control' must be a copy"),
        (Unknown, "downlink names 'velocity', which init does not return"),
        (Undeclared, "init_client has the arrays"),
        (Wide, "end\\['normaliser'\\] has shape \\(3, 48\\), not \\(3, 1\\)"),
        (Counting, "end is not row-wise: 'normaliser' of row 1 differs"),
        (Misspelt, "has an attribute 'stackabel' that has no effect; did you mean 'stackable'"),
        (Unkept, "init_client has the arrays \\['weight'\\]"),
        (Stateless, "end returned \\['history'\\], unknown to init"),
        (Borrowing, "begin must copy 'x'"),
        (Reusing, "step must not change 'momentum'"),
        (Together, "end is not row-wise: 'x' of row 0 differs"),
        (Gossiping, "update is not row-wise: 'x' of peer 0 differs"),
        (Clipping, "update is not coordinatewise: 'x' differs"),
        (Dropping, "update returned \\[\\]: it must return the models under 'x'"),
    ],
)
def test_broken_algorithms(algorithm: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_algorithm(algorithm({}, momentum=0.9 if algorithm is Reusing else 0.0))
