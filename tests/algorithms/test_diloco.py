"""DiLoCo: against plain torch loops, on sub-models, and where it is something known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import LEVELS, SINGLY, STACKED, assert_same, configure, mixed, modes, relative_error
from gossamer import run
from gossamer.algorithms.diloco import divided
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.experiment import resume
from slow import initial_model
from slow_federated import (
    UNEQUAL,
    Gradient,
    Local,
    Params,
    Sent,
    add,
    gradients_of,
    local_sgd,
    mean_change,
    slow_federation,
)

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


def slow_diloco(parts: Parts, outer_lr: float, mu: float, nesterov: bool = True, inner: Local | None = None) -> Params:
    """Run the outer optimizer of the paper's code: torch's SGD with Nesterov momentum on the negative mean change.

    Coordinates that nobody held are left out, momentum included.
    """
    velocity: Params = {}

    def server(round: int, model: Params, sent: Sequence[Sent]) -> Params:
        change, held = mean_change(model, sent)
        new = add((1.0, model))
        for key, value in new.items():
            here = held[key]
            leaf = value[here].clone().requires_grad_()
            optimizer = torch.optim.SGD([leaf], lr=outer_lr, momentum=mu, nesterov=nesterov)
            if key not in velocity:
                velocity[key] = torch.zeros_like(value)
            optimizer.state[leaf]["momentum_buffer"] = velocity[key][here].clone()
            leaf.grad = -change[key][here]
            optimizer.step()
            value[here] = leaf.detach()
            velocity[key][here] = optimizer.state[leaf]["momentum_buffer"]
        return new

    return slow_federation(parts, inner or local_sgd(), server)


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    "algorithm", [{}, mixed("diloco") | {"submodel.strategy": "rolling"}], ids=["whole", "rolling"]
)
def test_is_torch_outside(tmp_path: Path, mode: dict[str, bool], nesterov: bool, algorithm: dict[str, Any]) -> None:
    options = {"name": "diloco", "outer_lr": 0.6, "outer_momentum": 0.8, "nesterov": nesterov}
    levels = LEVELS if algorithm else (1.0,)
    config = configure(algorithm | {"algorithm": options} | modes(levels, **mode) | UNEQUAL)
    found = run(config, out=tmp_path / "run").params
    assert relative_error(found, slow_diloco(build(parse(config)), 0.6, 0.8, nesterov)) < 1e-5


def local_adamw(lr: float) -> Local:
    """Return torch's AdamW, whose moments each client keeps from round to round."""
    kept: dict[int, list[dict[str, torch.Tensor]]] = {}

    def train(client: int, start: Params, gradients: Sequence[Gradient], rate: float) -> Params:
        """Take the steps of a client."""
        leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.AdamW(leaves.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
        for leaf, state in zip(leaves.values(), kept.get(client, []), strict=False):
            optimizer.state[leaf] = state
        for gradient in gradients:
            for name, grad in gradient({name: leaf.detach() for name, leaf in leaves.items()}).items():
                leaves[name].grad = grad
            optimizer.step()
        kept[client] = [optimizer.state[leaf] for leaf in leaves.values()]
        return {name: leaf.detach() - start[name] for name, leaf in leaves.items()}

    return train


@EITHER
def test_adamw_inside(tmp_path: Path, mode: dict[str, bool]) -> None:
    """The paper's algorithm: AdamW inside, whose moments stay with the worker, Nesterov momentum outside."""
    inner = {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1, "state": "keep"}
    changes = {"algorithm": "diloco", "train.optimizer": inner, "train.lr": 0.01, "rounds": 4}
    config = configure(changes | modes(**mode) | UNEQUAL)
    found = run(config, out=tmp_path / "run").params
    assert relative_error(found, slow_diloco(build(parse(config)), 0.7, 0.9, inner=local_adamw(0.01))) < 1e-5


def test_plain_one_is_fedavg(tmp_path: Path) -> None:
    plain = {"name": "diloco", "outer_lr": 1.0, "outer_momentum": 0.0}
    found, fedavg = (
        run(configure({"algorithm": one}), out=tmp_path / str(n)) for n, one in enumerate((plain, "fedavg"))
    )
    assert relative_error(found.params, fedavg.params) < 1e-6


def test_without_lookahead_is_fedavgm(tmp_path: Path) -> None:
    heavy = {"name": "diloco", "outer_lr": 0.5, "outer_momentum": 0.9, "nesterov": False}
    fedavgm = {"name": "fedavg", "server_lr": 0.5, "server_momentum": 0.9}
    found, known = (run(configure({"algorithm": one}), out=tmp_path / str(n)) for n, one in enumerate((heavy, fedavgm)))
    assert relative_error(found.params, known.params) < 1e-6


def test_same_bits_on_any_number_of_workers(tmp_path: Path) -> None:
    alone, several = (
        run(configure({"algorithm": "diloco", "engine.workers": workers} | UNEQUAL), out=tmp_path / f"{workers}")
        for workers in (0, 2)
    )
    assert_same(alone, several)


def test_options_are_checked() -> None:
    for name, value in (("outer_lr", 0), ("outer_momentum", 1.0), ("lr", 1)):
        with pytest.raises(ConfigError, match=name):
            build(parse(configure({"algorithm": {"name": "diloco", name: value}})))


class SlowStreaming:
    """Workers that keep their models, and exchange a fragment at a time."""

    def __init__(self, parts: Parts, fragments: list[list[str]], outer_lr: float, mu: float, alpha: float) -> None:
        self.parts, self.fragments, self.outer_lr, self.mu, self.alpha = parts, fragments, outer_lr, mu, alpha

    def run(self) -> Params:
        """Return the server's model after all rounds."""
        phi = {name: value.double() for name, value in initial_model(self.parts).items()}
        velocity, theta, last = add((0.0, phi)), dict[int, Params](), list[str]()
        for round in range(self.parts.config.rounds):
            for phase, fragment in enumerate(self.fragments):
                plan, sent = self.parts.planner.plan(round, phase=phase), []
                for client, weight in zip(plan.client.tolist(), plan.weight.tolist(), strict=True):
                    own = theta.get(client, phi)
                    own = {n: self.alpha * v + (1 - self.alpha) * phi[n] if n in last else v for n, v in own.items()}
                    gradients = gradients_of(self.parts, round, client, 1.0, phase)
                    theta[client] = add((1.0, own), (1.0, local_sgd()(client, own, gradients, plan.lr)))
                    sent.append((weight, theta[client]))
                for name in fragment:
                    change = sum(weight * model[name] for weight, model in sent) / sum(w for w, _ in sent) - phi[name]
                    velocity[name] = self.mu * velocity[name] + change
                    phi[name] = phi[name] + self.outer_lr * (change + self.mu * velocity[name])
                last = fragment
        return phi


STREAMING = {"name": "streaming-diloco", "fragments": 3, "outer_lr": 0.6, "outer_momentum": 0.7, "alpha": 0.4}


class TestStreaming:
    @EITHER
    def test_slow_version(self, tmp_path: Path, mode: dict[str, bool]) -> None:
        config = configure({"algorithm": STREAMING, "clients.per_round": 8} | modes(**mode))
        parts = build(parse(config))
        layout = parts.workload.layout
        fragments = divided(layout.names, [math.prod(shape) for shape in layout.shapes], 3)
        assert [name for names in fragments for name in names] == list(layout.names)
        found = run(config, out=tmp_path / "run")
        assert relative_error(found.params, SlowStreaming(parts, fragments, 0.6, 0.7, 0.4).run()) < 1e-5

    def test_a_round_sends_the_model_once(self, tmp_path: Path) -> None:
        streaming, plain = (
            run(configure({"algorithm": one, "clients.per_round": 8}), out=tmp_path / str(n)).metrics[-1]
            for n, one in enumerate((STREAMING, "diloco"))
        )
        for name in ("total_bytes_up", "total_bytes_down"):
            assert streaming[name] == plain[name]
        assert streaming["total_samples"] == 3 * plain["total_samples"]

    def test_workers_and_resuming_between_phases(self, tmp_path: Path) -> None:
        changes = {"algorithm": STREAMING, "train.optimizer": {"name": "adamw", "state": "keep"}, "train.lr": 0.01}
        changes |= {"communication.uplink": "int4"}
        alone = run(configure(changes), out=tmp_path / "alone")
        assert_same(alone, run(configure(changes | {"engine.workers": 2}), out=tmp_path / "two"))
        run(configure(changes), out=tmp_path / "stopped", on_round=lambda record: record["round"] == 1)
        assert_same(alone, resume(tmp_path / "stopped"))

    @pytest.mark.parametrize("count", [2, 3, 4])
    def test_fragments(self, count: int) -> None:
        sizes = (4, 1000, 3, 3)
        found = divided("abcd", sizes, count)
        assert len(found) == count
        assert all(found)
        assert [name for names in found for name in names] == list("abcd")
        with pytest.raises(ConfigError, match=r"algorithm\.fragments = 5, but the model has 4 parameters only"):
            divided("abcd", sizes, 5)
