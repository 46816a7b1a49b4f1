"""The obvious pieces of local training, one client and one step at a time, to compare the engine with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import rng
from gossamer.build import Parts

AXES = {
    "hidden0.weight": ("hidden0", None),
    "hidden0.bias": ("hidden0",),
    "output.weight": ("label", "hidden0"),
    "output.bias": ("label",),
}


def sample_order(parts: Parts, round: int, client: int, phase: int = 0) -> list[list[int]]:
    """Return the numbers, among the training data, of the samples in each local batch of one client."""
    mine, options = parts.workload.partition.of_client(client), parts.config.train
    batches = []
    for epoch in range(options.epochs):
        clients, sizes = np.array([client]), np.array([len(mine)])
        (order,) = rng.permutations(parts.config.seed, "shuffle", round, phase, clients, sizes, extra=epoch)
        batches += [
            mine[order[at : at + options.batch_size]].tolist() for at in range(0, len(mine), options.batch_size)
        ]
    return batches


def training_samples(parts: Parts, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Return normalised images [b, channels, height, width] and labels [b]."""
    data = parts.workload.data
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (data.mean, data.std))
    images = (data.train_images[numbers].double() - mean) / std
    return images.to(parts.workload.dtype), data.train_labels[numbers]


def evaluation_samples(parts: Parts) -> tuple[Tensor, Tensor]:
    """Return all normalised test images and their labels."""
    data = parts.workload.data
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return (data.test_images.float() - mean) / std, data.test_labels


def perceptron(params: Mapping[str, Tensor], images: Tensor, scale: float = 1.0) -> Tensor:
    """Return the logits of a perceptron with one hidden layer, whose activations are multiplied by `scale`."""
    hidden = F.relu((images.flatten(1) @ params["hidden0.weight"].T + params["hidden0.bias"]) * scale)
    return hidden @ params["output.weight"].T + params["output.bias"]


def initial_model(parts: Parts) -> dict[str, Tensor]:
    """Return the parameters that a run starts from."""
    views = parts.workload.layout.views(parts.workload.init(parts.config.seed))
    return {name: value.clone() for name, value in views.items()}
