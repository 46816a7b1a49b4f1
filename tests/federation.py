"""Small federations for tests: their configuration, how to run them, and what two of them are compared by."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.config.loading import with_value
from gossamer.experiment import Hooks, Run
from gossamer.profiling.spans import Spans
from gossamer.storage.runlog import read_events

CLOCKS = ("wall_seconds", "round_seconds", "phase_seconds")
OF_REAL_CLIENTS = ("_weighted", "_by_client")  # what only they tell
LEVELS = (0.25, 0.5, 1.0)
SYNTHETIC = {"name": "synthetic", "num_train": 150, "num_test": 40, "noise": 2.0}
MLP = {"name": "mlp", "hidden": [32]}
BASE: dict[str, Any] = {
    "name": "test",
    "rounds": 3,
    "workload": {"dataset": SYNTHETIC, "model": MLP},
    "clients": {"num": 8, "per_round": 5},  # 18 or 19 samples each: three batches, the last one short
    "train": {"lr": 0.1, "batch_size": 8},
    "algorithm": "fedavg",
    "checkpoint": {"every_seconds": 0},
    "engine": {"workers": 0, "modes": [{"capacity": 1.0}]},
}
SCAFFOLD = {"algorithm": "scaffold", "clients.per_round": 3}


def configure(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the base federation (FedAvg on 8 clients of synthetic images) with entries at dotted keys replaced."""
    data = BASE
    for key, value in (changes or {}).items():
        data = with_value(data, key.split("."), value)
    return data


def modes(levels: Iterable[float] = (1.0,), **fields: bool) -> dict[str, Any]:
    """Return the change that pins how every capacity is trained."""
    return {"engine.modes": [{"capacity": level, **fields} for level in levels]}


STACKED = {"stacked": True, "padding": True}
SINGLY = {"stacked": False, "padding": False}


def mixed(algorithm: str, levels: Sequence[float] = LEVELS, **fields: bool) -> dict[str, Any]:
    """Return the changes that make `algorithm` train sub-models of `levels`, in one pinned mode."""
    return {"algorithm": algorithm, "submodel": {"capacities": list(levels)}} | modes(levels, **fields)


def digest(params: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names and bytes of a model."""
    found = hashlib.sha256()
    for name, value in params.items():
        found.update(name.encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def without_clocks(metrics: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return metrics records without the fields that a clock fills, or that a simulation does not have."""
    left_out = (*CLOCKS, *OF_REAL_CLIENTS)
    return [{key: value for key, value in record.items() if not key.endswith(left_out)} for record in metrics]


def assert_same(run: Run, other: Run, but: Sequence[str] = ()) -> None:
    """Check that two runs ended with the same bits and logged the same, `but` for some metrics."""
    assert digest(run.params) == digest(other.params)
    found, expected = (
        [{key: value for key, value in record.items() if key not in but} for record in without_clocks(one.metrics)]
        for one in (run, other)
    )
    pairs = zip(found, expected, strict=False)
    others = [
        {key: (one.get(key), two.get(key)) for key in {**one, **two} if one.get(key) != two.get(key)}
        for one, two in pairs
    ]
    assert found == expected, others


def relative_error(params: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest distance of a parameter from the expected one, relative to the latter's norm."""
    assert list(params) == list(expected)
    return max(float((params[n].double() - e.double()).norm() / e.double().norm()) for n, e in expected.items())


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind, without kind and time."""
    found = [event for event in read_events(directory) if event["kind"] == kind]
    return [{key: value for key, value in event.items() if key not in ("kind", "time")} for event in found]


class Injected(Exception):
    """A failure that a test put in."""


def failing(name: str, started: bool, number: int, error: Callable[[str], Exception] = Injected) -> Hooks:
    """Return hooks that raise an error at the start or end of the `number`-th span `name`, counted from 1."""
    seen = 0

    def listen(span: str, starts: bool) -> None:
        """Raise the error at its time."""
        nonlocal seen
        seen += (span, starts) == (name, started)
        if (span, starts, seen) == (name, started, number):
            raise error(f"{name} {number}")

    def spans() -> Spans:
        """Return spans that are listened to."""
        made = Spans()
        made.listeners.append(listen)
        return made

    return Hooks(spans=spans)


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Poll until `condition` holds.

    Raises:
        TimeoutError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not hold within {seconds} s")
        time.sleep(0.01)


def environment() -> dict[str, str]:
    """Return the environment of a child process that finds the plug-ins, and computes with one thread."""
    here = Path(__file__).parent
    paths = [str(here), str(here / "plugins"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}
