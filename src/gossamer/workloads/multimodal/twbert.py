"""TW-BERT in small (Yang et al., arXiv 2301.01953): words find the trajectories of what they name.

- ``vision``: patches, and blocks of attention over time at each place, inside each frame, and feed-forward
  (TimeSformer, arXiv 2102.05095).
- ``text``: tokens and layers of self-attention.
- ``fusion``: an encoder that is not symmetric. Patches attend to all words, plainly; words attend to one another, and
  then to each frame by itself and to what they found in the frames, see `TrajectoryToWord`.
- ``contrast``: both projections of retrieval, of whole videos and texts and of single patches and words; ``matching``:
  whether a text suits a video; ``answer``: the word that answers a question; ``recognition``: classes of a video.

Retrieval learns by three losses: contrastive, fine-grained contrastive, and matching. Masked language modelling is
``grounded-language``, with the video, and ``masked-language``, which those can do who have texts alone. [M] Sizes, the
temperature that is not learned, patches that do not attend to one another in fusion, and all frames instead of a
selection are those of this small version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import DeclaredModel
from gossamer.workloads.multimodal.blocks import (
    Attention,
    Cut,
    FeedForward,
    Params,
    Scale,
    linear,
    mean_of,
    normalised,
)
from gossamer.workloads.multimodal.clips import MASK, PAD
from gossamer.workloads.multimodal.forward import EncoderOptions, Forward, Loss, Transformer
from gossamer.workloads.multimodal.graphs import Facts, graph
from gossamer.workloads.multimodal.objectives import contrastive
from gossamer.workloads.multimodal.trajectories import TrajectoryToWord, fine_grained
from gossamer.workloads.multimodal.vision import VideoEncoder


class DividedBlock:
    """Attention over time at each place, attention inside each frame, and feed-forward, each added to the stream."""

    def __init__(self, name: str, size: int, heads: tuple[int, int], hidden: int, cut: Cut) -> None:
        """Name its parts.

        Args:
            name: prefix of their parameters.
            size: width of the stream.
            heads: number of heads, and channels of each.
            hidden: units of feed-forward.
            cut: what a capacity cuts of attention.
        """
        self.time, self.space = (Attention(f"{name}.{what}", size, *heads, cut) for what in ("time", "space"))
        self.feed = FeedForward(f"{name}.feed", size, hidden)

    def declare(self, model: DeclaredModel) -> None:
        """Declare the parts and their normalisations."""
        declare_normed(model, self.time, self.space, self.feed)

    def __call__(self, params: Params, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return the stream after the block, of the shape of x [..., frames, places, size]."""
        along = normalised(params, f"{self.time.name}.norm", x).transpose(-3, -2)
        x = x + self.time(params, along, scale=scale).transpose(-3, -2)
        x = x + self.space(params, normalised(params, f"{self.space.name}.norm", x), scale=scale)
        return x + self.feed(params, normalised(params, f"{self.feed.name}.norm", x), scale)


