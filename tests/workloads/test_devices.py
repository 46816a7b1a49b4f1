"""Losses and gradients of every built-in workload and model where parameters and batches are on another device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.registry import BUILTIN, resolve
from gossamer.workloads.base import Workload

IMAGES = {"dataset": {"name": "synthetic", "num_train": 30, "num_test": 9, "num_labels": 4, "shape": [1, 8, 8]}}
TOKENS = {"dataset": "user_modules:six_tokens"}
TEXTS = {"dataset": {"name": "synthetic", "num_owners": 3, "num_characters": 40, "num_test_characters": 12}}
SMALL = {"preact-resnet18": {"width": 0.0625}, "cnn": {"width": 0.125}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (
            "image-classification",
            (TOKENS if name == "transformer" else IMAGES) | {"model": {"name": name} | SMALL.get(name, {})},
        )
        for name in BUILTIN["model"]
    },
    **{
        f"{name} {cut} {tied}": (
            "next-character",
            TEXTS | {"model": {"name": name, "cut": cut, "tied": tied}, "context": 6},
        )
        for name in BUILTIN["text-model"]
        for cut, tied in (("heads", True), ("head-dim", False))
    },
    **{
        f"a module: {name}": ("image-classification", IMAGES | {"model": f"user_modules:{name}"})
        for name in ("Tied", "HalfFrozen", "ResNet")
    },
    "least-squares": ("least-squares", {"dim": 3, "num_samples": 5}),
    **{
        f"logistic-regression {name}": ("logistic-regression", {"dim": 3, "num_samples": 5, "regulariser": name})
        for name in ("none", "l2", "nonconvex")
    },
    "consensus": ("consensus", {"dim": 3}),
    "shape-groups": ("shape-groups", {"shapes": {"8x8": 1.0}}),
    "audio-visual-digits": ("audio-visual-digits", {"dataset": {"bands": 8, "frames": 8}}),
    "video-language": (
        "video-language",
        {
            "dataset": {"name": "moving-digits", "num_train": 24, "num_pools": 1},
            "model": {"name": "mplug-2", "stream": 16},
        },
    ),
}


def test_every_workload_is_here() -> None:
    assert {workload for workload, _ in CASES.values()} == set(BUILTIN["workload"])


def on_meta(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors without memory."""
    return {name: value.to("meta") for name, value in tensors.items()}


def check(workload: Workload, row: Tensor, layout: Any, stacked: bool) -> None:
    """Check a loss and its gradients where parameters and samples have no memory."""
    clients = np.arange(2, dtype=np.int64)
    num_samples = int(workload.num_samples[:2].min())
    positions = np.tile(np.arange(num_samples), (2, 1))
    if workload.traits.supports_padding and num_samples > 1:
        positions[1, -1] = -1
    samples, constants = workload.batch(clients, positions)
    batch = on_meta(samples | constants)
    rows = row.to("meta").expand(2, -1).clone() if stacked else row.to("meta").clone()
    params = {name: value.requires_grad_() for name, value in layout.views(rows).items()}
    scale = {"scale": 1.5}
    if not stacked:
        loss = workload.loss(params, {name: value[0] for name, value in batch.items()} | scale)
    elif workload.traits.stacks_natively:
        loss = workload.loss(params, batch | scale)
    else:
        loss = torch.vmap(lambda params, batch: workload.loss(params, batch | scale))(params, batch)
    assert loss.shape == ((2,) if stacked else ())
    for grad in torch.autograd.grad(loss.sum(), list(params.values()), allow_unused=True):
        assert grad is None or grad.device.type == "meta"


@pytest.mark.usefixtures("recorded")
@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("label_mask", ["none", "zero", "minus-inf"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, label_mask: str) -> None:
    name, options = CASES[case]
    if "dataset" in options and name not in ("video-language", "audio-visual-digits"):
        options = options | {"label_mask": label_mask}
    elif label_mask != "none":
        pytest.skip("without labels")
    made = resolve("workload", name)
    workload = made(options, num_clients=3, partition="iid", seed=0)
    for capacity in (1.0, 0.5):
        layout = workload.layout.cut(capacity)
        row = torch.zeros(layout.d, dtype=workload.init(0).dtype)
        for stacked in (False, True) if workload.traits.supports_stacking else (False,):
            check(workload, row, layout, stacked)
