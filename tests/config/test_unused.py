"""What is given but changes nothing: every such option is named, and none that does something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gossamer.config.loading import parse, with_value
from gossamer.config.resolve import resolve
from gossamer.errors import ConfigError

CLIENTS: dict[str, Any] = {"clients": {"num": 8, "per_round": 4}}
PEERS: dict[str, Any] = {"peers": {"num": 8, "topology": "ring"}, "algorithm": "dsgd"}
SUB = {"submodel.capacities": [0.5, 1.0]}
MULTISTEP = {"train.schedule.name": "multistep"}
PGA = {"algorithm": {"name": "gossip-pga", "period": 20}}
RENORMALISE = {"peers.absent_neighbour": "renormalise"}
WHOLE = "all participants train the whole model"


def warnings_of(population: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the warnings of a configuration with some changes."""
    data: dict[str, Any] = {"rounds": 10, "workload": {}, "train": {"lr": 0.1}, **population}
    for key, value in changes.items():
        data = with_value(data, key.split("."), value)
    found = resolve(parse(data))
    assert resolve(found.config).warnings == found.warnings  # what is filled in is not given
    return found.warnings


@pytest.mark.parametrize(
    ("population", "changes", "option", "reason"),
    [
        (CLIENTS, {"submodel.stride": 3}, "submodel.stride = 3", WHOLE),
        (
            CLIENTS,
            SUB | {"algorithm": "flexlora", "submodel.mask_labels": True},
            "submodel.mask_labels = True",
            "averages every row by itself",
        ),
        (CLIENTS, {"submodel.offsets": {"hidden0": 2}}, "submodel.offsets = {'hidden0': 2}", WHOLE),
        (CLIENTS, {"submodel.strategy": "rolling"}, "submodel.strategy = 'rolling'", WHOLE),
        (CLIENTS, {"submodel.scaler": False}, "submodel.scaler = False", WHOLE),
        (CLIENTS, {"submodel.assignment": "dynamic"}, "submodel.assignment = 'dynamic'", "is a single one"),
        (CLIENTS, {"submodel.shares": [2]}, "submodel.shares = [2.0]", "is a single one"),
        (
            CLIENTS,
            SUB | {"algorithm": "heterofl", "submodel.stride": 3},
            "submodel.stride = 3",
            "'static' do not follow",
        ),
        (CLIENTS, SUB | {"algorithm": "fiarse", "submodel.stride": 3}, "submodel.stride = 3", "'static' do not follow"),
        (CLIENTS, MULTISTEP, "train.schedule.name = 'multistep'", "it has no milestones"),
        (CLIENTS, {"train.schedule.name": "cosine", "rounds": 1}, "train.schedule.name = 'cosine'", "one round only"),
        (
            CLIENTS,
            MULTISTEP | {"train.schedule.milestones": [5, 10]},
            "train.schedule.milestones = [10]",
            "from 0 to 9",
        ),
        (CLIENTS, {"train.schedule.warmup_rounds": 1}, "train.schedule.warmup_rounds = 1", "all of train.lr"),
        (CLIENTS, {"clients.per_round": 8, "clients.over_selection": 2}, "clients.over_selection = 2.0", "all clients"),
        (CLIENTS, {"evaluation.num_peers": 3}, "evaluation.num_peers = 3", "there are no peers"),
        (CLIENTS, {"engine.address": "auto"}, "engine.address = 'auto'", "engine 'local' runs on this machine alone"),
        (PEERS, {"engine": {"straggler_seconds": 3, "workers": 0}}, "engine.straggler_seconds = 3.0", "no worker"),
        (PEERS, RENORMALISE, "peers.absent_neighbour = 'renormalise'", "are never absent"),
        (PEERS, {"peers.patience_seconds": 3}, "peers.patience_seconds = 3.0", "are never absent"),
        (
            PEERS,
            {"engine.name": "network", "peers.patience_seconds": 3},
            "peers.patience_seconds = 3.0",
            "they wait for ever",
        ),
        (PEERS, {"engine.peer": 3}, "engine.peer = 3", "no peers dial each other"),
        (PEERS, {"engine.data": "mnist"}, "engine.data = {'name': 'mnist'}", "no peers dial each other"),
        (
            PEERS,
            {"engine.name": "network", "engine.data": "mnist"},
            "engine.data = {'name': 'mnist'}",
            "no peer is given",
        ),
        (
            CLIENTS,
            {"engine.peers_file": "a"},
            "engine.peers_file = 'a'",
            "no peers dial each other",
        ),
        (PEERS, {"submodel.stride": 3}, "submodel.stride = 3", WHOLE),
        (PEERS, {"peers.merge_every": 20}, "peers.merge_every = 20", "ends after 10 rounds"),
        (PEERS, {"peers.merge_every": 5, "peers.final_merge": True}, "peers.final_merge = True", "is a merge anyway"),
        (PEERS, PGA, "algorithm.period = 20", "ends after 10 rounds"),
        (PEERS, PGA | {"peers.merge_every": 3}, "algorithm.period = 20", "peers.merge_every = 3 takes its place"),
    ],
)
def test_it_is_named_with_the_reason(
    population: Mapping[str, Any], changes: dict[str, Any], option: str, reason: str
) -> None:
    (warning,) = warnings_of(population, changes)
    assert warning.startswith(f"{option} changes nothing, because ")
    assert reason in warning


