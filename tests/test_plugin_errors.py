"""A plug-in that raises, wherever it is called: one sentence with its file and line, and what was done is committed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer import resume, run
from gossamer.errors import ConfigError, GossamerError
from gossamer.storage.checkpoint import Checkpoints

SOURCE = """
from gossamer.algorithms.decentralized.dsgd import DSGD
from gossamer.algorithms.federated import FedAvg
from gossamer.workloads.convex import LeastSquares
after = {}

def failing(name):
    def method(self, *arguments, **options):
        after[name] = after.get(name, 0) + 1
        if after[name] > NUMBER:
            raise KeyError(name)
        return getattr(super(type(self), self), name)(*arguments, **options)
    return method

class Clients(FedAvg):
    METHOD = failing("METHOD")

class Peers(DSGD):
    METHOD = failing("METHOD")

class Work(LeastSquares):
    METHOD = failing("METHOD")
"""
CLIENTS = {"clients": {"num": 4, "per_round": 2}}
PEERS = {"peers": {"num": 4, "topology": "ring"}, "algorithm": "dsgd"}


def configure(part: str, population: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """Return a run of which one part is a plug-in."""
    train = {"lr": 0.01, "steps": 1, "batch_size": 4}
    modes = {"stacked": False, "padding": False}
    config = {"rounds": 3, "workload": "least-squares", "train": train, "checkpoint": {"every_seconds": 0}}
    config |= {"engine": {"modes": modes, **engine}} | population
    return config | {"workload" if part == "Work" else "algorithm": f"plug_in_that_fails:{part}"}


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return what writes the plug-in, whose METHOD fails from a call on."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(method: str, number: int) -> Path:
        path = tmp_path / "plug_in_that_fails.py"
        path.write_text(SOURCE.replace("METHOD", method).replace("NUMBER", str(number)))
        return path

    yield write
    sys.modules.pop("plug_in_that_fails", None)


CASES = [
    *(("Clients", method, CLIENTS) for method in ("init", "begin", "end", "update")),
    *(("Peers", method, PEERS) for method in ("init", "end", "update")),
    *(("Work", method, CLIENTS) for method in ("init", "digest", "loss", "evaluate", "metrics")),
    *(("Work", method, PEERS) for method in ("batch", "metrics")),
]


@pytest.mark.parametrize(("part", "method", "population"), CASES)
def test_from_the_first_call_on(
    tmp_path: Path, plug_in: Any, part: str, method: str, population: dict[str, Any]
) -> None:
    path = plug_in(method, 0)
    with pytest.raises(ConfigError) as caught:
        run(configure(part, population, {"workers": 0}), out=tmp_path / "run")
    said = f"plug-in 'plug_in_that_fails' fails with KeyError: '{method}' ({path}, line 11): correct it"
    assert str(caught.value).startswith(said)
    assert isinstance(caught.value.__cause__, KeyError)
    assert not (tmp_path / "run").exists() or Checkpoints(tmp_path / "run/checkpoints").latest() is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_exception(tmp_path: Path, plug_in: Any, workers: int) -> None:
    """Of a class that a plug-in derives from BaseException."""
    path = plug_in("end", 0)
    source = path.read_text().replace("KeyError(name)", "Stop(name)")
    path.write_text(source + "\nclass Stop(BaseException): ...\n")
    with pytest.raises(GossamerError, match=r"fails? with Stop: end \(.*line 11\)|failed with Stop: end \(.*line 11\)"):
        run(configure("Clients", CLIENTS, {"workers": workers}), out=tmp_path / "run")


@pytest.mark.parametrize(("workers", "part"), [(0, "Clients"), (1, "Clients"), (0, "Work")])
def test_in_the_second_round(tmp_path: Path, plug_in: Any, workers: int, part: str) -> None:
    assert_resumable(tmp_path / "run", plug_in, {"workers": workers}, part)


@pytest.mark.usefixtures("one_ray")
def test_on_ray(tmp_path: Path, plug_in: Any) -> None:
    assert_resumable(tmp_path / "run", plug_in, {"name": "ray", "workers": 1}, "Clients")


def assert_resumable(out: Path, plug_in: Any, engine: dict[str, Any], part: str) -> None:
    """Check that the first round is committed, and that the run goes on once the plug-in is corrected."""
    method = "update" if part == "Clients" else "metrics"
    plug_in(method, 1)
    with pytest.raises(GossamerError, match=rf"fails with KeyError: '{method}' \(.*plug_in_that_fails.py, line 11\)"):
        run(configure(part, CLIENTS, engine), out=out)
    latest = Checkpoints(out / "checkpoints").latest()
    assert latest is not None
    assert (latest.round, latest.phase) in ((1, 0), (1, 1))  # the phase that was not evaluated counts
    sys.modules.pop("plug_in_that_fails")
    plug_in(method, 1000)
    assert [record["round"] for record in resume(out).metrics] == [1, 2, 3]
