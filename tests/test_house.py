"""House rules that no linter here checks: sizes, docstrings, annotations, forbidden and lazy imports."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gossamer
from gossamer.registry import BUILTIN, resolve

SOURCE = Path(gossamer.__file__).parent
FILES = [str(path.relative_to(SOURCE)) for path in sorted(SOURCE.rglob("*.py"))]
MAX_LINES, MAX_LINES_OF_A_FUNCTION = 400, 50
NOWHERE = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "ray", "grpc", "torch.distributed"}
ADAPTERS = {
    "engines/ray": {"ray"},
    "engines/collective": {"torch.distributed"},
}  # the one package that each of these may be imported in
# Where they are used, these are imported inside a function, so that a short command does not pay for them.
LAZY = {
    "ray",
    "grpc",
    "datasets",
    "flwr_datasets",
    "huggingface_hub",
    "pyarrow",
    "sklearn",
    "scipy",
    "networkx",
    "matplotlib",
    "typer",
    "rich",
    "PIL",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
IMPORTS = """
import json, sys
import torch
before = set(sys.modules)
for name in {names!r}:
    __import__(name)
print(json.dumps(sorted(set(sys.modules) - before)))
"""
LOADED = "import json, sys; import {name}; print(json.dumps(sorted(sys.modules)))"


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text(encoding="utf-8"))


def definitions(node: ast.AST, public: bool = True) -> Iterator[tuple[Function | ast.ClassDef, bool]]:
    """Yield every function, method and class below `node`, and whether it can be reached by public names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            reachable = public and not child.name.startswith("_")
            yield child, reachable
            yield from definitions(child, reachable and isinstance(child, ast.ClassDef))
        else:
            yield from definitions(child, public)


def length(function: Function) -> int:
    """Lines of a function without its docstring and decorators."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def unannotated(function: Function) -> list[str]:
    """Names of parameters, and "return", that have no annotation."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    missing = [each.arg for each in named if each.annotation is None and each.arg not in ("self", "cls")]
    return missing + (["return"] if function.returns is None else [])


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of everything that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run(program: str) -> set[str]:
    """Run a program in a process of its own; it prints module names as JSON."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    return set(json.loads(done.stdout))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_there_are_files() -> None:
    assert len(FILES) > 40
    assert "rng.py" in FILES


@pytest.mark.parametrize("file", FILES)
class TestEveryFile:
    def test_size(self, file: str) -> None:
        lines = len((SOURCE / file).read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES
        for node, _ in definitions(tree_of(file)):
            if isinstance(node, Function):
                assert length(node) <= MAX_LINES_OF_A_FUNCTION, f"{file}:{node.lineno} {node.name}"

    def test_docstrings(self, file: str) -> None:
        missing = [n.name for n, public in definitions(tree_of(file)) if public and not ast.get_docstring(n)]
        assert missing == []
        if tree_of(file).body:
            assert ast.get_docstring(tree_of(file)), "what is in this module?"

    def test_annotations(self, file: str) -> None:
        functions = [node for node, _ in definitions(tree_of(file)) if isinstance(node, Function)]
        assert {node.name: unannotated(node) for node in functions if unannotated(node)} == {}

    def test_forbidden_imports(self, file: str) -> None:
        names, nowhere = list(imported(tree_of(file))), NOWHERE - ADAPTERS.get(str(Path(file).parent), set())
        assert [name for name in names if any(f"{name}.".startswith(f"{no}.") for no in nowhere)] == []

    def test_no_unpickling_by_other_names(self, file: str) -> None:
        calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
        for call in calls:
            assert ast.unparse(call.func) not in ("torch.load", "torch.save", "np.save"), f"{file}:{call.lineno}"
            for keyword in call.keywords:
                if keyword.arg == "allow_pickle":
                    assert ast.unparse(keyword.value) == "False"
            if ast.unparse(call.func) == "np.load":
                assert "allow_pickle" in {keyword.arg for keyword in call.keywords}


class TestTheRules:
    """The rules themselves, on a module that breaks them all."""

    BAD = ast.parse(
        "import torch.distributed as d\nfrom pickle import loads\ndef f(a, *b, c: int):\n    class In: ...\n"
    )

    def test_are_broken_where_they_should_be(self) -> None:
        (function, public), (inner, inner_public) = definitions(self.BAD)
        assert isinstance(function, ast.FunctionDef)
        assert (public, inner.name, inner_public) == (True, "In", False)
        assert unannotated(function) == ["a", "b", "return"]
        assert length(function) == 2
        assert list(imported(self.BAD)) == ["torch.distributed", "pickle.loads"]


class TestImports:
    def test_gossamer_costs_torch_at_most(self) -> None:
        public = ["gossamer", "gossamer.submodel", "gossamer.aggregate", "gossamer.topology"]
        more = run(IMPORTS.format(names=public))
        assert "gossamer.aggregate.selective" in more
        assert packages(more) & LAZY == set()
        assert {name for name in more if name.startswith("torch.distributed")} == set()

    def test_running_an_experiment_loads_what_it_needs(self) -> None:
        more = run(IMPORTS.format(names=["gossamer.experiment", "gossamer.engines.local", "gossamer.workloads.images"]))
        assert "gossamer.rounds" in more
        assert packages(more) & LAZY == set()

    def test_the_bare_package_loads_no_torch(self) -> None:
        assert "torch" not in run(LOADED.format(name="gossamer"))

    def test_the_command_line_loads_no_torch(self) -> None:
        loaded = run(LOADED.format(name="gossamer.cli.main"))
        assert "typer" in loaded
        assert packages(loaded) & ({"torch", "numpy", *LAZY} - {"typer", "rich"}) == set()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BUILTIN for name in BUILTIN[kind]])
def test_every_built_in_name_resolves(kind: str, name: str) -> None:
    found = resolve(kind, name)
    module, _, attribute = BUILTIN[kind][name].partition(":")
    assert getattr(sys.modules[module], attribute) is found
    assert module.startswith("gossamer.")
