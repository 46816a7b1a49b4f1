"""Plug-ins that workloads load by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gossamer.errors import ConfigError
from gossamer.registry import resolve_function

Spec = str | dict[str, Any]


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
