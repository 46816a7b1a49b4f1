"""Which mode of training is chosen, and that a choice is written down and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recording
import yaml

from federation import configure, digest, mixed, modes
from gossamer import resume, run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.task import VariantMode
from gossamer.engines.training import modes as measuring
from gossamer.errors import ConfigError

CNN = {"workload.model": {"name": "cnn", "width": 0.125}}
RESNET = {"workload.model": {"name": "preact-resnet18", "width": 0.0625}}
RAGGED, EVEN = {"workload.dataset.num_train": 150}, {"workload.dataset.num_train": 128}
SINGLY, LAST = VariantMode(), VariantMode(channels_last=True)
PADDED, STACKED = VariantMode(stacked=True, padding=True), VariantMode(stacked=True)


def pinned_modes(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((directory / "config.yaml").read_text())["engine"]["modes"]
    return found


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ({}, RAGGED, {SINGLY, PADDED}),
        ({}, EVEN, {SINGLY, STACKED}),
        (CNN, RAGGED, {SINGLY, LAST, PADDED}),
        (CNN, EVEN, {SINGLY, LAST, STACKED}),
        (RESNET, RAGGED, {SINGLY, LAST}),  # padding would enter BatchNorm's moments
        (RESNET, EVEN, {SINGLY, LAST, STACKED}),
    ],
)
def test_admissible(model: dict[str, Any], data: dict[str, Any], expected: set[VariantMode]) -> None:
    task = build(parse(configure(model | data | {"submodel.scaler": False}))).task
    found = measuring.admissible(task)
    assert len(found) == len(expected)
    assert set(found) == expected


def test_a_workload_that_cannot_be_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    task = build(parse(configure())).task
    traits = replace(task.workload.traits, supports_stacking=False)
    monkeypatch.setattr(task.workload, "traits", traits)
    assert measuring.admissible(task) == [SINGLY]


TINY = {"workload.model": {"name": "cnn", "width": 0.0625}}
MANY, MANY_EVEN = {"clients.num": 10, "clients.per_round": 10}, {"workload.dataset.num_train": 160}
LEVELS_OF_CNN = {
    "submodel": {"capacities": [0.0625, 1.0], "strategy": "rolling"},
    "workload.dataset.shape": [1, 28, 28],
    "workload.model": "cnn",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (RAGGED, [PADDED]),
        (EVEN, [STACKED]),
        (EVEN | {"clients": {"num": 1, "per_round": 1}}, [SINGLY]),  # a second one would be a ghost
        (EVEN | TINY, [STACKED]),
        (EVEN | TINY | {"clients": {"num": 8, "per_round": 2}}, [LAST]),  # too few to pay
        (RESNET | RAGGED | MANY, [LAST]),  # cannot be padded
        (LEVELS_OF_CNN | MANY | MANY_EVEN, [STACKED, LAST]),
        (EVEN | {"algorithm": "fjord"}, [SINGLY]),
    ],
    ids=str,
)
def test_the_rule(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: list[VariantMode]) -> None:
    """Nothing is timed, and two runs are alike."""
    monkeypatch.setattr(measuring, "_trial", None)
    config = parse(configure({"engine.modes": "auto", "submodel.scaler": False} | changes))
    for _ in range(2):
        assert [variant.mode for variant in build(config).task.variants] == expected


def test_the_rule_for_plain_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without convolutions that only vmap can stack."""
    task = build(parse(configure())).task
    monkeypatch.setattr(task.workload, "traits", replace(task.workload.traits, stacks_natively=False))
    assert measuring.modes_by_rule(task, [1e5], [4.0]) == (PADDED,)
    assert measuring.modes_by_rule(task, [1e5], [3.9]) == (SINGLY,)
    monkeypatch.setattr(measuring, "SMALL_MODEL", 1000)
    assert measuring.modes_by_rule(task, [1e5], [4.0]) == (SINGLY,)


