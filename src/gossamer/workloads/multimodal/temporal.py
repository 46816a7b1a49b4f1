"""Losses of HiTeA between clips of different lengths and their words (Ye et al., arXiv 2212.14546)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.workloads.multimodal.blocks import mean_of


def negative_cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Return -cosine [b] of predictions [b, width] and targets [b, width], through which no gradient goes."""
    return -F.cosine_similarity(predicted, target.detach(), dim=-1)


def relation_losses(long: Tensor, short: Tensor, predicted_long: Tensor, predicted_short: Tensor) -> Tensor:
    """Return the losses [b] of temporal relation exploration, which aligns a long view and a short one of a video.

    1/2 D(p_long, sg(z_short)) + 1/2 D(p_short, sg(z_long)) with D = -cosine.

    Args:
        long, short: float32 [b, width], what the projector makes of both views.
        predicted_long, predicted_short: float32 [b, width], what the predictor makes of these.
    """
    return (negative_cosine(predicted_long, short) + negative_cosine(predicted_short, long)) / 2


def moment_words(clip: Tensor, words: Tensor, counts: Tensor, num_words: int) -> Tensor:
    """Return the mean of the words of a caption that are most similar to a short clip, float32 [b, width].

    These are what moment exploration contrasts the clip with, instead of the whole caption.

    Args:
        clip: float32 [b, width].
        words: float32 [b, n, width].
        counts: bool [b, n], which words there are.
        num_words: how many are taken; all of them where there are fewer.
    """
    similarity = F.cosine_similarity(clip[..., None, :], words, dim=-1).detach().masked_fill(~counts, -2.0)
    chosen = similarity.topk(min(num_words, words.shape[-2]), dim=-1).indices
    places = (chosen[..., None] == torch.arange(words.shape[-2], device=words.device)).any(-2)
    return mean_of(words, places & counts)
