"""DiLoCo: against plain torch loops, on sub-models, and where it is something known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import LEVELS, SINGLY, STACKED, assert_same, configure, mixed, modes, relative_error
from gossamer import run
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from slow_federated import UNEQUAL, Params, Sent, add, local_sgd, mean_change, slow_federation

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


def slow_diloco(parts: Parts, outer_lr: float, mu: float, nesterov: bool = True) -> Params:
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

    return slow_federation(parts, local_sgd(), server)


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
