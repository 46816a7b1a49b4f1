"""Frozen, strict option models, and their errors as one clear sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from gossamer.errors import ConfigError, nearest


class Options(BaseModel):
    """Base of every configuration section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant; pydantic reads them as 1 and 0."""
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if not {bool, Any} & _members(annotation) and {int, float} & _members(annotation):
                raise ValueError("give a number, not true or false")
        return value


AnyOptions = TypeVar("AnyOptions", bound=Options)

_BRANCH = re.compile(r"int|float|str|bool|none|\w+\[.*\]")  # how pydantic names the members of a union in a path


def parse_options(model: type[AnyOptions], data: Any, where: str) -> AnyOptions:
    """Validate `data` as `model`; `where` is the dotted path of the section, named in errors.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing or a wrong value; one sentence.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or 'the configuration'} must be a mapping of keys to values, not {data!r}")
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(_sentence(error, model, where)) from None


def _sentence(error: ValidationError, model: type[BaseModel], where: str) -> str:
    first = error.errors(include_url=False)[0]
    location = [part for part in map(str, first["loc"]) if not _BRANCH.fullmatch(part)]
    path = ".".join([where, *location] if where else location)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"unknown key {path!r}{nearest(location[-1], known)} (known here: {', '.join(sorted(known))})"
    if first["type"] == "missing":
        return f"missing key {path!r}: add it"
    if first["type"] == "model_type":
        known = _fields_at(model, location)
        return f"{path} = {first['input']!r}: give a mapping of keys to values (known here: {', '.join(sorted(known))})"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], Mapping) and len(first["input"]) > 1:  # the message names the values that clash
        return f"{path or 'the configuration'}: {message[0].lower()}{message[1:]}"
    return f"{path or 'the configuration'} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def _members(annotation: Any) -> set[Any]:
    """Return the types that an annotation is a union of."""
    return {annotation} | {member for part in get_args(annotation) for member in _members(part)}


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the fields of the section at `location` below `model`; numbers in it are places in a list."""
    current: type[BaseModel] | None = model
    for part in location:
        if not part.isdigit():
            field = current.model_fields.get(part) if current else None
            current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the first model that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
