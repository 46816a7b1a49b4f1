"""Plug-in look-up: short names, entry points, ``module:attribute``, and what is said when a name leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from gossamer import registry
from gossamer.algorithms.federated import FedAvg
from gossamer.errors import ConfigError, RegistryError
from gossamer.registry import origins


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that adds two algorithms and claims the name of one that ships here."""
    points = [
        EntryPoint("gossip", "collections:OrderedDict", "gossamer.algorithm"),
        EntryPoint("broken", "no_such_package:Thing", "gossamer.algorithm"),
        EntryPoint("fedavg", "collections:OrderedDict", "gossamer.algorithm"),
        EntryPoint("gossip", "collections:deque", "gossamer.sampler"),
        EntryPoint("gossip", "collections:Counter", "gossamer.text_model"),
    ]
    monkeypatch.setattr(origins, "entry_points", lambda group: [p for p in points if p.group == group])


class TestShipped:
    def test_names_are_sorted_and_complete(self) -> None:
        assert registry.names("strategy") == ["covering", "magnitude", "random", "rolling", "static"]
        assert set(registry.names("algorithm")) >= set(registry.BUILTIN["algorithm"])

    def test_the_kind_matters(self) -> None:
        with pytest.raises(RegistryError, match="unknown model 'fedavg'"):
            registry.resolve("model", "fedavg")


