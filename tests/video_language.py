"""A small workload of moving digits for tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.workloads.multimodal.workload import VideoLanguage

MODEL = {"name": "mplug-2", "stream": 16, "num_heads": 4, "hidden": 24, "vision_blocks": 1, "num_latents": 3}
MODELS: dict[str, dict[str, Any]] = {
    "mplug-2": MODEL,
    "tw-bert": {"name": "tw-bert", "stream": 16, "num_heads": 4, "hidden": 24, "vision_blocks": 1},
    "hitea": {"name": "hitea", "stream": 16, "num_heads": 4, "hidden": 24, "vision_blocks": 1},
    "anchor-captioner": {"name": "anchor-captioner", "stream": 16, "num_heads": 4, "hidden": 24, "vision_blocks": 1},
    "smaug": {"name": "smaug", "stream": 16, "num_heads": 4, "hidden": 24, "vision_blocks": 1},
}
SMALL = {"dataset": {"name": "moving-digits", "num_train": 120, "num_pools": 1}, "model": MODEL}


@cache
def workload(num_clients: int = 4, **options: Any) -> VideoLanguage:
    """Return a small workload; options that are mappings or lists are given as tuples of pairs, or tuples."""
    given = {
        name: dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value
        for name, value in options.items()
    }
    return VideoLanguage(SMALL | given, num_clients=num_clients, partition="iid", seed=0)


def with_model(name: str, num_clients: int = 4, **options: Any) -> VideoLanguage:
    """Return a small workload of one of `MODELS`, changed by the option `model`, pairs of its options."""
    model = MODELS[name] | dict(options.pop("model", ()))
    return workload(num_clients, model=tuple(model.items()), **options)


def merged(made: VideoLanguage, client: int = 0, count: int = 8) -> dict[str, Any]:
    """Return a batch of one client, as `loss` receives it."""
    batch = made.batch(np.array([client]), np.arange(count, dtype=np.int64)[None])
    return {key: value[0] for part in batch for key, value in part.items()} | {"scale": 1.0, "key": torch.tensor(7)}


def nudged(made: VideoLanguage, seed: int = 1) -> dict[str, Tensor]:
    """Return parameters of which none is zero, so that every path carries a gradient."""
    row = made.init(0)
    noise = 0.05 * torch.randn(made.layout.d, generator=torch.Generator().manual_seed(seed))
    return {name: value.clone() for name, value in made.layout.views(row + noise).items()}


def modules(grads: Mapping[str, Tensor | None]) -> set[str]:
    """Return the modules that a gradient reaches."""
    return {name.partition(".")[0] for name, grad in grads.items() if grad is not None and bool(grad.any())}


def gradients(made: VideoLanguage, params: dict[str, Tensor], batch: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return the gradient of the loss by each parameter; None where it does not depend on it."""
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    found = torch.autograd.grad(made.loss(leaves, batch), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))
