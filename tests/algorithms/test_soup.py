"""Soups of a federation: against averages by hand, never below an ingredient, and the same bits on every engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from federation import assert_same, configure
from gossamer import run
from gossamer.aggregate.soups import greedy_soup
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.soup import Soup
from gossamer.build import build
from gossamer.config.loading import load, parse
from gossamer.errors import ConfigError
from gossamer.experiment import Run
from gossamer.testing import check_algorithm

CNN = {"name": "cnn", "width": 0.125}  # whose BatchNorm is evaluated by moments of the training data
GREEDY = {
    "rounds": 1,
    "train": {"lr": 0.2, "batch_size": 8, "epochs": 4},
    "workload.validation": 0.3,
    "algorithm": {"name": "soup", "recipe": "greedy"},
    "clients.partition": {"name": "dirichlet", "alpha": 0.5},
}


class Recorded(Soup):
    """A soup that remembers what it was made of, and what each of these reaches."""

    models: Tensor
    metrics: list[dict[str, float]]

    def update(self, state: Mapping[str, Tensor], inbox: Mapping[str, Any], num_clients: int) -> Arrays:
        """Keep the models that came, and their metrics."""
        Recorded.models = inbox["x"].clone()
        measured = inbox.get("metrics")
        Recorded.metrics = [] if measured is None else [measured(model) for model in inbox["x"]]
        return super().update(state, inbox, num_clients)


def soup(changes: Mapping[str, Any], out: Path) -> Run:
    """Run a soup of clients whose data are unalike."""
    return run(configure(GREEDY | dict(changes)), out=out)


@pytest.mark.parametrize("model", ["mlp", CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("metric", ["accuracy", "validation_loss"])
def test_a_greedy_soup_is_never_below_its_best_ingredient(tmp_path: Path, model: Any, metric: str) -> None:
    algorithm = {"name": f"{__name__}:Recorded", "recipe": "greedy", "metric": metric}
    done = soup({"algorithm": algorithm, "workload.model": model}, tmp_path / "a")
    name, sign = ("validation_loss", -1.0) if "loss" in metric else ("validation_accuracy", 1.0)
    each = [sign * one[name] for one in Recorded.metrics]
    assert len(each) == 5
    assert len(set(each)) > 1  # or there would be nothing to choose
    reached = sign * done.metrics[-1][name]  # of the engine's own evaluation
    assert reached >= max(each)


def test_a_uniform_soup_is_the_mean_of_all(tmp_path: Path) -> None:
    """Each client counts alike, however many samples it has, and nothing is held out or measured."""
    changes = {"algorithm": {"name": f"{__name__}:Recorded"}, "workload.validation": None}
    done = soup(changes, tmp_path / "a")
    assert Recorded.metrics == []
    mean = sum(row.double() for row in Recorded.models) / len(Recorded.models)
    values = torch.cat([value.flatten() for value in done.params.values()])
    assert torch.allclose(values.double().sum(), mean.sum(), rtol=1e-5)
    assert "accuracy" in done.metrics[-1]


@pytest.mark.parametrize("recipe", ["uniform", "greedy"])
def test_bits_do_not_depend_on_workers(tmp_path: Path, recipe: str) -> None:
    changes = {"algorithm": {"name": "soup", "recipe": recipe}, "workload.model": CNN}
    done = soup(changes, tmp_path / "a")
    assert_same(soup(changes | {"engine.workers": 2, "engine.block_size": 1}, tmp_path / "b"), done)


@pytest.mark.usefixtures("one_ray")
def test_bits_on_ray(tmp_path: Path) -> None:
    done = soup({"workload.model": CNN}, tmp_path / "a")
    ray = {"workload.model": CNN, "engine.name": "ray", "engine.workers": 2}
    assert_same(soup(ray, tmp_path / "b"), done)


def test_a_model_without_a_score_is_left_out() -> None:
    algorithm = Soup({"recipe": "greedy"})
    models = torch.tensor([[3.0], [1.0], [2.0]])
    inbox = {"x": models, "held": None, "weights": torch.ones(3)}
    inbox["metrics"] = lambda model: {"accuracy": float("nan") if model[0] > 1 else float(model[0])}
    assert algorithm.update({"x": torch.zeros(1, 1)}, inbox, 3)["x"].tolist() == [[1.0]]
    found = greedy_soup(models, algorithm._scored_by(lambda model: {"loss": 0.0, "accuracy": float(model[0])}))
    assert found.ingredients == (0,)


def test_the_contract() -> None:
    for options in ({"recipe": "greedy"}, {"recipe": "greedy", "metric": "loss"}):
        check_algorithm(Soup(options))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rounds": 2}, r"is of one round, because models are averaged once.*: set rounds to 1 instead of 2"),
        ({"workload.validation": None}, r"must not be on the test data: give workload\.validation"),
        ({"submodel": {"capacities": [0.5, 1.0]}}, r"trains whole models only, because a soup is made of whole models"),
        ({"algorithm": {"name": "soup", "metric": "loss"}}, r"metric = 'loss' selects nothing in a uniform soup"),
        (
            {"algorithm": {"name": "soup", "recipe": "greedy", "metric": "f1"}},
            r"'f1' is not measured \(there are: accuracy",
        ),
        ({"algorithm": {"name": "soup", "recipe": "greedy", "metric": "acuracy"}}, r"did you mean 'accuracy'\?"),
        ({"clients.personal": ["fc*"]}, r"does not go with clients\.personal"),
        ({"communication": {"uplink": "int8"}}, r"because clients send their models"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_soup_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build(parse(load(configure(GREEDY | changes))))  # before anything is trained
