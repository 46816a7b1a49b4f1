"""One peer of a decentralized run: it trains its own row, and exchanges rows with its neighbours, without a server."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import EngineSetup, Record
from gossamer.engines.network.addresses import AddressBook
from gossamer.engines.network.beginning import go_on_from
from gossamer.engines.network.children import SECRET
from gossamer.engines.network.lanes import When
from gossamer.engines.network.outbox import OUTBOX, Outbox
from gossamer.engines.network.peer_links import PeerLinks
from gossamer.engines.network.peer_row import PeerRow
from gossamer.engines.network.place import Place, Samples
from gossamer.engines.network.roster import model_digest, shape_of
from gossamer.engines.peers import Message, PeerEngine, mix_message
from gossamer.engines.task import Task, require_devices
from gossamer.engines.training.mixing import mixing_of
from gossamer.errors import ConfigError, EngineError, StateLost
from gossamer.memory import keep_freed_memory
from gossamer.plan import RoundPlan
from gossamer.storage.checkpoint import commits_in
from gossamer.storage.runlog import CHECKPOINTS
from gossamer.transport.authentication import Kit, load_kit

ROUNDS_BEHIND = 2  # after which a peer that may renormalise takes up the state of another one
ROW, STATE = "row", "state"  # kinds of messages
FILES = {"workload": ("dataset",), "peers": ("topology", "partition")}  # what they are is in digests of their own
OWN = ("name", "log", "replay", "checkpoint", "stop", "evaluation", "engine")  # sections that may differ between peers


def experiment_digest(task: Task, config: Mapping[str, Any]) -> str:
    """Return the id of a run: that of all peers of one resolved configuration, with the same model and topology.

    Where their files lie on each machine does not count, nor what data they hold, see `data_digest`.
    """
    assert task.topology is not None
    shared = {key: value for key, value in config.items() if key not in OWN}
    for section, files in FILES.items():
        shared[section] = {key: value for key, value in config[section].items() if key not in files}
    return _digest([shared, task.topology.digest()])


def data_digest(task: Task, config: Mapping[str, Any]) -> str | None:
    """Return a digest of the data and their partition, and of the modes that follow from them; None: a peer's own."""
    if config["engine"]["data"] is not None:
        return None
    return _digest([task.workload.digest(), config["engine"]["modes"]])


def _digest(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:32]


def place_of(task: Task, setup: EngineSetup, number: int | None, listen: str, book: AddressBook, secret: str) -> Place:
    """Return where a node of a run stands."""
    config, directory = setup.recipe["config"], setup.directory
    assert directory is not None
    return Place(
        number=number,
        num_peers=task.workload.num_clients,
        num_rounds=int(config["rounds"]),
        run=experiment_digest(task, config),
        samples=Samples(data_digest(task, config), shape_of(task), model_digest(task)),
        listen=listen,
        book=book,
        kit=None if setup.kit is None else load_kit(setup.kit),
        secret=secret,
        directory=directory,
    )


def require_renormalisable(task: Task, absent_neighbour: str) -> None:
    """Refuse to go on without neighbours where a method cannot.

    Raises:
        ConfigError: it cannot.
    """
    if absent_neighbour == "wait":
        return
    option = f"peers.absent_neighbour = {absent_neighbour!r}"
    if any(phase.algorithm.traits.codecs for phase in task.phases):
        raise ConfigError(
            f"{option} does not go with an algorithm that sends changes, because those that are lost would be missing"
            " for ever: set it to wait"
        )
    if mixing_of(task, 0, "topology").rows_per_site > 1:
        raise ConfigError(
            f"{option} does not go with a topology that mixes two rows of a peer together: set it to wait"
        )


def require_alike(task: Task, data: Any) -> None:
    """Refuse data of a peer's own where peers hold different modules: it could not tell which those of others are.

    Raises:
        ConfigError: they do.
    """
    if data is not None and len(task.workload.holdings) > 1:
        raise ConfigError(
            "--data is for peers that hold the same modalities: leave workload.modalities out, or leave --data out"
        )


