"""What torch.profiler exported of a run lies below the spans of the same thread, at the same time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

import gossamer
from gossamer.errors import DataError
from gossamer.profiling.exports import write_chrome
from gossamer.profiling.torch_events import operations_of
from gossamer.profiling.trace import read_trace
from traces import span, write

IMAGES = {"name": "image-classification", "dataset": {"name": "digits", "limit": 100}, "model": "softmax"}
BASE_NS = 10**18
WITHOUT_TIMES = '{"baseTimeNanoseconds": 1, "traceEvents": [{"ph": "X", "pid": 1, "tid": 1}]}'


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a run by both: ``run`` and ``torch.json``."""
    directory = tmp_path_factory.mktemp("both")
    config: dict[str, Any] = {"rounds": 2, "workload": IMAGES, "clients": {"num": 4, "per_round": 4}}
    config |= {"train": {"lr": 0.1}, "engine": {"workers": 0}, "profile": True}
    with profile(activities=[ProfilerActivity.CPU]) as found:
        gossamer.run(config, out=directory / "run")
    found.export_chrome_trace(str(directory / "torch.json"))
    return directory


def test_steps_of_training_lie_in_train_spans(recorded: Path, tmp_path: Path) -> None:
    trace = read_trace(recorded / "run")
    write_chrome(trace, tmp_path / "both.json", operations_of(trace, recorded / "torch.json"))
    events = [one for one in json.loads((tmp_path / "both.json").read_text())["traceEvents"] if one["ph"] == "X"]
    spans = [one for one in events if one.get("cat") != "torch"]
    own = [one for one in events if one.get("cat") == "torch"]
    in_training = 0
    for one in own:
        around = [
            each["name"]
            for each in spans
            if (each["pid"], each["tid"]) == (one["pid"], one["tid"])
            and each["ts"] - 1e-3 <= one["ts"]
            and one["ts"] + one["dur"] <= each["ts"] + each["dur"] + 1e-3
        ]
        assert around
        in_training += around == ["train"] and one["name"].startswith("aten::")
    assert in_training >= 20


def exported(path: Path, *events: tuple[str, int, float, float], others: Any = ()) -> Path:
    """Write what torch.profiler would: names, processes, begins and lengths in milliseconds since `BASE_NS`."""
    described = [
        {"ph": "X", "cat": "cpu_op", "name": name, "pid": process, "tid": 1, "ts": 1e3 * begin, "dur": 1e3 * length}
        for name, process, begin, length in events
    ]
    path.write_text(json.dumps({"baseTimeNanoseconds": BASE_NS, "traceEvents": [*described, *others]}))
    return path


def of_torch(path: Path) -> dict[str, tuple[float, float]]:
    """Return begin and length of torch's events in an export, in milliseconds."""
    events = json.loads(path.read_text())["traceEvents"]
    return {one["name"]: (one["ts"] / 1e3, one["dur"] / 1e3) for one in events if one.get("cat") == "torch"}


def test_times_are_those_of_rounds_in_a_row(tmp_path: Path) -> None:
    spans = [span("train", 10, 14), span("wait", 14, 18), span("train", 111, 119)]
    write(tmp_path, "driver", spans, [(1, 10, 20), (2, 110, 120)], monotonic_ns=0, unix_ns=BASE_NS)
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 115e3, "dur": 1e3}
    path = exported(
        tmp_path / "torch.json",
        ("first", 1, 11, 1),
        ("cut", 1, 13, 3),
        ("waiting", 1, 15, 1),
        ("between", 1, 50, 1),
        ("elsewhere", 9, 112, 1),
        ("second", 1, 112, 2),
        others=[kernel],
    )
    trace = read_trace(tmp_path)
    write_chrome(trace, tmp_path / "both.json", operations_of(trace, path))
    expected = {"first": (1, 1), "cut": (3, 1), "second": (12, 2), "gemm": (15, 1)}
    found = of_torch(tmp_path / "both.json")
    assert found.keys() == expected.keys()
    for name, times in expected.items():
        assert found[name] == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize("text", ["", "[1]", "{}", WITHOUT_TIMES])
def test_what_is_no_trace_of_torch_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("train", 1, 2)], [(1, 0, 10)])
    (tmp_path / "torch.json").write_text(text)
    with pytest.raises(DataError, match=r"torch.json' is no trace of torch.profiler"):
        operations_of(read_trace(tmp_path), tmp_path / "torch.json")


def test_a_profile_of_another_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("train", 1, 2)], [(1, 0, 10)], monotonic_ns=0, unix_ns=BASE_NS)
    path = exported(tmp_path / "torch.json", ("late", 1, 500, 1))
    with pytest.raises(DataError, match="happened in a thread of a recorded round"):
        operations_of(read_trace(tmp_path), path)
    with pytest.raises(DataError, match="cannot read"):
        operations_of(read_trace(tmp_path), tmp_path / "none.json")
