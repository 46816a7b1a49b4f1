"""SCAFFOLD: against a slow version with its options, what it is for, and what it refuses.

How its private state is kept is the matter of `tests/test_client_state.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import SINGLY, STACKED, assert_same, configure, modes, relative_error
from gossamer import run
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.scaffold import Scaffold
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from slow_federated import (
    UNEQUAL,
    Gradient,
    Params,
    Quadratic,
    Sent,
    add,
    federate,
    mean_change,
    optimum,
    slow_federation,
)

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


def slow_scaffold(parts: Parts, server_lr: float, weight_decay: float) -> Params:
    """Run Algorithm 1 of the paper; by option II a client's control is the mean of the gradients that it saw."""
    controls: dict[int, Params] = {}
    averages: list[Params] = []  # the server's control, of each round

    def local(client: int, start: Params, gradients: Sequence[Gradient], rate: float) -> Params:
        own, mine, seen = start, controls.get(client, add((0.0, start))), []
        averages[:] = averages or [add((0.0, start))]
        for gradient in gradients:
            seen.append(add((1.0, gradient(own)), (weight_decay, own)))
            own = add((1.0, own), (-rate, seen[-1]), (rate, mine), (-rate, averages[-1]))
        controls[client] = add(*((1 / len(seen), one) for one in seen))
        return add((1.0, own), (-1.0, start))

    def server(round: int, model: Params, sent: Sequence[Sent]) -> Params:
        averages.append(add((0.0, model), *((1 / parts.config.clients.num, one) for one in controls.values())))
        return add((1.0, model), (server_lr, mean_change(model, sent)[0]))

    return slow_federation(parts, local, server)


class TestFederation:
    @EITHER
    @pytest.mark.parametrize(
        "changes",
        [{}, {"algorithm.server_lr": 0.5, "train.weight_decay": 0.1}, {"clients.weighting": "equal"}],
        ids=["plain", "options", "equal-weights"],
    )
    def test_slow_version(self, tmp_path: Path, mode: dict[str, bool], changes: dict[str, Any]) -> None:
        config = configure({"algorithm": {"name": "scaffold"}, "rounds": 4} | modes(**mode) | UNEQUAL | changes)
        parts = build(parse(config))
        server_lr = config["algorithm"].get("server_lr", 1.0)
        found = run(config, out=tmp_path / "scaffold").params
        assert relative_error(found, slow_scaffold(parts, server_lr, parts.config.train.weight_decay)) < 1e-5
        plain = {"algorithm": {"name": "fedavg", "server_lr": server_lr}}
        assert relative_error(found, run(config | plain, out=tmp_path / "plain").params) > 1e-2

    @pytest.mark.sweep(keep=0.5, at_least=1)
    @EITHER
    def test_workers_and_blocks_change_no_bits(self, tmp_path: Path, mode: dict[str, bool]) -> None:
        changes = {"algorithm": {"name": "scaffold", "server_lr": 0.5}, "train.weight_decay": 0.1}
        config = configure(changes | modes(**mode) | UNEQUAL | {"checkpoint.every_seconds": 1000})
        reference = run(config, out=tmp_path / "reference")
        for workers, block_size in [(0, 1), (0, 2), (0, 4), (1, "auto"), (2, "auto"), (2, 1), (4, 2)]:
            engine = config["engine"] | {"workers": workers, "block_size": block_size}
            assert_same(run(config | {"engine": engine}, out=tmp_path / f"{workers}-{block_size}"), reference)


class TestTheory:
    CLIENTS = (Quadratic(1.0, 3.0, 1.0, 10), Quadratic(0.2, -2.0, 1.0, 10), Quadratic(3.0, 0.5, 1.0, 10))

    def test_drift_is_corrected(self) -> None:
        """Clients of different curvature: FedAvg ends away from the optimum, SCAFFOLD at it."""
        true = optimum(self.CLIENTS)
        plain = federate(FedAvg({}), self.CLIENTS, num_rounds=300, lr=0.1)["x"]
        controlled = federate(Scaffold({}), self.CLIENTS, num_rounds=300, lr=0.1)["x"]
        assert float((plain - true).abs().min()) > 0.1
        assert torch.allclose(controlled, torch.tensor(true), atol=1e-4)

    def test_weight_decay_moves_the_optimum(self) -> None:
        """Decay lambda adds lambda / 2 |x|^2 to every loss, controls included."""
        decayed = federate(Scaffold({}, weight_decay=0.5), self.CLIENTS, num_rounds=300, lr=0.1)["x"]
        pull = sum(one.curvature for one in self.CLIENTS)
        expected = sum(one.curvature * one.centre for one in self.CLIENTS) / (pull + 0.5 * len(self.CLIENTS))
        assert torch.allclose(decayed, torch.tensor(expected), atol=1e-4)

    def test_the_first_round_is_fedavg(self) -> None:
        plain = federate(FedAvg({"server_lr": 0.5}), self.CLIENTS, num_rounds=1, lr=0.1)["x"]
        controlled = federate(Scaffold({"server_lr": 0.5}), self.CLIENTS, num_rounds=1, lr=0.1)["x"]
        assert torch.allclose(plain, controlled, rtol=1e-6)


class TestRefusals:
    def test_momentum(self) -> None:
        with pytest.raises(ConfigError, match=r"train.momentum = 0.9, because its control variates .* plain gradient"):
            Scaffold({}, momentum=0.9)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"server_lr": 0}, "algorithm.server_lr = 0"), ({"server_momentum": 0.5}, "'algorithm.server_momentum'")],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            Scaffold(options)
        assert message in str(caught.value)

    @pytest.mark.parametrize("strategy", [None, "rolling", "static"])
    def test_sub_models(self, strategy: str | None) -> None:
        levels = {"submodel": {"capacities": [0.5, 1.0], "strategy": strategy}}
        with pytest.raises(ConfigError, match="whole models only, because the server's control variate is the mean"):
            build(parse(configure({"algorithm": "scaffold"} | levels)))

    def test_means_per_label(self) -> None:
        with pytest.raises(ConfigError, match="needs all participants to hold all coordinates"):
            build(parse(configure({"algorithm": "scaffold", "submodel": {"mask_labels": True}})))
