"""Representations of clients, combined: against loops over clients and samples, and what no client can get."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gossamer.aggregate.representations import client_weights, ensemble, pair_scores


def units(*shape: int, seed: int = 0) -> Tensor:
    """Return random vectors of length 1 along the last dimension."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_scores(own: Tensor, other: Tensor) -> list[float]:
    """One sample and one product at a time, as the paper writes it."""
    found = []
    for k in range(len(own)):
        products = [float(own[k].double() @ other[j].double()) for j in range(len(other))]
        found.append(products[k] - math.log(sum(math.exp(value) for value in products)))
    return found


def slow_ensemble(rows: Tensor, other: Tensor) -> list[list[float]]:
    """Return the ensemble [n][width] of rows [c, n, width], one by one."""
    scores = [slow_scores(row, other) for row in rows]
    found = []
    for k in range(rows.shape[1]):
        powers = [math.exp(one[k]) for one in scores]
        shares = [power / sum(powers) for power in powers]
        found.append(
            [sum(a * float(row[k, c]) for a, row in zip(shares, rows, strict=True)) for c in range(len(rows[0, 0]))]
        )
    return found


@given(st.integers(1, 4), st.integers(2, 9), st.integers(1, 5), st.integers(0, 100), st.integers(1, 12))
def test_against_loops(num_clients: int, count: int, width: int, seed: int, chunk: int) -> None:
    rows, other = units(num_clients, count, width, seed=seed) * 3, units(count, width, seed=seed + 1)
    assert torch.allclose(pair_scores(rows[0], other, chunk), torch.tensor(slow_scores(rows[0], other)), atol=1e-5)
    assert torch.allclose(ensemble(rows, other, chunk), torch.tensor(slow_ensemble(rows, other)), atol=1e-5)


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 100))
def test_weights_of_a_sample_sum_to_one(num_clients: int, count: int, seed: int) -> None:
    weights = client_weights(units(num_clients, count, seed=seed) * 50)
    assert torch.allclose(weights.sum(0), torch.ones(count), atol=1e-6)
    assert (weights >= 0).all()


@pytest.mark.parametrize("num_clients", [2, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_client_counts_for_less_than_its_share(num_clients: int, seed: int) -> None:
    """Others have learnt what the server knows, up to noise; this one sends random vectors."""
    known = units(200, 32, seed=seed)
    rows = F.normalize(
        known + 0.1 * torch.randn(num_clients, 200, 32, generator=torch.Generator().manual_seed(9)), dim=-1
    )
    rows[0] = units(200, 32, seed=seed + 50)
    scores = torch.stack([pair_scores(row, known) for row in rows])
    weights = client_weights(scores)
    assert float(weights[0].mean()) < 1 / num_clients
    assert float((weights[0] < 1 / num_clients).float().mean()) > 0.99
    honest = (weights[1:, :, None] * rows[1:]).sum(0) / weights[1:].sum(0)[:, None]
    cosine = F.cosine_similarity(ensemble(rows, known), honest).mean()
    assert cosine > F.cosine_similarity(rows.mean(0), honest).mean()
