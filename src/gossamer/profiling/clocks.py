"""By how much the clock of one machine is ahead of another's, from the messages between them.

A message is received after it was sent. So for each message from here to there, reception by that clock less sending by
this one is no less than the difference of the clocks, and for each message back, sending there less reception here is
no more. The tightest bounds of a run enclose it and half their distance is the largest error, as in the clock filter of
NTP (RFC 5905, section 10). Clocks are taken to run at the same speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Clock(NamedTuple):
    """A clock against another one, in seconds.

    Attributes:
        offset: by which it is ahead.
        error: largest of the offset; infinite: nothing is known of it.
    """

    offset: float
    error: float


@dataclass
class Ends:
    """The messages of one machine, by ids: when each began to be sent, and was received, in nanoseconds by its clock.

    Of an id that comes twice, as of a message that was sent again, nothing is used.
    """

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    _repeated: set[str] = field(default_factory=set)

    def note(self, message: str, at_ns: int, *, is_sent: bool) -> None:
        """Note that a message was sent or received."""
        times = self.sent if is_sent else self.received
        if message in times:
            self._repeated.add(message)
        times[message] = at_ns

    def spans_to(self, other: Ends) -> list[int]:
        """Return what the other's clock says at reception less what this one says at sending, in nanoseconds."""
        repeated = self._repeated | other._repeated
        return [
            other.received[message] - at
            for message, at in self.sent.items()
            if message in other.received and message not in repeated
        ]


def clock_between(here: Ends, there: Ends, by_time_of_day: float) -> Clock:
    """Return the clock there against the one here.

    Args:
        here, there: messages of either machine.
        by_time_of_day: offset in seconds, which is taken where messages do not go both ways.
    """
    to, back = here.spans_to(there), there.spans_to(here)
    if not to or not back:
        return Clock(by_time_of_day, math.inf)
    upper, lower = min(to) / 1e9, -min(back) / 1e9
    return Clock((upper + lower) / 2, abs(upper - lower) / 2)


def clocks_of(machines: Mapping[str, Ends], reference: str, by_time_of_day: Mapping[str, float]) -> dict[str, Clock]:
    """Return the clock of each machine against that of one of them, by way of others where their errors add up to less.

    Where no messages lead there, both ways, it is that by the time of day.
    """
    found, near = dict[str, Clock](), {reference: Clock(0.0, 0.0)}
    while near:
        name = min(near, key=lambda one: near[one].error)
        found[name] = here = near.pop(name)
        for other in machines.keys() - found.keys():
            step = clock_between(machines[name], machines[other], 0.0)
            by_way = Clock(here.offset + step.offset, here.error + step.error)
            if by_way.error < (near[other].error if other in near else math.inf):
                near[other] = by_way
    return {name: found.get(name, Clock(by_time_of_day[name], math.inf)) for name in machines}
