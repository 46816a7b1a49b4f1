"""Codecs that see tensors: their bias and variance by formula, projections, and what they send packed into bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gossamer import rng
from gossamer.aggregate.codec_base import BaseCodec, Draws
from gossamer.aggregate.codecs import Bitmap, make_codec

SHAPES = ((6, 9), (6,), (4, 3, 2, 2), (4,), (5, 5), (3, 2))
D = sum(math.prod(shape) for shape in SHAPES)
INTEGERS = pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])


def compressed(codec: BaseCodec, rows: Tensor, seed: int = 1) -> Tensor:
    return codec.compress(rows, seed=seed, round=2, peers=np.arange(len(rows)))


def normal(num_rows: int, d: int = D, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_rows, d))).float()


def tensors_of(row: Tensor) -> Sequence[Tensor]:
    """Return the tensors of a row."""
    sizes = [math.prod(shape) for shape in SHAPES]
    return [part.view(shape) for part, shape in zip(row.split(sizes), SHAPES, strict=True)]


class TestIntegers:
    @INTEGERS
    def test_scale_of_each_tensor(self, name: str, levels: int) -> None:
        """Entries lie on the two neighbouring points of a grid from minus to plus the largest; that one is exact."""
        codec = make_codec(name).of_shapes(SHAPES)
        scales = torch.tensor([10.0**number for number in range(len(SHAPES))])
        row = torch.cat([part.flatten() * scale for part, scale in zip(tensors_of(normal(1)[0]), scales, strict=True)])
        for exact, found in zip(tensors_of(row), tensors_of(compressed(codec, row[None])[0]), strict=True):
            largest = exact.abs().max()
            level = found.double() * levels / largest
            assert torch.allclose(level, level.round(), atol=1e-4)
            assert bool(((level - exact.double() * levels / largest).abs() < 1 + 1e-4).all())
            assert bool((found == exact)[exact.abs() == largest].all())

    @INTEGERS
    def test_unbiased(self, name: str, levels: int) -> None:
        codec, row = make_codec(name).of_shapes(SHAPES), normal(1)
        found = compressed(codec, row.expand(4000, -1).contiguous())
        assert bool(((found.mean(0) - row[0]).abs() <= 5 * found.std(0) / math.sqrt(4000) + 1e-6).all())

    @INTEGERS
    @pytest.mark.parametrize("d", [2, 50, 2000])
    def test_variance_of_the_worst_row(self, name: str, levels: int, d: int) -> None:
        """It is the formula's: entries between 0 and a step, where their variance relative to the square is largest."""
        codec, c = make_codec(name), levels**2 / (d - 1)
        worst = math.sqrt(c * c + c) - c
        row = torch.full((1, d), worst, dtype=torch.float64)
        row[0, 0] = levels
        errors = ((compressed(codec, row.expand(400, -1).contiguous()) - row) ** 2).sum(1) / (row**2).sum()
        slack = 5 * float(errors.std()) / math.sqrt(400)
        assert float(errors.mean()) == pytest.approx(codec.omega(d), abs=slack + 1e-12)

    @INTEGERS
    @given(seed=st.integers(0, 1000), power=st.floats(0.2, 6))
    def test_variance_is_bounded(self, name: str, levels: int, seed: int, power: float) -> None:
        """By omega exactly: the variance of an entry is f (1 - f) steps^2, f being the fraction of its level."""
        row = normal(1, 40, seed)[0].double()
        row = row.sign() * row.abs() ** power
        level = row.abs() / row.abs().max() * levels
        variance = ((level - level.floor()) * (1 - level + level.floor())).sum() / (level**2).sum()
        assert float(variance) <= make_codec(name).omega(40) * (1 + 1e-9)

    @INTEGERS
    @given(seed=st.integers(0, 1000), power=st.floats(0.2, 6))
    def test_nearest_contracts(self, name: str, levels: int, seed: int, power: float) -> None:
        codec = make_codec({"name": name, "rounding": "nearest"}).of_shapes(SHAPES)
        row = normal(1, D, seed).double()
        row = row.sign() * row.abs() ** power
        error = ((compressed(codec, row) - row) ** 2).sum() / (row**2).sum()
        assert float(error) <= 1 - codec.contraction(D) + 1e-12

    @INTEGERS
    def test_nearest_is_tight(self, name: str, levels: int) -> None:
        codec, row = make_codec({"name": name, "rounding": "nearest"}), torch.full((1, 30), 0.5, dtype=torch.float64)
        row[0, 0] = levels
        error = ((compressed(codec, row) - row) ** 2).sum() / (row**2).sum()
        assert float(error) == pytest.approx(1 - codec.contraction(30))


