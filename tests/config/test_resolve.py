"""What an algorithm decides about a configuration, and that deciding twice changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gossamer import topology
from gossamer.build import build
from gossamer.config.loading import parse, with_value
from gossamer.config.resolve import build_topology, fill_in
from gossamer.config.schema import Config
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN, resolve

LEVELS = {"capacities": [1.0, 0.5, 0.25]}
SUB_MODEL_METHODS = {"fedrolex": "rolling", "heterofl": "static", "federated-dropout": "random"}


def configuration(algorithm: str, **changes: Any) -> Config:
    """Return a checked configuration; ``__`` in the names of changes stands for a dot."""
    data: dict[str, Any] = {
        "rounds": 1,
        "workload": {"model": {"name": "mlp", "hidden": [8]}},
        "clients": {"num": 4, "per_round": 2},
        "train": {"lr": 0.1},
        "algorithm": algorithm,
    }
    for key, value in changes.items():
        data = with_value(data, key.split("__"), value)
    return parse(data)


def filled(algorithm: str, **changes: Any) -> Config:
    """Return a configuration of an algorithm, filled in."""
    return fill_in(configuration(algorithm, **changes), resolve("algorithm", algorithm))


def error_of(algorithm: str, **changes: Any) -> str:
    """Return what is said when a configuration of an algorithm is refused."""
    config = configuration(algorithm, **changes)
    with pytest.raises(ConfigError) as caught:
        fill_in(config, resolve("algorithm", algorithm))
    return str(caught.value)


class TestSubModels:
    @pytest.mark.parametrize(("algorithm", "strategy"), SUB_MODEL_METHODS.items())
    def test_strategy_and_masks(self, algorithm: str, strategy: str) -> None:
        config = filled(algorithm, submodel=LEVELS)
        assert config.submodel.strategy == strategy
        assert config.submodel.mask_labels is True
        assert config.submodel.capacities == LEVELS["capacities"]
        assert config.workload["label_mask"] == "zero"
        assert config.algorithm == {"name": algorithm}

    @pytest.mark.parametrize("algorithm", SUB_MODEL_METHODS)
    def test_what_is_given_stays(self, algorithm: str) -> None:
        config = filled(algorithm, submodel=LEVELS, submodel__mask_labels=False, workload__label_mask="minus-inf")
        assert config.submodel.mask_labels is False
        assert config.workload["label_mask"] == "minus-inf"
        assert filled(algorithm, submodel__strategy=SUB_MODEL_METHODS[algorithm]).submodel.strategy is not None

    def test_fedavg_trains_whole_models(self) -> None:
        config = filled("fedavg")
        assert (config.submodel.strategy, config.submodel.mask_labels) == ("static", False)
        assert config.workload["label_mask"] == "none"

    def test_fedavg_with_a_strategy(self) -> None:
        config = filled("fedavg", submodel=LEVELS, submodel__strategy="rolling")
        assert (config.submodel.strategy, config.submodel.capacities) == ("rolling", LEVELS["capacities"])

    def test_another_workload_has_no_label_mask(self) -> None:
        assert filled("fedrolex", workload={"name": "my:Own"}).workload == {"name": "my:Own"}


class TestBaselines:
    @pytest.mark.parametrize(("algorithm", "factor"), [("all-smallest", 0.25), ("all-largest", 0.5)])
    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_the_model_itself_is_scaled(self, algorithm: str, factor: float, width: float) -> None:
        levels = {"capacities": [0.5, 0.25], "shares": [3, 1]}
        config = filled(algorithm, submodel=levels, workload__model={"name": "mlp", "hidden": [8], "width": width})
        assert config.workload["model"] == {"name": "mlp", "hidden": [8], "width": width * factor}
        assert (config.submodel.capacities, config.submodel.shares) == ([1.0], None)
        assert config.submodel.mask_labels is True
        assert config.workload["label_mask"] == "zero"

    def test_options_of_the_algorithm_stay(self) -> None:
        config = filled("all-smallest", submodel=LEVELS, algorithm__server_lr=0.5)
        assert config.algorithm == {"name": "all-smallest", "server_lr": 0.5}

    @pytest.mark.parametrize("workload", [{"model": "mlp"}, {}])
    def test_a_model_that_is_a_bare_name_or_left_out(self, workload: dict[str, Any]) -> None:
        config = filled("all-smallest", submodel=LEVELS, workload=workload)
        assert config.workload["model"] == {"name": "mlp", "width": 0.25}

    def test_low_rank_factors_have_a_share_of_the_rank(self) -> None:
        """And the same factor before their product; the width of the base is everybody's."""
        workload = {"model": "my:Own", "lora": {"rank": 6, "alpha": 12.0, "targets": ["*"]}}
        config = filled("all-smallest", submodel=LEVELS, workload=workload)
        assert config.workload["lora"] == {"rank": 1, "alpha": 2.0, "targets": ["*"], "train": []}
        assert config.workload["model"] == "my:Own"
        assert fill_in(config, resolve("algorithm", "all-smallest")).workload == config.workload
        told = error_of("all-smallest", submodel=LEVELS, workload={"lora": {"rank": 0, "targets": ["*"]}})
        assert "workload.lora.rank" in told

    def test_the_source_is_left_alone(self) -> None:
        config = configuration("all-smallest", submodel=LEVELS)
        before = config.model_dump()
        fill_in(config, resolve("algorithm", "all-smallest"))
        assert config.model_dump() == before


