"""What the tracker adapters hand to their trackers, with fake modules in the trackers' place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gossamer.errors import ConfigError
from gossamer.storage import sinks
from gossamer.storage.sinks import MLflowSink, TensorBoardSink, WandbSink, make_sinks, scalars

RECORD = {
    "round": 4,
    "seconds": 0.5,
    "loss": None,
    "global": {"accuracy": 0.75, "ok": True},
    "curve": [1, 2],
    "note": "x",
}
SCALARS = {"seconds": 0.5, "global/accuracy": 0.75}

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


def fake(monkeypatch: pytest.MonkeyPatch, module: str, calls: Calls) -> None:
    """Put a module in place whose every function notes its call and returns an object that does the same."""

    class Recorder(ModuleType):
        def __getattr__(self, name: str) -> Callable[..., Recorder]:
            def called(*args: Any, **options: Any) -> Recorder:
                calls.append((name, args, options))
                return Recorder(name)

            return called

    monkeypatch.setitem(sys.modules, module, Recorder(module))


def test_scalars_flatten_and_leave_out_what_is_no_finite_number() -> None:
    assert scalars(RECORD | {"worst": float("nan"), "best": float("inf")}) == SCALARS
    assert scalars({"inner": {"round": 2}}) == {"inner/round": 2.0}


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: Calls = []
    fake(monkeypatch, "torch.utils.tensorboard", calls)
    sink = TensorBoardSink(tmp_path)
    sink.log(RECORD)
    sink.close()
    assert calls == [
        ("SummaryWriter", (), {"log_dir": str(tmp_path)}),
        ("add_scalar", ("seconds", 0.5, 4), {}),
        ("add_scalar", ("global/accuracy", 0.75, 4), {}),
        ("close", (), {}),
    ]


def test_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Calls = []
    fake(monkeypatch, "mlflow", calls)
    sink = MLflowSink("digits", "first")
    sink.log(RECORD)
    sink.close()
    assert calls == [
        ("set_experiment", ("digits",), {}),
        ("start_run", (), {"run_name": "first"}),
        ("log_metrics", (SCALARS,), {"step": 4}),
        ("end_run", (), {}),
    ]


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: Calls = []
    fake(monkeypatch, "wandb", calls)
    sink = WandbSink("digits", "first", tmp_path)
    sink.log(RECORD)
    sink.close()
    assert calls == [
        ("init", (), {"project": "digits", "name": "first", "dir": str(tmp_path)}),
        ("log", (SCALARS,), {"step": 4}),
        ("finish", (), {}),
    ]


@pytest.mark.parametrize(
    ("module", "build"),
    [
        ("torch.utils.tensorboard", lambda: TensorBoardSink(Path())),
        ("mlflow", lambda: MLflowSink("digits", "first")),
        ("wandb", lambda: WandbSink("digits", "first", Path())),
    ],
)
def test_a_missing_tracker_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, module: str, build: Callable[[], object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'gossamer\[tracking\]'"):
        build()


def test_a_tracker_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where its server is away, or a file lies in the place of its folder."""

    def start(*_: Any) -> None:
        raise PermissionError("no\nkey")

    monkeypatch.setattr(sinks, "WandbSink", start)
    told = r"^the tracker 'wandb' cannot start \(PermissionError: no key \(.*, line \d+\)\): see to it, or leave it out"
    with pytest.raises(ConfigError, match=told):
        make_sinks(["wandb"], tmp_path)