@pytest.mark.parametrize(
    ("population", "changes"),
    [
        (CLIENTS, {}),
        (PEERS, {}),
        (CLIENTS, {"submodel.strategy": "static", "submodel.offsets": {"hidden0": 0}, "submodel.scaler": True}),
        (CLIENTS, SUB | {"algorithm": "fedrolex", "submodel.stride": 3, "submodel.assignment": "dynamic"}),
        (CLIENTS, SUB | {"algorithm": "all-smallest", "submodel.stride": 3, "submodel.shares": [1, 3]}),
        (CLIENTS, MULTISTEP | {"train.schedule.milestones": [5], "train.schedule.factor": 0.5}),
        (CLIENTS, {"train.schedule.name": "cosine", "train.schedule.warmup_rounds": 2}),
        (CLIENTS, {"clients.over_selection": 1.5, "clients.deadline_seconds": 9}),
        (CLIENTS, {"clients.per_round": 8, "clients.sampler": "gossamer.planning.clients:uniform"}),
        (PEERS, {"peers.merge_every": 4, "peers.final_merge": True, "evaluation.num_peers": 3}),
        (PEERS, {"algorithm": {"name": "gossip-pga", "period": 5}}),
        (PEERS, {"engine.straggler_seconds": 3}),
    ],
)
def test_what_does_something_is_not_named(population: Mapping[str, Any], changes: dict[str, Any]) -> None:
    assert warnings_of(population, changes) == ()


def test_an_algorithm_of_sub_models_without_any() -> None:
    (warning,) = warnings_of(CLIENTS, {"algorithm": "fedrolex"})
    assert "algorithm 'fedrolex' is about sub-models, but all participants train the whole model" in warning


def test_capacities_and_devices_of_nobody() -> None:
    levels = {"algorithm": "fedrolex", "submodel.capacities": [1.0, 0.5, 0.25], "submodel.shares": [1, 1, 0.01]}
    (warning,) = warnings_of(CLIENTS, levels)
    assert warning.startswith("capacity 0.25 is that of nobody, because there are 8 participants only")
    assert warnings_of(CLIENTS, levels | {"submodel.shares": [1, 1, 0]}) == ()  # as it was asked for
    assert warnings_of(CLIENTS, levels | {"submodel.assignment": "dynamic"}) == ()
    devices = [{"profile": {"name": name}, "share": share} for name, share in (("phone", 99), ("watch", 1))]
    (warning,) = warnings_of(CLIENTS, {"devices": devices})
    assert warning.startswith("device 'watch' is that of nobody")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {"name": "fjord", "alpha": 2}}, "alpha = 2.0 weights distillation: set distillation, or"),
        ({"seed": 3, "seeds": [0, 1]}, "seed = 3 has no effect beside seeds = [0, 1]: leave one of them out"),
    ],
)
def test_what_can_only_be_a_mistake_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        warnings_of(CLIENTS, changes)
    assert message in str(caught.value)
