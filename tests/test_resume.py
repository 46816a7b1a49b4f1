"""Whatever interrupts a run: continued from its last commit, it ends as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gate
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
from gossamer.config.inputs import configuration_inputs, require_same
from gossamer.config.loading import with_value
from gossamer.errors import CheckpointError, ConfigError, GossamerError, GossamerWarning, StorageError
from gossamer.experiment import Hooks, Run
from gossamer.storage import checkpoint, client_store
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import read_config, read_metrics
from gossamer.workloads.datasets import digits

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
        with (
            pytest.raises(Injected),
            pytest.warns(GossamerWarning, match="is damaged: .*; the commit before it is used"),
        ):
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
        """Rounds that were logged are not erased without a word; told so, the run begins anew."""
        interrupted(kind, tmp_path / "run", "train", True, 4)
        shutil.rmtree(tmp_path / "run/checkpoints")
        metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
        with pytest.raises(CheckpointError, match=r"holds 3 rounds, but .* no commit.* resume .*run --restart"):
            resume(tmp_path / "run")
        assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
        assert_same(resume(tmp_path / "run", restart=True), undisturbed(kind))

    def test_no_round_was_logged(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        interrupted("stateless", tmp_path / "run", "commit", True, 1)
        assert_same(resume(tmp_path / "run"), undisturbed("stateless"))

    def test_the_advice_works(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        shutil.copytree(undisturbed("stateless").directory, tmp_path / "a run")
        path = tmp_path / "a run/metrics.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"round": 3', b'"round": 5'))
        refused = CliRunner().invoke(app, ["resume", str(tmp_path / "a run")])
        assert refused.exit_code == 2
        command, advice = "gossamer", refused.stderr.strip().rpartition("train anew with: ")[2]
        arguments = shlex.split(advice.removeprefix(command))
        assert CliRunner().invoke(app, arguments).exit_code == 0
        assert_same(resume(tmp_path / "a run"), undisturbed("stateless"))

    def test_restart_continues_what_can_be_continued(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        interrupted("stateless", tmp_path / "run", "train", True, 4)
        trained = CountRounds()
        assert_same(
            resume(tmp_path / "run", Hooks(lambda name, number: trained), restart=True), undisturbed("stateless")
        )
        assert trained.rounds == [4]

    def test_a_torn_line(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        interrupted("stateless", tmp_path / "run", "train", True, 4)
        with (tmp_path / "run/metrics.jsonl").open("ab") as file:
            file.write(b'{"round": 4, "accu')
        assert_same(resume(tmp_path / "run"), undisturbed("stateless"))

    def test_a_metrics_file_that_was_cut(self, tmp_path: Path) -> None:
        interrupted("stateless", tmp_path / "run", "train", True, 4)
        os.truncate(tmp_path / "run/metrics.jsonl", 100)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl' holds 100 bytes but the commit was made at"):
            resume(tmp_path / "run")


class CountRounds:
    """Observes which rounds are trained."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def on_block(self, round: int, done: int, total: int) -> None: ...

    def on_round(self, record: Mapping[str, Any]) -> None:
        self.rounds.append(record["round"])


