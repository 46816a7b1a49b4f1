"""What clients reach on test data of their own: they are asked for sums, and the server makes metrics of them."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import REFUSED, EngineHooks, Record, WallClock
from gossamer.engines.network.evaluating import COUNTS, EVALUATE
from gossamer.engines.network.roster import Node, Roster
from gossamer.engines.task import WHOLE
from gossamer.errors import Disconnected
from gossamer.round_record import divided, lower_is_better, merged
from gossamer.transport import Address, Expectations, Message, Received, Server

Counts = dict[str, tuple[float, float]]  # {name of a metric: (sum, number of samples)}
MAX_LISTED = 100  # clients that one event names
LOCAL, WORST = "local_", "worst_client_"
NAME = re.compile(r"(validation_)?local_[a-z_]{1,40}")  # of a metric that clients may tell


@dataclass(frozen=True, kw_only=True)
class ClientEvaluation:
    """Asks the nodes of a server for what their clients count.

    Attributes:
        run: id of the run.
        num_clients: clients of the run.
        server, roster, expected, numbers: see `NetworkEngine`.
        receive: waits for what happens, for a short time; returns a message that came, if one did.
        refused: told of a message that refuses an evaluation.
        look_after: called again and again with the clients that are waited for.
        hooks: see `EngineHooks`.
        clock: when those who have not answered are left out, as in training; None: all are waited for.
    """

    run: str
    num_clients: int
    server: Server
    roster: Roster
    expected: Expectations
    numbers: Iterator[int]
    receive: Callable[[], Received | None]
    refused: Callable[[Received], None]
    look_after: Callable[[Iterable[int]], None]
    hooks: EngineHooks
    clock: WallClock | None

    def measure(
        self, when: tuple[int, int], arrays: Callable[[int, float], Arrays], capacities: Sequence[float]
    ) -> Record:
        """Return what clients reach with the whole model, and with its sub-models.

        Args:
            when: round and phase, counted from 0, that the requests belong to.
            arrays: callback that returns what a client needs for a variant, by its number and capacity.
            capacities: of the variants whose sub-models are evaluated, in the order of their numbers; () for none.

        Raises:
            Interrupted: a stop was requested.
        """
        whole = self._collect(when, WHOLE, arrays(WHOLE, 1.0))
        of_whole, by_capacity = metrics_of(whole), dict[float, dict[str, float]]()
        for index, capacity in enumerate(capacities):
            same = capacity == 1.0
            found = of_whole if same else metrics_of(self._collect(when, index, arrays(index, capacity)))
            by_capacity[capacity] = found
        named = {f"{capacity:g}": metrics for capacity, metrics in by_capacity.items()}
        return merged(of_whole, divided(of_whole, named), details_of(whole))

    def _collect(self, when: tuple[int, int], variant: int, arrays: Arrays) -> dict[int, Counts]:
        """Ask all nodes, and return what each client counts, of those that answer."""
        waiting, found, began = set(range(self.num_clients)), dict[int, Counts](), time.monotonic()
        asked: dict[Node, Address] = {}
        while waiting:
            self.hooks.check()
            self.look_after(waiting)
            for node in self.roster.nodes:
                if node not in asked and node.clients & waiting:
                    with suppress(Disconnected):  # it is asked once it is back
                        asked[node] = self._ask(node, when, variant, arrays)
            received = self.receive()
            node_of = None if received is None else self.roster.get(received.node)
            if received is not None and node_of is not None and asked.get(node_of) == received.message.address:
                if received.message.kind == REFUSED:
                    self.refused(received)
                told = _read(received.message.body.get("clients"))
                found |= {client: counts for client, counts in told.items() if client in node_of.clients & waiting}
                waiting -= node_of.clients
            elif self._is_late(time.monotonic() - began, self.num_clients - len(waiting)):
                listed = sorted(waiting)[:MAX_LISTED]
                self.hooks.report("not-evaluated", round=when[0] + 1, num_clients=len(waiting), clients=listed)
                break
        return dict(sorted(found.items()))

    def _is_late(self, seconds: float, num_answers: int) -> bool:
        """Say whether those are left out who have not answered."""
        deadline, number = (None, None) if self.clock is None else (self.clock.deadline_seconds, self.clock.num_awaited)
        return (deadline is not None and seconds > deadline) or (number is not None and num_answers >= number)

    def _ask(self, node: Node, when: tuple[int, int], variant: int, arrays: Arrays) -> Address:
        """Send a node a request; return the address of its answer."""
        clients = sorted(node.clients)
        address = Address(self.run, *when, clients[0], next(self.numbers))
        for kind in (COUNTS, REFUSED):
            self.expected.expect(node.name, kind, address, {})
        self.server.send(node.name, Message(EVALUATE, address, {"variant": variant, "clients": clients}, arrays))
        return address


def _read(told: Any) -> dict[int, Counts]:
    """Return what clients count, as far as it is well-formed."""
    found = dict[int, Counts]()
    for client, counts in told.items() if isinstance(told, Mapping) else ():
        if isinstance(counts, Mapping) and client.isdecimal() and len(client) < 19:
            pairs = [(name, pair) for name, pair in counts.items() if NAME.fullmatch(name) and _is_pair(pair)]
            found[int(client)] = {name: (float(total), float(number)) for name, (total, number) in pairs}
    return found


def _is_pair(pair: Any) -> bool:
    """Say whether this is a sum, and a number of samples."""
    is_numbers = isinstance(pair, list) and len(pair) == 2 and all(type(one) in (int, float) for one in pair)
    return is_numbers and all(math.isfinite(one) for one in pair) and pair[1] > 0


def metrics_of(found: Mapping[int, Counts]) -> dict[str, float]:
    """Return the mean and the worst of the clients' metrics, as a simulation has them.

    Args:
        found: what each client counts, by ascending number.
    """
    record: dict[str, float] = {}
    for name in dict.fromkeys(name for counts in found.values() for name in counts):
        values = np.array([total / number for total, number in _pairs(found, name).values()])
        worst = values.max() if lower_is_better(name) else values.min()
        record |= {name: float(values.mean()), name.replace(LOCAL, WORST, 1): float(worst)}
    return record


def details_of(found: Mapping[int, Counts]) -> Record:
    """Return what a simulation does not have: the mean weighted by samples, and the metric of each client."""
    record = Record()
    for name in dict.fromkeys(name for counts in found.values() for name in counts):
        pairs = _pairs(found, name)
        totals, numbers = zip(*pairs.values(), strict=True)
        record[f"{name}_weighted"] = math.fsum(totals) / math.fsum(numbers)
        record[f"{name}_by_client"] = {str(client): total / number for client, (total, number) in pairs.items()}
    return record


def _pairs(found: Mapping[int, Counts], name: str) -> dict[int, tuple[float, float]]:
    return {client: counts[name] for client, counts in found.items() if name in counts}
