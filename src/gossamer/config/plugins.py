"""How a configuration names a plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator


def as_mapping(value: Any) -> Any:
    """Read a bare name as ``{"name": name}``; other values as they are."""
    return {"name": value} if isinstance(value, str) else value


def _named(value: Any) -> Any:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError("give a name, or a mapping with a name and options")
    return dict(value)


Plugin = Annotated[dict[str, Any], BeforeValidator(_named), BeforeValidator(as_mapping)]
"""A plug-in: its name, or a mapping of ``name`` and the plug-in's own options."""
