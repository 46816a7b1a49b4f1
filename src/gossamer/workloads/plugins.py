"""Plug-ins that workloads load by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gossamer.errors import ConfigError
from gossamer.registry import resolve_function

Spec = str | dict[str, Any]
COUNTS = "num_labels", "num_classes"  # names of parameters that take the number of classes


def plug_in(kind: str, spec: Any, where: str) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """Read ``"name"`` or ``{"name": ..., option: value}`` and find what the name stands for.

    Returns:
        the name, the object that it stands for, the other options.

    Raises:
        ConfigError: there is no name, or it is unknown.
    """
    if isinstance(spec, str):
        return spec, resolve_function(kind, spec), {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(
            f"{where} = {spec!r} has no name: give the name of a {kind}, or a mapping with the key 'name'"
        )
    name = spec["name"]
    return name, resolve_function(kind, name), {key: value for key, value in spec.items() if key != "name"}


def call_plug_in(function: Callable[..., Any], where: str, *args: Any, **params: Any) -> Any:
    """Call a plug-in, first checking that it takes these options.

    Raises:
        ConfigError: it does not.
    """
    try:
        inspect.signature(function).bind(*args, **params)
    except ValueError:  # some built-in types have no signature
        pass
    except TypeError as error:
        called = f"{len(args)} positional arguments" + (f" and {', '.join(params)}" if params else "")
        raise ConfigError(f"{where} does not take these options: {error}; it is called with {called}") from error
    return function(*args, **params)


def with_sizes(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a model's class or function as one that is called with (input_shape, num_labels, **options).

    It gets both as its first two parameters, unless it needs no value for the first one, or `options` has it: then it
    gets those of them for which it has a parameter ``input_shape``, ``num_labels`` or ``num_classes``.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some built-in types have no signature
        return function
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    places = [one for one in parameters if one.kind in kinds]
    takes_any = any(one.kind == inspect.Parameter.VAR_POSITIONAL for one in parameters)
    needs_first = places and places[0].default is inspect.Parameter.empty and places[0].name not in options
    if takes_any or (needs_first and len(places) > 1 and places[0].name not in COUNTS):
        return function
    names = {one.name for one in parameters} - set(options)

    def called(input_shape: tuple[int, ...], num_labels: int, **rest: Any) -> Any:
        """Call it with what it has parameters for."""
        sizes = {"input_shape": input_shape} | dict.fromkeys(COUNTS, num_labels)
        given = {name: value for name, value in sizes.items() if name in names} | rest
        return call_plug_in(function, "workload.model", **given)

    return called
