"""Traits of workloads and models: what is unknown, wrong or contradictory is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from federation import configure
from gossamer.config.loading import parse
from gossamer.config.resolve import resolve
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN, trusting
from gossamer.task import load_workload
from gossamer.workloads.base import Workload, find_workload
from gossamer.workloads.consensus import Consensus
from gossamer.workloads.convex import LeastSquares
from gossamer.workloads.models import CNN, MLP
from gossamer.workloads.traits import ModelTraits, WorkloadTraits


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names of a module ``mine``."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return vars(module)


def with_attribute(key: str, value: Any, base: type = LeastSquares, **traits: Any) -> type:
    return type("Mine", (base,), {key: value, **({"traits": replace(LeastSquares.traits, **traits)} if traits else {})})


@pytest.mark.parametrize("kind", [WorkloadTraits, ModelTraits])
class TestTraits:
    def test_unknown_names(self, kind: Any) -> None:
        with pytest.raises(ConfigError, match=f"{kind.__name__} has no trait .*; did you mean 'supports_stacking'"):
            kind(support_stacking=False)

    @pytest.mark.parametrize("value", [1, None, "yes"])
    def test_wrong_types(self, kind: Any, value: Any) -> None:
        with pytest.raises(
            ConfigError, match=f"{kind.__name__}.stacks_natively = {value!r}: input should be a valid boolean"
        ):
            kind(stacks_natively=value)


class Late(LeastSquares):
    """States a trait once it is made."""

    def __init__(self, options: Any, **given: Any) -> None:
        super().__init__(options, **given)
        self.supports_padding = False


class Empty(LeastSquares):
    """Has no samples."""

    def __init__(self, options: Any, **given: Any) -> None:
        super().__init__(options, **given)
        del self.num_samples


class Loading(LeastSquares):
    """Takes data, and does not say what it has."""

    def __init__(self, options: Any, *, data: Any = None, **given: Any) -> None:
        super().__init__(options, **given)


class TestWorkloads:
    @pytest.mark.parametrize("shipped", BUILTIN["workload"])
    def test_what_ships(self, shipped: str) -> None:
        assert find_workload(shipped) is not None

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (3, "is a int: give a function"),
            (dict, "is a dict without traits, init, .*: derive it from gossamer.workloads.base.Workload, or name an"),
            (type("Mine", (Workload,), {"traits": WorkloadTraits()}), "without init, batch, loss, evaluate, metrics: "),
            (with_attribute("traits", ModelTraits()), r"has traits = ModelTraits\(.* traits = WorkloadTraits\(\.\.\."),
            (with_attribute("supports_stacking", False), "states 'supports_stacking' beside its traits"),
            (with_attribute("has_images", property(lambda self: True)), "states 'has_images' beside its traits"),
            (with_attribute("support_stacking", False), "has no effect; did you mean 'supports_stacking'"),
            (with_attribute("peer_inits", Consensus.peer_init), "has no effect; did you mean 'peer_init'"),
            (
                with_attribute("batch", lambda self, clients, positions, round=0: None),
                r"'batch' that cannot be called with \(self, clients, positions, round, phase\), because of too many",
            ),
            (with_attribute("peer_init", Consensus.peer_init), "but traits.has_peer_init is False: set it to True"),
            (with_attribute("size", 1, has_peer_init=True), "has no method 'peer_init', but traits.has_peer_init is T"),
        ],
    )
    def test_what_is_refused_when_it_is_named(self, mine: dict[str, Any], found: Any, message: str) -> None:
        mine["Mine"] = found
        with trusting(), pytest.raises(ConfigError, match=f"^workload 'mine:Mine' .*{message}"):
            resolve(parse(configure({"workload": {"name": "mine:Mine"}})))

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (Late, "states 'supports_padding' beside its traits"),
            (Empty, "is a Empty without num_samples: "),
            (Loading, "is a Loading without data: "),
            (lambda options, **given: dict(options), "is a dict without traits, init, "),
        ],
    )
    def test_what_is_refused_when_it_is_made(self, mine: dict[str, Any], found: Any, message: str) -> None:
        mine["Mine"] = found
        with pytest.raises(ConfigError, match=f"^workload 'mine:Mine' {message}"):
            load_workload(parse(configure({"workload": {"name": "mine:Mine"}})))

    def test_a_function_may_make_it(self, mine: dict[str, Any]) -> None:
        mine["Mine"] = lambda options, **given: LeastSquares(options, **given)
        assert load_workload(parse(configure({"workload": {"name": "mine:Mine"}}))).traits == LeastSquares.traits


class TestModels:
    def load(self, mine: dict[str, Any], model: type) -> Workload:
        mine["Mine"] = model
        return load_workload(parse(configure({"workload.model": "mine:Mine"})))

    @pytest.mark.parametrize(
        ("traits", "expected"),
        [
            ({"supports_stacking": False, "stacks_natively": False}, (False, False, False)),
            ({"stacks_natively": True}, (True, True, False)),
            ({"has_images": True}, (True, False, True)),
        ],
    )
    def test_the_workload_takes_them_over(
        self, mine: dict[str, Any], traits: dict[str, bool], expected: tuple[bool, ...]
    ) -> None:
        found = self.load(mine, type("Mine", (MLP,), {"traits": ModelTraits(**traits)})).traits
        assert (found.supports_stacking, found.stacks_natively, found.has_images) == expected

    def test_convolutions_see_images(self, mine: dict[str, Any]) -> None:
        assert self.load(mine, type("Mine", (CNN,), {})).traits.has_images

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (with_attribute("stacks_nativly", True, MLP), "has no effect; did you mean 'stacks_natively'"),
            (with_attribute("has_images", True, MLP), "states 'has_images' beside its traits"),
            (with_attribute("traits", WorkloadTraits(), MLP), "has traits = WorkloadTraits"),
            (lambda shape, num_labels: 3, "is a int without traits, shapes, axes, norms, init, apply"),
        ],
    )
    def test_what_is_refused(self, mine: dict[str, Any], model: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=f"^workload.model 'mine:Mine' {message}|{message}"):
            self.load(mine, model)
