"""Small transformers as pure functions of named parameters, cut by whole heads or inside every head.

Which dimensions a capacity below 1 shortens:

- ``cut="heads"``: whole heads, one axis a block; what a head computes, and its softmax, stay as they are.
- ``cut="head-dim"``: every head keeps some of its channels, the same ones in all heads of a block; queries share theirs
  with keys (one axis) and values with the output projection (another). The softmax keeps the full model's scale.
- the hidden width of every feed-forward layer, an axis of its own; or, with ``experts``, whole experts of it.
- ``cut_stream=True``: also the residual stream, one axis for embedding, positions, normalisations and projections.

Characters, words and positions are never cut. With a whole stream, a sub-model computes what the full model would
compute with all other channels set to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.submodel.layout import LABEL_AXIS, AxisSpec, Dim
from gossamer.submodel.windows import window_length
from gossamer.workloads.base import DEFAULT_CONTEXT, ForwardContext
from gossamer.workloads.dropout import Dropout
from gossamer.workloads.models import WHERE, DeclaredModel, ModelOptions, rescale
from gossamer.workloads.traits import ModelTraits

STREAM = "stream"


class BlockOptions(ModelOptions):
    """Options of every transformer; `width` (in (0, 1]) makes a model of its own with the shapes of such a sub-model.

    Attributes:
        stream: channels of the residual stream; a head has ``stream / num_heads`` of them.
        num_blocks: attention and feed-forward layers.
        num_heads: heads of each attention layer.
        hidden: hidden units of each feed-forward layer.
        cut: whether a capacity drops whole heads or channels of every head.
        cut_stream: whether a capacity cuts the residual stream, too.
        dropout: share of what enters the stream, and of the shares of attention, that is dropped while training.
        experts: experts of each feed-forward layer, of `hidden` units each, among which a router chooses for every
            token; a capacity holds some of them as a whole. None: there is one perceptron, and no router.
        top_experts: experts that a token goes through.
        balance: share of the training loss that spreads tokens over experts; the cross entropy has the rest.
    """

    stream: int = Field(64, ge=1)
    num_blocks: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    hidden: int = Field(256, ge=1)
    cut: Literal["heads", "head-dim"] = "heads"
    cut_stream: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    experts: int | None = Field(None, ge=1)
    top_experts: int = Field(2, ge=1)
    balance: float = Field(0.01, ge=0, lt=1)

    @model_validator(mode="after")
    def _routable(self) -> BlockOptions:
        for option in ("top_experts", "balance"):
            if self.experts is None and option in self.model_fields_set:
                raise ValueError(f"{option} changes nothing without experts: leave it out, or give their number")
        if self.experts is not None and self.top_experts > self.experts:
            raise ValueError(f"top_experts {self.top_experts} exceeds experts {self.experts}: lower it")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> BlockOptions:
        if self.stream % self.num_heads:
            raise ValueError(
                f"stream {self.stream} cannot be divided among num_heads {self.num_heads}: make it a multiple of them"
            )
        return self


class TransformerOptions(BlockOptions):
    """Options of `Transformer`. Attributes: tied: whether the output layer is the embedding; it has no bias then."""

    tied: bool = False


class TransformerBlocks(DeclaredModel):
    """Base of transformers with pre-normalisation.

    Tokens and learned positions are embedded; every block adds multi-head attention to the stream, then a
    perceptron with GELU, each of the normalised stream; a normalisation and a linear layer end it. Dropout stands where
    GPT-2 has it: after the embedding, in the shares of attention, and on what every layer adds to the stream.

    With ``experts`` the perceptron is a mixture of as many, see `_routed`: a participant of a smaller capacity holds
    whole experts, and its router chooses among these. All experts that are held are computed for every token, and those
    that the router did not choose count 0: that saves traffic and memory of who holds few, but no computation.

    While training, the scaler (HeteroFL, arXiv 2010.01264) multiplies what a sum over a cut width receives, so that the
    sum over a share of the channels is about as large as the whole one.

    Attributes:
        is_causal: whether a place attends to itself and those before it alone.
        blocks: names of the blocks.
        head_dim: channels of a head; the softmax's scale is ``head_dim ** -0.5``, of every sub-model, too.
    """

    Options: ClassVar[type[BlockOptions]] = BlockOptions
    is_causal: ClassVar[bool] = True

    def _declare(self, length: int, num_tokens: int, token_axis: str | None, options: BlockOptions) -> None:
        """Declare all parameters but those of an output layer.

        Args:
            length: most tokens in a row.
            num_tokens: characters or words of the vocabulary.
            token_axis: axis of the embedding's first dimension.
            options: of the model.
        """
        self.options = options
        share = options.balance if options.experts is not None else 0.0
        self.traits = ModelTraits(uses_key=options.dropout > 0, adaptable=True, terms_share=share)
        self.blocks = tuple(f"block{i}" for i in range(options.num_blocks))
        self.head_dim, self.num_heads = options.stream // options.num_heads, options.num_heads
        if options.cut == "heads":
            self.num_heads = window_length(self.num_heads, options.width)
        else:
            self.head_dim = window_length(self.head_dim, options.width)
        hidden = window_length(options.hidden, options.width)
        size, axis = (
            (window_length(options.stream, options.width), STREAM) if options.cut_stream else (options.stream, None)
        )
        self.stream: tuple[int, AxisSpec] = (size, axis)
        self.add("embedding", (num_tokens, size), (token_axis, axis), bias=False)
        self.add("positions", (length, size), (None, axis), bias=False)
        for block in self.blocks:
            self.add(f"{block}.norm0", (size,), (axis,))
            self._add_attention(block, size, axis)
            self.add(f"{block}.norm1", (size,), (axis,))
            self._add_feed_forward(block, hidden, size, axis)
        self.add("norm", (size,), (axis,))

    def _add_feed_forward(self, block: str, hidden: int, size: int, axis: str | None) -> None:
        """Declare a perceptron, or a mixture of them side by side and their router."""
        inner, options = cast(AxisSpec, f"{block}.hidden"), self.options
        if options.experts is not None:
            num_experts = window_length(options.experts, options.width)
            hidden, inner = num_experts * options.hidden, Dim(f"{block}.experts", inner=options.hidden)
            self.add(f"{block}.router", (num_experts, size), (f"{block}.experts", axis), bias=False)
        self.add(f"{block}.expand", (hidden, size), (inner, axis))
        self.add(f"{block}.contract", (size, hidden), (axis, inner))

    def _add_attention(self, block: str, size: int, axis: str | None) -> None:
        """Declare the four projections; their inner dimension runs over heads, and in each over its channels."""
        inner = self.num_heads * self.head_dim
        if self.options.cut == "heads":
            matched = mixed = Dim(f"{block}.heads", inner=self.head_dim)
        else:
            matched, mixed = (Dim(f"{block}.{pair}", outer=self.num_heads) for pair in ("query-key", "value-output"))
        self.add(f"{block}.query", (inner, size), (matched, axis))
        self.add(f"{block}.key", (inner, size), (matched, axis))
        self.add(f"{block}.value", (inner, size), (mixed, axis))
        self.add(f"{block}.project", (size, inner), (axis, mixed))

    def _encoded(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext) -> Tensor:
        """Return what an output layer is given of every place of x, float32 [b, n, stream]."""
        scale, p, dropout = context.scale, self.options.dropout, Dropout(context.key)
        wide = scale if self.options.cut_stream else 1.0
        stream = F.embedding(x, params["embedding.weight"]) + params["positions.weight"][: x.shape[-1]]
        stream = dropout(stream, p)
        for block in self.blocks:
            normal = rescale(_normalised(params, f"{block}.norm0", stream), wide)
            stream = stream + dropout(self._attention(params, block, normal, scale, dropout), p)
            normal = rescale(_normalised(params, f"{block}.norm1", stream), wide)
            stream = stream + dropout(self._feed_forward(params, block, normal, context), p)
        return rescale(_normalised(params, "norm", stream), wide)

    def _feed_forward(self, params: Mapping[str, Tensor], block: str, x: Tensor, context: ForwardContext) -> Tensor:
        """Return what a perceptron, or a mixture of them, adds to the stream, of x float32 [b, n, stream]."""
        hidden = F.gelu(_linear(params, f"{block}.expand", x))
        if self.options.experts is None:
            return _linear(params, f"{block}.contract", rescale(hidden, context.scale))
        gates, imbalance = self._routed(params[f"{block}.router.weight"], x)
        if context.terms is not None:
            context.terms[f"{block}.balance"] = imbalance / len(self.blocks)
        each = hidden.reshape(*hidden.shape[:-1], -1, self.options.hidden)  # [b, n, experts, hidden]
        return _linear(params, f"{block}.contract", (each * gates[..., None]).flatten(-2))

    def _routed(self, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of each expert for each token, and how unevenly tokens are spread over experts.

        The softmax of the largest logits, and 0 for all other experts (Shazeer et al., arXiv 1701.06538). Weights sum
        to 1 however many experts are held, so that the scaler has nothing to make up for. Imbalance is that of Switch
        (Fedus et al., arXiv 2101.03961, Eq. 4) of each sample by itself, so that padding does not count: E sum_e f_e
        P_e, of the share f of its tokens that expert e gets, and the mean probability P; 1 where both are even.

        Args:
            router: float32 [experts, stream], of those that are held.
            x: float32 [b, n, stream], normalised.

        Returns:
            float32 [b, n, experts]; float32 [b].
        """
        logits = F.linear(x, router)
        best, which = logits.topk(min(self.options.top_experts, logits.shape[-1]), dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, which, best.softmax(-1))
        shares = torch.zeros_like(logits).scatter(-1, which, 1 / best.shape[-1]).mean(-2)
        return gates, logits.shape[-1] * (shares * logits.softmax(-1).mean(-2)).sum(-1)

    def _attention(
        self, params: Mapping[str, Tensor], block: str, x: Tensor, scale: float | Tensor, dropout: Dropout
    ) -> Tensor:
        """Return what attention adds to the stream.

        Written with plain products, which `torch.vmap` and the counting of FLOPs understand.

        Args:
            x: float32 [b, n, stream], normalised.
            scale: the scaler's factor; it also reaches the scores where these are sums over a cut width.
            dropout: the pass's calls of dropout.
        """
        split = (-1, self.head_dim) if self.options.cut == "heads" else (self.num_heads, -1)
        query, key, value = (
            _linear(params, f"{block}.{name}", x).reshape(*x.shape[:-1], *split).transpose(-3, -2)
            for name in ("query", "key", "value")
        )
        if self.options.cut == "head-dim":
            query = rescale(query, scale)
        scores = (query * (1 / math.sqrt(self.head_dim))) @ key.transpose(-1, -2)
        if self.is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        mixed = dropout(scores.softmax(-1), self.options.dropout) @ value
        return _linear(params, f"{block}.project", rescale(mixed.transpose(-3, -2).flatten(-2), scale))


