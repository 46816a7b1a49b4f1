"""Frozen, strict models of options and traits, whose errors are one sentence."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator

from gossamer.errors import ConfigError, nearest

MAX_INTEGER = 1 << 63
MIN_FLOAT, MAX_FLOAT = 1e-30, 1e30  # in single precision, and for products of some of them in double precision


class Options(BaseModel):
    """Base class of every configuration section: immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant, which pydantic reads as 1 and 0, and numbers out of range."""
        found = _members(cls.model_fields[info.field_name].annotation) if info.field_name is not None else {Any}
        is_number = bool({int, float} & found) and not {bool, Any} & found
        if isinstance(value, bool) and is_number:
            raise ValueError("give a number, not true or false")
        numbers = list(value.values()) if is_number and isinstance(value, Mapping) else value
        for number in _numbers(numbers, is_number and str not in found):
            if isinstance(number, int) and abs(number) >= MAX_INTEGER:
                raise ValueError("give a number below 2^63")
            if isinstance(number, float) and number and not MIN_FLOAT <= abs(number) <= MAX_FLOAT:
                raise ValueError(f"give 0, or a number between {MIN_FLOAT:g} and {MAX_FLOAT:g} in size")
        return value


AnyOptions = TypeVar("AnyOptions", bound=Options)
Function = TypeVar("Function", bound=Callable[..., Any])

_BRANCH = re.compile(
    r"int|float|str|bool|none|\[key\]|\w+\[.*\]"
)  # how pydantic names the members of a union in a path


def takes(model: type[Options]) -> Callable[[Function], Function]:
    """State, as a decorator, the options of a plug-in that is a function, in its attribute ``Options``, as classes do.

    ``gossamer describe`` shows them; the function itself is left as it is.
    """

    def state(function: Function) -> Function:
        """State them."""
        vars(function)["Options"] = model
        return function

    return state


def parse_options(model: type[AnyOptions], data: Any, where: str) -> AnyOptions:
    """Validate `data` as `model`.

    Args:
        model: model of the section.
        data: mapping of keys to values.
        where: dotted path of the section, for errors.

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
    found = error.errors(include_url=False)
    first = found[0]
    if first["type"] == "missing":  # under another name, perhaps
        first = next((one for one in found if one["type"] == "extra_forbidden"), first)
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


def _numbers(value: Any, read_text: bool) -> Iterator[int | float]:
    """Yield the finite numbers of a value, or of a list of lists; pydantic refuses the others.

    Args:
        read_text: whether text is read as a number, as pydantic does: YAML takes 1e-3, without a dot, for text.
    """
    if isinstance(value, str) and read_text:
        text = value
        for kind in (float, int):
            with suppress(ValueError):
                value = kind(text)
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _numbers(one, read_text)
    elif isinstance(value, (int, float)) and (isinstance(value, int) or math.isfinite(value)):
        yield value


def _members(annotation: Any) -> set[Any]:
    """Return the types that an annotation is a union of."""
    return {annotation} | {member for part in get_args(annotation) for member in _members(part)}


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """Names of the fields of the section at `location` below `model`; numbers in it are indices of a list."""
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


@cache
def _strict(annotation: Any) -> TypeAdapter[Any]:
    """Return what checks that a value is of a type as it is."""
    return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


class Traits:
    """Base of frozen dataclasses in which plug-ins state what they can and cannot do; mappings become read-only.

    Attributes:
        hooks: ``{trait: optional method}``: the trait is true exactly where a class has that method.

    Raises (when made):
        ConfigError: an unknown name (with the nearest known one), or a value of the wrong type.
    """

    hooks: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, **given: Any) -> Self:
        """Refuse unknown names, before `__init__` would with a `TypeError`."""
        for name in given:
            if name not in cls.names():
                known = f"(known: {', '.join(cls.names())})"
                raise ConfigError(f"{cls.__name__} has no trait {name!r}{nearest(name, cls.names())} {known}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every value by its annotation."""
        hints = get_type_hints(type(self))
        for name in self.names():
            value = vars(self)[name]
            value = dict(value) if isinstance(value, Mapping) else value
            try:
                _strict(hints[name]).validate_python(value)
            except ValidationError as error:
                raise ConfigError(_sentence(error, BaseModel, f"{type(self).__name__}.{name}")) from None
            if isinstance(value, dict):
                object.__setattr__(self, name, MappingProxyType(value))

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """Return the names of all traits."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]


def check_traits(plugin: str, found: Any, kind: type[Traits], protocol: type) -> None:
    """Check that a plug-in's class, or an instance, states its traits, and that its methods agree with them.

    Args:
        plugin: name in errors, such as ``"algorithm 'mine:MyAlgorithm'"``.
        found: class, or instance.
        kind: the class that its traits are to have.
        protocol: protocol that it implements, whose attributes are no misspelt traits.

    Raises:
        ConfigError: there are no such traits, an attribute has the name of a trait or nearly so, a trait says
            otherwise than the methods, or a method takes other arguments than the protocol's.
    """
    if not hasattr(found, "traits") or not isinstance(found.traits, kind):
        given = f"traits = {found.traits!r}" if hasattr(found, "traits") else "no traits"
        raise ConfigError(f"{plugin} has {given}: state what it can do in an attribute traits = {kind.__name__}(...)")
    parts = found.__mro__ if isinstance(found, type) else (found, *type(found).__mro__)
    own = {name: value for part in reversed(parts) if part is not protocol for name, value in vars(part).items()}
    for name, value in own.items():
        if name in kind.names():
            raise ConfigError(
                f"{plugin} states {name!r} beside its traits, where it would have no effect: state it in traits ="
                f" {kind.__name__}({name}=...) alone"
            )
        known = kind.hooks.values() if callable(value) else kind.names()
        close = "" if name[0] == "_" or hasattr(protocol, name) else nearest(name, known, cutoff=0.85)
        if close:
            raise ConfigError(
                f"{plugin} has an attribute {name!r} that has no effect{close} (traits belong into traits ="
                f" {kind.__name__}(...); anything else needs a name less like theirs)"
            )
    for name, method in vars(protocol).items():
        if inspect.isfunction(method) and inspect.isfunction(own.get(name)) and name[0] != "_":
            arguments = list(inspect.signature(method).parameters)
            try:
                inspect.signature(own[name]).bind(*arguments)
            except TypeError as error:
                raise ConfigError(
                    f"{plugin} has a method {name!r} that cannot be called with ({', '.join(arguments)}), because of"
                    f" {error}: take these arguments"
                ) from None
    for trait, method in kind.hooks.items():
        stated = vars(found.traits)[trait]
        if stated != (method in own) and (stated or isinstance(found, type)):  # an instance may go without
            has = "a" if method in own else "no"
            raise ConfigError(
                f"{plugin} has {has} method {method!r}, but traits.{trait} is {stated}: set it to {not stated}, or"
                f" {'rename' if method in own else 'write'} the method"
            )
