"""Losses between modalities, one number a sample, in which samples that do not count take no part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.workloads.dropout import random_bits
from gossamer.workloads.supervised import cross_entropies


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of losses [b] by weights [b]; 0, without a gradient, where all of these are 0."""
    counted = torch.where(weights > 0, losses, 0.0)
    return (counted * weights).sum(-1) / weights.sum(-1).clamp_min(1e-12)


def sum_of(values: list[Tensor]) -> Tensor:
    """Return the sum of tensors, one after another."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def label_losses(logits: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum [b] of the cross entropies of the labels that each sample has, and whether it has any, bool [b].

    Args:
        logits: float32 [b, classes] of each label.
        batch: int64 [b] of each label; below 0: it is missing.
    """
    pairs = [(batch[name] >= 0, cross_entropies(one, batch[name].clamp_min(0))) for name, one in logits.items()]
    losses = torch.stack([torch.where(has, loss, 0.0) for has, loss in pairs]).sum(0)
    return losses, torch.stack([has for has, _ in pairs]).any(0)


def contrastive_logits(first: Tensor, second: Tensor, same: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Return similarities [b, b] of pairs, divided by the temperature, in which only true negatives stand beside i, i.

    Args:
        first, second: float32 [b, width] of length 1, the embeddings of both sides of each pair.
        same: bool [b, b], which pairs mean the same and are no negatives.
        counts: bool [b], which samples there are.
        temperature: of the softmax.
    """
    return true_pairs(first @ second.mT, same, counts, temperature)


def true_pairs(similarity: Tensor, same: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Return similarities [b, b], however they were found, as `contrastive_logits` does."""
    own = torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)
    allowed = own | (counts[..., None, :] & counts[..., :, None] & ~same)
    return (similarity / temperature).masked_fill(~allowed, torch.finfo(similarity.dtype).min)


def contrastive(logits: Tensor) -> Tensor:
    """Return the losses [b] of `contrastive_logits`, the mean of both directions (CLIP, arXiv 2103.00020)."""
    target = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:-1])
    return (cross_entropies(logits, target) + cross_entropies(logits.mT, target)) / 2


def hardest_negatives(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most similar negative of each row of `contrastive_logits`, int64 [b], and whether there is one."""
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    lowest = torch.finfo(logits.dtype).min
    found = logits.detach().masked_fill(own, lowest).max(-1)
    return found.indices, found.values > lowest


def sequence_losses(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Return the mean cross entropy [b] over the places of each sample that count.

    Args:
        logits: float32 [b, n, num_tokens].
        targets: int64 [b, n].
        counts: bool [b, n].
    """
    weights = counts.to(logits.dtype)
    return (cross_entropies(logits, targets) * weights).sum(-1) / weights.sum(-1).clamp_min(1)


def masked_places(key: Tensor, maskable: Tensor, rate: float) -> Tensor:
    """Choose places of texts to be predicted: each with probability `rate`, and one of every text at least.

    Args:
        key: int64 [], random bits of the step.
        maskable: bool [b, n], which places may be chosen.
        rate: share of them.
    """
    draws = random_bits(key, list(maskable.shape[key.dim() :])).to(torch.float32) * 2.0**-64 + 0.5  # uniform in [0, 1]
    draws = draws.masked_fill(~maskable, 2.0)
    return maskable & ((draws < rate) | (draws == draws.min(-1, keepdim=True).values))
