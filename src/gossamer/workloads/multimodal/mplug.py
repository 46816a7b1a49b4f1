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

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.models import WHERE, DeclaredModel, ModelOptions
from gossamer.workloads.multimodal.blocks import (
    Attention,
    Cut,
    Declaring,
    Layer,
    Params,
    Patches,
    Tokens,
    VisionBlock,
    glorot,
    linear,
    mean_of,
    normalised,
)
from gossamer.workloads.multimodal.clips import BEGIN, END, MASK, PAD
from gossamer.workloads.multimodal.graphs import Facts, Losses, graph
from gossamer.workloads.multimodal.objectives import (
    contrastive,
    contrastive_logits,
    hardest_negatives,
    masked_places,
    sequence_losses,
)
from gossamer.workloads.supervised import cross_entropies
from gossamer.workloads.traits import ModelTraits

VISUAL = "vision universal latents"


class MPlugOptions(ModelOptions):
    """Options of `MPlug`; `width` (in (0, 1]) makes a model of its own with the shapes of such a sub-model.

    Attributes:
        stream: channels of the residual stream; a head has ``stream / num_heads`` of them.
        num_heads: heads of each attention layer.
        hidden: hidden units of each feed-forward layer.
        vision_blocks, text_layers, universal_layers, fusion_layers, decoder_layers: layers of each module.
        num_latents: learned vectors that attend to the visual tokens, 50 in the paper.
        patch: pixels of a patch's side.
        contrast: channels of the embeddings that retrieval compares.
        temperature: of the softmax over similarities.
        mask_rate: share of the words that masked language modelling predicts.
        matching: whether retrieval also learns, through fusion, which texts suit a video.
        cut: whether a capacity drops whole heads or channels of every head.
    """

    stream: int = Field(48, ge=1)
    num_heads: int = Field(4, ge=1)
    hidden: int = Field(96, ge=1)
    vision_blocks: int = Field(2, ge=1)
    text_layers: int = Field(1, ge=1)
    universal_layers: int = Field(2, ge=2)
    fusion_layers: int = Field(1, ge=1)
    decoder_layers: int = Field(1, ge=1)
    num_latents: int = Field(8, ge=1)
    patch: int = Field(4, ge=1)
    contrast: int = Field(32, ge=1)
    temperature: float = Field(0.07, gt=0)
    mask_rate: float = Field(0.15, ge=0, le=1)
    matching: bool = False
    cut: Cut = "heads"

    @model_validator(mode="after")
    def _divisible(self) -> MPlugOptions:
        if self.stream % self.num_heads:
            raise ValueError(
                f"stream {self.stream} cannot be divided among num_heads {self.num_heads}: make it a multiple of them"
            )
        return self


