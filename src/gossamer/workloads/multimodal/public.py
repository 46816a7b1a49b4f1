"""Pairs of samples that everybody has, and what the server and clients of unequal models make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer import rng
from gossamer.workloads.base import Params
from gossamer.workloads.multimodal.architectures import Family
from gossamer.workloads.multimodal.encoders import Classifier
from gossamer.workloads.multimodal.objectives import contrastive, contrastive_logits
from gossamer.workloads.supervised import cross_entropies

SERVER, PUBLIC = "server_", "public_"  # before the names of modules
TEMPERATURE = 0.1  # of the server's contrast


@dataclass(frozen=True, eq=False)
class PublicPairs:
    """The public pairs and the server's model; a `gossamer.algorithms.creamfl.PublicSet`.

    Attributes:
        client: models of clients.
        server: the server's model, whose modules have the prefix `SERVER`.
        samples: ``{modality: float32 [P, ...]}``, normalised.
        labels: int64 [P], which the server knows.
    """

    client: Classifier | Family
    server: Classifier
    samples: Mapping[str, Tensor]
    labels: Tensor

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(self.samples)

    @property
    def num_samples(self) -> int:
        """Number of public pairs."""
        return len(self.labels)

    @property
    def entries(self) -> dict[str, str]:
        """``{modality: name of the layout's entry}`` of representations."""
        return {name: f"{PUBLIC}{name}.representations" for name in self.samples}

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of these entries."""
        return tuple(PUBLIC + name for name in self.samples)

    @property
    def server_modules(self) -> tuple[str, ...]:
        """Modules of the server's model."""
        return self.server.modules

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a layout has besides clients' models."""
        return dict.fromkeys(self.entries.values(), (self.num_samples, self.client.width)) | self.server.shapes

    @property
    def axes(self) -> dict[str, tuple[object, ...]]:
        """Axes of the same, of which none is ever cut."""
        return {name: (None,) * len(shape) for name, shape in self.shapes.items()}

    def init(self, seed: int) -> dict[str, Tensor]:
        """Return the server's initial model, and representations of zeros."""
        zeros = {name: torch.zeros(self.num_samples, self.client.width) for name in self.entries.values()}
        return zeros | self.server.init(rng.generator(seed, "init-server"))

    def held(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the modalities of which a client whose parameters have these names has an encoder."""
        return self.client.held(names)

    def model_of(self, params: Params) -> Classifier | Family:
        """Return whose parameters these are: the server's, if its are among them, or a client's."""
        return self.server if any(name.startswith(SERVER) for name in params) else self.client

    def represent(self, params: Params, modality: str, rows: Tensor) -> Tensor:
        """Return representations float32 [r, width] of length 1 of samples int64 [r], on the parameters' device."""
        device = next(iter(params.values())).device
        x = self.samples[modality][rows.to(self.labels.device)].to(device)
        return F.normalize(self.model_of(params).encode(params, modality, x), dim=-1)

    def server_loss(self, params: Params, rows: Tensor) -> Tensor:
        """Return the cross entropies of all heads, and the contrast of pairs: equal digits are no negatives."""
        labels, model = self.labels[rows], self.server
        encoded = {name: model.encode(params, name, values[rows]) for name, values in self.samples.items()}
        losses = [cross_entropies(one, labels).mean() for one in model.heads(params, encoded).values()]
        first, second = (F.normalize(value, dim=-1) for value in encoded.values())
        every = torch.ones(len(rows), dtype=torch.bool)
        logits = contrastive_logits(first, second, labels[:, None] == labels, every, TEMPERATURE)
        return torch.stack([*losses, contrastive(logits).mean()]).sum()
