"""HiTeA in small (Ye et al., arXiv 2212.14546): moments of a video and their words, and a whole video and its parts.

- ``vision``: patches of all frames, and layers in which all of them attend to one another, over space and time.
- ``text``: tokens and layers of self-attention; ``fusion``: texts that attend to vision; ``decoder``: next words.
- ``contrast``: both projections of retrieval; ``matching``: whether a text suits a video; ``relation``: projector and
  predictor of temporal relations; ``recognition``: classes of a video.

Two tasks are its own. ``moment-exploration``: a short clip, cut out of the video at random, is contrasted with the
words of the caption that are most similar to it. ``relation-exploration``: caption and whole video, and caption and
short clip, as fused, each predict the projection of the other, through which no gradient goes. The third, the shuffling
test, is of every model: option ``shuffles`` of the workload.

Masked language modelling is ``grounded-language``, with the video, and ``masked-language``, which those can do who have
texts alone. [M] Sizes, attention without pooling, the temperature that is not learned, captions of the video alone, and
projections without normalisation by batches are those of this small version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.dropout import random_bits
from gossamer.workloads.multimodal.blocks import Declaring, FeedForward, Params, mean_of, normalised
from gossamer.workloads.multimodal.clips import MASK, PAD
from gossamer.workloads.multimodal.forward import Forward, Loss, Transformer, TransformerOptions
from gossamer.workloads.multimodal.graphs import Facts, graph
from gossamer.workloads.multimodal.objectives import contrastive
from gossamer.workloads.multimodal.temporal import moment_words, relation_losses


class HiTeAOptions(TransformerOptions):
    """Options of `HiTeA`; else as `TransformerOptions`.

    Attributes:
        clip: share of the frames, in (0, 1], that a short clip has; one at least.
        moment_words: words that are taken for a moment.
    """

    matching: bool = True
    clip: float = Field(0.6, gt=0, le=1)
    moment_words: int = Field(3, ge=1)


class HiTeA(Transformer):
    """HiTeA in small, see the module and `gossamer.workloads.multimodal.graphs.VideoLanguageModel`."""

    Options = HiTeAOptions
    options: HiTeAOptions

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Declare the parameters.

        Args:
            facts: of the data.
            params: see `HiTeAOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or frames that patches do not divide.
        """
        super().__init__(facts, **params)
        options, size = self.options, self.options.stream
        self.blocks = self.layers("vision", options.vision_blocks)
        self.fusion = self.layers("fusion", options.fusion_layers, has_memory=True)
        self.projector, self.predictor = (
            FeedForward(f"relation.{what}", size, self.hidden) for what in ("projector", "predictor")
        )
        encoders: list[Declaring] = [self.patches, *self.blocks, self.tokens, *self.text]
        heads: list[Declaring] = [*self.fusion, self.words, *self.decoder, self.projector, self.predictor]
        self.declare([*encoders, *heads], "vision text fusion decoder")
        matched = " fusion matching" if options.matching else ""
        self.graphs = {
            "retrieval": graph(f"vision text contrast{matched}", "video text"),
            "moment-exploration": graph("vision text contrast", "video text"),
            "relation-exploration": graph("vision text fusion relation", "video text"),
            "question-answering": graph("vision text fusion decoder", "video text"),
            "captioning": graph("vision decoder", "video text"),
            "grounded-language": graph("vision text fusion", "video text"),
            "masked-language": graph("text", "text"),
            "recognition": graph("vision recognition", "video"),
        }

    def forward(
        self, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> HiTeAForward:
        """Begin a forward pass."""
        return HiTeAForward(self, params, batch, context)


class HiTeAForward(Forward):
    """One forward pass."""

    model: HiTeA

    def seen(self, video: Tensor) -> Tensor:
        """Return the visual tokens float32 [b, frames * places, size] of a video or clip [b, frames, *]."""
        x = self.model.patches(self.params, video).flatten(-3, -2)
        for layer in self.model.blocks:
            x = layer(self.params, x, scale=self.scale)
        return normalised(self.params, "vision.norm", x)

    @cached_property
    def visual(self) -> Tensor:
        """Visual tokens of the whole video, the long view."""
        return self.seen(self.batch["video"])

    @cached_property
    def short(self) -> Tensor:
        """Visual tokens of the short clip, the short view."""
        return self.seen(short_clips(self.batch["video"], self.key, self.model.options.clip))

    def losses(self) -> dict[str, Callable[[], Loss]]:
        """Return ``{task: its losses}``."""
        own = {"moment-exploration": self.moments, "relation-exploration": self.relations}
        return super().losses() | own | {"grounded-language": self.grounded_language}

    def moments(self) -> Loss:
        """Return the contrastive losses of short clips and the words that suit each best."""
        clip, words = self.embedded("video", self.short.mean(-2)), self.embedded("text", self.caption)
        chosen = moment_words(clip, words, self.batch["caption"] > MASK, self.model.options.moment_words)
        similarity = clip @ F.normalize(chosen, dim=-1).mT
        return contrastive(self.true_pairs(similarity)), self.paired

    def relations(self) -> Loss:
        """Return the losses of aligning caption and video with caption and short clip."""
        caption = self.batch["caption"]
        fused = self.fused_caption, self.fused(caption, self.caption, self.short)
        long, short = (
            self.model.projector(self.params, mean_of(states, caption != PAD), self.scale) for states in fused
        )
        predicted = (self.model.predictor(self.params, projected, self.scale) for projected in (long, short))
        return relation_losses(long, short, *predicted), self.paired


def short_clips(video: Tensor, key: Tensor, share: float) -> Tensor:
    """Return consecutive frames of videos [b, frames, *], cut out at random places, of a share of their number.

    Args:
        video: float32 [b, frames, channels, height, width].
        key: int64 [], random bits of the step.
        share: in (0, 1]; one frame is left at least.
    """
    count, frames = video.shape[-5:-3]
    length = max(1, round(frames * share))
    start = (random_bits(key + 1, [count]) & (2**31 - 1)) % (frames - length + 1)  # key + 1: not as words are hidden
    index = start[..., None] + torch.arange(length, device=video.device)
    return video.gather(-4, index[..., None, None, None].expand(*index.shape, *video.shape[-3:]))
