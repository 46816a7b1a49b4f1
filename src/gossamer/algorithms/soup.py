"""Model soups as a federation of one round: everybody fine-tunes the same model, and the server averages once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from gossamer.aggregate.soups import greedy_soup, uniform_soup
from gossamer.algorithms.base import Arrays, BaseAlgorithm, where_held
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.traits import AlgorithmTraits
from gossamer.errors import ConfigError
from gossamer.round_record import lower_is_better


class Soup(FedAvg):
    """Model soups (Wortsman et al., arXiv 2203.05482): models that began alike, averaged once, without more training.

    All clients train for many epochs from the same start, and send their models in the only round. A uniform soup is
    their mean, each counted alike. A greedy one begins with the model that scores best, and takes in the others from
    the best down, each only if the soup does not score less with it; so it never scores below any of its ingredients on
    the data that it is selected by. These are what ``workload.validation`` holds out of the training data, never the
    test data. The server measures at most 2 n - 1 models of n clients.

    Example:
        ``algorithm: {name: soup, recipe: greedy}``, ``rounds: 1``, ``workload.validation: 0.1``.
    """

    class Options(BaseAlgorithm.Options):
        """Options of a soup.

        Attributes:
            recipe: whether all models are averaged, or those that do no harm.
            metric: of the greedy recipe, by which models are selected; whether more is better follows from its name.
        """

        recipe: Literal["uniform", "greedy"] = "uniform"
        metric: str = "accuracy"

    options: Soup.Options
    traits: AlgorithmTraits = replace(
        FedAvg.traits,
        uplink={"x": "rows"},
        whole_models_only="a soup is made of whole models, each of which works by itself",
        one_round_only="models are averaged once, after all of their training",
        no_compression="clients send their models, and not changes of them",
    )

    def __init__(self, options: Mapping[str, Any], *, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(options, momentum=momentum, weight_decay=weight_decay)
        is_greedy = self.options.recipe == "greedy"
        if "metric" in self.options.model_fields_set and not is_greedy:
            raise ConfigError(
                f"algorithm.metric = {self.options.metric!r} selects nothing in a uniform soup: leave it out, or set"
                " algorithm.recipe to greedy"
            )
        self.traits = replace(
            self.traits, scores_models=is_greedy, scored_by=self.options.metric if is_greedy else None
        )

    def init(self, x: Tensor) -> Arrays:
        """Return the model."""
        return {"x": x}

    def end(
        self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor], carry: Arrays, steps: int, lr: float
    ) -> tuple[Arrays, Arrays]:
        """Return each trained model; moments that the client keeps."""
        return {"x": carry["x"]}, self.private(carry)

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Return the soup of the clients' models."""
        if self.options.recipe == "uniform":
            soup = uniform_soup(inbox["x"])
        else:
            soup = greedy_soup(inbox["x"], self._scored_by(inbox["metrics"]))
        return where_held(inbox["held"], {"x": soup.model[None]}, state)

    def _scored_by(self, metrics: Callable[[Tensor], Mapping[str, float]]) -> Callable[[Tensor], float]:
        """Return what scores a model, the higher the better; one without a score is never better than another."""
        metric = self.options.metric
        sign = -1.0 if lower_is_better(metric) else 1.0

        def score(model: Tensor) -> float:
            """Return the score of a model [d]."""
            found = metrics(model)
            value = sign * float(found[metric if metric in found else f"validation_{metric}"])
            return -math.inf if math.isnan(value) else value

        return score
