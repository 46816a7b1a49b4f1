"""What handing over costs: an echo is measured, and its costs take the place of what a profile says of the host."""

from __future__ import annotations

import multiprocessing

import pytest

from gossamer.profiling.handing import FREE, Handing, measured_handing

HANDING = Handing(1e-5, 2e-10, 3e-5, 4e-10, 5e-5, 6e-10)


def test_an_echo_takes_time_and_leaves_no_process() -> None:
    found = measured_handing()
    assert min(found.submit, found.take, found.latency) > 0
    assert min(found) >= 0
    assert max(found.submit, found.take, found.latency) < 1
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("kind", "copies"), [("aggregate", 1), ("checkpoint", 1), ("mix", 0), ("checksum", 0)])
def test_bytes_cost_the_host_where_they_are_copied(kind: str, copies: int) -> None:
    costs = HANDING.applied(FREE, kind)
    assert (costs.submit, costs.take) == (1e-5, 3e-5)
    assert (costs.submit_seconds_per_byte, costs.take_seconds_per_byte) == (2e-10 * copies, 4e-10 * copies)


def test_a_link_is_no_quicker_than_the_processes() -> None:
    slow = FREE._replace(link_latency=1.0, link_seconds_per_byte=1.0)
    assert HANDING.applied(slow, "compress")[3:5] == (1.0, 1.0)
    assert HANDING.applied(FREE, "compress")[3:5] == (6e-10, 5e-5)
