"""Buffers that a forward pass changes: plain torch loops, one participant after another, are what is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gossamer
from federation import Injected, assert_same, configure, failing, mixed
from gossamer import resume, run
from gossamer.build import Parts, build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from gossamer.experiment import Run
from slow import sample_order, training_samples
from slow_peers import decentralized
from user_modules import Normed

State = dict[str, Tensor]
TRACKING = {"workload.model": "user_modules:Tracking"}
DOUBLE = {"train.precision": "float64"}
BUFFERS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "centre", "calls"}
EITHER = pytest.mark.parametrize("buffers", ["averaged", "personal"])
HALVES = mixed("heterofl", (0.5, 1.0)) | {"submodel.scaler": False, "submodel.mask_labels": False}


def trained(parts: Parts, module: nn.Module, state: State, round: int, client: int) -> State:
    """Return what a participant makes of a state, whose counts may be means."""
    own = module.state_dict()
    module.load_state_dict({n: v if own[n].is_floating_point() else v.round() for n, v in state.items()})
    optimizer = torch.optim.SGD(module.train().parameters(), lr=parts.config.train.lr)
    for batch in sample_order(parts, round, client):
        images, labels = training_samples(parts, batch)
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
    return {name: value.double().clone() for name, value in module.state_dict().items()}


def mean(states: list[tuple[float, State]]) -> State:
    """Return the weighted mean of states."""
    total = sum(weight for weight, _ in states)
    return {name: sum(weight * state[name] for weight, state in states) / total for name in states[0][1]}


def slow_federation(parts: Parts, is_personal: bool) -> tuple[State, dict[int, State]]:
    """Return the server's model, and what each client keeps."""
    module = parts.workload.model.build().to(parts.workload.dtype)
    whole: State = {name: value.double().clone() for name, value in module.state_dict().items()}
    first, kept = {name: whole[name] for name in BUFFERS}, dict[int, State]()
    for round in range(parts.config.rounds):
        plan, states = parts.planner.plan(round), []
        for client, weight in zip(plan.client.tolist(), plan.weight.tolist(), strict=True):
            state = trained(parts, module, whole | kept.get(client, {}), round, client)
            if is_personal:
                kept[client] = {name: state[name] for name in BUFFERS}
            states.append((weight, state))
        whole = mean(states) | (first if is_personal else {})
    return whole, kept


def slow_peers(parts: Parts, is_personal: bool) -> list[State]:
    """Return the models of all peers."""
    module, topology = parts.workload.model.build().to(parts.workload.dtype), parts.task.topology
    assert topology is not None
    peers = [{name: value.double().clone() for name, value in module.state_dict().items()} for _ in range(topology.n)]
    for round in range(parts.config.rounds):
        sent = [trained(parts, module, state, round, peer) for peer, state in enumerate(peers)]
        rows = topology.mixing(round).dense().tolist()
        peers = [mean(list(zip(row, sent, strict=True))) for row in rows]
        if is_personal:
            peers = [state | {name: own[name] for name in BUFFERS} for state, own in zip(peers, sent, strict=True)]
    return peers


def distance(found: State, expected: State) -> float:
    """Return the largest distance of an entry, relative to its norm if that is above 1; counts are rounded."""
    assert found.keys() == expected.keys() > BUFFERS
    wanted = {name: value.round() if value.dim() == 0 else value for name, value in expected.items()}
    return max(float((found[name] - value).norm() / value.norm().clamp_min(1)) for name, value in wanted.items())


@EITHER
def test_a_federation_equals_a_slow_one(tmp_path: Path, buffers: str) -> None:
    config = configure(TRACKING | DOUBLE | {"workload.buffers": buffers})
    done = run(config, out=tmp_path / "run")
    loaded, parts = gossamer.load(tmp_path / "run"), build(parse(config))
    found, (whole, kept) = loaded.state_dict(), slow_federation(parts, buffers == "personal")
    assert distance(found, whole) < 1e-12
    assert bool(kept) == (buffers == "personal")
    for client, own in kept.items():
        assert distance(loaded.state_dict(client=client), whole | own) < 1e-12
    assert done.params.keys() == found.keys() - BUFFERS


@EITHER
def test_peers_equal_slow_ones(tmp_path: Path, buffers: str) -> None:
    config = decentralized(TRACKING | DOUBLE | {"workload.buffers": buffers, "peers.num": 4, "rounds": 3})
    run(config, out=tmp_path / "run")
    loaded = gossamer.load(tmp_path / "run")
    for peer, expected in enumerate(slow_peers(build(parse(config)), buffers == "personal")):
        assert distance(loaded.state_dict(peer=peer), expected) < 1e-12


