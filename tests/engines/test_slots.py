"""Slots of shared memory, and the partial sums that rest in them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.aggregate import TreeSum, tree_sum
from gossamer.engines.slots import Slots, read_arrays, write_arrays


@given(shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=5))
def test_arrays_come_back(shapes: list[tuple[int, int]]) -> None:
    arrays = [torch.randn(shape) for shape in shapes]
    slot = torch.zeros(5 * 3 * 64)
    extents = write_arrays(slot, arrays)
    for found, array in zip(read_arrays(slot, extents), arrays, strict=True):
        assert torch.equal(found, array)
        assert found.data_ptr() % 64 == slot.data_ptr() % 64


def test_what_is_in_its_place_is_not_copied() -> None:
    slot = torch.zeros(64)
    first = slot[:10].view(2, 5)
    first.fill_(3.0)
    assert write_arrays(slot, [first, torch.ones(2)]) == [(0, [2, 5]), (16, [2])]


@given(count=st.integers(1, 30), num_slots=st.integers(1, 4), seed=st.integers(0, 99))
def test_sums_in_few_slots(count: int, num_slots: int, seed: int) -> None:
    """Partial sums move out when their slot is needed; the bits are those of one sum over all."""
    generator = torch.Generator().manual_seed(seed)
    values, tree = torch.randn(count, 8, generator=generator), TreeSum(count)
    slots = Slots(torch.zeros(num_slots, 8))
    slots.begin([tree])
    for index in torch.randperm(count, generator=generator).tolist():
        number = slots.take()
        assert number is not None
        value = slots.memory[number]
        value.copy_(values[index])
        slots.give_back(number)
        tree.add(index, value)
    expected = tree_sum(list(values.clone()))
    assert tree.total is not None
    assert expected is not None
    assert torch.equal(tree.total, expected)


def test_lost_slots() -> None:
    slots = Slots(torch.zeros(2, 4))
    slots.begin(())
    assert {slots.take(), slots.take()} == {0, 1}
    assert slots.take() is None
    slots.give_back(1)
    slots.begin(())
    assert slots.num_lost == 1
    assert (slots.take(), slots.take()) == (1, None)
