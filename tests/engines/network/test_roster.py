"""Which nodes may join, and what is known of them."""

from __future__ import annotations

from typing import Any

import pytest

from federation import configure
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.network.roster import Asked, Roster, model_digest, versions
from gossamer.engines.network.state import table_of
from gossamer.engines.task import Task
from gossamer.transport import Hello, Refusal, Traffic, Welcome


@pytest.fixture(scope="module")
def simulated() -> Task:
    return build(parse(configure())).task


@pytest.fixture(scope="module")
def real() -> Task:
    return build(parse(configure({"engine.name": "network", "engine.address": "127.0.0.1:1"}))).task


def hello(task: Task, node: str = "a", **changes: Any) -> Hello:
    facts = {"num_samples": int(task.workload.num_samples[3]), "labels": [0, 2]}
    body = {"versions": versions(), "is_simulated": False, "secret": "", "clients": {"3": facts}}
    return Hello(node, {**body, "model": model_digest(task), **changes}, "127.0.0.1:2")


def test_a_node_joins_and_leaves(simulated: Task) -> None:
    roster = Roster(simulated, {"run": "r"}, None)
    assert roster.admit(hello(simulated)) == Welcome({"run": "r"})
    roster.join(hello(simulated))
    assert roster.present == {3}
    node = roster.node_of(3)
    assert node is not None
    assert node.name == "a"
    assert isinstance(roster.admit(hello(simulated, "b")), Refusal)
    assert isinstance(roster.admit(hello(simulated, "a")), Welcome), "it may join again"
    roster.leave("a")
    assert roster.node_of(3) is None
    assert not roster.present


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"secret": "guess"}, "only nodes that it has started"),
        ({"versions": {"gossamer": "0"}}, "gossamer '0'"),
        ({"versions": None}, "gossamer None"),
        ({"clients": None}, "which clients"),
        ({"clients": {"-1": {}}}, "client '-1'"),
        ({"clients": {"8": {}}}, "client '8'"),
        ({"clients": {"9" * 5000: {}}}, "client '999"),
        ({"clients": {"3": None}}, "None samples"),
        ({"clients": {"3": {"num_samples": True}}}, "True samples"),
        ({"clients": {"3": {"num_samples": 5, "labels": "all"}}}, "labels 'all'"),
        ({"clients": {"3": {"num_samples": 5, "labels": [10]}}}, "labels [10]"),
        ({"clients": {"3": {"num_samples": 5, "labels": [1]}}}, "not 1"),
        ({"model": "another"}, "other shapes"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], told: str, simulated: Task) -> None:
    roster = Roster(simulated, {}, "secret")
    answer = roster.admit(hello(simulated, **{"secret": "secret", **changes}))
    assert isinstance(answer, Refusal)
    assert told in answer.reason
    assert len(answer.reason) < 400


def test_real_clients_tell_what_they_hold(real: Task) -> None:
    roster, workload = Roster(real, {}, None), real.workload
    before = workload.num_samples.copy()
    roster.join(hello(real, clients={"3": {"num_samples": 7, "labels": [0, 2]}}))
    assert workload.num_samples[3] == 7
    assert (workload.num_samples != before).sum() == 1
    assert workload.client_labels(before[:1] * 0 + 3)[0].nonzero().flatten().tolist() == [0, 2]


def test_a_number_belongs_to_the_kit_that_has_it(simulated: Task) -> None:
    roster = Roster(simulated, {}, None, {3: "b", 5: "a"}.get)
    answer = roster.admit(hello(simulated, "a"))
    assert isinstance(answer, Refusal)
    assert answer.reason == "client 3 is b, by the kits of the federation, and not a: leave --id out"
    assert isinstance(roster.admit(hello(simulated, "b")), Welcome)
    facts = {"num_samples": int(simulated.workload.num_samples[4]), "labels": []}
    assert isinstance(roster.admit(hello(simulated, "a", clients={"4": facts})), Welcome), "no kit has number 4"


def test_the_table_of_who_is_there(simulated: Task) -> None:
    roster = Roster(simulated, {}, None)
    of_two = {
        str(client): {"num_samples": int(simulated.workload.num_samples[client]), "labels": [0]} for client in (3, 4)
    }
    roster.join(hello(simulated, "a", clients=of_two))
    roster.join(hello(simulated, "b", clients={"0": of_two["3"]}))
    node = roster.get("a")
    assert node is not None
    node.asked[3] = Asked(0, 0.0)
    roster.leave("b")
    traffic = {"a": Traffic(sent_bytes=5, received_bytes=7)}
    rows = table_of(roster, 8, [3, 4], traffic, node.heard_at + 2.0)
    assert [(row["client"], row["name"], row["state"]) for row in rows] == [
        (0, "b", "away"),
        (3, "a", "at work"),
        (4, "a", "idle"),
    ]
    assert rows[1] == {
        "client": 3,
        "name": "a",
        "samples": int(simulated.workload.num_samples[3]),
        "state": "at work",
        "heard_seconds": 2.0,
        "bytes_up": 7,
        "bytes_down": 5,
    }
