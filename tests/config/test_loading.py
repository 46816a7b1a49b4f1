"""The configuration: reading, overrides, contradictions, methods and seeds, and files that come back unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gossamer.config.loading import expand, load, merge, parse, with_value
from gossamer.errors import ConfigError

BASE: dict[str, Any] = {
    "rounds": 3,
    "workload": {"model": "softmax"},
    "clients": {"num": 4, "per_round": 2},
    "train": {"lr": 0.1},
}


def changed(**changes: Any) -> dict[str, Any]:
    """Return the base configuration with entries at dotted keys (``__`` for the dot) replaced."""
    data = BASE
    for key, value in changes.items():
        data = with_value(data, key.split("__"), value)
    return data


def error_of(data: Mapping[str, Any]) -> str:
    """Return the one sentence that says what is wrong with a configuration."""
    with pytest.raises(ConfigError) as caught:
        expand(data)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert not message.endswith(".")
    return message


class TestParse:
    def test_defaults(self) -> None:
        config = parse(BASE)
        assert config.workload == {"name": "image-classification", "model": "softmax"}
        assert config.algorithm == {"name": "fedavg"}
        assert config.clients.partition == {"name": "iid"}
        assert (config.name, config.seed, config.train.epochs, config.train.steps) == ("run", 0, 1, None)
        assert config.submodel.capacities == [1.0]

    def test_bare_names(self) -> None:
        config = parse(changed(algorithm="fedrolex", engine="local", clients__partition="shards", workload="my:Own"))
        assert (config.algorithm, config.engine.name) == ({"name": "fedrolex"}, "local")
        assert (config.clients.partition, config.workload) == ({"name": "shards"}, {"name": "my:Own"})
        schedule = parse(load(changed(train__schedule="cosine"), ["train.schedule.warmup_rounds=2"])).train.schedule
        assert (schedule.name, schedule.warmup_rounds) == ("cosine", 2)
        assert parse(changed(train__schedule="cosine")).train.schedule.name == "cosine"

    def test_steps_alone_leave_epochs_open(self) -> None:
        assert parse(changed(train__steps=5)).train.epochs is None
        assert parse(changed(train__epochs=2)).train.steps is None

    def test_epochs_of_a_file_are_unset_as_the_message_says(self) -> None:
        data = load(changed(train__epochs=2), ["train.steps=3"])
        assert "unset it by train.epochs=null or train.steps=null" in error_of(data)
        train = parse(load(data, ["train.epochs=null"])).train
        assert (train.epochs, train.steps) == (None, 3)
        train = parse(load(data, ["train.steps=null"])).train
        assert (train.epochs, train.steps) == (2, None)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"rouds": 3}, "unknown key 'rouds'; did you mean 'rounds'?"),
            ({"train__momentun": 0.9}, "unknown key 'train.momentun'; did you mean 'momentum'?"),
            (
                {"train__schedule": {"milstones": [1]}},
                "unknown key 'train.schedule.milstones'; did you mean 'milestones'",
            ),
            ({"engine__modes": [{"capacity": 1, "stack": True}]}, "'engine.modes.0.stack'; did you mean 'stacked'?"),
            ({"submodel__capacitys": [1]}, "unknown key 'submodel.capacitys'; did you mean 'capacities'?"),
        ],
    )
    def test_unknown_keys_name_the_nearest(self, changes: dict[str, Any], expected: str) -> None:
        assert expected in error_of(changed(**changes))


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"clients__per_round": 5}, "clients.per_round 5 exceeds clients.num 4: sample at most all of them"),
    ({"train__epochs": 1, "train__steps": 2}, "train.epochs = 1 contradicts train.steps = 2: give one of them"),
    (
        {"train": 3},
        "train = 3: give a mapping of keys to values (known here: accumulate, batch_size, clip_norm, epochs, ",
    ),
    ({"train__schedule": 3}, "train.schedule = 3: give a mapping of keys to values (known here: factor, milestones"),
    ({"train__schedule": "cosin"}, "train.schedule.name = 'cosin': input should be 'constant', 'multistep' or"),
    (
        {"train__schedule": {"milestones": [1]}},
        "schedule 'constant' does not read milestones [1]: set name to multistep",
    ),
    ({"submodel__capacities": [0]}, "capacity 0.0 is outside (0, 1]"),
    ({"submodel__capacities": [0.5, 1.5]}, "capacity 1.5 is outside (0, 1]"),
    ({"submodel__capacities": [-0.5]}, "capacity -0.5 is outside (0, 1]"),
    ({"submodel__capacities": []}, "give at least one capacity"),
    ({"submodel__capacities": [0.5, 1, 0.5]}, "name every capacity once"),
    ({"submodel__capacities": [0.5, 1], "submodel__shares": [1]}, "submodel.shares has 1 entries for 2 capacities"),
    ({"submodel__shares": [1, 1]}, "submodel.shares has 2 entries for 1 capacities"),
    ({"submodel__shares": [0]}, "submodel.shares [0.0] must be >= 0 and not all 0"),
    ({"submodel__capacities": [0.5, 1], "submodel__shares": [-1, 3]}, "must be >= 0 and not all 0"),
    ({"submodel__shares": [float("inf")]}, "submodel.shares.0 = inf: input should be a finite number"),
    ({"submodel__assignment": "sometimes"}, "submodel.assignment = 'sometimes': input should be 'fixed' or 'dynamic'"),
    ({"seed": -1}, "seed = -1: input should be greater than or equal to 0"),
    ({"seeds": [0, -1]}, "seeds = [0, -1]: seeds are >= 0"),
    ({"seeds": []}, "seeds = []: give a list of distinct seeds"),
    ({"seeds": [3, 3]}, "seeds = [3, 3]: give a list of distinct seeds"),
    ({"name": "a b"}, "name = 'a b': use letters, digits"),
    ({"name": "../up"}, "name = '../up': use letters, digits"),
    ({"name": ""}, "name = '': use letters, digits"),
    ({"name": "a\n"}, "use letters, digits"),
    ({"rounds": 0}, "rounds = 0: input should be greater than or equal to 1"),
    ({"clients__num": 0}, "clients.num = 0"),
    ({"clients__per_round": 0}, "clients.per_round = 0"),
    ({"clients__quorum": 1.1}, "clients.quorum = 1.1"),
    ({"clients__weighting": "size"}, "clients.weighting = 'size'"),
    ({"train__lr": 0}, "train.lr = 0: input should be greater than 0"),
    ({"train__lr": float("nan")}, "train.lr = nan: input should be a finite number"),
    ({"train__epochs": 0}, "train.epochs = 0"),
    ({"train__batch_size": 0}, "train.batch_size = 0"),
    ({"train__momentum": 1}, "train.momentum = 1: input should be less than 1"),
    ({"train__weight_decay": -0.1}, "train.weight_decay = -0.1"),
    ({"train__clip_norm": 0}, "train.clip_norm = 0"),
    ({"engine__workers": -1}, "engine.workers = -1: give 'auto' or a number >= 0"),
    ({"engine__workers": "many"}, "engine.workers = 'many': input should be a valid integer"),
    ({"engine__block_size": 6}, "engine.block_size = 6: give 'auto' or a power of two"),
    ({"engine__block_size": 0}, "engine.block_size = 0: give 'auto' or a power of two"),
    ({"engine__modes": [{"stacked": True}]}, "missing key 'engine.modes.0.capacity': add it"),
    ({"checkpoint__keep": 1}, "checkpoint.keep = 1: input should be greater than or equal to 2"),
    ({"evaluation__every": 0}, "evaluation.every = 0"),
    ({"device__flops_per_second": 0}, "device.flops_per_second = 0"),
    ({"algorithm": 3}, "algorithm = 3: give a name, or a mapping with a name and options"),
    ({"algorithm": {"server_lr": 1}}, "algorithm = {'server_lr': 1}: give a name"),
    ({"methods": {}}, "methods = {}: name at least one method"),
    ({"methods": {"a/b": {}}}, "methods.'a/b': use letters, digits"),
    ({"methods": {"a": None}}, "methods.a = None: input should be a valid dictionary"),
    (
        {"methods": {"a": {"rounds": 1}, "b": {"train": {"lrr": 1}}}},
        "method 'b': unknown key 'train.lrr'; did you mean 'lr'?",
    ),
    ({"methods": {"a": {"rounds.x": 1}}}, "cannot set 'rounds.x': 'rounds' is 3, not a mapping"),
]


class TestContradictions:
    @pytest.mark.parametrize(("changes", "expected"), CONTRADICTIONS, ids=[text for _, text in CONTRADICTIONS])
    def test_one_sentence(self, changes: dict[str, Any], expected: str) -> None:
        assert expected in error_of(changed(**changes))

    @pytest.mark.parametrize("key", sorted(set(BASE) - {"clients"}))
    def test_what_has_no_default_must_be_given(self, key: str) -> None:
        assert error_of({k: v for k, v in BASE.items() if k != key}) == f"missing key {key!r}: add it"

    def test_limits_are_allowed(self) -> None:
        config = parse(
            changed(
                clients__per_round=4, clients__quorum=1, engine__workers=0, engine__block_size=1, submodel__shares=[0.1]
            )
        )
        assert (config.clients.per_round, config.engine.workers, config.engine.block_size) == (4, 0, 1)


class TestLoad:
    def test_file_and_overrides(self, tmp_path: Path) -> None:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(BASE))
        data = load(path, ["train.lr=0.5", "seed=7", "submodel.capacities=[0.5, 1]", "algorithm=fedrolex", "name="])
        assert data == {
            **BASE,
            "train": {"lr": 0.5},
            "seed": 7,
            "submodel": {"capacities": [0.5, 1]},
            "algorithm": "fedrolex",
            "name": None,
        }

    def test_source_is_left_alone(self) -> None:
        before = repr(BASE)
        load(BASE, ["train.lr=0.5", "train.schedule.name=cosine", "seed=1"])
        assert repr(BASE) == before

    def test_options_of_a_bare_name(self) -> None:
        data = load({**BASE, "algorithm": "fedavg"}, ["algorithm.server_lr=0.5", "workload.model.hidden=[8]"])
        assert data["algorithm"] == {"name": "fedavg", "server_lr": 0.5}
        assert data["workload"]["model"] == {"name": "softmax", "hidden": [8]}

    def test_value_with_an_equals_sign(self) -> None:
        assert load(BASE, ["workload.model=a=b"])["workload"]["model"] == "a=b"

    def test_empty_section(self) -> None:
        assert load({**BASE, "submodel": None}, ["submodel.stride=2"])["submodel"] == {"stride": 2}

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("train.lr", "override 'train.lr' is not of the form key.path=value"),
            ("=3", "override '=3' is not of the form"),
            ("seed=[1", "override 'seed=[1' is not valid YAML"),
            ("rounds.most=3", "cannot set 'rounds.most': 'rounds' is 3, not a mapping"),
        ],
    )
    def test_wrong_overrides(self, override: str, expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(BASE, [override])
        assert expected in str(caught.value)

    def test_a_key_that_is_set_twice(self) -> None:
        with pytest.raises(
            ConfigError, match=r"^overrides 'seed=1' and 'seed=2' set the same key: leave one of them out"
        ):
            load(BASE, ["seed=1", "seed=2"])

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"- a\n- b\n", "must hold a mapping of keys to values, not ['a', 'b']"),
            (b"", "must hold a mapping of keys to values, but it is empty"),
            (
                b"a: [1\nb: }\n",
                "configuration '{path}' is not valid YAML: while parsing a flow sequence, line 1, column 4",
            ),
            (b"a: \x01\n", "special characters are not allowed, position 3"),
            (b"\xff\xfe\xff", "cannot read configuration"),
        ],
    )
    def test_wrong_files(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert expected.replace("{path}", str(path)) in str(caught.value)
        assert repr(str(path)) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"cannot read configuration .*gone.yaml. \(No such file or directory\)"):
            load(tmp_path / "gone.yaml")
        with pytest.raises(ConfigError, match="cannot read configuration"):
            load(tmp_path)


class TestMerge:
    def test_sections_are_merged_and_plug_ins_replaced(self) -> None:
        data = {"train": {"lr": 0.1, "epochs": 2}, "algorithm": {"name": "fedavg", "server_lr": 0.5}}
        merged = merge(data, {"train": {"lr": 0.2}, "algorithm": {"name": "fedrolex"}})
        assert merged == {"train": {"lr": 0.2, "epochs": 2}, "algorithm": {"name": "fedrolex"}}
        assert merge(data, {"algorithm": {"server_lr": 1}})["algorithm"] == {"name": "fedavg", "server_lr": 1}
        assert data["train"] == {"lr": 0.1, "epochs": 2}

    def test_dotted_keys_and_scalars(self) -> None:
        merged = merge({"train": {"lr": 0.1}, "rounds": 3}, {"train.lr": 0.2, "rounds": 4, "train": {"epochs": 1}})
        assert merged == {"train": {"lr": 0.2, "epochs": 1}, "rounds": 4}


class TestExpand:
    def test_a_single_run(self) -> None:
        assert expand(BASE) == {"": {**BASE, "seed": 0}}

    def test_seeds(self) -> None:
        runs = expand(load({**BASE, "seed": 9}, ["seeds=[4, 2]"]))
        assert list(runs) == ["seed-4", "seed-2"]
        assert [run["seed"] for run in runs.values()] == [4, 2]
        assert all("seeds" not in run for run in runs.values())

    def test_methods_times_seeds(self) -> None:
        methods = {"rolex": {"algorithm": "fedrolex", "submodel": {"capacities": [0.5, 1]}}, "avg": {"train.lr": 0.3}}
        runs = expand({**BASE, "seeds": [0, 1], "methods": methods})
        assert list(runs) == ["rolex/seed-0", "rolex/seed-1", "avg/seed-0", "avg/seed-1"]
        assert runs["rolex/seed-1"] == {
            **BASE,
            "algorithm": "fedrolex",
            "submodel": {"capacities": [0.5, 1]},
            "seed": 1,
            "name": "rolex",
        }
        assert runs["avg/seed-0"]["train"] == {"lr": 0.3}

    def test_methods_with_one_seed(self) -> None:
        runs = expand({**BASE, "seed": 5, "methods": {"a": {}, "b": {}}})
        assert {name: run["seed"] for name, run in runs.items()} == {"a": 5, "b": 5}
