"""Counter-based randomness: known answers, addresses, uniformity."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossamer import rng

PROGRAM = """
import numpy as np
from gossamer import rng
print(rng.stable_hash(7, "purpose", 3, "x"))
print(rng.generator(7, "purpose", 1, 2, 3, 4).integers(2**63))
print(rng.bits(7, "purpose", 1, 2, np.array([5]), 1)[0, 0])
"""
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


def chi_square(values: NDArray[Any], num_cells: int) -> float:
    """Pearson's statistic of numbers that should be uniform over ``range(num_cells)``."""
    counts = np.bincount(values, minlength=num_cells)
    assert len(counts) == num_cells
    expected = len(values) / num_cells
    return float(((counts - expected) ** 2 / expected).sum())


def clients(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


class TestPhilox:
    @pytest.mark.parametrize("case", KNOWN_ANSWERS)
    def test_known_answers_of_random123(self, case: str) -> None:
        counter, key, expected = KNOWN_ANSWERS[case]
        assert rng.philox_4x32(np.array(counter, dtype=np.uint64), key).tolist() == expected

    def test_many_counters_at_once(self) -> None:
        _, key, _ = KNOWN_ANSWERS["pi"]
        counters = np.arange(24, dtype=np.uint64).reshape(2, 3, 4)
        together = rng.philox_4x32(counters, key)
        assert together.shape == (2, 3, 4)
        for i in range(2):
            for j in range(3):
                assert together[i, j].tolist() == rng.philox_4x32(counters[i, j], key).tolist()


class TestBits:
    def test_words_are_philox_of_the_participant(self) -> None:
        """The layout of counters: block number, 0, participant's low and high half."""
        participant, key = (5 << 32) + 9, rng.stable_hash(7, "purpose", 1, 2, 3)
        counter = np.array([[0, 0, 9, 5], [1, 0, 9, 5]], dtype=np.uint64)
        words = [int(word) for word in rng.philox_4x32(counter, (key & 0xFFFFFFFF, key >> 32)).ravel()]
        expected = [(words[i] << 32) | words[i + 1] for i in range(0, 8, 2)]
        assert rng.bits(7, "purpose", 1, 2, clients(participant), 4, extra=3)[0].tolist() == expected

    @pytest.mark.parametrize("count", [0, 1, 2, 5])
    def test_shorter_draws_are_prefixes(self, count: int) -> None:
        longest = rng.bits(0, "p", 0, 0, clients(3, 4), 6)
        assert rng.bits(0, "p", 0, 0, clients(3, 4), count).tolist() == longest[:, :count].tolist()

    @given(st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(0, 5))
    def test_rows_do_not_depend_on_the_rest_of_the_call(self, who: list[int], round: int) -> None:
        together = rng.bits(1, "p", round, 0, clients(*who), 3)
        for row, participant in zip(together, who, strict=True):
            assert row.tolist() == rng.bits(1, "p", round, 0, clients(participant), 3)[0].tolist()

    def test_every_part_of_the_address_matters(self) -> None:
        base = {"seed": 0, "purpose": "p", "round": 0, "phase": 0, "participants": clients(1), "count": 2, "extra": 0}
        changes = [{"seed": 1}, {"purpose": "q"}, {"round": 1}, {"phase": 1}, {"participants": clients(2)}]
        draws = {tuple(rng.bits(**(base | change))[0].tolist()) for change in [{}, *changes, {"extra": 1}]}
        assert len(draws) == 7

    def test_uniform_over_words_and_participants(self) -> None:
        draws = rng.bits(0, "p", 0, 0, np.arange(4000), 4)
        # 15 degrees of freedom: 37.7 is the 0.1 % point.
        for shift in (60, 32, 28, 0):
            nibbles = (draws >> np.uint64(shift)) & np.uint64(15)
            for column in range(4):
                assert chi_square(nibbles[:, column].astype(np.int64), 16) < 37.7


class TestPermutations:
    @given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
    def test_each_row_permutes_its_range(self, sizes: list[int], round: int) -> None:
        rows = rng.permutations(2, "p", round, 0, np.arange(len(sizes)), np.array(sizes))
        assert rows.shape == (len(sizes), max(sizes))
        for row, size in zip(rows.tolist(), sizes, strict=True):
            assert sorted(row[:size]) == list(range(size))
            assert row[size:] == [-1] * (max(sizes) - size)

    @given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 9)), min_size=1, max_size=6))
    def test_rows_do_not_depend_on_who_else_is_shuffled(self, rows: list[tuple[int, int]]) -> None:
        who, sizes = clients(*(row[0] for row in rows)), np.array([row[1] for row in rows])
        together = rng.permutations(2, "p", 0, 0, who, sizes, extra=4)
        for i in range(len(rows)):
            alone = rng.permutations(2, "p", 0, 0, who[i : i + 1], sizes[i : i + 1], extra=4)[0]
            assert together[i, : sizes[i]].tolist() == alone.tolist()

    def test_all_orders_are_equally_likely(self) -> None:
        rows = rng.permutations(0, "p", 0, 0, np.arange(6000), np.full(6000, 3))
        codes = rows @ np.array([9, 3, 1])
        _, orders = np.unique(codes, return_inverse=True)
        assert chi_square(orders, 6) < 20.5  # 5 degrees of freedom, 0.1 % point

    def test_nobody(self) -> None:
        assert rng.permutations(0, "p", 0, 0, clients(), clients()).shape == (0, 0)


