"""Buckets of tokens: never more than a burst and what flowed in since, whatever the times of the calls."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.transport.rate_limits import Bucket, take


def slow(times: list[float], per_second: float, burst: float) -> list[bool]:
    """Which calls are served, from the definition: a call is, if no window of time that ends with it has too many."""
    served: list[float] = []
    found = []
    for now in times:
        ok = all(
            sum(1 for one in served if one >= start) + 1 <= burst + (now - start) * per_second + 1e-9
            for start in {*served, now}
        )
        found.append(ok)
        served += [now] * ok
    return found


class TestTake:
    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(0, 12), max_size=30), st.sampled_from([0.25, 0.5, 1.0, 2.0]), st.integers(1, 5))
    def test_equals_the_definition(self, gaps: list[int], per_second: float, burst: int) -> None:
        times, now = [], 0.0
        for gap in gaps:
            now += gap / 4
            times.append(now)
        bucket, found = Bucket(float(burst), 0.0), []
        for now in times:
            bucket, wait = take(bucket, now, 1.0, per_second, float(burst))
            found.append(wait == 0.0)
        assert found == slow(times, per_second, float(burst))

    def test_waiting_that_long_is_enough(self) -> None:
        bucket, wait = take(Bucket(0.5, 10.0), 10.0, 2.0, 4.0, 8.0)
        assert wait == 0.375
        assert take(bucket, 10.0 + wait, 2.0, 4.0, 8.0) == (Bucket(0.0, 10.375), 0.0)

    def test_a_clock_that_goes_back_gives_nothing(self) -> None:
        bucket, wait = take(Bucket(0.0, 10.0), 5.0, 1.0, 1.0, 1.0)
        assert (bucket, wait) == (Bucket(0.0, 10.0), 1.0)
