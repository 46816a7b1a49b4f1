"""The contract of workloads: what ships here passes, and every way of breaking it is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from faulty import Faulty
from torch import Tensor

from gossamer.testing import check_workload
from gossamer.workloads.base import Batch
from gossamer.workloads.images import ImageClassification

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


# ---- broken workloads: one method replaced


def with_samples(change: Any) -> dict[str, Any]:
    """Return a `batch` whose samples go through `change`."""

    def batch(self: Any, clients: Any, positions: Any, round: int = 0, phase: int = 0) -> Batch:
        samples, constants = ImageClassification.batch(self, clients, positions, round, phase)
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


def one_batch_for_all(self: Any, clients: Any, positions: Any, round: int = 0, phase: int = 0) -> Batch:
    samples, constants = ImageClassification.batch(self, clients, positions, round, phase)
    return Batch({"x": samples["x"] - samples["x"].mean()} | {"y": samples["y"]}, constants)


def spoiling_loss(self: Any, params: Any, batch: Any) -> Tensor:
    batch["x"].mul_(1.1)
    return ImageClassification.loss(self, params, batch)


BROKEN_WORKLOADS: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": ({"num_samples": np.ones(4)}, "num_samples must be int64"),
    "empty": ({"num_samples": np.array([3, 0, 1, 1])}, "client 1 has 0 training samples"),
    "clients": ({"num_clients": 5}, "num_samples has shape"),
    "flags": ({"supports_stacking": False}, "states 'supports_stacking' beside its traits"),
    "seed": ({"init": random_init}, "init must depend on the seed alone"),
    "whole": ({"params_of": lambda self, row: {}}, "params_of must return all parameters"),
    "type": ({"init": lambda self, seed: torch.zeros(self.layout.d).half()}, "init must return float32 or"),
    "length": ({"init": lambda self, seed: torch.zeros(self.layout.num_parameters + 1)}, "init returned shape"),
    "gaps": ({"init": lambda self, seed: torch.ones(self.layout.d)}, "numbers between parameters"),
    "labels": ({"client_labels": lambda self, c: torch.ones(len(c), 4)}, "client_labels must be bool"),
    "order": ({"client_labels": lambda self, c: torch.eye(4).bool()[: len(c)]}, "depend on the others in the call"),
    "shapes": (with_samples(lambda s: s | {"y": s["y"].flatten()}), "batch sample 'y' has shape"),
    "noise": (with_samples(lambda s: s | {"x": s["x"] + torch.rand(())}), "batch must depend on its arguments alone"),
    "neighbours": ({"batch": one_batch_for_all}, "must not depend on (its neighbours|how many)"),
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
        "loss has another value of several clients in one call",
    ),
    "mask at all times": (
        with_samples(lambda s: {"mask": torch.ones(s["y"].shape)} | s)
        | with_loss(lambda loss, p, b: loss + 0 * b["mask"].sum()),
        "loss must do without batch",
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
    workload.traits = replace(workload.traits, supports_padding=True)
    with pytest.raises(AssertionError, match="loss must leave out what the mask marks as padding"):
        check_workload(workload)
