"""Options as text: name, type, default and what a docstring's "Attributes" says of each."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gossamer.config.plugins import as_mapping

ENTRY = re.compile(r" {0,4}(\w+(?:, \w+)*): (.*)")
INLINE = re.compile(r"(?:Attributes: |^Options of [^;.]+; )(\w+: .+)", re.DOTALL)
WORDS = {"None": "null", "True": "true", "False": "false"}  # as YAML writes them
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Option:
    """One option of a plug-in, or key of a section.

    Attributes:
        name: key; that of a mapping within another one with dots.
        type: what it may be.
        default: value where it is left out, as in a file; "" where it must be given, or has keys of its own.
        required: whether it must be given.
        about: what it does; "" where that is not documented.
    """

    name: str
    type: str
    default: str
    required: bool
    about: str


def options_of(model: type[BaseModel], prefix: str = "") -> tuple[Option, ...]:
    """Describe the fields of a model in their order, and below each mapping its own.

    Args:
        prefix: what stands before each name, such as ``"train."``.
    """
    return tuple(_options(model, prefix))


def _options(model: type[BaseModel], prefix: str) -> Iterator[Option]:
    docs: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        docs |= attributes(inspect.cleandoc(parent.__doc__ or ""))
    for name, info in model.model_fields.items():
        inner, about = inner_model(info.annotation), info.description or docs.get(name, "")
        default = "" if inner is not None and isinstance(info.default, BaseModel) else _default(info)
        yield Option(f"{prefix}{name}", _field_type(info), default, info.is_required(), as_yaml(about))
        if inner is not None:
            yield from _options(inner, f"{prefix}{name}.")


def attributes(doc: str) -> dict[str, str]:
    """Return ``{name: text}`` of the "Attributes", or else "Args", of a docstring without indentation."""
    found: dict[str, str] = {}
    inline = INLINE.search(doc.split("\n\n")[0])
    if inline is not None:
        parts = (part.partition(": ") for part in re.split(r"; (?=\w+: )", " ".join(inline[1].split())))
        return {name: text for name, _, text in parts}
    block = next((doc.partition(title)[2] for title in ("Attributes:\n", "Args:\n") if title in doc), "")
    names: list[str] = []
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        entry = ENTRY.fullmatch(line)
        if entry is not None:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip() and names:
            found |= dict.fromkeys(names, f"{found[names[0]]} {line.strip()}")
    return found


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an option is, or a list of which it is, if it is a mapping of known keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := inner_model(part)) is not None), None)


def _field_type(info: FieldInfo) -> str:
    plugin = any(isinstance(one, BeforeValidator) and one.func is as_mapping for one in info.metadata)
    if plugin and inner_model(info.annotation) is None:
        return "name, or mapping with a name"
    return type_name(info.annotation, info.metadata)


def type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type as text, such as ``"int >= 1 or null"``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    limits = [(sign, getattr(one, name)) for one in metadata for name, sign in BOUNDS.items() if hasattr(one, name)]
    bounds = " and ".join(f"{sign} {limit:g}" for sign, limit in limits)
    if origin is typing.Annotated:
        return type_name(parts[0], [*parts[1:], *metadata])
    if origin is Literal:
        return " or ".join(f'"{one}"' for one in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(part, () if part is type(None) else metadata) for part in parts))
    if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        number = f"{len(parts)} " if origin is tuple and ... not in parts else ""
        return f"list of {number}{type_name(parts[0])}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "mapping" if Any in parts else f"mapping of {type_name(parts[0])} to {type_name(parts[1])}"
    plain = {type(None): "null", Path: "path", Any: "anything", str: "str", inspect.Parameter.empty: "anything"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    named = plain.get(annotation) or (annotation.__name__ if isinstance(annotation, type) else str(annotation))
    return f"{named} {bounds}" if bounds and annotation in (int, float) else named


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return default_text(info.get_default(call_default_factory=True, validated_data={}))
    return "" if info.default is PydanticUndefined else default_text(info.default)


def default_text(value: Any) -> str:
    """Return a default as a file would give it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {default_text(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(default_text, value)) + "]"
    return WORDS.get(str(value), str(value)) if not isinstance(value, float) else f"{value:g}"


def as_yaml(text: str) -> str:
    """Return a sentence with None, True and False as YAML writes them."""
    return re.sub(r"\b(None|True|False)\b", lambda word: WORDS[word[0]], text)
