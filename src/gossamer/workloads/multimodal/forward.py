"""What transformers of videos and texts have in common: options, sizes, modules that every one has, tasks and losses.

A model derives from `Transformer` and says which parts it has and which modules each task needs; its forward pass
derives from `Forward` and says what the visual tokens are, and, where they differ, the textual and fused ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

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
    Cut,
    Declaring,
    Layer,
    Params,
    Patches,
    Tokens,
    glorot,
    linear,
    mean_of,
    normalised,
)
from gossamer.workloads.multimodal.clips import BEGIN, END, MASK, PAD
from gossamer.workloads.multimodal.graphs import Facts, Graph, Losses, Tensors
from gossamer.workloads.multimodal.objectives import (
    contrastive,
    hardest_negatives,
    label_losses,
    masked_places,
    sequence_losses,
    true_pairs,
)
from gossamer.workloads.multimodal.sparse import taken
from gossamer.workloads.supervised import cross_entropies
from gossamer.workloads.traits import ModelTraits

Loss = tuple[Tensor, Tensor]


class EncoderOptions(ModelOptions):
    """Options of a `Transformer` without a decoder.

    With `width` below 1 it is a model of its own with the shapes of such a sub-model.

    Attributes:
        stream: channels of the residual stream; a head has ``stream / num_heads`` of them.
        num_heads: heads of each attention layer.
        hidden: hidden units of each feed-forward layer.
        vision_blocks, text_layers, fusion_layers: layers of each module.
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
    fusion_layers: int = Field(1, ge=1)
    patch: int = Field(4, ge=1)
    contrast: int = Field(32, ge=1)
    temperature: float = Field(0.07, gt=0)
    mask_rate: float = Field(0.15, ge=0, le=1)
    matching: bool = False
    cut: Cut = "heads"

    @model_validator(mode="after")
    def _divisible(self) -> EncoderOptions:
        if self.stream % self.num_heads:
            raise ValueError(
                f"stream {self.stream} cannot be divided among num_heads {self.num_heads}: make it a multiple of them"
            )
        return self


class TransformerOptions(EncoderOptions):
    """Options of a `Transformer` with a decoder. Attributes: decoder_layers: layers of this module."""

    decoder_layers: int = Field(1, ge=1)


