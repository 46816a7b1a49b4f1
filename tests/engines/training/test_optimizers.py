"""Whole rounds with an optimizer, against torch's own on the same batches, and against themselves elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from federation import (
    LEVELS,
    SINGLY,
    STACKED,
    Injected,
    assert_same,
    configure,
    digest,
    failing,
    mixed,
    modes,
    relative_error,
)
from gossamer import run
from gossamer.algorithms.base import Arrays
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.optimizers import Optimizer, OptimizerOptions, OptimizerTraits
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import GossamerError
from gossamer.experiment import resume
from gossamer.submodel import extract
from slow import AXES, initial_model, perceptron, sample_order, training_samples
from slow_peers import decentralized

EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])
OPTIMIZERS: dict[str, Any] = {
    "adamw": {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1},
    "adam": "adam",
    "sgd": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adagrad": "adagrad",
    "rmsprop": {"name": "rmsprop", "momentum": 0.5, "centered": True, "eps": 1e-3},
}
TORCH = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
FIFTY = {"train.epochs": 17, "train.batch_size": 8, "train.lr": 0.003, "rounds": 1}  # 51 steps of 18 or 19 samples


def options_of(name: str) -> dict[str, Any]:
    """Return the options of an optimizer."""
    given = OPTIMIZERS[name]
    return {key: value for key, value in given.items() if key != "name"} if isinstance(given, dict) else {}


def trained_slowly(parts: Parts, name: str, capacity: float = 1.0) -> dict[str, Tensor]:
    """Return the model after a round of the only participant, trained by torch's own optimizer."""
    model, plan = initial_model(parts), parts.planner.plan(0)
    (client,), sub = plan.client.tolist(), parts.config.submodel
    cut = extract(model, AXES, capacity, 0, sub.strategy, parts.config.seed, client, sub.stride)
    params = {key: value.clone().requires_grad_() for key, value in cut.params.items()}
    optimizer = TORCH[name](params.values(), lr=parts.config.train.lr, **options_of(name))
    for batch in sample_order(parts, 0, client):
        images, labels = training_samples(parts, batch)
        optimizer.zero_grad()
        F.cross_entropy(perceptron(params, images, 1 / capacity), labels).backward()
        optimizer.step()
    for key, value in params.items():
        index = torch.meshgrid(
            *(
                torch.as_tensor(cut.windows[axis].indices) if axis in cut.windows else torch.arange(size)
                for axis, size in zip(AXES[key], model[key].shape, strict=True)
            ),
            indexing="ij",
        )
        model[key][index] = value.detach()
    return model


@pytest.mark.sweep(keep=0.5)
@EITHER
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_fifty_steps_are_those_of_torch(tmp_path: Path, name: str, capacity: float, mode: dict[str, bool]) -> None:
    algorithm = "fedavg" if capacity == 1.0 else "fedrolex"
    changes = mixed(algorithm, (capacity,), **mode) | FIFTY | {"clients.per_round": 1, "workload.label_mask": "none"}
    changes |= {"train.optimizer": OPTIMIZERS[name], "submodel.mask_labels": False}
    parts = build(parse(configure(changes)))
    found = run(configure(changes), out=tmp_path / "run").params
    assert relative_error(found, trained_slowly(parts, name, capacity)) < 1e-6


