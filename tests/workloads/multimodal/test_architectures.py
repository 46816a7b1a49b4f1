"""Clients of several architectures: whose parameters are whose, what travels, and the same bits wherever they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from federation import Injected, assert_same, failing
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.testing import check_workload

NUM_PUBLIC, WIDTH = 20, 8
PERCEPTRONS = {"image": {"name": "mlp", "hidden": [12]}, "audio": {"name": "mlp", "hidden": [8]}}
CONVOLUTION = {"name": "cnn", "width": 0.125}
KINDS: dict[str, Any] = {
    "flat": {"share": 0.5},
    "conv": {"share": 0.5, "encoders": {"image": CONVOLUTION, "audio": {"name": "mlp", "hidden": [16, 10]}}},
}
WORKLOAD = {
    "name": "audio-visual-digits",
    "dataset": {"bands": 8, "frames": 8, "num_public": NUM_PUBLIC},
    "encoders": PERCEPTRONS,
    "width": WIDTH,
    "modalities": {"image+audio": 0.34, "image": 0.33, "audio": 0.33},
    "exchange": "representations",
    "architectures": KINDS,
}
pytestmark = pytest.mark.usefixtures("recorded")


def config(**changes: Any) -> dict[str, Any]:
    """Return a federation of twelve clients, two of each architecture and set of modalities."""
    return {
        "rounds": 3,
        "seed": 3,
        "workload": WORKLOAD | changes.pop("workload", {}),
        "clients": {"num": 12, "per_round": 12},
        "train": {"lr": 0.01, "batch_size": 4, "steps": 2, "optimizer": {"name": "adam"}},
        "algorithm": {"name": "creamfl", "public_batch_size": 8},
        "checkpoint": {"every_seconds": 0},
        "engine": {"name": "local", "workers": 0, "modes": {"stacked": False}},
    } | changes


def parts(**changes: Any) -> Parts:
    """Return what a run of the configuration, with changes, consists of."""
    return build(parse(config(**changes)))


def test_a_client_holds_the_modules_of_its_own_kind() -> None:
    """Six sets of modules; none of one architecture beside one of another, and shares of clients are as asked for."""
    workload = parts().workload
    expected = {
        f"{kind} {senses}": {f"{kind}_{name}" for name in senses.split("+")}
        | {"public_image", "public_audio"}
        | ({f"{kind}_fusion"} if "+" in senses else set())
        for kind in KINDS
        for senses in ("image", "audio", "image+audio")
    }
    assert {one.name: set(one.modules) for one in workload.holdings} == expected
    numbers = workload.client_holdings(np.arange(12))
    kinds = [workload.holdings[number].name.partition(" ")[0] for number in numbers]
    assert kinds.count("flat") == kinds.count("conv") == 6


def test_an_architecture_computes_what_it_does_alone() -> None:
    """The heads' logits are, bit for bit, those of the same classifier by itself, whose modules have plain names."""
    workload = parts().workload
    alone = parts(workload={"architectures": None, "encoders": KINDS["conv"]["encoders"]}).workload.model
    params = workload.layout.views(workload.init(5))
    samples = {name: values[:4] for name, values in workload.public_set().samples.items()}
    own = {name: value for name, value in params.items() if name.startswith("conv_")}
    expected = alone.logits({name.removeprefix("conv_"): value for name, value in own.items()}, samples)
    found = workload.model.logits(own, samples)
    assert found.keys() == expected.keys() == {"image", "audio", "all"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(value.dim() == 4 for value in own.values())
    assert not any(value.dim() == 4 for name, value in params.items() if name.startswith(("flat_", "server_")))


def test_every_architecture_sends_the_same_bytes(tmp_path: Path) -> None:
    """Public samples times width times 4: up for each modality that a client has, down for both; models differ."""
    one, costs = NUM_PUBLIC * WIDTH * 4, parts().planner.costs[0].variants
    assert {each.holding: each.bytes_up // one for each in costs} == {
        f"{kind} {senses}": 1 + ("+" in senses) for kind in KINDS for senses in ("image", "audio", "image+audio")
    }
    assert all(each.bytes_up % one == 0 and each.bytes_down == 2 * one for each in costs)
    assert len({each.num_parameters for each in costs}) == 6
    record = gossamer.run(config(), out=tmp_path / "run").metrics[-1]
    held = parts().workload.client_holdings(np.arange(12))
    ups = sum(next(one.bytes_up for one in costs if one.holding == parts_name) for parts_name in names_of(held))
    assert (record["total_bytes_up"], record["total_bytes_down"]) == (3 * ups, 3 * 12 * 2 * one)


def names_of(holdings: np.ndarray) -> list[str]:
    """Return the names of the sets of modules that clients hold."""
    every = parts().workload.holdings
    return [every[number].name for number in holdings]


def test_clients_train_their_own_models_alone(tmp_path: Path) -> None:
    """What differs from the server's row is what the client's kind has of it."""
    done = gossamer.run(config(rounds=2), out=tmp_path / "run")
    workload, loaded = parts().workload, gossamer.load(tmp_path / "run")
    for client, name in enumerate(names_of(workload.client_holdings(np.arange(12)))):
        kind, _, senses = name.partition(" ")
        own = loaded.state_dict(client=client)
        changed = {one.partition(".")[0] for one in own if not torch.equal(own[one], done.params[one])}
        extra = {f"{kind}_fusion"} if "+" in senses else set()
        assert changed == {f"{kind}_{one}" for one in senses.split("+")} | extra
    assert "accuracy_personal" in done.metrics[-1]


@pytest.mark.parametrize("modes", [{"stacked": False}, {"stacked": True, "padding": True}], ids=["singly", "stacked"])
def test_bits_do_not_depend_on_workers(tmp_path: Path, modes: dict[str, bool]) -> None:
    done = [
        gossamer.run(
            config(engine={"name": "local", "workers": workers, "modes": modes}, rounds=2), out=tmp_path / str(workers)
        )
        for workers in (0, 1, 2)
    ]
    for other in done[1:]:
        assert_same(other, done[0])


def test_a_run_that_was_cut_short_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = gossamer.run(config(), out=tmp_path / "whole")
    with pytest.raises(Injected):
        gossamer.run(config(), out=tmp_path / "cut", hooks=failing("exchange", started=False, number=2))
    assert_same(gossamer.resume(tmp_path / "cut"), done)


def test_narrow_clients_of_every_architecture() -> None:
    """Capacities go with architectures: each kind has narrower models, and sends as much."""
    costs = parts(submodel={"capacities": [0.5, 1.0], "strategy": "static"}).planner.costs[0].variants
    sizes = {(each.holding, each.capacity): each for each in costs}
    for kind in KINDS:
        narrow, wide = sizes[f"{kind} image", 0.5], sizes[f"{kind} image", 1.0]
        assert narrow.num_parameters < wide.num_parameters
        assert narrow.bytes_up == wide.bytes_up == NUM_PUBLIC * WIDTH * 4


def test_the_contract() -> None:
    check_workload(parts().workload)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": {"server": {"share": 1}}}, "has the name 'server', by which modules are called"),
        ({"architectures": {"a.b": {"share": 1}}}, r"has the name 'a\.b', by which modules are called"),
        ({"architectures": {"a": {"share": 0.3}, "b": {"share": 0.3}}}, "shares that sum to 0.6: give shares that"),
        ({"architectures": {}}, "architectures"),
        ({"architectures": {"a": {}}}, r"architectures\.a\.share"),
        (
            {"architectures": {"a": {"share": 1, "encoders": {"smell": "mlp"}}}},
            r"architectures\.a\.encoders names image, audio, smell, but the data have",
        ),
        ({"exchange": "parameters"}, "differ, so that their parameters cannot be averaged: set workload.exchange to"),
    ],
)
def test_bad_architectures(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parts(workload=changes)
