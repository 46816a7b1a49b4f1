"""Whatever interrupts a run: continued from its last commit, it ends as if nothing had happened."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from gate import HELD_ROUND
from safetensors import SafetensorError
from typer.testing import CliRunner

from federation import (
    SCAFFOLD,
    STACKED,
    Injected,
    assert_same,
    configure,
    environment,
    events,
    failing,
    mixed,
    wait_for,
)
from gossamer import resume, run
from gossamer.cli.main import app
from gossamer.errors import CheckpointError, ConfigError, StorageError
from gossamer.experiment import Run
from gossamer.storage import checkpoint, client_store
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_metrics

KINDS = {"stateless": mixed("fedrolex", **STACKED), "private-state": SCAFFOLD | {"clients.num": 4}}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
ROUNDS = 4


def configured(kind: str, **changes: Any) -> dict[str, Any]:
    return configure(KINDS[kind] | {"rounds": ROUNDS} | changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Run each kind of federation once, and return its run."""
    done: dict[str, Run] = {}

    def get(kind: str) -> Run:
        if kind not in done:
            done[kind] = run(configured(kind), out=tmp_path_factory.mktemp(kind))
        return done[kind]

    return get


def interrupted(kind: str, directory: Path, name: str, started: bool, number: int, **changes: Any) -> None:
    """Start a run that fails at the start or the end of a phase."""
    with pytest.raises(Injected):
        run(configured(kind, **changes), out=directory, hooks=failing(name, started, number))


