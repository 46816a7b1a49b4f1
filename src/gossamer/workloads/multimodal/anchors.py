"""A cross-modal language model with anchor augment in small (Wang et al., arXiv 2211.07275): captions without pairs.

- ``vision``, ``text``, ``contrast``: a dual encoder, trained on pairs, whose embeddings of a video and of its caption
  are alike; it takes the place of CLIP.
- ``prefix``, ``decoder``: a language model whose sentence begins with what an embedding is turned into. It is trained
  on text alone: with the embedding e of a caption, as the dual encoder has it and leaves it, the prefix is
  MLP([e; mean of the embeddings of the caption's anchors]), and the loss that of the caption's words. Anchors are the
  words of a caption that name classes; each is dropped with a probability.
- ``recognition``: tells the classes of a video.

To caption a video, its embedding takes the place of the caption's, and the words of its classes that of the anchors. So
clients of text alone train the language model, and clients of pairs the dual encoder. [M] Sizes, and a head that tells
classes instead of a detector, are those of this small version.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.dropout import random_bits
from gossamer.workloads.models import WHERE, rescale
from gossamer.workloads.multimodal.blocks import Params, linear, mean_of, normalised
from gossamer.workloads.multimodal.clips import BEGIN, END, PAD
from gossamer.workloads.multimodal.forward import Forward, Loss, Transformer, TransformerOptions
from gossamer.workloads.multimodal.graphs import Facts, graph
from gossamer.workloads.multimodal.objectives import sequence_losses
from gossamer.workloads.multimodal.vision import VideoEncoder, vision_blocks


class AnchorOptions(TransformerOptions):
    """Options of `AnchorCaptioner`; else as `TransformerOptions`.

    Attributes:
        fusion_layers, matching: none here.
        num_prefix: vectors with which a sentence of the language model begins.
        anchor_drop: probability with which an anchor is dropped in training; 1: it has none.
        anchors: what stands in their place when a video is captioned: the classes as they are ``"recognised"``, or as
            they are ``"given"`` with the clips, or, ``"off"``, nothing.
    """

    fusion_layers: Literal[0] = 0
    matching: Literal[False] = False
    num_prefix: int = Field(2, ge=1)
    anchor_drop: float = Field(0.3, ge=0, le=1)
    anchors: Literal["recognised", "given", "off"] = "recognised"


class AnchorCaptioner(Transformer):
    """Cross-modal language model, see the module and `gossamer.workloads.multimodal.graphs.VideoLanguageModel`.

    Attributes:
        nouns: tokens of the words that name classes.
    """

    Options = AnchorOptions
    options: AnchorOptions

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Declare the parameters.

        Args:
            facts: of the data.
            params: see `AnchorOptions`.

        Raises:
            ConfigError: an unknown or wrong option, frames that patches do not divide, or data without anchors.
        """
        super().__init__(facts, **params)
        options, size = self.options, self.options.stream
        if options.anchors != "off" and not facts.label_words:
            raise ConfigError(
                f"{WHERE}.anchors = {options.anchors!r} needs words that name classes, of which the data set has none:"
                " set it to 'off'"
            )
        self.nouns = tuple(token for words in facts.label_words.values() for token in words)
        blocks = vision_blocks(options, self.heads, self.hidden)
        self.vision = VideoEncoder(self.patches, blocks)
        self.decoder = self.layers("decoder", options.decoder_layers)
        for part in (*self.vision.parts, self.tokens, *self.text):
            part.declare(self)
        self.add("prefix.expand", (self.hidden, 2 * options.contrast), ("prefix.hidden", None))
        self.add("prefix.contract", (options.num_prefix * size, self.hidden), (None, "prefix.hidden"))
        self.declare([self.words, *self.decoder], "vision text decoder")
        self.zeros = tuple(name for block in blocks for name in block.zeros)
        recognised = " recognition" if options.anchors == "recognised" else ""
        self.graphs = {
            "retrieval": graph("vision text contrast", "video text"),
            "captioning": graph("text contrast prefix decoder", "text", f"vision{recognised}"),
            "masked-language": graph("text", "text"),
            "recognition": graph("vision recognition", "video"),
        }

    def forward(
        self, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> AnchorForward:
        """Begin a forward pass."""
        return AnchorForward(self, params, batch, context)


class AnchorForward(Forward):
    """One forward pass."""

    model: AnchorCaptioner

    # ---- states

    @cached_property
    def visual(self) -> Tensor:
        """Visual tokens, float32 [b, frames * places, size]."""
        return self.model.vision(self.params, self.batch["video"], self.scale)

    @cached_property
    def nouns(self) -> Tensor:
        """Embeddings of the words that name classes, float32 [nouns, contrast], through which no gradient goes."""
        weight = self.params["contrast.text.weight"]
        words = torch.tensor(self.model.nouns, dtype=torch.int64, device=weight.device)[:, None]
        texts = F.pad(F.pad(words, (1, 0), value=BEGIN), (0, 1), value=END)
        texts = texts.expand(*weight.shape[:-2], -1, -1)  # the same for all stacked clients
        with torch.no_grad():
            return self.embedded("text", mean_of(self.textual(texts), texts != PAD))

    def prefix(self, embedding: Tensor, named: Tensor) -> Tensor:
        """Return the vectors with which a sentence begins, float32 [b, num_prefix, size].

        Args:
            embedding: float32 [b, contrast], of a caption or of a video.
            named: bool [b, nouns], which anchors there are.
        """
        anchors = mean_of(self.nouns[..., None, :, :].expand(*named.shape, -1), named)
        given = torch.cat([embedding, anchors], dim=-1)
        hidden = rescale(F.gelu(linear(self.params, "prefix.expand", given)), self.scale)
        vectors = linear(self.params, "prefix.contract", hidden)
        return vectors.reshape(*vectors.shape[:-1], self.model.options.num_prefix, -1)

    def said(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits float32 [b, n, num_tokens] of the word after each of tokens int64 [b, n]."""
        x = torch.cat([prefix, self.model.words(self.params, tokens)], dim=-2)
        past = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
        for layer in self.model.decoder:
            x = layer(self.params, x, past, scale=self.scale)
        states = normalised(self.params, "decoder.norm", x[..., prefix.shape[-2] :, :])
        return self.model.words.logits(self.params, states)

    # ---- training, on text alone

    @cached_property
    def named(self) -> Tensor:
        """Which anchors captions have and keep, bool [b, nouns]."""
        nouns = torch.tensor(self.model.nouns, dtype=torch.int64, device=self.batch["caption"].device)
        named = (self.batch["caption"][..., None] == nouns).any(-2)
        draws = (
            random_bits(self.key, list(named.shape[self.key.dim() :])).to(torch.float32) * 2.0**-64 + 0.5
        )  # uniform in [0, 1]
        return named & (draws >= self.model.options.anchor_drop)

    def captioning(self) -> Loss:
        """Return the losses of the caption's words by its own embedding and anchors."""
        caption = self.batch["caption"]
        with torch.no_grad():
            embedding = self.text_embedding
        logits, targets = self.said(self.prefix(embedding, self.named), caption[..., :-1]), caption[..., 1:]
        return sequence_losses(logits, targets, targets != PAD), self.batch["has_text"]

    # ---- captions of videos

    @cached_property
    def shown(self) -> Tensor:
        """Which anchors the classes of videos are, bool [b, nouns]."""
        kind, rows = self.model.options.anchors, list[Tensor]()
        if kind == "off":
            return torch.zeros(len(self.visual), len(self.model.nouns), dtype=torch.bool, device=self.visual.device)
        for label, words in self.model.facts.label_words.items():
            classes = self.batch[label] if kind == "given" else self.label_logits(label).argmax(-1)
            rows.append(F.one_hot(classes, len(words)).bool())
        return torch.cat(rows, dim=-1)

    def next_words(self, tokens: Tensor) -> Tensor:
        """Return the logits of the word after tokens int64 [b, n] of captions of the videos, [b, num_tokens]."""
        return self.said(self.prefix(self.video_embedding, self.shown), tokens)[:, -1]