class TestLowRank:
    CODEC = {"name": "low-rank", "rank": 2}

    def test_projects(self) -> None:
        """What is lost of a matrix is orthogonal to what is sent; what would not shrink is sent as it is."""
        rows = normal(3)
        found = compressed(make_codec(self.CODEC).of_shapes(SHAPES), rows)
        for row, decoded in zip(rows, found, strict=True):
            for number, (exact, sent) in enumerate(zip(tensors_of(row), tensors_of(decoded), strict=True)):
                if number in (0, 2, 4):
                    assert int(torch.linalg.matrix_rank(sent.reshape(len(sent), -1), rtol=1e-4)) == 2
                    assert abs(float((sent * (exact - sent)).sum())) < 1e-4
                    assert not torch.allclose(exact, sent, rtol=0.1)
                else:
                    assert torch.equal(exact, sent)

    def test_a_matrix_of_that_rank_is_kept(self) -> None:
        codec = make_codec(self.CODEC).of_shapes(((8, 12),))
        row = (normal(8, 2) @ normal(2, 12, 1)).reshape(1, -1)
        assert torch.allclose(compressed(codec, row), row, atol=1e-5)

    @pytest.mark.parametrize("iterations", [0, 2])
    def test_equal_singular_values_are_the_worst(self, iterations: int) -> None:
        codec = make_codec(self.CODEC | {"power_iterations": iterations}).of_shapes(((8, 8),))
        row = torch.linalg.qr(normal(8, 8)).Q.reshape(1, -1)
        kept = (compressed(codec, row.expand(800, -1).contiguous()) ** 2).sum(1) / 8
        assert codec.contraction(64) == 0.25
        assert float(kept.mean()) == pytest.approx(0.25, abs=5 * float(kept.std()) / math.sqrt(800) + 1e-5)

    @given(seed=st.integers(0, 1000), power=st.floats(0.0, 3))
    def test_contracts(self, seed: int, power: float) -> None:
        codec = make_codec(self.CODEC | {"power_iterations": 0}).of_shapes(((8, 10),))
        left, right = torch.linalg.qr(normal(8, 8, seed)).Q, torch.linalg.qr(normal(10, 8, seed + 1)).Q
        row = ((left * torch.arange(1, 9) ** -power) @ right.T).reshape(1, -1)
        kept = (compressed(codec, row.expand(200, -1).contiguous()) ** 2).sum(1) / (row**2).sum()
        slack = 5 * float(kept.std()) / math.sqrt(200)
        assert float(kept.mean()) >= codec.contraction(80) - slack - 1e-6

    def test_iterations_come_closer_to_the_best(self) -> None:
        row = normal(1, 400)
        best = float(torch.linalg.svdvals(row.view(20, 20))[2:].norm())
        errors = [
            float(
                (compressed(make_codec(self.CODEC | {"power_iterations": n}).of_shapes(((20, 20),)), row) - row).norm()
            )
            for n in (0, 1, 20)
        ]
        assert errors[0] > errors[1] > errors[2] >= best * (1 - 1e-5)
        assert errors[2] == pytest.approx(best, rel=0.01)

    def test_draws_have_addresses(self) -> None:
        codec, row = make_codec(self.CODEC).of_shapes(SHAPES), normal(1)
        assert torch.equal(compressed(codec, row), compressed(codec, row))
        assert not torch.equal(compressed(codec, row), compressed(codec, row, seed=2))


# ---- what is sent, packed

SPECS: list[Any] = [
    "none",
    {"name": "top-k", "share": 0.1},
    {"name": "random-k", "share": 0.1},
    {"name": "random-k", "share": 0.1, "unbiased": True},
    "sign",
    {"name": "quantise", "levels": 5},
    {"name": "quantise", "levels": 4, "unbiased": True},
    "int8",
    {"name": "int8", "rounding": "nearest"},
    "int4",
    {"name": "low-rank", "rank": 2},
]


def bits_of(levels: NDArray[Any], num_bits: int) -> bytes:
    """Pack whole numbers >= 0 of so many bits each."""
    each = (levels.astype(np.int64)[:, None] >> np.arange(num_bits)) & 1
    return np.packbits(each.astype(np.uint8)).tobytes()


