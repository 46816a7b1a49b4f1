"""Signals that end a process, amid long blocks and evaluations; workers that are stopped or die. See the plug-in."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stalling

from federation import STACKED, assert_same, configure, events, modes
from gossamer import resume, run
from gossamer.engines import stopping
from gossamer.engines.local import pool
from gossamer.engines.stopping import stop_on_signals
from gossamer.errors import Interrupted
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_metrics
from slow_peers import decentralized

NEVER = 1000.0  # seconds: longer than any test may take
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]
KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"clients": configure, "peers": decentralized}


def stopped(tmp_path: Path, kind: str, changes: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return a federation, or peers, in which something happens as long as a file exists."""
    (tmp_path / "flag").touch()
    workload = {"name": "stalling:Stopping", "flag": str(tmp_path / "flag"), **options}
    few = {"checkpoint.every_seconds": NEVER, "train.epochs": None, "train.steps": 4, "workload.evaluation_chunk": 20}
    return KINDS[kind](few | {f"workload.{key}": value for key, value in workload.items()} | changes)


def committed(directory: Path) -> tuple[int, int]:
    latest = Checkpoints(directory / "checkpoints").latest()
    assert latest is not None
    return latest.round, latest.phase


@pytest.mark.sweep(keep=0.15)
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("amid", ["train", "evaluate"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_out_of_a_long_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, kind: str, amid: str, workers: int
) -> None:
    """Between two steps or chunks; whatever is whole is committed, and the resumed run ends with the same bits."""
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 0.0)
    options = {"amid": amid, "signal": int(number), "process": os.getpid(), "seconds": NEVER if workers else 0.0}
    config = stopped(tmp_path, kind, {"engine.workers": workers}, **options)
    before = signal.getsignal(number)
    stalling.waits.clear()
    with pytest.raises(Interrupted) as caught:
        run(config, out=tmp_path / "a run")
    assert signal.getsignal(number) == before
    assert len(stalling.waits) == (workers == 0)  # the step, or chunk, amid which that happened
    rounds = len(read_metrics(tmp_path / "a run"))
    if amid == "evaluate":
        assert str(caught.value).startswith("stopped after the training of round 1 of ")
        assert (rounds, committed(tmp_path / "a run")) == (0, (0, 1))
    elif kind == "clients":
        assert str(caught.value).startswith("stopped after round 1 of ")
        assert (rounds, committed(tmp_path / "a run")) == (1, (1, 0))
    else:  # whose models are trained in place
        told = "stopped amid round 2 of 3, half of which cannot be kept: round 0 is committed, what came after it is"
        assert str(caught.value).startswith(told)
    assert str(caught.value).endswith(f"; resume with: gossamer resume '{tmp_path}/a run'")
    (tmp_path / "flag").unlink()
    assert_same(resume(tmp_path / "a run"), run(config, out=tmp_path / "undisturbed"))


@pytest.mark.parametrize("strategy", ["magnitude", "rolling"])
def test_evaluation_of_sub_models_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """By the channels of the round, which a ranking of the model that was committed would not choose."""
    monkeypatch.setattr(stopping, "PATIENCE_SECONDS", 0.0)
    levels = (0.25, 1.0)
    changes = {"algorithm": "fedavg", "submodel": {"capacities": list(levels), "strategy": strategy}}
    changes |= {"evaluation.by_capacity": True, "train.lr": 1.0} | modes(levels)
    options = {"amid": "evaluate", "signal": int(signal.SIGTERM), "process": os.getpid(), "seconds": 0.0}
    config = stopped(tmp_path, "clients", changes, **options)
    with pytest.raises(Interrupted, match="after the training of round 1 of 3"):
        run(config, out=tmp_path / "run")
    assert_same(resume(tmp_path / "run"), run(config, out=tmp_path / "undisturbed"))


@pytest.mark.sweep(keep=0.25)
@pytest.mark.parametrize("mode", [{}, STACKED], ids=["one-by-one", "stacked"])
@pytest.mark.parametrize("amid", ["train", "evaluate"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda number: number.name)
def test_a_lost_worker_is_replaced(
    tmp_path: Path, number: signal.Signals, kind: str, amid: str, mode: dict[str, Any]
) -> None:
    """Its jobs are done again, with the same bits."""
    if mode and amid == "train":
        pytest.skip("a stacked loss is traced")
    changes = {"engine.workers": 2, "engine.block_size": 2} | modes(**mode)
    config = stopped(tmp_path, kind, changes, amid=amid, signal=int(number), seconds=0.0)
    struck = run(config, out=tmp_path / "run")
    (event,) = events(tmp_path / "run", "worker-replaced")
    assert event["reason"].startswith("died with exit code -9" if number == signal.SIGKILL else "was stopped by a sig")
    (tmp_path / "flag").unlink()
    assert_same(struck, run(config, out=tmp_path / "undisturbed"))


def test_private_state_of_a_lost_worker_is_given_again(tmp_path: Path) -> None:
    changes = {"engine.workers": 2, "engine.block_size": 2, "algorithm": "scaffold"}
    config = stopped(tmp_path, "clients", changes, signal=int(signal.SIGKILL), seconds=0.0, round=2)
    struck = run(config, out=tmp_path / "run")
    assert len(events(tmp_path / "run", "worker-replaced")) == 1
    (tmp_path / "flag").unlink()
    assert_same(struck, run(config, out=tmp_path / "undisturbed"))


def test_peers_lost_amid_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows may be half written, so the run takes up its last commit."""
    flag = tmp_path / "once"
    flag.touch()
    work = pool._work

    def dying(connection: Any, inherited: Any, make_handler: Any, writing: Any, parent: int) -> None:
        def before_writing() -> None:
            writing[0] = 1
            if flag.exists():
                flag.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        work(connection, inherited, lambda _: make_handler(before_writing), writing, parent)

    config = decentralized({"engine.workers": 2, "engine.block_size": 2})
    undisturbed = run(config, out=tmp_path / "undisturbed")
    flag.touch()
    monkeypatch.setattr(pool, "_work", dying)
    struck = run(config, out=tmp_path / "run")
    assert [event["back_to"] for event in events(tmp_path / "run", "state-lost")] == [0]
    assert_same(struck, undisturbed)


class TestSignals:
    def test_nested_requests_are_one(self) -> None:
        with stop_on_signals() as outer, stop_on_signals() as inner:
            signal.raise_signal(signal.SIGHUP)
            assert inner()
            assert outer()

    def test_ignored_signals_stay_ignored(self) -> None:
        """As under nohup."""
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with stop_on_signals() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert not stop()
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_only_a_second_ctrl_c_interrupts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And not one that a terminal and a wrapper sent at the same time."""
        with stop_on_signals() as stop:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.raise_signal(number)
            monkeypatch.setattr(stopping, "AGAIN_SECONDS", 0.0)
            signal.raise_signal(signal.SIGTERM)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_preparation_is_interrupted(self) -> None:
        with stop_on_signals() as stop:
            with pytest.raises(Interrupted, match="stopped while it was prepared"), stop.at_once():
                signal.raise_signal(signal.SIGTERM)
            assert not stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_while_data_are_loaded(tmp_path: Path, number: signal.Signals) -> None:
    """At once, because there is nothing to lose."""
    config = stopped(tmp_path, "clients", {}, amid="load", signal=int(number), seconds=NEVER)
    with pytest.raises(Interrupted, match=r"^stopped while it was prepared; nothing was written: run it again$"):
        run(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
