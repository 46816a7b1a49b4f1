"""Vision transformers of images: one that is trained as a whole, and FedIns, whose frozen one is adapted by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.submodel.layout import LABEL_AXIS
from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.features import Modulated, linear, normalised
from gossamer.workloads.models import WHERE, DeclaredModel, ModelOptions
from gossamer.workloads.multimodal.blocks import Cut, Layer, Patches, glorot
from gossamer.workloads.starting import load_parameters
from gossamer.workloads.traits import ModelTraits

BACKBONE = "backbone"  # prefix of all parameters but those of heads and pools
DEVIATION = 0.02  # of scales around 1 and of shifts around 0 when they start


class BackboneOptions(ModelOptions):
    """Options of every vision transformer.

    Attributes:
        patch: pixels of a side of a patch.
        stream: channels of the residual stream; a head has ``stream / num_heads`` of them.
        num_blocks: attention and feed-forward layers.
        num_heads: heads of each attention layer.
        hidden: hidden units of each feed-forward layer; None: four times `stream`.
        weights: path of a file in which the parameters ``backbone.*`` start, as ``gossamer export`` writes it of a run
            of a model `vit` of the same sizes; None: they are drawn.
    """

    patch: int = Field(4, ge=1)
    stream: int = Field(64, ge=1)
    num_blocks: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    hidden: int | None = Field(None, ge=1)
    weights: str | None = None

    @model_validator(mode="after")
    def _divisible(self) -> BackboneOptions:
        if self.stream % self.num_heads:
            raise ValueError(
                f"stream {self.stream} cannot be divided among num_heads {self.num_heads}: make it a multiple of them"
            )
        return self


class VisionTransformerOptions(BackboneOptions):
    """Options of `VisionTransformer`. Attributes: cut: whether a capacity drops heads, or channels of every head."""

    cut: Literal["heads", "head-dim"] = "heads"


class VisionTransformer(DeclaredModel):
    """Vision transformer (Dosovitskiy et al., arXiv 2010.11929): patches and a class token, layers, a linear head.

    Normalisation stands before attention and before feed-forward. A capacity below 1 cuts heads and hidden units; the
    residual stream stays whole. Parameters but those of the head are called ``backbone.*``, so that they can be frozen,
    or start from an earlier run.

    Attributes:
        layers: names of all linear layers and normalisations of the backbone, in their order.
    """

    Options: ClassVar[type[BackboneOptions]] = VisionTransformerOptions
    traits = ModelTraits(adaptable=True)

    def __init__(self, input_shape: tuple[int, ...], num_labels: int, **params: Any) -> None:
        """Declare the parameters.

        Args:
            input_shape: channels, height, width of an image.
            num_labels: number of classes.
            params: see `Options`.

        Raises:
            ConfigError: an unknown or wrong option, or images that cannot be cut into patches.
        """
        super().__init__()
        self.options: Any = parse_options(self.Options, params, WHERE)
        side = self.options.patch
        if len(input_shape) != 3 or input_shape[1] % side or input_shape[2] % side:
            raise ConfigError(
                f"{WHERE}.patch = {side} does not divide samples of the shape {input_shape}: give images [channels,"
                " height, width] whose height and width are multiples of it"
            )
        channels, height, width = input_shape
        self._patches = Patches(BACKBONE, self.options.stream, (channels, height, width), 1, side)
        self._declare_backbone()
        self.layers = tuple(name.removesuffix(".bias") for name in self.shapes if name.endswith(".bias"))
        self.add("head", (num_labels, self.options.stream), (LABEL_AXIS, None))
        self._loaded: dict[str, Tensor] = {}
        if self.options.weights is not None:
            backbone = {name: shape for name, shape in self.shapes.items() if name.startswith(f"{BACKBONE}.")}
            self._loaded = load_parameters(self.options.weights, backbone, f"{WHERE}.weights")

    def _declare_backbone(self) -> None:
        """Declare all but the head, whose heads, or their channels, and hidden units are cut."""
        given, size, cut = self.options, self.options.stream, self.options.cut
        heads, head_dim = given.num_heads, size // given.num_heads
        if cut == "heads":
            heads = window_length(heads, given.width)
        else:
            head_dim = window_length(head_dim, given.width)
        self._add_backbone(heads, head_dim, window_length(given.hidden or 4 * size, given.width), cut)

    def _add_backbone(self, num_heads: int, head_dim: int, hidden: int, cut: Cut) -> None:
        size, num_blocks = self.options.stream, self.options.num_blocks
        self._blocks = tuple(
            Layer(f"{BACKBONE}.block{i}", size, num_heads, head_dim, hidden, cut) for i in range(num_blocks)
        )
        channels, side = self._patches.shape[0], self._patches.patch
        self.add(f"{BACKBONE}.patches", (size, channels * side**2), (None, None))
        self.add(f"{BACKBONE}.places", (1 + self._patches.num_places, size), (None, None), bias=False)
        self.add(f"{BACKBONE}.class", (1, size), (None, None), bias=False)
        for block in self._blocks:
            block.declare(self)
        self.add(f"{BACKBONE}.norm", (size,), (None,))

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters: drawn, see `glorot`, or those of the file."""
        drawn = glorot(self.shapes, source)
        return drawn | {name: value.clone() for name, value in self._loaded.items()}

    def encoded(self, params: Mapping[str, Tensor], x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Return the stream's class token after the last layer, normalised, float32 [b, stream].

        Args:
            params: of the model or of a sub-model.
            x: images float32 [b, channels, height, width].
            scale: the scaler's factor.
        """
        tiles = linear(params, f"{BACKBONE}.patches", self._patches.cut_out(x.unsqueeze(-4)).squeeze(-3))
        first = params[f"{BACKBONE}.class.weight"].expand(*tiles.shape[:-2], 1, -1)
        stream = torch.cat([first, tiles], dim=-2) + params[f"{BACKBONE}.places.weight"]
        for block in self._blocks:
            stream = block(params, stream, scale=scale)
        return normalised(params, f"{BACKBONE}.norm", stream[..., :1, :]).squeeze(-2)

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits float32 [b, num_labels] of images, see `gossamer.workloads.base.Model`."""
        return linear(params, "head", self.encoded(params, x, context.scale))


class InstanceAdaptiveOptions(BackboneOptions):
    """Options of `InstanceAdaptive`, besides those of the backbone; the defaults are the paper's.

    Attributes:
        pool: number of instances, K: sets of scales and shifts, each with a key.
        top: how many of them are averaged for a sample.
        key_share: share of the loss that draws keys to their samples; the cross entropy has the rest.
    """

    pool: int = Field(25, ge=1)
    top: int = Field(3, ge=1)
    key_share: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _enough(self) -> InstanceAdaptiveOptions:
        if self.top > self.pool:
            raise ValueError(f"top {self.top} exceeds pool {self.pool}: average {self.pool} instances at most")
        return self


class InstanceAdaptive(VisionTransformer):
    """FedIns (Feng et al., ICCV 2023, arXiv 2308.06051): a frozen backbone, and a pool of features to adapt it by.

    An instance of the pool has a scale gamma and a shift beta for the output y of each linear layer and normalisation
    of the backbone, ``gamma y + beta`` (SSF, arXiv 2210.08823), and a key. The query of a sample is the class token of
    the backbone as it is; the `top` instances whose keys have the largest cosines with it are averaged, and the sample
    goes through the backbone again with these. The loss is ``0.9 CE + 0.1 (1 - sum of the top cosines)``. Pools, keys
    and the head are trained and travel, and nothing else: with the paper's pool of 25 about 46 / (46 + stream)
    of the model.

    A pool is an axis: a participant of a smaller capacity holds a window of its instances, of which as many are
    averaged as of all, so that the scaler has nothing to make up for. Give the backbone's
    pretrained weights by the option `weights`; scales start around 1 and shifts around 0 with a deviation of 0.02, keys
    normal [M].

    Example:
        ``workload: {model: {name: fedins, stream: 384, num_heads: 6, weights: vit.safetensors}}``, and any algorithm.
    """

    Options = InstanceAdaptiveOptions

    def __init__(self, input_shape: tuple[int, ...], num_labels: int, **params: Any) -> None:
        super().__init__(input_shape, num_labels, **params)
        share = self.options.key_share
        self.traits = replace(self.traits, always_frozen=(f"{BACKBONE}.*",), terms_share=share)
        self._widths = [self.shapes[f"{layer}.bias"][0] for layer in self.layers]
        num_instances = window_length(self.options.pool, self.options.width)
        for name, size in (("keys", self.options.stream), ("scales", sum(self._widths)), ("shifts", sum(self._widths))):
            self.add(f"pool.{name}", (num_instances, size), ("instances", None), bias=False)

    def _declare_backbone(self) -> None:
        """Declare a backbone of which nothing is cut, because it is frozen."""
        given, size = self.options, self.options.stream
        self._add_backbone(given.num_heads, size // given.num_heads, given.hidden or 4 * size, "heads")
        self.axes = {name: (None,) * len(shape) for name, shape in self.shapes.items()}

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters; instances differ from one another, and next to nothing from no adaptation."""
        drawn = super().init(source)
        for name, mean, deviation in (("keys", 0.0, 1.0), ("scales", 1.0, DEVIATION), ("shifts", 0.0, DEVIATION)):
            normal = torch.from_numpy(source.standard_normal(self.shapes[f"pool.{name}.weight"], dtype=np.float32))
            drawn[f"pool.{name}.weight"] = normal.mul_(deviation).add_(mean)
        return drawn

    def shares(self, params: Mapping[str, Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of each instance for each sample, and the cosines of those that count.

        Args:
            params: of the model or of a sub-model, which holds some of the instances.
            query: float32 [b, stream].

        Returns:
            float32 [b, instances], of which `top` are not 0; float32 [b, top]; less where fewer are held.
        """
        cosines = F.normalize(query, dim=-1) @ F.normalize(params["pool.keys.weight"], dim=-1).transpose(-1, -2)
        best, which = cosines.topk(min(self.options.top, cosines.shape[-1]), dim=-1)
        return torch.zeros_like(cosines).scatter(-1, which, 1 / best.shape[-1]), best

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits float32 [b, num_labels] of images, see `gossamer.workloads.base.Model`.

        The term of the loss is ``"keys"``: [b], 1 minus the sum of a sample's top cosines.
        """
        with torch.no_grad():
            query = self.encoded(params, x)
        shares, best = self.shares(params, query)
        if context.terms is not None:
            context.terms["keys"] = 1 - best.sum(-1)
        scales, shifts = (
            torch.split((shares @ params[f"pool.{name}.weight"]).unsqueeze(-2), self._widths, dim=-1)
            for name in ("scales", "shifts")
        )
        features = dict(zip(self.layers, zip(scales, shifts, strict=True), strict=True))
        return linear(params, "head", self.encoded(Modulated(params, features), x))
