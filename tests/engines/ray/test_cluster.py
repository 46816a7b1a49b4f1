"""What is handed to actors: data go by their fields, and arrays are not copied."""

from __future__ import annotations

import os
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import assert_same, configure
from gossamer import run
from gossamer.engines.ray.cluster import get_or_end, pack, put_data, unpack
from gossamer.workloads.datasets import ImageData
from gossamer.workloads.texts import TextData


def images() -> ImageData:
    """Return a few random images, some of them in an unusual order in memory."""
    source = torch.Generator().manual_seed(0)
    many = torch.rand(20, 1, 8, 8, generator=source)
    return ImageData("few", many, torch.arange(20) % 4, many[:8].transpose(2, 3), torch.arange(8) % 4, 4)


class Ended(BaseException):
    """A process would have ended."""


def test_an_actor_whose_daemon_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray raises then is an error of a socket, which is none of the call's; other errors are left alone."""
    ray = pytest.importorskip("ray")

    def ends(code: int) -> None:
        """Stand for the end of the process."""
        raise Ended(code)

    def fails(error: Exception) -> Any:
        """Return a `ray.get` that raises."""

        def get(reference: Any) -> Any:
            """Raise it."""
            raise error

        return get

    monkeypatch.setattr(os, "_exit", ends)
    monkeypatch.setattr(ray, "get", fails(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(Ended, match="1"):
        get_or_end("reference")
    monkeypatch.setattr(ray, "get", fails(ray.exceptions.ObjectLostError("00", "", "")))
    with pytest.raises(ray.exceptions.ObjectLostError):
        get_or_end("reference")


class TestPack:
    def test_round_trip(self) -> None:
        data = images()
        found = unpack(*pack(data))
        assert type(found) is ImageData
        for name, value in vars(data).items():
            other = getattr(found, name)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value

    def test_arrays_are_not_copied(self) -> None:
        data = images()
        assert unpack(*pack(data)).train_images.data_ptr() == data.train_images.data_ptr()

    def test_text(self) -> None:
        data = TextData("two", " benort", ("one", "other"), ("to be", "or not"), ("be", "not"))
        assert vars(unpack(*pack(data))) == vars(data)


class Deaf:
    """A workload whose class takes no data."""

    data = images()


class Odd:
    """A workload whose data are no dataclass."""

    def __init__(self, data: tuple[int, ...] = (1, 2)) -> None:
        self.data = data


class Nested:
    """A workload whose data no other process can name."""

    def __init__(self, data: Any = None) -> None:
        self.data = data or make_dataclass("Hidden", [("x", int)], namespace={"__qualname__": "f.<locals>.Hidden"})(1)


@pytest.mark.parametrize("workload", [Deaf, Odd, Nested])
def test_data_that_every_actor_loads_for_itself(workload: type) -> None:
    assert put_data(workload()) == []


@pytest.mark.usefixtures("one_ray")
def test_actors_read_what_the_driver_loaded(tmp_path: Path) -> None:
    log = tmp_path / "loads"
    config = configure({"workload.dataset": {"name": "once:digits_once", "log": str(log)}, "rounds": 2})
    here = run(config, out=tmp_path / "local")
    assert log.read_text() == "loaded\n"
    there = run(config | {"engine": config["engine"] | {"name": "ray", "workers": 2}}, out=tmp_path / "ray")
    assert_same(there, here)
    assert log.read_text() == "loaded\nloaded\n"  # once more, by the driver alone
