"""Dimensions as products of factors, which a computation ties, splits and pins: the memory of `tracing`.

Factors stand outermost first, as a row-major reshape makes and merges them. A pinned factor is never cut. Pinning is
always sound, because what is not cut computes what it did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Factor:
    """A factor of a dimension.

    Attributes:
        size: its width, 2 or more.
        pinned: whether it is never cut.
        summed: whether a matrix product or a convolution sums over it.
        same: the factor that it was tied to, which then stands for it.
        parts: the two factors, outer and inner, that it was split into.
    """

    size: int
    pinned: bool = False
    summed: bool = False
    same: Factor | None = None
    parts: tuple[Factor, Factor] | None = None

    def split(self, outer: int) -> None:
        """Split into `outer` blocks and what is inside a block."""
        self.parts = (
            Factor(outer, self.pinned, self.summed),
            Factor(self.size // outer, self.pinned, self.summed),
        )


Factors = Sequence[Factor]  # of one dimension; empty where its size is 1
Dims = tuple[Factors, ...]  # of one tensor


def leaves(factors: Factors) -> list[Factor]:
    """Return the unsplit factors that now stand for `factors`, outermost first."""
    found: list[Factor] = []
    for factor in factors:
        while factor.same is not None:
            factor = factor.same
        found += [factor] if factor.parts is None else leaves(factor.parts)
    return found


def fresh(shape: Iterable[int], pinned: bool) -> Dims:
    """Return new factors for a tensor of this shape."""
    return tuple([Factor(size, pinned)] if size != 1 else [] for size in shape)


def pin(*dims: Factors) -> None:
    """Keep dimensions from being cut."""
    for factors in dims:
        for leaf in leaves(factors):
            leaf.pinned = True


def tie(one: Factors, other: Factors) -> None:
    """Tie two dimensions of equal size; those that no common factors describe are pinned."""
    while True:
        pair = next(((a, b) for a, b in zip(leaves(one), leaves(other), strict=False) if a is not b), None)
        if pair is None:
            return
        small, large = sorted(pair, key=lambda factor: factor.size)
        if small.size == large.size:
            keep, give = pair
            keep.pinned, keep.summed = keep.pinned or give.pinned, keep.summed or give.summed
            give.same = keep
        elif large.size % small.size == 0:
            large.split(small.size)
        else:
            pin(one, other)
            return


def regroup(factors: Factors, sizes: Sequence[int]) -> Dims:
    """Divide a row-major run of factors among dimensions of these sizes; what does not divide is pinned."""
    rest, groups = leaves(factors), []
    for size in sizes:
        group: list[Factor] = []
        while size > 1:
            head = rest[0]
            if size % head.size == 0:
                group.append(rest.pop(0))
                size //= head.size
            elif head.size % size == 0:
                head.split(size)
                rest = leaves(rest)
            else:
                pin(factors)
                return fresh(sizes, pinned=True)
        groups.append(group)
    return tuple(groups)


def broadcast(all_dims: Iterable[Dims], num_dims: int) -> Dims:
    """Tie the dimensions of tensors that are combined elementwise, and return those of the result."""
    result: list[Factors] = [[] for _ in range(num_dims)]
    for dims in all_dims:
        for position, factors in enumerate(dims, start=num_dims - len(dims)):
            if result[position] and factors:
                tie(result[position], factors)
            result[position] = result[position] or factors
    return tuple(result)