class TestGenerator:
    def test_same_address_same_numbers(self) -> None:
        first, second = (rng.generator(1, "p", 2, 3, 4, 5).random(8) for _ in range(2))
        assert first.tolist() == second.tolist()

    def test_every_part_of_the_address_matters(self) -> None:
        base = {"seed": 0, "purpose": "p", "round": 0, "phase": 0, "participant": 0, "extra": 0}
        changes = [{"seed": 1}, {"purpose": "q"}, {"round": 1}, {"phase": 1}, {"participant": 1}, {"extra": 1}]
        draws = {rng.generator(**(base | change)).integers(2**63) for change in [{}, *changes]}
        assert len(draws) == 7

    @pytest.mark.parametrize("part", ["round", "phase", "participant", "extra"])
    def test_neighbours_do_not_overlap(self, part: str) -> None:
        """A long stream at one address meets none of the numbers of the next."""
        here = rng.generator(0, "p", **{part: 0}).integers(2**63, size=2000)
        there = rng.generator(0, "p", **{part: 1}).integers(2**63, size=2000)
        assert not set(here.tolist()) & set(there.tolist())
        assert abs(np.corrcoef(here.astype(float), there.astype(float))[0, 1]) < 0.08

    def test_extra_may_have_64_bits(self) -> None:
        draws = {rng.generator(0, "p", extra=extra).integers(2**63) for extra in (0, 2**63, 2**64 - 1)}
        assert len(draws) == 3


class TestChoose:
    @given(st.integers(1, 30), st.data())
    def test_distinct_and_ascending(self, population: int, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, population))
        chosen = rng.choose(data.draw(st.integers(0, 3)), "p", 0, population, count)
        assert chosen.dtype == np.int64
        assert len(chosen) == count
        assert chosen.tolist() == sorted(set(chosen.tolist()) & set(range(population)))

    def test_everybody_equally_often(self) -> None:
        chosen = np.concatenate([rng.choose(0, "p", round, 10, 3) for round in range(1500)])
        assert chi_square(chosen, 10) < 27.9  # 9 degrees of freedom, 0.1 % point

    def test_phases_differ(self) -> None:
        draws = {tuple(rng.choose(0, "p", 0, 1000, 5, phase).tolist()) for phase in range(5)}
        assert len(draws) == 5


class TestStableHash:
    def test_same_in_every_process(self) -> None:
        environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
        outputs = [
            subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True).stdout
            for env in environments
        ]
        here = [
            rng.stable_hash(7, "purpose", 3, "x"),
            rng.generator(7, "purpose", 1, 2, 3, 4).integers(2**63),
            rng.bits(7, "purpose", 1, 2, clients(5), 1)[0, 0],
        ]
        assert outputs[0].split() == outputs[1].split() == [str(value) for value in here]

    def test_parts_are_told_apart(self) -> None:
        cases: list[tuple[Any, ...]] = [(), ("",), ("a", "b"), ("ab",), ("b", "a"), (1,), ("1",), (1.0,), (True,)]
        hashes = {rng.stable_hash(*parts) for parts in cases}
        assert len(hashes) == len(cases)
        assert all(0 <= value < 2**64 for value in hashes)
