"""Look-up of plug-ins by a short name, ``module:attribute``, or an entry point.

`BUILTIN` has the short names of what is included; a package of your own adds names under the entry-point group
``gossamer.<kind>`` (of the kind ``text-model``: ``gossamer.text_model``), or is named in full as
``my_package.my_module:MyThing``.

A configuration may be a stranger's, and a function that it names is called. So unless it is trusted (`trusting`), it
can name only what is meant for gossamer: functions and classes of packages that declare an entry point, and of modules
that are not installed, such as files in the working folder. Nothing is imported to find that out.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from gossamer.errors import ConfigError, GossamerError, RegistryError, nearest, one_line, plugin_errors
from gossamer.registry.builtin import BUILTIN as BUILTIN
from gossamer.registry.origins import defined_as, files_of, is_installed, is_within, points_of


@dataclass(frozen=True)
class _Policy:
    """What ``module:attribute`` may import.

    Attributes:
        all: whether it may be anything.
        own: whether it may be a module that is not installed.
        only: modules that it may be, whatever else is said here, with all below them; None: any.
        announce: callback that gets the name of a module, and a sentence, before it is imported.
    """

    all: bool = False
    own: bool = True
    only: tuple[str, ...] | None = None
    announce: Callable[[str, str], None] = lambda module, sentence: None


_POLICY = ContextVar("policy", default=_Policy())  # noqa: B039, because it is frozen


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Allow configurations within the block to name any code, if `trust`; else change nothing."""
    reset = _POLICY.set(replace(_POLICY.get(), all=trust or _POLICY.get().all))
    try:
        yield
    finally:
        _POLICY.reset(reset)


@contextmanager
def importing(announce: Callable[[str], None], own: bool = True) -> Iterator[None]:
    """Announce, once, each module that is imported within the block, and import none of the user's own unless `own`."""
    told = set[str]()

    def once(module: str, sentence: str) -> None:
        """Announce a module."""
        if module not in told:
            told.add(module)
            announce(sentence)

    reset = _POLICY.set(replace(_POLICY.get(), own=own, announce=once))
    try:
        yield
    finally:
        _POLICY.reset(reset)


@contextmanager
def only(modules: Collection[str]) -> Iterator[None]:
    """Let nothing be imported within the block but what is included here, and `modules` with all modules below them.

    Neither `trusting` nor an entry point changes that.
    """
    before = _POLICY.get().only
    both = modules if before is None else [module for module in modules if is_within(module, before)]
    reset = _POLICY.set(replace(_POLICY.get(), only=tuple(both)))
    try:
        yield
    finally:
        _POLICY.reset(reset)


OBJECT = "object:"  # begins the name of what was given in Python and has no name of its own
_GIVEN: ContextVar[Mapping[str, Any]] = ContextVar("given", default=MappingProxyType({}))


@contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """Let names stand for `objects`, ``{name: plug-in}``, within the block."""
    reset = _GIVEN.set({**_GIVEN.get(), **objects})
    try:
        yield
    finally:
        _GIVEN.reset(reset)


_LOADED: dict[str, str] = {}  # files and folders of plug-ins, and their names


