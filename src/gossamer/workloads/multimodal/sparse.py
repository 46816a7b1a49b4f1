"""Some of the tokens of a sequence, always as many: drawn, chosen by scores, taken out, and put back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.workloads.dropout import random_bits


def drawn_order(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the places of sequences in a random order each, int64 [*shape].

    Args:
        key: int64 [] or [s], random bits of the step.
        shape: of the sequences, without s; the last dimension runs over places.
    """
    return random_bits(key, list(shape)).argsort(-1)


def share_of(count: int, share: float) -> int:
    """Return how many of `count` a share is, at least one; halves are rounded up."""
    return max(1, math.floor(count * share + 0.5))


def taken(x: Tensor, places: Tensor) -> Tensor:
    """Return places int64 [..., k] of x [..., n, size], [..., k, size]."""
    return x.gather(-2, places[..., None].expand(*places.shape, x.shape[-1]))


def put_back(x: Tensor, fill: Tensor, order: Tensor) -> Tensor:
    """Return sequences [..., n, size] whose first places in `order`, int64 [..., n], are x, and the others `fill`.

    Args:
        x: [..., k, size], k <= n.
        fill: [size], or what has the dimensions of x and one token.
        order: as `drawn_order` returns it.
    """
    rest = fill.expand(*x.shape[:-2], order.shape[-1] - x.shape[-2], x.shape[-1])
    return taken(torch.cat([x, rest], dim=-2), order.argsort(-1))


def strongest(x: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the places of x [..., n, size] with the highest scores [..., n], in their order, [..., count, size].

    Where all are kept, x itself is returned. No gradient goes through the scores.
    """
    if count == x.shape[-2]:
        return x
    return taken(x, scores.detach().topk(count, dim=-1).indices.sort(-1).values)
