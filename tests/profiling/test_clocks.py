"""Clocks of machines: the stated error holds, whatever messages take."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.profiling.clocks import Clock, Ends, clock_between, clocks_of

DELAYS = st.lists(st.integers(1, 10**9), min_size=1, max_size=8)


def between(offset_ns: int, to: list[int], back: list[int]) -> tuple[Ends, Ends]:
    """Return both ends of messages that take so long each; the clock there is ahead."""
    here, there = Ends(), Ends()
    for way, delays, (sender, sender_ns), (receiver, receiver_ns) in (
        ("<", to, (here, 0), (there, offset_ns)),
        (">", back, (there, offset_ns), (here, 0)),
    ):
        for number, delay in enumerate(delays):
            at = 10**10 * number
            sender.note(f"a{way}{number}", at + sender_ns, is_sent=True)
            receiver.note(f"a{way}{number}", at + delay + receiver_ns, is_sent=False)
    return here, there


@given(st.integers(-(10**12), 10**12), DELAYS, DELAYS)
def test_the_stated_error_holds(offset_ns: int, to: list[int], back: list[int]) -> None:
    here, there = between(offset_ns, to, back)
    found = clock_between(here, there, 0.0)
    assert abs(found.offset - offset_ns / 1e9) <= found.error + 1e-9
    assert found.error == pytest.approx((min(to) + min(back)) / 2e9)
    assert clock_between(there, here, 0.0) == pytest.approx((-found.offset, found.error))


def test_messages_one_way_say_nothing() -> None:
    here, there = between(5, [3, 4], [])
    assert clock_between(here, there, 1.5) == (1.5, math.inf)


def test_what_was_sent_twice_says_nothing() -> None:
    here, there = between(0, [100], [100])
    before = clock_between(here, there, 0.0)
    for number in range(2):
        here.note("again", 10**9 * number, is_sent=True)
    there.note("again", 10**9 + 1, is_sent=False)
    assert clock_between(here, there, 0.0) == before


def test_each_machine_has_one() -> None:
    here, there = between(10**9, [2], [2])
    found = clocks_of({"a": here, "b": there, "c": Ends()}, "a", {"a": 0.0, "b": 0.0, "c": 2.0})
    assert found == {"a": Clock(0.0, 0.0), "b": pytest.approx((1.0, 2e-9)), "c": Clock(2.0, math.inf)}


def test_clocks_are_known_by_way_of_others() -> None:
    """A line a - b - c: c is 3 s ahead of b, which is 1 s ahead of a; messages between a and c go one way."""
    ends = {name: Ends() for name in "abc"}
    ahead = {"a": 0, "b": 10**9, "c": 4 * 10**9}
    messages = [("a", "b", 20), ("b", "a", 40), ("b", "c", 10), ("c", "b", 30), ("a", "c", 5)]
    for number, (sender, receiver, delay) in enumerate(messages):
        ends[sender].note(str(number), ahead[sender] + 1000 * number, is_sent=True)
        ends[receiver].note(str(number), ahead[receiver] + 1000 * number + delay, is_sent=False)
    found = clocks_of(ends, "a", dict.fromkeys(ends, 9.0))
    assert found["b"] == clock_between(ends["a"], ends["b"], 0.0)
    step = clock_between(ends["b"], ends["c"], 0.0)
    assert found["c"] == pytest.approx((found["b"].offset + step.offset, found["b"].error + step.error))
    assert abs(found["c"].offset - 4.0) <= found["c"].error
