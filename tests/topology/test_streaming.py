"""Mixing into another array and in place: the same bits as `Mixing.apply`, and what a loop over peers gives."""

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
from gossamer.topology.streaming import mix, mix_

GENERATED = sorted(set(BUILTIN["topology"]) - {"file"})
RING = Shift(4, (1, 3), (0.25, 0.25))


@contextmanager
def tiny(block_bytes: int, panel_bytes: int) -> Iterator[None]:
    """Cut even small states into many blocks and streaming."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK_BYTES", "WALK_BYTES", "STREAM_BYTES"):
            patch.setattr(streaming, name, block_bytes)
        patch.setattr(streaming, "PANEL_BYTES", panel_bytes)
        patch.setattr(streaming, "MIN_PANEL_BYTES_PER_ROW", 64)
        yield


def random_state(rows: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, d))).to(dtype)


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
    threads=st.integers(1, 4),
    block_bytes=st.sampled_from([1, 200, 5_000]),
    panel_bytes=st.sampled_from([1, 2_000, 100_000]),
)
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
def test_bits_depend_on_nothing_but_the_state(
    name: str,
    n: int,
    d: int,
    dtype: torch.dtype,
    seed: int,
    round: int,
    threads: int,
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
        out = torch.full_like(x, torch.nan)
        mix(mixing, x, out, threads)
        assert torch.equal(out, expected)
        assert torch.equal(x, before)
        mix_(mixing, x, threads=threads)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("offset", [1, 5, 18, 19, 30, 36])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_shift_walks_in_steps_that_threads_share(offset: int, threads: int) -> None:
    shift = Shift(37, (offset,), (0.3,))
    x = random_state(37, 20_011, torch.float32, offset)  # rows long enough for torch to share
    out = torch.full_like(x, torch.nan)
    with tiny(3 * 4 * 20_011, 100_000):
        mix(shift, x, out, threads)
        assert torch.equal(out, torch.lerp(x, x.roll(offset, 0), 0.3))
        mix_(shift, x, threads=threads)
    assert torch.equal(x, out)


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
        """Any slice of columns is mixed to the same bits alone, in place within a wider array or not."""
        x = random_state(12 * mixing.rows_per_site, 53)
        whole = mixing.apply(x)
        for columns in (slice(0, 1), slice(1, 18), slice(50, 53), slice(7, 7)):
            assert torch.equal(mixing.apply(x[:, columns].contiguous()), whole[:, columns])
            mixed = x.clone()
            mix_(mixing, mixed, columns=columns, threads=2)
            assert torch.equal(mixed[:, columns], whole[:, columns])
            mixed[:, columns] = x[:, columns]
            assert torch.equal(mixed, x)

    def test_rows_are_those_of_the_whole(self, mixing: Mixing) -> None:
        x, step = random_state(12 * mixing.rows_per_site, 21), mixing.rows_per_site
        whole = mixing.apply(x)
        for lo in range(13):
            for hi in range(lo, 13):
                assert torch.equal(mixing.rows(x, lo, hi), whole[step * lo : step * hi])

    def test_a_slice_of_a_wider_array(self, mixing: Mixing) -> None:
        wide = random_state(12 * mixing.rows_per_site, 40)
        before, inner = wide.clone(), wide[:, 3:24]
        expected = mixing.apply(inner)
        with tiny(100, 100):
            mix_(mixing, inner, threads=3)
        assert torch.equal(wide[:, 3:24], expected)
        wide[:, 3:24] = before[:, 3:24]
        assert torch.equal(wide, before)

    def test_a_constant_stays(self, mixing: Mixing) -> None:
        x = torch.full((12 * mixing.rows_per_site, 5), 3.0, dtype=torch.float64)
        mix_(mixing, x)
        np.testing.assert_allclose(x.numpy(), 3.0, rtol=1e-15)


class TestTheory:
    @pytest.mark.parametrize(
        ("name", "n", "options"),
        [("one-peer-exp", 64, {}), ("base", 45, {"k": 2}), ("hyper-hypercube", 90, {"k": 4}), ("ceca", 61, {})],
    )
    def test_a_finite_time_cycle_ends_in_the_mean(self, name: str, n: int, options: dict[str, Any]) -> None:
        found = topology.build(name, n, 0, **options)
        start = random_state(n, 9, torch.float64)
        inside = found.mixing(0).start(start).clone()
        source = inside.clone()
        for round in range(found.period or 0):
            mixing = found.mixing(round)
            with tiny(300, 600):
                mix_(mixing, inside, threads=2)
                target = torch.empty_like(source)
                mix(mixing, source, target, threads=2)
            source = target
            assert torch.equal(inside, source)
        mean = np.broadcast_to(start.mean(0).numpy(), (n, 9))
        np.testing.assert_allclose(mixing.read(inside).numpy(), mean, atol=1e-14)

    def test_pairwise_means_err_less_than_a_running_sum(self) -> None:
        """Rounding of a sum of n numbers by halves grows as log n (Higham, "Accuracy and stability", 4.2)."""
        n = 1 << 16
        x = torch.full((n, 1), 0.1)
        mix_(BlockAverage(1, n, 1), x)
        assert abs(x.double() / float(np.float32(0.1)) - 1.0).max() <= 16 * 2.0**-24


@given(num_rows=st.integers(1, 10**7), d=st.integers(0, 10_000), itemsize=st.sampled_from([4, 8]))
@settings(deadline=None)
def test_panels_cut_all_columns(num_rows: int, d: int, itemsize: int) -> None:
    found = streaming.panels(num_rows, d, itemsize)
    assert [column for one in found for column in range(one.start, one.stop)] == list(range(d))
    for one in found[:-1]:
        num_bytes = (one.stop - one.start) * itemsize
        assert num_bytes % 64 == 0
        assert num_bytes == 256 or num_bytes * num_rows <= 8 * 2**20


class Foreign(Mixing):
    """A mixing of somebody else's, which can only `apply` and give `rows`."""

    kind = "foreign"

    def __init__(self, inner: Mixing) -> None:
        self.inner, self.n = inner, inner.n

    def _apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.apply(x)

    def _rows(self, x: torch.Tensor, lo: int, hi: int) -> torch.Tensor:
        return self.inner.rows(x, lo, hi)


