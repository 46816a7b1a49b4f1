"""Building blocks of transformers as pure functions of named parameters; each declares its axes once.

What a capacity below 1 shortens: in attention whole heads (``cut="heads"``), or the channels inside every head
(``cut="head-dim"``, where queries share theirs with keys, and values with the output); the hidden width of feed-forward
layers and of local temporal blocks. The residual stream, tokens, patches, classes and positions are never cut, so a
sub-model computes what the whole model would with all other channels set to zero.

All leading dimensions of inputs are batch dimensions, parameters may be stacked (see `stacked`), and nothing but plain
products is used, so blocks run under `torch.vmap`, on any device, and their FLOPs are counted. While training, the
scaler (HeteroFL, arXiv 2010.01264) multiplies what a sum over a cut width receives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.submodel.layout import AxisSpec, Dim
from gossamer.workloads import stacked
from gossamer.workloads.features import linear as linear
from gossamer.workloads.features import normalised as normalised
from gossamer.workloads.models import DeclaredModel, rescale
from gossamer.workloads.multimodal.sparse import taken

Params = Mapping[str, Tensor]
Cut = Literal["heads", "head-dim"]
Scale = float | Tensor


def glorot(shapes: Mapping[str, tuple[int, ...]], source: np.random.Generator) -> dict[str, Tensor]:
    """Draw parameters: matrices uniform in ±sqrt(6 / (rows + columns)) (Glorot and Bengio, 2010).

    Normalisations start with 1, biases with 0; embeddings, which have no bias beside them, are normal, deviation 0.5.
    """
    params: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            params[name] = torch.full(shape, 1.0 if name.endswith(".weight") else 0.0)
        elif f"{name.removesuffix('weight')}bias" in shapes:
            uniform = torch.from_numpy(source.random(shape, dtype=np.float32))
            params[name] = uniform.mul_(2).sub_(1).mul_(math.sqrt(6 / sum(shape)))
        else:
            params[name] = torch.from_numpy(source.standard_normal(shape, dtype=np.float32)).mul_(0.5)
    return params


def mean_of(x: Tensor, counts: Tensor) -> Tensor:
    """Return the mean [..., size] of the places of x [..., n, size] that `counts`, bool [..., n], marks; 0 of none."""
    weights = counts.to(x.dtype)[..., None]
    return (x * weights).sum(-2) / weights.sum(-2).clamp_min(1)


class Declaring(Protocol):
    """A block that declares its parameters."""

    def declare(self, model: DeclaredModel) -> None:
        """Declare them."""


@dataclass(frozen=True)
class Attention:
    """Multi-head attention to a sequence, its own or another one (Vaswani et al., arXiv 1706.03762).

    The softmax keeps the scale ``head_dim ** -0.5`` of the whole model in every sub-model.

    Attributes:
        name: prefix of its parameters.
        size: width of the stream.
        num_heads, head_dim: heads, and channels of each.
        cut: what a capacity cuts.
        memory_size: width of the sequence that is attended to; None: `size`.
    """

    name: str
    size: int
    num_heads: int
    head_dim: int
    cut: Cut = "heads"
    memory_size: int | None = None

    def declare(self, model: DeclaredModel) -> None:
        """Declare the four projections; their inner dimension runs over heads, and in each over its channels."""
        inner, memory = self.num_heads * self.head_dim, self.memory_size or self.size
        matched: AxisSpec
        mixed: AxisSpec
        if self.cut == "heads":
            matched = mixed = Dim(f"{self.name}.heads", inner=self.head_dim)
        else:
            matched, mixed = (
                Dim(f"{self.name}.{pair}", outer=self.num_heads) for pair in ("query-key", "value-output")
            )
        model.add(f"{self.name}.query", (inner, self.size), (matched, None))
        model.add(f"{self.name}.key", (inner, memory), (matched, None))
        model.add(f"{self.name}.value", (inner, memory), (mixed, None))
        model.add(f"{self.name}.project", (self.size, inner), (None, mixed))

    def __call__(
        self,
        params: Params,
        x: Tensor,
        memory: Tensor | None = None,
        allowed: Tensor | None = None,
        scale: Scale = 1.0,
    ) -> Tensor:
        """Return what is added to the stream, float32 [..., n, size].

        Args:
            params: of the model.
            x: float32 [..., n, size].
            memory: float32 [..., k, memory_size], what is attended to; None: x.
            allowed: bool, of a shape that broadcasts to [..., n, k], what may be attended to; None: everything. Where
                nothing may be, all places count alike.
            scale: the scaler's factor.
        """
        memory = x if memory is None else memory
        query, key, value = (
            self._heads_of(params, name, source) for name, source in (("query", x), ("key", memory), ("value", memory))
        )
        if self.cut == "head-dim":
            query = rescale(query, scale)
        scores = (query * (1 / math.sqrt(self.head_dim))) @ key.transpose(-1, -2)
        if allowed is not None:
            scores = scores.masked_fill(~allowed.unsqueeze(-3), torch.finfo(scores.dtype).min)
        mixed = scores.softmax(-1) @ value
        return linear(params, f"{self.name}.project", rescale(mixed.transpose(-3, -2).flatten(-2), scale))

    def shares(self, params: Params, x: Tensor, memory: Tensor) -> Tensor:
        """Return how x [..., n, size] divides its attention among a memory [..., k, memory_size], mean of the heads.

        Returns:
            float32 [..., n, k]; they sum to 1. No gradient goes through them.
        """
        with torch.no_grad():
            query, key = (self._heads_of(params, n, source) for n, source in (("query", x), ("key", memory)))
            return ((query * (1 / math.sqrt(self.head_dim))) @ key.transpose(-1, -2)).softmax(-1).mean(-3)

    def _heads_of(self, params: Params, layer: str, source: Tensor) -> Tensor:
        """Return a projection of a sequence [..., n, size], divided into heads: [..., heads, n, head_dim]."""
        split = (-1, self.head_dim) if self.cut == "heads" else (self.num_heads, -1)
        return linear(params, f"{self.name}.{layer}", source).reshape(*source.shape[:-1], *split).transpose(-3, -2)


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers with GELU between. Attributes: name; size: of the stream; hidden: units, an axis of its own."""

    name: str
    size: int
    hidden: int

    def declare(self, model: DeclaredModel) -> None:
        """Declare both layers."""
        model.add(f"{self.name}.expand", (self.hidden, self.size), (f"{self.name}.hidden", None))
        model.add(f"{self.name}.contract", (self.size, self.hidden), (None, f"{self.name}.hidden"))

    def __call__(self, params: Params, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return what is added to the stream, of the shape of x [..., size]."""
        hidden = rescale(F.gelu(linear(params, f"{self.name}.expand", x)), scale)
        return linear(params, f"{self.name}.contract", hidden)


@dataclass(frozen=True)
class LocalTemporal:
    """Local temporal block of mPLUG-2 (arXiv 2302.00402): mixes every place of a frame with its neighbours in time.

    Layer normalisation, a linear layer to half the width, a depthwise convolution over three frames, QuickGELU, and a
    linear layer back, which starts at zero.

    Attributes:
        name, size: prefix of its parameters, and width of the stream.
        hidden: channels in between, an axis of its own; in the paper half the stream.
    """

    name: str
    size: int
    hidden: int

    def declare(self, model: DeclaredModel) -> None:
        """Declare the layers; `zeros` names those that start at zero."""
        axis, hidden = f"{self.name}.hidden", self.hidden
        model.add(f"{self.name}.norm", (self.size,), (None,))
        model.add(f"{self.name}.reduce", (hidden, self.size), (axis, None))
        model.add(f"{self.name}.mix", (hidden, 3), (axis, None))
        model.add(f"{self.name}.restore", (self.size, hidden), (None, axis))

    @property
    def zeros(self) -> tuple[str, ...]:
        """Names of the parameters that start at zero."""
        return f"{self.name}.restore.weight", f"{self.name}.restore.bias"

    def __call__(self, params: Params, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return what is added to the stream, of the shape of x [..., frames, places, size]."""
        hidden = linear(params, f"{self.name}.reduce", normalised(params, f"{self.name}.norm", x))
        weight, nothing = params[f"{self.name}.mix.weight"], torch.zeros_like(hidden[..., :1, :, :])
        kernel = (*weight.unbind(-1), params[f"{self.name}.mix.bias"])
        first, middle, last, bias = (stacked.beside(one, 1, hidden) for one in kernel)
        before = torch.cat([nothing, hidden[..., :-1, :, :]], dim=-3)
        after = torch.cat([hidden[..., 1:, :, :], nothing], dim=-3)
        hidden = before * first + hidden * middle + after * last + bias
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        return linear(params, f"{self.name}.restore", rescale(hidden, scale))


@dataclass(frozen=True)
class Patches:
    """Embedding of the square patches of frames, a convolution of kernel and stride (1, p, p), with learned positions.

    Attributes:
        name, size: prefix of its parameters, and width of the stream.
        shape: channels, height and width of a frame.
        num_frames: most frames of a video.
        patch: pixels of a side.
    """

    name: str
    size: int
    shape: tuple[int, int, int]
    num_frames: int
    patch: int

    @property
    def num_places(self) -> int:
        """Patches of a frame."""
        return (self.shape[1] // self.patch) * (self.shape[2] // self.patch)

    def declare(self, model: DeclaredModel) -> None:
        """Declare the projection and positions in space and time; nothing is cut."""
        model.add(f"{self.name}.patches", (self.size, self.shape[0] * self.patch**2), (None, None))
        model.add(f"{self.name}.places", (self.num_places, self.size), (None, None), bias=False)
        model.add(f"{self.name}.frames", (self.num_frames, self.size), (None, None), bias=False)

    def cut_out(self, video: Tensor) -> Tensor:
        """Return the patches [..., frames, places, channels * p * p] of a video [..., frames, channels, h, w]."""
        rows, columns = (side // self.patch for side in self.shape[1:])
        tiles = video.reshape(*video.shape[:-2], rows, self.patch, columns, self.patch)
        # [..., frames, channels, rows, p, columns, p] -> [..., frames, rows, columns, channels, p, p]
        return tiles.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)

    def __call__(self, params: Params, video: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return tokens float32 [..., frames, places, size] of a video float32 [..., frames, channels, h, w].

        Args:
            params: of the model.
            video: its pixels.
            chosen: places int64 [..., frames, k] of each frame; nothing of the others is computed. None: all.
        """
        pixels, where = self.cut_out(video), params[f"{self.name}.places.weight"]
        if chosen is not None:
            pixels, where = taken(pixels, chosen), stacked.embedding(chosen, where)
        tokens = linear(params, f"{self.name}.patches", pixels)
        when = params[f"{self.name}.frames.weight"][..., : video.shape[-4], None, :]
        return tokens + stacked.beside(where, 2, tokens) + stacked.beside(when, 3, tokens)


@dataclass(frozen=True)
class Tokens:
    """Embedding of tokens with learned positions.

    Attributes:
        name, size: prefix of its parameters, and width of the stream.
        num_tokens: size of the vocabulary.
        length: most tokens of a text.
    """

    name: str
    size: int
    num_tokens: int
    length: int

    def declare(self, model: DeclaredModel) -> None:
        """Declare the embedding and positions; nothing is cut."""
        model.add(f"{self.name}.embedding", (self.num_tokens, self.size), (None, None), bias=False)
        model.add(f"{self.name}.positions", (self.length, self.size), (None, None), bias=False)

    def __call__(self, params: Params, tokens: Tensor) -> Tensor:
        """Return float32 [..., n, size] of tokens int64 [..., n]."""
        places = params[f"{self.name}.positions.weight"][..., : tokens.shape[-1], :]
        x = stacked.embedding(tokens, params[f"{self.name}.embedding.weight"])
        return x + stacked.beside(places, 2, x)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        """Return float32 [..., num_tokens], the products of x [..., size] and the embedding, which is tied."""
        return stacked.linear(x, params[f"{self.name}.embedding.weight"])


@dataclass(frozen=True)
class Layer:
    """A layer with pre-normalisation: self-attention, cross-attention if it has a memory, and feed-forward.

    Attributes:
        name: prefix of its parameters.
        size: width of the stream.
        num_heads, head_dim: heads of each attention, and channels of each.
        hidden: units of the feed-forward layer.
        cut: what a capacity cuts of attention.
        has_memory: whether there is cross-attention.
    """

    name: str
    size: int
    num_heads: int
    head_dim: int
    hidden: int
    cut: Cut = "heads"
    has_memory: bool = False
    attention: Attention = field(init=False)
    across: Attention = field(init=False)
    feed: FeedForward = field(init=False)

    def __post_init__(self) -> None:
        heads = self.size, self.num_heads, self.head_dim, self.cut
        object.__setattr__(self, "attention", Attention(f"{self.name}.attention", *heads))
        object.__setattr__(self, "across", Attention(f"{self.name}.across", *heads))
        object.__setattr__(self, "feed", FeedForward(f"{self.name}.feed", self.size, self.hidden))

    def declare(self, model: DeclaredModel) -> None:
        """Declare the parts and their normalisations."""
        parts: list[Attention | FeedForward] = [self.attention, *([self.across] if self.has_memory else []), self.feed]
        for part in parts:
            model.add(f"{part.name}.norm", (self.size,), (None,))
            part.declare(model)

    def __call__(
        self,
        params: Params,
        x: Tensor,
        allowed: Tensor | None = None,
        memory: Tensor | None = None,
        memory_allowed: Tensor | None = None,
        scale: Scale = 1.0,
    ) -> Tensor:
        """Return the stream after the layer, of the shape of x [..., n, size].

        Args:
            params: of the model.
            x: float32 [..., n, size].
            allowed: bool that broadcasts to [..., n, n], see `Attention`.
            memory: float32 [..., k, size], for cross-attention.
            memory_allowed: bool that broadcasts to [..., n, k].
            scale: the scaler's factor.
        """
        inner = normalised(params, f"{self.attention.name}.norm", x)
        x = x + self.attention(params, inner, None, allowed, scale)
        if memory is not None:
            inner = normalised(params, f"{self.across.name}.norm", x)
            x = x + self.across(params, inner, memory, memory_allowed, scale)
        return x + self.feed(params, normalised(params, f"{self.feed.name}.norm", x), scale)