class TestEveryPhase:
    @pytest.mark.sweep(keep=0.25, together=("name", "started"))
    @EACH_KIND
    @pytest.mark.parametrize("started", [True, False], ids=["start", "end"])
    @pytest.mark.parametrize("number", [1, 3])
    @pytest.mark.parametrize("name", ["train", "exchange", "evaluate", "commit"])
    def test_same_bits(
        self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str, name: str, number: int, started: bool
    ) -> None:
        """The first commit of all is that of the initial model."""
        interrupted(kind, tmp_path / "run", name, started, number)
        resumed = resume(tmp_path / "run")
        assert_same(resumed, undisturbed(kind))
        seconds = [record["wall_seconds"] for record in resumed.metrics]
        assert seconds == sorted(seconds)

    @EACH_KIND
    def test_commits_are_rare(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        """Everything since the initial model is lost, and done again."""
        interrupted(kind, tmp_path / "run", "evaluate", False, 3, **{"checkpoint.every_seconds": 1000})
        assert len(read_metrics(tmp_path / "run")) == 2
        assert_same(resume(tmp_path / "run"), undisturbed(kind))

    @EACH_KIND
    def test_again_and_again(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        interrupted(kind, tmp_path / "run", "exchange", False, 2)
        for name, started, number in [("train", False, 1), ("commit", True, 1), ("evaluate", True, 2)]:
            with pytest.raises(Injected):
                resume(tmp_path / "run", failing(name, started, number))
        assert_same(resume(tmp_path / "run"), undisturbed(kind))

    @EACH_KIND
    def test_with_other_workers(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        """The number of workers changes no bits, before or after."""
        interrupted(kind, tmp_path / "run", "exchange", True, 2, **{"engine.workers": 2})
        assert_same(resume(tmp_path / "run", overrides=["engine.workers=0", "engine.block_size=1"]), undisturbed(kind))

    def test_only_what_changes_no_bits_can_be_changed(self, tmp_path: Path) -> None:
        interrupted("stateless", tmp_path / "run", "exchange", True, 2)
        with pytest.raises(ConfigError, match=r"'train.lr=1': a run that has begun can only change engine.name, .*"):
            resume(tmp_path / "run", overrides=["engine.workers=2", "train.lr=1"])

    @EACH_KIND
    def test_nothing_left_to_do(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        done = undisturbed(kind)
        files = {path: path.stat().st_mtime_ns for path in done.directory.rglob("*") if path.is_file()}
        assert_same(resume(done.directory), done)
        assert {path: path.stat().st_mtime_ns for path in done.directory.rglob("*") if path.is_file()} == files


class TestDamage:
    def damage(self, commit: Path, name: str) -> None:
        path = commit / name
        if name == "manifest.json":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            content[-5] ^= 1
            path.write_bytes(content)

    @pytest.mark.sweep(keep=0.5)
    @EACH_KIND
    @pytest.mark.parametrize("name", ["arrays.safetensors", "progress.json", "manifest.json"])
    def test_the_one_before_is_used(
        self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str, name: str
    ) -> None:
        interrupted(kind, tmp_path / "run", "train", True, 4)
        self.damage(tmp_path / "run/checkpoints/00000003", name)
        with pytest.raises(Injected):
            resume(tmp_path / "run", failing("commit", True, 1))
        assert_same(resume(tmp_path / "run"), undisturbed(kind))
        (event,) = events(tmp_path / "run", "checkpoint-damaged")
        assert f"00000003' is damaged: {name} " in event["message"]

    def test_none_is_left(self, tmp_path: Path) -> None:
        interrupted("stateless", tmp_path / "run", "train", True, 4)
        for commit in (tmp_path / "run/checkpoints").iterdir():
            self.damage(commit, "arrays.safetensors")
        metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used") as caught:
            resume(tmp_path / "run")
        assert "00000002' is damaged" in str(caught.value)
        assert "00000003' is damaged" in str(caught.value)
        done = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith("error: no checkpoint in ")
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics

    @EACH_KIND
    def test_checkpoints_that_are_gone(self, tmp_path: Path, undisturbed: Callable[[str], Run], kind: str) -> None:
        """Without any commit a run begins anew, whatever else it left."""
        interrupted(kind, tmp_path / "run", "train", True, 4)
        shutil.rmtree(tmp_path / "run/checkpoints")
        assert_same(resume(tmp_path / "run"), undisturbed(kind))

    def test_a_torn_line(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        interrupted("stateless", tmp_path / "run", "train", True, 4)
        with (tmp_path / "run/metrics.jsonl").open("ab") as file:
            file.write(b'{"round": 4, "accu')
        assert_same(resume(tmp_path / "run"), undisturbed("stateless"))

    def test_a_metrics_file_that_was_cut(self, tmp_path: Path) -> None:
        interrupted("stateless", tmp_path / "run", "train", True, 4)
        os.truncate(tmp_path / "run/metrics.jsonl", 100)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl' holds 0 bytes but the commit was made at"):
            resume(tmp_path / "run")


class TestFullDisk:
    """A write is refused; earlier commits are whole, and once there is room the run goes on."""

    def full(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, error: Exception) -> None:
        """Let the `number`-th call of a function fail, and all that follow."""
        original, calls = getattr(module, name), 0

        def refuse(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise error
            return original(*arguments)

        monkeypatch.setattr(module, name, refuse)

    @pytest.mark.parametrize(
        ("kind", "module", "name", "number", "error"),
        [
            ("stateless", checkpoint, "_write_text", 6, OSError(errno.ENOSPC, "full")),
            ("private-state", checkpoint, "_write_text", 5, OSError(errno.ENOSPC, "full")),
            ("stateless", checkpoint, "save_file", 3, SafetensorError("I/O error (os error 28)")),
            ("private-state", client_store, "_write_at", 5, OSError(errno.ENOSPC, "full")),
        ],
        ids=["manifest", "progress", "arrays", "client-state"],
    )
    def test_resumed_when_there_is_room(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        undisturbed: Callable[[str], Run],
        kind: str,
        module: Any,
        name: str,
        number: int,
        error: Exception,
    ) -> None:
        with monkeypatch.context() as patch:
            self.full(patch, module, name, number, error)
            with pytest.raises(StorageError, match="no space left on the device"):
                run(configured(kind, **{"engine.block_size": 1}), out=tmp_path / "run")  # three blocks a round
        latest = Checkpoints(tmp_path / "run/checkpoints").latest()
        assert latest is not None
        assert (latest.round, latest.damaged) == (1, [])
        assert len(read_metrics(tmp_path / "run")) == (1 if module is client_store else 2)
        assert_same(resume(tmp_path / "run"), undisturbed(kind))


class TestInterrupt:
    def command(self, *arguments: str, gate: Path) -> subprocess.Popen[str]:
        """Start the command line in a process group of its own, as a terminal does."""
        program = [sys.executable, "-m", "gossamer.cli.main", *arguments]
        return subprocess.Popen(
            program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | {"GATE": str(gate)},
            start_new_session=True,
        )

    def test_ctrl_c(self, tmp_path: Path) -> None:
        """The whole group gets the signal, workers included; what was done is committed."""
        rare = {"checkpoint.every_seconds": 1000, "clients.sampler": "gate:hold", "engine.workers": 2, "rounds": 6}
        config, out = configured("private-state", **rare), tmp_path / "out"
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(config))
        with self.command("run", str(tmp_path / "e.yaml"), "--out", str(out), gate=tmp_path) as child:
            wait_for(lambda: (tmp_path / "reached").exists() or child.poll() is not None)
            os.killpg(child.pid, signal.SIGINT)
            (tmp_path / "open").touch()
            stdout, stderr = child.communicate(timeout=60)
        assert (child.returncode, stdout) == (130, "")
        assert stderr == f"error: stopped after round {HELD_ROUND} of 6; resume with: gossamer resume {out}\n"
        assert len(read_metrics(out)) == HELD_ROUND
        latest = Checkpoints(out / "checkpoints").latest()
        assert latest is not None
        assert latest.round == HELD_ROUND
        assert_same(resume(out), run(config, out=tmp_path / "undisturbed"))
