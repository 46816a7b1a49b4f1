"""A node that is one or more clients: it dials the server, and trains on data that never leave it."""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.base import Arrays
from gossamer.engines.base import REFUSED, never
from gossamer.engines.network.asked import Models, asked_job
from gossamer.engines.network.engine import NOTHING, UPDATE
from gossamer.engines.network.evaluating import COUNTS, EVALUATE, counts_of
from gossamer.engines.network.packing import packed_answer
from gossamer.engines.network.private import PrivateState
from gossamer.engines.network.roster import model_digest, shape_objection, shape_of, versions
from gossamer.engines.private_rows import PrivateRows
from gossamer.engines.task import Task, require_devices
from gossamer.engines.training.job import Job
from gossamer.engines.training.worker import Worker
from gossamer.errors import DataError, Disconnected, Dropped, Interrupted, PolicyError, TransportError
from gossamer.profiling import recorder
from gossamer.threads import one_thread
from gossamer.transport import Address, Client, Message
from gossamer.transport.audit import no_audit
from gossamer.transport.messages import SERVER_NODE, Audit
from gossamer.transport.policy import Policy

POLL_SECONDS = 0.2
DIAL_SECONDS = 5.0
STAGES = {"model": "receive", "train": "train"}  # of messages; what they ask for besides is to evaluate
Dial = Callable[[Mapping[str, Any], float], Client]  # (what it says, seconds) -> connection


@dataclass(kw_only=True)
class ClientNode:
    """A node, and what it needs to know.

    Attributes:
        dial: callback that joins the server, or raises `Disconnected`.
        clients: numbers of the clients that it is.
        make_task: callback that rebuilds the task of a resolved configuration, or refuses it.
        directory: where the clients keep their private state.
        patience_seconds: how long it tries to find a server that is away; infinite: for ever.
        linger_seconds: how long it waits for another run after one has ended.
        is_simulated: whether its data are a part of the run's.
        secret: what a server asks of the processes that it has started.
        tell: callback for lines about what happens.
        stop: asked whether it shall end.
        policy: what a server may ask for; None: anything.
        audit: told of what is refused, see `gossamer.transport.Client`.
    """

    dial: Dial
    clients: Sequence[int]
    make_task: Callable[[Mapping[str, Any]], Task]
    directory: Path
    patience_seconds: float = math.inf
    linger_seconds: float = 10.0
    is_simulated: bool = False
    secret: str = ""
    tell: Callable[[str], None] = lambda line: None
    stop: Callable[[], bool] = never
    policy: Policy | None = None
    audit: Audit = no_audit
    _training: Training | None = field(default=None, init=False)

    def run(self) -> None:
        """Take part until the run is over.

        Raises:
            Disconnected: there was no server for too long.
            Refused: the server does not want this node.
            Interrupted: a stop was requested.
            GossamerError: this node refuses what it is asked, or cannot do it.
        """
        over: tuple[Any, Any] | None = None  # run and server that have said last that there is nothing more to do
        while over is None or self.linger_seconds:
            patience = self.patience_seconds if over is None else self.linger_seconds
            try:
                told = self._learn(patience, is_expected=over is None)
            except Disconnected:
                if over is not None:
                    return
                raise
            server = told["run"], told.get("instance")
            if server != over:
                over, patience = None, self.patience_seconds
            try:
                if self._take_part(told, patience):
                    over = server
                    self.tell("the run is over")
            except Disconnected as error:
                if over is None:
                    self.tell(f"{error}; trying again")

    def _learn(self, patience: float, *, is_expected: bool) -> Mapping[str, Any]:
        """Ask the server what is trained, and prepare for it; `is_expected`: see `_join`."""
        with closing(self._join({}, patience, is_expected=is_expected)) as asking:
            told: Mapping[str, Any] = asking.welcome
            if self._training is None or self._training.run != told["run"]:
                self._training = None  # whose memory is free from here on
                run = _run_of(told)
                try:
                    task = self.make_task(told["config"])
                    _require_shape(task, told.get("data"))
                except (PolicyError, DataError) as error:
                    self._refuse(asking, "config", Address(run, 0, 0, self.clients[0]), str(error))
                    raise
                self._training = Training(task, run, self.directory, self.stop, self.policy)
        return told

    def _refuse(self, link: Client, kind: str, address: Address, reason: str) -> None:
        """Tell the server, and whoever reads what this node logs, that it does not do what it is asked."""
        self.audit("refused", node=SERVER_NODE, message=kind, address=vars(address), reason=reason)
        self.tell(f"refused: {reason}")
        with suppress(TransportError):  # it may not want to know
            link.send(Message(REFUSED, address, {"reason": reason}))

    def _join(self, clients: Mapping[str, Any], patience: float, *, is_expected: bool = True) -> Client:
        """Join the server, which may be away; nothing is told of that unless it `is_expected` to be there."""
        hello = {"versions": versions(), "is_simulated": self.is_simulated, "secret": self.secret, "clients": clients}
        hello["model"] = self._training.model if self._training is not None and clients else None
        end, is_told = time.monotonic() + patience, False
        while not self.stop():
            left = end - time.monotonic()
            try:
                return self.dial(hello, max(0.1, min(left, DIAL_SECONDS)))
            except Disconnected as error:
                if left <= DIAL_SECONDS:
                    raise
                if is_expected and not is_told:
                    self.tell(f"{error}; waiting for it")
                    is_told = True
        raise Interrupted("stopped")

    def _take_part(self, told: Mapping[str, Any], patience: float) -> bool:
        """Join with what the clients hold, and do what the server asks; return whether the run is over."""
        training = self._training
        assert training is not None
        facts = {str(client): training.facts(client, with_labels=not self.secret) for client in self.clients}
        with closing(self._join(facts, patience)) as link:
            if link.welcome["run"] != told["run"]:
                return False
            training.begin(link.welcome["instance"])
            self.tell(f"joined as client {', '.join(map(str, self.clients))}")
            waiting = deque[Message]()
            while not self.stop():
                received = link.receive(0.0 if waiting else POLL_SECONDS)
                if received is not None:
                    waiting.append(received.message)
                    continue
                if not waiting:
                    continue
                message = waiting.popleft()
                if message.kind == "end":
                    return bool(message.body["is_over"])
                if not any(_is_later(other, message) for other in waiting):
                    with recorder.span(STAGES.get(message.kind, "evaluate")):
                        self._answer(link, training, message)
                    recorder.flush()
        raise Interrupted("stopped")

    def _answer(self, link: Client, training: Training, message: Message) -> None:
        """Do what the server asks, or refuse it."""
        try:
            if message.address.run != training.run:
                raise PolicyError(f"the server asks for work of run {message.address.run!r}, not of {training.run!r}")
            if message.kind == "model":
                training.take_model(message)
            elif message.kind == "train":
                link.send(training.train(message, self.clients))
            elif message.kind == EVALUATE:
                link.send(training.evaluate(message, self.clients))
            else:
                raise PolicyError(f"the server asks for {message.kind!r}, which no client does: models are trained, and"
                                  " evaluated")  # fmt: skip
        except PolicyError as error:
            self._refuse(link, message.kind, message.address, str(error))
        except Dropped as error:
            self.tell(f"round {message.address.round + 1}: not wanted any more ({error})")