@contextmanager
def errors_of_plug_ins() -> Iterator[None]:
    """Convert any error but gossamer's own, raised by the code of a plug-in within the block, to one that names it.

    Raises:
        ConfigError: a plug-in raised another error.
    """
    try:
        yield
    except (GossamerError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            for file in (frame.filename, *map(str, Path(frame.filename).parents)):
                if file in _LOADED:
                    told = f"{one_line(error, frame)}: correct it, or name another one"
                    raise ConfigError(f"plug-in {_LOADED[file]!r} fails with {told}") from error
        raise


def is_trusting() -> bool:
    """Say whether configurations may name any code, see `trusting`."""
    return _POLICY.get().all


def is_builtin(kind: str, name: str) -> bool:
    """Say whether a name, short or in full, stands for what is included here."""
    return name in BUILTIN.get(kind, {}) or name in BUILTIN.get(kind, {}).values()


def module_of(kind: str, name: str) -> str | None:
    """Return the module that a name would be imported from, without doing so; None: the name is unknown."""
    if is_builtin(kind, name) or (":" in name and name[0] not in ".:"):
        return BUILTIN.get(kind, {}).get(name, name).partition(":")[0]
    points = (point for point in points_of(kind) if point.name == name)
    return next((point.value.partition(":")[0] for point in points), None)


def names(kind: str) -> list[str]:
    """List the short names known for `kind`, entry points included."""
    return sorted({*BUILTIN.get(kind, {}), *(point.name for point in points_of(kind))})


def resolve_function(kind: str, name: str) -> Callable[..., Any]:
    """Find the function, or the class, that `name` stands for; see `resolve`.

    Raises:
        ConfigError: it cannot be found, or not be called.
    """
    found: Callable[..., Any] = resolve(kind, name)
    if not callable(found):
        raise ConfigError(f"{kind} {name!r} is a {type(found).__name__}: give a function, or name another one")
    return found


def resolve(kind: str, name: str) -> Any:
    """Return the object of a name.

    Args:
        kind: a key of `BUILTIN`, such as ``"algorithm"``.
        name: short name, name of an entry point, or ``module:attribute``.

    Raises:
        RegistryError: the name is unknown or not to be trusted, or its module or attribute cannot be imported.
        ConfigError: its module raises an error when it is imported.
    """
    if name in _GIVEN.get():
        return _GIVEN.get()[name]
    if name.startswith(OBJECT):
        raise RegistryError(
            f"{kind} {name!r} was given in Python as an object, which no file holds: give the same object again, by"
            " gossamer.run(...) or gossamer.resume(DIR, model=..., data=..., partition=...)"
        )
    builtin = BUILTIN.get(kind, {})
    if is_builtin(kind, name):
        return _load(kind, name, builtin.get(name, name))
    if ":" in name and name[0] not in ".:":
        module = name.partition(":")[0]
        _require_trusted(f"{kind} {name!r}", module)
        _announce(f"{kind} {name!r}", module)
        found = _load(kind, name, name)
        defined = defined_as(found) if callable(found) else None
        if defined is not None and defined not in builtin.values():
            _require_trusted(f"{kind} {name!r}", defined.partition(":")[0])
        return found
    for point in points_of(kind):
        if point.name == name:
            _require_listed(f"{kind} {name!r}", point.value.partition(":")[0])
            _announce(f"{kind} {name!r}", point.value.partition(":")[0])
            return _load(kind, name, point.value)
    known = names(kind)
    raise RegistryError(
        f"unknown {kind} {name!r}{nearest(name, known)} (known: {', '.join(known)}; or give 'module:attribute')"
    )


def import_optional(what: str, module: str) -> ModuleType:
    """Import a module of a package that need not be there; if it is not an installed one, as plug-ins are.

    Args:
        what: what it is for, for the announcement, such as ``"tracker 'wandb'"``.

    Raises:
        ImportError: it is not there.
        RegistryError: it is not installed, and the user's own modules may not be imported.
    """
    files = files_of(module.partition(".")[0])
    if files and not any(map(is_installed, files)):
        _require_trusted(what, module)
        _announce(what, module)
    return importlib.import_module(module)


def load_object(target: str) -> Any:
    """Return what ``module:attribute`` stands for, which was not named by a configuration."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _load(kind: str, name: str, target: str) -> Any:
    with plugin_errors(f"{kind} {name!r}"):
        try:
            return load_object(target)
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"cannot load {kind} {name!r} from {target!r}: {error}") from error
        except ConfigError as error:  # such as of its traits
            raise ConfigError(f"{kind} {name!r}: {error}") from error


def _require_trusted(plugin: str, module: str) -> None:
    """Check that a configuration may name what `module` defines.

    Raises:
        RegistryError: it may not.
    """
    policy, top = _POLICY.get(), module.partition(".")[0]
    files = files_of(top)
    _require_listed(plugin, module)
    is_own = files is None or (bool(files) and top != "gossamer" and not any(map(is_installed, files)))
    is_allowed = policy.only is not None or policy.all or (policy.own and is_own)
    if is_allowed or _is_declared(top):  # which reads files of all packages that are installed
        return
    where = "of Python's library" if files == [] else f"in {files[0] if files else top!r}"
    if not is_own:
        raise RegistryError(
            f"{plugin} names code {where}, which is no plug-in of gossamer: if you trust the file that names it, say so"
            " with --trust (in Python: trust=True)"
        )
    raise RegistryError(f"{plugin} names code {where}, which this command imports only with --trust")


def _require_listed(plugin: str, module: str) -> None:
    """Check that a module is among those that may be imported, see `only`.

    Raises:
        RegistryError: it is not.
    """
    listed = _POLICY.get().only
    if listed is not None and not is_within(module, listed):
        raise RegistryError(
            f"{plugin} names code in {module!r}, which the policy here does not list: name something else, or list it"
        )


def _announce(plugin: str, module: str) -> None:
    top = module.partition(".")[0]
    files = files_of(top)
    _LOADED.update((file, top) for file in files or () if top != "gossamer")
    if files is not None:  # else the import fails
        _POLICY.get().announce(module, f"{plugin}: importing {module!r}" + (f" from {files[0]!r}" if files else ""))


def _is_declared(top: str) -> bool:
    """Say whether a package declares an entry point for gossamer."""
    points = (point for kind in BUILTIN for point in points_of(kind))
    return any(point.value.partition(":")[0].partition(".")[0] == top for point in points)
