"""Descriptions of everything that a configuration may name: that they are complete, and what they are made of."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

import gossamer
from gossamer import registry
from gossamer.errors import RegistryError
from gossamer.options import Options, takes
from gossamer.reports import describe, reference
from gossamer.reports.describe import Entry, entry, kinds, names, of_object
from gossamer.reports.log_names import EVENTS, METRICS
from gossamer.reports.option_docs import attributes, options_of, type_name

ROOT = Path(__file__).parents[2]
REMEDY = "docs/reference.md is out of date: write it with  make reference  (python -m gossamer.reports.reference)"


@cache
def everything() -> list[Entry]:
    return [entry(kind, name) for kind in kinds() for name in names(kind)]


def undocumented(entries: list[Entry]) -> list[str]:
    """Return what lacks a description."""
    bare = [f"{one.kind} {one.name}: no docstring" for one in entries if not one.about]
    missing = [f"{one.kind} {one.name}: {option.name}" for one in entries for option in one.options if not option.about]
    return bare + missing


class TestReference:
    def test_every_name_and_every_option_is_documented(self) -> None:
        assert undocumented(everything()) == [], "write it in the docstring of the class, under 'Attributes:'"

    def test_an_undocumented_option_is_noticed(self) -> None:
        class Bare(Options):
            """Options. Attributes: told: what it is."""

            told: int = 1
            untold: int = 1

        class Silent:
            Options = Bare

        assert undocumented([of_object("algorithm", "x", Silent)]) == [
            "algorithm x: no docstring",
            "algorithm x: untold",
        ]

    def test_the_committed_file_is_what_the_code_says(self) -> None:
        assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == reference.render_markdown(), REMEDY

    @pytest.mark.parametrize("kind", ["partition", "dataset", "text"])
    def test_functions_state_their_options(self, kind: str) -> None:
        silent = [
            name for name in registry.BUILTIN[kind] if describe.options_model(registry.resolve(kind, name)) is None
        ]
        assert silent == [], "decorate them with gossamer.options.takes"

    def test_every_event_is_listed(self) -> None:
        source = Path(gossamer.__file__).parent
        text = "".join(path.read_text(encoding="utf-8") for path in source.rglob("*.py"))
        logged = set(re.findall(r"(?:log|on)_event\(\s*\"([a-z-]+)\"", text))
        assert logged == EVENTS.keys()

    def test_every_metric_of_a_run_is_listed(self, tmp_path: Path) -> None:
        clients = {
            "rounds": 1,
            "workload": {"dataset": {"name": "digits", "limit": 100}, "model": {"name": "mlp", "hidden": [4]}},
            "clients": {"num": 2, "per_round": 2},
            "train": {"lr": 0.1},
            "submodel": {"capacities": [1.0, 0.5]},
            "algorithm": "heterofl",
            "evaluation": {"by_capacity": True},
            "engine": {"workers": 0},
        }
        peers = {
            "rounds": 1,
            "workload": {"name": "least-squares", "num_samples": 20},
            "peers": {"num": 3, "topology": "ring"},
            "train": {"lr": 0.01, "steps": 1},
            "engine": {"workers": 0},
        }
        consensus = peers | {"workload": {"name": "consensus"}}
        found = [
            gossamer.run(config, out=tmp_path / str(number)).metrics[-1]
            for number, config in enumerate((clients, peers, consensus))
        ]
        logged = {re.sub(r".+(_by_capacity|_peers)$", r"<metric>\1", name) for record in found for name in record}
        assert len(logged) > 25
        assert logged - METRICS.keys() == set()


class TestOptions:
    def test_types_bounds_and_defaults_as_a_file_has_them(self) -> None:
        class Inner(Options):
            """Options.

            Attributes:
                low, high: either end.
            """

            low: float = Field(0.5, ge=0, lt=1)
            high: float | None = None

        class Outer(Options):
            """Options.

            Attributes:
                kind: which one; None: none of
                    them.
                inner: more.
            """

            kind: Literal["a", "b"] | None = None
            inner: Inner = Inner()
            needed: Annotated[int, Field(ge=1, description="what is needed.")]
            sizes: tuple[int, ...] = (1, 2)

        found = {one.name: one for one in options_of(Outer, "x.")}
        assert [*found] == ["x.kind", "x.inner", "x.inner.low", "x.inner.high", "x.needed", "x.sizes"]
        kind, low = found["x.kind"], found["x.inner.low"]
        assert (kind.type, kind.default, kind.about) == ('"a" or "b" or null', "null", "which one; null: none of them.")
        assert (low.type, low.default, low.about) == ("float >= 0 and < 1", "0.5", "either end.")
        assert found["x.inner.high"].about == "either end."
        assert (found["x.inner"].type, found["x.inner"].default) == ("mapping", "")
        assert (found["x.needed"].type, found["x.needed"].required) == ("int >= 1", True)
        assert found["x.needed"].about == "what is needed."
        assert (found["x.sizes"].type, found["x.sizes"].default) == ("list of int", "[1, 2]")

    def test_attributes_within_a_sentence(self) -> None:
        assert attributes("Options. Attributes: a: one; b: three.") == {"a": "one", "b": "three."}
        assert attributes("Options of SGD; gamma: momentum: that of b.") == {"gamma": "momentum: that of b."}

    def test_a_section_after_the_attributes_is_none_of_them(self) -> None:
        assert attributes("Options.\n\nAttributes:\n    a: one.\n\n    b: two.\n\nRaises:\n    Error: never.\n") == {
            "a": "one.",
            "b": "two.",
        }

    @pytest.mark.parametrize(
        ("annotation", "expected"),
        [(dict[str, int], "mapping of str to int"), (Path, "path"), (Any, "anything"), (list[float], "list of float")],
    )
    def test_other_types(self, annotation: Any, expected: str) -> None:
        assert type_name(annotation) == expected


class TestPlugIns:
    def test_a_function_with_options_and_one_with_parameters(self) -> None:
        class Some(Options):
            """Options. Attributes: a: the first."""

            a: int = 1

        @takes(Some)
        def stated(labels: Any, **params: Any) -> None:
            """Divide (Nobody, 2020)."""

        def plain(labels: Any, size: float = 2.0) -> None:
            """Divide.

            Args:
                labels: the classes.
                size: how much.
            """

        assert [one.name for one in of_object("partition", "x", stated).options] == ["a"]
        assert of_object("partition", "x", stated).source == "Nobody, 2020"
        (only,) = of_object("partition", "x", plain).options
        assert (only.name, only.default, only.about) == ("size", "2", "how much.")

    def test_sources_are_those_of_the_base_class_where_there_are_none(self) -> None:
        assert entry("algorithm", "fedyogi").source == "Reddi et al., arXiv 2003.00295, Algorithm 2"
        assert entry("topology", "base").source == "Base-(k+1), arXiv 2305.11420"

    def test_facts(self) -> None:
        assert entry("algorithm", "dsgd").facts["for"] == "peers on a topology"
        assert entry("algorithm", "scaffold").facts["sub-models"].startswith("no, because the server's control")
        assert entry("strategy", "static").facts["has no effect"] == "stride"


class TestText:
    def test_unknown_names_and_kinds(self) -> None:
        for kind, name, told in (
            ("algoritm", None, "did you mean 'algorithm'"),
            ("fedavg", None, "gossamer describe algorithm fedavg"),
            ("algorithm", "fedavgg", "did you mean 'fedavg'"),
            ("metric", "acuracy", "did you mean 'accuracy'"),
            ("config", "trian", "did you mean 'train'"),
        ):
            with pytest.raises(RegistryError, match=told):
                reference.render(kind, name)

    def test_what_is_shown(self) -> None:
        assert "od-equidyn-complete" in reference.render(None, None)
        assert any(line.startswith("dirichlet") for line in reference.render("partition", None).splitlines())
        told = reference.render("config", "train")
        assert "train.lr: float > 0 (required)\n    learning rate of local steps" in told
        assert "train.schedule.factor: float > 0 (default 0.1)" in told

    def test_json(self) -> None:
        assert "fedavg" in json.loads(reference.as_json(None, None))["algorithm"]
        assert json.loads(reference.as_json("codec", None))[1]["name"] == "top-k"
        assert json.loads(reference.as_json("algorithm", "fedprox"))["options"][-1] == {
            "name": "mu",
            "type": "float >= 0",
            "default": "0.01",
            "required": False,
            "about": "strength of the pull (the paper tries 0.001, 0.01, 0.1 and 1).",
        }
