"""Traits of algorithms: what is unknown, wrong or contradictory is refused when an algorithm is named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from federation import configure
from gossamer.aggregate.codecs import make_codec
from gossamer.algorithms.base import Algorithm
from gossamer.algorithms.checks import find_algorithm
from gossamer.algorithms.federated import FedAvg
from gossamer.algorithms.traits import AlgorithmTraits
from gossamer.config.loading import parse
from gossamer.config.resolve import resolve
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN, trusting

Name = Callable[[Any], str]


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[Name]:
    """Return a function that gives an object a plug-in's name; classes made by `type` count as code of Python's."""
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)

    def named(found: Any) -> str:
        """Return traits with a name."""
        vars(module)["Mine"] = found
        return "mine:Mine"

    with trusting():
        yield named


def with_attribute(key: str, value: Any, base: type = FedAvg, **traits: Any) -> type:
    """Return an algorithm with one more attribute."""
    return type("Mine", (base,), {key: value, **({"traits": replace(FedAvg.traits, **traits)} if traits else {})})


class TestTraits:
    def test_are_frozen(self) -> None:
        traits = AlgorithmTraits(uplink={"x": "mean"})
        with pytest.raises(FrozenInstanceError):
            traits.stackable = False  # type: ignore[misc]
        with pytest.raises(TypeError):
            traits.uplink["y"] = "sum"  # type: ignore[index]

    def test_are_derived(self) -> None:
        given = {"x": "mean"}
        traits = replace(AlgorithmTraits(uplink=given), stackable=False)  # type: ignore[arg-type]
        given["y"] = "sum"
        assert (traits.stackable, traits.uplink) == (False, {"x": "mean"})

    @pytest.mark.parametrize(
        ("unknown", "known"), [("stackabel", "stackable"), ("client_array", "client_arrays"), ("uplinks", "uplink")]
    )
    def test_unknown_names(self, unknown: str, known: str) -> None:
        message = rf"AlgorithmTraits has no trait '{unknown}'; did you mean '{known}'\? \(known: uplink, downlink, "
        with pytest.raises(ConfigError, match=message):
            AlgorithmTraits(**{unknown: False})
        with pytest.raises(ConfigError, match=message):
            replace(FedAvg.traits, **{unknown: False})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("traits", "message"),
        [
            ({"stackable": "no"}, "stackable = 'no': input should be a valid boolean"),
            ({"stackable": 0}, "stackable = 0: input should be a valid boolean"),
            ({"num_phases": True}, "num_phases = True: input should be a valid integer"),
            ({"num_phases": 1.5}, "num_phases = 1.5: input should be a valid integer"),
            ({"strategy": 3}, "strategy = 3: input should be a valid string"),
            ({"uplink": {"x": "average"}}, "uplink.x = 'average': input should be 'mean', 'sum' or 'rows'"),
            ({"uplink": ("x",)}, "uplink = .*: input should be a valid dictionary"),
            ({"downlink": "x"}, "downlink = 'x': input should be a valid tuple"),
            ({"client_arrays": ["control"]}, r"client_arrays = \['control'\]: input should be a valid tuple"),
            ({"codecs": {"x": "top-k"}}, "codecs.x = 'top-k': input should be an instance of Codec"),
            ({"capacities": "all"}, "capacities = 'all': input should be 'one', 'given', 'smallest' or 'largest'"),
            ({"no_momentum": True}, "no_momentum = True: input should be a valid string"),
        ],
        ids=str,
    )
    def test_wrong_types(self, traits: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=rf"^AlgorithmTraits\.{message}"):
            AlgorithmTraits(**traits)

    @pytest.mark.parametrize(
        ("traits", "message"),
        [
            ({"uplink": {}}, "uplink names no payload"),
            ({"uplink": {"x": "mean", "held": "sum"}}, r"uplink names \['held'\], which an inbox holds"),
            ({"uplink": {"x": "rows"}, "downlink": None}, "uplink has rows, which only a server receives"),
            ({"uplink": {"x": "mean", "n": "rows"}, "scalars": ("n",)}, "as rows, but these are numbers"),
            ({"codecs": {"x": make_codec("sign")}}, r"codecs compress \['x'\] with a loss, which only peers do yet"),
            ({"codecs": {"x": make_codec({"name": "top-k", "k": 5})}}, r"codecs compress \['x'\] with a loss"),
            (
                {"downlink": None, "uplink": {"a": "sum"}, "scalars": ("a",), "codecs": {"a": make_codec("sign")}},
                r"\['a'\] are among scalars and codecs",
            ),
            ({"scalars": ("tau",)}, r"scalars or codecs name \['tau'\], which uplink does not"),
            ({"codecs": {"mask": BUILTIN}}, "codecs.mask: input should be an instance of Codec"),
            ({"scalars": ("x",)}, "'x' is the model"),
            ({"downlink": None, "client_arrays": ("control",)}, "peers keep everything as state"),
            ({"lazy": True}, "lazy is for peers"),
            ({"merge_every": 3}, "merge_every is for peers"),
            ({"one_step_only": "it is so"}, "one_step_only is for peers"),
            ({"downlink": None, "scores_models": True}, r"scores_models = True is for a server"),
            ({"downlink": None, "joint": True}, r"joint = True mixes the payloads x and y, but uplink names \['x'\]"),
            ({"num_phases": 0}, "num_phases = 0, .*give numbers from 1 on"),
            ({"downlink": None, "merge_every": 0}, "merge_every = 0: give numbers from 1 on"),
            ({"has_local_loss": True}, "set stackable to False"),
            ({"leaves_products": True}, "set has_local_loss to True"),
        ],
        ids=str,
    )
    def test_contradictions(self, traits: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            AlgorithmTraits(**traits)

    def test_peers_have_scalars_that_are_not_sent(self) -> None:
        assert AlgorithmTraits(downlink=None, scalars=("steps",)).scalars == ("steps",)


class Whole(Algorithm):
    """Nothing but what is abstract."""

    traits = AlgorithmTraits()

    def __init__(self, options: Any, *, momentum: float = 0.0, weight_decay: float = 0.0) -> None: ...

    def init(self, x: Tensor) -> Any: ...

    def init_client(self, x: Tensor) -> Any: ...

    def begin(self, state: Any, client_state: Any) -> Any: ...

    def step(self, carry: Any, grad: Tensor, lr: float) -> Any: ...

    def end(self, state: Any, client_state: Any, carry: Any, steps: int, lr: float) -> Any: ...

    def update(self, state: Any, inbox: Any, num_clients: int) -> Any: ...


def without(*methods: str) -> type:
    """Return an algorithm that derives from `Algorithm` and lacks some methods."""
    kept = {key: value for key, value in vars(Whole).items() if key not in methods and not key.startswith("__")}
    return type("Mine", (Algorithm,), kept)


class Moving(FedAvg):
    """States a trait once it is made."""

    def __init__(self, options: Any, **train: float) -> None:
        super().__init__(options, **train)
        self.stackable = False


class Odd(FedAvg):
    """Takes other traits once it is made."""

    def __init__(self, options: Any, **train: float) -> None:
        super().__init__(options, **train)
        self.traits = {"stackable": False}  # type: ignore[assignment]


class Mapped:
    """Has all methods, but derives from nothing."""

    init = begin = step = end = update = init_client = FedAvg.init


class TestPlugIns:
    @pytest.mark.parametrize("shipped", BUILTIN["algorithm"])
    def test_what_ships(self, shipped: str) -> None:
        assert isinstance(find_algorithm(shipped).traits, AlgorithmTraits)

    @pytest.mark.parametrize(
        "found",
        [
            Whole,
            with_attribute("size", 0.01),
            with_attribute("steps", FedAvg.step),
            with_attribute("local_loss", FedAvg.local_loss, has_local_loss=True, stackable=False),
        ],
    )
    def test_what_is_in_order(self, name: Name, found: Any) -> None:
        assert find_algorithm(name(found)) is found

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (3, "is a int without traits, optimizer, init, "),
            (dict, "is a dict without traits, optimizer, init, .*: derive it from gossamer.algorithms.base.Algorithm"),
            (Mapped, "is a Mapped without traits, optimizer, of_phase, of_model, sent, received, "),
            (without("traits"), "is a Mine without traits: "),
            (without("update"), "is a Mine without update: "),
            (without("step", "end"), "is a Mine without step, end: "),
            (with_attribute("traits", None), r"has traits = None: state .* in an attribute traits = AlgorithmTraits\("),
            (with_attribute("uplink", {"x": "sum"}), "states 'uplink' beside its traits, where it would have no eff"),
            (with_attribute("num_phases", property(lambda self: 2)), "states 'num_phases' beside its traits"),
            (with_attribute("stackabel", False), "'stackabel' that has no effect; did you mean 'stackable'"),
            (with_attribute("scalar", ("tau",)), "'scalar' that has no effect; did you mean 'scalars'"),
            (with_attribute("local_los", FedAvg.step), "'local_los' that has no effect; did you mean 'local_loss'"),
            (
                with_attribute("local_loss", FedAvg.local_loss),
                "has a method 'local_loss', but traits.has_local_loss is False: set it to True, or rename the method",
            ),
            (
                with_attribute("size", 1, has_local_loss=True, stackable=False),
                "has no method 'local_loss', but traits.has_local_loss is True: set it to False, or write the method",
            ),
            (
                with_attribute("end", lambda self, state, carry: ({}, {})),
                r"has a method 'end' that cannot be called with \(self, state, client_state, carry, steps, lr\), becau",
            ),
            (with_attribute("forward", FedAvg.forward), "but traits.transforms_parameters is False"),
        ],
    )
    def test_what_is_refused_when_it_is_named(self, name: Name, found: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=f"^algorithm 'mine:Mine' .*{message}"):
            resolve(parse(configure({"algorithm": name(found)})))

    @pytest.mark.parametrize(
        ("found", "message"), [(Moving, "states 'stackable' beside its traits"), (Odd, "has traits = {'stackable'")]
    )
    def test_what_is_refused_when_it_is_made(self, name: Name, found: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            resolve(parse(configure({"algorithm": name(found)})))

    def test_momentum_is_refused_of_any_class(self, name: Name) -> None:
        found = type("Mine", (Whole,), {"traits": AlgorithmTraits(no_momentum="it has its own")})
        data = {"algorithm": name(found), "train.momentum": 0.9}
        with pytest.raises(
            ConfigError,
            match=r"algorithm 'mine:Mine' does not go with train.momentum = 0.9, because it has its own: set",
        ):
            resolve(parse(configure(data)))

    def test_traits_that_fail_name_the_plug_in(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        (tmp_path / "misspelt.py").write_text(
            "from gossamer.algorithms.federated import FedAvg\n"
            "from gossamer.algorithms.traits import AlgorithmTraits\n"
            "class Mine(FedAvg):\n    traits = AlgorithmTraits(stackabel=False)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ConfigError, match=r"^algorithm 'misspelt:Mine': AlgorithmTraits has no trait 'stackabel';"):
            find_algorithm("misspelt:Mine")
