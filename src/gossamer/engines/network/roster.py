"""Who is there: the nodes that have joined a server, the clients that each of them is, and what it was asked."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from gossamer.engines.task import Task
from gossamer.transport import Hello, Refusal, Welcome
from gossamer.workloads.held import ToldWorkload

MAX_SAMPLES = 1 << 40


class Asked(NamedTuple):
    """A job that a node has, and when it got it (seconds of a monotonic clock)."""

    attempt: int
    at: float


@dataclass(eq=False)
class Node:
    """A node that has joined.

    Attributes:
        name: its name, which its certificate has, if there is one.
        clients: numbers of the clients that it is.
        samples: number of training samples of each of them.
        heard_at: when something of it came last, seconds of a monotonic clock.
        models: numbers of what it was sent in the phase, see `NetworkEngine`.
        asked: jobs that it has not answered, by client.
    """

    name: str
    clients: frozenset[int]
    samples: Mapping[int, int]
    heard_at: float
    models: dict[Any, int] = field(default_factory=dict)
    asked: dict[int, Asked] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Return the versions by which bits may differ."""
    return {"gossamer": version("gossamer"), "torch": torch.__version__, "Python": platform.python_version()}


def no_kits(number: int) -> str | None:
    """Return that no kit has the number of a client."""
    return None


def shape_of(task: Task) -> dict[str, Any]:
    """Return the shape of a sample, and the number of labels, as JSON values; what is not known is None."""
    return {
        "shape": task.workload.blueprint().facts.get("input_size"),
        "labels": task.workload.num_labels,
    }


def shape_objection(own: Any, other: Any, whose: str) -> str | None:
    """Return why samples of the shape `own` do not go with those of somebody else, see `shape_of`; None: they do."""
    own, other = (json.loads(json.dumps(one)) for one in (own, other))
    if own == other:
        return None
    return f"the data have {_shape_text(own)}, but those of {whose} {_shape_text(other)}: give data such as {whose} has"


def _shape_text(told: Any) -> str:
    """Return in words what `shape_of` has, as somebody else may tell it."""
    shape, labels = (told.get(key) if isinstance(told, Mapping) else None for key in ("shape", "labels"))
    return f"samples of shape {shape!r:.80} and {labels!r:.20} labels"


