"""Sums whose bits depend on positions alone: a pairwise tree over slots, in which an absent slot is skipped.

Splitting the slots into aligned blocks of a power of two, summing inside each block and then over the blocks, gives the
same tree, and so the same bits, whatever the block size, the number of workers and the order in which blocks arrive.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def merge(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Add `right` to `left` in place; an absent operand leaves the other as it is."""
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)


def tree_sum(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Add rows pairwise: (0, 1), (2, 3), ..., then pairs of pairs; None is an absent row.

    Rows are overwritten. Returns None if every row is absent.
    """
    level = list(rows)
    while len(level) > 1:
        level = [merge(level[i], level[i + 1] if i + 1 < len(level) else None) for i in range(0, len(level), 2)]
    return level[0] if level else None


def tree_sum_rows(rows: Tensor) -> Tensor:
    """Do what `tree_sum` does for rows [s, d] that are all present; returns the first row, overwritten."""
    step = 1
    while step < len(rows):
        right = rows[step :: 2 * step]
        rows[:: 2 * step][: len(right)].add_(right)
        step *= 2
    return rows[0]


class TreeSum:
    """`tree_sum` over `count` slots that arrive in any order, holding only what cannot be merged yet."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pending: dict[tuple[int, int], Tensor | None] = {}
        self._foreign: set[int] = set()  # values that must not be overwritten
        self.total: Tensor | None = None

    def add(self, index: int, value: Tensor | None, *, level: int = 0, owned: bool = True) -> list[Tensor]:
        """Put `value` (None: absent) at slot `index`. Returns buffers that are free again.

        Args:
            level: `value` is the sum of 2 ** level slots, of which `index` counts the groups.
            owned: whether `value` may be overwritten.
        """
        freed: list[Tensor] = []
        if value is not None and not owned:
            self._foreign.add(id(value))
        size = (self.count + (1 << level) - 1) >> level
        while size > 1:
            sibling = index ^ 1
            if sibling < size:
                if (level, sibling) not in self._pending:
                    self._pending[level, index] = value
                    return freed
                other = self._pending.pop((level, sibling))
                left, right = (value, other) if index < sibling else (other, value)
                if left is not None and right is not None and id(left) in self._foreign:
                    # Either order of two operands gives the same bits.
                    value = left + right if id(right) in self._foreign else right.add_(left)
                else:
                    freed += [right] if left is not None and right is not None else []
                    value = merge(left, right)
            index, size, level = index // 2, (size + 1) // 2, level + 1
        self.total = value.clone() if value is not None and id(value) in self._foreign else value
        return freed

    def partial_sums(self) -> list[tuple[int, int, Tensor | None]]:
        """Return (level, index, sum) of what cannot be merged yet, as `add` of an equal tree elsewhere takes it."""
        if self.total is not None:
            return [((self.count - 1).bit_length(), 0, self.total)]
        return [(level, index, value) for (level, index), value in self._pending.items()]

    def move_out(self, buffer: Tensor) -> None:
        """Copy partial sums that rest inside `buffer` to memory of their own, so that `buffer` can be used again."""
        low, high = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        for key, value in self._pending.items():
            if value is not None and low <= value.data_ptr() < high:
                self._pending[key] = value.clone()
        if self.total is not None and low <= self.total.data_ptr() < high:
            self.total = self.total.clone()