class TestRefused:
    def test_another_strategy(self) -> None:
        message = error_of("fedrolex", submodel__strategy="random")
        assert "submodel.strategy = 'random' contradicts algorithm 'fedrolex', which is 'rolling' by def" in message

    def test_capacities_of_whole_models(self) -> None:
        message = error_of("fedavg", submodel=LEVELS)
        assert "algorithm 'fedavg' trains whole models but submodel.capacities = [1.0, 0.5, 0.25]" in message

    def test_offsets_of_prefixes(self) -> None:
        changes = {"submodel": {"capacities": [1.0, 0.5], "offsets": {"hidden0": 3}}}
        told = error_of("fjord", **changes)
        assert told.startswith(
            "submodel.offsets = {'hidden0': 3} does not go with algorithm 'fjord', because a narrower"
        )
        assert filled("heterofl", **changes).submodel.offsets == {"hidden0": 3}

    def test_a_workload_whose_model_has_no_width(self) -> None:
        message = error_of("all-smallest", submodel=LEVELS, workload={"name": "my:Own"})
        assert "scales workload.model.width, which workload 'my:Own' does not have" in message
        assert filled("all-largest", submodel=LEVELS, workload={"name": "my:Own"}).submodel.capacities == [1.0]


@pytest.mark.parametrize("algorithm", BUILTIN["algorithm"])
@pytest.mark.parametrize("given", [{}, {"submodel": LEVELS}])
def test_a_filled_in_configuration_stays_as_it_is(algorithm: str, given: dict[str, Any]) -> None:
    """So the file that a run writes can be run, or resumed, and means the same."""
    found = resolve("algorithm", algorithm)
    if given and found.traits.whole_models_only is not None:
        with pytest.raises(ConfigError, match="trains whole models only, because"):
            filled(algorithm, **given)
        return
    strategy = {"submodel__strategy": found.traits.strategy or "rolling"}
    strategy = strategy if found.traits.capacities == "one" and given else {}
    config = filled(algorithm, **given, **strategy)
    written = parse(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert written == config
    assert fill_in(written, resolve("algorithm", written.algorithm["name"])) == config


@pytest.mark.parametrize("strategy", BUILTIN["strategy"])
def test_what_windows_do_not_follow_is_told(strategy: str) -> None:
    """A stride or an offset that changes no window is warned of, and one that does is not."""
    submodel = {"capacities": [0.5], "strategy": strategy}
    for option, value in {"stride": 3, "offsets": {"hidden0": 2}}.items():
        plain, moved = (
            build(configuration("fedavg", submodel=submodel | extra, engine__modes=[{"capacity": 0.5}]))
            for extra in ({}, {option: value})
        )
        cutters = (plain.task.cutter, moved.task.cutter)
        order = cutters[0].order(plain.workload.init(0))
        before, after = ([cutter.cut(0.5, number, 0, order).windows for number in range(6)] for cutter in cutters)
        told = [message for message in moved.warnings if f"submodel.{option} = {value} changes nothing" in message]
        assert (before == after) == bool(told)
        assert not plain.warnings


@pytest.mark.parametrize("name", [["digits"], {"a": 1}, 3, None])
def test_a_data_set_whose_name_is_none(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"workload.dataset = .* has no name: give the name of a dataset"):
        build(configuration("fedavg", workload__dataset={"name": name}))


class TestTopologies:
    """Which number of peers and which seed hold: the inline ones, then those of the file, then those of the run."""

    @pytest.mark.parametrize(
        ("said", "inline", "peers", "expected"),
        [
            ({"n": 8, "seed": 5}, {}, {}, (8, 5)),
            ({"n": 8, "seed": 5}, {}, {"num": 8}, (8, 5)),
            ({"n": 8}, {}, {}, (8, 3)),
            ({}, {}, {"num": 9}, (9, 3)),
            ({"seed": 0}, {}, {"num": 9}, (9, 0)),
            ({"n": 8, "seed": 5}, {"n": 9, "seed": 4}, {}, (9, 4)),
            (None, {"n": 9, "seed": 4}, {}, (9, 4)),
            (None, {"seed": 0}, {"num": 9}, (9, 0)),
            (None, {}, {"num": 9}, (9, 3)),
        ],
    )
    def test_precedence(
        self, tmp_path: Path, said: dict[str, int] | None, inline: dict[str, int], peers: dict[str, int], expected: Any
    ) -> None:
        name, path = "erdos-renyi", tmp_path / "graph.yaml"
        if said is not None:
            path.write_text(yaml.safe_dump({"topology": name, "source": "this test"} | said))
            name = str(path)
        config = configuration("dsgd", clients=None, seed=3, peers={"topology": {"name": name} | inline} | peers)
        found = build_topology(config)
        assert found is not None
        assert (found.n, found.seed) == expected
        plain = topology.build("erdos-renyi", found.n, seed=found.seed)
        assert found.digest() == plain.digest() != topology.build("erdos-renyi", found.n, seed=99).digest()

    def test_two_numbers_of_peers(self, tmp_path: Path) -> None:
        (tmp_path / "graph.yaml").write_text("{topology: ring, n: 8, source: this test}")
        for name in ({"name": str(tmp_path / "graph.yaml")}, {"name": "ring", "n": 8}):
            config = configuration("dsgd", clients=None, peers={"num": 9, "topology": name})
            with pytest.raises(
                ConfigError, match=r"peers\.num = 9, but topology '.*' has n = 8 peers: leave peers.num"
            ):
                build_topology(config)

    @pytest.mark.parametrize("seed", [-1, 1.5, True, "x"])
    def test_seeds_that_are_none(self, seed: Any) -> None:
        config = configuration("dsgd", clients=None, peers={"num": 9, "topology": {"name": "ring", "seed": seed}})
        with pytest.raises(
            ConfigError, match=r"topology 'ring' with seed = .*: seed must be a whole number, 0 or more"
        ):
            build_topology(config)
