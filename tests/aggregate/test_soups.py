"""Soups: the mean of all, and the greedy one, which is never below its best ingredient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.aggregate.soups import greedy_soup, uniform_soup
from gossamer.errors import DataError

ROWS = st.lists(st.lists(st.integers(-4, 4).map(float), min_size=3, max_size=3), min_size=1, max_size=7)


def bumpy(model: Tensor) -> float:
    """Score without any order among averages: many hills."""
    return float(torch.sin(3 * model).sum() - 0.1 * model.square().sum())


def near_nothing(model: Tensor) -> float:
    return -float(model.square().sum())


def slow_greedy(models: Tensor) -> list[int]:
    order = sorted(range(len(models)), key=lambda number: -near_nothing(models[number]))
    chosen = [order[0]]
    for number in order[1:]:
        together = sum((models[one] for one in [*chosen, number]), torch.zeros(3)) / (len(chosen) + 1)
        if near_nothing(together) >= near_nothing(sum((models[one] for one in chosen), torch.zeros(3)) / len(chosen)):
            chosen.append(number)
    return chosen


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_a_greedy_soup_is_never_below_its_best_ingredient(rows: list[list[float]]) -> None:
    models = torch.tensor(rows, dtype=torch.float64)
    calls = list[float]()

    def score(model: Tensor) -> float:
        calls.append(bumpy(model))
        return calls[-1]

    soup = greedy_soup(models, score)
    assert soup.score >= max(bumpy(model) for model in models)
    assert soup.score == bumpy(soup.model)
    assert torch.equal(soup.model, models[torch.tensor(soup.ingredients)].mean(dim=0))
    assert len(set(soup.ingredients)) == len(soup.ingredients)
    assert len(calls) <= 2 * len(models) - 1


def test_it_is_what_a_slow_version_makes() -> None:
    models = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    soup = greedy_soup(models, near_nothing)
    assert list(soup.ingredients) == slow_greedy(models)
    assert 1 < len(soup.ingredients) < 12


def test_models_on_two_sides_of_a_valley_are_better_together() -> None:
    models = torch.tensor([[-1.0, 0.2], [1.0, -0.2], [9.0, 9.0]])
    soup = greedy_soup(models, near_nothing)
    assert soup.ingredients == (0, 1)
    assert soup.score == pytest.approx(0)
    assert torch.allclose(uniform_soup(models).model, torch.tensor([3.0, 3.0]))
    assert uniform_soup(models).ingredients == (0, 1, 2)


def test_what_makes_no_soup_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(0, 3\): give one or more"):
        uniform_soup(torch.empty(0, 3))
    with pytest.raises(DataError, match=r"model 1 of a soup scores nan"):
        greedy_soup(torch.tensor([[0.0], [float("nan")]]), lambda model: float(model.sum()))
