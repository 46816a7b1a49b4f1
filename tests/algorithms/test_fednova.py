"""FedNova: against a slow version that keeps every gradient, and what it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federation import SINGLY, STACKED, assert_same, configure, modes, relative_error
from gossamer import run
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.fednova import FedNova, normaliser
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
    local_sgd,
    mean_change,
    optimum,
    slow_federation,
)

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


def coefficients(steps: int, rate: float, momentum: float, mu: float) -> list[float]:
    """The vector a_i of the paper, for momentum or a proximal term: how often each gradient is in the change."""
    if momentum:
        return [(1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps)]
    return [(1 - rate * mu) ** (steps - 1 - k) for k in range(steps)]


def slow_fednova(parts: Parts, momentum: float, weight_decay: float, mu: float) -> Params:
    """Run FedNova as the paper writes it: x - tau_eff sum_i p_i rate d_i with d_i = G_i a_i / |a_i|, G_i gradients."""
    norms: dict[int, float] = {}
    walk = local_sgd(momentum, weight_decay, mu)

    def local(client: int, start: Params, gradients: Sequence[Gradient], rate: float) -> Params:
        seen: list[Params] = []

        def noting(gradient: Gradient) -> Callable[[Params], Params]:
            def noted(params: Params) -> Params:
                found = gradient(params)
                seen.append(add((1.0, found), (weight_decay, params)))
                return found

            return noted

        walk(client, start, [noting(gradient) for gradient in gradients], rate)
        vector = coefficients(len(seen), rate, momentum, mu)
        norms[client] = sum(vector)
        direction = add(*zip(vector, seen, strict=True))
        return add((-rate / norms[client], direction))

    def server(round: int, model: Params, sent: Sequence[Sent]) -> Params:
        effective = sum(one.weight * norms[one.client] for one in sent) / sum(one.weight for one in sent)
        return add((1.0, model), (effective, mean_change(model, sent)[0]))

    return slow_federation(parts, local, server)


class TestFederation:
    @pytest.mark.sweep(keep=0.5)
    @EITHER
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"clients.weighting": "equal", "train.weight_decay": 0.05},
            {"train.momentum": 0.9},
            {"algorithm.mu": 1.0},
            {"train.schedule": {"name": "cosine"}, "algorithm.mu": 2.0},
        ],
        ids=["sgd", "weight-decay", "momentum", "proximal", "schedule"],
    )
    def test_slow_version(self, tmp_path: Path, mode: dict[str, bool], changes: dict[str, Any]) -> None:
        config = configure({"algorithm": {"name": "fednova"}} | modes(**mode) | UNEQUAL | changes)
        parts = build(parse(config))
        train, mu = parts.config.train, config["algorithm"].get("mu", 0.0)
        found = run(config, out=tmp_path / "nova").params
        assert relative_error(found, slow_fednova(parts, train.momentum, train.weight_decay, mu)) < 1e-5
        assert len(set(parts.planner.plan(0).steps.tolist())) > 2
        other = {"algorithm": {"name": "fedprox", "mu": mu}}
        assert relative_error(found, run(config | other, out=tmp_path / "other").params) > 1e-2

    @EITHER
    def test_equal_steps_are_fedavg(self, tmp_path: Path, mode: dict[str, bool]) -> None:
        """To rounding: dividing by the number of steps and multiplying by it again changes nothing."""
        changes = modes(**mode) | UNEQUAL | {"train": {"steps": 7, "lr": 0.1, "batch_size": 4}}
        nova, plain = (run(configure(changes | {"algorithm": a}), out=tmp_path / a) for a in ("fednova", "fedavg"))
        assert relative_error(nova.params, plain.params) < 1e-6

    @pytest.mark.sweep(keep=0.5, at_least=1)
    @EITHER
    def test_workers_and_blocks_change_no_bits(self, tmp_path: Path, mode: dict[str, bool]) -> None:
        config = configure({"algorithm": "fednova"} | modes(**mode) | UNEQUAL | {"clients.num": 20})
        config = config | {"clients": config["clients"] | {"per_round": 17}, "checkpoint": {"every_seconds": 1000}}
        reference = run(config, out=tmp_path / "reference")
        for workers, block_size in [(0, 1), (0, 2), (0, 4), (0, 8), (1, "auto"), (2, "auto"), (2, 1), (4, 2)]:
            engine = config["engine"] | {"workers": workers, "block_size": block_size}
            assert_same(run(config | {"engine": engine}, out=tmp_path / f"{workers}-{block_size}"), reference)

    def test_bytes(self, tmp_path: Path) -> None:
        """The normaliser is one float32 a participant."""
        nova, plain = (run(configure({"algorithm": a, "rounds": 1}), out=tmp_path / a) for a in ("fednova", "fedavg"))
        record, other = nova.metrics[-1], plain.metrics[-1]
        assert record["total_bytes_up"] == other["total_bytes_up"] + 4 * record["num_participants"]
        assert record["total_bytes_down"] == other["total_bytes_down"]

    @pytest.mark.sweep(keep=0.5)
    @EITHER
    @pytest.mark.parametrize("workers", [0, 2])
    def test_dropped_updates_do_not_count(self, tmp_path: Path, mode: dict[str, bool], workers: int) -> None:
        """tau_eff is the mean over the survivors: client 7 sends NaN, or is not there."""
        way = modes(**mode) | {"engine.workers": workers, "workload.name": "faulty:Faulty", "clients.per_round": 8}
        skew = {"clients.partition": {"name": "n-classes", "n": 3}, "train.batch_size": 2, "algorithm": "fednova"}
        dropped = run(configure(way | skew | {"workload.clients": [7]}), out=tmp_path / "dropped")
        absent = run(configure(way | skew | {"clients.sampler": "faulty:without_last"}), out=tmp_path / "absent")
        assert dropped.metrics[-1]["num_survivors"] == 7
        assert relative_error(dropped.params, absent.params) < 1e-6


class TestTheory:
    def test_unequal_steps_do_not_move_the_optimum(self) -> None:
        """FedAvg ends near the optimum of a mean in which clients of more steps count more, FedNova near the true."""
        clients = [Quadratic(1.0, 3.0, 10.0, 1), Quadratic(1.0, -1.0, 30.0, 12), Quadratic(1.0, 0.5, 5.0, 4)]
        true = optimum(clients)
        skewed = optimum([one._replace(weight=one.weight * one.steps) for one in clients])
        plain = federate(FedAvg({}), clients, num_rounds=400, lr=0.005)["x"]
        nova = federate(FedNova({}), clients, num_rounds=400, lr=0.005)["x"]
        assert abs(skewed - true) > 0.5
        assert torch.allclose(plain, torch.tensor(skewed), atol=0.05)
        assert torch.allclose(nova, torch.tensor(true), atol=0.05)

    def test_server_momentum_acts_on_the_scaled_change(self) -> None:
        clients = [Quadratic(1.0, 3.0, 10.0, 1), Quadratic(1.0, -1.0, 30.0, 12)]
        first = federate(FedNova({}), clients, num_rounds=1, lr=0.01)["x"]
        momentum = federate(FedNova({"server_momentum": 0.5}), clients, num_rounds=1, lr=0.01)
        assert torch.allclose(momentum["velocity"], first)


class TestNormaliser:
    @given(st.integers(1, 60), st.floats(0.01, 0.99))
    def test_momentum(self, steps: int, rho: float) -> None:
        expected = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
        assert normaliser(steps, 0.1, rho, 0.0) == pytest.approx(expected, rel=1e-9)

    @given(st.integers(1, 60), st.floats(0.001, 0.5), st.floats(0.01, 1.9))
    def test_proximal_term(self, steps: int, lr: float, mu: float) -> None:
        expected = (1 - (1 - lr * mu) ** steps) / (lr * mu)
        assert normaliser(steps, lr, 0.0, mu) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("steps", [1, 3, 100])
    def test_plain_steps(self, steps: int) -> None:
        assert normaliser(steps, 0.1, 0.0, 0.0) == steps

    @given(st.integers(1, 12), st.just(0.0) | st.floats(1e-9, 0.9), st.just(0.0) | st.floats(1e-30, 2.0))
    def test_both(self, steps: int, rho: float, mu: float) -> None:
        """How far the algorithm's own steps get on a constant gradient."""
        algorithm = FedNova({"mu": mu}, momentum=rho)
        carry = algorithm.begin({"x": torch.zeros(1, 4)}, {})
        for _ in range(steps):
            carry = algorithm.step(carry, torch.ones(1, 4), 0.1)
        np.testing.assert_allclose(-carry["x"] / 0.1, normaliser(steps, 0.1, rho, mu), rtol=1e-5)


class TestRefusals:
    def test_sub_models(self, tmp_path: Path) -> None:
        levels = {"submodel": {"capacities": [0.5, 1.0], "strategy": "rolling"}}
        with pytest.raises(ConfigError, match=r"'fednova' trains whole models only, because the mean .*0.5, 1.0"):
            run(configure({"algorithm": "fednova"} | levels), out=tmp_path / "run")
        assert list(tmp_path.iterdir()) == []

    def test_strategy_left_out(self) -> None:
        with pytest.raises(ConfigError, match="trains whole models only, because the mean number"):
            build(parse(configure({"algorithm": "fednova", "submodel": {"capacities": [0.5, 1.0]}})))

    def test_means_per_label(self) -> None:
        with pytest.raises(ConfigError, match="needs all participants to hold all coordinates, because the mean"):
            build(parse(configure({"algorithm": "fednova", "submodel": {"mask_labels": True}})))
