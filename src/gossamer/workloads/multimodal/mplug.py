"""mPLUG-2 in small (Xu et al., arXiv 2302.00402): modules that modalities share, and modules that they do not.

- ``vision``: patches, and blocks of local temporal mixing, attention inside each frame, and feed-forward.
- ``text``: tokens and layers of self-attention.
- ``universal``: self-attention and feed-forward that both modalities go through; ``latents``: what vision needs for it,
  learned vectors and their cross-attention. Latents attend to the visual tokens before each universal layer; before
  the last one the visual tokens attend to the latents, and go through the layer themselves.
- ``fusion``: text that attends to vision; ``decoder``: next words, from vision or from fusion; ``contrast``: both
  projections of retrieval; ``matching``: whether a text suits a video; ``recognition``: classes of a video.

Each task is a graph of modules, and needs no others. [M] Sizes, positions of frames that are added to the patches, the
temperature that is not learned and output layers that are tied are those of this small version.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import Field
from torch import Tensor

from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.multimodal.blocks import Attention, Params, normalised
from gossamer.workloads.multimodal.clips import PAD
from gossamer.workloads.multimodal.forward import Forward, Transformer, TransformerOptions
from gossamer.workloads.multimodal.graphs import Facts, graph
from gossamer.workloads.multimodal.vision import VideoEncoder, vision_blocks
from gossamer.workloads.stacked import beside

VISUAL = "vision universal latents"


class MPlugOptions(TransformerOptions):
    """Options of `MPlug`; else as `TransformerOptions`.

    Attributes:
        universal_layers: layers of this module.
        num_latents: learned vectors that attend to the visual tokens, 50 in the paper.
    """

    universal_layers: int = Field(2, ge=2)
    num_latents: int = Field(8, ge=1)


class MPlug(Transformer):
    """mPLUG-2 in small, see the module and `gossamer.workloads.multimodal.graphs.VideoLanguageModel`."""

    Options = MPlugOptions
    options: MPlugOptions

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Declare the parameters.

        Args:
            facts: of the data.
            params: see `MPlugOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or frames that patches do not divide.
        """
        super().__init__(facts, **params)
        options, size = self.options, self.options.stream
        blocks = vision_blocks(options, self.heads, self.hidden)
        self.vision = VideoEncoder(self.patches, blocks)
        self.universal = self.layers("universal", options.universal_layers)
        self.fusion = self.layers("fusion", options.fusion_layers, has_memory=True)
        self.across = [
            Attention(f"latents.across{i}", size, *self.heads, options.cut) for i in range(options.universal_layers)
        ]
        for part in (*self.vision.parts, self.tokens, *self.text, *self.universal):
            part.declare(self)
        self.add("latents.vectors", (options.num_latents, size), (None, None), bias=False)
        for across in self.across:
            across.declare(self)
            for side in ("norm", "memory"):
                self.add(f"{across.name}.{side}", (size,), (None,))
        self.declare([*self.fusion, self.words, *self.decoder], "vision text universal fusion decoder")
        self.zeros = tuple(name for block in blocks for name in block.zeros)
        matched = " fusion matching" if options.matching else ""
        self.graphs = {
            "retrieval": graph(f"{VISUAL} text contrast{matched}", "video text"),
            "question-answering": graph(f"{VISUAL} text fusion decoder", "video text"),
            "captioning": graph(f"{VISUAL} decoder", "video text"),
            "masked-language": graph("text universal", "text"),
            "recognition": graph(f"{VISUAL} recognition", "video"),
        }

    def forward(
        self, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> MPlugForward:
        """Begin a forward pass."""
        return MPlugForward(self, params, batch, context)


class MPlugForward(Forward):
    """One forward pass."""

    model: MPlug

    @cached_property
    def visual(self) -> Tensor:
        """Visual tokens after the universal layers, float32 [b, frames * places, size]."""
        model, params, scale = self.model, self.params, self.scale
        x = model.vision(params, self.batch["video"], scale)
        latents = beside(params["latents.vectors.weight"], 2, x).expand(*x.shape[:-2], -1, -1)
        for layer, across in zip(model.universal[:-1], model.across[:-1], strict=True):
            latents = layer(params, self._across(across, latents, x), scale=scale)
        return self._ended(model.universal[-1](params, self._across(model.across[-1], x, latents), scale=scale))

    def _across(self, across: Attention, x: Tensor, memory: Tensor) -> Tensor:
        """Return x after it has attended to a memory, both normalised."""
        query, source = (normalised(self.params, f"{across.name}.{n}", v) for n, v in (("norm", x), ("memory", memory)))
        return x + across(self.params, query, source, scale=self.scale)

    def _ended(self, x: Tensor) -> Tensor:
        return normalised(self.params, "universal.norm", x)

    def textual(self, tokens: Tensor) -> Tensor:
        """Return texts int64 [b, n] after the universal layers, float32 [b, n, size]."""
        x, allowed = super().textual(tokens), (tokens != PAD)[..., None, :]
        for layer in self.model.universal:
            x = layer(self.params, x, allowed, scale=self.scale)
        return self._ended(x)
