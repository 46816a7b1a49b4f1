"""Where code comes from: the files of a package, and the module in which a class or a function is defined."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import operator
import sys
import sysconfig
from collections.abc import Collection
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any


def points_of(kind: str) -> EntryPoints:
    """Return the entry points of a kind of plug-ins, whose group's name may have no hyphen (packaging.python.org)."""
    return entry_points(group=f"gossamer.{kind.replace('-', '_')}")


def files_of(top: str) -> list[str] | None:
    """Return where a package lies, without importing it: [] within Python's library, None nowhere."""
    if top in sys.stdlib_module_names:
        return []
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # a module without a spec, such as a script
        return [str(vars(sys.modules[top]).get("__file__"))] if top in sys.modules else None
    if spec is None:
        return None
    return [*([spec.origin] if spec.origin else []), *(spec.submodule_search_locations or [])]


def is_installed(file: str) -> bool:
    """Say whether a file belongs to Python's library or to an installed package."""
    path, known = Path(file).resolve(), sysconfig.get_paths()
    roots = [known[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    is_packaged = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return is_packaged or any(path.is_relative_to(Path(root).resolve()) for root in roots)


def is_within(module: str, modules: Collection[str]) -> bool:
    """Say whether a module is one of `modules`, or below one."""
    return any(f"{module}.".startswith(f"{one}.") for one in modules)


def importable_as(found: Any) -> str | None:
    """Return ``module:name`` of a class or a function that other processes can import; None: they cannot."""
    if not (isinstance(found, type) or inspect.isroutine(found)):
        return None
    name = defined_as(found)
    module = None if name is None else sys.modules[name.partition(":")[0]]
    return name if module is not None and module.__name__ != "__main__" and module.__spec__ is not None else None


def defined_as(found: Any) -> str | None:
    """Return ``module:name`` of a function or a class, or of the class of anything else.

    None: it was made at run time, so that its module does not have it under its name.
    """
    if isinstance(found, functools.partial):
        return defined_as(found.func)
    if inspect.ismethod(found):
        return defined_as(found.__func__)
    defined = found if inspect.isroutine(found) or isinstance(found, type) else type(found)
    module = (defined.__module__ if hasattr(defined, "__module__") else None) or "builtins"
    if not inspect.isbuiltin(defined) and not hasattr(defined, "__objclass__"):
        try:
            if operator.attrgetter(defined.__qualname__)(sys.modules.get(module)) is not defined:
                return None
        except AttributeError:
            return None
    return f"{module}:{defined.__qualname__}"