class AsymmetricLayer:
    """Patches meet words, plainly; then words meet the trajectories of these patches."""

    def __init__(self, name: str, size: int, heads: tuple[int, int], hidden: int, cut: Cut) -> None:
        """Name its parts, see `DividedBlock`."""
        self.word_to_patch, self.attention = (
            Attention(f"{name}.{what}", size, *heads, cut) for what in ("word-to-patch", "attention")
        )
        self.trajectory_to_word = TrajectoryToWord(f"{name}.trajectory-to-word", size, *heads, cut)
        self.patch_feed, self.feed = (FeedForward(f"{name}.{what}", size, hidden) for what in ("patch-feed", "feed"))

    def declare(self, model: DeclaredModel) -> None:
        """Declare the parts and their normalisations."""
        first, last = (self.word_to_patch, self.patch_feed), (self.attention, self.trajectory_to_word, self.feed)
        declare_normed(model, *first, *last)

    def met(self, params: Params, words: Tensor, patches: Tensor, allowed: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return patches [..., frames, places, size] after they have attended to words [..., n, size].

        Args:
            params: of the model.
            words: float32 [..., n, size].
            patches: float32 [..., frames, places, size].
            allowed: bool [..., 1, n], which words there are.
            scale: the scaler's factor.
        """
        x = patches.flatten(-3, -2)
        inner = normalised(params, f"{self.word_to_patch.name}.norm", x)
        x = x + self.word_to_patch(params, inner, words, allowed, scale)
        x = x + self.patch_feed(params, normalised(params, f"{self.patch_feed.name}.norm", x), scale)
        return x.reshape(patches.shape)

    def asked(self, params: Params, words: Tensor, allowed: Tensor, scale: Scale = 1.0) -> tuple[Tensor, Tensor]:
        """Return words [..., n, size] that have attended to one another, and what asks for trajectories, likewise."""
        inner = normalised(params, f"{self.attention.name}.norm", words)
        words = words + self.attention(params, inner, None, allowed, scale)
        return words, normalised(params, f"{self.trajectory_to_word.name}.norm", words)

    def __call__(
        self, params: Params, words: Tensor, patches: Tensor, allowed: Tensor, scale: Scale = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return both streams after the layer, see `met`."""
        patches = self.met(params, words, patches, allowed, scale)
        words, asking = self.asked(params, words, allowed, scale)
        words = words + self.trajectory_to_word(params, asking, patches, scale)
        return words + self.feed(params, normalised(params, f"{self.feed.name}.norm", words), scale), patches


def declare_normed(model: DeclaredModel, *parts: Attention | FeedForward | TrajectoryToWord) -> None:
    """Declare parts, each with the normalisation of what it reads."""
    for part in parts:
        model.add(f"{part.name}.norm", (part.size,), (None,))
        part.declare(model)


class TwBertOptions(EncoderOptions):
    """Options of `TwBert`; else as `EncoderOptions`."""

    matching: bool = True


class TwBert(Transformer):
    """TW-BERT in small, see the module and `gossamer.workloads.multimodal.graphs.VideoLanguageModel`."""

    Options = TwBertOptions

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Declare the parameters.

        Args:
            facts: of the data.
            params: see `TwBertOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or frames that patches do not divide.
        """
        super().__init__(facts, **params)
        options = self.options
        inner = options.stream, self.heads, self.hidden, options.cut
        blocks = [DividedBlock(f"vision.block{i}", *inner) for i in range(options.vision_blocks)]
        self.vision = VideoEncoder(self.patches, blocks)
        self.crossing = [AsymmetricLayer(f"fusion.layer{i}", *inner) for i in range(options.fusion_layers)]
        self.add("answer.output", (facts.num_tokens, options.stream), (None, None))
        self.declare([*self.vision.parts, self.tokens, *self.text, *self.crossing], "vision text fusion")
        matched = " fusion matching" if options.matching else ""
        self.graphs = {
            "retrieval": graph(f"vision text contrast{matched}", "video text"),
            "question-answering": graph("vision text fusion answer", "video text"),
            "grounded-language": graph("vision text fusion", "video text"),
            "masked-language": graph("text", "text"),
            "recognition": graph("vision recognition", "video"),
        }

    def forward(
        self, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> TwBertForward:
        """Begin a forward pass."""
        return TwBertForward(self, params, batch, context)


class TwBertForward(Forward):
    """One forward pass."""

    model: TwBert

    @cached_property
    def visual(self) -> Tensor:
        """Visual tokens, float32 [b, frames * places, size]."""
        return self.model.vision(self.params, self.batch["video"], self.scale)

    def framed(self, visual: Tensor) -> Tensor:
        """Return visual tokens [b, frames * places, size] by frames, [b, frames, places, size]."""
        return visual.reshape(*visual.shape[:-2], -1, self.model.patches.num_places, visual.shape[-1])

    def fused(self, tokens: Tensor, states: Tensor, visual: Tensor) -> Tensor:
        """Return texts after they have met trajectories, float32 [b, n, size], see `Forward.fused`."""
        words, patches, allowed = states, self.framed(visual), (tokens != PAD)[..., None, :]
        for layer in self.model.crossing:
            words, patches = layer(self.params, words, patches, allowed, self.scale)
        return normalised(self.params, "fusion.norm", words)

    def shares(self, tokens: Tensor) -> Tensor:
        """Return which patches of each frame each word attends to in the last layer of fusion.

        Args:
            tokens: int64 [b, n], texts.

        Returns:
            float32 [b, heads, n, frames, places], which sums to 1 over the places of every frame.
        """
        words, patches, allowed = self.textual(tokens), self.framed(self.visual), (tokens != PAD)[..., None, :]
        *before, last = self.model.crossing
        for layer in before:
            words, patches = layer(self.params, words, patches, allowed, self.scale)
        patches = last.met(self.params, words, patches, allowed, self.scale)
        _, asking = last.asked(self.params, words, allowed, self.scale)
        return last.trajectory_to_word.trajectories(self.params, asking, patches, self.scale)[1]

    @cached_property
    def answer_logits(self) -> Tensor:
        """Logits of the answer to each question, float32 [b, num_tokens]."""
        question = self.batch["question"]
        fused = self.fused(question, self.textual(question), self.visual)
        return linear(self.params, "answer.output", mean_of(fused, question != PAD))

    def losses(self) -> dict[str, Callable[[], Loss]]:
        """Return ``{task: its losses}``."""
        return super().losses() | {"grounded-language": self.grounded_language}

    def retrieval(self) -> Loss:
        """Return contrastive losses of whole videos and texts, those of patches and words, and those of matching."""
        losses, weights = super().retrieval()
        patches, words = self.embedded("video", self.visual), self.embedded("text", self.caption)
        every = torch.ones(patches.shape[:-1], dtype=torch.bool, device=patches.device)
        similarity = fine_grained(patches, words, every, self.batch["caption"] > MASK)
        return losses + contrastive(self.true_pairs(similarity)), weights
