"""Representations of a public set that clients of unequal models send: which of them to believe, sample by sample.

CreamFL (Yu et al., ICLR 2023, arXiv 2302.08888): a client's representation of a sample counts by how well it picks out,
among all public samples, the one that it belongs to, as the server knows them in the other modality.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024  # public samples whose similarities to all others are in memory at a time


def pair_scores(own: Tensor, other: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return ``log softmax_j(own_k . other_j)`` at j = k of each public sample k, [P].

    Args:
        own: [P, width], a client's representations in one modality.
        other: [P, width], the server's in the other one.
        chunk: rows of the [P, P] similarities that are made at a time; it changes no result but by rounding.
    """
    scores = [
        torch.log_softmax(own[low : low + chunk] @ other.T, dim=1).diagonal(offset=low)
        for low in range(0, len(own), chunk)
    ]
    return torch.cat(scores)


def client_weights(scores: Tensor) -> Tensor:
    """Return how much each of M clients counts for each public sample, [M, P]: the softmax of `scores` [M, P] over M.

    The weights of a sample sum to 1.
    """
    return torch.softmax(scores, dim=0)


def ensemble(rows: Tensor, other: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the clients' representations of one modality, combined by `client_weights`, [P, width].

    Args:
        rows: [M, P, width], those of M clients.
        other: [P, width], the server's of the other modality.
        chunk: see `pair_scores`.
    """
    weights = client_weights(torch.stack([pair_scores(row, other, chunk) for row in rows]))
    return (weights[:, :, None] * rows).sum(0)
