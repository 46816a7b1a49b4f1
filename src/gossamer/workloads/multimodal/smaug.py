"""SMAUG in small (Lin et al., arXiv 2211.11446): training on a part of what there is to be seen.

- ``vision``: patches, and layers inside each frame, whose first token is [CLS]; then a layer in which the [CLS] of all
  frames attend to each other. While training, a random share of the patches of every frame is masked and never enters
  the encoder, as in masked autoencoders (He et al., arXiv 2111.06377).
- ``reconstruction``: a narrow decoder of all places, that tells the normalised pixels of the masked ones.
- ``fusion``: texts that attend to the few patches that are left when, of every frame, those are kept that [CLS] or the
  text attends to most, and of these frames those whose [CLS] the text attends to most.
- ``text``, ``decoder``, ``contrast``, ``matching``, ``recognition``: as in mPLUG-2.

Retrieval is contrastive learning and matching; masked language modelling sees the video; ``masked-video`` is the mean
squared error of masked pixels. Metrics are of whole videos, without masks. [M] Sizes, the layer over frames, the mean
that retrieval compares ([CLS], and what is seen of patches, by halves), and scores that are the attention of fusion's
first layer are those of this small version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.multimodal.blocks import Declaring, Layer, Params, linear, normalised
from gossamer.workloads.multimodal.forward import Forward, Loss, Transformer, TransformerOptions
from gossamer.workloads.multimodal.graphs import Facts, graph
from gossamer.workloads.multimodal.sparse import drawn_order, put_back, share_of, strongest, taken
from gossamer.workloads.stacked import beside

VIDEO_KEY = 0x5BD1E9955BD1E995  # so that patches are not masked by the random bits that mask words
MASKED_VIDEO = "masked-video"


class SmaugOptions(TransformerOptions):
    """Options of `Smaug`; else as `TransformerOptions`.

    Attributes:
        matching: whether retrieval also learns, through fusion, which texts suit a video.
        visual_mask_rate: share of the patches of a frame that are masked while training; 0: none, and nothing is
            reconstructed.
        keep_patches: share of the visible patches of a frame that fusion and decoder see; 1: all.
        keep_frames: share of the frames that fusion sees; 1: all.
        select_by: whose attention chooses patches, that of ``"cls"`` or of the ``"text"``.
        pixel_layers: layers of the decoder of pixels.
    """

    matching: bool = True
    visual_mask_rate: float = Field(0.6, ge=0, lt=1)
    keep_patches: float = Field(0.5, gt=0, le=1)
    keep_frames: float = Field(0.6, gt=0, le=1)
    select_by: Literal["cls", "text"] = "cls"
    pixel_layers: int = Field(1, ge=1)


class Smaug(Transformer):
    """SMAUG in small, see the module and `gossamer.workloads.multimodal.graphs.VideoLanguageModel`.

    Attributes:
        num_visible: patches of a frame that are encoded while training.
    """

    Options = SmaugOptions
    options: SmaugOptions

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Declare the parameters.

        Args:
            facts: of the data.
            params: see `SmaugOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or frames that patches do not divide.
        """
        super().__init__(facts, **params)
        options, size = self.options, self.options.stream
        self.num_visible = share_of(self.patches.num_places, 1 - options.visual_mask_rate)
        self.blocks = self.layers("vision", options.vision_blocks)
        self.time = Layer("vision.time", size, *self.heads, self.hidden, options.cut)
        self.fusion = self.layers("fusion", options.fusion_layers, has_memory=True)
        self.pixels = self._narrow()
        self.add("vision.cls", (1, size), (None, None), bias=False)
        first: list[Declaring] = [self.patches, *self.blocks, self.time, self.tokens, *self.text]
        for part in first:
            part.declare(self)
        if self.num_visible < self.patches.num_places:
            self._declare_reconstruction()
        self.declare([*self.fusion, self.words, *self.decoder], "vision text fusion decoder")
        matched = " fusion matching" if options.matching else ""
        self.graphs = {
            "retrieval": graph(f"vision text contrast{matched}", "video text"),
            "question-answering": graph("vision text fusion decoder", "video text"),
            "captioning": graph("vision decoder", "video text"),
            "masked-language": graph("vision text fusion", "video text"),
            "recognition": graph("vision recognition", "video"),
        }
        if self.num_visible < self.patches.num_places:
            self.graphs |= {MASKED_VIDEO: graph("vision reconstruction", "video")}

    def _narrow(self) -> list[Layer]:
        """Return the layers of the decoder of pixels, of half the width in everything."""
        options = self.options
        heads, head_dim = self.heads[0], max(1, options.stream // options.num_heads // 2)
        if options.cut == "head-dim":
            head_dim = window_length(head_dim, options.width)
        inner = heads, head_dim, window_length(max(1, options.hidden // 2), options.width), options.cut
        size = max(1, options.stream // 2)
        return [Layer(f"reconstruction.layer{i}", size, *inner) for i in range(options.pixel_layers)]

    def _declare_reconstruction(self) -> None:
        size, patches = self.pixels[0].size, self.patches
        num_pixels = patches.shape[0] * patches.patch**2
        self.add("reconstruction.input", (size, self.options.stream), (None, None))
        self.add("reconstruction.mask", (1, size), (None, None), bias=False)
        self.add("reconstruction.places", (patches.num_places, size), (None, None), bias=False)
        for layer in self.pixels:
            layer.declare(self)
        self.add("reconstruction.norm", (size,), (None,))
        self.add("reconstruction.output", (num_pixels, size), (None, None))

    def forward(
        self, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> SmaugForward:
        """Begin a forward pass."""
        return SmaugForward(self, params, batch, context)


class SmaugForward(Forward):
    """One forward pass."""

    model: Smaug

    def __init__(self, model: Smaug, params: Params, batch: Mapping[str, Tensor], context: ForwardContext) -> None:
        """Bind a model, its parameters and a batch."""
        super().__init__(model, params, batch, context)
        self.context = context

    # ---- states

    @cached_property
    def order(self) -> Tensor:
        """Places of each frame, of which the first `Smaug.num_visible` are seen, int64 [b, frames, places]."""
        return drawn_order(self.key ^ VIDEO_KEY, (*self.batch["video"].shape[-5:-3], self.model.patches.num_places))

    @cached_property
    def seen(self) -> Tensor | None:
        """Places that are seen, int64 [b, frames, visible]; None: all of them, as in metrics."""
        num_visible = self.model.num_visible
        is_whole = not self.context.training or num_visible == self.model.patches.num_places
        return None if is_whole else self.order[..., :num_visible]

    @cached_property
    def frames(self) -> tuple[Tensor, Tensor]:
        """What is seen of each frame, and how [CLS] divides its attention among it in the last layer.

        float32 [b, frames, 1 + seen, size], [CLS] first; and [b, frames, seen], without [CLS].
        """
        model, params, scale = self.model, self.params, self.scale
        x = model.patches(params, self.batch["video"], self.seen)
        x = torch.cat([beside(params["vision.cls.weight"], 2, x).expand(*x.shape[:-2], -1, -1), x], dim=-2)
        for layer in model.blocks[:-1]:
            x = layer(params, x, scale=scale)
        last = model.blocks[-1]
        inner = normalised(params, f"{last.attention.name}.norm", x)
        shares = last.attention.shares(params, inner[..., :1, :], inner[..., 1:, :])[..., 0, :]
        x = last(params, x, scale=scale)
        first = model.time(params, x[..., 0, :], scale=scale)[..., None, :]
        return normalised(params, "vision.norm", torch.cat([first, x[..., 1:, :]], dim=-2)), shares

    @cached_property
    def visual(self) -> Tensor:
        """[CLS] and the patches that it attends to most, of all frames, float32 [b, frames * (1 + r), size]."""
        frames, shares = self.frames
        kept = self._strongest(frames, shares) if self.model.options.select_by == "cls" else frames
        return kept.flatten(-3, -2)

    def pooled(self) -> Tensor:
        """Return the mean of [CLS] and of the patches that are seen, both alike of all frames, float32 [b, size].

        However few patches are seen, [CLS] has the same part in it: in training, and in metrics of whole videos.
        """
        frames, _ = self.frames
        return (frames[..., 0, :].mean(-2) + frames[..., 1:, :].mean((-3, -2))) / 2

    def _strongest(self, frames: Tensor, scores: Tensor) -> Tensor:
        """Return the [CLS] and the patches of the highest scores [b, frames, seen] of each frame."""
        count = share_of(frames.shape[-2] - 1, self.model.options.keep_patches)
        return torch.cat([frames[..., :1, :], strongest(frames[..., 1:, :], scores, count)], dim=-2)

    def fused(self, tokens: Tensor, states: Tensor, visual: Tensor) -> Tensor:
        """Return texts after they have attended to the patches and frames that matter to them, see `Forward`."""
        across, options = self.model.fusion[0].across, self.model.options
        num_frames, size = self.batch["video"].shape[-4], visual.shape[-1]
        frames = visual.reshape(*visual.shape[:-2], num_frames, -1, size)
        begin = normalised(self.params, f"{across.name}.norm", states[..., :1, :])
        if options.select_by == "text":
            scores = across.shares(self.params, begin[..., None, :, :], frames[..., 1:, :])[..., 0, :]
            frames = self._strongest(frames, scores)
        scores = across.shares(self.params, begin, frames[..., 0, :])[..., 0, :]
        chosen = strongest(frames.flatten(-2), scores, share_of(num_frames, options.keep_frames))
        return super().fused(tokens, states, chosen.reshape(*chosen.shape[:-2], -1, size))

    # ---- losses

    def losses(self) -> dict[str, Callable[[], Loss]]:
        """Return ``{task: its losses}``."""
        return super().losses() | {"masked-language": self.grounded_language, MASKED_VIDEO: self.masked_video}

    def masked_video(self) -> Loss:
        """Return the mean squared errors of the normalised pixels of masked patches."""
        if self.seen is None:  # metrics: with a mask that is always the same
            training = replace(self.context, training=True)
            return SmaugForward(self.model, self.params, self.batch, training).masked_video()
        return (self.reconstructed - self.targets).square().mean((-3, -2, -1)), self.batch["has_video"]

    @cached_property
    def reconstructed(self) -> Tensor:
        """What is told of the masked patches, float32 [b, frames, masked, pixels]."""
        params = self.params
        seen = linear(params, "reconstruction.input", self.frames[0][..., 1:, :])
        fill, places = (beside(params[f"reconstruction.{name}.weight"], 2, seen) for name in ("mask", "places"))
        x = put_back(seen, fill, self.order) + places
        for layer in self.model.pixels:
            x = layer(params, x, scale=self.scale)
        x = normalised(params, "reconstruction.norm", taken(x, self.order[..., self.model.num_visible :]))
        return linear(params, "reconstruction.output", x)

    @cached_property
    def targets(self) -> Tensor:
        """Pixels of the masked patches, each patch less its mean and divided by its deviation, of the same shape."""
        pixels = self.model.patches.cut_out(self.batch["video"])
        pixels = taken(pixels, self.order[..., self.model.num_visible :])
        variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=0)
        return (pixels - mean) / (variance + 1e-6).sqrt()
