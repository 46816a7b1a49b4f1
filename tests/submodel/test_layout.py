"""Layouts: alignment, views, cut shapes, and axes that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigError
from gossamer.submodel import LABEL_AXIS, Axes, Dim, Layout
from gossamer.submodel.layout import ALIGNMENT, KERNEL, as_dim, axis_widths
from gossamer.submodel.windows import Window, window_length

Shapes = dict[str, tuple[int, ...]]
SHAPES = st.dictionaries(
    st.sampled_from("abcdef"), st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=6
)
# A transformer block in small: heads fused three times, a flattened convolution, labels, a scalar.
NET: tuple[Shapes, Axes] = (
    {
        "qkv.weight": (3 * 8, 10),
        "conv.weight": (6, 3, 5, 5),
        "hidden.weight": (10, 6 * 49),
        "norm.bias": (6,),
        "output.weight": (4, 8),
        "temperature": (),
    },
    {
        "qkv.weight": (Dim("heads", outer=3), "hidden"),
        "conv.weight": ("conv", None, KERNEL, KERNEL),
        "hidden.weight": ("hidden", Dim("conv", inner=49)),
        "norm.bias": (Dim("conv"),),
        "output.weight": (LABEL_AXIS, "heads"),
        "temperature": (),
    },
)


def plain(shapes: Shapes) -> Layout:
    """Return the layout of parameters none of whose dimensions is cut."""
    return Layout.of(shapes, {name: (None,) * len(shape) for name, shape in shapes.items()})


class TestRow:
    @given(SHAPES)
    def test_offsets_are_aligned_and_disjoint(self, shapes: Shapes) -> None:
        layout = plain(shapes)
        assert layout.names == tuple(shapes)
        assert ALIGNMENT * 4 == 64
        ends = [offset + math.prod(shape) for offset, shape in zip(layout.offsets, layout.shapes, strict=True)]
        assert all(offset % ALIGNMENT == 0 for offset in (*layout.offsets, layout.d))
        for end, start in zip(ends, [*layout.offsets[1:], layout.d], strict=True):
            assert 0 <= start - end < ALIGNMENT
        assert layout.num_parameters == sum(math.prod(shape) for shape in shapes.values())

    @given(SHAPES, st.lists(st.integers(1, 3), max_size=2))
    def test_views_share_memory(self, shapes: Shapes, lead: list[int]) -> None:
        layout = plain(shapes)
        rows = torch.arange(math.prod(lead) * layout.d, dtype=torch.float32).view(*lead, layout.d)
        views = layout.views(rows)
        assert list(views) == list(shapes)
        for i, (name, shape) in enumerate(shapes.items()):
            view, offset = views[name], layout.offsets[i]
            assert view.shape == (*lead, *shape)
            assert torch.equal(view.reshape(*lead, -1), rows[..., offset : offset + math.prod(shape)])
            assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()

    @given(SHAPES)
    def test_flatten_and_views_are_inverse(self, shapes: Shapes) -> None:
        layout = plain(shapes)
        params = {name: torch.randn(shape).add_(10) for name, shape in shapes.items()}
        row = layout.flatten(params)
        assert row.shape == (layout.d,)
        assert row.dtype == torch.float32
        for name, view in layout.views(row).items():
            assert torch.equal(view, params[name])
            view.zero_()
        assert not row.any(), "padding is zero"
        assert all(tensor.any() for tensor in params.values()), "the row is a copy"


class TestChannelsLast:
    @pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
    def test_views_have_the_same_shapes_and_channels_behind(self, lead: tuple[int, ...]) -> None:
        layout = Layout.of(*NET)
        rows = torch.randn(*lead, layout.d)
        plain_views, views = layout.views(rows), layout.as_channels_last.views(rows)
        for name, view in views.items():
            assert view.shape == plain_views[name].shape
            assert view.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
            assert torch.equal(view, plain_views[name]) == (name != "conv.weight")
        assert views["conv.weight"].stride()[-3:] == (1, 5 * 3, 3)

    @pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
    def test_reordering_keeps_every_value(self, lead: tuple[int, ...]) -> None:
        layout = Layout.of(*NET)
        rows = torch.randn(*lead, layout.d)
        before = {name: view.clone() for name, view in layout.views(rows).items()}
        original, last = rows.clone(), layout.as_channels_last
        assert layout.reorder_(rows, last) is rows
        for name, view in last.views(rows).items():
            assert torch.equal(view, before[name])
        assert not torch.equal(rows, original)
        last.reorder_(rows, last)
        assert torch.equal(last.reorder_(rows, layout), original)

    def test_cuts_keep_the_order(self) -> None:
        layout = Layout.of(*NET).as_channels_last
        assert layout.cut(0.5).channels_last
        assert layout.d == Layout.of(*NET).d
        assert not Layout.of(*NET).cut(0.5).channels_last


class TestAxes:
    def test_widths_and_cut_axes(self) -> None:
        layout = Layout.of(*NET)
        assert layout.widths == {"heads": 8, "hidden": 10, "conv": 6, LABEL_AXIS: 4}
        assert layout.cut_axes == ("heads", "hidden", "conv")

    def test_bare_names_are_dims(self) -> None:
        assert as_dim("a") == Dim("a", outer=1, inner=1)
        assert as_dim(None) == Dim(None)
        assert as_dim(Dim("a", inner=2)) == Dim("a", inner=2)
        assert [Dim(axis).cuttable for axis in ("a", LABEL_AXIS, None)] == [True, False, False]

    @pytest.mark.parametrize("capacity", [1.0, 0.5, 0.3, 1 / 16])
    def test_cut_shapes(self, capacity: float) -> None:
        layout = Layout.of(*NET)
        heads, hidden, conv = (window_length(width, capacity) for width in (8, 10, 6))
        cut = layout.cut(capacity)
        assert dict(zip(cut.names, cut.shapes, strict=True)) == {
            "qkv.weight": (3 * heads, hidden),
            "conv.weight": (conv, 3, 5, 5),
            "hidden.weight": (hidden, conv * 49),
            "norm.bias": (conv,),
            "output.weight": (4, heads),
            "temperature": (),
        }
        assert cut.axes == layout.axes
        assert cut.widths == {"heads": heads, "hidden": hidden, "conv": conv, LABEL_AXIS: 4}
        if capacity == 1.0:
            assert cut == layout

    def test_windowed_shapes(self) -> None:
        layout = Layout.of(*NET)
        windows = {"heads": Window(8, ((0, 1), (7, 8))), "hidden": Window(10, ((4, 9),)), "conv": Window(6, ((0, 6),))}
        assert layout.windowed(windows).shapes == ((6, 5), (6, 3, 5, 5), (5, 6 * 49), (6,), (4, 2), ())

    @pytest.mark.parametrize("capacity", [0, 1.5])
    def test_capacity_outside(self, capacity: float) -> None:
        with pytest.raises(ConfigError, match="is outside"):
            Layout.of(*NET).cut(capacity)


class TestMismatches:
    @pytest.mark.parametrize(
        ("shapes", "axes", "expected"),
        [
            ({"a": (3,), "b": (3,)}, {"a": ("x",)}, "parameter 'b' has no axes: give one axis name, Dim or None"),
            ({"a": (3, 4)}, {"a": ("x",)}, "parameter 'a' has shape (3, 4) but 1 axes: give one per dimension"),
            ({"a": (3,)}, {"a": ("x", None)}, "parameter 'a' has shape (3,) but 2 axes"),
            (
                {"a": (3,), "b": (4,)},
                {"a": ("x",), "b": ("x",)},
                "axis 'x' of parameter 'b' has size 4, which does not",
            ),
            ({"a": (3, 4)}, {"a": ("x", "x")}, "and the width 3 it has elsewhere"),
            ({"a": (10,)}, {"a": (Dim("x", outer=3),)}, "has size 10, which does not fit outer 3, inner 1"),
            ({"a": (10,)}, {"a": (Dim("x", inner=4),)}, "has size 10, which does not fit outer 1, inner 4"),
            (
                {"a": (4,), "b": (8, 3)},
                {"a": ("label",), "b": ("label", None)},
                "axis 'label' of parameter 'b' has size 8",
            ),
        ],
    )
    def test_one_sentence(self, shapes: Shapes, axes: Axes, expected: str) -> None:
        for make in (axis_widths, Layout.of):
            with pytest.raises(ConfigError) as caught:
                make(shapes, axes)
            assert expected in str(caught.value)

    def test_axes_of_unknown_parameters_are_ignored(self) -> None:
        assert Layout.of({"a": (3,)}, {"a": ("x",), "more": ("x", "y")}).names == ("a",)


def test_labels_of_several_axes_are_numbered_one_axis_after_another() -> None:
    shapes = {"a.x": (3, 8), "b.x": (2, 8), "b.y": (8, 3), "c.x": (4,)}
    axes = {"a.x": ("label:digit", "w"), "b.x": ("label:motion", "w"), "b.y": ("w", "label:digit"), "c.x": ("w4",)}
    whole = Layout.of(shapes, axes)
    assert whole.labels == (("label:digit", 0), ("label:motion", 3))
    assert whole.num_labels == 5
    assert whole.cut_axes == ("w", "w4")
    for part in (whole.of_modules({"b"}), whole.cut(0.5), whole.of_modules({"b", "c"}).cut(0.25)):
        assert part.label_dims["b.x"] == (0, slice(3, 5))  # as in the whole model, though its own are fewer
        assert part.label_dims["b.y"] == (1, slice(0, 3))
    assert Layout.of({"x": (4,)}, {"x": ("labels",)}).num_labels == 0


def test_axes_say_what_is_convolved_with() -> None:
    """A parameter of four dimensions that is no kernel lies as it did, and one of a sequence's kernel is told, too."""
    shapes = {"scores": (2, 3, 4, 5), "image": (2, 3, 4, 5), "sequence": (2, 3, 4)}
    axes = {"scores": (None,) * 4, "image": (None, None, KERNEL, KERNEL), "sequence": (None, None, KERNEL)}
    layout = Layout.of(shapes, axes)
    assert layout.convolutions == {"image"}
    assert layout.convolves
    assert not layout.of_modules({"scores"}).convolves
    assert layout.of_modules({"sequence"}).convolves
    row = torch.arange(float(layout.d))
    plain, last = layout.views(row), layout.as_channels_last.views(row)
    assert [torch.equal(plain[name], last[name]) for name in shapes] == [True, False, True]
    moved = layout.reorder_(row.clone(), layout.as_channels_last)
    assert all(torch.equal(layout.as_channels_last.views(moved)[name], plain[name]) for name in shapes)
