"""Image classification over many clients: a data set, a partition, a model, and what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from gossamer import rng
from gossamer.errors import DataError
from gossamer.options import Options, parse_options
from gossamer.submodel.layout import Layout
from gossamer.workloads.augment import crop_flip
from gossamer.workloads.base import Batch, ForwardContext, Params, Sums, Workload, require_model
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.label_sets import MAX_COUNTS, LabelSets, beaten_by, mask_logits
from gossamer.workloads.modules import ModuleModel
from gossamer.workloads.partitions import Partition
from gossamer.workloads.plugins import Spec, call_plug_in, plug_in
from gossamer.workloads.traits import WorkloadTraits

CACHED_IMAGES = 128  # images that are normalised at a time
MANY_SETS = (
    "local_accuracy and worst_client_accuracy are not measured: the clients' distinct sets of classes, times the number"
    f" of classes, are more than {MAX_COUNTS}; set workload.local_evaluation to false to be spared this warning"
)
Ints = NDArray[np.int64]


class ImageOptions(Options):
    """Options of `ImageClassification`.

    Attributes:
        dataset: name of a data set, or a mapping of ``name`` and its options.
        model: name of a model, or a mapping of ``name`` and its options; a `torch.nn.Module` class of your own will do,
            see `gossamer.workloads.modules.ModuleModel`.
        label_mask: what the training loss does with classes that the client does not hold: ``"none"`` (the default: all
            logits count), ``"zero"`` (their logits become 0, as in HeteroFL's code) or ``"minus-inf"`` (left out).
        augment: ``"none"`` or ``"crop-flip"``.
        evaluation_chunk: most samples that are evaluated at a time.
        statistics_chunk: most samples by whose moments a static-BatchNorm pass normalises at a time.
        local_evaluation: whether each client's accuracy on its own classes is measured.
    """

    dataset: Spec = "digits"
    model: Spec = "mlp"
    label_mask: Literal["none", "zero", "minus-inf"] = "none"
    augment: Literal["none", "crop-flip"] = "none"
    evaluation_chunk: int = Field(1000, ge=1)
    statistics_chunk: int = Field(500, ge=1)
    local_evaluation: bool = True


class ImageClassification(Workload):
    """Classification of images [channels, height, width]; see `base.Workload` for the attributes and methods.

    Raises (when built):
        ConfigError: an unknown or wrong option, or a plug-in that does not take it.
        DataError: the data is missing or malformed, or cannot be divided as asked.
    """

    Options = ImageOptions
    traits = WorkloadTraits()

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_clients: int,
        partition: Mapping[str, Any] | str,
        seed: int,
        data: ImageData | None = None,
    ) -> None:
        """Load the data, divide it and lay out the model.

        Args:
            options: see `ImageOptions`.
            num_clients: how many clients share the training data.
            partition: name of a partition, or a mapping of ``name`` and its parameters.
            seed: of the partition and of augmentation.
            data: if it is loaded already.
        """
        self.options = parse_options(ImageOptions, options, "workload")
        self.num_clients = num_clients
        self.seed = seed
        self.data = self._load_data() if data is None else data
        self.partition = self._divide(partition)
        self.num_samples = self.partition.num_samples
        self.num_labels = self.data.num_labels
        name, model_class, params = plug_in("model", self.options.model, "workload.model")
        self.model = call_plug_in(model_class, "workload.model", self.data.shape, self.num_labels, **params)
        if isinstance(self.model, nn.Module):
            build = partial(model_class, self.data.shape, self.num_labels, **params)
            self.model = ModuleModel(build, self.data.shape, self.num_labels)
        require_model(f"workload.model {name!r}", self.model)
        self.layout = Layout.of(self.model.shapes, self.model.axes)
        mixes_samples = bool(self.model.norms)
        own, model = type(self), self.model.traits
        self.traits = replace(
            self.traits,
            supports_padding=self.traits.supports_padding and not mixes_samples,
            supports_stacking=self.traits.supports_stacking and model.supports_stacking,
            stacks_natively=model.stacks_natively,
            has_images=model.has_images,
            # whether the loss is this class's own, which asks for no gradient itself
            leaves_products=own.loss is ImageClassification.loss and own.logits is ImageClassification.logits,
        )
        self.num_evaluation_chunks = _num_chunks(len(self.data.test_labels), self.options.evaluation_chunk)
        self.num_statistics_chunks = (
            _num_chunks(len(self.data.train_labels), self.options.statistics_chunk) if mixes_samples else 0
        )
        self._mean = torch.tensor(self.data.mean).view(-1, 1, 1)
        self._inverse_std = 1 / torch.tensor(self.data.std).view(-1, 1, 1)
        self._is_normal = set(self.data.mean) == {0.0} and set(self.data.std) == {1.0}
        self._histogram = self._count_labels()
        self._label_sets = LabelSets.of(self._histogram) if self.options.local_evaluation else None
        self.warnings = (MANY_SETS,) if self.options.local_evaluation and self._label_sets is None else ()

    def _load_data(self) -> ImageData:
        name, function, params = plug_in("dataset", self.options.dataset, "workload.dataset")
        data = call_plug_in(function, "workload.dataset", params)
        if not isinstance(data, ImageData):
            raise DataError(
                f"data set {name!r} returned {type(data).__name__}: return gossamer.workloads.datasets.ImageData"
            )
        return data

    def _divide(self, spec: Mapping[str, Any] | str) -> Partition:
        name, function, params = plug_in("partition", spec, "clients.partition")
        labels = self.data.train_labels.numpy()
        owner = None if self.data.owner is None else self.data.owner.numpy()
        made = call_plug_in(
            function, "clients.partition", labels, self.num_clients, self.data.num_labels, self.seed, owner, **params
        )
        if not isinstance(made, Partition):
            raise DataError(
                f"partition {name!r} returned {type(made).__name__}: return gossamer.workloads.partitions.Partition"
            )
        return made.checked(name, self.num_clients, len(labels))

    def _count_labels(self) -> NDArray[np.int32]:
        """Count the training samples of each client and class, int32 [num_clients, num_labels]."""
        client = np.repeat(np.arange(self.num_clients), self.num_samples)
        cell = client * self.num_labels + self.data.train_labels.numpy()[self.partition.indices]
        counts = np.bincount(cell, minlength=self.num_clients * self.num_labels)
        return counts.astype(np.int32).reshape(self.num_clients, self.num_labels)

    def init(self, seed: int) -> Tensor:
        """Return initial parameters as a flat float32 row [d]."""
        return self.layout.flatten(self.model.init(rng.generator(seed, "init-model")))

    def batch(self, clients: Ints, positions: Ints, round: int = 0) -> Batch:
        """Assemble normalised samples for a block of clients.

        Args:
            clients: int64 [s].
            positions: int64 [s, m], sample numbers within each client's own data; -1 is padding.
            round: round number, by which augmentation is drawn.

        Returns:
            samples ``"x"``: float32 [s, m, C, H, W], ``"y"``: int64 [s, m] and, only where a row is padded,
            ``"mask"``: float32 [s, m]; client constants ``"labels"``: bool [s, num_labels], the classes of the client's
            data. A padded sample is a zero image of class 0.

        Raises:
            IndexError: a position beyond the client's samples.
        """
        if (positions >= self.num_samples[clients][:, None]).any():
            raise IndexError(
                f"a position exceeds the samples {self.num_samples[clients].tolist()} of clients {clients.tolist()}"
            )
        padding = positions < 0
        rows = self.partition.indices[self.partition.offsets[clients][:, None] + np.maximum(positions, 0)]
        picked = torch.from_numpy(rows.reshape(-1))
        images = self.data.train_images.index_select(0, picked)
        if self.options.augment == "crop-flip":
            images = crop_flip(images, rows.reshape(-1), self.seed, round)
        samples = {
            "x": self._normalised(images, is_own=True).view(*rows.shape, *self.data.shape),
            "y": self.data.train_labels.index_select(0, picked).view(rows.shape),
        }
        if padding.any():
            absent = torch.from_numpy(np.flatnonzero(padding))
            samples["x"].view(rows.size, -1).index_fill_(0, absent, 0.0)
            samples["y"].view(-1).index_fill_(0, absent, 0)
            samples["mask"] = torch.from_numpy((~padding).astype(np.float32))
        return Batch(samples, {"labels": self.client_labels(clients)})

    def client_labels(self, clients: Ints) -> Tensor:
        """Return bool [s, num_labels]: the classes of each client's training data."""
        return torch.from_numpy(self._histogram[clients] > 0)

    def _normalised(self, images: Tensor, *, is_own: bool = False, channels_last: bool = False) -> Tensor:
        """Return float32 images of mean 0 and deviation 1 a channel, made in pieces that stay in the cache.

        Args:
            is_own: `images` may be overwritten.
        """
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if self._is_normal and images.dtype == torch.float32:
            return images.contiguous(memory_format=memory_format)
        in_place = is_own and images.dtype == torch.float32 and images.is_contiguous(memory_format=memory_format)
        normal = images if in_place else torch.empty(images.shape, memory_format=memory_format)
        for start in range(0, len(images), CACHED_IMAGES):
            part = slice(start, start + CACHED_IMAGES)
            piece = normal[part] if in_place else normal[part].copy_(images[part])
            piece.sub_(self._mean).mul_(self._inverse_std)
        return normal

    def loss(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the cross entropy, averaged over the samples that are not padding (0 if there are none).

        Args:
            params: parameters of the (sub-)model.
            batch: ``"x"``, ``"y"``, ``"labels"`` and optionally ``"mask"`` of `batch`, without the leading s, and
                optionally ``"scale"``.
        """
        return self.loss_of_logits(self.logits(params, batch), batch)

    def logits(self, params: Params, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits float32 [b, num_labels] of a training batch, masked as `ImageOptions.label_mask` says."""
        logits: Tensor = self.model.apply(params, batch["x"], ForwardContext(batch.get("scale", 1.0)))
        return mask_logits(logits, batch["labels"].unsqueeze(-2), self.options.label_mask)

    def loss_of_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return what `loss` does, from the batch's `logits`."""
        # The same as F.cross_entropy, which under vmap is put together from slow parts.
        losses = -F.log_softmax(logits, dim=-1).gather(-1, batch["y"][..., None]).squeeze(-1)
        mask: Tensor | None = batch.get("mask")
        if mask is None:
            return losses.mean(-1)
        return torch.where(mask > 0, losses, 0.0).sum(-1) / mask.sum(-1).clamp_min(1.0)

    @torch.no_grad()
    def statistics(self, params: Params, chunk: int) -> dict[str, Tensor]:
        """Return BatchNorm sums over a chunk of the training data, see `ForwardContext`; {} without BatchNorm.

        The chunk itself is normalised by its own moments on its way through the network.
        """
        sums: dict[str, Tensor] = {}
        if self.num_statistics_chunks:
            part = _chunk(len(self.data.train_labels), self.num_statistics_chunks, chunk)
            self.model.apply(params, self._forward_only(self.data.train_images[part]), ForwardContext(record=sums))
        return sums

    def _forward_only(self, images: Tensor) -> Tensor:
        """Return normalised images in the memory format in which convolutions are quicker without gradients."""
        return self._normalised(images, channels_last=self.traits.has_images)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over a chunk of the test data.

        Args:
            params: parameters of the (sub-)model.
            statistics: added-up `statistics` of all training chunks; {} without BatchNorm.
            chunk: number of the chunk.

        Returns:
            ``"loss"``, ``"correct"``, ``"count"``: float64 [1]; with local evaluation also ``"tested"``: float64
            [num_labels] and ``"local_correct"``: float64 [label sets, num_labels], see `LabelSets`.
        """
        part = _chunk(len(self.data.test_labels), self.num_evaluation_chunks, chunk)
        labels = self.data.test_labels[part]
        context = ForwardContext(statistics=statistics)
        logits = self.model.apply(params, self._forward_only(self.data.test_images[part]), context)
        beaten = beaten_by(logits, labels)
        sums = {
            "loss": F.cross_entropy(logits, labels, reduction="none").sum(dtype=torch.float64),
            "correct": (~beaten).all(dim=1).sum(),
            "count": torch.tensor(len(labels)),
        }
        arrays: Sums = {name: value.to(torch.float64).reshape(1).numpy() for name, value in sums.items()}
        if self._label_sets is not None:
            arrays["tested"] = np.bincount(labels.numpy(), minlength=self.num_labels).astype(np.float64)
            arrays["local_correct"] = self._label_sets.correct(beaten, labels)
        return arrays

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Turn added-up sums into metrics.

        Returns:
            ``accuracy`` and ``loss`` on the whole test data; with local evaluation also ``local_accuracy`` and
            ``worst_client_accuracy``, the mean and the least of the clients' accuracies on their own classes. These two
            are left out where distinct label sets are too many, see `warnings`.
        """
        count = float(sums["count"][0])
        found = {"accuracy": float(sums["correct"][0]) / count, "loss": float(sums["loss"][0]) / count}
        if self._label_sets is not None:
            local = self._label_sets.accuracies(sums["local_correct"], sums["tested"])
            if len(local):
                found |= {"local_accuracy": float(local.mean()), "worst_client_accuracy": float(local.min())}
        return found


def _num_chunks(total: int, largest: int) -> int:
    return -(-total // largest)


def _chunk(total: int, num_chunks: int, chunk: int) -> slice:
    """Return one of `num_chunks` slices of ``range(total)`` whose sizes differ by one at most."""
    return slice(total * chunk // num_chunks, total * (chunk + 1) // num_chunks)
