"""Tree sums: the same bits in any arrival order and any block size, with absent slots."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.aggregate import TreeSum, merge, tree_sum, tree_sum_rows

WIDTH = 33
PRESENT = st.lists(st.booleans(), min_size=1, max_size=21)


def rows_of(count: int, seed: int = 0) -> Tensor:
    """Rows of very different magnitudes, so that the order of additions shows."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=source) * 10.0 ** torch.randint(-3, 4, (count, 1), generator=source)


def slots_of(present: list[bool], seed: int = 0) -> list[Tensor | None]:
    rows = rows_of(len(present), seed)
    return [row.clone() if there else None for row, there in zip(rows, present, strict=True)]


def slow(slots: list[Tensor | None]) -> Tensor | None:
    """The tree by recursion: the left half is the largest power of two below the number of slots."""
    if len(slots) == 1:
        return slots[0]
    half = 1
    while half * 2 < len(slots):
        half *= 2
    left, right = slow(slots[:half]), slow(slots[half:])
    if left is None or right is None:
        return right if left is None else left
    return left + right


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found.view(torch.int32).tolist() == expected.view(torch.int32).tolist()


class TestTree:
    @given(PRESENT, st.integers(0, 5))
    def test_tree_sum(self, present: list[bool], seed: int) -> None:
        assert same(tree_sum(slots_of(present, seed)), slow(slots_of(present, seed)))

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 16, 21])
    def test_tree_sum_of_rows(self, count: int) -> None:
        expected = slow(list(rows_of(count)))
        rows = rows_of(count)
        found = tree_sum_rows(rows)
        assert same(found, expected)
        assert found.data_ptr() == rows.data_ptr()

    def test_it_is_no_running_sum(self) -> None:
        assert not same(tree_sum(slots_of([True] * 21)), rows_of(21).cumsum(0)[-1])

    def test_nothing(self) -> None:
        assert tree_sum([]) is None
        assert tree_sum([None, None, None]) is None

    def test_an_absent_row_is_skipped_not_added(self) -> None:
        negative_zero = torch.full((3,), -0.0)
        found = tree_sum([None, negative_zero.clone(), None])
        assert same(found, negative_zero)

    def test_merge_adds_to_the_left(self) -> None:
        left, right = torch.ones(2), torch.full((2,), 3.0)
        assert merge(left, right) is left
        assert left.tolist() == [4, 4]
        assert merge(None, right) is right
        assert merge(left, None) is left
        assert merge(None, None) is None


class TestBlocks:
    @given(PRESENT, st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 5))
    def test_aligned_blocks_give_the_same_tree(self, present: list[bool], size: int, seed: int) -> None:
        slots = slots_of(present, seed)
        blocks = [tree_sum(slots[low : low + size]) for low in range(0, len(slots), size)]
        assert same(tree_sum(blocks), slow(slots_of(present, seed)))

    @given(PRESENT, st.sampled_from([1, 2, 4, 8]), st.randoms(use_true_random=False))
    def test_in_any_order_of_arrival(self, present: list[bool], size: int, random: object) -> None:
        slots = slots_of(present)
        blocks = [tree_sum(slots[low : low + size]) for low in range(0, len(slots), size)]
        order = list(range(len(blocks)))
        random.shuffle(order)  # type: ignore[attr-defined]
        total = TreeSum(len(blocks))
        for number in order:
            total.add(number, blocks[number])
        assert same(total.total, slow(slots_of(present)))

    @given(PRESENT, st.randoms(use_true_random=False))
    def test_freed_buffers_are_those_that_are_merged(self, present: list[bool], random: object) -> None:
        """What is freed may be overwritten at once; all but the total's buffer are freed exactly once."""
        slots = slots_of(present)
        addresses = {slot.data_ptr() for slot in slots if slot is not None}
        order = list(range(len(slots)))
        random.shuffle(order)  # type: ignore[attr-defined]
        total, freed = TreeSum(len(slots)), []
        for number in order:
            for buffer in total.add(number, slots[number]):
                freed.append(buffer.data_ptr())
                buffer.fill_(torch.nan)
        kept = set() if total.total is None else {total.total.data_ptr()}
        assert sorted(freed) == sorted(addresses - kept)
        assert same(total.total, slow(slots_of(present)))

    def test_unfinished_sums_have_no_total(self) -> None:
        total = TreeSum(3)
        total.add(2, torch.ones(1))
        total.add(0, torch.ones(1))
        assert total.total is None
        total.add(1, torch.ones(1))
        assert total.total is not None
        assert total.total.tolist() == [3]

    def test_one_slot(self) -> None:
        total = TreeSum(1)
        assert total.add(0, torch.ones(1)) == []
        assert total.total is not None


class TestMoveOut:
    @pytest.mark.parametrize("finish", [False, True])
    def test_the_buffer_can_be_used_again(self, finish: bool) -> None:
        """Partial sums, and the total, that rest in a shared buffer survive its next use."""
        expected = slow(list(rows_of(4)))
        buffer, total = torch.empty(2, WIDTH), TreeSum(4)
        for numbers in [(2, 0), (1, 3)]:
            for row, number in zip(buffer, numbers, strict=True):
                row.copy_(rows_of(4)[number])
                total.add(number, row)
            if finish or numbers == (2, 0):
                total.move_out(buffer)
                buffer.fill_(torch.nan)
        assert same(total.total, expected)

    def test_sums_elsewhere_stay_where_they_are(self) -> None:
        memory = torch.zeros(3, WIDTH)
        total = TreeSum(4)
        total.add(0, memory[0])
        total.add(2, memory[2])
        total.move_out(memory[1])
        total.add(1, torch.ones(WIDTH))
        assert memory[0].sum() == WIDTH, "slot 0 was not moved"
        total.move_out(memory[2])
        total.add(3, torch.ones(WIDTH))
        assert memory[2].sum() == 0, "slot 2 was"
        total.move_out(memory[0])
        memory.fill_(torch.nan)
        assert total.total is not None
        assert total.total.tolist() == [2.0] * WIDTH


class TestPartialSums:
    @given(PRESENT, st.lists(st.integers(0, 21), max_size=4))
    def test_of_several_processes(self, present: list[bool], bounds: list[int]) -> None:
        """Whoever adds up which consecutive slots, and however few: together they have the bits of one tree."""
        edges = [0, *sorted(min(bound, len(present)) for bound in bounds), len(present)]
        whole, slots = TreeSum(len(present)), slots_of(present)
        for low, high in itertools.pairwise(edges):
            own = TreeSum(len(present))
            for index in range(low, high):
                own.add(index, slots[index])
            found = own.partial_sums()
            assert len(found) <= 2 * len(present).bit_length()
            for level, index, value in found:
                whole.add(index, value, level=level)
        assert same(whole.total, slow(slots_of(present)))
