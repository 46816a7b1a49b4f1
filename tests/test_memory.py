"""What this machine could not hold is refused before it is made, and numbers that no arithmetic holds when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from federation import configure
from gossamer import memory, run
from gossamer.build import build, num_workers
from gossamer.config.loading import parse
from gossamer.errors import ConfigError, EngineError
from gossamer.memory import machine_memory, memory_errors
from slow_peers import decentralized

LIMIT = 25 * 10**9
HUGE = {"name": "mlp", "hidden": [100_000, 100_000]}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 25 GB, wherever the tests run."""
    (tmp_path / "meminfo").write_text("MemTotal:       64000000 kB\nMemAvailable:    8000000 kB\n")
    (tmp_path / "memory.max").write_text(str(LIMIT))
    monkeypatch.setattr(memory, "MEMORY_FACTS", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)


def wide(input_shape: tuple[int, ...], num_labels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10**6), nn.Linear(10**6, 10**6), nn.Linear(10**6, num_labels))


def test_the_limit_of_a_container_counts() -> None:
    assert machine_memory() == (LIMIT, 8_000_000 * 1024)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            configure({"workload.model": HUGE}),
            r"^training the model of 10,.* parameters in 1 process needs 120.1 GB, but this machine has 25.0 GB: take",
        ),
        (
            decentralized({"workload.model": HUGE}),
            r"^training 8 peers of 10,.* needs 400.3 GB, but this machine has 25",
        ),
        (
            configure({"workload.model": "test_memory:wide"}),
            r"workload.model: a tensor of 1000000 x 1000000 .* 4,000.0 GB",
        ),
        (configure({"train.epochs": None, "train.steps": 10**9}), "^train.steps = 1000000000: the order of .* 64.0 GB"),
        (
            configure({"train.epochs": None, "train.steps": 2**31}),
            "^train.steps = 2147483648 asks for .*: give less than",
        ),
        (
            configure({"train.epochs": 10**12}),
            r"^train.epochs = 1000000000000 asks for 3,000,000,000,000 steps of a part",
        ),
        (configure({"workload.dataset.num_train": 10**9}), r"'synthetic' of 1,000,000,050 images .* needs 256.0 GB"),
    ],
    ids=["model", "peers", "module", "order", "steps", "epochs", "data"],
)
def test_what_cannot_fit_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(parse(config))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (configure({"engine.workers": 10**9}), 5),
        (configure({"engine.workers": 10**9, "clients.over_selection": 1e30}), 8),
        (configure({"engine.workers": 2}), 2),
        (decentralized({"engine.workers": 10**9}), 8),
    ],
)
def test_no_more_processes_than_participants(config: dict[str, Any], expected: int) -> None:
    parsed = parse(config)
    assert num_workers(parsed, build(parse(decentralized() if "peers" in config else configure())).workload) == expected


@pytest.mark.parametrize(
    "changes",
    [
        *({key: value} for key in ("train.lr", "train.weight_decay", "train.clip_norm") for value in (1e308, 1e-320)),
        *({"train.lr": text} for text in ("1e308", "1e-320", "-1e31")),  # text, as YAML reads them
        {"submodel.offsets": {"hidden": 10**30}},
        {"device": {"latency_seconds": 1e308}},
        {"device": {"availability": {"trace": [["1e308", 1]]}}},
        {"rounds": str(10**20)},
        {"device": {"upload_bytes_per_second": 1e-300}},
        {"device": {"availability": {"trace": [[1e308, 1e308]]}}},
        {"clients.over_selection": 1e308},
        {"rounds": 10**30},
        {"train.batch_size": 10**30},
        {"workload.model.hidden": [10**30]},
    ],
    ids=str,
)
def test_numbers_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r" = .*: give (0, or a number between 1e-30 and 1e\+30 in size|a number below)"
    ):
        build(parse(configure(changes)))


def test_extreme_numbers_that_are_allowed(tmp_path: Path) -> None:
    """Totals of simulated time and bytes stay finite."""
    device = {"latency_seconds": 1e30, "upload_bytes_per_second": 1e-30, "flops_per_second": 1e-30}
    done = run(configure({"device": device, "train.lr": 1e-30, "train.weight_decay": 1e-30}), out=tmp_path / "run")
    assert [record["num_survivors"] for record in done.metrics] == [5, 5, 5]
    assert 1e30 < done.metrics[-1]["simulated_seconds"] < 1e40


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory: no")])
def test_what_libraries_raise_is_one_sentence(error: Exception) -> None:
    with pytest.raises(EngineError, match=r"^memory is short \(.*no \(.*\)\): take a smaller model"), memory_errors():
        raise error
    with pytest.raises(RuntimeError, match="other"), memory_errors():
        raise RuntimeError("other")