def same(run: Run, other: Run) -> bool:
    """Say whether two runs left the same model."""
    states = [gossamer.load(one.directory).state_dict() for one in (run, other)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_workers_and_resumption_change_no_bits(tmp_path: Path) -> None:
    config = configure(TRACKING | {"workload.buffers": "personal"})
    here = run(config, out=tmp_path / "here")
    there = run(config | {"engine": config["engine"] | {"workers": 2}}, out=tmp_path / "there")
    with pytest.raises(Injected):
        run(config, out=tmp_path / "killed", hooks=failing("train", True, 3))
    for other in (there, resume(tmp_path / "killed")):
        assert_same(other, here)
        assert same(other, here)


def test_workers_of_peers_change_no_bits(tmp_path: Path) -> None:
    config = decentralized(TRACKING | {"workload.buffers": "averaged", "peers.num": 4, "rounds": 2})
    here, there = (
        run(config | {"engine": config["engine"] | {"workers": workers}}, out=tmp_path / str(workers))
        for workers in (0, 2)
    )
    assert_same(there, here)
    assert same(there, here)


def test_windows_cut_the_moments_of_their_channels(tmp_path: Path) -> None:
    """Two clients: the first half of the channels is averaged over both, the other one is that of the larger."""
    changes = HALVES | DOUBLE | {"workload.model": "user_modules:Normed", "workload.buffers": "averaged"}
    config = configure(changes | {"workload.label_mask": "none", "clients": {"num": 2, "per_round": 2}, "rounds": 1})
    run(config, out=tmp_path / "run")
    loaded, parts = gossamer.load(tmp_path / "run"), build(parse(config))
    whole = parts.workload.model.build().double()
    half = Normed(parts.workload.data.shape, parts.workload.num_labels, hidden=4).double()
    shapes = {name: value.shape for name, value in half.state_dict().items()}
    first = {n: v[tuple(map(slice, shapes[n]))] for n, v in whole.state_dict().items()}
    plan, states = parts.planner.plan(0), dict[int, tuple[float, State]]()
    for client, variant, weight in zip(
        *(values.tolist() for values in (plan.client, plan.variant, plan.weight)), strict=True
    ):
        module, state = (half, first) if variant == 0 else (whole, whole.state_dict())
        states[variant] = weight, trained(parts, module, state, 0, client)
    (small, of_half), (large, of_whole) = states[0], states[1]
    for name, value in loaded.state_dict().items():
        expected, shared = of_whole[name], tuple(map(slice, shapes[name]))
        expected[shared] = (small * of_half[name] + large * expected[shared]) / (small + large)
        assert torch.allclose(value.double(), expected.round() if value.dim() == 0 else expected, rtol=1e-12, atol=0)
    sub = loaded.model(capacity=0.5).state_dict()
    assert torch.equal(sub["2.running_var"], loaded.state_dict()["2.running_var"][:4])


def test_the_loaded_model_is_what_was_evaluated(tmp_path: Path) -> None:
    config = configure(TRACKING | {"workload.buffers": "averaged", "rounds": 1})
    done = run(config, out=tmp_path / "run")
    loaded, data = gossamer.load(tmp_path / "run"), build(parse(config)).workload.data
    loss = F.cross_entropy(loaded.model()(loaded.normalize(data.test_images)), data.test_labels)
    assert float(loss.detach()) == pytest.approx(done.metrics[-1]["loss"], rel=1e-5)


def test_clients_are_evaluated_by_their_own(tmp_path: Path) -> None:
    config = configure(TRACKING | {"workload.buffers": "personal", "rounds": 1})
    assert "accuracy_personal" in run(config, out=tmp_path / "run").metrics[-1]


def test_what_is_sent_is_counted() -> None:
    numbers = [
        build(parse(configure(TRACKING | {"workload.buffers": buffers}))).planner.costs[0].variants[0].bytes_up
        for buffers in ("averaged", "personal")
    ]
    assert numbers[0] - numbers[1] == 4 * (3 * 8 + 2)


def test_frozen_layers_keep_their_moving_buffers() -> None:
    config = configure(TRACKING | {"workload.buffers": "averaged", "workload.frozen": ["before.*", "norm.*"]})
    assert set(build(parse(config)).workload.layout.names) == BUFFERS | {"after.weight", "after.bias"}


AVERAGED = TRACKING | {"workload.buffers": "averaged"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (TRACKING, "changes the buffer 'centre', 'calls', .* set workload.buffers to averaged or personal"),
        (AVERAGED | {"algorithm": "fedadam"}, "does not go with algorithm 'fedadam'"),
        (AVERAGED | {"algorithm": {"name": "fedavg", "server_lr": 0.5}}, "does not go with algorithm 'fedavg' and its"),
        (AVERAGED | {"communication.uplink": "int8"}, "does not go with communication"),
        ({"workload.buffers": "averaged"}, "the forward pass of model 'mlp' changes none"),
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse(configure(changes)))
