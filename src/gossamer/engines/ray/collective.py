"""Peers' actors that send rows to each other as a group of torch's, instead of through the object store.

Each has blocks of its own, which it trains, too. The rows stay in the object store as well, so that a group whose
member is gone costs its messages and nothing else: a new one does the whole exchange again.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gossamer.engines.collective.group import INTERFACE, LOOPBACK, Backend, Meeting, Place, address_of
from gossamer.engines.ray.actor_pool import HUNG, READY, Actors, Call
from gossamer.errors import ConfigError, RoundAborted

MOST_GROUPS = 5  # for one exchange
MEETING_SECONDS = 60.0  # in which members must have come, or a message gone, unless stragglers are given less
LEAST_MEETING_SECONDS = 10.0
SLOW_BYTES_PER_SECOND = 10e6  # of a network that is still waited for


class Together:
    """Which actor has which blocks, and the group that they are in.

    Attributes:
        size: number of actors.
        kinds: of actors, of which there is one each.
    """

    def __init__(
        self,
        backend: Backend,
        bounds: Sequence[Sequence[int]],
        num_actors: int,
        *,
        most_bytes: int,
        straggler_seconds: float | None,
    ) -> None:
        """Open a meeting, and share out blocks.

        Args:
            backend: of the group.
            bounds: [low, high] of each block.
            num_actors: at most; there are no more than blocks.
            most_bytes: that an actor can send in a round.
            straggler_seconds: as of the engine.

        Raises:
            ConfigError: the cluster has several machines, and which network they shall use is not said.
        """
        self._backend, self.size = backend, min(num_actors, len(bounds))
        self._rank = [number * self.size // len(bounds) for number in range(len(bounds))]
        self._numbers = [[n for n, rank in enumerate(self._rank) if rank == one] for one in range(self.size)]
        self._spans = [[bounds[numbers[0]][0], bounds[numbers[-1]][1]] for numbers in self._numbers]
        patience = MEETING_SECONDS if straggler_seconds is None else HUNG * straggler_seconds
        self._seconds = max(LEAST_MEETING_SECONDS, patience) + most_bytes / SLOW_BYTES_PER_SECOND
        self.kinds = [f"rank-{rank}" for rank in range(self.size)]
        self._meeting = Meeting(meeting_host())
        self._places: list[Place] = []
        self._formed_with: tuple[int, ...] = ()

    def spread(self, calls: Iterable[Call]) -> dict[str, list[Call]]:
        """Give every call to the actor that has the block of its key; keys beyond the blocks begin again."""
        by_kind = defaultdict(list)
        for call in calls:
            by_kind[self.kinds[self._rank[call.key % len(self._rank)]]].append(call)  # type: ignore[operator]
        return dict(by_kind)

    def mix(
        self, actors: Actors, described: dict[str, Any], trained: Sequence[Any], report: Callable[..., None]
    ) -> list[Any]:
        """Mix all blocks.

        Args:
            actors: one of each kind.
            described: the message, as of `PeerHost.mix_together`, without blocks, spans and places.
            trained: references to what was trained, block by block.
            report: is told of a group that broke.

        Returns:
            references to the blocks' new state.

        Raises:
            RoundAborted: one group broke after the other.
        """
        reason = ""
        for _ in range(MOST_GROUPS):
            places = self._places
            if not places or self._formed_with != actors.generations:
                # Members wait for each other, but not as long as an actor may take to start.
                list(actors.map({kind: [READY._replace(key=kind)] for kind in self.kinds}))
                places = self._meeting.places(self.size, self._backend, self._seconds)
            self._places, self._formed_with = [], actors.generations  # none, should anything be raised
            began = time.monotonic()
            calls = {kind: [self._call(places[rank], described, trained)] for rank, kind in enumerate(self.kinds)}
            answers = dict(actors.map(calls))
            reasons = [answer[0] for answer in answers.values() if answer[0]]
            if not reasons:
                self._places = places
                actors.note_seconds("mix_together", time.monotonic() - began)
                return [found for rank in range(self.size) for found in answers[rank][1:]]
            reason = reasons[0]
            report("retry", reason="group-broken", call=reason)
        raise RoundAborted(
            f"{MOST_GROUPS} groups of Ray actors in a row broke ({reason}): look at the memory and the logs of the"
            " cluster, or leave engine.collective out, then resume"
        )

    def close(self) -> None:
        """Let nobody meet any more."""
        self._meeting.close()

    def _call(self, place: Place, described: dict[str, Any], trained: Sequence[Any]) -> Call:
        """Return the call of one actor; made again it says that its group is broken."""
        numbers = self._numbers[place.rank]
        message = described | {"numbers": numbers, "spans": self._spans}
        first, again = (json.dumps(message | {"place": place}) for place in (place, None))
        blocks = [trained[number] for number in numbers]
        return Call(
            place.rank,
            "mix_together",
            (first, *blocks),
            num_returns=1 + len(blocks),
            again=(again, *blocks),
            waits_seconds=2 * self._seconds,
        )


def meeting_host() -> str:
    """Return at which address of this machine all actors can meet: on loopback, where they all are on it.

    Raises:
        ConfigError: they are not, and the variable that names a network is not set.
    """
    import ray

    nodes: list[Mapping[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    if len({node["NodeManagerAddress"] for node in nodes if node["Alive"]}) <= 1:
        return LOOPBACK
    if INTERFACE not in os.environ:
        raise ConfigError(
            "engine.collective makes the actors of a cluster listen to each other without authentication: name the"
            f" interface of a private network by the variable {INTERFACE}, for this command and for ray start on every"
            " machine, or leave engine.collective out"
        )
    return address_of(os.environ[INTERFACE])
