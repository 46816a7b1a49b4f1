"""Cuts against fancy indexing, for windows that are slices and for those that are not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gossamer.submodel import LABEL_AXIS, Cut, Cutter, Dim, Layout, count_shapes, cut_of
from gossamer.submodel.cut import MAX_RECTANGLES, Piece, dim_segments
from gossamer.submodel.strategies import random, rolling, static
from gossamer.submodel.windows import Window

AXES = ("a", "b", "c")
DIMS = st.one_of(
    st.just(Dim(None)),
    st.just(Dim(LABEL_AXIS)),
    st.builds(Dim, st.sampled_from(AXES), outer=st.integers(1, 3), inner=st.integers(1, 3)),
)


@st.composite
def windows_of(draw: st.DrawFn, width: int) -> Window:
    """Full, one slice, two slices around the end, or any subset."""
    kind = draw(st.sampled_from(["full", "slice", "rolled", "any"]))
    if kind == "full":
        return Window(width, ((0, width),))
    if kind == "any":
        return Window.of_indices(width, sorted(draw(st.sets(st.integers(0, width - 1), min_size=1))))
    length = draw(st.integers(1, width))
    choose = rolling.choose if kind == "rolled" else static.choose
    return choose(width, length, round=draw(st.integers(0, 9)), stride=1, seed=0, client=0, group=0)


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """A model of up to three parameters over three axes, and windows on these."""
    widths = {axis: draw(st.integers(1, 9)) for axis in AXES} | {LABEL_AXIS: 3}
    shapes, axes = {}, {}
    for i in range(draw(st.integers(1, 3))):
        dims = tuple(draw(st.lists(DIMS, max_size=3)))
        axes[f"p{i}"] = dims
        shapes[f"p{i}"] = tuple(dim.outer * widths[dim.axis] * dim.inner if dim.axis else 2 for dim in dims)
    layout = Layout.of(shapes, axes)
    return cut_of(layout, {axis: draw(windows_of(widths[axis])) for axis in layout.cut_axes})


def slow_indices(dim: Dim, size: int, windows: Mapping[str, Window]) -> list[int]:
    """Positions along one dimension, channel by channel: (outer, channel, inner) in this order of nesting."""
    if dim.axis not in windows:
        return list(range(size))
    window = windows[dim.axis]
    return [
        (block * window.width + channel) * dim.inner + i
        for block in range(dim.outer)
        for channel in window.indices.tolist()
        for i in range(dim.inner)
    ]


def slow_mesh(cut: Cut, number: int) -> tuple[Tensor, ...]:
    """Open mesh of one parameter, by `slow_indices`."""
    dims, shape = cut.full.axes[number], cut.full.shapes[number]
    indices = [slow_indices(dim, size, cut.windows) for dim, size in zip(dims, shape, strict=True)]
    return tuple(torch.from_numpy(mesh) for mesh in np.ix_(*(np.array(index, dtype=np.int64) for index in indices)))


def whole_numbers(size: int) -> Tensor:
    return torch.randint(-50, 50, (size,)).float()


class TestAgainstFancyIndexing:
    @given(cuts())
    def test_read(self, cut: Cut) -> None:
        row = torch.randn(cut.full.d)
        out = torch.full((cut.sub.d,), torch.nan)
        assert cut.read(row, out) is out
        full, sub = cut.full.views(row), cut.sub.views(out)
        for number, name in enumerate(cut.full.names):
            assert torch.equal(sub[name], full[name][slow_mesh(cut, number)])

    @given(cuts(), st.sampled_from([1.0, -2.0, 0.5]))
    def test_add(self, cut: Cut, weight: float) -> None:
        target, row = whole_numbers(cut.full.d), whole_numbers(cut.sub.d)
        expected = {name: view.clone() for name, view in cut.full.views(target).items()}
        for number, (name, addend) in enumerate(cut.sub.views(row).items()):
            expected[name][slow_mesh(cut, number)] += weight * addend
        cut.add_(target, row, weight)
        for name, view in cut.full.views(target).items():
            assert torch.equal(view, expected[name])

    @given(cuts())
    def test_counts(self, cut: Cut) -> None:
        """Counts of size 1 along dimensions without an axis broadcast to counts of every coordinate."""
        for number, (piece, shape) in enumerate(zip(cut.count_pieces, count_shapes(cut.full), strict=True)):
            dims = cut.full.axes[number]
            assert all(size == 1 for dim, size in zip(dims, shape, strict=True) if dim.axis is None)
            counts, expected = torch.zeros(shape), torch.zeros(cut.full.shapes[number])
            piece.fill_add(counts, 2.0)
            expected[slow_mesh(cut, number)] += 2.0
            assert torch.equal(counts.expand_as(expected), expected)

    @given(cuts())
    def test_few_rectangles_are_slices_and_many_a_mesh(self, cut: Cut) -> None:
        for piece, dims, shape in zip(cut.pieces, cut.full.axes, cut.full.shapes, strict=True):
            count = 1
            for dim, size in zip(dims, shape, strict=True):
                count *= len(dim_segments(dim, size, cut.windows))
            assert (piece.mesh is None) == (count <= MAX_RECTANGLES)
            assert len(piece.rectangles) == (count if piece.mesh is None else 0)


class TestPieces:
    def rectangles_of(self, window: Window) -> Piece:
        layout = Layout.of({"w": (8, 8)}, {"w": ("a", "b")})
        return cut_of(layout, {"a": window, "b": window}).pieces[0]

    def test_a_rolled_matrix_is_four_rectangles(self) -> None:
        piece = self.rectangles_of(Window(8, ((0, 1), (6, 8))))
        assert piece.mesh is None
        assert len(piece.rectangles) == 4

    def test_both_ways_agree_at_the_limit(self) -> None:
        few = self.rectangles_of(Window.of_indices(8, [0, 2, 4, 6]))
        assert few.mesh is None
        indices = torch.tensor([0, 2, 4, 6])
        mesh = Piece("w", [], (indices[:, None], indices[None]))
        full, sub = torch.randn(8, 8), torch.randn(4, 4)
        outs = [torch.empty(4, 4), torch.empty(4, 4)]
        sums, counts = [full.clone(), full.clone()], [full.clone(), full.clone()]
        for piece, out, total, count in zip((few, mesh), outs, sums, counts, strict=True):
            piece.read(full, out)
            piece.add(total, sub, 2.0)
            piece.fill_add(count, torch.ones(4, 1) if piece.mesh else 1.0)
        assert all(torch.equal(*pair) for pair in (outs, sums, counts))
        assert torch.equal(outs[0], full[::2, ::2])
        assert self.rectangles_of(Window.of_indices(10, [0, 2, 4, 6, 8])).mesh is not None

    def test_fused_heads_and_flattened_channels(self) -> None:
        windows = {"heads": Window(4, ((1, 3),)), "conv": Window(3, ((0, 1), (2, 3)))}
        assert dim_segments(Dim("heads", outer=3), 12, windows) == ((1, 3), (5, 7), (9, 11))
        assert dim_segments(Dim("conv", inner=49), 147, windows) == ((0, 49), (98, 147))
        assert dim_segments(Dim("heads", outer=2, inner=5), 40, windows) == ((5, 15), (25, 35))
        assert dim_segments(Dim(LABEL_AXIS), 10, windows) == ((0, 10),)
        assert dim_segments(Dim(None), 7, windows) == ((0, 7),)

    def test_full_windows_are_one_slice(self) -> None:
        assert dim_segments(Dim("heads", outer=3), 12, {"heads": Window(4, ((0, 4),))}) == ((0, 12),)


class TestFullCut:
    def test_copies_and_adds_everything(self) -> None:
        cut = cut_of(Layout.of({"w": (3, 5)}, {"w": ("a", None)}), {"a": Window(3, ((0, 3),))})
        assert cut.is_full
        row, target = torch.randn(cut.full.d), torch.zeros(cut.full.d)
        assert torch.equal(cut.read(row, torch.empty(cut.sub.d)), row)
        cut.add_(target, row, -2.0)
        assert torch.equal(target, row * -2)

    def test_one_window_short_of_full(self) -> None:
        layout = Layout.of({"w": (3, 5)}, {"w": ("a", "b")})
        assert not cut_of(layout, {"a": Window(3, ((0, 3),)), "b": Window(5, ((0, 4),))}).is_full

    def test_nothing_to_cut(self) -> None:
        assert cut_of(Layout.of({"w": (3, 5)}, {"w": (LABEL_AXIS, None)}), {}).is_full


class TestCutter:
    LAYOUT = Layout.of({"v": (6, 8), "w": (8, 4)}, {"v": ("a", "b"), "w": ("b", None)})

    @pytest.mark.parametrize("strategy", [rolling, static, random])
    def test_windows_are_the_strategys(self, strategy: object) -> None:
        cutter = Cutter(self.LAYOUT, strategy, 3, 11)  # type: ignore[arg-type]
        cut = cutter.cut(0.5, 7, 2)
        for axis, width in (("a", 6), ("b", 8)):
            client = 2 if strategy is random else 0
            address = {"round": 7, "stride": 3, "seed": 11, "client": client, "group": axis}
            assert cut.windows[axis] == cutter.strategy.choose(width, width // 2, **address)
        assert cut.sub == cutter.sub_layout(0.5) == self.LAYOUT.cut(0.5)
        assert cut.sub.shapes == ((3, 4), (4, 4))

    def test_shared_cuts_are_made_once(self) -> None:
        cutter = Cutter(self.LAYOUT, rolling, 1, 0)
        assert cutter.shares_window(0.5)
        assert cutter.cut(0.5, 7, 1) is cutter.cut(0.5, 7, 2)
        assert cutter.cut(0.5, 7, 1).windows != cutter.cut(0.5, 8, 1).windows

    def test_random_cuts_are_each_clients_own(self) -> None:
        cutter = Cutter(self.LAYOUT, random, 1, 0)
        assert not cutter.shares_window(0.5)
        cuts = [cutter.cut(0.5, 7, client).windows for client in range(6)]
        assert any(windows != cuts[0] for windows in cuts)
        assert cutter.cut(0.5, 7, 3).windows == cuts[3]

    def test_whole_models_are_shared_whatever_the_strategy(self) -> None:
        cutter = Cutter(self.LAYOUT, random, 1, 0)
        assert cutter.shares_window(1.0)
        assert cutter.cut(1.0, 7, 1).is_full
