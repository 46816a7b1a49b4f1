"""Strict options: what is accepted, and the one sentence that says what is wrong."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from gossamer.errors import ConfigError
from gossamer.options import Options, parse_options


class Inner(Options):
    size: int = Field(default=1, ge=1)
    kind: Literal["round", "square"] = "round"


class Outer(Options):
    rate: float
    inner: Inner = Inner()
    several: list[Inner] | Literal["auto"] = "auto"
    perhaps: Inner | None = None
    count: int | Literal["auto"] = "auto"
    free: dict[str, int] = {}

    @field_validator("rate")
    @classmethod
    def _not_seven(cls, value: float) -> float:
        if value == 7:
            raise ValueError("Seven is taken: choose another")
        return value


def error_of(data: Any, where: str = "") -> str:
    """Return the message about wrong data."""
    with pytest.raises(ConfigError) as caught:
        parse_options(Outer, data, where)
    assert caught.value.exit_code == 2
    shown = None if caught.value.__suppress_context__ else caught.value.__context__
    assert caught.value.__cause__ is shown is None, "pydantic's report would be shown, too"
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestAccepted:
    def test_values_and_defaults(self) -> None:
        options = parse_options(Outer, {"rate": 0.5, "several": [{"size": 2}], "free": {"int": 3}}, "")
        assert options == Outer(rate=0.5, several=[Inner(size=2)], free={"int": 3})
        assert options.inner.size == 1

    def test_frozen(self) -> None:
        options = parse_options(Outer, {"rate": 0.5}, "")
        with pytest.raises(ValidationError, match="frozen"):
            options.rate = 1.0  # type: ignore[misc]


class TestUnknownKeys:
    def test_nearest_is_named(self) -> None:
        message = error_of({"rate": 1, "raet": 2})
        assert message.startswith("unknown key 'raet'; did you mean 'rate'? (known here: count, free, inner,")

    def test_nothing_near(self) -> None:
        assert error_of({"rate": 1, "xyz": 2}).startswith("unknown key 'xyz' (known here: ")

    @pytest.mark.parametrize(
        ("data", "path"),
        [
            ({"inner": {"siez": 1}}, "inner.siez"),
            ({"perhaps": {"siez": 1}}, "perhaps.siez"),
            ({"several": [{}, {"siez": 1}]}, "several.1.siez"),
        ],
    )
    def test_in_sections(self, data: dict[str, Any], path: str) -> None:
        message = error_of({"rate": 1, **data}, "top")
        assert message == f"unknown key 'top.{path}'; did you mean 'size'? (known here: kind, size)"


class TestWrongValues:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "missing key 'rate': add it"),
            ({"rat": 1}, "unknown key 'rat'; did you mean 'rate'?"),
            ({"rate": "fast"}, "rate = 'fast': input should be a valid number"),
            ({"rate": float("nan")}, "rate = nan: input should be a finite number"),
            ({"rate": float("inf")}, "rate = inf: input should be a finite number"),
            ({"rate": 7}, "rate = 7: seven is taken: choose another"),
            ({"rate": 1, "inner": {"size": 0}}, "inner.size = 0: input should be greater than or equal to 1"),
            ({"rate": 1, "inner": {"kind": "oval"}}, "inner.kind = 'oval': input should be 'round' or 'square'"),
            ({"rate": 1, "count": "many"}, "count = 'many': input should be a valid integer"),
            ({"rate": 1, "several": [{"size": "x"}]}, "several.0.size = 'x': input should be a valid integer"),
            ({"rate": 1, "free": {"a": "x"}}, "free.a = 'x': input should be a valid integer"),
        ],
    )
    def test_path_value_and_reason(self, data: dict[str, Any], message: str) -> None:
        assert error_of(data).startswith(message)

    @pytest.mark.parametrize(
        "data", [{"rate": True}, {"rate": 1, "count": False}, {"rate": 1, "inner": {"size": True}}]
    )
    def test_truth_values_are_no_numbers(self, data: dict[str, Any]) -> None:
        assert "give a number, not true or false" in error_of(data)

    def test_section_is_named(self) -> None:
        assert error_of({}, "algorithm") == "missing key 'algorithm.rate': add it"
        assert error_of({"rate": []}, "algorithm").startswith("algorithm.rate = []: ")

    @pytest.mark.parametrize("data", [None, 3, "text", ["rate"]])
    def test_no_mapping(self, data: Any) -> None:
        assert error_of(data) == f"the configuration must be a mapping of keys to values, not {data!r}"
        assert error_of(data, "workload").startswith("workload must be a mapping")

    def test_keys_that_are_no_strings(self) -> None:
        assert "keys should be strings" in error_of({"rate": 1, 2: 3})
