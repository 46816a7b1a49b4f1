"""Exchange of rows between peers' actors by a process group of torch, instead of through the object store.

Each actor has blocks of its own, which it also trains. The rows stay in the object store as well, so that a lost member
costs the group's messages and nothing else: a new group does the whole exchange again.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gossamer.engines.collective.group import INTERFACE, LOOPBACK, Backend, Member, Rendezvous, address_of
from gossamer.engines.ray.actor_pool import HUNG, READY, ActorPool, Call
from gossamer.errors import ConfigError, RoundAborted

MAX_GROUPS = 5  # for one exchange
TIMEOUT_SECONDS = 60.0  # of a rendezvous or a message, where engine.straggler_seconds is not given
MIN_TIMEOUT_SECONDS = 10.0
MIN_BYTES_PER_SECOND = 10e6  # of a network, for the timeout of large messages


class CollectiveExchange:
    """The blocks of each actor, and the group that the actors form.

    Attributes:
        size: number of actors.
        kinds: kinds of actors, one for each rank.
    """

    def __init__(
        self,
        backend: Backend,
        bounds: Sequence[Sequence[int]],
        num_actors: int,
        *,
        max_bytes: int,
        straggler_seconds: float | None,
    ) -> None:
        """Open a rendezvous, and assign blocks to actors.

        Args:
            backend: backend of the group.
            bounds: [low, high] of each block.
            num_actors: largest number of actors; there are no more than blocks.
            max_bytes: most bytes that an actor can send in a round.
            straggler_seconds: see `ActorPool`.

        Raises:
            ConfigError: the cluster has several machines, and no network is named for them.
        """
        self._backend, self.size = backend, min(num_actors, len(bounds))
        self._rank = [number * self.size // len(bounds) for number in range(len(bounds))]
        self._numbers = [[n for n, rank in enumerate(self._rank) if rank == one] for one in range(self.size)]
        self._spans = [[bounds[numbers[0]][0], bounds[numbers[-1]][1]] for numbers in self._numbers]
        patience = TIMEOUT_SECONDS if straggler_seconds is None else HUNG * straggler_seconds
        self._seconds = max(MIN_TIMEOUT_SECONDS, patience) + max_bytes / MIN_BYTES_PER_SECOND
        self.kinds = [f"rank-{rank}" for rank in range(self.size)]
        self._rendezvous = Rendezvous(rendezvous_host())
        self._members: list[Member] = []
        self._formed_with: tuple[int, ...] = ()

    def spread(self, calls: Iterable[Call]) -> dict[str, list[Call]]:
        """Group calls by the kind of the actor that has the block of their key; keys beyond the blocks wrap around."""
        by_kind = defaultdict(list)
        for call in calls:
            by_kind[self.kinds[self._rank[call.key % len(self._rank)]]].append(call)  # type: ignore[operator]
        return dict(by_kind)

    def mix(
        self, actors: ActorPool, described: dict[str, Any], trained: Sequence[Any], report: Callable[..., None]
    ) -> list[Any]:
        """Mix all blocks.

        Args:
            actors: one of each kind.
            described: message of `PeerActor.mix_collectively`, without numbers, spans and member.
            trained: references to the trained blocks.
            report: callback for groups that break.

        Returns:
            references to the new state of each block.

        Raises:
            RoundAborted: `MAX_GROUPS` groups broke one after another.
        """
        reason = ""
        for _ in range(MAX_GROUPS):
            members = self._members
            if not members or self._formed_with != actors.generations:
                # Members wait for each other, but not as long as an actor may take to start.
                list(actors.map({kind: [READY._replace(key=kind)] for kind in self.kinds}))
                members = self._rendezvous.members(self.size, self._backend, self._seconds)
            self._members, self._formed_with = [], actors.generations  # none, should anything be raised
            began = time.monotonic()
            calls = {kind: [self._call(members[rank], described, trained)] for rank, kind in enumerate(self.kinds)}
            answers = dict(actors.map(calls))
            reasons = [answer[0] for answer in answers.values() if answer[0]]
            if not reasons:
                self._members = members
                actors.note_seconds("mix_collectively", time.monotonic() - began)
                return [found for rank in range(self.size) for found in answers[rank][1:]]
            reason = reasons[0]
            report("retry", reason="group-broken", call=reason)
        raise RoundAborted(
            f"{MAX_GROUPS} groups of Ray actors in a row broke ({reason}): look at the memory and the logs of the"
            " cluster, or leave engine.collective out, then resume"
        )

    def close(self) -> None:
        """Close the rendezvous."""
        self._rendezvous.close()

    def _call(self, member: Member, described: dict[str, Any], trained: Sequence[Any]) -> Call:
        """Return the call of one actor; a repetition only reports that its group is broken."""
        numbers = self._numbers[member.rank]
        message = described | {"numbers": numbers, "spans": self._spans}
        first, again = (json.dumps(message | {"member": member}) for member in (member, None))
        blocks = [trained[number] for number in numbers]
        return Call(
            member.rank,
            "mix_collectively",
            (first, *blocks),
            num_returns=1 + len(blocks),
            again=(again, *blocks),
            waits_seconds=2 * self._seconds,
        )


def rendezvous_host() -> str:
    """Return an address of this machine that all actors reach: loopback, if they are all on it.

    Raises:
        ConfigError: they are on several machines, and `INTERFACE` is not set in the environment.
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