class Transformer(TransformerBlocks):
    """Causal transformer with pre-normalisation (Vaswani et al., arXiv 1706.03762; Radford et al., 2019).

    It predicts the next character at every place, see `TransformerBlocks`.
    """

    Options = TransformerOptions

    def __init__(self, context: int, num_labels: int, **params: Any) -> None:
        """Declare the parameters.

        Args:
            context: most characters in a row.
            num_labels: characters of the vocabulary.
            params: see `TransformerOptions`.

        Raises:
            ConfigError: an unknown or wrong option.
        """
        super().__init__()
        options = parse_options(TransformerOptions, params, WHERE)
        self._declare(context, num_labels, LABEL_AXIS, options)
        self.is_tied = options.tied
        if not options.tied:
            self.add("output", (num_labels, self.stream[0]), (LABEL_AXIS, self.stream[1]))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits of the next character at every place, float32 [b, n, num_labels].

        Args:
            params: parameters of the model or of a sub-model.
            x: int64 [b, n], n at most the context; place i depends on the characters 0 .. i alone.
            context: only its scale and key matter, as there is no BatchNorm.
        """
        normal = self._encoded(params, x, context)
        return F.linear(normal, params["embedding.weight"]) if self.is_tied else _linear(params, "output", normal)


class TextClassifier(TransformerBlocks):
    """Classifier of texts of words or other tokens, by a transformer (Vaswani et al., arXiv 1706.03762).

    What `TransformerBlocks` make of all places is averaged and goes into a linear layer. Padding is a token like
    others, as in LEAF's own models.
    """

    is_causal = False

    def __init__(
        self, input_shape: tuple[int, ...], num_labels: int, num_tokens: int | None = None, **params: Any
    ) -> None:
        """Declare the parameters.

        Args:
            input_shape: length of a sample.
            num_labels: number of classes.
            num_tokens: size of the vocabulary; None: samples are no tokens.
            params: see `BlockOptions`.

        Raises:
            ConfigError: an unknown or wrong option, or samples that are no tokens.
        """
        super().__init__()
        if num_tokens is None or len(input_shape) != 1:
            raise ConfigError(
                f"{WHERE} 'transformer' is for tokens, whole numbers from 0 on [length], but samples of the shape"
                f" {input_shape} are none: take another model"
            )
        options = parse_options(BlockOptions, params, WHERE)
        self._declare(input_shape[0], num_tokens, None, options)
        self.traits = replace(self.traits, takes_tokens=True)
        self.add("output", (num_labels, self.stream[0]), (LABEL_AXIS, self.stream[1]))

    def apply(self, params: Mapping[str, Tensor], x: Tensor, context: ForwardContext = DEFAULT_CONTEXT) -> Tensor:
        """Return logits float32 [b, num_labels] of tokens int64 [b, length], see `gossamer.workloads.base.Model`."""
        return _linear(params, "output", self._encoded(params, x, context).mean(-2))


def _linear(params: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    return F.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])


def _normalised(params: Mapping[str, Tensor], layer: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params[f"{layer}.weight"], params[f"{layer}.bias"])
