"""Windows: FedRolex's Eq. 3 by brute force, coverage, uniform subsets, segments."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer import submodel
from gossamer.errors import ConfigError, RegistryError
from gossamer.submodel.strategies import Strategy, window
from gossamer.submodel.windows import Window, check_capacity, window_length

STRATEGIES = ["rolling", "static", "random"]
WIDTHS = st.integers(1, 80)
CAPACITIES = st.floats(0, 1, exclude_min=True) | st.sampled_from([1.0, 0.5, 0.25, 0.125, 0.0625])
# Within 1e-9 of the next whole channel the length is rounded up, because 0.7 * 10 should be 7.
ROUNDING = 1e-9


def length_of(width: int, capacity: float) -> int:
    return max(1, math.floor(capacity * width + ROUNDING))


def own_window(width: int, length: int, **address: Any) -> Window:
    """A user's strategy: the last channels."""
    return Window(width, ((width - length, width),))


own = Strategy(own_window, shared=True)


class TestLength:
    @pytest.mark.parametrize(
        ("width", "capacity", "length"),
        [(10, 1 / 16, 1), (64, 1 / 16, 4), (10, 0.7, 7), (10, 0.69, 6), (7, 0.5, 3), (3, 1.0, 3), (1, 1e-9, 1)],
    )
    def test_examples(self, width: int, capacity: float, length: int) -> None:
        assert window_length(width, capacity) == length

    def test_a_share_of_whole_channels_is_exact(self) -> None:
        """The nearest float to p/q of a width is never a channel short, though its product may be: 0.29 * 100 < 29."""
        assert window_length(100, 0.29) == 29
        for width in range(1, 130):
            for channels in range(1, width + 1):
                assert window_length(width, channels / width) == channels

    @given(WIDTHS, st.fractions(Fraction(1, 1000), 1, max_denominator=1000))
    def test_floor_of_the_exact_product(self, width: int, share: Fraction) -> None:
        assert window_length(width, float(share)) == max(1, math.floor(share * width))

    @pytest.mark.parametrize("capacity", [0, 0.0, -0.5, 1.0001, 2, math.nan, math.inf, "0.5", None])
    def test_outside_is_refused(self, capacity: Any) -> None:
        for refuse in (
            lambda: check_capacity(capacity),
            lambda: window_length(8, capacity),
            lambda: window("rolling", 8, capacity, 0),
        ):
            with pytest.raises(ConfigError) as caught:
                refuse()
            assert f"capacity {capacity!r} is outside (0, 1]" in str(caught.value)