class Transformer(DeclaredModel, ABC):
    """Base of models, see `gossamer.workloads.multimodal.graphs.VideoLanguageModel`.

    Attributes:
        graphs: ``{task: graph}`` of what it can do.
        zeros: names of the parameters that start at zero.
        fusion: layers in which texts attend to visual tokens, of models whose `Forward.fused` is the one here.
        decoder: layers that tell the next word, of models that have them.
    """

    Options: ClassVar[type[EncoderOptions]] = TransformerOptions
    options: EncoderOptions
    graphs: Mapping[str, Graph]
    zeros: tuple[str, ...] = ()
    fusion: Sequence[Layer]
    decoder: Sequence[Layer]

    def __init__(self, facts: Facts, **params: Any) -> None:
        """Read the options, and make the parts that every model has; none of them is declared yet.

        Args:
            facts: of the data.
            params: see `Options`.

        Raises:
            ConfigError: an unknown or wrong option, or frames that patches do not divide.
        """
        super().__init__()
        self.options = options = parse_options(self.Options, params, WHERE)
        if any(side % options.patch for side in facts.frame[1:]):
            raise ConfigError(
                f"{WHERE}.patch = {options.patch} does not divide frames of {facts.frame[1]} x {facts.frame[2]} pixels:"
                " choose a divisor of both"
            )
        self.traits, self.facts = ModelTraits(uses_key=True, adaptable=True, stacks_natively=True), facts
        heads, head_dim = options.num_heads, options.stream // options.num_heads
        if options.cut == "heads":
            heads = window_length(heads, options.width)
        else:
            head_dim = window_length(head_dim, options.width)
        self.heads, self.hidden = (heads, head_dim), window_length(options.hidden, options.width)
        length = max(facts.caption_length, facts.question_length)
        self.patches = Patches("vision", options.stream, facts.frame, facts.num_frames, options.patch)
        self.tokens, self.words = (
            Tokens(name, options.stream, facts.num_tokens, length) for name in ("text", "decoder")
        )
        self.text = self.layers("text", options.text_layers)
        if isinstance(options, TransformerOptions):
            self.decoder = self.layers("decoder", options.decoder_layers, has_memory=True)

    def layers(self, name: str, count: int, *, has_memory: bool = False) -> list[Layer]:
        """Return the layers of a module."""
        inner = *self.heads, self.hidden, self.options.cut
        return [Layer(f"{name}.layer{i}", self.options.stream, *inner, has_memory) for i in range(count)]

    def declare(self, parts: Sequence[Declaring], norms: str) -> None:
        """Declare parts, the last normalisation of modules, and heads; modules then lie one after another.

        Args:
            parts: in the order in which they lie in their module.
            norms: names of modules.
        """
        size, options = self.options.stream, self.options
        for part in parts:
            part.declare(self)
        for name in norms.split():
            self.add(f"{name}.norm", (size,), (None,))
        for side in ("video", "text"):
            self.add(f"contrast.{side}", (options.contrast, size), (None, None))
        if options.matching:
            self.add("matching.output", (2, size), (None, None))
        for label, count in self.facts.num_labels.items():
            self.add(f"recognition.{label}", (count, size), (self.facts.label_axis(label), None))
        order = dict.fromkeys(name.partition(".")[0] for name in self.shapes)
        names = [name for module in order for name in self.shapes if name.partition(".")[0] == module]
        self.shapes, self.axes = {n: self.shapes[n] for n in names}, {n: self.axes[n] for n in names}

    def init(self, source: np.random.Generator) -> dict[str, Tensor]:
        """Return initial parameters, see `glorot`; those of `zeros` start at zero."""
        drawn = glorot(self.shapes, source)
        return drawn | {name: torch.zeros_like(drawn[name]) for name in self.zeros}

    @abstractmethod
    def forward(
        self, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> Forward:
        """Begin a forward pass."""

    def losses(
        self, tasks: Collection[str], params: Tensors, batch: Tensors, context: ForwardContext = DEFAULT_CONTEXT
    ) -> Losses:
        """Return the losses of tasks, see `VideoLanguageModel`."""
        of_task = self.forward(params, batch, context).losses()
        return {task: of_task[task]() for task in tasks}

    @torch.no_grad()
    def predict(self, task: str, params: Tensors, batch: Tensors) -> dict[str, Tensor]:
        """Return what the metrics of a task are made of, see `VideoLanguageModel`."""
        forward = self.forward(params, batch, ForwardContext(training=False))
        if task == "retrieval":
            return {"video": forward.video_embedding, "text": forward.text_embedding}
        if task == "question-answering":
            return {"logits": forward.answer_logits}
        if task == "captioning":
            return {"tokens": forward.generated(self.facts.caption_length)}
        if task == "recognition":
            return {label: forward.label_logits(label) for label in self.facts.num_labels}
        return {}


class Forward(ABC):
    """One forward pass; what several tasks need of it is computed once.

    Of s stacked clients, parameters, batch and key have a further first dimension, and so has all that is returned.
    """

    def __init__(
        self, model: Transformer, params: Params, batch: Mapping[str, Tensor], context: ForwardContext = DEFAULT_CONTEXT
    ) -> None:
        """Bind a model, its parameters and a batch."""
        self.model, self.params, self.batch = model, params, batch
        self.scale, self._key = context.scale, context.key

    @property
    def key(self) -> Tensor:
        """Random bits of the step, int64 []; zeros where there are none, as while metrics are computed."""
        any_of_batch = next(iter(self.batch.values()))
        return torch.zeros((), dtype=torch.int64, device=any_of_batch.device) if self._key is None else self._key

    # ---- states

    @cached_property
    @abstractmethod
    def visual(self) -> Tensor:
        """Visual tokens of the whole video, float32 [b, frames * places, size]."""

    def pooled(self) -> Tensor:
        """Return the mean of what is seen of each video, float32 [b, size]."""
        return self.visual.mean(-2)

    def textual(self, tokens: Tensor) -> Tensor:
        """Return the states of texts int64 [b, n], float32 [b, n, size]."""
        allowed, x = (tokens != PAD)[..., None, :], self.model.tokens(self.params, tokens)
        for layer in self.model.text:
            x = layer(self.params, x, allowed, scale=self.scale)
        return normalised(self.params, "text.norm", x)

    @cached_property
    def caption(self) -> Tensor:
        """States of the captions, float32 [b, n, size]."""
        return self.textual(self.batch["caption"])

    def fused(self, tokens: Tensor, states: Tensor, visual: Tensor) -> Tensor:
        """Return texts after they have attended to visual tokens, float32 [b, n, size].

        Args:
            tokens: int64 [b, n].
            states: float32 [b, n, size], theirs.
            visual: float32 [b, k, size].
        """
        x, allowed = states, (tokens != PAD)[..., None, :]
        for layer in self.model.fusion:
            x = layer(self.params, x, allowed, visual, scale=self.scale)
        return normalised(self.params, "fusion.norm", x)

    @cached_property
    def fused_caption(self) -> Tensor:
        """The caption after it has met the video, float32 [b, n, size]."""
        return self.fused(self.batch["caption"], self.caption, self.visual)

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

    def embedded(self, side: str, pooled: Tensor) -> Tensor:
        """Return the embeddings of pooled states [..., size] of a side for retrieval, [..., contrast], of length 1."""
        return F.normalize(linear(self.params, f"contrast.{side}", pooled), dim=-1)

    @cached_property
    def video_embedding(self) -> Tensor:
        """Embeddings of videos, float32 [b, contrast]."""
        return self.embedded("video", self.pooled())

    @cached_property
    def text_embedding(self) -> Tensor:
        """Embeddings of captions, likewise."""
        return self.embedded("text", mean_of(self.caption, self.batch["caption"] != PAD))

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
            word = self.next_words(tokens).argmax(-1)
            over = (tokens[:, -1] == END) | (tokens[:, -1] == PAD)
            tokens = torch.cat([tokens, word.masked_fill(over, PAD)[:, None]], dim=1)
        return tokens

    def next_words(self, tokens: Tensor) -> Tensor:
        """Return the logits float32 [b, num_tokens] of the word after captions int64 [b, n] of the videos."""
        return self.decoded(tokens, self.visual)[:, -1]

    def label_logits(self, label: str) -> Tensor:
        """Return the logits of a video's classes, float32 [b, classes]."""
        return linear(self.params, f"recognition.{label}", self.pooled())

    # ---- losses, [b], and how much each sample counts, [b]

    def losses(self) -> dict[str, Callable[[], Loss]]:
        """Return ``{task: its losses}``."""
        return {
            "retrieval": self.retrieval,
            "question-answering": self.answering,
            "captioning": self.captioning,
            "masked-language": self.masked_language,
            "recognition": self.recognition,
        }

    @cached_property
    def paired(self) -> Tensor:
        """How much each sample counts where both modalities are needed, float32 [b]."""
        return self.batch["has_video"] * self.batch["has_text"]

    def true_pairs(self, similarity: Tensor) -> Tensor:
        """Return similarities [b, b] as `objectives.true_pairs` does; clips of the same caption are no negatives."""
        caption = self.batch["caption"]
        same = (caption[..., :, None, :] == caption[..., None, :, :]).all(-1)
        return true_pairs(similarity, same, self.paired > 0, self.model.options.temperature)

    def retrieval(self) -> Loss:
        """Return contrastive losses, and those of matching if the model has it."""
        logits = self.true_pairs(self.video_embedding @ self.text_embedding.mT)
        losses = contrastive(logits)
        if self.model.options.matching:
            caption = self.batch["caption"]
            other, exists = hardest_negatives(logits)
            losses = losses + self._matching(caption, self.fused_caption, 1)
            tokens, states = taken(caption, other), taken(self.caption.flatten(-2), other).view_as(self.caption)
            wrong = self._matching(tokens, self.fused(tokens, states, self.visual), 0)
            losses = losses + torch.where(exists, wrong, 0.0)
        return losses, self.paired

    def _matching(self, tokens: Tensor, fused: Tensor, suits: int) -> Tensor:
        """Return the losses [b] of saying whether each text, as fused, suits the video beside it."""
        target = torch.full(tokens.shape[:-1], suits, device=tokens.device)
        return cross_entropies(linear(self.params, "matching.output", mean_of(fused, tokens != PAD)), target)

    def answering(self) -> Loss:
        """Return the losses of generating the answer."""
        return cross_entropies(self.answer_logits, self.batch["answer"]), self.paired

    def captioning(self) -> Loss:
        """Return the losses of the caption's words, each after those before it."""
        caption = self.batch["caption"]
        logits, targets = self.decoded(caption[..., :-1], self.visual), caption[..., 1:]
        return sequence_losses(logits, targets, targets != PAD), self.paired

    def masked_language(self) -> Loss:
        """Return the losses of words of the caption that are hidden, by the other words alone."""
        caption, hidden = self.batch["caption"], self.hidden
        states = self.textual(caption.masked_fill(hidden, MASK))
        return sequence_losses(self.model.tokens.logits(self.params, states), caption, hidden), self.batch["has_text"]

    def grounded_language(self) -> Loss:
        """Return the losses of words of the caption that are hidden, by the other words and the video."""
        caption, hidden = self.batch["caption"], self.hidden
        left = caption.masked_fill(hidden, MASK)
        states = self.fused(left, self.textual(left), self.visual)
        return sequence_losses(self.model.tokens.logits(self.params, states), caption, hidden), self.paired

    @cached_property
    def hidden(self) -> Tensor:
        """Which words of the caption are hidden, bool [b, n]."""
        return masked_places(self.key, self.batch["caption"] > MASK, self.model.options.mask_rate)

    def recognition(self) -> Loss:
        """Return the losses of the video's classes."""
        losses, has_any = label_losses({n: self.label_logits(n) for n in self.model.facts.num_labels}, self.batch)
        return losses, self.batch["has_video"] * has_any