class Training:
    """Trains the clients of a node for one run.

    Attributes:
        run: id of the run.
        model: see `model_digest`.
    """

    def __init__(
        self,
        task: Task,
        run: str,
        directory: Path,
        stop: Callable[[], bool] = never,
        policy: Policy | None = None,
    ) -> None:
        """Bind a task.

        Args:
            directory: where clients keep their private state of runs.
            stop: asked whether training shall be given up.
            policy: see `ClientNode`.
        """
        require_devices(task)
        self.run, self._task, self._directory, self._policy = run, task, directory / run, policy
        self._dtype = task.workload.init(task.seed).dtype
        self.model = model_digest(task)
        self._state: Arrays = {}
        self._order: Arrays = {}
        self._worker = Worker(task, self._state, self._order, torch.zeros(0, 0), stop)
        self._server = ""
        self._allowed = Models(task)
        self._models: dict[int, Message] = {}
        self._taken: int | None = None  # number of the model that training starts from
        self._last: tuple[Any, Message] | None = None  # which may be asked for again

    def begin(self, server: str) -> None:
        """Begin to work for a server; another one, as of a run that is resumed, knows nothing of what was before."""
        if server != self._server:
            self._server, self._models, self._taken, self._last = server, {}, None, None

    def facts(self, client: int, *, with_labels: bool) -> dict[str, Any]:
        """Return what the server is told of a client's data: number of samples, and labels."""
        workload = self._task.workload
        found: dict[str, Any] = {"num_samples": int(workload.num_samples[client])}
        if with_labels:
            labels = workload.client_labels(np.array([client]))[0]
            found["labels"] = labels.nonzero().flatten().tolist()
        return found

    def take_model(self, message: Message) -> None:
        """Keep what some clients start from; those of the phase before are not needed any more."""
        here = (message.address.round, message.address.phase)
        kept = {n: one for n, one in self._models.items() if (one.address.round, one.address.phase) == here}
        self._models = kept | {message.address.attempt: message}

    def train(self, message: Message, own: Sequence[int]) -> Message:
        """Train one of the node's `own` clients; return the answer.

        Raises:
            PolicyError: it is refused.
        """
        job, body, address = asked_job(self._task, message, own), message.body, message.address
        key = (address.round, address.phase, address.sender, job.max_norm, body["kept"])
        if self._last is None or self._last[0] != key:
            kind, told, arrays = self._result(job, body)
            self._last = key, Message(kind, address, told, arrays)
        return Message(self._last[1].kind, address, self._last[1].body, self._last[1].arrays)

    def evaluate(self, message: Message, own: Sequence[int]) -> Message:
        """Evaluate a model on the clients' own test data; return the answer, see `counts_of`.

        Raises:
            PolicyError: it is refused.
        """
        if self._policy is not None:
            self._policy.check_evaluation()
        return Message(COUNTS, message.address, counts_of(self._task, message, own, self._policy))

    def _result(self, job: Job, body: Mapping[str, Any]) -> tuple[str, dict[str, Any], Arrays]:
        trainer, client = self._worker.trainers[job.phase], int(job.client[0])
        if self._policy is not None:
            held = int(self._task.workload.num_samples[client])
            self._policy.check_steps(int(job.steps.max()), self._task.batch_size, held)
        self._receive(job, body["model"])
        phase = trainer.task
        state = self._private_state(client, body)
        kept = PrivateRows(state, self._dtype)
        private = {} if state is None else kept.of_job(phase, job, self._order)
        with one_thread():
            result = trainer.train(job, private)
        if state is not None:
            kept.keep(phase, job.block.variant, job.round, job.client, result.private, self._order)
            state.write((job.round, job.phase))
        told = {"loss": _number(result.loss[0]), "norm": _number(result.norm[0])}
        if not result.finite[0]:
            return NOTHING, told, {}
        rows = {name: parts[0] for name, parts in result.payload.items() if parts[0] is not None}
        return UPDATE, told, packed_answer(phase, job.block.variant, rows)

    def _private_state(self, client: int, body: Mapping[str, Any]) -> PrivateState | None:
        """Return what a client keeps from round to round; None: nothing."""
        if not self._task.stored_arrays:
            return None
        kept = None if body["kept"][0] < 0 else (int(body["kept"][0]), int(body["kept"][1]))
        state = PrivateState(self._directory / f"client-{client}", kept)
        if body["needed"] is not None and body["needed"][0] >= 0:
            state.forget((int(body["needed"][0]), int(body["needed"][1])))
        return state

    def _receive(self, job: Job, number: int) -> None:
        """Let the trainer start from a model that the server has sent."""
        if number == self._taken:
            return
        if number not in self._models:
            raise PolicyError(f"round {job.round + 1}: the server asks for training on a model that it did not send")
        rows, order, is_cut = self._allowed.checked(job, self._models[number])
        _replace(self._order, order)
        if is_cut:
            self._worker.trainers[job.phase].receive(job, rows)
        else:
            _replace(self._state, rows)
        self._taken = number


def _run_of(told: Mapping[str, Any]) -> str:
    """Return the id of the run, which names a folder of this machine.

    Raises:
        PolicyError: it is no id.
    """
    run = told["run"]
    if not isinstance(run, str) or not re.fullmatch("[0-9a-f]{1,64}", run):
        raise PolicyError(f"the server calls its run {str(run)[:80]!r}, which is no id: it must not name a folder here")
    return run


def _require_shape(task: Task, other: Any) -> None:
    """Check that samples are such as the server has.

    Raises:
        DataError: they are not.
    """
    objection = None if other is None else shape_objection(shape_of(task), other, "the server")
    if objection is not None:
        raise DataError(objection)


def _replace(arrays: Arrays, new: Mapping[str, Tensor]) -> None:
    arrays.clear()
    arrays.update(new)


def _number(value: float) -> float | None:
    """Return a number as JSON has it."""
    return float(value) if math.isfinite(value) else None


def _is_later(message: Message, other: Message) -> bool:
    """Say whether a message is of a later phase than another one, which nobody waits for any more."""
    here, there = message.address, other.address
    return (here.round, here.phase) > (there.round, there.phase)
