"""Spans: seconds added up by name, and listeners that hear of every start and end."""

from __future__ import annotations

from itertools import count

import pytest

from gossamer.profiling import spans
from gossamer.profiling.spans import Spans


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every look at the clock take one second."""
    ticks = count()
    monkeypatch.setattr(spans.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
class TestSpans:
    def test_seconds_add_up_by_name(self) -> None:
        measured = Spans()
        with measured.span("train"):
            pass
        with measured.span("train"), measured.span("inside"):
            pass
        assert measured.take() == {"train": 1 + 3, "inside": 1}

    def test_taking_starts_anew(self) -> None:
        measured = Spans()
        assert measured.take() == {}
        with measured.span("train"):
            pass
        first = measured.take()
        with measured.span("train"):
            pass
        assert first == measured.take() == {"train": 1}

    def test_a_span_that_fails_still_counts(self) -> None:
        measured, heard = Spans(), []
        measured.listeners.append(lambda name, starts: heard.append((name, starts)))
        with pytest.raises(ZeroDivisionError), measured.span("train"):
            _ = 1 / 0
        assert measured.take() == {"train": 1}
        assert heard == [("train", True), ("train", False)]

    def test_listeners_hear_in_order(self) -> None:
        measured, heard = Spans(), []
        for listener in ("a", "b"):
            measured.listeners.append(lambda name, starts, to=listener: heard.append((to, name, starts)))
        with measured.span("outer"), measured.span("inner"):
            pass
        expected = [("outer", True), ("inner", True), ("inner", False), ("outer", False)]
        assert heard == [(listener, *event) for event in expected for listener in ("a", "b")]
