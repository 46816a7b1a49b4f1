"""Trajectory-to-word attention of TW-BERT (Yang et al., arXiv 2301.01953), and its fine-grained similarity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.submodel.layout import Dim
from gossamer.workloads.models import DeclaredModel, rescale
from gossamer.workloads.multimodal.blocks import Cut, Params, Scale, linear
from gossamer.workloads.stacked import beside


@dataclass(frozen=True)
class TrajectoryToWord:
    """Each word attends to the patches of every frame by itself, then to what it found in each of the frames.

    With a word's query q_i: y_{i,t} = sum_s softmax_s(q_i k_{t,s} / sqrt(d)) v_{t,s}, the word's trajectory, and then,
    with projections of y, z_i = sum_t softmax_t(q'_i k'_{i,t} / sqrt(d)) v'_{i,t}. A capacity cuts whole heads, the
    same ones in both steps, or channels of every head.

    Attributes:
        name: prefix of its parameters.
        size: width of the stream.
        num_heads, head_dim: heads, and channels of each.
        cut: what a capacity cuts.
    """

    name: str
    size: int
    num_heads: int
    head_dim: int
    cut: Cut = "heads"

    def declare(self, model: DeclaredModel) -> None:
        """Declare the projections of both steps, and the one back to the stream.

        Channels of a head are shared by queries and keys of a step, and by values and what reads them.
        """
        inner, square = self.num_heads * self.head_dim, (self.num_heads, self.head_dim, self.head_dim)
        flat, channels = dict[str, Dim](), dict[str, str | None]()
        own = Dim(f"{self.name}.heads") if self.cut == "heads" else None
        for step in ("matched", "found", "along-matched", "along-found"):
            axis = f"{self.name}.{step}"
            within = self.cut == "head-dim"
            flat[step] = Dim(axis, outer=self.num_heads) if within else Dim(f"{self.name}.heads", inner=self.head_dim)
            channels[step] = axis if within else None
        for layer, rows in (("query", "matched"), ("key", "matched"), ("value", "found")):
            model.add(f"{self.name}.{layer}", (inner, self.size), (flat[rows], None))
        of_head = (("query", "along-matched", "matched"), ("key", "along-matched", "found"))
        for layer, rows, columns in (*of_head, ("value", "along-found", "found")):
            axes = own, channels[rows], channels[columns]
            model.add(f"{self.name}.along-{layer}", square, axes, bias=False)
        model.add(f"{self.name}.project", (self.size, inner), (None, flat["along-found"]))

    def trajectories(self, params: Params, words: Tensor, patches: Tensor, scale: Scale = 1.0) -> tuple[Tensor, Tensor]:
        """Return what each word finds in each frame, and the shares of the patches in that.

        Args:
            params: of the model.
            words: float32 [..., n, size].
            patches: float32 [..., frames, places, size].
            scale: the scaler's factor.

        Returns:
            y, float32 [..., heads, n, frames, head_dim], and a, float32 [..., heads, n, frames, places], which sums to
            1 over the places of every frame.
        """
        query = self._split(linear(params, f"{self.name}.query", words)).transpose(-3, -2)  # [..., heads, n, d]
        key, value = (
            self._split(linear(params, f"{self.name}.{layer}", patches)).movedim(-2, -4) for layer in ("key", "value")
        )  # [..., heads, frames, places, d]
        query = self._within(query, scale)
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
        found, _ = self.trajectories(params, words, patches, scale)
        found = self._within(found, scale)
        query = self._within(self._split(linear(params, f"{self.name}.query", words)).transpose(-3, -2), scale)
        layers = "query", "key", "value"
        weight = {layer: beside(params[f"{self.name}.along-{layer}.weight"], 3, query) for layer in layers}
        query = (query @ weight["query"].transpose(-1, -2)).unsqueeze(-2)  # [..., heads, n, 1, d]
        key, value = (found @ weight[layer].unsqueeze(-3).transpose(-1, -2) for layer in ("key", "value"))
        query = self._within(query, scale)
        shares = (query * (1 / math.sqrt(self.head_dim)) @ key.transpose(-1, -2)).softmax(-1)
        mixed = (shares @ value).squeeze(-2).transpose(-3, -2).flatten(-2)  # [..., n, heads * d]
        return linear(params, f"{self.name}.project", rescale(mixed, scale))

    def _within(self, x: Tensor, scale: Scale) -> Tensor:
        """Scale what is summed over the channels of a head, where these are cut."""
        return rescale(x, scale) if self.cut == "head-dim" else x

    def _split(self, x: Tensor) -> Tensor:
        """Return [..., heads, head_dim] of [..., heads * head_dim], as the parameters are cut."""
        split = (-1, self.head_dim) if self.cut == "heads" else (self.num_heads, -1)
        return x.reshape(*x.shape[:-1], *split)


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
    products = torch.einsum("...anw,...bmw->...abnm", first, second)
    lowest = -2.0  # below every cosine, and finite where there are no tokens
    of_first = products.masked_fill(~second_counts[..., None, :, None, :], lowest).amax(-1)  # [b, b, n]
    of_second = products.masked_fill(~first_counts[..., :, None, :, None], lowest).amax(-2)  # [b, b, m]
    forth = (of_first * first_counts[..., :, None, :]).sum(-1) / first_counts.sum(-1).clamp_min(1)[..., :, None]
    back = (of_second * second_counts[..., None, :, :]).sum(-1) / second_counts.sum(-1).clamp_min(1)[..., None, :]
    return (forth + back) / 2
