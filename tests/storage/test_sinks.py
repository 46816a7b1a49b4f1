"""What the tracker adapters hand to their trackers, with modules of the trackers' own signatures in their place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import gossamer
from gossamer import registry
from gossamer.errors import ConfigError
from gossamer.storage import sinks
from gossamer.storage.sinks import MLflowSink, TensorBoardSink, TrackedRun, WandbSink, make_sinks, scalars

RECORD = {
    "round": 4,
    "seconds": 0.5,
    "loss": None,
    "global": {"accuracy": 0.75, "ok": True},
    "curve": [1, 2],
    "note": "x",
}
SCALARS = {"seconds": 0.5, "global/accuracy": 0.75}
CONFIG = {
    "name": "fedavg",
    "algorithm": {"name": "fedavg", "server_lr": 1.0},
    "workload": {"name": "image-classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [16]}},
    "submodel": {"offsets": {}, "scaler": None},
}
TAGS = ["fedavg", "image-classification", "digits", "mlp"]
PARAMETERS = {
    "name": "fedavg",
    "algorithm.name": "fedavg",
    "algorithm.server_lr": 1.0,
    "workload.name": "image-classification",
    "workload.dataset": "digits",
    "workload.model.name": "mlp",
    "workload.model.hidden": [16],
    "submodel.offsets": {},
    "submodel.scaler": None,
}

Calls = list[tuple[str, dict[str, Any]]]


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, without what a function finds around it."""
    return {name: value for name, value in arguments.items() if name != "calls"}


def fake_wandb(calls: Calls) -> ModuleType:
    """Return a module with the part of wandb's interface that is used, which notes its calls."""
    module = ModuleType("wandb")

    def init(
        *,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        config: dict[str, Any] | None = None,
        group: str | None = None,
        resume: str | None = None,
    ) -> Any:
        calls.append(("init", given(locals())))

        def log(data: dict[str, Any], step: int | None = None) -> None:
            calls.append(("log", {"data": data, "step": step}))

        def finish(exit_code: int | None = None) -> None:
            calls.append(("finish", {}))

        return SimpleNamespace(id=id or "run1", log=log, finish=finish)

    vars(module)["init"] = init
    return module


def fake_mlflow(calls: Calls) -> ModuleType:
    """Return a module with the part of mlflow's interface that is used, which notes its calls."""
    module = ModuleType("mlflow")

    def set_experiment(experiment_name: str | None = None) -> None:
        calls.append(("set_experiment", given(locals())))

    def start_run(run_id: str | None = None, run_name: str | None = None, tags: dict[str, Any] | None = None) -> Any:
        calls.append(("start_run", given(locals())))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "run1"))

    def log_params(params: dict[str, Any]) -> None:
        assert len(params) <= 100
        assert all(isinstance(value, str) and len(value) <= 500 for value in params.values())
        calls.append(("log_params", params))

    def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
        calls.append(("log_metrics", {"metrics": metrics, "step": step}))

    def end_run(status: str = "FINISHED") -> None:
        calls.append(("end_run", {}))

    vars(module).update({one.__name__: one for one in (set_experiment, start_run, log_params, log_metrics, end_run)})
    return module


def fake_tensorboard(calls: Calls) -> ModuleType:
    """Return a module with the part of torch.utils.tensorboard's interface that is used, which notes its calls."""
    module = ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, log_dir: str | None = None, comment: str = "", purge_step: int | None = None) -> None:
            calls.append(("SummaryWriter", {"log_dir": log_dir, "purge_step": purge_step}))

        def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> None:
            calls.append(("add_text", {"tag": tag, "text": text_string}))

        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            calls.append(("add_scalar", {"tag": tag, "value": scalar_value, "step": global_step}))

        def close(self) -> None:
            calls.append(("close", {}))

    vars(module)["SummaryWriter"] = SummaryWriter
    return module


FAKES = {"wandb": fake_wandb, "mlflow": fake_mlflow, "torch.utils.tensorboard": fake_tensorboard}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made: Calls = []
    for name, make in FAKES.items():
        monkeypatch.setitem(sys.modules, name, make(made))
    return made


