"""The checks for plug-in authors: what ships here passes, and every way of breaking the contract is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from faulty import Faulty
from torch import Tensor

from contract import check_algorithm, check_workload
from gossamer.algorithms.base import Algorithm, Arrays
from gossamer.algorithms.federated import FedAvg, FedRolex
from gossamer.algorithms.fednova import FedNova
from gossamer.algorithms.fedopt import FedAdagrad, FedAdam, FedYogi
from gossamer.algorithms.fedprox import FedProx
from gossamer.algorithms.scaffold import Scaffold
from gossamer.submodel import Layout
from gossamer.workloads.base import Batch
from gossamer.workloads.images import ImageClassification

LAYOUT = Layout.of({"w": (3, 5), "b": (3,), "v": (2, 3)}, {"w": ("h", None), "b": ("h",), "v": ("label", "h")})
DATA = {"name": "synthetic", "num_train": 75, "num_test": 30, "num_labels": 4, "shape": [2, 8, 8]}
MODELS = {
    "softmax": "softmax",
    "mlp": {"name": "mlp", "hidden": [16, 8]},
    "cnn": {"name": "cnn", "width": 0.125},
    "preact-resnet18": {"name": "preact-resnet18", "width": 0.0625},
}


def build(kind: type[ImageClassification] = ImageClassification, **options: Any) -> ImageClassification:
    chosen = {"dataset": DATA, "model": MODELS["mlp"], "evaluation_chunk": 11, "statistics_chunk": 40} | options
    return kind(chosen, num_clients=4, partition={"name": "n-classes", "n": 2}, seed=0)


class TestWhatShips:
    @pytest.mark.parametrize("model", MODELS)
    def test_models(self, model: str) -> None:
        check_workload(build(model=MODELS[model]))

    @pytest.mark.parametrize(
        "options", [{"label_mask": "zero"}, {"label_mask": "minus-inf"}, {"augment": "crop-flip"}], ids=str
    )
    def test_options(self, options: dict[str, Any]) -> None:
        check_workload(build(**options))

    def test_a_plug_in(self) -> None:
        check_workload(build(Faulty))

    @pytest.mark.parametrize(
        "algorithm",
        [
            FedAvg({}),
            FedAvg({}, momentum=0.9, weight_decay=0.1),
            FedAvg({"server_lr": 0.5, "server_momentum": 0.9}),
            FedRolex({}),
            FedProx({"mu": 0.5}, momentum=0.9, weight_decay=0.1),
            Scaffold({"server_lr": 0.5}, weight_decay=0.1),
            FedNova({}),
            FedNova({"mu": 0.5, "server_momentum": 0.9}, momentum=0.9),
            FedAdam({}),
            FedYogi({}, momentum=0.9),
            FedAdagrad({"beta1": 0.5}),
        ],
        ids=lambda algorithm: type(algorithm).__name__,
    )
    def test_algorithms(self, algorithm: Algorithm) -> None:
        check_algorithm(algorithm, LAYOUT)


# ---- broken workloads: one method replaced


def with_samples(change: Any) -> dict[str, Any]:
    """Return a `batch` whose samples go through `change`."""

    def batch(self: Any, clients: Any, positions: Any, round: int = 0) -> Batch:
        samples, constants = ImageClassification.batch(self, clients, positions, round)
        return Batch(change(samples), constants)

    return {"batch": batch}


def with_loss(change: Any) -> dict[str, Any]:
    return {"loss": lambda self, params, batch: change(ImageClassification.loss(self, params, batch), params, batch)}


def with_sums(change: Any) -> dict[str, Any]:
    def evaluate(self: Any, params: Any, statistics: Any, chunk: int) -> Any:
        return change(ImageClassification.evaluate(self, params, statistics, chunk), params)

    return {"evaluate": evaluate}


def random_init(self: Any, seed: int) -> Tensor:
    return ImageClassification.init(self, np.random.default_rng().integers(1000))


def one_batch_for_all(self: Any, clients: Any, positions: Any, round: int = 0) -> Batch:
    samples, constants = ImageClassification.batch(self, clients, positions, round)
    return Batch({"x": samples["x"] - samples["x"].mean()} | {"y": samples["y"]}, constants)


def spoiling_loss(self: Any, params: Any, batch: Any) -> Tensor:
    batch["x"].mul_(1.1)
    return ImageClassification.loss(self, params, batch)


BROKEN_WORKLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": ({"num_samples": np.ones(4)}, "num_samples must be int64"),
    "empty": ({"num_samples": np.array([3, 0, 1, 1])}, "client 1 has 0 training samples"),
    "clients": ({"num_clients": 5}, "num_samples has shape"),
    "flags": ({"supports_stacking": 1}, "supports_stacking must be True or False"),
    "seed": ({"init": random_init}, "init must depend on the seed alone"),
    "type": ({"init": lambda self, seed: torch.zeros(self.layout.d).half()}, "init must return float32 or"),
    "length": ({"init": lambda self, seed: torch.zeros(self.layout.num_parameters + 1)}, "init returned shape"),
    "gaps": ({"init": lambda self, seed: torch.ones(self.layout.d)}, "numbers between parameters"),
    "labels": ({"client_labels": lambda self, c: torch.ones(len(c), 4)}, "client_labels must be bool"),
    "order": ({"client_labels": lambda self, c: torch.eye(4).bool()[: len(c)]}, "depend on the others in the call"),
    "shapes": (with_samples(lambda s: s | {"y": s["y"].flatten()}), "batch sample 'y' has shape"),
    "noise": (with_samples(lambda s: s | {"x": s["x"] + torch.rand(())}), "batch must depend on its arguments alone"),
    "neighbours": ({"batch": one_batch_for_all}, "how many are asked for"),
    "no mask": (with_samples(lambda s: {k: v for k, v in s.items() if k != "mask"}), "must have the key 'mask'"),
    "mask": (with_samples(lambda s: {k: 1 - v if k == "mask" else v for k, v in s.items()}), "1 for samples and 0"),
    "padding": (
        with_samples(lambda s: s | ({"x": s["x"] * s["mask"].log()[..., None, None, None]} if "mask" in s else {})),
        "padding changes the samples 'x'|padding of 'x' must be finite",
    ),
    "vector": (with_loss(lambda loss, p, b: loss[None]), "loss must be a scalar"),
    "nan": (with_loss(lambda loss, p, b: loss * float("nan")), "loss is nan on the initial model"),
    "detached": (with_loss(lambda loss, p, b: loss.detach()), "loss must be differentiable"),
    "random loss": (with_loss(lambda loss, p, b: loss * (1 + torch.rand(()))), "loss must depend on its arguments"),
    "changed batch": ({"loss": spoiling_loss}, "loss must not change the batch"),
    "python branch": (
        with_loss(lambda loss, p, b: loss * 2 if b["y"].sum() > 3 else loss),
        "under torch.vmap: correct it",
    ),
    "sum of clients": (
        with_loss(lambda loss, p, b: loss if loss.dim() == 0 else loss.sum()),
        r"loss has shape \(\), not one entry a client, of several clients in one call",
    ),
    "mean of clients": (
        with_loss(lambda loss, p, b: loss if loss.dim() == 0 else (loss + loss.mean()) / 2),
        "loss is another of several clients in one call",
    ),
    "no padding": (
        {"loss": lambda self, p, b: ImageClassification.loss(self, p, {k: v for k, v in b.items() if k != "mask"})},
        "loss must leave out what the mask marks as padding",
    ),
    "float32 sums": (with_sums(lambda s, p: s | {"loss": s["loss"].astype(np.float32)}), "'loss' must be float64"),
    "metrics": (
        {"metrics": lambda self, sums: {"correct": float(sums["correct"][0])}},
        "if all test data counts",
    ),
    "changed model": (with_sums(lambda s, p: (p["hidden0.bias"].fill_(1.0), s)[1]), "not change the param|repeat"),
}


@pytest.mark.parametrize("name", BROKEN_WORKLOADS)
def test_broken_workloads(name: str) -> None:
    changes, message = BROKEN_WORKLOADS[name]
    methods = {key: value for key, value in changes.items() if callable(value)}
    workload = build(type("Broken", (ImageClassification,), methods))
    for key in changes.keys() - methods.keys():
        setattr(workload, key, changes[key])
    with pytest.raises(AssertionError, match=message):
        check_workload(workload)


def test_a_claim_that_does_not_hold() -> None:
    """BatchNorm mixes samples, so padding matters, whatever the workload says."""
    workload = build(model=MODELS["preact-resnet18"])
    workload.supports_padding = True
    with pytest.raises(AssertionError, match="loss must leave out what the mask marks as padding"):
        check_workload(workload)


# ---- broken algorithms


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
    ],
)
def test_broken_algorithms(algorithm: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_algorithm(algorithm({}), LAYOUT)
