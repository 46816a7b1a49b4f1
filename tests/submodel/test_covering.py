"""Windows that reach every weight: the stated bound, by brute force, on networks of many shapes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigError
from gossamer.registry import resolve
from gossamer.submodel import Cutter, Layout, window
from gossamer.submodel.coverage import Coverage
from gossamer.submodel.covering import Column, columns, covering, levels, period, unreachable
from gossamer.workloads.resnet import PreActResNet18

CAPACITIES = [1.0, 0.7, 0.5, 1 / 3, 0.25, 0.2, 0.125]


def layout_of_edges(widths: list[int], edges: list[tuple[int, int]]) -> Layout:
    """Return a network with one axis a width, a bias on each, and a matrix for each edge (output axis, input axis)."""
    shapes: dict[str, tuple[int, ...]] = {f"bias{axis}": (width,) for axis, width in enumerate(widths)}
    axes: dict[str, tuple[Any, ...]] = {f"bias{axis}": (f"axis{axis}",) for axis in range(len(widths))}
    for out, into in edges:
        shapes[f"w{out}-{into}"], axes[f"w{out}-{into}"] = (widths[out], widths[into]), (f"axis{out}", f"axis{into}")
    return Layout.of(shapes, axes)


def never_held(layout: Layout, capacity: float, rounds: range, offsets: dict[str, int] | None = None) -> int:
    """Count the weights that no round's windows hold, from index arrays alone."""
    held = {name: np.zeros(shape, bool) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    cutter = Cutter(layout, covering, 1, 0, offsets)
    for number in rounds:
        windows = cutter.cut(capacity, number, 0).windows
        for name, dims in zip(layout.names, layout.axes, strict=True):
            held[name][np.ix_(*[windows[dim.axis].indices for dim in dims])] = True  # type: ignore[index]
    return sum(int((~mask).sum()) for mask in held.values())


WIDTHS = st.lists(st.integers(2, 12), min_size=1, max_size=5)


class TestEveryWeight:
    @given(st.data())
    def test_is_reached_within_the_stated_bound(self, data: st.DataObject) -> None:
        widths = data.draw(WIDTHS)
        possible = list(itertools.permutations(range(len(widths)), 2))
        edges = data.draw(st.lists(st.sampled_from(possible), unique=True) if possible else st.just([]))
        capacity, first = data.draw(st.sampled_from(CAPACITIES)), data.draw(st.integers(0, 50))
        layout = layout_of_edges(widths, edges)
        bound = period(layout, capacity)
        assert never_held(layout, capacity, range(first * bound, (first + 1) * bound)) == 0

    @given(st.lists(st.integers(4, 9), min_size=1, max_size=2), st.booleans(), st.sampled_from([0.5, 0.7, 1.0]))
    @settings(max_examples=20, deadline=None)
    def test_of_an_axis_joined_to_itself_too(self, widths: list[int], other: bool, capacity: float) -> None:
        edges = [(axis, axis) for axis in range(len(widths))] + list(itertools.permutations(range(len(widths)), 2))
        if other:
            widths, edges = [*widths, 6], [*edges, (len(widths), 0)]
        layout = layout_of_edges(widths, edges)
        assert not unreachable(layout, capacity)
        assert never_held(layout, capacity, range(period(layout, capacity))) == 0

    def test_a_single_channel_cannot_hold_both_ends(self) -> None:
        layout = layout_of_edges([8], [(0, 0)])
        assert unreachable(layout, 0.125) == ["axis0"]
        assert never_held(layout, 0.125, range(200)) == 8 * 8 - 8
        assert unreachable(layout, 0.25) == []

    @pytest.mark.parametrize("offset", [1, 5, 31])
    def test_also_where_axes_are_shifted(self, offset: int) -> None:
        layout = layout_of_edges([12, 8], [(1, 0)])
        assert never_held(layout, 0.25, range(16), {"axis0": offset}) == 0

    def test_the_bound_is_tight_where_blocks_fit(self) -> None:
        layout = layout_of_edges([16, 16], [(1, 0)])
        assert period(layout, 0.25) == 16
        assert never_held(layout, 0.25, range(15)) > 0


class TestResNet:
    """PreAct ResNet-18 at full width: the shares that reference code was measured to reach in 512 rounds."""

    MODEL = PreActResNet18((3, 32, 32), 10)
    LAYOUT = Layout.of(MODEL.shapes, MODEL.axes)

    def weights(self, strategy: str, capacity: float, rounds: int) -> float:
        cutter, coverage = Cutter(self.LAYOUT, resolve("strategy", strategy), 1, 0), Coverage(self.LAYOUT)
        for number in range(rounds):
            coverage.add(cutter.cut(capacity, number, 0))
        assert coverage.channels == 1.0 or rounds < 512
        return coverage.weights

    @pytest.mark.sweep(keep=0.5)
    @pytest.mark.parametrize(("capacity", "percent"), [(0.5, 99.8), (0.25, 53.6), (0.125, 26.7), (0.0625, 13.3)])
    def test_the_papers_window_leaves_most_weights_of_small_clients_alone(
        self, capacity: float, percent: float
    ) -> None:
        assert round(100 * self.weights("rolling", capacity, 512), 1) == percent

    @pytest.mark.parametrize(("capacity", "bound"), [(0.5, 4), (0.25, 16), (0.125, 64), (0.0625, 256)])
    def test_ours_reaches_all_in_the_square_of_the_blocks(self, capacity: float, bound: int) -> None:
        assert period(self.LAYOUT, capacity) == bound
        assert self.weights("covering", capacity, bound) == 1.0
        assert self.weights("covering", capacity, bound - 1) < 1.0

    def test_three_columns_suffice(self) -> None:
        numbers = {axis: column.number for axis, column in columns(self.LAYOUT, 0.5).items()}  # type: ignore[attr-defined]
        assert set(numbers.values()) == {0, 1, 2}
        for dims in self.LAYOUT.axes:
            named = [dim.axis for dim in dims if dim.cuttable]
            assert len({numbers[axis] for axis in named if axis is not None}) == len(named)


class TestArray:
    @pytest.mark.parametrize(("blocks", "num_columns", "q"), [(4, 3, 4), (6, 2, 6), (4, 4, 5), (1, 4, 3), (6, 9, 11)])
    def test_levels(self, blocks: int, num_columns: int, q: int) -> None:
        assert levels(blocks, num_columns) == q

    @given(st.integers(1, 9), st.integers(2, 8))
    def test_any_two_columns_show_every_pair_once(self, blocks: int, num_columns: int) -> None:
        q = levels(blocks, num_columns)
        starts = np.array(
            [
                [
                    int(
                        covering.choose(
                            q, 1, round=row, stride=1, offset=0, seed=0, client=0, group=Column(c, q)
                        ).indices[0]
                    )
                    for c in range(num_columns)
                ]
                for row in range(q * q)
            ]
        )
        for one, other in itertools.combinations(range(num_columns), 2):
            assert len({(row[one], row[other]) for row in starts.tolist()}) == q * q


class TestWindow:
    @given(st.integers(1, 40), st.sampled_from(CAPACITIES), st.integers(0, 300), st.integers(0, 5), st.integers(-9, 99))
    def test_has_the_length_of_any_window(self, width: int, capacity: float, at: int, group: int, offset: int) -> None:
        found = window("covering", width, capacity, at, group=group, offset=offset)
        assert len(found) == len(window("static", width, capacity, 0))
        assert (np.diff(found.indices) > 0).all()
        assert found.indices[0] >= 0
        assert found.indices[-1] < width

    def test_a_group_must_be_a_column(self) -> None:
        with pytest.raises(ConfigError, match="'conv1' is no column"):
            window("covering", 8, 0.5, 0, group="conv1")


class TestOffsets:
    LAYOUT = layout_of_edges([8, 8], [(1, 0)])

    def test_shift_one_axis_alone(self) -> None:
        moved = Cutter(self.LAYOUT, resolve("strategy", "rolling"), 1, 0, {"axis1": 3}).cut(0.25, 4, 0).windows
        assert moved["axis0"].indices.tolist() == [4, 5]
        assert moved["axis1"].indices.tolist() == [0, 7]

    def test_an_unknown_axis_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown axis 'axis3' in submodel.offsets; did you mean 'axis.'\?"):
            Cutter(self.LAYOUT, covering, 1, 0, {"axis3": 1})


class TestCoverage:
    def test_counts_what_index_arrays_count(self) -> None:
        """Kernels weigh as many weights as they have, random windows go through meshes."""
        shapes = {"conv": (6, 4, 3, 3), "bias": (6,)}
        layout = Layout.of(shapes, {"conv": ("out", "in", None, None), "bias": ("out",)})
        cutter, coverage = Cutter(layout, resolve("strategy", "random"), 1, 0), Coverage(layout)
        held = {name: np.zeros(shape, bool) for name, shape in shapes.items()}
        for client in range(3):
            cut = cutter.cut(0.5, 0, client)
            coverage.add(cut)
            out, into = cut.windows["out"].indices, cut.windows["in"].indices
            held["conv"][np.ix_(out, into)] = True
            held["bias"][out] = True
            assert coverage.weights == pytest.approx(sum(int(m.sum()) for m in held.values()) / layout.num_parameters)
        assert torch.equal(coverage.mask("bias"), torch.from_numpy(held["bias"]))
        assert torch.equal(coverage.mask("conv")[:, :, 0, 0], torch.from_numpy(held["conv"][:, :, 0, 0]))
