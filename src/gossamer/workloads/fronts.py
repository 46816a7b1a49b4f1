"""Clients whose samples have different shapes: fronts of their own, and a block that all of them share (FLEEG)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.submodel.layout import LABEL_AXIS
from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, Batch, ForwardContext, Model, Params, Sums
from gossamer.workloads.digests import digest_of
from gossamer.workloads.features import linear
from gossamer.workloads.holdings import Holding, assigned
from gossamer.workloads.images import ImageClassification, ImageOptions
from gossamer.workloads.models import WHERE, DeclaredModel, ModelOptions, rescale
from gossamer.workloads.plugins import Spec
from gossamer.workloads.supervised import Ints, Request, SupervisedOptions, chunk_of
from gossamer.workloads.traits import ModelTraits

FRONT, DEEP = "front", "deep"
SIDES = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")
Shape = tuple[int, int, int]


class FrontedOptions(ModelOptions):
    """Options of `FrontedMLP`. Attributes: front: units that every front ends in; hidden: those of the deep layers."""

    front: int = Field(32, ge=1)
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (64,)


class FrontedMLP(DeclaredModel):
    """Perceptron with a first layer for each shape of samples, its front, and deep layers that are the same for all.

    Which front a sample goes through follows from its shape. Parameters are called ``front<height>x<width>.*``, a
    module each, and ``deep.*``. A capacity below 1 cuts the hidden widths of the deep block; what a front ends in stays
    whole, so that fronts of clients of every size have the same width.

    Attributes:
        shapes_of_samples: ``{"<height>x<width>": (channels, height, width)}``.
    """

    traits = ModelTraits(adaptable=True)
    Options = FrontedOptions

    def __init__(self, input_shape: Any, num_labels: int, **params: Any) -> None:
        """Declare the parameters.

        Args:
            input_shape: channels, height and width of an image, or a list of several such shapes.
            num_labels: number of classes.
            params: see `FrontedOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or samples that are no images.
        """
        super().__init__()
        options = parse_options(FrontedOptions, params, WHERE)
        given = input_shape if isinstance(input_shape[0], Sequence) else [input_shape]
        if any(len(shape) != 3 for shape in given):
            raise ConfigError(f"{WHERE} 'fronted' is for images [channels, height, width], not {input_shape}")
        self.shapes_of_samples = {name_of(shape): tuple(shape) for shape in given}
        for name, shape in self.shapes_of_samples.items():
            self.add(f"{FRONT}{name}.layer", (options.front, math.prod(shape)), (None, None))
        size, axis = options.front, None
        self.hidden = tuple(f"{DEEP}.hidden{i}" for i in range(len(options.hidden)))
        for layer, width in zip(self.hidden, options.hidden, strict=True):
            length = window_length(width, options.width)
            self.add(layer, (length, size), (layer, axis))
            size, axis = length, layer
        self.add(f"{DEEP}.output", (num_labels, size), (LABEL_AXIS, axis))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits float32 [b, num_labels] of images of one shape, see `gossamer.workloads.base.Model`."""
        x = linear(params, f"{FRONT}{name_of(x.shape)}.layer", x.flatten(-3)).relu()
        for layer in self.hidden:
            x = rescale(linear(params, layer, x), context.scale).relu()
        return linear(params, f"{DEEP}.output", x)


class ShapeGroupsOptions(ImageOptions):
    """Options of `ShapeGroups`, besides those of `ImageClassification`.

    Attributes:
        model: one whose fronts follow the samples' shapes, such as `fronted`, see `FrontedMLP`.
        shapes: ``{"<height>x<width>": share of the clients whose images have that size}``.
        local_evaluation: not there; each client's own model is measured as ``accuracy_personal``.
    """

    model: Spec = "fronted"
    shapes: dict[str, float] = {"8x8": 0.5, "12x12": 0.5}
    local_evaluation: Literal[False] = False


class ShapeGroups(ImageClassification):
    """Images of a size of their own at each group of clients, who share all of a model but its front (FLEEG).

    So clients of differently shaped recordings learn together: the front, whose weights depend on the shape, is of each
    client alone and never travels; the deep block, whose shapes are the same for all, is averaged (FLEEG, Liu et al.,
    arXiv 2308.11636, of EEG devices with unequal channels). Here images of any data set are brought to the client's
    size by bilinear interpolation. Windows roll over the deep block.

    The server has no fronts but those that everybody starts from, so what counts are the clients' own models:
    ``accuracy_personal``, on all test images in the size of the client.

    Example:
        ``workload: {name: shape-groups, shapes: {8x8: 0.5, 12x12: 0.5}}``, ``algorithm: fedavg``.

    Raises (when built):
        ConfigError: an unknown or wrong option, a size that is none, or a model without fronts.
        DataError: the data is missing or malformed, or cannot be divided as asked.
    """

    Options: ClassVar[type[SupervisedOptions]] = ShapeGroupsOptions

    def __init__(self, options: Mapping[str, Any], *, num_clients: int, seed: int, **given: Any) -> None:
        """Load the data, give every client its size, and lay out the model, see `Supervised`."""
        super().__init__(options, num_clients=num_clients, seed=seed, **given)
        if self.options.frozen or self.options.lora is not None:
            raise ConfigError(
                "workload.frozen and workload.lora do not go with shape-groups, whose fronts start anew at each client:"
                " leave them out"
            )
        shares = list(self.options.shapes.values())
        self._shape_of_client = assigned(shares, num_clients, seed, "assign-shapes")
        names = list(self.options.shapes)
        self.holdings = tuple(Holding(name, frozenset({f"{FRONT}{name}", DEEP})) for name in names)
        self.personal = tuple(name for name in self.layout.names if name.startswith(FRONT))

    def _prepare(self) -> tuple[Ints, int, Ints | None]:
        found = super()._prepare()
        if len(self.data.shape) != 3 or self._has_tokens:
            raise ConfigError(
                f"workload 'shape-groups' is for images [channels, height, width], but samples have the shape"
                f" {self.data.shape}: choose another dataset"
            )
        self._sizes = {name: (self.data.shape[0], *sides_of(name)) for name in self.options.shapes}
        if not self._sizes or min(self.options.shapes.values()) <= 0:
            raise ConfigError(f"workload.shapes = {self.options.shapes}: give sizes, each with a share above 0")
        self._input_size = tuple(self._sizes.values())
        return found

    @classmethod
    def _make_model(cls, asked: Request) -> Model:
        if not (isinstance(asked.function, type) and issubclass(asked.function, FrontedMLP)):
            raise ConfigError(
                "workload.model has no fronts for samples of different shapes: take fronted, or a class derived from it"
            )
        return super()._make_model(asked)

    def digest(self) -> str:
        """Return a digest of the data, their partition, and who has which size."""
        return digest_of(super().digest(), self._shape_of_client.astype(np.int64))

    def client_holdings(self, clients: Ints) -> NDArray[np.int16]:
        """Return int16 [s]: the number among `holdings` of each client's front and the deep block."""
        return self._shape_of_client[clients]

    def batch(self, clients: Ints, positions: Ints, round: int = 0, phase: int = 0) -> Batch:
        """Assemble samples for a block of clients of the same size, see `Supervised`; ``"x"`` is of that size."""
        found = super().batch(clients, positions, round, phase)
        size = list(self._sizes.values())[self._shape_of_client[clients[0]]]
        return Batch({**found.samples, "x": resized(found.samples["x"], size)}, found.client)

    @torch.no_grad()
    def evaluate(self, params: Params, statistics: Mapping[str, Tensor], chunk: int) -> Sums:
        """Return sums over a chunk of the test data in each size whose front is there.

        Returns:
            ``"loss"``, ``"correct"``, ``"count"``: float64 [1] over all sizes, and ``"correct.<size>"``,
            ``"count.<size>"`` of each.
        """
        part = chunk_of(len(self.data.test_labels), self.num_evaluation_chunks, chunk)
        labels, images = self.data.test_labels[part], self._forward_only(self.data.test_images[part])
        sums = {name: np.zeros(1) for name in ("loss", "correct", "count")}
        for name, size in self._sizes.items():
            if not any(one.startswith(f"{FRONT}{name}.") for one in params):
                continue
            logits = self.model.apply(params, resized(images, size), ForwardContext(training=False))
            sums["loss"] = sums["loss"] + float(F.cross_entropy(logits, labels, reduction="sum").double())
            sums[f"correct.{name}"] = np.array([float((logits.argmax(-1) == labels).sum())])
            sums[f"count.{name}"] = np.array([float(len(labels))])
            for total in ("correct", "count"):
                sums[total] = sums[total] + sums[f"{total}.{name}"]
        return sums

    def measured(self, sums: Sums) -> dict[str, float]:
        """Return ``accuracy`` and ``loss`` over the sizes that were measured, and ``accuracy_<size>`` of each."""
        counted = {name: float(sums[f"count.{name}"].sum()) for name in self._sizes if f"count.{name}" in sums}
        each = {f"accuracy_{name}": float(sums[f"correct.{name}"].sum()) / count for name, count in counted.items()}
        return {name: value for name, value in super().measured(sums).items() if math.isfinite(value)} | each


def name_of(shape: Sequence[int]) -> str:
    """Return what images [..., height, width] of a size are called."""
    return f"{shape[-2]}x{shape[-1]}"


def sides_of(name: str) -> tuple[int, int]:
    """Return height and width of a size's name.

    Raises:
        ConfigError: it is none.
    """
    if (found := SIDES.fullmatch(name)) is None:
        raise ConfigError(f"workload.shapes names {name!r}, which is no size: give height and width, such as 8x12")
    return int(found[1]), int(found[2])


def resized(images: Tensor, size: Shape) -> Tensor:
    """Return images [..., channels, height, width] in a size, by bilinear interpolation where it is another one."""
    if tuple(images.shape[-3:]) == size:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    found = F.interpolate(flat, size=size[1:], mode="bilinear", align_corners=False)
    return found.reshape(*images.shape[:-3], *size)