def tracked(directory: Path, round: int | None = None) -> TrackedRun:
    return TrackedRun(directory, CONFIG, round, "digits", "digits-20260101", "fedavg/seed-0")


def test_scalars_flatten_and_leave_out_what_is_no_finite_number() -> None:
    assert scalars(RECORD | {"worst": float("nan"), "best": float("inf")}) == SCALARS
    assert scalars({"inner": {"round": 2}}) == {"inner/round": 2.0}


class TestTrackers:
    def test_tensorboard(self, calls: Calls, tmp_path: Path) -> None:
        for round in (None, 3):
            sink = TensorBoardSink(tracked(tmp_path, round))
            sink.log(RECORD)
            sink.close()
        begun, continued = calls[:5], calls[5:]
        assert begun[0] == ("SummaryWriter", {"log_dir": str(tmp_path / "tensorboard"), "purge_step": 1})
        assert begun[1][0] == "add_text"
        assert "fedavg/seed-0 (fedavg, image-classification, digits, mlp)" in begun[1][1]["text"]
        assert "    name: fedavg\n" in begun[1][1]["text"]
        assert begun[2:] == [
            ("add_scalar", {"tag": "seconds", "value": 0.5, "step": 4}),
            ("add_scalar", {"tag": "global/accuracy", "value": 0.75, "step": 4}),
            ("close", {}),
        ]
        assert continued == [("SummaryWriter", {"log_dir": str(tmp_path / "tensorboard"), "purge_step": 4}), *begun[2:]]

    def test_mlflow(self, calls: Calls, tmp_path: Path) -> None:
        for round in (None, 3):
            sink = MLflowSink(tracked(tmp_path, round))
            sink.log(RECORD)
            sink.close()
        tags = {"group": "digits-20260101", "directory": str(tmp_path), **dict.fromkeys(TAGS, "true")}
        texts = PARAMETERS | {
            "algorithm.server_lr": "1.0",
            "workload.model.hidden": "[16]",
            "submodel.offsets": "{}",
            "submodel.scaler": "null",
        }
        rest = [("log_metrics", {"metrics": SCALARS, "step": 4}), ("end_run", {})]
        assert calls == [
            ("set_experiment", {"experiment_name": "digits"}),
            ("start_run", {"run_id": None, "run_name": "fedavg/seed-0", "tags": tags}),
            ("log_params", texts),
            *rest,
            ("set_experiment", {"experiment_name": "digits"}),
            ("start_run", {"run_id": "run1", "run_name": None, "tags": None}),
            *rest,
        ]

    def test_wandb(self, calls: Calls, tmp_path: Path) -> None:
        for round in (None, 3, None):
            sink = WandbSink(tracked(tmp_path, round))
            sink.log(RECORD)
            sink.close()
        started = {
            "project": "digits",
            "group": "digits-20260101",
            "name": "fedavg/seed-0",
            "config": PARAMETERS,
            "tags": TAGS,
            "dir": str(tmp_path),
            "resume": "allow",
        }
        begun = [("init", started | {"id": None}), ("log", {"data": SCALARS, "step": 4}), ("finish", {})]
        assert calls[:3] == begun
        assert calls[3:6] == [("init", started | {"id": "run1"}), *begun[1:]]
        assert calls[6:] == begun  # trained anew: another run

    def test_identifiers_are_kept_beside_each_other(self, calls: Calls, tmp_path: Path) -> None:
        for make in (MLflowSink, WandbSink):
            make(tracked(tmp_path))
        kept = tmp_path / sinks.TRACKERS
        assert json.loads(kept.read_text()) == {"mlflow": "run1", "wandb": "run1"}
        kept.write_text("{")
        assert tracked(tmp_path, 3).known("wandb") is None

    def test_long_lists_of_parameters(self, calls: Calls, tmp_path: Path) -> None:
        config = {f"key{number}": "x" * 600 for number in range(250)}
        MLflowSink(TrackedRun(tmp_path, config, None, "e", "g", "n"))
        assert [len(given) for name, given in calls if name == "log_params"] == [100, 100, 50]


