"""Models, data and partitions that are given in Python as objects, in the place of names.

An object gets a name for the configuration: ``module:name`` if it is a class or a function that other processes can
import, else ``object:`` and a name, with a digest by which a resume notices another object.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.errors import ConfigError, DataError
from gossamer.registry import OBJECT
from gossamer.registry.origins import importable_as
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.digests import digest_of
from gossamer.workloads.given_data import KINDS, read_data
from gossamer.workloads.given_partitions import INDICES, PARTIAL, read_file, read_lists
from gossamer.workloads.partitions import Partition
from gossamer.workloads.plugins import with_sizes


@dataclass(frozen=True)
class Given:
    """An object, and what stands for it in a configuration.

    Attributes:
        spec: name, and digest if nothing but this process knows the object; or what was given, if that is a name.
        plug_in: what the name stands for; None: what it always stands for.
    """

    spec: Any
    plug_in: Callable[..., Any] | None = None

    @property
    def objects(self) -> dict[str, Any]:
        """``{name: plug-in}``, for `gossamer.registry.giving`."""
        return {} if self.plug_in is None else {self.spec["name"]: self.plug_in}


def given_model(model: Any) -> Given:
    """Return what stands for a model.

    Args:
        model: a name, or a mapping with one; a `torch.nn.Module` class, or a function that returns a module, which are
            called as `with_sizes` says; or a module, whose parameters the run starts from.

    Raises:
        ConfigError: it is something else.
    """
    if _is_named(model):
        return Given(model)
    if isinstance(model, nn.Module):
        unsized = [name for name, one in model.named_parameters() if nn.parameter.is_lazy(one)]
        if unsized:
            raise ConfigError(f"model: parameter {unsized[0]!r} has no size before the first batch: give its size")
        digest = digest_of(_source_of(type(model)), str(model), dict(model.state_dict()))
        return _object("model", type(model).__name__, digest, lambda *sizes: _copy_of(model))
    if not callable(model):
        raise ConfigError(
            f"model is a {type(model).__name__}: give a name, a torch.nn.Module class, a function that returns a"
            " module, or a module"
        )
    if importable := _importable(model):
        return importable

    def make(input_shape: tuple[int, ...], num_labels: int, **options: Any) -> Any:
        """Make the model."""
        return with_sizes(model, options)(input_shape, num_labels, **options)

    return _object("model", _name_of(model), digest_of(_source_of(model)), make)


def given_data(data: Any) -> Given:
    """Return what stands for data, which are read and checked now.

    Args:
        data: a name, or a mapping with one; a function that returns an `ImageData`, or such; or see `read_data`.

    Raises:
        DataError: they are something else, or malformed.
    """
    if _is_named(data):
        return Given(data)
    if inspect.isroutine(data) and (importable := _importable(data)):
        return importable
    found = data({}) if inspect.isroutine(data) else data
    if isinstance(found, type):
        raise DataError(f"data is the class {found.__name__}: {KINDS}")
    found = found if isinstance(found, ImageData) else read_data(found)
    return _object("data", "data", digest_of(found), lambda: found)


def given_partition(partition: Any) -> tuple[Given, int | None]:
    """Return what stands for a partition, and its number of clients if that is known.

    Args:
        partition: a name, or a mapping with one; a function, see `gossamer.workloads.partitions`; a `Partition`; or the
            sample numbers of each client, see `read_lists`, also as ``{"indices": ..., "partial": True}``.

    Raises:
        DataError: it is something else.
    """
    if _is_named(partition):
        if isinstance(partition, str) or partition["name"] != "file" or "path" not in partition:
            return Given(partition), None
        path = Path(partition["path"])
        return Given(partition), len(read_lists(str(path), read_file(path)).offsets) - 1
    if callable(partition):
        found = _importable(partition)
        return found or _object("partition", _name_of(partition), digest_of(_source_of(partition)), partition), None
    divided = partition
    if isinstance(partition, Mapping) and INDICES in partition:
        if more := set(partition) - {INDICES, PARTIAL}:
            raise DataError(f"partition has the keys {sorted(map(str, more))}: give {INDICES!r} and {PARTIAL!r} alone")
        divided = read_lists("object:partition", partition[INDICES], bool(partition.get(PARTIAL, False)))
    elif not isinstance(partition, Partition):
        divided = read_lists("object:partition", partition)
    digest = digest_of(divided.is_partial, divided)
    return _object("partition", "partition", digest, lambda *_: divided), len(divided.offsets) - 1


def _object(what: str, name: str, digest: str, function: Callable[..., Any]) -> Given:
    """Return what stands for an object that nothing but this process knows, and that is made by `function`.

    Args:
        what: argument by which it was given: model, data or partition.
    """

    def called(*given: Any, **options: Any) -> Any:
        """Return the object, if it is the one that a configuration means."""
        args = list(given)
        if what == "data":  # whose options come as a mapping
            options = dict(args.pop())
        meant = options.pop("digest", digest)
        if meant != digest:
            raise ConfigError(
                f"{what} {OBJECT + name!r} is not the object that the run began with (its digest is {digest}, not"
                f" {meant}): give the same one again"
            )
        try:
            inspect.signature(function).bind(*args, **options)
        except TypeError:
            raise ConfigError(
                f"{what} {OBJECT + name!r} takes no option {', '.join(options)}: leave it out, or give a name or a"
                " function instead of an object"
            ) from None
        return function(*args, **options)

    return Given({"name": OBJECT + name, "digest": digest}, called)


def _is_named(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, Mapping) and isinstance(given.get("name"), str))


def _importable(function: Any) -> Given | None:
    """Return what stands for a class or a function that other processes can import; None: they cannot."""
    name = importable_as(function)
    return None if name is None else Given({"name": name}, function)


def _name_of(function: Any) -> str:
    return str(function.__name__) if hasattr(function, "__name__") else type(function).__name__


def _copy_of(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module).cpu()
    except (RuntimeError, TypeError) as error:
        name = type(module).__name__
        raise ConfigError(f"model {name!r} cannot be copied ({error}): give its class, or a function") from error


def _source_of(found: Any) -> Any:
    """Return what tells a class or a function from others: its text, and what it was made with."""
    if isinstance(found, functools.partial):
        return _source_of(found.func), found.args, found.keywords
    classes: list[type] = []
    if isinstance(found, type):
        classes += [one for one in found.__mro__ if one.__module__.partition(".")[0] != "torch"]
    functions = [each for one in classes for each in vars(one).values()] if classes else [found]
    return [_source_of_function(each) for each in functions if inspect.isfunction(each)]


def _source_of_function(function: Any) -> Any:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt
        text = function.__code__.co_code.hex()
    cells = function.__closure__ or ()
    return text, function.__defaults__, [cell.cell_contents for cell in cells]
