"""Capacities that cut little or nothing of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from federation import configure, events, mixed
from gossamer.errors import ConfigError
from gossamer.experiment import run


@pytest.mark.parametrize("algorithm", ["fedrolex", "fiarse", "fjord"])
@pytest.mark.parametrize("model", ["softmax", {"name": "user_modules:Recurrent", "kind": "LSTM"}])
def test_nothing_is_refused(model: Any, algorithm: str, tmp_path: Path) -> None:
    config = configure(mixed(algorithm) | {"workload.model": model})
    with pytest.raises(ConfigError) as caught:
        run(config, out=tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("submodel.capacities = [0.25, 0.5, 1.0] cut nothing of this model, none of whose dim")
    assert "set submodel.capacities to [1.0]" in message
    assert not (tmp_path / "run").exists()


def test_little_is_warned_of(tmp_path: Path) -> None:
    """A recurrent layer stays whole, and so does most of the model."""
    config = configure(mixed("fedrolex", [0.5, 1.0]) | {"workload.model": "user_modules:Branch", "rounds": 1})
    done = run(config, out=tmp_path / "run")
    (warning,) = events(done.directory, "warning")
    half, whole = events(done.directory, "variant")
    first, header, *rows = warning["message"].splitlines()
    assert first.startswith("submodel.capacities cut little of this model")
    assert header.split() == ["capacity", "parameters", "share", "bytes", "up", "FLOPs", "a", "sample"]
    for row, one in zip(rows, (half, whole), strict=True):
        share = one["num_parameters"] / whole["num_parameters"]
        numbers = (one["num_parameters"], one["bytes_up"], round(one["flops_per_sample"]))
        parameters, sent, flops = (f"{number:,}" for number in numbers)
        assert row.split() == [f"{one['capacity']:g}", parameters, f"{share:.1%}", sent, flops]
    assert half["num_parameters"] > 0.9 * whole["num_parameters"]


@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [32]}, {"name": "cnn", "width": 0.25}])
def test_enough_is_not(model: Any, tmp_path: Path) -> None:
    done = run(configure(mixed("fedrolex") | {"workload.model": model, "rounds": 1}), out=tmp_path / "run")
    assert events(done.directory, "warning") == []
