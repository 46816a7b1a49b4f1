"""Rolling windows that reach every weight, not only every channel, within a stated number of rounds.

FedRolex's windows (arXiv 2212.01548, Eq. 3) move together: a weight that joins channel i of one axis to channel j of
another is trained only if one window holds both, so of a matrix between equally wide axes only a band around the
diagonal is ever trained. Here every axis is divided into blocks as long as its window, axes that share a weight matrix
get different columns of an orthogonal array of strength 2, and round j takes row j: within q^2 rounds every pair of
blocks of two joined axes meets (q: the largest number of blocks of an axis, or the next prime, see `levels`).

A matrix that joins an axis to itself needs both blocks in one window: such an axis is divided into half as long blocks,
of which its window holds every pair in turn; each such axis multiplies the period by its number of pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from gossamer.errors import ConfigError
from gossamer.submodel.layout import Layout
from gossamer.submodel.strategies import Strategy
from gossamer.submodel.windows import Window, window_length, wrapped

MAX_COLUMNS_OF_ANY_SIZE = 3


class Column(NamedTuple):
    """The place of an axis in the schedule.

    Attributes:
        number: its column of the orthogonal array, counted from 0; -1: the axis is joined to itself.
        levels: q, the number of symbols of the array.
        slow: rounds that a self-joined axis keeps each of its pairs of half blocks; 1 for the others.
    """

    number: int
    levels: int
    slow: int = 1


def columns(layout: Layout, capacity: float) -> dict[str, Hashable]:
    """Give every axis of `layout` that a capacity cuts its `Column`; axes that share a parameter get different ones."""
    joined, own = _joined_axes(layout)
    colour: dict[str, int] = {}
    for axis in sorted(joined, key=lambda axis: (-len(joined[axis]), layout.cut_axes.index(axis))):
        taken = {colour[other] for other in joined[axis] if other in colour}
        colour[axis] = next(number for number in itertools.count() if number not in taken)
    lengths = {axis: window_length(layout.widths[axis], capacity) for axis in layout.cut_axes}
    blocks = max((math.ceil(layout.widths[axis] / lengths[axis]) for axis in joined), default=1)
    q = levels(blocks, max(colour.values(), default=0) + 1)
    found: dict[str, Hashable] = {axis: Column(number, q) for axis, number in colour.items()}
    slow = q * q
    for axis in own:
        found[axis] = Column(-1, q, slow)
        slow *= len(_pairs(layout.widths[axis], lengths[axis]))
    return found


def levels(num_blocks: int, num_columns: int) -> int:
    """Return the symbols q that an array of strength 2 needs: any number for up to 3 columns, else a prime."""
    if num_columns <= MAX_COLUMNS_OF_ANY_SIZE:
        return num_blocks
    return next(q for q in itertools.count(max(num_blocks, num_columns - 1, 2)) if _is_prime(q))


def period(layout: Layout, capacity: float) -> int:
    """Return within how many rounds clients of `capacity` alone reach every weight (see `unreachable`)."""
    rounds = 1
    for axis, column in columns(layout, capacity).items():
        assert isinstance(column, Column)
        rounds = max(rounds, column.levels**2)
        if column.number < 0:
            width = layout.widths[axis]
            rounds = max(rounds, column.slow * len(_pairs(width, window_length(width, capacity))))
    return rounds


def unreachable(layout: Layout, capacity: float) -> list[str]:
    """List the axes, joined to themselves, of which a window of `capacity` holds one channel: no two ever meet."""
    _, own = _joined_axes(layout)
    return [axis for axis in own if layout.widths[axis] > 1 == window_length(layout.widths[axis], capacity)]


def _covering(
    width: int, length: int, *, round: int, stride: int, offset: int = 0, seed: int, client: int, group: Hashable
) -> Window:
    """Take the block, or the pair of half blocks, that the axis's `Column` names for this round.

    A group that is a plain number is that column of an array with just as many symbols as the axis has blocks. `stride`
    is not used: blocks are as far apart as they are long.
    """
    if length == width:
        return Window(width, ((0, width),))
    if isinstance(group, int):
        group = Column(group, levels(math.ceil(width / length), group + 1))
    if not isinstance(group, Column):
        raise ConfigError(f"group {group!r} is no column of an orthogonal array: give a number, such as group=0")
    if group.number >= 0:
        block = _symbol(group, round) % math.ceil(width / length)
        return wrapped(width, offset + block * length, length)
    pairs = _pairs(width, length)
    half = max(1, length // 2)
    starts = pairs[round // group.slow % len(pairs)]
    channels = {(offset + block * half + step) % width for block in starts for step in range(half)}
    filler = itertools.count(starts[-1] * half + half)
    while len(channels) < length:  # an odd length, or a last half block that wraps around
        channels.add((offset + next(filler)) % width)
    return Window.of_indices(width, np.array(sorted(channels)))


def _symbol(column: Column, round: int) -> int:
    """Return entry (row, column) of the orthogonal array: a, b, a + b, a + 2b, ... modulo q.

    Row `round` has a = round mod q and b = a + floor(round / q) mod q, so that no column rests for long.
    """
    a = round % column.levels
    b = (a + round // column.levels) % column.levels
    if column.number == 0:
        return a
    return (b if column.number == 1 else a + (column.number - 1) * b) % column.levels


def _joined_axes(layout: Layout) -> tuple[dict[str, set[str]], list[str]]:
    """Return ``{axis: axes that share a parameter with it}`` of the axes not joined to themselves, and the others."""
    joined: dict[str, set[str]] = {axis: set() for axis in layout.cut_axes}
    own: dict[str, None] = {}
    for dims in layout.axes:
        named = [dim.axis for dim in dims if dim.axis is not None and dim.cuttable]
        for one, other in itertools.combinations(named, 2):
            if one == other:
                own[one] = None
            else:
                joined[one].add(other)
                joined[other].add(one)
    ordinary = {axis: joined[axis] - own.keys() for axis in layout.cut_axes if axis not in own}
    return ordinary, [axis for axis in layout.cut_axes if axis in own]


def _pairs(width: int, length: int) -> list[tuple[int, ...]]:
    """List all pairs of half blocks of an axis; one that fits a window altogether has one pair."""
    if length == width:
        return [(0,)]
    num_halves = math.ceil(width / max(1, length // 2))
    if length == 1:  # no window holds two channels: take them one by one
        return [(block,) for block in range(num_halves)]
    return list(itertools.combinations(range(num_halves), 2))


def _is_prime(number: int) -> bool:
    return number >= 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


covering = Strategy(
    _covering,
    shared=True,
    groups=columns,
    unused=("stride",),
    about="Rolling windows in blocks, such that every weight is reached within a stated number of rounds.",
)
