"""The configuration: YAML or a dict, checked into frozen models; an unknown key names the nearest known one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.config.plugins import as_mapping
from gossamer.config.schema import DIRECTORY_NAME, Config
from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.storage.strict_yaml import parse_yaml, read_yaml


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a configuration file (or take a dict) and apply ``key.path=value`` overrides, without checking it.

    Raises:
        ConfigError: the file is missing or is no YAML mapping, or an override is malformed.
    """
    if isinstance(source, Mapping):
        data: Any = dict(source)
    else:
        path = Path(source)
        data = read_yaml(path, "configuration")
        if not isinstance(data, dict):
            told = "but it is empty" if data is None else f"not {data!r:.80}"
            raise ConfigError(f"{str(path)!r} must hold a mapping of keys to values, {told}")
    given: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.path=value")
        if key in given:
            raise ConfigError(f"overrides {given[key]!r} and {override!r} set the same key: leave one of them out")
        given[key] = override
        value = parse_yaml(text, f"override {override!r}")
        if key == "seed" and data.get("seeds") is not None:
            raise ConfigError(f"override {override!r} has no effect beside seeds = {data['seeds']}: set seeds=[{text}]")
        data = with_value(data, key.split("."), value)
        if key == "seeds" and value is not None:
            data.pop("seed", None)
    return dict(data)


def with_value(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy of nested `data` in which the entry at `path` is `value`; a plug-in's bare name becomes a mapping.

    Raises:
        ConfigError: the path leads through a value that is no mapping.
    """
    if len(path) == 1:
        return {**data, path[0]: value}
    below = as_mapping(data.get(path[0], {}))
    if below is None:
        below = {}
    if not isinstance(below, Mapping):
        raise ConfigError(f"cannot set {'.'.join(path)!r}: {path[0]!r} is {below!r}, not a mapping")
    return {**data, path[0]: with_value(below, path[1:], value)}


def merge(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data` with nested `overrides`; dotted keys lead into sections, a new plug-in replaces the old one."""
    merged: dict[str, Any] = dict(data)
    for key, value in overrides.items():
        path, below = key.split("."), as_mapping(merged.get(key))
        if isinstance(value, Mapping) and len(path) == 1 and isinstance(below, Mapping) and "name" not in value:
            merged[key] = merge(below, value)
        else:
            merged = with_value(merged, path, value)
    return merged


def parse(data: Mapping[str, Any]) -> Config:
    """Check a configuration.

    Raises:
        ConfigError: the first thing that is wrong, in one sentence.
    """
    config = parse_options(Config, data, "")
    if config.seeds is not None and config.seed:
        raise ConfigError(f"seed = {config.seed} has no effect beside seeds = {config.seeds}: leave one of them out")
    if config.seeds is not None and (not config.seeds or len(set(config.seeds)) != len(config.seeds)):
        raise ConfigError(f"seeds = {config.seeds!r}: give a list of distinct seeds, or a single seed")
    if config.seeds is not None and min(config.seeds) < 0:
        raise ConfigError(f"seeds = {config.seeds!r}: seeds are >= 0")
    return config


def expand(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``{sub-directory: configuration}`` of the single runs behind `data`; the key is "" if there is one only.

    Every method's and seed's configuration is checked before anything runs.

    Raises:
        ConfigError: one of them is wrong.
    """
    config = parse(data)
    shared = {key: value for key, value in data.items() if key not in ("methods", "seeds")}
    methods = config.methods if config.methods is not None else {"": {}}
    if not methods:
        raise ConfigError("methods = {}: name at least one method, or leave the key out")
    runs: dict[str, dict[str, Any]] = {}
    for method, overrides in methods.items():
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"methods.{method} must be a mapping of overrides, not {overrides!r}")
        if reserved := {"name", "seed", "seeds", "methods"} & set(overrides):
            raise ConfigError(
                f"methods.{method} sets {sorted(reserved)}, which belong to the whole experiment: move them up"
            )
        if method and not re.fullmatch(DIRECTORY_NAME, method):
            raise ConfigError(
                f"methods.{method!r}: use letters, digits, '.', '_' and '-', 100 at most, because it names a directory"
            )
        for seed in config.seeds if config.seeds is not None else [config.seed]:
            single = merge(shared, overrides) | {"seed": seed}
            if method:
                single["name"] = method
            try:
                parse(single)
            except ConfigError as error:
                raise ConfigError(f"method {method!r}: {error}" if method else str(error)) from None
            parts = [method] if method else []
            parts += [f"seed-{seed}"] if config.seeds is not None else []
            runs["/".join(parts)] = single
    return runs
