"""Codecs: against slow versions, what they promise to contract, what they cost, and that rows stand alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from gossamer import rng
from gossamer.aggregate.codecs import Codec, make_codec
from gossamer.errors import ConfigError

SPECS: list[Any] = [
    "none",
    {"name": "top-k", "share": 0.3},
    {"name": "top-k", "k": 2},
    {"name": "random-k", "share": 0.3},
    {"name": "random-k", "k": 2},
    "sign",
    {"name": "quantise", "levels": 1},
    {"name": "quantise", "levels": 8},
    "int8",
    {"name": "int4", "rounding": "nearest"},
    {"name": "low-rank", "rank": 2},
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def compressed(codec: Codec, rows: Tensor, seed: int = 1, round: int = 2, peers: Any = None) -> Tensor:
    return codec.compress(rows, seed=seed, round=round, peers=np.arange(len(rows)) if peers is None else peers)


def normal(num_rows: int, d: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, d)))


def slow(name: str, row: list[float], k: int) -> list[float]:
    """Return what top-k or sign make of a row, one entry at a time."""
    if name == "sign":
        mean = math.fsum(abs(value) for value in row) / len(row)
        return [mean if value >= 0 else -mean for value in row]
    largest = sorted(range(len(row)), key=lambda i: abs(row[i]))[-k:]
    return [row[i] if i in largest else 0.0 for i in range(len(row))]


@pytest.mark.parametrize(
    ("spec", "k"), [("sign", 0), ({"name": "top-k", "k": 3}, 3), ({"name": "top-k", "share": 0.4}, 4)]
)
@given(seed=st.integers(0, 1000), num_rows=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_slow_versions(spec: Any, k: int, seed: int, num_rows: int) -> None:
    rows = normal(num_rows, 10, seed)
    name = spec if isinstance(spec, str) else spec["name"]
    expected = [slow(name, row, k) for row in rows.tolist()]
    np.testing.assert_allclose(compressed(make_codec(spec), rows).numpy(), expected, rtol=1e-12)


@EVERY
class TestEveryCodec:
    @DTYPES
    def test_keeps_shape_type_and_input(self, spec: Any, dtype: torch.dtype) -> None:
        rows = normal(3, 9).to(dtype)
        before = rows.clone()
        found = compressed(make_codec(spec), rows)
        assert (found.shape, found.dtype) == (rows.shape, dtype)
        assert found.data_ptr() != rows.data_ptr()
        assert torch.equal(rows, before)

    @DTYPES
    def test_rows_of_zeros_and_tiny_numbers(self, spec: Any, dtype: torch.dtype) -> None:
        tiny = torch.finfo(dtype).smallest_normal
        rows = torch.tensor([[0.0] * 7, [tiny] * 7, [0.0] * 6 + [-tiny]], dtype=dtype)
        found = compressed(make_codec(spec), rows)
        assert not found[0].any()
        assert bool(found.isfinite().all())

    def test_scale_does_not_matter(self, spec: Any) -> None:
        """Not even where the squares of the numbers vanish in float32."""
        codec, rows = make_codec(spec), normal(3, 9).float()
        assert torch.equal(compressed(codec, rows * 2.0**-90), compressed(codec, rows) * 2.0**-90)

    def test_a_row_stands_alone(self, spec: Any) -> None:
        codec, rows, peers = make_codec(spec), normal(6, 11), np.array([5, 0, 9, 2**40, 7, 1])
        together = compressed(codec, rows, peers=peers)
        for chosen in ([0], [3], [4, 1], [5, 2, 0]):
            assert torch.equal(compressed(codec, rows[chosen], peers=peers[chosen]), together[chosen])

    def test_one_entry(self, spec: Any) -> None:
        """The smallest row is kept up to the factor that makes quantisation contract."""
        codec = make_codec(spec)
        found = compressed(codec, torch.tensor([[-3.0], [2.0]]))
        factor = codec.contraction(1)
        assert torch.allclose(found, torch.tensor([[-3.0], [2.0]]) * factor)

    @given(rows=arrays(np.float64, (3, 12), elements=st.floats(-1e4, 1e4, width=16)), seed=st.integers(0, 50))
    @settings(derandomize=True)
    def test_contracts(self, spec: Any, rows: Any, seed: int) -> None:
        """Always, or in the mean over what is drawn, within five standard deviations."""
        codec, random = make_codec(spec), any(name in str(spec) for name in ("random-k", "quantise", "int8"))
        for row in torch.from_numpy(rows):
            num_draws = 400 if random else 1
            found = compressed(codec, row.expand(num_draws, -1).contiguous(), seed=seed)
            errors = ((found - row) ** 2).sum(1)
            bound = (1 - codec.contraction(12)) * float((row**2).sum())
            slack = 5 * float(errors.std()) / math.sqrt(num_draws) if random else 0.0
            assert float(errors.mean()) <= bound * (1 + 1e-9) + slack
        assert 0 < codec.contraction(12) <= 1


@pytest.mark.parametrize("spec", [{"name": "random-k", "k": 3}, {"name": "quantise", "levels": 2}, "int4"], ids=str)
def test_draws_have_addresses(spec: Any) -> None:
    codec, row = make_codec(spec), normal(1, 40)
    reference = compressed(codec, row, seed=1, round=2, peers=np.array([3]))
    assert torch.equal(reference, compressed(codec, row, seed=1, round=2, peers=np.array([3])))
    for seed, round, peer in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        assert not torch.equal(reference, compressed(codec, row, seed=seed, round=round, peers=np.array([peer])))


class TestTopK:
    def test_equal_entries(self) -> None:
        found = compressed(make_codec({"name": "top-k", "k": 2}), torch.ones(2, 6))
        assert found.sum(1).tolist() == [2.0, 2.0]

    def test_more_than_there_are(self) -> None:
        codec, rows = make_codec({"name": "top-k", "k": 50}), normal(2, 6)
        assert torch.equal(compressed(codec, rows), rows)
        assert codec.contraction(6) == 1.0

    @pytest.mark.parametrize(("share", "d", "k"), [(0.1, 30, 3), (0.1, 31, 4), (0.07, 100, 7), (0.01, 5, 1), (1, 9, 9)])
    def test_share(self, share: float, d: int, k: int) -> None:
        found = compressed(make_codec({"name": "top-k", "share": share}), normal(4, d))
        assert (found != 0).sum(1).tolist() == [k] * 4


class TestRandomK:
    def test_every_entry_is_as_likely(self) -> None:
        """Of 4,000 rows; the bound is five standard deviations."""
        found = compressed(make_codec({"name": "random-k", "k": 3}), torch.ones(4000, 10))
        assert set(found.sum(1).tolist()) == {3.0}
        assert set(found.unique().tolist()) == {0.0, 1.0}
        assert float((found.mean(0) - 0.3).abs().max()) < 5 * math.sqrt(0.3 * 0.7 / 4000)

    def test_error_is_what_theory_says(self) -> None:
        row = normal(1, 8)
        found = compressed(make_codec({"name": "random-k", "k": 2}), row.expand(4000, -1).contiguous())
        error = float(((found - row) ** 2).sum(1).mean() / (row**2).sum())
        assert error == pytest.approx(1 - 2 / 8, abs=0.02)

    @pytest.mark.parametrize("spec", [{"name": "random-k", "k": 2}, {"name": "quantise", "levels": 2}], ids=str)
    def test_unbiased(self, spec: dict[str, Any]) -> None:
        """Scaled up, the mean is the row, and the variance of random-k is (d / k - 1) times its squared norm."""
        codec, row = make_codec(spec | {"unbiased": True}), normal(1, 8)
        found = compressed(codec, row.expand(8000, -1).contiguous())
        assert bool(((found.mean(0) - row[0]).abs() <= 5 * found.std(0) / math.sqrt(8000) + 1e-12).all())
        variance = float(((found - row) ** 2).sum(1).mean() / (row**2).sum())
        assert codec.is_unbiased
        assert not make_codec(spec).is_unbiased
        if spec["name"] == "random-k":
            assert variance == pytest.approx(codec.omega(8), rel=0.05)
            assert (codec.omega(8), codec.contraction(8)) == (3.0, 0.0)
        else:
            assert variance <= codec.omega(8) == 2.0**0.5


class TestSign:
    def test_a_bit_cannot_say_zero(self) -> None:
        assert compressed(make_codec("sign"), torch.tensor([[0.0, -3.0, 0.0]])).tolist() == [[1.0, -1.0, 1.0]]

    def test_error_is_what_theory_says(self) -> None:
        """``|v|^2 - |v|_1^2 / d``."""
        rows = normal(50, 30)
        found = ((compressed(make_codec("sign"), rows) - rows) ** 2).sum(1)
        expected = (rows**2).sum(1) - rows.abs().sum(1) ** 2 / 30
        assert torch.allclose(found, expected)


class TestQuantise:
    @pytest.mark.parametrize("levels", [1, 4, 100])
    def test_unbiased_before_it_is_scaled(self, levels: int) -> None:
        codec, row = make_codec({"name": "quantise", "levels": levels}), normal(1, 6)
        found = compressed(codec, row.expand(20_000, -1).contiguous()) / codec.contraction(6)
        deviation = found.std(0) / math.sqrt(len(found))
        assert bool(((found.mean(0) - row[0]).abs() <= 5 * deviation + 1e-12).all())

    @DTYPES
    @given(seed=st.integers(0, 500), levels=st.integers(1, 50))
    def test_neighbouring_points_of_the_grid(self, dtype: torch.dtype, seed: int, levels: int) -> None:
        codec, rows = make_codec({"name": "quantise", "levels": levels}), normal(3, 17, seed).to(dtype)
        found = compressed(codec, rows).double() / codec.contraction(17)
        norm = rows.double().norm(dim=1, keepdim=True)
        level, exact = found * levels / norm, rows.double() * levels / norm
        assert torch.allclose(level, level.round(), atol=1e-4)
        assert bool(((level - exact).abs() < 1 + 1e-4).all())
        assert bool((level * exact >= -1e-6).all())

    def test_no_level_above_the_highest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Adding the largest number below 1 to a level rounds up to the next one."""

        class Highest:
            def random(self, dtype: Any, out: Any) -> None:
                out[:] = np.nextafter(dtype(1), dtype(0))

        monkeypatch.setattr(rng, "generator", lambda *address, **more: Highest())
        codec, rows = make_codec({"name": "quantise", "levels": 8}), torch.tensor([[0.0, -3.0, 0.0]])
        assert torch.allclose(compressed(codec, rows), rows * codec.contraction(3))

    def test_variance_is_bounded(self) -> None:
        """Relative to the squared norm, by min(d / levels^2, sqrt(d) / levels)."""
        for levels, d, omega in [(1, 16, 4.0), (2, 16, 2.0), (8, 16, 0.25)]:
            codec = make_codec({"name": "quantise", "levels": levels})
            assert codec.contraction(d) == pytest.approx(1 / (1 + omega))
            row = normal(1, d)
            found = compressed(codec, row.expand(4000, -1).contiguous()) / codec.contraction(d)
            assert float(((found - row) ** 2).sum(1).mean() / (row**2).sum()) < omega


