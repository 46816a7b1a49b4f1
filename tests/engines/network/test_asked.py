"""What a client does not train: requests and models that are not such as its run has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import configure, mixed
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.engines.network.client import Training
from gossamer.engines.network.engine import UPDATE
from gossamer.engines.task import Task
from gossamer.errors import PolicyError
from gossamer.transport import SERVER, Address, Message

RUN, CLIENT = "ab", 3
JOB: dict[str, Any] = {
    "round": 0,
    "phase": 0,
    "variant": 0,
    "first_tile": 0,
    "tile": 1,
    "client": [CLIENT],
    "weight": [40.0],
    "steps": [2],
    "lr": 0.1,
    "max_norm": None,
}
BODY: dict[str, Any] = {"job": JOB, "model": 7, "kept": [-1, -1], "needed": None}


@pytest.fixture(scope="module")
def task() -> Task:
    return build(parse(configure(mixed("fedrolex")))).task


def request(body: Mapping[str, Any], address: Address | None = None) -> Message:
    return Message("train", address or Address(RUN, 0, 0, CLIENT, 1), body)


def model(task: Task, changes: Mapping[str, torch.Tensor | None], body: Any = None) -> Message:
    """Return the model that a server sends to the first variant, with changes."""
    arrays = {"state.x": torch.zeros(1, task.variants[0].layout.d), **changes}
    given = {name: value for name, value in arrays.items() if value is not None}
    return Message("model", Address(RUN, 0, 0, SERVER, 7), {"is_cut": True} if body is None else body, given)


def trained(task: Task, directory: Path, asked: Message, sent: Message | None = None) -> Message:
    training = Training(task, RUN, directory)
    training.take_model(model(task, {}) if sent is None else sent)
    return training.train(asked, [CLIENT])


def test_what_is_right_is_trained(task: Task, tmp_path: Path) -> None:
    answer = trained(task, tmp_path, request(BODY))
    assert answer.kind == UPDATE
    assert answer.arrays["x"].shape == (task.variants[0].layout.d,)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "job = "),
        ({**BODY, "code": "import os"}, "code = 'import os'"),
        ({**BODY, "kept": [0]}, "kept = "),
        ({**BODY, "model": "../7"}, r"model = '\.\./7'"),
        ({**BODY, "job": {**JOB, "steps": [2.5]}}, r"job\.steps\.0 = 2\.5"),
        ({**BODY, "job": {**JOB, "steps": []}}, r"job\.steps = \[\]"),
        ({**BODY, "job": {**JOB, "steps": [-1]}}, r"job\.steps\.0 = -1"),
        ({**BODY, "job": {**JOB, "tile": 1 << 40}}, r"job\.tile = "),
        ({**BODY, "job": {**JOB, "lr": float("nan")}}, r"job\.lr = nan"),
        ({**BODY, "job": {**JOB, "weight": [float("inf")]}}, r"job\.weight\.0 = inf"),
        ({**BODY, "job": {**JOB, "client": [3, 4]}}, r"job\.client = \[3, 4\]"),
        ({**BODY, "job": {**JOB, "client": [4]}}, r"client 4 to train, but this node is \[3\]"),
        ({**BODY, "job": {**JOB, "variant": 9}}, "variant 9"),
        ({**BODY, "job": {**JOB, "round": 5}}, "round 6, phase 1, by a message of round 1"),
        ({**BODY, "model": 8}, "a model that it did not send"),
    ],
)
def test_a_malformed_request_is_refused(body: dict[str, Any], reason: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=reason):
        trained(task, tmp_path, request(body))


def test_a_phase_that_there_is_not(task: Task, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="phase 2 of 1"):
        trained(task, tmp_path, request({**BODY, "job": {**JOB, "phase": 1}}, Address(RUN, 0, 1, CLIENT, 1)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state.x": torch.zeros(1, 3)}, r"torch\.float32 of shape \(1, 3\) as 'x'"),
        ({"state.x": torch.zeros(3)}, r"shape \(3,\)"),
        ({"state.x": None}, "sends nothing as 'x'"),
        ({"state.y": torch.zeros(1, 3)}, "'y' of a model, which has nothing"),
        ({"extra": torch.zeros(2)}, "'extra'"),
        ({"order.features": torch.zeros(2)}, "'features'"),
    ],
)
def test_a_model_of_another_shape_is_refused(
    changes: dict[str, torch.Tensor | None], reason: str, task: Task, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match=reason):
        trained(task, tmp_path, request(BODY), model(task, changes))


@pytest.mark.parametrize("body", [{}, {"is_cut": 1}, {"is_cut": True, "plug_in": "os:system"}])
def test_a_model_told_of_otherwise_is_refused(body: dict[str, Any], task: Task, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="instead of is_cut"):
        trained(task, tmp_path, request(BODY), model(task, {}, body))
