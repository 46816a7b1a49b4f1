"""Mixing by blocks of rows and panels of columns: the same bits however it is cut, and what a loop over peers gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer import topology
from gossamer.errors import ConfigError
from gossamer.registry import BUILTIN
from gossamer.topology import BlockAverage, Matching, Mixing, Shift, streaming
from gossamer.topology.streaming import panels

GENERATED = sorted(set(BUILTIN["topology"]) - {"file"})


@contextmanager
def tiny(block_bytes: int, panel_bytes: int) -> Iterator[None]:
    """Cut even small states into many blocks and panels."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK_BYTES", "WALK_BYTES", "STREAM_BYTES"):
            patch.setattr(streaming, name, block_bytes)
        patch.setattr(streaming, "PANEL_BYTES", panel_bytes)
        patch.setattr(streaming, "MIN_PANEL_BYTES_PER_ROW", 64)
        yield


def random_state(rows: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, d))).to(dtype)


def in_panels(mixing: Mixing, x: torch.Tensor) -> torch.Tensor:
    """Mix panel by panel, as workers do."""
    mixed = torch.full_like(x, torch.nan)
    for one in panels(len(x), x.shape[1], x.itemsize):
        mixed[:, one] = mixing.apply(x[:, one].contiguous())
    return mixed


def slow_mix(mixing: Mixing, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Multiply by W entry by entry, in float64."""
    dense, rows = mixing.dense(), x.double().numpy()
    mixed = np.zeros_like(rows)
    for i, j in zip(*np.nonzero(dense), strict=True):
        mixed[i] += dense[i, j] * rows[j]
    return mixed


@given(
    name=st.sampled_from(GENERATED),
    n=st.integers(2, 30),
    d=st.integers(0, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**40),
    round=st.integers(0, 100),
    block_bytes=st.sampled_from([1, 200, 5_000]),
    panel_bytes=st.sampled_from([1, 2_000, 100_000]),
)
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_bits_depend_on_nothing_but_the_state(
    name: str,
    n: int,
    d: int,
    dtype: torch.dtype,
    seed: int,
    round: int,
    block_bytes: int,
    panel_bytes: int,
) -> None:
    try:
        mixing = topology.build(name, n, seed).mixing(round)
    except ConfigError:
        return
    x = random_state(n * mixing.rows_per_site, d, dtype, seed % 1000)
    before = x.clone()
    expected = mixing.apply(x)
    np.testing.assert_allclose(expected.numpy(), slow_mix(mixing, x), atol=1e-5 if dtype == torch.float32 else 1e-13)
    with tiny(block_bytes, panel_bytes):
        assert torch.equal(mixing.apply(x), expected)
        assert torch.equal(in_panels(mixing, x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("offset", [1, 5, 18, 19, 30, 36])
def test_a_shift_walks_from_senders_to_receivers(offset: int) -> None:
    x = random_state(37, 50, torch.float32, offset)
    with tiny(3 * 4 * 50, 100_000):
        assert torch.equal(Shift(37, (offset,), (0.3,)).apply(x), torch.lerp(x, x.roll(offset, 0), 0.3))


MIXINGS: list[Mixing] = [
    Shift(12, (5,), (0.3,)),
    Shift(12, (1, 4, 11), (0.2, 0.1, 0.3)),
    Matching(np.array([1, 0, 2, 5, 4, 3, 11, 7, 10, 9, 8, 6]), 0.4),
    BlockAverage(1, 12, 1),
    BlockAverage(1, 3, 4, 0.7),
    BlockAverage(6, 2, 1),
    topology.build("erdos-renyi", 12, seed=3, probability=0.5).mixing(0),
    topology.build("ceca", 12).mixing(2),
]


@pytest.mark.parametrize("mixing", MIXINGS, ids=lambda mixing: f"{mixing.kind}-{mixing.max_degree}")
class TestEachKind:
    def test_columns_do_not_meet(self, mixing: Mixing) -> None:
        """Any slice of columns is mixed to the same bits alone."""
        x = random_state(12 * mixing.rows_per_site, 53)
        whole = mixing.apply(x)
        for columns in (slice(0, 1), slice(1, 18), slice(50, 53), slice(7, 7)):
            assert torch.equal(mixing.apply(x[:, columns].contiguous()), whole[:, columns])

    def test_rows_are_those_of_the_whole(self, mixing: Mixing) -> None:
        x, step = random_state(12 * mixing.rows_per_site, 21), mixing.rows_per_site
        whole = mixing.apply(x)
        for lo in range(13):
            for hi in range(lo, 13):
                assert torch.equal(mixing.rows(x, lo, hi), whole[step * lo : step * hi])

    def test_a_constant_stays(self, mixing: Mixing) -> None:
        x = torch.full((12 * mixing.rows_per_site, 5), 3.0, dtype=torch.float64)
        np.testing.assert_allclose(mixing.apply(x).numpy(), 3.0, rtol=1e-15)


class TestTheory:
    @pytest.mark.parametrize(
        ("name", "n", "options"),
        [("one-peer-exp", 64, {}), ("base", 45, {"k": 2}), ("hyper-hypercube", 90, {"k": 4}), ("ceca", 61, {})],
    )
    def test_a_finite_time_cycle_ends_in_the_mean(self, name: str, n: int, options: dict[str, Any]) -> None:
        found = topology.build(name, n, 0, **options)
        start = random_state(n, 9, torch.float64)
        state = found.mixing(0).start(start).clone()
        for round in range(found.period or 0):
            mixing = found.mixing(round)
            with tiny(300, 600):
                state = in_panels(mixing, state)
        mean = np.broadcast_to(start.mean(0).numpy(), (n, 9))
        np.testing.assert_allclose(mixing.read(state).numpy(), mean, atol=1e-14)

    def test_pairwise_means_err_less_than_a_running_sum(self) -> None:
        """Rounding of a sum of n numbers by halves grows as log n (Higham, "Accuracy and stability", 4.2)."""
        n = 1 << 16
        x = torch.full((n, 1), 0.1)
        mixed = BlockAverage(1, n, 1).apply(x)
        assert abs(mixed.double() / float(np.float32(0.1)) - 1.0).max() <= 16 * 2.0**-24


@given(num_rows=st.integers(1, 10**7), d=st.integers(0, 10_000), itemsize=st.sampled_from([4, 8]))
def test_panels_cut_all_columns(num_rows: int, d: int, itemsize: int) -> None:
    found = panels(num_rows, d, itemsize)
    assert [column for one in found for column in range(one.start, one.stop)] == list(range(d))
    for one in found[:-1]:
        num_bytes = (one.stop - one.start) * itemsize
        assert num_bytes % 64 == 0
        assert num_bytes == 256 or num_bytes * num_rows <= 8 * 2**20