KEEPING = {"name": "adamw", "weight_decay": 0.1, "state": "keep"}
MANY = {"train.lr": 0.01, "rounds": 3}
FEW_EPOCHS = {"clients.partition": {"name": "n-classes", "n": 3}, "train.batch_size": 4}  # five or six steps each
CASES: dict[str, dict[str, Any]] = {
    "clients": configure(MANY | FEW_EPOCHS | {"train.optimizer": KEEPING} | modes(**STACKED)),
    "clients, dampened": configure(
        MANY
        | FEW_EPOCHS
        | {"train.optimizer": {"name": "sgd", "momentum": 0.9, "dampening": 0.3, "state": "keep"}}
        | modes(**STACKED)
    ),
    "windows": configure(mixed("fedrolex", LEVELS, **SINGLY) | MANY | {"train.optimizer": KEEPING}),
    "fiarse": configure(mixed("fiarse", LEVELS, **SINGLY) | MANY | {"train.optimizer": KEEPING}),
    "peers": decentralized(MANY | {"train.optimizer": KEEPING} | modes(**STACKED)),
    "peers, muon": decentralized(MANY | {"train.optimizer": "muon"} | modes(**SINGLY)),
    "peers, windows": decentralized(mixed("dsgd", (0.5, 1.0), **STACKED) | MANY | {"train.optimizer": "adam"}),
}


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("name", CASES)
def test_workers_blocks_and_resumes_change_no_bits(tmp_path: Path, name: str) -> None:
    config = CASES[name]
    whole = run(config, out=tmp_path / "0")
    for number, changes in enumerate(({"workers": 1, "block_size": 2}, {"workers": 2})):
        again = run(config | {"engine": config["engine"] | changes}, out=tmp_path / f"{number + 1}")
        assert_same(again, whole)
    with pytest.raises(Injected):
        run(config, out=tmp_path / "killed", hooks=failing("train", started=False, number=3))
    resumed = resume(tmp_path / "killed")
    assert digest(resumed.params) == digest(whole.params)


