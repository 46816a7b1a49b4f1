"""From summed payloads to an inbox: means over holders, sums over everybody."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gossamer.aggregate import Part, combine
from gossamer.submodel import LABEL_AXIS, Cutter, Layout
from gossamer.submodel.strategies import static

LAYOUT = Layout.of({"w": (4, 3), "output": (2, 4)}, {"w": ("a", None), "output": (LABEL_AXIS, "a")})
CUTTER = Cutter(LAYOUT, static, 1, 0)


def part(capacity: float, value: float, weight: float, label_weights: Tensor | None = None) -> Part:
    """A part whose participants all return `value`: sums are weighted, those of "count" are not."""
    cut = CUTTER.cut(capacity, 0, 0)
    full = {"w": torch.full((4, 3), value * weight), "output": torch.full((2, 4), value * weight)}
    if label_weights is not None:
        full["output"] = (label_weights * value)[:, None].expand(2, 4)
    row = LAYOUT.flatten(full)
    sums = {"x": cut.read(row, torch.zeros(cut.sub.d)), "count": torch.ones(cut.sub.d)}
    return Part(cut, sums, weight, label_weights)


def inbox_of(uplink: dict[str, str], *parts: Part) -> dict[str, dict[str, Tensor] | None]:
    found = combine(LAYOUT, uplink, parts)
    assert set(found) == {"held", *uplink}
    return {name: None if row is None else LAYOUT.views(row) for name, row in found.items()}


class TestMean:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_whole_models(self, count: int) -> None:
        inbox = inbox_of({"x": "mean"}, *(part(1.0, float(i), 2.0 + i) for i in range(count)))
        mean = sum(i * (2 + i) for i in range(count)) / sum(2 + i for i in range(count))
        assert inbox["held"] is None
        assert inbox["x"] is not None
        for view in inbox["x"].values():
            assert torch.equal(view, torch.full_like(view, mean))

    def test_each_coordinate_has_its_own_holders(self) -> None:
        inbox = inbox_of({"x": "mean"}, part(0.5, 1.0, 3.0), part(0.75, 5.0, 1.0))
        x, held = inbox["x"], inbox["held"]
        assert x is not None
        assert held is not None
        assert x["w"].tolist() == [[2.0] * 3] * 2 + [[5.0] * 3] + [[0.0] * 3]
        assert x["output"].tolist() == [[2.0, 2.0, 5.0, 0.0]] * 2
        assert held["w"].tolist() == [[True] * 3] * 3 + [[False] * 3]
        assert held["output"].tolist() == [[True] * 3 + [False]] * 2

    def test_one_small_part(self) -> None:
        inbox = inbox_of({"x": "mean"}, part(0.5, 6.0, 4.0))
        assert inbox["x"] is not None
        assert inbox["x"]["output"].tolist() == [[6.0, 6.0, 0.0, 0.0]] * 2

    def test_labels(self) -> None:
        parts = [part(1.0, 1.0, 3.0, torch.tensor([3.0, 0.0])), part(1.0, 5.0, 1.0, torch.tensor([1.0, 0.0]))]
        inbox = inbox_of({"x": "mean"}, *parts)
        assert inbox["x"] is not None
        assert inbox["held"] is not None
        assert inbox["x"]["w"].tolist() == [[2.0] * 3] * 4
        assert inbox["x"]["output"].tolist() == [[2.0] * 4, [0.0] * 4]
        assert inbox["held"]["output"].tolist() == [[True] * 4, [False] * 4]
        assert inbox["held"]["w"].all()

    def test_labels_of_one_whole_part(self) -> None:
        inbox = inbox_of({"x": "mean"}, part(1.0, 1.0, 3.0, torch.tensor([1.0, 2.0])))
        assert inbox["held"] is None
        assert inbox["x"] is not None
        assert inbox["x"]["output"].tolist() == [[1.0] * 4] * 2


class TestSum:
    def test_nobody_divides(self) -> None:
        inbox = inbox_of({"count": "sum"}, part(0.5, 9.0, 7.0), part(1.0, 9.0, 7.0), part(0.75, 9.0, 7.0))
        assert inbox["held"] is None
        assert inbox["count"] is not None
        assert inbox["count"]["output"].tolist() == [[3.0, 3.0, 2.0, 1.0]] * 2

    def test_beside_a_mean(self) -> None:
        inbox = inbox_of({"count": "sum", "x": "mean"}, part(1.0, 1.0, 3.0), part(1.0, 5.0, 1.0))
        assert inbox["x"] is not None
        assert inbox["count"] is not None
        assert inbox["x"]["w"].tolist() == [[2.0] * 3] * 4
        assert inbox["count"]["w"].tolist() == [[2.0] * 3] * 4
        assert inbox["held"] is None


class TestScalars:
    def test_mean_over_all_parts(self) -> None:
        """Whatever they hold, and whichever labels they own."""
        labels = torch.tensor([1.0, 0.0])
        parts = [
            replace(part(capacity, 0.0, weight, labels), sums={"tau": torch.tensor([weight * value])})
            for capacity, weight, value in [(0.5, 3.0, 2.0), (0.25, 1.0, 6.0)]
        ]
        inbox = combine(LAYOUT, {"tau": "mean"}, parts, scalars=("tau",))
        assert inbox["held"] is None
        assert inbox["tau"] is not None
        assert inbox["tau"].tolist() == [3.0]

    def test_sum(self) -> None:
        parts = [replace(part(capacity, 0.0, 7.0), sums={"n": torch.tensor([2.5])}) for capacity in (0.5, 1.0)]
        inbox = combine(LAYOUT, {"n": "sum"}, parts, scalars=("n",))
        assert inbox["n"] is not None
        assert inbox["n"].tolist() == [5.0]

    def test_beside_a_model(self) -> None:
        """The model's mean has its own holders still."""
        parts = [part(0.5, 1.0, 3.0), part(0.75, 5.0, 1.0)]
        both = [replace(one, sums={**one.sums, "tau": torch.tensor([one.weight])}) for one in parts]
        alone, inbox = (
            combine(LAYOUT, {"x": "mean"}, parts),
            combine(LAYOUT, {"tau": "mean", "x": "mean"}, both, {"tau"}),
        )
        assert alone["x"] is not None
        assert inbox["x"] is not None
        assert torch.equal(alone["x"], inbox["x"])
        assert inbox["tau"] is not None
        assert inbox["tau"].tolist() == [1.0]
        assert [one.sums["tau"].tolist() for one in both] == [[3.0], [1.0]]