class NetworkPeer(PeerEngine):
    """A peer: its plan has one row, its own, and its model is what is evaluated."""

    trains_in_place = True

    def __init__(self, task: Task, x: Tensor, setup: EngineSetup, number: int, addresses: Path) -> None:
        """Make the initial row, and listen.

        Args:
            x: [d], the initial model, of which the peer makes its own.
            number: of the peer.
            addresses: see `AddressBook`.

        Raises:
            ConfigError: there is no such peer, or the address cannot be listened on.
        """
        keep_freed_memory()
        require_devices(task)
        num_peers = task.workload.num_clients
        if not 0 <= number < num_peers:
            raise ConfigError(f"--id {number}: the run has the peers 0..{num_peers - 1}: give one of them")
        book = AddressBook(addresses, num_peers)
        listen = setup.address or book.of(number)
        if listen is None:
            raise ConfigError("no address to listen on is given: give --listen HOST:PORT")
        require_renormalisable(task, setup.recipe["config"]["peers"]["absent_neighbour"])
        require_alike(task, setup.recipe["config"]["engine"]["data"])
        super().__init__(task, x, [[number, number + 1]], setup)
        secret = os.environ.pop(SECRET, "")
        self._place = place_of(task, setup, number, listen, book, secret)
        self._check_kit(self._place.kit, number)
        self._row = PeerRow(task, number)
        self._outbox = Outbox(self._place.directory / OUTBOX)
        self._links = PeerLinks(self._place, ROW, setup.hooks)
        options = setup.recipe["config"]["peers"]
        self._waits, self._patience_seconds = options["absent_neighbour"] == "wait", options["patience_seconds"]
        self._is_begun, commits = False, commits_in(self._place.directory / CHECKPOINTS)
        self._is_done = bool(commits) and commits[0][0] >= (self._place.num_rounds - 1, task.num_phases)
        self._told: Record = {}
        setup.hooks.report("listening", address=self._links.address)
        setup.hooks.tell(f"peer {number} listens on {self._links.address}")

    @staticmethod
    def _check_kit(kit: Kit | None, number: int) -> None:
        if kit is not None and kit.number != number:
            raise ConfigError(
                f"--id {number}, but the kit {str(kit.directory)!r} is that of peer {kit.number}: leave it out"
            )

    def read(self) -> Arrays:
        """Return the state arrays themselves, [1, d]."""
        return self._row.state | self._statistics.read()

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state arrays."""
        for name, value in self._statistics.take(state).items():
            self._row.state[name].copy_(value)
        self._squares, self.is_whole = None, True

    def measure(self, plan: RoundPlan) -> Record:
        """Return nothing: what there is to tell of other peers is not known here."""
        return {}

    def close(self) -> None:
        """Stay until nobody needs anything of this peer, if its run is over, and leave."""
        if self._is_done:
            is_again = not self._is_begun
            if is_again:
                self._take_up((self._place.num_rounds, 0))
            if self._links.finish(inf if self._waits else self._patience_seconds, is_again=is_again):
                self._outbox.end(self._place.num_rounds)
        self._links.close("the peer has ended")

    # ---- inside

    def _train_jobs(self, plan: RoundPlan, jobs: list[list[Message]]) -> Iterator[Message]:
        at, message = (plan.round, plan.phase), _mix_message(plan)
        self._is_done = False
        if not self._is_begun:
            self._take_up(at)
        specs = {sender: self._row.specs(message, sender) for sender in self._row.senders(message)}
        self._links.begin(at, specs, {name: row.clone() for name, row in self._row.state.items()})
        for job in jobs[0]:
            reply = self._row.train(job)
            self._told = {name: reply[name] for name in ("loss", "finite", "norm")}
            yield reply

    def _take_up(self, at: When) -> None:
        """Begin at a phase; what was sent before may be needed again."""
        kept: dict[int, list[Any]] = {}
        for sent, arrays, receivers in self._outbox.read(at):
            for receiver in receivers:
                kept.setdefault(receiver, []).append(self._links.message(ROW, sent, arrays))
        for receiver, messages in kept.items():
            self._links.lane(receiver, messages)
        self._is_begun = True

    def _mix(self, plan: RoundPlan) -> None:
        at, message = (plan.round, plan.phase), _mix_message(plan)
        senders, receivers = self._row.senders(message), self._row.receivers(message)
        payload = self._row.payload(message)
        self._outbox.write(at, payload, receivers)
        for receiver in receivers:
            self._links.lane(receiver).put(self._links.message(ROW, at, payload))
        until = None if self._waits else time.monotonic() + self._patience_seconds
        missing = self._links.wait(at, senders, receivers, until)
        if missing:
            self._go_without(at, missing)
        here = {*senders} - missing  # a row that has come since is not used: others can tell from the log what was
        received = {sender: dict(one.arrays) for sender, one in self._links.collected(at).items() if sender in here}
        self._require_finite(at, received)
        self._row.mix(message, received)
        self._outbox.keep({one for lane in self._links.lanes.values() for one in lane.kept} | {at})
        self._show(at, until)
        is_last = plan.phase + 1 == self._task.num_phases
        self._is_done = is_last and plan.round + 1 == self._place.num_rounds

    def _go_without(self, at: When, missing: set[int]) -> None:
        """Note whose rows have not come; where others have long gone on, take up the state of one of them.

        Raises:
            StateLost: that is now the last commit.
        """
        where = {"round": at[0] + 1} | ({} if self._task.num_phases == 1 else {"phase": at[1] + 1})
        ahead = max(sorted(missing), key=self._links.rounds_ahead)
        is_behind = self._links.rounds_ahead(ahead) >= (1 if self._waits else ROUNDS_BEHIND)
        specs = {name: (row.dtype, tuple(row.shape)) for name, row in self._row.state.items()}
        found = self._links.state_of(ahead, specs, is_patient=self._waits) if is_behind else None
        if found is not None and found[0] > at:
            go_on_from(self._place.directory, *found)
            told = {"taken_from": ahead, "taken_round": found[0][0] + 1, "taken_phase": found[0][1] + 1}
            raise StateLost(f"peer {ahead} is in round {found[0][0] + 1}: its state is taken up", **told)
        if self._waits:
            raise EngineError(
                f"peer {ahead} is past round {at[0] + 1} and does not send its row again: start this peer once more"
            )
        self.hooks.report("neighbours-absent", **where, peers=sorted(missing))

    @staticmethod
    def _require_finite(at: When, received: Mapping[int, Arrays]) -> None:
        for sender, arrays in received.items():
            if not all(bool(row.isfinite().all()) for row in arrays.values()):
                raise EngineError(
                    f"round {at[0] + 1}: what peer {sender} sent is not finite, which no peer of this run sends: look"
                    " at that machine, and start this peer again"
                )

    def _show(self, at: When, until: float | None) -> None:
        """Send the observer what came of a phase, if there is one."""
        if self._place.book.has_observer:
            lane, state = self._links.lane(None), {name: row.clone() for name, row in self._row.state.items()}
            lane.put(self._links.message(STATE, at, state, self._told))
            self._links.wait(at, (), [None], until)

    def _take_mean(self) -> float:
        """Take the peer's own model for the mean."""
        self._mean = self._row.state["x"][0].clone()
        return 0.0

    def _models(self, peers: list[int]) -> None:
        """Return nothing: the row is here."""

    def _map_chunks(self, message: Message, models: Any, num_chunks: int) -> list[list[Any]]:
        replies = []
        for chunk in range(num_chunks):
            self.hooks.check()
            replies.append(self._row.evaluate({**message, "chunk": chunk}))
        return [reply["sums"] for reply in replies]


def _mix_message(plan: RoundPlan) -> Message:
    """Return the message of a plan that is for one peer alone, see `PeerRow.payload`."""
    return mix_message(plan) | {"variants": plan.variants.tolist()}