Foreign.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def test_a_foreign_mixing() -> None:
    mixing = Foreign(RING)
    x = random_state(4, 7)
    expected, out = RING.apply(x), torch.empty_like(x)
    mix(mixing, x, out, threads=3)
    mix_(mixing, x, threads=2)
    assert torch.equal(out, expected)
    assert torch.equal(x, expected)


class TestJointStates:
    def test_by_peer_and_flat_are_the_same_memory(self) -> None:
        mixing = topology.build("ceca", 6).mixing(1)
        x = random_state(12, 4)
        expected = mixing.apply(x)
        out = torch.empty(6, 2, 4)
        mix(mixing, x, out.view(12, 4), threads=2)
        assert torch.equal(out.view(12, 4), expected)
        mix_(mixing, x.view(6, 2, 4))
        assert torch.equal(x, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("x", "out", "message"),
        [
            (torch.zeros(4, 2), torch.zeros(4, 3), r"cannot mix \(4, 2\) torch.float32 into \(4, 3\)"),
            (torch.zeros(4, 2), torch.zeros(4, 2).double(), "into .* torch.float64: give the like"),
            (torch.zeros(5, 2), torch.zeros(5, 2), r"cannot mix \(5, 2\) torch.float32: give 4 rows"),
            (torch.zeros(4), torch.zeros(4), "give 4 rows"),
            (torch.zeros(4, 2).half(), torch.zeros(4, 2).half(), "torch.float16: give 4 rows of float32"),
            (torch.zeros(4, 4)[:, :2], torch.zeros(4, 2), r"strides \(4, 1\) into \(2, 1\): give contiguous arrays"),
        ],
        ids=["shape", "type", "rows", "vector", "float16", "strides"],
    )
    def test_arrays_that_do_not_fit(self, x: torch.Tensor, out: torch.Tensor, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            mix(RING, x, out)

    def test_shared_memory(self) -> None:
        x = torch.zeros(6, 2)
        for out in (x[:4], x[2:]):
            with pytest.raises(ConfigError, match="into its own memory: use mix_"):
                mix(RING, x[:4], out)

    def test_columns_apart(self) -> None:
        with pytest.raises(ConfigError, match=r"strides \(1, 4\) on cpu in place: give rows of one array"):
            mix_(RING, torch.zeros(3, 4).T)

    def test_threads(self) -> None:
        with pytest.raises(ConfigError, match="threads = 0 is below 1"):
            mix_(RING, torch.zeros(4, 1), threads=0)

    def test_a_thread_that_fails_is_heard(self) -> None:
        broken = Foreign(topology.build("ring", 6).mixing(0))
        broken.n = 4
        with pytest.raises(ConfigError, match="give 6 rows"):
            mix(broken, torch.zeros(4, 2), torch.zeros(4, 2), threads=2)