@pytest.mark.parametrize(
    ("spec", "d", "bytes_per_number", "expected"),
    [
        ("none", 1000, 4, 4000),
        ({"name": "top-k", "share": 0.01}, 1000, 4, 80),
        ({"name": "top-k", "k": 7}, 1000, 8, 84),
        ({"name": "random-k", "share": 0.01}, 1000, 4, 40),
        ("sign", 1000, 4, 129),
        ("sign", 1001, 8, 134),
        ({"name": "quantise", "levels": 1}, 1000, 4, 254),
        ({"name": "quantise", "levels": 127}, 1000, 4, 1004),
        ({"name": "quantise", "levels": 128}, 1000, 4, 1129),
    ],
)
def test_bytes(spec: Any, d: int, bytes_per_number: int, expected: int) -> None:
    assert make_codec(spec).row_bytes(d, bytes_per_number) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "topk",
            "codec.name = 'topk' is no codec; did you mean 'top-k'? (known: none, top-k, random-k, sign, quantise,"
            " int8, int4, low-rank)",
        ),
        ({}, "codec.name = None is no codec"),
        ({"name": "top-k"}, "give either share or k"),
        ({"name": "top-k", "k": 2, "share": 0.1}, "give either share or k"),
        ({"name": "top-k", "share": 0}, "codec.share = 0: input should be greater than 0"),
        ({"name": "random-k", "k": 0}, "codec.k = 0"),
        ({"name": "quantise"}, "missing key 'codec.levels'"),
        ({"name": "quantise", "levels": True}, "give a number, not true or false"),
        ({"name": "top-k", "shares": 0.1}, "unknown key 'codec.shares'; did you mean 'share'?"),
        ({"name": "sign", "k": 3}, "unknown key 'codec.k'"),
        ({"name": "int8", "rounding": "up"}, "codec.rounding = 'up': input should be 'stochastic' or 'nearest'"),
        ({"name": "low-rank", "rank": 0}, "codec.rank = 0"),
    ],
    ids=str,
)
def test_wrong_ones(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_codec(spec)
    assert message in str(caught.value)
