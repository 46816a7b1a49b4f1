"""Training in double precision: everything is float64, from the samples of a batch to what is sent, kept and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from federation import (
    SCAFFOLD,
    SINGLY,
    STACKED,
    Injected,
    assert_same,
    configure,
    failing,
    mixed,
    modes,
    relative_error,
)
from gossamer import resume, run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.errors import ConfigError
from slow_federated import local_sgd, slow_federation
from slow_peers import SlowPeers, decentralized, error

DOUBLE = {"train.precision": "float64"}
KEPT = mixed("fedrolex", (0.5, 1.0), **STACKED) | {"train.optimizer": {"name": "sgd", "momentum": 0.9, "state": "keep"}}


@pytest.mark.parametrize(
    "changes",
    [
        modes(**STACKED),
        mixed("fedrolex", **SINGLY) | {"workload.label_mask": "none", "submodel.mask_labels": False},
    ],
    ids=["whole models, stacked", "windows, one by one"],
)
def test_a_federation_equals_a_slow_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Not so in single precision: the comparison can fail."""
    found = run(configure(changes | DOUBLE), out=tmp_path / "double").params
    expected = slow_federation(build(parse(configure(changes | DOUBLE))), local_sgd())
    assert relative_error(found, expected) < 1e-12
    assert relative_error(run(configure(changes), out=tmp_path / "single").params, expected) > 1e-9


def test_peers_equal_slow_ones(tmp_path: Path) -> None:
    changes = {"rounds": 3, "train.momentum": 0.9} | modes(**STACKED)
    slow = SlowPeers(decentralized(changes | DOUBLE))
    run(decentralized(changes | DOUBLE), out=tmp_path / "run")
    loaded, layout = gossamer.load(tmp_path / "run"), slow.parts.workload.layout
    rows = torch.stack([layout.flatten(loaded.state_dict(peer=peer)) for peer in range(slow.n)])
    assert error(rows, slow.run()[-1]) < 1e-12


def test_workers_and_resumption_change_no_bits(tmp_path: Path) -> None:
    """Clients keep moments of windows."""
    config = configure(KEPT | DOUBLE)
    here = run(config, out=tmp_path / "here")
    assert all(value.dtype == torch.float64 for value in here.params.values())
    for workers in (1, 2):
        assert_same(
            run(config | {"engine": config["engine"] | {"workers": workers}}, out=tmp_path / str(workers)), here
        )
    with pytest.raises(Injected):
        run(config, out=tmp_path / "killed", hooks=failing("train", True, 3))
    assert_same(resume(tmp_path / "killed"), here)


def test_a_number_is_eight_bytes(tmp_path: Path) -> None:
    single, double = (
        run(configure(mixed("fedrolex", **STACKED) | given), out=tmp_path / str(len(given))).metrics[-1]
        for given in ({}, DOUBLE)
    )
    for name in ("total_bytes_up", "total_bytes_down"):
        assert double[name] == 2 * single[name] > 0


@pytest.mark.parametrize("model", ["user_modules:Normed", {"name": "mlp", "hidden": [8]}], ids=str)
def test_the_model_is_loaded_in_it(tmp_path: Path, model: Any) -> None:
    """With the moments of BatchNorm and constants; what it computes is what was evaluated."""
    frozen = {"workload.frozen": ["output.bias"]} if isinstance(model, dict) else {}
    done = run(configure(DOUBLE | {"workload.model": model, "rounds": 1} | frozen), out=tmp_path / "run")
    loaded = gossamer.load(tmp_path / "run")
    module, data = loaded.model(), build(parse(configure(DOUBLE))).workload.data
    assert {value.dtype for value in module.state_dict().values() if value.is_floating_point()} == {torch.float64}
    loss = torch.nn.functional.cross_entropy(module(loaded.normalize(data.test_images)), data.test_labels)
    assert float(loss.detach()) == pytest.approx(done.metrics[-1]["loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": {"name": "least-squares", "precision": "single"}}, "trains in float32: set workload.precision"),
        ({"workload.model": "user_modules:SingleConstant"}, "fails on a batch"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse(configure(changes | DOUBLE)))


def test_workloads_with_a_precision_of_their_own_agree(tmp_path: Path) -> None:
    """They were float64 before, whatever the section of training said; so private state may be as well."""
    changes = {"workload": {"name": "least-squares", "dim": 5, "num_samples": 12}, "rounds": 1} | SCAFFOLD
    usual = run(configure(changes), out=tmp_path / "usual")
    assert_same(run(configure(changes | DOUBLE), out=tmp_path / "double"), usual)
