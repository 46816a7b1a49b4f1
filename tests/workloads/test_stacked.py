"""Layers and models of several clients at once, against one client after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gossamer.workloads import stacked
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import MODEL, nudged, workload

NUM_CLIENTS, SAMPLES = 3, 6


def drawn(*shape: int) -> Tensor:
    """Return normal numbers, the same at every call of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("leading", [(3, 5), (3, 2, 4, 5)])
def test_layers_are_those_of_each_client(leading: tuple[int, ...]) -> None:
    x, weight, bias = drawn(*leading, 6), drawn(3, 4, 6), drawn(3, 4)
    size = drawn(3, 6), drawn(3, 6)
    found = {
        "linear": stacked.linear(x, weight, bias),
        "without bias": stacked.linear(x, weight),
        "norm": stacked.layer_norm(x, *size),
    }
    for i in range(3):
        centred = x[i] - x[i].mean(-1, keepdim=True)
        unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = {
            "linear": x[i] @ weight[i].T + bias[i],
            "without bias": x[i] @ weight[i].T,
            "norm": unit * size[0][i] + size[1][i],
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name][i], value, rtol=1e-5, atol=1e-5)


def test_tokens_are_looked_up_in_their_clients_table() -> None:
    table, tokens = drawn(2, 7, 4), torch.tensor([[[0, 6]], [[6, 1]]])
    assert torch.equal(stacked.embedding(tokens, table), torch.stack([table[0, [[0, 6]]], table[1, [[6, 1]]]]))


def test_a_parameter_stands_along_the_first_dimension() -> None:
    x, param = drawn(3, 2, 5, 4), drawn(3, 4)
    assert torch.equal((x + stacked.beside(param, 1, x))[1], x[1] + param[1])
    assert torch.equal(stacked.beside(param[0], 1, x), param[0])


def batch_of(made: VideoLanguage) -> dict[str, Any]:
    """Return a batch of all clients, in which clips lack modalities, as a stacked loss receives it."""
    positions = np.tile(np.arange(SAMPLES), (NUM_CLIENTS, 1))
    positions[1, -1] = -1  # padding
    samples, constants = made.batch(np.arange(NUM_CLIENTS), positions)
    return {**samples, **constants, "key": torch.arange(NUM_CLIENTS) + 5}


@pytest.mark.parametrize("model", [{}, {"matching": True, "cut": "head-dim"}])
def test_losses_and_gradients_are_those_of_each_client(model: dict[str, Any]) -> None:
    made = workload(NUM_CLIENTS, model=tuple((MODEL | model).items()), missing=(("train", 0.3),))
    assert made.traits.stacks_natively
    batch, each = batch_of(made), [nudged(made, seed) for seed in range(NUM_CLIENTS)]
    params = {name: torch.stack([one[name] for one in each]).requires_grad_() for name in each[0]}
    losses = made.loss(params, batch | {"scale": 1.5})
    grads = torch.autograd.grad(losses.sum(), list(params.values()))
    for i, one in enumerate(each):
        own = {name: value.clone().requires_grad_() for name, value in one.items()}
        loss = made.loss(own, {name: value[i] for name, value in batch.items()} | {"scale": 1.5})
        torch.testing.assert_close(losses[i], loss, rtol=1e-5, atol=1e-6)
        expected = torch.autograd.grad(loss, list(own.values()))
        for stacked_grad, grad in zip(grads, expected, strict=True):
            torch.testing.assert_close(stacked_grad[i], grad, rtol=1e-3, atol=1e-5)