def numbers_of(packed: bytes, num_bits: int, count: int) -> NDArray[np.int64]:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8))[: count * num_bits].reshape(count, num_bits)
    return bits.astype(np.int64) @ (1 << np.arange(num_bits))


def packed_and_read(spec: Any, decoded: Tensor) -> tuple[bytes, NDArray[Any]]:
    """Return a row's code as bytes, and what a receiver makes of these bytes."""
    name, row = spec if isinstance(spec, str) else spec["name"], decoded.numpy()
    if name == "none":
        return row.tobytes(), row
    if name in ("top-k", "random-k"):
        if name == "top-k":
            places = np.flatnonzero(row).astype("<u4")
        else:
            source = rng.generator(1, "codec-random-k", 2, 0, participant=0)
            places = source.choice(D, math.ceil(D / 10), replace=False, shuffle=False)
        read = np.zeros_like(row)
        read[places] = row[places]
        return (places.tobytes() if name == "top-k" else b"") + row[places].tobytes(), read
    if name == "sign":
        packed, scale = bits_of(row >= 0, 1), np.abs(row[:1])
        return packed + scale.tobytes(), np.where(numbers_of(packed, 1, D), scale, -scale)
    if name == "quantise":
        step = np.abs(row[row != 0]).min()
        levels, most = np.rint(row / step), spec["levels"]
        num_bits = math.ceil(math.log2(2 * most + 1))
        packed = bits_of(levels + most, num_bits)
        return packed + step.tobytes(), (numbers_of(packed, num_bits, D) - most) * step
    if name.startswith("int"):
        num_bits = int(name[3:])
        most, codes, scales = (1 << (num_bits - 1)) - 1, [], []
        for part in tensors_of(decoded):
            scales.append(part.abs().max().numpy())
            codes.append(np.rint(part.flatten().numpy() / scales[-1] * most) + most)
        packed, sizes = bits_of(np.concatenate(codes), num_bits), [math.prod(shape) for shape in SHAPES]
        read = (numbers_of(packed, num_bits, D) - most) / most * np.repeat(scales, sizes)
        return packed + b"".join(scale.tobytes() for scale in scales), read
    sent, parts = b"", []
    for number, part in enumerate(tensors_of(decoded)):
        matrix = part.reshape(len(part), -1).numpy()
        if number in (0, 2, 4):
            left, values, right = np.linalg.svd(matrix, full_matrices=False)
            factors = left[:, :2] * values[:2], right[:2]
            sent, matrix = sent + factors[0].tobytes() + factors[1].tobytes(), factors[0] @ factors[1]
        else:
            sent += matrix.tobytes()
        parts.append(matrix.flatten())
    return sent, np.concatenate(parts)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bytes_are_those_of_the_packed_code(spec: Any) -> None:
    codec = make_codec(spec).of_shapes(SHAPES)
    decoded = compressed(codec, normal(1))[0]
    packed, read = packed_and_read(spec, decoded)
    assert len(packed) == codec.row_bytes(D, 4)
    np.testing.assert_allclose(read, decoded.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes(spec: Any, dtype: torch.dtype) -> None:
    """They have the bytes that are counted, and who hears some of the rows decodes what their senders reckon with."""
    codec, peers = make_codec(spec).of_shapes(SHAPES), np.array([4, 0, 7])
    rows = normal(3).to(dtype)
    rows[1] = 0
    codes = codec.encode(rows, seed=1, round=2, phase=1, peers=peers)
    assert (codes.dtype, codes.shape) == (torch.uint8, (3, codec.row_bytes(D, dtype.itemsize)))
    expected = codec.compress(rows, seed=1, round=2, phase=1, peers=peers)
    for heard in ([2, 0], [1], []):
        draws = Draws(seed=1, round=2, phase=1, peers=peers[heard])
        assert torch.equal(codec.decode(codes[heard], D, dtype, **draws), expected[heard])


def test_codes_of_bits() -> None:
    mask, draws = torch.tensor([[1.0, 0, 0, 1, 1, 0, 1, 0, 1]]), Draws(seed=0, round=0, peers=np.array([0]))
    codes = Bitmap().encode(mask, **draws)
    assert codes.shape == (1, Bitmap().row_bytes(9, 4)) == (1, 2)
    assert torch.equal(Bitmap().decode(codes, 9, torch.float32, **draws), mask)