class TestInputs:
    """A commit belongs to its configuration and data."""

    @pytest.fixture
    def stopped(self, tmp_path: Path) -> Path:
        interrupted("stateless", tmp_path / "run", "train", True, 3)
        return tmp_path / "run"

    def edit(self, run: Path, changes: Mapping[str, Any]) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        for key, value in changes.items():
            config = with_value(config, key.split("."), value)
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("train.lr", 0.2, "train.lr = 0.2, but the run was committed with 0.1"),
            ("seed", 7, "seed = 7, but the run was committed with 0"),
            ("algorithm.name", "heterofl", 'algorithm.name = "heterofl", but the run was committed with "fedrolex"'),
            ("submodel.capacities", [0.5, 1.0], "submodel.capacities = "),
            ("engine.modes", [], "engine.modes = "),
            ("workload.more", 1, "workload.more = 1, but the run was committed with nothing"),
        ],
    )
    def test_an_edited_configuration(self, stopped: Path, key: str, value: Any, message: str) -> None:
        self.edit(stopped, {key: value})
        with pytest.raises(CheckpointError) as caught:
            resume(stopped)
        assert f"config.yaml says {message}" in str(caught.value)

    def test_what_changes_no_bits(self, stopped: Path, undisturbed: Callable[[str], Run]) -> None:
        self.edit(stopped, {"engine.workers": 1, "engine.block_size": 2})
        assert_same(resume(stopped), undisturbed("stateless"))

    def test_a_finished_run(self, tmp_path: Path, undisturbed: Callable[[str], Run]) -> None:
        shutil.copytree(undisturbed("stateless").directory, tmp_path / "run")
        self.edit(tmp_path / "run", {"train.lr": 0.2})
        with pytest.raises(CheckpointError, match=r"train.lr = 0.2"):
            resume(tmp_path / "run")

    def test_other_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = "from gossamer.workloads.datasets import digits\ndef data(options): return digits({'limit': 60})\n"
        (tmp_path / "data_of_a_user.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        changes = {"workload.dataset": "data_of_a_user:data", "rounds": 2}
        run(configure(changes), out=tmp_path / "run")
        monkeypatch.setattr("data_of_a_user.data", lambda options: digits({"limit": 70}))
        with pytest.raises(CheckpointError, match=r"^the data, or their partition, are not those that the run"):
            resume(tmp_path / "run")
        again = resume(tmp_path / "run", restart=True)
        assert_same(again, run(configure(changes), out=tmp_path / "new"))

    def test_another_topology(self, tmp_path: Path) -> None:
        """Of the file only what makes the graph counts."""
        (tmp_path / "graph.txt").write_text("a b\nb c\nc d\nd a\n")
        peers = {"topology": {"name": "file", "path": str(tmp_path / "graph.txt")}}
        config = {
            key: value for key, value in configure({"rounds": 1, "algorithm": "dsgd"}).items() if key != "clients"
        }
        done = run(config | {"peers": peers}, out=tmp_path / "run")
        (tmp_path / "graph.txt").write_text("# a ring\na b\nb c\nc d\nd a\n")
        assert_same(resume(tmp_path / "run"), done)
        (tmp_path / "graph.txt").write_text("a b\nb c\nc d\nd a\na c\n")
        with pytest.raises(CheckpointError, match=r"^the topology.s file is not the one that the run"):
            resume(tmp_path / "run")

    def test_an_edited_experiment(self, tmp_path: Path) -> None:
        """What its unfinished runs are expanded from."""
        with pytest.raises(Injected):
            run(configured("stateless", seeds=[0, 1]), out=tmp_path / "run", hooks=failing("train", True, 2))
        path = tmp_path / "run/experiment.yaml"
        path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.3"))
        with pytest.raises(ConfigError, match=r"experiment.yaml' was changed since its runs began: restore it"):
            resume(tmp_path / "run")

    def test_bits_of_the_configuration(self, stopped: Path) -> None:
        """A sample of all single bits: each is refused, or means the same run."""
        path = stopped / "config.yaml"
        content = path.read_bytes()
        meant = configuration_inputs(read_config(stopped))
        latest = Checkpoints(stopped / "checkpoints").latest()
        assert latest is not None
        for bit in random.Random(content).sample(range(8 * len(content)), 150):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                require_same(latest.inputs, {"configuration": configuration_inputs(read_config(stopped))})
            except GossamerError:
                continue
            assert configuration_inputs(yaml.safe_load(path.read_bytes())) == meant


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
            ("private-state", client_store, "write_at", 5, OSError(errno.ENOSPC, "full")),
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
            stdout, stderr = child.communicate(timeout=200)
        assert (child.returncode, stdout) == (130, "")
        announced, message = stderr.splitlines()
        assert announced == f"sampler 'gate:hold': importing 'gate' from {gate.__file__!r}"
        assert message == f"error: stopped after round {HELD_ROUND} of 6; resume with: gossamer resume {out}"
        assert len(read_metrics(out)) == HELD_ROUND
        latest = Checkpoints(out / "checkpoints").latest()
        assert latest is not None
        assert latest.round == HELD_ROUND
        assert_same(resume(out), run(config, out=tmp_path / "undisturbed"))
