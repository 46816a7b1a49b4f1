"""Losses of HiTeA by hand: who is aligned with whom, and where no gradient goes."""

from __future__ import annotations

import pytest
import torch

from gossamer.workloads.multimodal.temporal import moment_words, relation_losses


def test_relation_losses_by_hand() -> None:
    """Of one sample p_long is z_short turned by 60 degrees, and p_short is opposite to z_long: -(1/2 - 1) / 2."""
    long, short = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    predicted_long, predicted_short = torch.tensor([[3**0.5, 1.0]]), torch.tensor([[-5.0, 0.0]])
    found = relation_losses(long, short, predicted_long, predicted_short)
    assert found.tolist() == pytest.approx([0.25])
    assert relation_losses(long, long, long, long).tolist() == pytest.approx([-1.0])


def test_targets_get_no_gradient() -> None:
    long, short, *predicted = (torch.randn(3, 4, requires_grad=True) for _ in range(4))
    loss = relation_losses(long, short, *predicted).sum()
    grads = torch.autograd.grad(loss, [long, short, *predicted], allow_unused=True)
    assert [grad is None for grad in grads] == [True, True, False, False]


def test_the_most_similar_words_are_taken() -> None:
    clip = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    words = torch.tensor([[[2.0, 0], [1, 1], [0, 1], [9, 0]], [[0, 1], [5, 0], [0, 3], [0, 9]]])
    counts = torch.tensor([[True, True, True, False], [True, True, True, True]])
    counts[1, 2:] = False
    assert moment_words(clip, words, counts, 2).tolist() == [[1.5, 0.5], [2.5, 0.5]]
    assert moment_words(clip, words, counts, 1).tolist() == [[2.0, 0.0], [0.0, 1.0]]
    every = moment_words(clip, words, counts, 9)
    torch.testing.assert_close(every, torch.tensor([[1.0, 2 / 3], [2.5, 0.5]]))


def test_it_runs_under_vmap() -> None:
    clip, words = torch.randn(2, 3, 4), torch.randn(2, 3, 5, 4)
    counts = torch.ones(2, 3, 5).bool()
    both = torch.vmap(lambda *one: moment_words(*one, 2))(clip, words, counts)
    torch.testing.assert_close(both[1], moment_words(clip[1], words[1], counts[1], 2))
