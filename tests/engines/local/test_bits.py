"""Equal configurations give equal bits, whatever the number of workers and the size of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recording
import torch

from federation import LEVELS, SINGLY, STACKED, configure, digest, mixed, modes, without_clocks
from gossamer import run

AUTO = "auto"
# Numbers of workers and sizes of blocks; the reference is (0, auto).
WAYS = [(0, 1), (0, 2), (0, 4), (1, AUTO), (2, 1), (4, 2)]
SUB_MODEL_METHODS = ("fedrolex", "heterofl", "federated-dropout")
EITHER = pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "one-by-one"])


def outcome(config: dict[str, Any], where: Path, workers: int, block_size: int | str) -> tuple[str, list[Any]]:
    """Run; return the final model's hash and what was logged."""
    changed = config | {"engine": config["engine"] | {"workers": workers, "block_size": block_size}}
    done = run(changed, out=where / f"{workers}-{block_size}")
    return digest(done.params), without_clocks(done.metrics)


def assert_same_bits(config: dict[str, Any], where: Path, ways: list[Any]) -> None:
    """Assert that several numbers of workers and sizes of blocks give the same outcome."""
    reference = outcome(config, where, 0, AUTO)
    for way in ways:
        assert outcome(config, where, *way) == reference, f"workers and block size {way} change the result"


def ragged(changes: dict[str, Any]) -> dict[str, Any]:
    """A federation on digits whose clients differ much in size."""
    digits = {"workload.dataset": {"name": "digits", "limit": 400}, "clients": {"num": 16, "per_round": 11}}
    skew = {"clients.partition": {"name": "dirichlet", "alpha": 0.3}, "rounds": 2}
    return configure(digits | skew | {"checkpoint.every_seconds": 1000, "evaluation": {"every": 2}} | changes)


@pytest.mark.sweep(keep=0.34)
@EITHER
@pytest.mark.parametrize("algorithm", ["fedavg", *SUB_MODEL_METHODS])
def test_workers_and_blocks_change_no_bits(tmp_path: Path, algorithm: str, mode: dict[str, bool]) -> None:
    levels = LEVELS if algorithm in SUB_MODEL_METHODS else (1.0,)
    assert_same_bits(ragged(mixed(algorithm, levels, **mode)), tmp_path, WAYS)


@pytest.mark.sweep(keep=0.3)
@EITHER
@pytest.mark.parametrize(
    "changes",
    [
        {"train.clip_norm": 0.5},
        {"workload.model": {"name": "mlp", "hidden": [12]}, "train.batch_size": 1},  # products of vectors
        {"train.momentum": 0.9, "train.weight_decay": 0.01},
        {"algorithm": {"name": "fedavg", "server_momentum": 0.9}, "train.epochs": 2},
        {"workload.model": "softmax", "train.steps": 3},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_options_of_training(tmp_path: Path, changes: dict[str, Any], mode: dict[str, bool]) -> None:
    assert_same_bits(ragged(modes(**mode) | changes), tmp_path, [(0, 1), (0, 4), (2, 2)])


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_convolutions(tmp_path: Path, stacked: bool, channels_last: bool) -> None:
    model = {"workload.model": {"name": "cnn", "width": 0.125}, "submodel.scaler": False}
    mode = {"stacked": stacked, "padding": stacked, "channels_last": channels_last}
    config = ragged(mixed("fedrolex", (0.5, 1.0), **mode) | model)
    assert_same_bits(config, tmp_path, [(0, 1), (0, 4), (2, AUTO)])


@pytest.mark.parametrize("algorithm", ["fedrolex", "federated-dropout", "scaffold"])
def test_more_blocks_than_room(tmp_path: Path, algorithm: str) -> None:
    """Workers leave results in a few slots of shared memory, which are used again and again within a round."""
    levels = (1.0,) if algorithm.startswith("scaffold") else (0.5, 1.0)
    clients = {"clients": {"num": 60, "per_round": 50}, "rounds": 2}
    assert_same_bits(configure(mixed(algorithm, levels) | clients), tmp_path, [(1, 1), (2, 1)])


@EITHER
def test_one_thread_trains(tmp_path: Path, mode: dict[str, bool]) -> None:
    """Without workers, training happens in a process that may be set to several threads; large sums would differ."""
    config = ragged(mixed("fedrolex", (0.5, 1.0), **mode) | {"workload.name": "recording:Recording"})
    recording.threads.clear()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = outcome(config, tmp_path / "several", 0, AUTO)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(recording.threads) == {1}
    assert several == outcome(config, tmp_path / "one", 1, AUTO)


def test_a_federation_of_one_participant(tmp_path: Path) -> None:
    """A block of one row is computed as two, because kernels of one row may round differently."""
    config = ragged(modes(**STACKED) | {"clients": {"num": 5, "per_round": 1}})
    assert_same_bits(config, tmp_path, [(0, 1), (2, 2)])


def test_seeds_differ(tmp_path: Path) -> None:
    """The comparisons above could fail."""
    hashes = {outcome(ragged(modes(**STACKED) | {"seed": seed}), tmp_path / str(seed), 0, AUTO)[0] for seed in range(3)}
    assert len(hashes) == 3