class TestModuleAttribute:
    def test_in_full(self) -> None:
        assert registry.resolve("algorithm", "gossamer.algorithms.federated:FedAvg") is FedAvg

    def test_nested_attribute(self) -> None:
        with registry.trusting():
            found = registry.resolve("algorithm", "gossamer.algorithms.federated:FedAvg.Options")
        assert found is FedAvg.Options

    def test_module_of_the_users(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "plug_in_of_a_user.py").write_text("class Mine: ...\n")
        monkeypatch.syspath_prepend(tmp_path)
        found = registry.resolve("model", "plug_in_of_a_user:Mine")
        assert found is sys.modules.pop("plug_in_of_a_user").Mine

    @pytest.mark.parametrize("name", ["no_such_package:Thing", "os:no_such_thing", "os:path.nothing", "os:", "os..b:x"])
    def test_what_cannot_be_loaded_is_named(self, name: str) -> None:
        with registry.trusting(), pytest.raises(RegistryError, match="cannot load algorithm") as caught:
            registry.resolve("algorithm", name)
        assert repr(name) in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_a_module_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "plug_in_that_fails.py").write_text("\nthing = {}['x']\n")
        (tmp_path / "plug_in_in_parts.py").write_text("def half(\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(
            ConfigError, match=r"^model 'plug_in_that_fails:M' fails with KeyError: 'x' \(.*py, line 2\): "
        ):
            registry.resolve("model", "plug_in_that_fails:M")
        with pytest.raises(ConfigError, match=r"fails with SyntaxError: .*\(plug_in_in_parts.py, line 1\)"):
            registry.resolve("model", "plug_in_in_parts:M")

    @pytest.mark.parametrize("name", [":Thing", ".relative:Thing", ":"])
    def test_without_a_module_the_name_is_unknown(self, name: str) -> None:
        with pytest.raises(RegistryError, match="unknown algorithm"):
            registry.resolve("algorithm", name)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's own, with much that others define."""
    source = """
import functools
import subprocess
import types
from subprocess import call
from torch import hub
from gossamer.algorithms.federated import FedAvg
from gossamer.registry import resolve

def thing(): ...
class Thing(FedAvg): ...
half = functools.partial(thing)
bad = functools.partial(call)
made = types.new_class("Made", (FedAvg,))
shell = subprocess.Popen(["true"])
shell.wait()
constant = 3
"""
    (tmp_path / "mine_of_a_user.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mine_of_a_user.py"
    sys.modules.pop("mine_of_a_user", None)


class TestTrust:
    @pytest.mark.parametrize(
        ("name", "where"),
        [
            ("subprocess:call", "of Python's library"),
            ("os.path:join", "of Python's library"),
            ("builtins:exec", "of Python's library"),
            ("posix:system", "of Python's library"),
            ("antigravity:x", "of Python's library"),
            ("torch.hub:load", "/torch/__init__.py'"),
            ("yaml:unsafe_load", "/yaml/__init__.py'"),
            ("gossamer.registry:load_object", "/gossamer/__init__.py'"),
            ("gossamer.cli.doctor:shutil.rmtree", "/gossamer/__init__.py'"),
            ("mine_of_a_user:call", "of Python's library"),
            ("mine_of_a_user:subprocess.call", "of Python's library"),
            ("mine_of_a_user:bad", "of Python's library"),
            ("mine_of_a_user:shell.send_signal", "of Python's library"),
            ("mine_of_a_user:call.__globals__.clear", "of Python's library"),
            ("mine_of_a_user:hub.load", "/torch/__init__.py'"),
            ("mine_of_a_user:resolve", "/gossamer/__init__.py'"),
        ],
    )
    def test_code_that_is_no_plug_in(self, mine: Path, name: str, where: str) -> None:
        imported = set(sys.modules)
        with pytest.raises(RegistryError) as caught:
            registry.resolve("dataset", name)
        assert str(caught.value).startswith(f"dataset {name!r} names code ")
        assert f"{where}, which is no plug-in of gossamer: if you trust the file" in str(caught.value)
        assert "antigravity" not in set(sys.modules) - imported

    @pytest.mark.parametrize("name", ["thing", "Thing", "half", "constant", "made"])
    def test_the_users_own(self, mine: Path, name: str) -> None:
        found = registry.resolve("algorithm", f"mine_of_a_user:{name}")
        assert found is vars(sys.modules["mine_of_a_user"])[name]

    def test_what_is_included_under_another_name(self, mine: Path) -> None:
        assert registry.resolve("algorithm", "mine_of_a_user:FedAvg") is FedAvg

    def test_trusted(self) -> None:
        with registry.trusting():
            assert registry.resolve("dataset", "subprocess:call") is subprocess.call
            with registry.trusting(False):
                assert registry.is_trusting()
        assert not registry.is_trusting()

    def test_what_is_imported_is_announced_first(self, mine: Path) -> None:
        told = list[str]()

        def tell(sentence: str) -> None:
            assert "mine_of_a_user" not in sys.modules
            told.append(sentence)

        with registry.importing(tell):
            registry.resolve("algorithm", "mine_of_a_user:Thing")
            registry.resolve("model", "mine_of_a_user:thing")
            registry.resolve("algorithm", "fedavg")
        assert told == [f"algorithm 'mine_of_a_user:Thing': importing 'mine_of_a_user' from {str(mine)!r}"]

    def test_nothing_of_the_users_own(self, mine: Path) -> None:
        with (
            registry.importing(lambda sentence: None, own=False),
            pytest.raises(RegistryError, match=r"mine_of_a_user.py', which this command imports only with --trust"),
        ):
            registry.resolve("algorithm", "mine_of_a_user:Thing")
        assert "mine_of_a_user" not in sys.modules

    @pytest.mark.usefixtures("plugins")
    def test_a_package_with_an_entry_point(self) -> None:
        assert registry.resolve("dataset", "collections:Counter") is Counter


class TestUnknown:
    def test_nearest_and_all_known_are_named(self) -> None:
        with pytest.raises(RegistryError) as caught:
            registry.resolve("strategy", "roling")
        message = str(caught.value)
        assert "unknown strategy 'roling'; did you mean 'rolling'?" in message
        assert "known: covering, magnitude, random, rolling, static; or give 'module:attribute'" in message

    def test_nothing_near(self) -> None:
        with pytest.raises(RegistryError, match="unknown strategy 'xyz' \\(known") as caught:
            registry.resolve("strategy", "xyz")
        assert isinstance(caught.value, ConfigError)
        assert caught.value.exit_code == 2


@pytest.mark.usefixtures("plugins")
class TestEntryPoints:
    def test_found_by_kind_and_name(self) -> None:
        assert registry.resolve("algorithm", "gossip").__name__ == "OrderedDict"
        assert registry.resolve("sampler", "gossip").__name__ == "deque"

    def test_groups_have_no_hyphens(self) -> None:
        assert registry.resolve("text-model", "gossip") is Counter
        assert registry.names("text-model") == ["gossip", "transformer"]

    def test_shipped_names_win(self) -> None:
        assert registry.resolve("algorithm", "fedavg") is FedAvg

    def test_broken_one_is_named(self) -> None:
        with pytest.raises(RegistryError, match="cannot load algorithm 'broken' from 'no_such_package:Thing'"):
            registry.resolve("algorithm", "broken")

    def test_listed_and_suggested(self) -> None:
        assert registry.names("algorithm") == sorted({*registry.BUILTIN["algorithm"], "gossip", "broken"})
        with pytest.raises(RegistryError, match="did you mean 'gossip'"):
            registry.resolve("algorithm", "gosip")
