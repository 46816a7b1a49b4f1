"""A federation whose clients dial in: this process is the server, and never sees their training data."""

from __future__ import annotations

import itertools
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import DEADLINE, GONE, OVER_SELECTION, REFUSED, EngineSetup, Record
from gossamer.engines.network.asked import ORDER, STATE
from gossamer.engines.network.evaluating import MODEL, STATISTICS, reason_of
from gossamer.engines.network.evaluation import ClientEvaluation
from gossamer.engines.network.observer import NetworkObserver
from gossamer.engines.network.packing import answer_specs, packed_model, unpacked_answer
from gossamer.engines.network.peer import NetworkPeer
from gossamer.engines.network.processes import Processes
from gossamer.engines.network.roster import Asked, Node, Roster, no_kits, told_of
from gossamer.engines.network.state import StateFile
from gossamer.engines.peers import PeerEngine
from gossamer.engines.server import KEPT, FederatedEngine
from gossamer.engines.statistics import name_of, statistics_in
from gossamer.engines.task import Task
from gossamer.engines.training.compression import decoded_downlink
from gossamer.engines.training.job import BlockResult
from gossamer.engines.training.worker import Worker
from gossamer.errors import ConfigError, Disconnected, Interrupted, TransportError
from gossamer.memory import keep_freed_memory
from gossamer.plan import Block, RoundPlan
from gossamer.storage.client_store import ClientStore
from gossamer.threads import one_thread
from gossamer.transport import SERVER, Address, Event, Expectations, Gone, Header, Joined, Message, Received, Server
from gossamer.transport.audit import AUDIT, AuditLog, no_audit
from gossamer.transport.authentication import load_kit
from gossamer.transport.credentials import Credentials
from gossamer.workloads.base import Sums
from gossamer.workloads.held import ToldWorkload

AHEAD = 2  # jobs that a node has, so that it need not wait for the next one
POLL_SECONDS = 0.1
DISMISS_SECONDS = 3.0
LOOPBACK = "127.0.0.1:0"
UPDATE, NOTHING = "update", "nothing"  # kinds of answers: there is a payload, or it is not usable