class MPlug(DeclaredModel):
    """mPLUG-2 in small, see the module and `gossamer.workloads.multimodal.graphs.VideoLanguageModel`."""

    Options = MPlugOptions

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Declare the parameters.

        Args:
            facts: of the data.
            params: see `MPlugOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or frames that patches do not divide.
        """
        super().__init__()
        self.options = options = parse_options(MPlugOptions, params, WHERE)
        if any(side % options.patch for side in facts.frame[1:]):
            raise ConfigError(
                f"{WHERE}.patch = {options.patch} does not divide frames of {facts.frame[1]} x {facts.frame[2]} pixels:"
                " choose a divisor of both"
            )
        self.traits, self.facts, size = ModelTraits(uses_key=True), facts, options.stream
        heads, head_dim = options.num_heads, size // options.num_heads
        if options.cut == "heads":
            heads = window_length(heads, options.width)
        else:
            head_dim = window_length(head_dim, options.width)
        hidden, between = (window_length(units, options.width) for units in (options.hidden, max(1, size // 2)))

        def layers(name: str, count: int, *, has_memory: bool = False) -> list[Layer]:
            """Return the layers of a module."""
            inner = heads, head_dim, hidden, options.cut
            return [Layer(f"{name}.layer{i}", size, *inner, has_memory) for i in range(count)]

        length = max(facts.caption_length, facts.question_length)
        self.patches = Patches("vision", size, facts.frame, facts.num_frames, options.patch)
        self.blocks = [
            VisionBlock(f"vision.block{i}", size, (heads, head_dim), hidden, between, options.cut)
            for i in range(options.vision_blocks)
        ]
        self.tokens, self.words = (Tokens(name, size, facts.num_tokens, length) for name in ("text", "decoder"))
        self.text = layers("text", options.text_layers)
        self.universal = layers("universal", options.universal_layers)
        self.across = [
            Attention(f"latents.across{i}", size, heads, head_dim, options.cut) for i in range(options.universal_layers)
        ]
        self.fusion = layers("fusion", options.fusion_layers, has_memory=True)
        self.decoder = layers("decoder", options.decoder_layers, has_memory=True)
        self._declare()
        matched = " fusion matching" if options.matching else ""
        self.graphs = {
            "retrieval": graph(f"{VISUAL} text contrast{matched}", "video text"),
            "question-answering": graph(f"{VISUAL} text fusion decoder", "video text"),
            "captioning": graph(f"{VISUAL} decoder", "video text"),
            "masked-language": graph("text universal", "text"),
            "recognition": graph(f"{VISUAL} recognition", "video"),
        }

    def _declare(self) -> None:
        size, options = self.options.stream, self.options
        first: list[Declaring] = [self.patches, *self.blocks, self.tokens, *self.text, *self.universal]
        for part in first:
            part.declare(self)
        self.add("latents.vectors", (options.num_latents, size), (None, None), bias=False)
        for across in self.across:
            across.declare(self)
            for side in ("norm", "memory"):
                self.add(f"{across.name}.{side}", (size,), (None,))
        last: list[Declaring] = [*self.fusion, self.words, *self.decoder]
        for part in last:
            part.declare(self)
        for name in ("vision", "text", "universal", "fusion", "decoder"):
            self.add(f"{name}.norm", (size,), (None,))
        for side in ("video", "text"):
            self.add(f"contrast.{side}", (options.contrast, size), (None, None))
        if options.matching:
            self.add("matching.output", (2, size), (None, None))
        for label, count in self.facts.num_labels.items():
            self.add(f"recognition.{label}", (count, size), (None, None))
        order = dict.fromkeys(name.partition(".")[0] for name in self.shapes)
        names = [name for module in order for name in self.shapes if name.partition(".")[0] == module]
        self.shapes, self.axes = {n: self.shapes[n] for n in names}, {n: self.axes[n] for n in names}

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters, see `glorot`; local temporal blocks start as the identity."""
        drawn = glorot(self.shapes, source)
        return drawn | {name: torch.zeros_like(drawn[name]) for block in self.blocks for name in block.zeros}

    def losses(
        self,
        tasks: Collection[str],
        params: Params,
        batch: Mapping[str, Tensor],
        context: ForwardContext = DEFAULT_CONTEXT,
    ) -> Losses:
        """Return the losses of tasks, see `VideoLanguageModel`."""
        forward = Forward(self, params, batch, context.scale)
        of_task = {
            "retrieval": forward.retrieval,
            "question-answering": forward.answering,
            "captioning": forward.captioning,
            "masked-language": lambda: forward.masked_language(context.key),
            "recognition": forward.recognition,
        }
        return {task: of_task[task]() for task in tasks}

    @torch.no_grad()
    def predict(self, task: str, params: Params, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the metrics of a task are made of, see `VideoLanguageModel`."""
        forward = Forward(self, params, batch)
        if task == "retrieval":
            return {"video": forward.video_embedding, "text": forward.text_embedding}
        if task == "question-answering":
            return {"logits": forward.answer_logits}
        if task == "captioning":
            return {"tokens": forward.generated(self.facts.caption_length)}
        if task == "recognition":
            return {label: forward.label_logits(label) for label in self.facts.num_labels}
        return {}


class Forward:
    """One forward pass; what several tasks need of it is computed once."""

    def __init__(self, model: MPlug, params: Params, batch: Mapping[str, Tensor], scale: float | Tensor = 1.0) -> None:
        """Bind a model, its parameters and a batch."""
        self.model, self.params, self.batch, self.scale = model, params, batch, scale

    # ---- states

    @cached_property
    def visual(self) -> Tensor:
        """Visual tokens after the universal layers, float32 [b, frames * places, size]."""
        model, params, scale = self.model, self.params, self.scale
        x = model.patches(params, self.batch["video"])
        for block in model.blocks:
            x = block(params, x, scale)
        x = normalised(params, "vision.norm", x).flatten(-3, -2)
        latents = params["latents.vectors.weight"].expand(*x.shape[:-2], -1, -1)
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
        model, allowed = self.model, (tokens != PAD)[..., None, :]
        x = model.tokens(self.params, tokens)
        for layer in model.text:
            x = layer(self.params, x, allowed, scale=self.scale)
        x = normalised(self.params, "text.norm", x)
        for layer in model.universal:
            x = layer(self.params, x, allowed, scale=self.scale)
        return self._ended(x)

    @cached_property
    def caption(self) -> Tensor:
        """Captions after the universal layers, float32 [b, n, size]."""
        return self.textual(self.batch["caption"])

    def fused(self, tokens: Tensor, states: Tensor, visual: Tensor) -> Tensor:
        """Return texts after they have attended to visual tokens, float32 [b, n, size]."""
        x, allowed = states, (tokens != PAD)[..., None, :]
        for layer in self.model.fusion:
            x = layer(self.params, x, allowed, visual, scale=self.scale)
        return normalised(self.params, "fusion.norm", x)

    def decoded(self, tokens: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Return the logits float32 [b, n, num_tokens] of the word after each of tokens int64 [b, n].

        Args:
            memory: float32 [b, k, size], what they attend to.
            allowed: bool [b, 1, k], what of it; None: everything.
        """
        x = self.model.words(self.params, tokens)
        length = tokens.shape[-1]
        past = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for layer in self.model.decoder:
            x = layer(self.params, x, past, memory, allowed, scale=self.scale)
        return self.model.words.logits(self.params, normalised(self.params, "decoder.norm", x))

    # ---- predictions

    @cached_property
    def video_embedding(self) -> Tensor:
        """Embeddings of videos for retrieval, float32 [b, contrast], of length 1."""
        return F.normalize(linear(self.params, "contrast.video", self.visual.mean(-2)), dim=-1)

    @cached_property
    def text_embedding(self) -> Tensor:
        """Embeddings of captions, likewise."""
        pooled = mean_of(self.caption, self.batch["caption"] != PAD)
        return F.normalize(linear(self.params, "contrast.text", pooled), dim=-1)

    @cached_property
    def answer_logits(self) -> Tensor:
        """Logits of the answer to each question, float32 [b, num_tokens]."""
        question = self.batch["question"]
        states = self.fused(question, self.textual(question), self.visual)
        begin = torch.full_like(question[..., :1], BEGIN)
        return self.decoded(begin, states, (question != PAD)[..., None, :])[..., 0, :]

    def generated(self, length: int) -> Tensor:
        """Return captions, word by word the likeliest one, int64 [b, length]; `PAD` follows the end."""
        tokens = torch.full((len(self.visual), 1), BEGIN, device=self.visual.device)
        for _ in range(length - 1):
            word = self.decoded(tokens, self.visual)[:, -1].argmax(-1)
            over = (tokens[:, -1] == END) | (tokens[:, -1] == PAD)
            tokens = torch.cat([tokens, word.masked_fill(over, PAD)[:, None]], dim=1)
        return tokens

    def label_logits(self, label: str) -> Tensor:
        """Return the logits of a video's classes, float32 [b, classes]."""
        return linear(self.params, f"recognition.{label}", self.visual.mean(-2))

    # ---- losses

    def retrieval(self) -> tuple[Tensor, Tensor]:
        """Return contrastive losses, and those of matching if the model has it."""
        caption, weights = self.batch["caption"], self.batch["has_video"] * self.batch["has_text"]
        same = (caption[:, None] == caption[None]).all(-1)
        temperature = self.model.options.temperature
        logits = contrastive_logits(self.video_embedding, self.text_embedding, same, weights > 0, temperature)
        losses = contrastive(logits)
        if self.model.options.matching:
            other, exists = hardest_negatives(logits)
            losses = losses + self._matching(caption, self.caption, 1)
            wrong = self._matching(caption[other], self.caption[other], 0)
            losses = losses + torch.where(exists, wrong, 0.0)
        return losses, weights

    def _matching(self, tokens: Tensor, states: Tensor, suits: int) -> Tensor:
        """Return the losses [b] of saying whether each text suits the video beside it."""
        pooled = mean_of(self.fused(tokens, states, self.visual), tokens != PAD)
        target = torch.full(tokens.shape[:-1], suits, device=tokens.device)
        return cross_entropies(linear(self.params, "matching.output", pooled), target)

    def answering(self) -> tuple[Tensor, Tensor]:
        """Return the losses of generating the answer."""
        weights = self.batch["has_video"] * self.batch["has_text"]
        return cross_entropies(self.answer_logits, self.batch["answer"]), weights

    def captioning(self) -> tuple[Tensor, Tensor]:
        """Return the losses of the caption's words, each after those before it."""
        caption, weights = self.batch["caption"], self.batch["has_video"] * self.batch["has_text"]
        logits, targets = self.decoded(caption[:, :-1], self.visual), caption[:, 1:]
        return sequence_losses(logits, targets, targets != PAD), weights

    def masked_language(self, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the losses of words of the caption that are hidden."""
        caption = self.batch["caption"]
        key = torch.zeros((), dtype=torch.int64, device=caption.device) if key is None else key
        hidden = masked_places(key, caption > MASK, self.model.options.mask_rate)
        states = self.textual(caption.masked_fill(hidden, MASK))
        return sequence_losses(self.model.tokens.logits(self.params, states), caption, hidden), self.batch["has_text"]

    def recognition(self) -> tuple[Tensor, Tensor]:
        """Return the losses of the video's classes."""
        losses = [cross_entropies(self.label_logits(name), self.batch[name]) for name in self.model.facts.num_labels]
        return torch.stack(losses).sum(0), self.batch["has_video"]