def told_of(task: Task, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what nodes are told of a run: of its resolved configuration nothing about this machine."""
    config = {key: value for key, value in config.items() if key not in ("log", "replay", "checkpoint")}
    return {"config": config | {"engine": {"modes": config["engine"]["modes"]}}, "data": shape_of(task)}


def model_digest(task: Task) -> str:
    """Return a digest of the names and shapes of the model's parameters."""
    layout = task.workload.layout
    return hashlib.sha256(repr([*zip(layout.names, layout.shapes, strict=True)]).encode()).hexdigest()


class Roster:
    """The nodes of a run. `admit` is called from threads of the transport, the rest by the engine.

    A node joins twice: at first to learn what is trained, then with what it tells of the clients that it is.
    """

    def __init__(
        self,
        task: Task,
        told: Mapping[str, Any],
        secret: str | None,
        client_of: Callable[[int], str | None] = no_kits,
    ) -> None:
        """Bind a run.

        Args:
            task: its task.
            told: what every node is told when it joins, JSON values.
            secret: what nodes must say that were started by this process; None: any node may join that the transport
                lets in.
            client_of: asked for the name of the node whose kit has a number, see `MemberList.client_of`.
        """
        self._task, self._told, self._secret = task, told, secret
        self._client_of = client_of
        self._nodes: dict[str, Node] = {}
        self._node_of: dict[int, Node] = {}
        self._last_of: dict[int, Node] = {}
        self._model = model_digest(task)

    def admit(self, hello: Hello) -> Welcome | Refusal:
        """Say whether a node may join."""
        reason = self._objection(hello.node, hello.body)
        return Welcome(self._told) if reason is None else Refusal(reason)

    def join(self, hello: Hello) -> None:
        """Take a node that was admitted, and what it tells."""
        clients = {int(client): facts for client, facts in hello.body["clients"].items()}
        if not clients:  # it only asked what is trained
            return
        workload = self._task.workload
        if isinstance(workload, ToldWorkload):
            for client, facts in clients.items():
                workload.tell(client, facts["num_samples"], facts["labels"])
        self.leave(hello.node)
        samples = {client: facts["num_samples"] for client, facts in clients.items()}
        self._nodes[hello.node] = node = Node(hello.node, frozenset(clients), samples, time.monotonic())
        self._node_of |= dict.fromkeys(clients, node)
        self._last_of |= dict.fromkeys(clients, node)

    def leave(self, name: str) -> None:
        """Forget a node."""
        node = self._nodes.pop(name, None)
        for client in () if node is None else node.clients:
            self._node_of.pop(client, None)

    def node_of(self, client: int) -> Node | None:
        """Return the node that is a client, if it is there."""
        return self._node_of.get(client)

    def last_node_of(self, client: int) -> Node | None:
        """Return the node that is or was a client, if one ever came."""
        return self._last_of.get(client)

    def hear(self, name: str) -> None:
        """Note that something of a node has come."""
        if name in self._nodes:
            self._nodes[name].heard_at = time.monotonic()

    def get(self, name: str) -> Node | None:
        """Return a node, if it is there."""
        return self._nodes.get(name)

    @property
    def nodes(self) -> list[Node]:
        """Those that are there."""
        return list(self._nodes.values())

    @property
    def present(self) -> set[int]:
        """Clients that are there."""
        return set(self._node_of)

    def begin_phase(self) -> None:
        """Forget what nodes were asked and sent before."""
        for node in self.nodes:
            node.models, node.asked = {}, {}

    def _objection(self, name: str, body: Mapping[str, Any]) -> str | None:
        """Return why a node may not join; None: it may."""
        if self._secret is not None and not secrets.compare_digest(str(body.get("secret")), self._secret):
            return "this server takes only nodes that it has started: give it an address to listen on, engine.address"
        told = body.get("versions")
        for part, value in (versions() if body.get("is_simulated") else {"gossamer": version("gossamer")}).items():
            other = told.get(part) if isinstance(told, dict) else None
            if other != value:
                return f"{name} has {part} {other!r:.80}, but the server has {value!r}: install the same version"
        if body.get("model") not in (None, self._model):
            return f"{name} has a model of other shapes than the server: give it data such as the server has"
        clients = body.get("clients")
        if not isinstance(clients, dict):
            return f"{name} says not which clients it is: give their numbers, and what they hold"
        for client, facts in clients.items():
            reason = self._objection_to(name, client, facts)
            if reason is not None:
                return reason
        return None

    def _objection_to(self, name: str, told: Any, facts: Any) -> str | None:
        """Return what is wrong with a client, as its node tells of it; None: nothing."""
        workload = self._task.workload
        if not (isinstance(told, str) and told.isdecimal() and len(told) < 19 and int(told) < workload.num_clients):
            return f"{name} says that it is client {told!r:.80}: give a number in 0..{workload.num_clients - 1}"
        client, facts = int(told), facts if isinstance(facts, dict) else {}
        owner = self._client_of(client)
        if owner not in (None, name):
            return f"client {client} is {owner}, by the kits of the federation, and not {name}: leave --id out"
        other = self.node_of(client)
        if other is not None and other.name != name:
            return f"client {client} is there already, as {other.name}: stop that one, or give another number"
        number, labels, known = facts.get("num_samples"), facts.get("labels"), range(workload.num_labels)
        if type(number) is not int or not 0 < number < MAX_SAMPLES:
            return f"{name} has {number!r:.80} samples for client {client}: give it one or more"
        is_told = isinstance(workload, ToldWorkload)
        if (is_told or labels is not None) and not (
            isinstance(labels, list) and all(type(label) is int and label in known for label in labels)
        ):
            return f"{name} has labels {labels!r:.80} for client {client}: give some of 0..{len(known) - 1}"
        if not is_told and number != int(workload.num_samples[client]):
            expected = int(workload.num_samples[client])
            return f"{name} has {number} samples for client {client}, not {expected}: give it the data of the run"
        return None