class NetworkEngine(FederatedEngine):
    """Trains a federation on clients that dial in, with the bits of the local engine.

    Every client is a block of its own, and keeps its private state itself.
    """

    is_remote = True

    def __init__(self, task: Task, state: Mapping[str, Tensor], store: ClientStore | None, setup: EngineSetup) -> None:
        """Listen, start clients unless an address is given, and wait until enough of them are there.

        Raises:
            ConfigError: the address cannot be listened on.
            EngineError: a client that was started here ends with an error.
            Interrupted: a stop was requested before they were there.
        """
        if setup.recipe["config"]["engine"]["peers_file"] is not None:
            raise ConfigError(
                "the run has clients and a server, and no peers: take gossamer node server and gossamer node client"
            )
        keep_freed_memory()
        super().__init__(task, {name: value.clone() for name, value in state.items()}, None, setup, 1)
        config = setup.recipe["config"]
        self._setup, self._run, self._num_rounds = setup, str(setup.recipe["run"]), int(config["rounds"])
        self._block_size = 1
        self._local = Worker(task, self._state, self._order, torch.zeros(0, 0), setup.hooks.stop_requested)
        self._kept = torch.full((task.workload.num_clients, 2), -1, dtype=torch.int64)
        self._commits: deque[tuple[tuple[int, int], Tensor]] = deque(maxlen=config["checkpoint"]["keep"])
        self._done, self._numbers = (0, 0), itertools.count()
        self._models: dict[Any, Arrays] = {}
        self._began, self._num_answers = 0.0, 0  # of the phase
        self._refused: set[str] = set()  # names of nodes that refuse the whole run
        secret = secrets.token_hex(16) if setup.address is None else None
        told = {"run": self._run, "instance": secrets.token_hex(16), **told_of(task, config)}
        kit = None if setup.kit is None else load_kit(setup.kit, "server")
        client_of = no_kits if kit is None else kit.members().client_of
        self._roster, self._expected = Roster(task, told, secret, client_of), Expectations()
        self._audit, self._server = self._listen(None if kit is None else kit.credentials())
        self._evaluation = ClientEvaluation(
            run=self._run,
            num_clients=task.workload.num_clients,
            server=self._server,
            roster=self._roster,
            expected=self._expected,
            numbers=self._numbers,
            receive=self._next,
            refused=self._note_refusal,
            look_after=self._look_after,
            hooks=setup.hooks,
            clock=setup.clock,
        )
        self._file: StateFile | None = None
        self._processes: Processes | None = None
        try:
            if secret is None:
                self._announce()
            else:
                num_clients = task.workload.num_clients
                self._processes = Processes(self._server.address, secret, num_clients, setup)
            self._gather()
        except BaseException:
            self.close()
            raise

    def _listen(self, credentials: Credentials | None) -> tuple[AuditLog | None, Server]:
        """Open the audit log, unless all clients are processes of this machine, and listen."""
        setup, log = self._setup, None
        if setup.address is not None and setup.directory is not None:
            log = AuditLog(setup.directory / AUDIT)
        try:
            return log, Server(
                setup.address or LOOPBACK,
                admit=self._roster.admit,
                accept=self._accept,
                credentials=credentials,
                audit=no_audit if log is None else log.record,
            )
        except BaseException:
            if log is not None:
                log.close()
            raise

    @staticmethod
    def of_peers(task: Task, x: Tensor, setup: EngineSetup) -> PeerEngine:
        """Return the engine of one peer, or of the observer of all, see `gossamer.engines.network.observer`."""
        options = setup.recipe["config"]["engine"]
        addresses = None if options["peers_file"] is None else Path(options["peers_file"])
        if options["peer"] is None:
            return NetworkObserver(task, x, setup, addresses)
        if addresses is None:
            raise ConfigError("engine.peer is given without engine.peers_file, the addresses of all: give --peers")
        return NetworkPeer(task, x, setup, options["peer"], addresses)

    @property
    def address(self) -> str:
        """Where clients dial, as host:port."""
        return self._server.address

    def close(self) -> None:
        """Tell the nodes that it is over, or will go on later, and stop those that were started here."""
        self._dismiss()
        self._server.close()
        if self._audit is not None:
            self._audit.close()
        if self._processes is not None:
            self._processes.close()

    def _dismiss(self) -> None:
        """Tell all nodes of the end, and wait a little until they have left."""
        body, end = {"is_over": self._done[0] >= self._num_rounds}, time.monotonic() + DISMISS_SECONDS
        told: set[str] = set()
        while (nodes := self._server.nodes().keys()) and time.monotonic() < end:
            address = Address(self._run, *self._done, SERVER, next(self._numbers))
            for node in nodes - told:
                with suppress(TransportError):
                    self._server.send(node, Message("end", address, body))
            told |= nodes
            event = self._server.receive(POLL_SECONDS)
            if isinstance(event, Joined | Gone):  # one that joined again knows nothing of it
                told.discard(event.node)

    # ---- state

    def exchange(self, plan: RoundPlan) -> None:
        """Combine and update the state; from now on the survivors' private state of this phase holds."""
        super().exchange(plan)
        self._kept[torch.from_numpy(plan.client[self.survivors(plan)])] = torch.tensor([plan.round, plan.phase])
        self._done = (plan.round, plan.phase + 1) if plan.phase + 1 < self._task.num_phases else (plan.round + 1, 0)

    def read(self) -> Arrays:
        """Return copies of the state arrays, and of which private state holds where clients keep some."""
        return super().read() | ({KEPT: self._kept.clone()} if self._task.stored_arrays else {})

    def held(self) -> Arrays:
        """Return what is committed, and remember which private state it needs."""
        if not self._commits or self._commits[-1][0] != self._done:
            self._commits.append((self._done, self._kept.clone()))
        return self.read()

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace state arrays.

        Raises:
            ConfigError: the clients' private state is with another engine.
        """
        given = dict(state)
        if self._task.stored_arrays and "x" in given:
            if KEPT not in given:
                raise ConfigError(
                    "the private state of clients is in the run's directory, where clients of engine network do not"
                    " find it: resume with the engine that the run began with"
                )
            self._kept.copy_(given.pop(KEPT))
            self._commits.clear()
        super().write(given)

    def measure(self, plan: RoundPlan) -> Record:
        """Return what real clients reach on test data of their own, if models travel; their own are not evaluated."""
        evaluation = self._setup.recipe["config"]["evaluation"]
        is_asked = evaluation["on_clients"] and not self._task.algorithm.traits.represents
        if not isinstance(self._task.workload, ToldWorkload) or not is_asked:
            return {}
        statistics = self._statistics.read()

        def arrays(index: int, capacity: float) -> Arrays:
            """Return what a model is evaluated by."""
            found, _ = statistics_in(statistics, name_of(capacity))
            row = self._local.row(self._task.variant(index), plan.round)
            return {MODEL: row.clone()} | {f"{STATISTICS}{name}": value for name, value in found.items()}

        capacities = self._task.capacities if evaluation["by_capacity"] else ()
        return self._evaluation.measure((plan.round, self._task.num_phases - 1), arrays, capacities)

    # ---- inside

    def _begin(self) -> None:
        self._roster.begin_phase()
        self._expected.forget()
        self._models, self._began = {}, time.monotonic()

    def _train_blocks(self, plan: RoundPlan, blocks: list[Block]) -> Iterator[BlockResult]:
        waiting = {int(plan.client[block.rows.start]): block for block in blocks}
        self._num_answers = 0
        while waiting and not self.hooks.stop_requested():
            self._ask(plan, waiting)
            result = self._answer(plan, waiting)
            if result is not None:
                self._num_answers += 1
                yield result
            self._drop_late(waiting)
            self._look_after(waiting)

    def _ask(self, plan: RoundPlan, waiting: Mapping[int, Block]) -> None:
        """Give nodes jobs of theirs that wait, a few at a time."""
        for client, block in waiting.items():
            node = self._roster.node_of(client)
            if node is None or client in node.asked or len(node.asked) >= AHEAD:
                continue
            with suppress(Disconnected):  # its jobs are given again once it is back
                self._send_job(node, plan, client, block, next(self._numbers))

    def _send_job(self, node: Node, plan: RoundPlan, client: int, block: Block, attempt: int) -> None:
        job, variant = self._job(plan, block), self._task.variants[block.variant]
        key = block.variant if variant.shares_window else None
        if key not in node.models:
            node.models[key] = next(self._numbers)
            address = Address(self._run, plan.round, plan.phase, SERVER, node.models[key])
            body: dict[str, Any] = {"is_cut": key is not None}
            self._server.send(node.name, Message("model", address, body, self._model(plan, block, key)))
        address = Address(self._run, plan.round, plan.phase, client, attempt)
        specs = answer_specs(self._phase, variant, self._state["x"].dtype)
        self._expected.expect(node.name, UPDATE, address, specs)
        self._expected.expect(node.name, NOTHING, address, {})
        self._expected.expect(node.name, REFUSED, address, {})
        kept, needed = self._kept[client].tolist(), None
        if len(self._commits) == self._commits.maxlen:
            needed = self._commits[0][1][client].tolist()
        body = {"job": job.message(), "model": node.models[key], "kept": kept, "needed": needed}
        self._server.send(node.name, Message("train", address, body))
        node.asked[client] = Asked(attempt, time.monotonic())

    def _model(self, plan: RoundPlan, block: Block, key: int | None) -> Arrays:
        """Return what clients start from: cut to their window, if they share it, or the whole state."""
        if key not in self._models:
            names = self._phase.algorithm.traits.downlink if key is not None else self._state
            rows = {name: self._state[name] for name in names or self._state}
            if key is not None:
                rows = decoded_downlink(self._phase, self._state, rows, plan.round, plan.phase)
                variant = self._task.variants[block.variant]
                rows = packed_model(variant, self._task.cut(variant, plan.round, order=self._order), rows)
            # Copies, because a message that is dropped may still be under way when the state is updated.
            self._models[key] = {f"{STATE}{name}": row.clone() for name, row in rows.items()}
            self._models[key] |= {f"{ORDER}{axis}": order.clone() for axis, order in self._order.items()}
        return self._models[key]

    def _answer(self, plan: RoundPlan, waiting: dict[int, Block]) -> BlockResult | None:
        """Handle what happens next, if it happens soon; return the result that came, if one did."""
        event = self._next()
        if event is None:
            return None
        message, node = event.message, self._roster.get(event.node)
        client = message.address.sender
        asked = None if node is None else node.asked.get(client)
        if node is None or asked is None or asked.attempt != message.address.attempt or client not in waiting:
            return None
        del node.asked[client]
        block, body = waiting.pop(client), message.body
        if message.kind == REFUSED:
            self._reasons[block.rows.start] = REFUSED
            self._note_refusal(event)
            return None
        finite = message.kind == UPDATE and all(bool(value.isfinite().all()) for value in message.arrays.values())
        loss, norm = (float(body[name]) if type(body.get(name)) is float else np.nan for name in ("loss", "norm"))
        described = {"arrays": [], "loss": [loss], "finite": [finite], "norm": [norm]}
        if finite:
            described["arrays"] = [[f"payload.{name}", 0] for name in message.arrays]
        rows = unpacked_answer(self._phase, block.variant, message.arrays) if finite else ()
        return self._block_result(block, described, rows)

    def _accept(self, header: Header) -> Mapping[str, Tensor] | None:
        """Take what was asked for, and from nodes that have not joined as clients that they refuse the run."""
        is_first = header.kind == REFUSED and header.address.order == (0, 0, 0) and not header.specs
        return None if is_first and self._roster.get(header.node) is None else self._expected(header)

    def _next(self) -> Received | None:
        """Return a message, if one comes soon; note whatever else happens."""
        event = self._server.receive(POLL_SECONDS)
        if not isinstance(event, Received):
            self._note(event)
            return None
        self._roster.hear(event.node)
        is_unasked = event.message.kind == REFUSED and self._roster.get(event.node) is None
        if is_unasked and event.node not in self._refused:  # once, or it might fill the disk
            self._refused.add(event.node)
            self._note_refusal(event)
        return event

    def _note_refusal(self, event: Received) -> None:
        """Tell that a client does not do what it is asked, and why, as it says."""
        address, reason = event.message.address, reason_of(event.message)
        where = {"round": address.round + 1, "client": address.sender}
        self.hooks.report("refused", **where, node=event.node, reason=reason)
        self.hooks.tell(f"{event.node} refuses what it is asked: {reason}")

    def _drop_late(self, waiting: dict[int, Block]) -> None:
        """Stop waiting for those who have not answered, once the clock says so."""
        clock, seconds = self._setup.clock, time.monotonic() - self._began
        if clock is None or not waiting:
            return
        enough = clock.num_awaited is not None and self._num_answers >= clock.num_awaited
        if not enough and (clock.deadline_seconds is None or seconds < clock.deadline_seconds):
            return
        for client, block in waiting.items():
            reason = GONE if self._roster.node_of(client) is None else DEADLINE
            self._reasons[block.rows.start] = OVER_SELECTION if enough else reason
        waiting.clear()

    def _announce(self) -> None:
        """Say where real clients are to dial."""
        assert self._setup.directory is not None
        where, num_clients = self._server.address, self._task.workload.num_clients
        self._file = StateFile(self._setup.directory, where, num_clients, self._num_rounds, self.hooks.show)
        self.hooks.report("listening", address=where)
        self.hooks.tell(f"listening on {where} for {num_clients} clients")

    def _note(self, event: Event | None) -> None:
        """Take note of who came, and who went."""
        before = self._roster.present
        if isinstance(event, Joined):
            self._roster.join(event.hello)
        elif isinstance(event, Gone) and event.node not in self._server.nodes():
            self._roster.leave(event.node)
        present = self._roster.present
        if self._file is None or event is None or present == before:
            return
        kind, changed = "joined" if isinstance(event, Joined) else "left", sorted(present ^ before)
        self.hooks.report(kind, node=event.node, clients=changed)
        self.hooks.tell(
            f"{event.node} has {kind}: {len(present)} of {self._task.workload.num_clients} clients are there"
        )

    def _gather(self) -> None:
        """Wait until enough clients are there: all of them, or as many as a round has where it has a deadline."""
        clock, wanted = self._setup.clock, self._task.workload.num_clients
        if clock is not None and clock.deadline_seconds is not None:
            wanted = int(self._setup.recipe["config"]["clients"]["per_round"])
        while len(self._roster.present) < wanted:
            if self.hooks.stop_requested():
                raise Interrupted("stopped while it waited for clients")
            self._next()
            self._look_after([])

    def _look_after(self, waiting: Iterable[int]) -> None:
        """Start processes again that are gone, or have been silent for too long; tell how things stand."""
        if self._processes is not None:
            self._processes.look_after(self._roster)
        if self._file is not None:
            self._file.write(self._roster, self._done, sorted(waiting), self._server.traffic)

    def _map_chunks(self, message: dict[str, Any], num_chunks: int) -> list[Sums]:
        replies = []
        for chunk in range(num_chunks):
            self.hooks.check()
            with one_thread():
                replies.append(self._local.handle({**message, "chunk": chunk}))
        return [{name: np.array(v, dtype=np.float64) for name, v in reply["sums"].items()} for reply in replies]
