"""Clients evaluate on test data of their own: what they tell, what the server makes of it, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gossamer
from federation import assert_same, configure, events, mixed, modes
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.network.client import Training
from gossamer.engines.network.evaluating import COUNTS, EVALUATE
from gossamer.engines.network.evaluation import _read, details_of, metrics_of
from gossamer.engines.task import WHOLE, Task
from gossamer.errors import PolicyError, QuorumError
from gossamer.storage.jsonl import read
from gossamer.storage.runlog import read_events
from gossamer.task import held_task_of
from gossamer.transport import SERVER, Address, Message, Refusal, Server, Welcome
from gossamer.transport.audit import AuditLog
from gossamer.transport.policy import Policy
from gossamer.workloads.base import add_sums
from nodes import Nodes, client_in_thread, real

RUN = "ab"


@pytest.fixture(scope="module")
def task() -> Task:
    """Return the task of clients of several capacities."""
    return build(parse(configure(mixed("fedrolex")))).task


def request(task: Task, body: Mapping[str, Any] | None = None, run: str = RUN, **arrays: torch.Tensor) -> Message:
    """Return what a server asks client 3, with changes."""
    given = {"x": task.workload.init(0), **arrays}
    return Message(EVALUATE, Address(run, 0, 0, 3), {"variant": WHOLE, "clients": [3], **(body or {})}, given)


def training(task: Task, directory: Path, policy: Policy | None = None) -> Training:
    """Return what a client trains and evaluates with."""
    return Training(task, RUN, directory, policy=policy)


def test_sums_and_numbers_are_all_that_is_told(task: Task, tmp_path: Path) -> None:
    answer = training(task, tmp_path, Policy()).evaluate(request(task), [3])
    workload = task.workload
    params = workload.layout.views(workload.init(0))
    sums = add_sums([workload.evaluate(params, {}, chunk) for chunk in range(workload.num_evaluation_chunks)])
    accuracy = workload.client_metrics(sums, 3)["accuracy"]
    assert answer.kind == COUNTS
    assert not answer.arrays
    (total, number) = answer.body["clients"]["3"]["local_accuracy"]
    assert answer.body == {"clients": {"3": {"local_accuracy": [total, number]}}}
    assert number == workload.num_samples[3]
    assert total / number == accuracy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": {"per_sample": True}}, "asks for 'per_sample'"),
        ({"body": {"workload": {"name": "next-character"}}}, "asks for 'workload'"),
        ({"body": {"variant": 7}}, "variant 7"),
        ({"body": {"variant": True}}, "variant True"),
        ({"body": {"clients": [4]}}, r"clients \[4\], but this node is \[3\]"),
        ({"body": {"clients": None}}, "clients None"),
        ({"x": torch.zeros(3)}, r"a model of torch.float32 and shape \(3,\), but it has torch.float32 and shape"),
        ({"x": torch.zeros(3, dtype=torch.float64)}, "torch.float64"),
        ({"mask": torch.ones(40)}, "other arrays than an evaluation has, such as 'mask'"),
    ],
)
def test_a_curious_server_is_refused(changes: dict[str, Any], reason: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=reason):
        training(task, tmp_path).evaluate(request(task, **changes), [3])


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy(evaluation=False), "accepts evaluation = False"),
        (Policy(min_test_samples=41), "40 test samples, and the policy accepts min_test_samples = 41"),
    ],
)
def test_a_policy_may_refuse(policy: Policy, reason: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=reason):
        training(task, tmp_path, policy).evaluate(request(task), [3])


def test_statistics_are_checked(tmp_path: Path) -> None:
    dataset = {"name": "synthetic", "num_train": 64, "num_test": 20}
    config = configure(
        {"workload.model": {"name": "preact-resnet18", "width": 0.0625}, "workload.dataset": dataset} | modes()
    )
    held = build(parse(config)).task
    workload, node = held.workload, training(held, tmp_path)
    sums = workload.client_statistics(workload.layout.views(workload.init(0)), 3)
    arrays = {f"statistics.{name}": value for name, value in sums.items()}
    assert node.evaluate(request(held, **arrays), [3]).body["clients"]["3"]
    first = next(name for name in arrays if name.endswith(".sum"))
    with pytest.raises(PolicyError, match="by which the model can be evaluated"):
        node.evaluate(request(held, **arrays | {first: torch.zeros(1000, dtype=torch.float64)}), [3])
    with pytest.raises(PolicyError, match="float64 vectors"):
        node.evaluate(request(held, **arrays | {first: torch.zeros(1000)}), [3])


def test_metrics_of_what_is_told() -> None:
    found = {1: {"local_accuracy": (3.0, 4.0)}, 4: {"local_accuracy": (1.0, 8.0), "local_loss": (4.0, 8.0)}, 6: {}}
    assert metrics_of(found) == {
        "local_accuracy": 0.4375,
        "worst_client_accuracy": 0.125,
        "local_loss": 0.5,
        "worst_client_loss": 0.5,
    }
    assert details_of(found) == {
        "local_accuracy_weighted": 4 / 12,
        "local_accuracy_by_client": {"1": 0.75, "4": 0.125},
        "local_loss_weighted": 0.5,
        "local_loss_by_client": {"4": 0.5},
    }


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {"x": {"local_accuracy": [1, 2]}},
        {"3": None},
        {"3": {"accuracy": [1, 2]}},
        {"3": {"local_accuracy": 1}},
        {"3": {"local_accuracy": [1, 0]}},
        {"3": {"local_accuracy": [float("nan"), 1]}},
        {"3": {"local_accuracy": [True, 1]}},
        {"3": {"local_accuracy": [1, 2, 3]}},
        {"3": {"local_" + "a" * 50: [1, 2]}},
    ],
)
def test_what_is_malformed_is_left_out(told: Any) -> None:
    assert not any(_read(told).values())


def test_own_test_data(nodes: Nodes, tmp_path: Path) -> None:
    """Each client tells of its own test data, and one refuses; the run goes on."""
    config = configure({"clients": {"num": 3, "per_round": 3}, "rounds": 2})
    shared = {"name": "synthetic", "num_test": 40, "noise": 2.0}
    made: dict[int, Task] = {}

    def maker(client: int) -> Callable[[Mapping[str, Any]], Task]:
        def make(told: Mapping[str, Any]) -> Task:
            made[client] = held_task_of(told, client, {**shared, "num_train": 50 + client})
            return made[client]

        return make

    for client in range(3):
        policy = Policy(evaluation=client != 1)
        nodes.start([client], make_task=maker(client), is_simulated=False, policy=policy)
    run = gossamer.run(real(config, nodes), out=tmp_path / "network")
    nodes.join()
    assert not nodes.errors
    expected = {}
    for client in (0, 2):
        workload = made[client].workload
        parts = [workload.evaluate(run.params, {}, chunk) for chunk in range(workload.num_evaluation_chunks)]
        expected[str(client)] = workload.client_metrics(add_sums(parts), client)["accuracy"]
    last = run.metrics[-1]
    assert last["local_accuracy_by_client"] == expected
    assert last["local_accuracy"] == pytest.approx(np.mean([*expected.values()]))
    assert last["worst_client_accuracy"] == min(expected.values())
    weighted = (50 * expected["0"] + 52 * expected["2"]) / 102
    assert last["local_accuracy_weighted"] == pytest.approx(weighted)
    refused = [event for event in read_events(run.directory) if event["kind"] == "refused"]
    assert [(event["client"], event["round"]) for event in refused] == [(1, 1), (1, 2)]
    assert "evaluation = False" in refused[0]["reason"]


@pytest.mark.parametrize("quorum", [0.1, 1.0])
def test_a_round_goes_on_without_who_refuses_to_train(quorum: float, nodes: Nodes, tmp_path: Path) -> None:
    """As far as the quorum says so; a simulation drops the same clients."""
    clients = {"num": 4, "per_round": 4, "quorum": quorum}
    config = configure({"clients": clients, "rounds": 2, "train.batch_size": 8})
    nodes.start([0, 1, 2], policy=Policy())
    nodes.start([3], policy=Policy(max_steps=1))
    if quorum == 1.0:
        with pytest.raises(QuorumError):
            gossamer.run(real(config, nodes), out=tmp_path / "network")
    else:
        run = gossamer.run(real(config, nodes), out=tmp_path / "network")
        again = gossamer.run({**config, "replay": str(run.directory)}, out=tmp_path / "replayed")
        assert_same(run, again)
    found = [(one["round"], one["client"], one["reason"]) for one in events(tmp_path / "network", "refused")]
    assert {client for _, client, _ in found} == {3}
    assert all("the policy accepts max_steps = 1" in reason for *_, reason in found)
    dropped = events(tmp_path / "network", "update-dropped")
    assert [(one["client"], one["reason"]) for one in dropped] == [(3, "refused")] * (2 if quorum < 1 else 1)


class TestCuriousServer:
    """A whole client, and a server that asks for more than it should get."""

    def test_all_of_it_is_refused_and_audited(self, task: Task, tmp_path: Path) -> None:
        asked = [
            Message("outputs", Address(RUN, 0, 0, 3, 0), {"clients": [3]}, {"x": task.workload.init(0)}),
            request(task, {"per_sample": True}),
            request(task, run="cd"),
            request(task, x=torch.zeros(5)),
        ]
        asked = [Message(m.kind, Address(m.address.run, 0, 0, 3, n), m.body, m.arrays) for n, m in enumerate(asked)]
        with Server("127.0.0.1:0", admit=lambda hello: self._admit(task)) as server:
            log = AuditLog(tmp_path / "audit.jsonl")
            thread = client_in_thread(server.address, task, tmp_path, audit=log.record, linger_seconds=0.0)
            try:
                answers = self._ask(server, asked)
                server.send("a", Message("end", Address(RUN, 1, 0, SERVER), {"is_over": True}))
            finally:
                thread.join(20)
            assert not thread.is_alive()
            log.close()
        assert [one.kind for one in answers] == ["refused"] * 4
        assert [one.address for one in answers] == [one.address for one in asked]
        assert all(not one.arrays and set(one.body) == {"reason"} for one in answers)
        audit = [one for one in read(tmp_path / "audit.jsonl") if one["kind"] == "refused"]
        assert [one["reason"] for one in audit] == [one.body["reason"] for one in answers]
        assert [one["message"] for one in audit] == ["outputs", "evaluate", "evaluate", "evaluate"]

    def _admit(self, task: Task) -> Welcome | Refusal:
        return Welcome({"run": RUN, "instance": "i", "config": {}})

    def _ask(self, server: Server, asked: list[Message]) -> list[Message]:
        """Send requests once the node is there with its client; return the answers."""
        from gossamer.transport import Joined, Received

        is_sent, answers = False, list[Message]()
        while len(answers) < len(asked):
            event = server.receive(20)
            assert event is not None
            if isinstance(event, Joined) and event.hello.body["clients"] and not is_sent:
                is_sent = True
                for message in asked:
                    server.send("a", message)
            elif isinstance(event, Received):
                answers.append(event.message)
        return answers
