"""Runs that record torch.profiler themselves: the same bits, and operations in each span that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.errors import ConfigError, DataError
from gossamer.profiling import recorder
from gossamer.profiling.exports import write_chrome
from gossamer.profiling.torch_events import place
from gossamer.profiling.torch_recording import recorded_operations
from gossamer.profiling.trace import read_trace
from gossamer.storage.runlog import read_config

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 100}, "model": "softmax"}
CLIENTS: dict[str, Any] = {"clients": {"num": 4, "per_round": 4}}
PEERS: dict[str, Any] = {"peers": {"num": 4, "topology": "ring"}}
COMMON: dict[str, Any] = {"rounds": 2, "workload": IMAGES, "train": {"lr": 0.1}}
LINE = '["aten::mm", "cpu_op", 1, 1, 1000, 5]\n'


@pytest.mark.parametrize(("kind", "workers"), [(CLIENTS, 0), (CLIENTS, 2), (PEERS, 2)], ids=["0", "2", "peers"])
def test_operations_lie_in_train_spans_and_no_bit_changes(tmp_path: Path, kind: dict[str, Any], workers: int) -> None:
    config = COMMON | kind | {"engine": {"workers": workers}}
    plain, run = (
        gossamer.run(config | {"profile": what}, out=tmp_path / name)
        for name, what in (("plain", True), ("run", {"torch": True}))
    )
    assert all(plain.params[name].equal(value) for name, value in run.params.items())
    assert recorded_operations(plain.directory) == []
    operations = recorded_operations(run.directory)
    trace = read_trace(run.directory)
    write_chrome(trace, tmp_path / "chrome.json", place(trace, operations))
    events = [one for one in json.loads((tmp_path / "chrome.json").read_text())["traceEvents"] if one["ph"] == "X"]
    own = [one for one in events if one.get("cat") == "torch"]
    spans = [one for one in events if one.get("cat") != "torch"]
    assert len(own) == len(operations)
    counts = [sum(is_in(one, each) for one in own) for each in spans if each["name"] == "train"]
    assert sum(counts) >= 0.9 * len(own)  # some are in what a train span does besides, such as to extract
    assert all(any(is_in(one, each) for each in spans) for one in own)
    assert sum(one["name"] == "aten::sum" for one in own) >= 8


def is_in(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether an event lies in another one of the same thread."""
    ends = (round(1e3 * (each["ts"] + each["dur"])) for each in (one, other))
    is_there = (one["pid"], one["tid"]) == (other["pid"], other["tid"]) and other["ts"] <= one["ts"]
    return is_there and next(ends) <= next(ends)


def test_one_span_at_a_time_is_profiled(tmp_path: Path) -> None:
    with recorder.recording(tmp_path / "trace", torch=True), recorder.round_span(1):
        with recorder.span("train"), recorder.span("train"):
            torch.ones(2, 2) @ torch.ones(2, 2)
        with recorder.span("evaluate"):
            torch.ones(2, 2).exp()
    names = [one.name for one in recorded_operations(tmp_path)]
    assert names.count("aten::mm") == 1
    assert "aten::exp" not in names


def test_a_failure_ends_the_profiler(tmp_path: Path) -> None:
    def fail() -> None:
        """Fail within a span."""
        with recorder.span("train"):
            torch.ones(1).exp()
            raise RuntimeError("stop")

    with recorder.recording(tmp_path / "trace", torch=True):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="stop"):
                fail()
    assert [one.name for one in recorded_operations(tmp_path)].count("aten::exp") == 2


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace/driver.torch").write_text(LINE + LINE[:10])
    assert [tuple(one) for one in recorded_operations(tmp_path)] == [("aten::mm", "cpu_op", 1, 1, 1000, 5)]


@pytest.mark.parametrize("line", ["no", "[1]", "{}", LINE.replace("5", "-5"), LINE.replace("1000", "1.5")])
def test_damaged_lines_are_one_sentence(tmp_path: Path, line: str) -> None:
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace/driver.torch").write_text(LINE + line.strip() + "\n")
    with pytest.raises(DataError, match=r"line 2 of .*driver.torch' is no operation of torch"):
        recorded_operations(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"profile": {"torch": True}, "engine": {"name": "ray"}}, "profile.torch = true does not go with engine 'ray'"),
        ({"profile": {"torhc": True}}, "unknown key 'profile.torhc'; did you mean 'torch'"),
        ({"profile": 7}, "profile = 7: give a mapping"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        gossamer.run(COMMON | CLIENTS | changes, out=tmp_path / "run")


@pytest.mark.parametrize(("given", "kept"), [(True, {"torch": False}), (False, None), ({}, {"torch": False})])
def test_true_is_short_for_spans(tmp_path: Path, given: Any, kept: Any) -> None:
    run = gossamer.run(COMMON | CLIENTS | {"rounds": 1, "engine": {"workers": 0}, "profile": given}, out=tmp_path / "r")
    assert read_config(run.directory)["profile"] == kept
    assert bool(list((run.directory / "trace").iterdir())) == (given is not False)
