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
MAX_ATTRIBUTES_BY_NAME, MAX_MODULES_AT_THE_TOP = 15, 16
NOWHERE = {
    "pickle",
    "cloudpickle",
    "dill",
    "shelve",
    "marshal",
    "ray",
    "grpc",
    "torch.distributed",
    "tokenizers",
    "av",
    "transformers",
}
ADAPTERS = {
    "engines/ray": {"ray"},
    "engines/collective": {"torch.distributed"},
    "distributed": {"torch.distributed"},
    "transport": {"grpc"},
    "workloads/multimodal": {"tokenizers", "av", "transformers"},
}  # the packages that each of these may be imported in
# Where they are used, these are imported inside a function, so that a short command does not pay for them.
LAZY = {
    "ray",
    "grpc",
    "grpc_health",
    "zstandard",
    "cryptography",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "sklearn",
    "scipy",
    "networkx",
    "matplotlib",
    "typer",
    "rich",
    "PIL",
    "tokenizers",
    "av",
    "transformers",
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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200)
    return set(json.loads(done.stdout))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_there_are_files() -> None:
    assert len(FILES) > 40
    assert "rng.py" in FILES


def functions(file: str) -> Iterator[Function]:
    return (node for node, _ in definitions(tree_of(file)) if isinstance(node, Function))


def unsafe(call: ast.Call) -> bool:
    """Tell whether a call may unpickle."""
    name, allows = ast.unparse(call.func), [k for k in call.keywords if k.arg == "allow_pickle"]
    if name in ("torch.load", "torch.save", "np.save") or (name == "np.load" and not allows):
        return True
    return any(ast.unparse(keyword.value) != "False" for keyword in allows)


class TestEveryFile:
    """One test for each rule, which lists all that break it."""

    def test_size(self) -> None:
        lines = {file: len((SOURCE / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
        assert {file: number for file, number in lines.items() if number > MAX_LINES} == {}

    def test_size_of_functions(self) -> None:
        lengths = {f"{file}:{one.lineno} {one.name}": length(one) for file in FILES for one in functions(file)}
        assert {name: number for name, number in lengths.items() if number > MAX_LINES_OF_A_FUNCTION} == {}

    def test_attributes_by_name_are_few(self) -> None:
        calls = [node for file in FILES for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
        assert sum(ast.unparse(call.func) == "getattr" for call in calls) <= MAX_ATTRIBUTES_BY_NAME

    def test_modules_at_the_top(self) -> None:
        assert len([file for file in FILES if "/" not in file and not file.startswith("__")]) <= MAX_MODULES_AT_THE_TOP

    def test_docstrings(self) -> None:
        files = [file for file in FILES if tree_of(file).body and not ast.get_docstring(tree_of(file))]
        public = [(file, node) for file in FILES for node, is_public in definitions(tree_of(file)) if is_public]
        names = [f"{file}:{node.lineno} {node.name}" for file, node in public if not ast.get_docstring(node)]
        assert files + names == []

    def test_annotations(self) -> None:
        missing = {f"{file}:{one.lineno} {one.name}": unannotated(one) for file in FILES for one in functions(file)}
        assert {name: parameters for name, parameters in missing.items() if parameters} == {}

    def test_forbidden_imports(self) -> None:
        found = []
        for file in FILES:
            nowhere = NOWHERE - ADAPTERS.get(str(Path(file).parent), set())
            names = list(imported(tree_of(file)))
            found += [(file, name) for name in names if any(f"{name}.".startswith(f"{no}.") for no in nowhere)]
        assert found == []

    def test_no_unpickling_by_other_names(self) -> None:
        calls = [(file, node) for file in FILES for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
        assert [f"{file}:{call.lineno}" for file, call in calls if unsafe(call)] == []


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

    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            ("torch.load(f)", True),
            ("np.load(f)", True),
            ("np.load(f, allow_pickle=True)", True),
            ("np.load(f, allow_pickle=False)", False),
            ("read(f, allow_pickle=False)", False),
        ],
    )
    def test_calls_that_may_unpickle(self, call: str, expected: bool) -> None:
        (statement,) = ast.parse(call).body
        assert isinstance(statement, ast.Expr)
        assert isinstance(statement.value, ast.Call)
        assert unsafe(statement.value) == expected


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
