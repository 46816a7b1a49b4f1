"""FedProx: against a slow version, FedAvg without a pull, and how far a client gets with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from federation import LEVELS, SINGLY, STACKED, configure, digest, mixed, modes, relative_error
from gossamer import run
from gossamer.algorithms.fedprox import FedProx
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from slow_federated import UNEQUAL, Quadratic, federate, local_sgd, slow_federation

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
PROX = {"name": "fedprox", "mu": 1.0}
MOMENTUM = {"train.momentum": 0.5, "train.weight_decay": 0.05}


class TestFederation:
    @EITHER
    @pytest.mark.parametrize("changes", [{}, MOMENTUM], ids=["plain", "momentum"])
    def test_slow_version(self, tmp_path: Path, mode: dict[str, bool], changes: dict[str, float]) -> None:
        config = configure({"algorithm": PROX} | modes(**mode) | UNEQUAL | changes)
        parts = build(parse(config))
        assert len(set(parts.planner.plan(0).steps.tolist())) > 2
        momentum, weight_decay = parts.config.train.momentum, parts.config.train.weight_decay
        found = run(config, out=tmp_path / "prox").params
        assert relative_error(found, slow_federation(parts, local_sgd(momentum, weight_decay, mu=1.0))) < 1e-5
        plain = run(config | {"algorithm": "fedavg"}, out=tmp_path / "plain").params
        assert relative_error(plain, slow_federation(parts, local_sgd(momentum, weight_decay))) < 1e-5
        assert relative_error(found, plain) > 1e-2

    @EITHER
    @pytest.mark.parametrize("strategy", ["rolling", "static", "random"])
    def test_sub_models(self, tmp_path: Path, strategy: str, mode: dict[str, bool]) -> None:
        sub = {"submodel": {"capacities": LEVELS, "strategy": strategy}}
        config = configure(mixed("fedprox", LEVELS, **mode) | UNEQUAL | sub | {"algorithm": PROX})
        found = run(config, out=tmp_path / "prox").params
        assert relative_error(found, slow_federation(build(parse(config)), local_sgd(mu=1.0))) < 1e-5
        plain = run(config | {"algorithm": "fedavg"}, out=tmp_path / "plain").params
        assert relative_error(found, plain) > 1e-2

    @EITHER
    @pytest.mark.parametrize("changes", [{}, MOMENTUM], ids=["plain", "momentum"])
    def test_no_pull_is_fedavg(self, tmp_path: Path, mode: dict[str, bool], changes: dict[str, float]) -> None:
        prox, plain = (
            run(configure({"algorithm": algorithm} | modes(**mode) | changes), out=tmp_path / str(number))
            for number, algorithm in enumerate([{"name": "fedprox", "mu": 0.0}, "fedavg"])
        )
        assert digest(prox.params) == digest(plain.params)


class TestTheory:
    @pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
    def test_a_client_ends_between_start_and_optimum(self, mu: float) -> None:
        """With many steps it minimises its own objective: (curvature centre + mu start) / (curvature + mu)."""
        client = Quadratic(curvature=2.0, centre=3.0, weight=1.0, steps=300)
        state = federate(FedProx({"mu": mu}), [client], num_rounds=1, lr=0.1, x=-1.0)
        assert torch.allclose(state["x"], torch.tensor((2.0 * 3.0 + mu * -1.0) / (2.0 + mu)), atol=1e-5)

    def test_server_options(self) -> None:
        client = Quadratic(curvature=1.0, centre=1.0, weight=1.0, steps=3)
        whole = federate(FedProx({"mu": 0.5}), [client], num_rounds=1, lr=0.1)["x"]
        half = federate(FedProx({"mu": 0.5, "server_lr": 0.5}), [client], num_rounds=1, lr=0.1)["x"]
        assert torch.allclose(half, whole / 2)
        assert "velocity" in FedProx({"server_momentum": 0.5}).init(whole)


class TestOptions:
    def test_default(self) -> None:
        algorithm = FedProx({})
        assert algorithm.options.mu > 0
        assert "start" in algorithm.begin({"x": torch.zeros(1, 4)}, {})
        assert "start" not in FedProx({"mu": 0}).begin({"x": torch.zeros(1, 4)}, {})

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"mu": -0.1}, "algorithm.mu = -0.1"), ({"mew": 1}, "unknown key 'algorithm.mew' (known here: mu,")],
    )
    def test_wrong_ones(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            FedProx(options)
        assert message in str(caught.value)