def test_payloads_are_not_changed() -> None:
    """Two parts may rest in memory that the caller goes on using."""
    parts = [part(1.0, 1.0, 3.0), part(0.5, 5.0, 1.0)]
    before = [{name: row.clone() for name, row in one.sums.items()} for one in parts]
    combine(LAYOUT, {"x": "mean", "count": "sum"}, parts)
    for one, sums in zip(parts, before, strict=True):
        assert all(torch.equal(one.sums[name], row) for name, row in sums.items())


class TestRows:
    def test_stay_apart_in_the_order_given(self) -> None:
        """Padded with zeros where a participant holds nothing, and not weighted."""
        parts = []
        for capacity, values, weights in ((0.5, (1.0, 2.0), (3.0, 4.0)), (0.75, (5.0,), (0.5,))):
            cut = CUTTER.cut(capacity, 0, 0)
            rows = [torch.full((cut.sub.d,), value) for value in values]
            parts.append(Part(cut, {}, sum(weights), None, {"x": rows}, weights))
        inbox = combine(LAYOUT, {"x": "rows"}, parts)
        x, held, weight = inbox["x"], inbox["held"], inbox["weights"]
        assert x is not None
        assert held is not None
        assert weight is not None
        assert weight.tolist() == [3.0, 4.0, 0.5]
        assert [LAYOUT.views(row)["w"][:, 0].tolist() for row in x] == [[1, 1, 0, 0], [2, 2, 0, 0], [5, 5, 5, 0]]
        assert [LAYOUT.views(row)["output"][1].tolist() for row in x] == [[1, 1, 0, 0], [2, 2, 0, 0], [5, 5, 5, 0]]
        assert LAYOUT.views(held)["output"].tolist() == [[True] * 3 + [False]] * 2

    def test_whole_models_hold_everything(self) -> None:
        cut = CUTTER.cut(1.0, 0, 0)
        inbox = combine(LAYOUT, {"x": "rows"}, [Part(cut, {}, 1.0, None, {"x": [torch.ones(LAYOUT.d)]}, [1.0])])
        assert inbox["held"] is None
