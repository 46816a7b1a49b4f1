"""Every valid configuration survives being written to a file and read again, whatever it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from gossamer.config.loading import expand, load, parse
from gossamer.storage.strict_yaml import dump_yaml

POSITIVE = st.floats(1e-9, 1e9)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
PLUGINS = NAMES | st.fixed_dictionaries({"name": NAMES, "option": st.none() | st.integers() | st.text() | POSITIVE})
CAPACITIES = st.lists(st.floats(1e-30, 1), min_size=1, max_size=4, unique=True)
RATES = {"factor": POSITIVE, "warmup_rounds": st.integers(0, 9)}
STEPS = st.lists(st.integers(0, 99), max_size=3)
SCHEDULES = st.fixed_dictionaries({}, optional={"name": st.sampled_from(["constant", "cosine"]), **RATES}) | (
    st.fixed_dictionaries({"name": st.just("multistep")}, optional={"milestones": STEPS, **RATES})
)
MODES = st.fixed_dictionaries({"capacity": POSITIVE}, optional={"stacked": st.booleans(), "padding": st.booleans()})
ENGINES = NAMES | st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES,
        "workers": st.just("auto") | st.integers(0, 64),
        "block_size": st.just("auto") | st.integers(0, 9).map(lambda power: 2**power),
        "modes": st.just("auto") | st.lists(MODES, max_size=2),
    },
)


@st.composite
def clients(draw: st.DrawFn) -> dict[str, Any]:
    num = draw(st.integers(1, 1000))
    optional = {
        "partition": PLUGINS,
        "sampler": NAMES,
        "weighting": st.just("equal"),
        "quorum": (st.just(0.0) | st.floats(1e-30, 1)),
        "deadline_seconds": st.none() | POSITIVE,
        "over_selection": st.floats(1, 9),
    }
    section = draw(st.fixed_dictionaries({}, optional=optional))
    return {"num": num, "per_round": draw(st.integers(1, num)), **section}


@st.composite
def training(draw: st.DrawFn) -> dict[str, Any]:
    optional = {
        "batch_size": st.integers(1, 99),
        "momentum": (st.just(0.0) | st.floats(1e-30, 1, exclude_max=True)),
        "weight_decay": (st.just(0.0) | st.floats(1e-30, 1)),
        "clip_norm": st.none() | POSITIVE,
        "schedule": SCHEDULES,
    }
    length = draw(st.sampled_from([{}, {"epochs": 3}, {"steps": 3}, {"epochs": None, "steps": 2}]))
    return draw(st.fixed_dictionaries({"lr": POSITIVE}, optional=optional)) | length


@st.composite
def submodels(draw: st.DrawFn) -> dict[str, Any]:
    capacities = draw(CAPACITIES)
    shares = st.lists(st.floats(0.1, 9), min_size=len(capacities), max_size=len(capacities))
    optional = {
        "shares": st.none() | shares,
        "assignment": st.sampled_from(["fixed", "dynamic"]),
        "strategy": st.none() | NAMES,
        "stride": st.integers(-9, 9),
        "scaler": st.booleans(),
        "mask_labels": st.none() | st.booleans(),
    }
    return {"capacities": capacities, **draw(st.fixed_dictionaries({}, optional=optional))}


PROFILES = st.sampled_from(["laptop", "phone-low"]) | st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES | st.just("server"),
        "flops_per_second": POSITIVE,
        "memory_bytes": st.none() | st.integers(1, 2**40),
        "availability": st.sampled_from(["always", {"probability": 0.5}, {"trace": [[1, 2.5]]}]),
    },
)
DEVICES = st.fixed_dictionaries({}, optional={"device": PROFILES}) | st.fixed_dictionaries(
    {
        "devices": st.none()
        | st.lists(st.fixed_dictionaries({"profile": PROFILES}, optional={"share": POSITIVE}), min_size=1, max_size=3)
    }
)


def one_or_several_seeds(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "seed" or config.get("seeds") is None}


CONFIGS = st.fixed_dictionaries(
    {
        "rounds": st.integers(1, 9999),
        "workload": NAMES | st.fixed_dictionaries({"dataset": NAMES, "model": PLUGINS}),
        "clients": clients(),
        "train": training(),
    },
    optional={
        "name": NAMES,
        "seed": st.integers(0, 2**40),
        "seeds": st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
        "algorithm": PLUGINS,
        "submodel": submodels(),
        "evaluation": st.fixed_dictionaries({}, optional={"every": st.integers(1, 9), "by_capacity": st.booleans()}),
        "checkpoint": st.fixed_dictionaries(
            {"every_seconds": (st.just(0.0) | st.floats(1e-30, 99)), "keep": st.integers(2, 9)}
        ),
        "engine": ENGINES,
        "log": st.fixed_dictionaries({"sinks": st.lists(st.sampled_from(["mlflow", "wandb"]))}),
        "methods": st.none() | st.dictionaries(NAMES, st.just({"train.lr": 0.25}), min_size=1, max_size=2),
    },
).flatmap(lambda config: DEVICES.map(lambda devices: one_or_several_seeds(config) | devices))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "config.yaml"


@given(data=CONFIGS)
@example(
    data={"workload": "a", "train": {"lr": 1.0}, "clients": {"num": 1, "per_round": 1}, "algorithm": {"name": "\x85"}}
    | {"rounds": 1}
)
def test_written_and_read_again(path: Path, data: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(data))
    config = parse(load(path))
    resolved = config.model_dump(mode="json")
    path.write_text(dump_yaml(resolved), encoding="utf-8")
    again = parse(load(path))
    assert again == config
    assert again.model_dump(mode="json") == resolved


@given(data=CONFIGS)
def test_single_runs_are_valid_and_single(data: dict[str, Any]) -> None:
    runs = expand(data)
    assert len(runs) == len(data.get("seeds") or [0]) * len(data.get("methods") or [0])
    for name, run in runs.items():
        config = parse(run)
        assert config.seeds is None
        assert config.methods is None
        assert expand(run) == {"": run}
        assert (f"seed-{config.seed}" in name) == (data.get("seeds") is not None)
        if data.get("methods"):
            assert name.split("/")[0] == config.name
            assert config.train.lr == 0.25
