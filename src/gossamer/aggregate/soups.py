"""Model soups (Wortsman et al., arXiv 2203.05482): models that began alike, averaged once into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.errors import DataError


class Soup(NamedTuple):
    """An average of models.

    Attributes:
        model: its parameters, [d].
        ingredients: numbers of the models in it, in the order in which they were added.
        score: what it scores on the selection set; nan where none was asked.
    """

    model: Tensor
    ingredients: tuple[int, ...]
    score: float = float("nan")


def uniform_soup(models: Tensor) -> Soup:
    """Return the mean of all models.

    Args:
        models: [n, d], parameters of models of one shape that began with the same values.

    Raises:
        DataError: there are none.
    """
    _require_models(models)
    return Soup(_mean(models, list(range(len(models)))), tuple(range(len(models))))


def greedy_soup(models: Tensor, score: Callable[[Tensor], float]) -> Soup:
    """Return the mean of models that were added from the best one down, each only if the score did not fall.

    So it never scores below the best of its ingredients, nor below the best of all models.

    Args:
        models: [n, d], see `uniform_soup`.
        score: what a model [d] scores on the selection set, the higher the better; called at most 2 n - 1 times.

    Raises:
        DataError: there are no models, or one of them scores nan.
    """
    _require_models(models)
    scores = [float(score(model)) for model in models]
    if (wrong := next((number for number, one in enumerate(scores) if one != one), None)) is not None:
        raise DataError(f"model {wrong} of a soup scores nan on the selection set: leave it out")
    first, *others = sorted(range(len(models)), key=lambda number: -scores[number])
    chosen, best = [first], scores[first]
    for number in others:
        reached = float(score(_mean(models, [*chosen, number])))
        if reached >= best:
            chosen, best = [*chosen, number], reached
    return Soup(_mean(models, chosen), tuple(chosen), best)


def _mean(models: Tensor, chosen: list[int]) -> Tensor:
    return models[torch.tensor(chosen)].mean(dim=0)


def _require_models(models: Tensor) -> None:
    if models.dim() != 2 or not len(models):
        raise DataError(f"a soup of models of shape {tuple(models.shape)}: give one or more, as rows [n, d]")
