"""FedAdam, FedYogi and FedAdagrad: against a slow version, on sub-models, and where they are something known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from federation import LEVELS, SINGLY, STACKED, assert_same, configure, mixed, modes, relative_error
from gossamer import run
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.fedopt import FedAdagrad, FedAdam, FedOpt, FedYogi
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from slow_federated import UNEQUAL, Params, Quadratic, Sent, add, federate, local_sgd, mean_change, slow_federation

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
METHODS: dict[str, type[FedOpt]] = {"fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad}
ALL = pytest.mark.parametrize("name", METHODS)


def second_moment(name: str, v: float, change: float, beta2: float) -> float:
    """Algorithm 2's v of one coordinate."""
    if name == "fedadagrad":
        return v + change**2
    if name == "fedadam":
        return beta2 * v + (1 - beta2) * change**2
    sign = (v > change**2) - (v < change**2)
    return v - (1 - beta2) * change**2 * sign


def slow_fedopt(parts: Parts, name: str, rate: float, beta1: float, tau: float, beta2: float = 0.99) -> Params:
    """Run Algorithm 2, coordinate by coordinate where somebody held it."""
    moments: dict[str, Params] = {}

    def server(round: int, model: Params, sent: Sequence[Sent]) -> Params:
        change, held = mean_change(model, sent)
        if not moments:
            moments["m"], moments["v"] = add((0.0, model)), {key: value * 0 + tau**2 for key, value in model.items()}
        new = add((1.0, model))
        for key, value in new.items():
            flat, m, v = value.view(-1), moments["m"][key].view(-1), moments["v"][key].view(-1)
            for i in held[key].flatten().nonzero().flatten().tolist():
                delta = float(change[key].flatten()[i])
                m[i] = beta1 * m[i] + (1 - beta1) * delta
                v[i] = second_moment(name, float(v[i]), delta, beta2)
                flat[i] += rate * m[i] / (v[i] ** 0.5 + tau)
        return new

    return slow_federation(parts, local_sgd(), server)


class TestFederation:
    @pytest.mark.sweep(keep=0.5)
    @EITHER
    @ALL
    def test_slow_version(self, tmp_path: Path, name: str, mode: dict[str, bool]) -> None:
        options = {"name": name, "server_lr": 0.02, "beta1": 0.8, "tau": 0.01}
        options |= {} if name == "fedadagrad" else {"beta2": 0.7}
        config = configure({"algorithm": options} | modes(**mode) | UNEQUAL)
        found = run(config, out=tmp_path / "run").params
        expected = slow_fedopt(build(parse(config)), name, rate=0.02, beta1=0.8, tau=0.01, beta2=0.7)
        assert relative_error(found, expected) < 1e-5
        assert relative_error(found, run(config | {"algorithm": "fedavg"}, out=tmp_path / "plain").params) > 1e-2

    @ALL
    def test_defaults(self, tmp_path: Path, name: str) -> None:
        """Those of the paper's experiments: beta1 = 0 for Adagrad, otherwise 0.9; beta2 = 0.99; tau = 0.001."""
        config = configure({"algorithm": {"name": name, "server_lr": 0.05}} | modes(**STACKED) | UNEQUAL)
        beta1 = 0.0 if name == "fedadagrad" else 0.9
        expected = slow_fedopt(build(parse(config)), name, rate=0.05, beta1=beta1, tau=1e-3)
        assert relative_error(run(config, out=tmp_path / "run").params, expected) < 1e-5

    @pytest.mark.sweep(keep=0.5)
    @ALL
    @pytest.mark.parametrize(("strategy", "levels"), [("rolling", LEVELS), ("random", (0.25, 0.5))])
    def test_sub_models(self, tmp_path: Path, name: str, strategy: str, levels: tuple[float, ...]) -> None:
        """The second one leaves coordinates that nobody holds."""
        sub = {"submodel": {"capacities": levels, "strategy": strategy}, "clients.per_round": 3, "train.epochs": 1}
        options = {"name": name, "server_lr": 0.05}
        config = configure(mixed(name, levels, **STACKED) | UNEQUAL | sub | {"algorithm": options})
        beta1 = 0.0 if name == "fedadagrad" else 0.9
        expected = slow_fedopt(build(parse(config)), name, rate=0.05, beta1=beta1, tau=1e-3)
        assert relative_error(run(config, out=tmp_path / "run").params, expected) < 1e-5

    @ALL
    def test_workers_and_blocks_change_no_bits(self, tmp_path: Path, name: str) -> None:
        config = configure(mixed(name, LEVELS) | UNEQUAL | {"submodel": {"capacities": LEVELS, "strategy": "random"}})
        reference = run(config, out=tmp_path / "reference")
        for workers, block_size in [(0, 1), (2, "auto"), (2, 2)]:
            engine = config["engine"] | {"workers": workers, "block_size": block_size}
            assert_same(run(config | {"engine": engine}, out=tmp_path / f"{workers}-{block_size}"), reference)


def row(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))


