"""Measured consensus: agrees with a loop, with rates and with periods."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from gossamer import rng, topology
from gossamer.errors import ConfigError


def test_agrees_with_a_loop_over_dense_matrices() -> None:
    found = topology.build("ou-equidyn", 12, seed=3, M=3)
    measured = topology.measure(found, 15, start_seed=7)
    x = rng.generator(7, "topology-start").standard_normal((12, 1))
    x -= x.mean()
    first = np.linalg.norm(x)
    for round in range(15):
        assert measured.distances[round] == pytest.approx(np.linalg.norm(x - x.mean()) / first, rel=1e-9)
        x = found.mixing(round).dense() @ x
    assert measured.rounds is None
    assert measured.rate == pytest.approx(measured.distances[15] ** (1 / 15))
    assert measured.mean_drift < 1e-14


@pytest.mark.parametrize("name", ["base", "ceca", "hyper-hypercube", "one-peer-exp", "complete"])
def test_finite_time_graphs_end_with_their_period(name: str) -> None:
    found = topology.build(name, 32)
    assert topology.measure(found).rounds == found.period


@pytest.mark.parametrize("name", ["ring", "grid", "static-exp", "d-equistatic", "star"])
def test_static_graphs_keep_to_their_rate(name: str) -> None:
    found = topology.build(name, 24)
    measured = topology.measure(found, 2000)
    rate = found.consensus_rate()
    assert (measured.distances[1:] <= measured.distances[:-1] * rate * (1 + 1e-9) + 1e-14).all()
    tail = (measured.distances[-1] / measured.distances[len(measured.distances) // 2]) ** (
        1 / (len(measured.distances) - 1 - len(measured.distances) // 2)
    )
    assert tail == pytest.approx(rate, rel=0.05)


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"rounds = 0 is below 1"):
        topology.measure(topology.build("ring", 5), 0)


def test_the_package_is_light() -> None:
    """Graph and number libraries, and torch, are loaded where they are used."""
    program = """
import json, sys
import gossamer.topology
gossamer.topology.build("od-equidyn", n=300).consensus_rate()
print(json.dumps([name for name in ("torch", "scipy", "networkx", "matplotlib", "typer") if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200)
    assert json.loads(done.stdout) == []
