"""Sub-models: axes, layouts, windows, extraction."""

from gossamer.submodel.cut import Cut, Cutter, count_shapes
from gossamer.submodel.extract import SubModel, cut_of, extract, layout_of
from gossamer.submodel.layout import LABEL_AXIS, Axes, Dim, Layout
from gossamer.submodel.strategies import Strategy, window
from gossamer.submodel.tracing import trace_axes
from gossamer.submodel.windows import Window

__all__ = [
    "LABEL_AXIS",
    "Axes",
    "Cut",
    "Cutter",
    "Dim",
    "Layout",
    "Strategy",
    "SubModel",
    "Window",
    "count_shapes",
    "cut_of",
    "extract",
    "layout_of",
    "trace_axes",
    "window",
]
