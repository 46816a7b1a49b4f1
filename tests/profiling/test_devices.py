"""Device profiles: those that ship can be read, and what is wrong in one is told in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gossamer.errors import ConfigError
from gossamer.profiling import devices
from gossamer.profiling.devices import TAGS, device_names, read_device

SHIPPED = Path(devices.__file__).parent / "profiles"


@pytest.mark.parametrize("name", device_names())
def test_what_ships_can_be_read_and_names_its_sources(name: str) -> None:
    device = read_device(name)
    assert device.name == name
    every = [*device.numbers.values(), *(n for one in device.engines.values() for n in one.numbers.values())]
    assert all(number.lo <= number.value <= number.hi and number.source and number.tag in TAGS for number in every)


def test_the_four_devices_ship() -> None:
    assert device_names() == ["bluefield-2", "bluefield-3", "emulated", "host"]


def test_only_what_was_published_is_called_measured() -> None:
    measured = {
        (name, key)
        for name in device_names()
        for key, number in [
            *read_device(name).numbers.items(),
            *(pair for one in read_device(name).engines.values() for pair in one.numbers.items()),
        ]
        if number.tag == "measured"
    }
    assert measured == {("bluefield-2", "throughput")}


@pytest.mark.parametrize(
    ("key", "change", "told"),
    [
        ("cores", {"unit": None}, "cores has no unit: add it"),
        ("cores", {"source": ""}, "cores has no source"),
        ("cores", {"lo": 9}, "lo 9 <= value 8 <= hi 8 does not hold"),
        ("submit", {"unit": "ms"}, "submit is in 'ms', not 's': convert it"),
        ("submit", {"tag": "guessed"}, "unknown tag 'guessed'"),
        ("submit", {"value": "fast"}, "must be numbers"),
        ("submit", {"value": -1, "lo": -1}, "must be numbers >= 0"),
        ("memory_bandwidth", {"lo": 0}, "lo 0 must be above 0"),
        ("memory_bandwidth", {"colour": "red"}, "give value, lo, hi, unit, source, tag"),
    ],
)
def test_a_wrong_number_is_told(tmp_path: Path, key: str, change: dict[str, Any], told: str) -> None:
    data = yaml.safe_load((SHIPPED / "bluefield-2.yaml").read_text())
    data["numbers"][key] |= change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=told) as caught:
        read_device(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data["numbers"].pop("cores"), "lacks cores"),
        (lambda data: data["numbers"].update(coers=1), "unknown number 'coers'; did you mean 'cores'"),
        (lambda data: data.update(numbers=[1]), "numbers is no mapping"),
        (lambda data: data.update(engines=[1]), "engines is no mapping"),
        (lambda data: data.update(other=1), "has other keys than"),
        (lambda data: data["engines"]["deflate"].pop("kinds"), "give it kinds, directions and numbers"),
        (lambda data: data["engines"]["deflate"].update(directions=["up"]), r"directions \['up'\]"),
        (lambda data: data["engines"]["deflate"]["numbers"].pop("latency"), "lacks latency"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, change: Any, told: str) -> None:
    data = yaml.safe_load((SHIPPED / "bluefield-2.yaml").read_text())
    change(data)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=told):
        read_device(str(path))


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown device 'bluefield2'; did you mean 'bluefield-2'"):
        read_device("bluefield2")