class TestEveryStrategy:
    @given(st.sampled_from(STRATEGIES), WIDTHS, CAPACITIES, st.integers(0, 500), st.integers(-70, 70))
    def test_shape_and_order(self, strategy: str, width: int, capacity: float, round: int, stride: int) -> None:
        found = window(strategy, width, capacity, round, stride, seed=1, client=2, group="axis")
        indices = found.indices
        assert indices.dtype == np.int64
        assert indices.shape == (length_of(width, capacity),) == (len(found),)
        assert (np.diff(indices) > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < width
        assert found.width == width

    @given(st.sampled_from(STRATEGIES), WIDTHS, st.integers(0, 500), st.integers(-70, 70), st.integers(0, 9))
    def test_full_window_is_the_identity(self, strategy: str, width: int, round: int, stride: int, client: int) -> None:
        found = window(strategy, width, 1.0, round, stride, client=client)
        assert found.is_full
        assert found.segments == ((0, width),)
        assert found.indices.tolist() == list(range(width))

    @given(st.sampled_from(STRATEGIES), WIDTHS, CAPACITIES, st.integers(0, 500))
    def test_segments_are_ascending_with_gaps(self, strategy: str, width: int, capacity: float, round: int) -> None:
        segments = window(strategy, width, capacity, round, client=round).segments
        assert all(start < stop for start, stop in segments)
        assert all(before[1] < after[0] for before, after in pairwise(segments))
        if strategy != "random":
            assert len(segments) <= 2

    def test_is_full_needs_every_channel(self) -> None:
        assert not window("rolling", 8, 0.9, 0).is_full
        assert not window("static", 8, 0.9, 0).is_full

    def test_public_name(self) -> None:
        found = submodel.window("rolling", width=64, capacity=0.25, round=3, stride=1, seed=0, client=0, group=0)
        assert found.indices.tolist() == list(range(3, 19))

    def test_plug_in(self) -> None:
        found = window(f"{__name__}:own", 8, 0.25, 5)
        assert found.indices.tolist() == [6, 7]

    def test_unknown_strategy(self) -> None:
        with pytest.raises(RegistryError, match="did you mean 'rolling'"):
            window("roling", 8, 0.5, 0)

    @pytest.mark.parametrize("width", [0, -1])
    def test_width_below_one(self, width: int) -> None:
        with pytest.raises(ConfigError, match=f"axis width {width} is below 1"):
            window("static", width, 0.5, 0)


class TestRolling:
    @given(WIDTHS, CAPACITIES, st.integers(0, 500), st.integers(-70, 70), st.integers(0, 3))
    def test_equation_3(self, width: int, capacity: float, round: int, stride: int, client: int) -> None:
        length = length_of(width, capacity)
        expected = sorted({(round * stride + t) % width for t in range(length)})
        found = window("rolling", width, capacity, round, stride, seed=client, client=client, group=client)
        assert found.indices.tolist() == expected

    def test_default_stride_is_one(self) -> None:
        assert window("rolling", 5, 0.4, 4).indices.tolist() == [0, 4]

    @pytest.mark.parametrize(("width", "capacity"), [(8, 0.25), (10, 1 / 16), (7, 0.5), (16, 0.9), (5, 1.0)])
    def test_stride_one_covers_all_channels_after_k_minus_l_plus_1_rounds(self, width: int, capacity: float) -> None:
        length = length_of(width, capacity)
        self.assert_covered_first_after(width - length + 1, width, capacity, 1)

    @pytest.mark.parametrize(("width", "capacity"), [(8, 0.25), (10, 1 / 16), (7, 0.5), (16, 0.9), (512, 1 / 16)])
    def test_stride_of_the_length_covers_after_k_over_l_rounds(self, width: int, capacity: float) -> None:
        length = length_of(width, capacity)
        self.assert_covered_first_after(-(-width // length), width, capacity, length)

    def assert_covered_first_after(self, num_rounds: int, width: int, capacity: float, stride: int) -> None:
        seen: set[int] = set()
        for round in range(num_rounds):
            assert len(seen) < width, f"covered before round {round}"
            seen |= set(window("rolling", width, capacity, round, stride).indices.tolist())
        assert seen == set(range(width))


class TestStatic:
    @given(WIDTHS, CAPACITIES, st.integers(0, 500), st.integers(-9, 9))
    def test_always_the_first_channels(self, width: int, capacity: float, round: int, stride: int) -> None:
        found = window("static", width, capacity, round, stride, seed=round, client=round)
        assert found.indices.tolist() == list(range(length_of(width, capacity)))


class TestRandom:
    def draw(self, **address: Any) -> tuple[int, ...]:
        found = window("random", **({"width": 64, "capacity": 0.5, "round": 0} | address))
        return tuple(found.indices.tolist())

    def test_the_address_decides(self) -> None:
        assert self.draw(client=3, group="a", seed=1) == self.draw(client=3, group="a", seed=1)
        changes: list[dict[str, Any]] = [{}, {"client": 1}, {"round": 1}, {"seed": 1}, {"group": "a"}, {"group": "b"}]
        assert len({self.draw(**change) for change in changes}) == len(changes)

    def test_the_stride_does_not(self) -> None:
        assert self.draw(stride=1) == self.draw(stride=5)

    def test_groups_of_a_client_are_independent(self) -> None:
        """Two width groups share no more channels than chance has it: 32 of 64 twice meet in 16."""
        shared = [
            len({*self.draw(client=client, group="a")} & {*self.draw(client=client, group="b")})
            for client in range(200)
        ]
        assert abs(np.mean(shared) - 16) < 0.6  # standard error 0.14

    def test_all_subsets_are_equally_likely(self) -> None:
        counts = Counter(self.draw(width=5, capacity=0.4, client=client) for client in range(3000))
        assert len(counts) == 10
        statistic = sum((count - 300) ** 2 / 300 for count in counts.values())
        assert statistic < 27.9  # 9 degrees of freedom, 0.1 % point


class TestOfIndices:
    @given(st.sets(st.integers(0, 40), min_size=1))
    def test_round_trip(self, channels: set[int]) -> None:
        found = Window.of_indices(41, sorted(channels))
        assert found.indices.tolist() == sorted(channels)
        assert len(found) == len(channels)
        assert all(before[1] < after[0] for before, after in pairwise(found.segments))