def test_two_runs_are_alike(tmp_path: Path) -> None:
    """With modes left to the rule, whatever the number of workers; the modes are written down."""
    config = configure(MANY | MANY_EVEN | LEVELS_OF_CNN | {"rounds": 1, "engine.modes": "auto"})
    first, second = (run(config | {"engine": {"workers": workers}}, out=tmp_path / str(workers)) for workers in (0, 2))
    assert digest(first.params) == digest(second.params)
    assert pinned_modes(first.directory) == pinned_modes(second.directory)
    assert [mode["stacked"] for mode in pinned_modes(first.directory)] == [True, False]


@pytest.mark.parametrize("quickest", [SINGLY, LAST, PADDED])
def test_the_quickest_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quickest: VariantMode) -> None:
    """Seconds are made up; one mode is the quickest for the smaller capacity, another for the larger."""
    other = LAST if quickest != LAST else SINGLY
    tried: list[tuple[int, VariantMode]] = []

    def trial(task: Any, state: Any, variant: Any, mode: VariantMode, *size: int) -> Callable[[], float]:
        tried.append((variant.index, mode))
        return lambda: 0.1 if mode == (quickest, other)[variant.index] else 0.2

    monkeypatch.setattr(measuring, "_trial", trial)
    config = configure(mixed("fedrolex", (0.5, 1.0)) | {"engine.modes": "measured"} | CNN | RAGGED)
    done = run(config, out=tmp_path / "run")
    assert set(tried) == {(variant, mode) for variant in (0, 1) for mode in (SINGLY, LAST, PADDED)}
    assert pinned_modes(done.directory) == [
        quickest.model_dump() | {"capacity": 0.5, "holding": None},
        other.model_dump() | {"capacity": 1.0, "holding": None},
    ]


@pytest.mark.parametrize("model", [{}, CNN], ids=["mlp", "cnn"])
def test_measuring_changes_no_bits(tmp_path: Path, model: dict[str, Any]) -> None:
    """The choice is written down, and a run with that choice is the same run."""
    config = configure(mixed("fedrolex", (0.5, 1.0)) | {"engine.modes": "measured", "rounds": 1} | model | RAGGED)
    measured = run(config, out=tmp_path / "measured")
    resolved = yaml.safe_load((measured.directory / "config.yaml").read_text())
    assert [mode["capacity"] for mode in resolved["engine"]["modes"]] == [0.5, 1.0]
    again = run(resolved, out=tmp_path / "again")
    assert digest(again.params) == digest(measured.params)
    assert pinned_modes(again.directory) == resolved["engine"]["modes"]


@pytest.mark.sweep(keep=0.5)
@pytest.mark.parametrize("mode", [SINGLY, LAST, PADDED, VariantMode(padding=True)])
def test_a_pinned_mode_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: VariantMode) -> None:
    """Nothing is measured, in a run or in one that is resumed, and training is what was asked for."""
    monkeypatch.setattr("gossamer.build.measured_modes", None)
    images = {"workload.name": "recording:Recording", "workload.dataset.shape": [3, 8, 8]}
    done = run(configure(CNN | RAGGED | images | modes(**mode.model_dump())), out=tmp_path / "run")
    assert pinned_modes(done.directory) == [mode.model_dump() | {"capacity": 1.0, "holding": None}]
    parts = build(parse(yaml.safe_load((done.directory / "config.yaml").read_text())))  # counts costs by one batch
    recording.num_clients.clear()
    recording.formats.clear()
    engine, _ = parts.start_engine(tmp_path)
    list(engine.train(parts.planner.plan(0)))
    assert (max(recording.num_clients) > 1) == mode.stacked
    assert set(recording.formats) == {(mode.channels_last, mode.padding)}
    assert digest(resume(tmp_path / "run").params) == digest(done.params)


@pytest.mark.parametrize("levels", [(0.5,), (0.5, 0.75), (0.25, 0.5, 1.0), ()])
def test_modes_of_other_capacities_are_refused(tmp_path: Path, levels: tuple[float, ...]) -> None:
    config = configure(mixed("fedrolex", (0.5, 1.0)) | modes(levels))
    with pytest.raises(ConfigError, match=r"engine.modes names capacities \[.*but the run has \[0.5, 1.0\]: name each"):
        run(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