class TestServer:
    @ALL
    def test_what_nobody_holds_keeps_its_bits(self, name: str) -> None:
        algorithm = METHODS[name]({})
        x = row(0)
        x[0, 5] = -0.0
        state = algorithm.init(x)
        for number, held in enumerate([torch.arange(32) % 2 == 0, torch.arange(32) > 9, torch.arange(32) > 20]):
            before = {key: value.clone() for key, value in state.items()}
            change = torch.where(held, row(number + 1), 0.0)
            state = algorithm.update(state, {"x": change, "held": held[None]}, 3)
            assert set(state) == {"x", "m", "v"}
            for key, value in state.items():
                kept, was = value[0, ~held], before[key][0, ~held]
                assert torch.equal(kept.view(torch.int32), was.view(torch.int32)), key
                assert not torch.isclose(value[0, held], before[key][0, held], rtol=1e-7).any(), key

    @ALL
    def test_a_full_mask_is_no_mask(self, name: str) -> None:
        results = []
        for held in (None, torch.ones(1, 32, dtype=torch.bool)):
            algorithm = METHODS[name]({"beta1": 0.5})
            state = algorithm.init(row(0))
            for seed in (1, 2, 3):
                state = algorithm.update(state, {"x": row(seed), "held": held}, 3)
            results.append(state)
        assert all(torch.equal(results[0][key], results[1][key]) for key in ("x", "m", "v"))

    @ALL
    @given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
    def test_the_second_moment_stays_positive(self, name: str, changes: list[float]) -> None:
        algorithm = METHODS[name]({})
        state = algorithm.init(torch.zeros(1, 1))
        for change in changes:
            state = algorithm.update(state, {"x": torch.full((1, 1), change), "held": None}, 3)
            assert bool((state["v"] > 0).all())
            assert bool(torch.isfinite(state["x"]).all())


class TestTheory:
    @pytest.mark.parametrize("name", ["fedadam", "fedyogi"])
    def test_large_tau_is_fedavg(self, name: str) -> None:
        """Changes far below tau move the model by server_lr change / (2 tau)."""
        clients = [Quadratic(1.0, 3.0, 1.0, 2), Quadratic(0.5, -1.0, 3.0, 5)]
        options = {"tau": 1e4, "server_lr": 2e4, "beta1": 0.0, "beta2": 1 - 2**-20}
        found = federate(METHODS[name](options), clients, num_rounds=10, lr=0.1)["x"]
        assert torch.allclose(found, federate(FedAvg({}), clients, num_rounds=10, lr=0.1)["x"], rtol=1e-3)

    def test_adagrad_of_a_constant_change(self) -> None:
        """After t rounds v = tau^2 + t change^2."""
        algorithm = FedAdagrad({"server_lr": 0.5, "tau": 0.1})
        state, expected = algorithm.init(torch.zeros(1, 4)), 0.0
        for number in range(1, 6):
            state = algorithm.update(state, {"x": torch.full((1, 4), 0.2), "held": None}, 1)
            expected += 0.5 * 0.2 / ((0.01 + number * 0.04) ** 0.5 + 0.1)
            assert torch.allclose(state["v"], torch.tensor(0.01 + number * 0.04))
            assert torch.allclose(state["x"], torch.tensor(expected))

    def test_yogi_forgets_slowly(self) -> None:
        """After one large change, Adam's second moment falls geometrically and Yogi's by the squared change."""
        after: dict[str, float] = {}
        for name in ("fedadam", "fedyogi"):
            algorithm = METHODS[name]({"beta2": 0.5})
            state = algorithm.init(torch.zeros(1, 1))
            for change in [1.0] + [0.01] * 20:
                state = algorithm.update(state, {"x": torch.full((1, 1), change), "held": None}, 1)
            after[name] = float(state["v"])
        assert after["fedadam"] < 1e-3
        assert after["fedyogi"] == pytest.approx(0.5 - 20 * 0.5e-4, rel=1e-3)

    def test_no_bias_correction(self) -> None:
        """The first step is (1 - beta1) of what it were with correction."""
        state = FedAdam({"server_lr": 1.0, "beta1": 0.75, "beta2": 0.0, "tau": 1e-6})
        first = state.update(state.init(torch.zeros(1, 1)), {"x": torch.ones(1, 1), "held": None}, 1)
        assert float(first["x"]) == pytest.approx(0.25, rel=1e-4)


class TestOptions:
    @pytest.mark.parametrize(
        ("make", "options", "message"),
        [
            (FedAdam, {"beta_1": 0.9}, "unknown key 'algorithm.beta_1'; did you mean 'beta1'?"),
            (FedAdam, {"server_momentum": 0.9}, "unknown key 'algorithm.server_momentum'"),
            (FedYogi, {"beta2": 1}, "algorithm.beta2 = 1: input should be less than 1"),
            (FedYogi, {"tau": 0}, "algorithm.tau = 0: input should be greater than 0"),
            (FedAdagrad, {"beta2": 0.9}, "unknown key 'algorithm.beta2'"),
            (FedAdagrad, {"server_lr": -1}, "algorithm.server_lr = -1"),
        ],
    )
    def test_wrong_ones(self, make: Callable[[Any], Any], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make(options)
        assert message in str(caught.value)