@pytest.mark.parametrize("name", ["clients", "windows", "peers"])
def test_what_is_kept_matters(tmp_path: Path, name: str) -> None:
    config = CASES[name]
    reset = config["train"] | {"optimizer": {"name": "adamw", "weight_decay": 0.1, "state": "reset"}}
    runs = [run(config | {"train": train}, out=tmp_path / str(i)) for i, train in enumerate((config["train"], reset))]
    assert digest(runs[0].params) != digest(runs[1].params)
    assert digest(run(config | {"rounds": 1}, out=tmp_path / "2").params) == digest(
        run(config | {"train": reset, "rounds": 1}, out=tmp_path / "3").params
    ), "in the first round there is nothing to keep"


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("algorithm", ["dsgd", "gossip-pga", "push-sum", "dsgd-ceca", "choco-sgd", "gasloc", "noloco"])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_peers_with_sgd_by_either_name(tmp_path: Path, algorithm: str, state: str) -> None:
    """AdamW runs with every method of peers; SGD with momentum has the same bits by both of its names."""
    topology = "ceca" if algorithm == "dsgd-ceca" else "ring"
    base = {"algorithm": algorithm, "peers.topology": topology, "rounds": 2, "train.lr": 0.01} | modes(**STACKED)
    found = run(decentralized(base | {"train.optimizer": {"name": "adamw", "state": state}}), out=tmp_path / "0")
    assert found.metrics[-1]["train_loss"] < found.metrics[0]["train_loss"]
    if state == "keep":
        given = {"train.optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1, "state": "keep"}}
        short = {"train.momentum": 0.9, "train.weight_decay": 0.1}
        assert_same(*(run(decentralized(base | c), out=tmp_path / str(i)) for i, c in enumerate((given, short), 1)))


@pytest.mark.parametrize("algorithm", ["fedprox", "fedadam", "diloco", "fjord", "heterofl", "fiarse"])
def test_algorithms_of_servers(tmp_path: Path, algorithm: str) -> None:
    levels = LEVELS if algorithm in ("fjord", "heterofl", "fiarse") else (1.0,)
    config = configure(mixed(algorithm, levels, **SINGLY) | {"train.optimizer": "adamw", "train.lr": 0.01})
    found = run(config, out=tmp_path / "run")
    assert found.metrics[-1]["train_loss"] < found.metrics[0]["train_loss"]


class Stepping(FedAvg):
    """A plug-in with a step of its own."""

    def step(self, carry: Arrays, grad: Tensor, lr: float) -> Arrays:
        carry["x"].sub_(grad.sign(), alpha=lr)
        return carry


class Forgetting(FedAvg):
    """A plug-in that begins without moments."""

    def begin(self, state: Mapping[str, Tensor], client_state: Mapping[str, Tensor]) -> Arrays:
        return {"x": state["x"].clone()}


class Losing(FedAvg):
    """A plug-in that drops them."""

    def end(self, *arguments: Any) -> tuple[Arrays, Arrays]:
        return super().end(*arguments)[0], {}


class SignSGD(Optimizer):
    """A plug-in."""

    class Options(OptimizerOptions):
        """One of its own."""

        beta: float = 0.9

    traits = OptimizerTraits(moments=("mean",))

    def step(self, x: Tensor, grad: Tensor, moments: Mapping[str, Tensor], lr: float) -> None:
        x.sub_(moments["mean"].lerp_(grad, 1 - self.options.beta).sign(), alpha=lr)


class Idle(Optimizer):
    """Lacks a step."""


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    given = {"name": f"{__name__}:SignSGD", "beta": 0.5, "state": "keep"}
    found = run(configure({"train.optimizer": given, "train.lr": 0.001}), out=tmp_path / "run")
    assert found.metrics[-1]["train_loss"] < found.metrics[0]["train_loss"]


OWN = f"{__name__}:"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "scaffold", "train.optimizer": "adamw"}, "because its control variates take a client's change for"),
    ({"algorithm": "fednova", "train.optimizer": "adam"}, "because the normaliser by which it divides"),
    ({"algorithm": f"{OWN}Stepping", "train.optimizer": "adamw"}, "because its local steps are its own"),
    (
        {"algorithm": f"{OWN}Forgetting", "train.optimizer": "adam"},
        "'begin' leaves out ['exp_avg', 'exp_avg_sq', ",
    ),
    ({"algorithm": f"{OWN}Losing", "train.optimizer": KEEPING}, "because its method 'end' leaves out ['exp_avg', "),
    ({"train.optimizer": "adamv"}, "unknown optimizer 'adamv'; did you mean 'adam"),
    ({"train.optimizer": {"name": "adamw", "beta": 1}}, "unknown key 'train.optimizer.beta'; did you mean 'betas'?"),
    ({"train.optimizer": {"name": "adamw", "state": "kept"}}, "train.optimizer.state = 'kept': give 'reset' or 'keep'"),
    ({"train.optimizer": "adamw", "train.momentum": 0.9}, "train.momentum = 0.9 is that of SGD, but train.optimizer"),
    (
        {"train.optimizer": {"name": "adamw", "weight_decay": 0.1}, "train.weight_decay": 0.1},
        "train.weight_decay = 0.1 and train.optimizer.weight_decay = 0.1 say the same: give one of them",
    ),
    ({"train.optimizer": f"{OWN}Idle"}, "without step: derive it from gossamer.algorithms.optimizers.Optimizer"),
    ({"train.optimizer": 3}, "train.optimizer = 3: give a name, or a mapping with a name and options"),
]
REFUSED_TO_PEERS = {
    "dsgt": "because its trackers follow plain gradients",
    "d2": "because its correction takes the last step for a plain gradient step",
    "exact-diffusion": "because its correction takes the last step",
    "quasi-global-momentum": "train.momentum = 0 is DSGD",
}


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=str)
def test_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(GossamerError) as caught:
        build(parse(configure(changes)))
    assert expected in str(caught.value)


@pytest.mark.parametrize(("algorithm", "expected"), REFUSED_TO_PEERS.items())
def test_refused_to_peers(algorithm: str, expected: str) -> None:
    with pytest.raises(GossamerError) as caught:
        build(parse(decentralized({"algorithm": algorithm, "train.steps": 1, "train.optimizer": "adamw"})))
    assert expected in str(caught.value)


def test_weight_decay_may_stand_in_either_place(tmp_path: Path) -> None:
    changes = (
        {"train.optimizer": "adamw", "train.weight_decay": 0.3},
        {"train.optimizer": {"name": "adamw", "weight_decay": 0.3}},
    )
    assert_same(*(run(configure(each | {"train.lr": 0.01}), out=tmp_path / str(i)) for i, each in enumerate(changes)))


def test_memory_counts_moments() -> None:
    """Two moments and a count."""
    costs = [build(parse(configure({"train.optimizer": name}))).planner.costs[0] for name in ("sgd", "adamw")]
    (plain,), (adaptive,) = (each.variants for each in costs)
    assert adaptive.memory_bytes - plain.memory_bytes == 2 * 4 * plain.num_parameters + 4