def test_runs_of_an_experiment_are_named_by_method_and_seed(calls: Calls, tmp_path: Path) -> None:
    """From a real run of two methods and seeds, and the resume of one of them by itself."""
    config = {
        "name": "two",
        "rounds": 1,
        "seeds": [0, 1],
        "workload": {"name": "consensus"},
        "peers": {"num": 3, "topology": "ring"},
        "train": {"lr": 0.1, "steps": 1},
        "methods": {"ring": {}, "all": {"peers.topology": "complete"}},
        "engine": {"workers": 0},
        "log": {"sinks": ["wandb"]},
    }
    gossamer.run(config, out=tmp_path / "out")
    begun = [given for name, given in calls if name == "init"]
    assert [one["name"] for one in begun] == ["ring/seed-0", "ring/seed-1", "all/seed-0", "all/seed-1"]
    assert {(one["project"], one["group"]) for one in begun} == {("two", "out")}
    assert [one["config"]["seed"] for one in begun] == [0, 1, 0, 1]
    assert begun[2]["tags"] == ["dsgd", "consensus"]
    inner = TrackedRun.of(tmp_path / "out" / "all" / "seed-0", begun[2]["config"], 1)
    assert (inner.experiment, inner.group, inner.name) == ("two", "out", "all/seed-0")
    single = TrackedRun.of(tmp_path / "alone", {"name": "one"}, None)
    assert (single.experiment, single.group, single.name) == ("one", "alone", "alone")


def test_a_run_that_is_resumed_goes_on_as_the_same(calls: Calls, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "rounds": 3,
        "workload": {"name": "consensus"},
        "peers": {"num": 3, "topology": "ring"},
        "train": {"lr": 0.1, "steps": 1},
        "engine": {"workers": 0},
        "log": {"sinks": ["wandb", "mlflow"]},
    }
    gossamer.run(config, out=tmp_path / "out", on_round=lambda record: True)
    gossamer.resume(tmp_path / "out")
    assert [given["id"] for name, given in calls if name == "init"] == [None, "run1"]
    assert [given["run_id"] for name, given in calls if name == "start_run"] == [None, "run1"]
    assert [given["step"] for name, given in calls if name == "log"] == [1, 2, 3]


@pytest.mark.parametrize("module", FAKES)
def test_a_missing_tracker_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    make: dict[str, Callable[[TrackedRun], object]] = {"wandb": WandbSink, "mlflow": MLflowSink}
    with pytest.raises(ConfigError, match=r"pip install 'gossamer\[tracking\]'"):
        make.get(module, TensorBoardSink)(tracked(tmp_path))


def test_a_tracker_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where its server is away, or a file lies in the place of its folder."""

    def start(*_: Any) -> None:
        raise PermissionError("no\nkey")

    monkeypatch.setattr(sinks, "WandbSink", start)
    told = r"^the tracker 'wandb' cannot start \(PermissionError: no key \(.*, line \d+\)\): see to it, or leave it out"
    with pytest.raises(ConfigError, match=told):
        make_sinks(["wandb"], tracked(tmp_path))


def test_a_module_of_the_working_folder_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that only has a tracker's name is the user's own code, like a plug-in."""
    (tmp_path / "wandb.py").write_text("def init(**given): raise OSError('mine')\n")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    told: list[str] = []
    with registry.importing(told.append), pytest.raises(ConfigError, match="OSError: mine"):
        make_sinks(["wandb"], tracked(tmp_path))
    assert told == [f"tracker 'wandb': importing 'wandb' from {str(tmp_path / 'wandb.py')!r}"]
    sys.modules.pop("wandb")
    with registry.importing(told.append, own=False), pytest.raises(ConfigError, match="imports only with --trust"):
        make_sinks(["wandb"], tracked(tmp_path))
