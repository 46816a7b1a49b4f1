"""Trajectory-to-word attention of TW-BERT (Yang et al., arXiv 2301.01953), and its fine-grained similarity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.submodel.layout import Dim
from gossamer.workloads.models import DeclaredModel, rescale
from gossamer.workloads.multimodal.blocks import Params, Scale, linear


@dataclass(frozen=True)
class TrajectoryToWord:
    """Each word attends to the patches of every frame by itself, then to what it found in each of the frames.

    With a word's query q_i: y_{i,t} = sum_s softmax_s(q_i k_{t,s} / sqrt(d)) v_{t,s}, the word's trajectory, and then,
    with projections of y, z_i = sum_t softmax_t(q'_i k'_{i,t} / sqrt(d)) v'_{i,t}. A capacity cuts whole heads, the
    same ones in both steps.

    Attributes:
        name: prefix of its parameters.
        size: width of the stream.
        num_heads, head_dim: heads, and channels of each.
    """

    name: str
    size: int
    num_heads: int
    head_dim: int

    def declare(self, model: DeclaredModel) -> None:
        """Declare the projections of both steps, and the one back to the stream."""
        inner, heads = self.num_heads * self.head_dim, Dim(f"{self.name}.heads", inner=self.head_dim)
        for layer in ("query", "key", "value"):
            model.add(f"{self.name}.{layer}", (inner, self.size), (heads, None))
        own = Dim(f"{self.name}.heads")
        square = (self.num_heads, self.head_dim, self.head_dim)
        for layer in ("along-query", "along-key", "along-value"):  # of each head by itself
            model.add(f"{self.name}.{layer}", square, (own, None, None), bias=False)
        model.add(f"{self.name}.project", (self.size, inner), (None, heads))

    def trajectories(self, params: Params, words: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each word finds in each frame, and the shares of the patches in that.

        Args:
            params: of the model.
            words: float32 [..., n, size].
            patches: float32 [..., frames, places, size].

        Returns:
            y, float32 [..., heads, n, frames, head_dim], and a, float32 [..., heads, n, frames, places], which sums to
            1 over the places of every frame.
        """
        query = self._split(linear(params, f"{self.name}.query", words)).transpose(-3, -2)  # [..., heads, n, d]
        key, value = (
            self._split(linear(params, f"{self.name}.{layer}", patches)).movedim(-2, -4) for layer in ("key", "value")
        )  # [..., heads, frames, places, d]
        scores = (query * (1 / math.sqrt(self.head_dim))).unsqueeze(-3) @ key.transpose(-1, -2)
        shares = scores.softmax(-1)  # [..., heads, frames, n, places]
        return (shares @ value).transpose(-3, -2), shares.transpose(-3, -2)

    def __call__(self, params: Params, words: Tensor, patches: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return what is added to the stream of words, float32 [..., n, size].

        Args:
            params: of the model.
            words: float32 [..., n, size].
            patches: float32 [..., frames, places, size].
            scale: the scaler's factor.
        """
        found, _ = self.trajectories(params, words, patches)
        query = self._split(linear(params, f"{self.name}.query", words)).transpose(-3, -2)
        weight = {layer: params[f"{self.name}.along-{layer}.weight"] for layer in ("query", "key", "value")}
        query = (query @ weight["query"].transpose(-1, -2)).unsqueeze(-2)  # [..., heads, n, 1, d]
        key, value = (found @ weight[layer].unsqueeze(-3).transpose(-1, -2) for layer in ("key", "value"))
        shares = (query * (1 / math.sqrt(self.head_dim)) @ key.transpose(-1, -2)).softmax(-1)
        mixed = (shares @ value).squeeze(-2).transpose(-3, -2).flatten(-2)  # [..., n, heads * d]
        return linear(params, f"{self.name}.project", rescale(mixed, scale))

    def _split(self, x: Tensor) -> Tensor:
        """Return [..., heads, head_dim] of [..., heads * head_dim]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


def fine_grained(first: Tensor, second: Tensor, first_counts: Tensor, second_counts: Tensor) -> Tensor:
    """Return the similarity of every pair of sequences: the mean, over tokens, of that of the most similar one.

    Both ways are averaged (FILIP, arXiv 2111.07783, as TW-BERT has it).

    Args:
        first, second: float32 [b, n, width] and [b, m, width], embeddings of tokens.
        first_counts, second_counts: bool [b, n] and [b, m], which tokens there are.

    Returns:
        float32 [b, b], the cosine of tokens on average; row i is the first sequence i against all second ones.
    """
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    products = torch.einsum("anw,bmw->abnm", first, second)
    lowest = torch.finfo(products.dtype).min
    of_first = products.masked_fill(~second_counts[None, :, None, :], lowest).amax(-1)  # [b, b, n]
    of_second = products.masked_fill(~first_counts[:, None, :, None], lowest).amax(-2)  # [b, b, m]
    forth = (of_first * first_counts[:, None]).sum(-1) / first_counts.sum(-1).clamp_min(1)[:, None]
    back = (of_second * second_counts[None]).sum(-1) / second_counts.sum(-1).clamp_min(1)[None]
    return (forth + back) / 2
