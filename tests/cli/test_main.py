"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gossamer import experiment
from gossamer.cli.main import app
from gossamer.errors import ConfigError, EngineError, GossamerError, Interrupted, QuorumError
from gossamer.storage.runlog import read_events

EXPERIMENT = {
    "name": "digits",
    "rounds": 2,
    "seeds": [0, 1],
    "workload": {"dataset": {"name": "digits", "limit": 200}, "model": "softmax"},
    "clients": {"num": 4, "per_round": 2},
    "train": {"lr": 0.1},
    "engine": {"workers": 0},
}

# Stands in for gossamer.experiment, without torch: tells of two rounds and "makes" the run directory some/run.
FAKE = """
import sys, types
from gossamer.errors import warn
fake = types.ModuleType("gossamer.experiment")
class Hooks:
    def __init__(self, observer=None, tell=None, show=None): self.observer = observer or (lambda name, num_rounds: None)
def run(source, overrides, out, hooks):
    for _ in range(2): warn(filter(None, [overrides and overrides[0]]))
    observer = hooks.observer("digits", 2)
    for number in (1, 2) if observer is not None else ():
        observer.on_block(number - 1, 3, 3)
        observer.on_round({"round": number, "accuracy": 0.25 * number, "total_bytes_up": 500, "total_bytes_down": 500})
    return types.SimpleNamespace(directory="some/run", runs=[], stop_reason="", metrics=[])
fake.Hooks, fake.run = Hooks, run
sys.modules["gossamer.experiment"] = fake
config = sys.modules["gossamer.config.loading"] = types.ModuleType("gossamer.config.loading")
config.load, config.expand = lambda file, overrides: file, lambda data: {"": {"rounds": 2}}
"""
MAIN = "from gossamer.cli.main import main; main()"


def invoke(*arguments: Any) -> Any:
    """Run the command in this process, and return its outcome."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in another process of Python, and return its outcome."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, **options)


def on_terminal(program: str, columns: int) -> tuple[str, str]:
    """Return the standard output of ``run e.yaml odd``, and what a terminal of so many columns gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-c", program, "run", "e.yaml", "odd"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=environment | {"TERM": "xterm"},
    ) as process:
        os.close(theirs)
        stdout, _ = process.communicate(timeout=200)
    drawn = b""
    try:
        while chunk := os.read(ours, 65536):
            drawn += chunk
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(ours)
    return stdout, drawn.decode()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace `experiment.run` and `experiment.resume`; return what they are called with."""
    made: list[tuple[Any, ...]] = []

    def called(*arguments: Any) -> SimpleNamespace:
        """Note the arguments, and return what a run would return."""
        made.append(arguments)
        return SimpleNamespace(directory=Path("some/run"), runs=[], stop_reason="", metrics=[])

    monkeypatch.setattr(experiment, "run", called)
    monkeypatch.setattr(experiment, "resume", called)
    return made


class TestRun:
    def test_arguments_are_passed_on(self, calls: list[tuple[Any, ...]]) -> None:
        done = invoke("run", "e.yaml", "train.lr=0.1", "--out", "d", "seed=3", "--engine", "ray", "--quiet")
        assert (done.exit_code, done.stdout, done.stderr) == (0, "some/run\n", "")
        ((file, overrides, out, hooks),) = calls
        assert (file, overrides, out) == (Path("e.yaml"), ["train.lr=0.1", "seed=3", "engine.name=ray"], Path("d"))
        assert hooks.observer("digits", 3) is None

    def test_defaults(self, calls: list[tuple[Any, ...]]) -> None:
        assert invoke("run", "e.yaml").exit_code == 0
        assert calls[0][:3] == (Path("e.yaml"), [], None)

    def test_resume(self, calls: list[tuple[Any, ...]]) -> None:
        done = invoke("resume", "some/run")
        assert (done.exit_code, done.stdout) == (0, "some/run\n")
        assert calls[0][0] == Path("some/run")

    def test_run_resume_and_plot_of_an_experiment(self, tmp_path: Path) -> None:
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(EXPERIMENT))
        done = invoke("run", tmp_path / "e.yaml", "train.batch_size=20", "--out", tmp_path / "out")
        assert done.exit_code == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
        config = yaml.safe_load((tmp_path / "out/seed-1/config.yaml").read_text())
        assert (config["seed"], config["train"]["batch_size"]) == (1, 20)
        metrics = (tmp_path / "out/seed-1/metrics.jsonl").read_text()
        assert [json.loads(line)["round"] for line in metrics.splitlines()] == [1, 2]
        assert invoke("resume", tmp_path / "out").stdout.splitlines()[-1] == str(tmp_path / "out")
        assert (tmp_path / "out/seed-1/metrics.jsonl").read_text() == metrics
        drawn = invoke("plot", tmp_path / "out", "--x", "bytes", "--metric", "train_loss", "-o", tmp_path / "a.svg")
        assert drawn.stdout == f"{tmp_path / 'a.svg'}\n"
        assert (tmp_path / "a.svg").read_text().count("<svg") == 1


class TestModulePath:
    """Code in the working folder, under names that libraries have, and of a plug-in."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        for name in ("random", "yaml", "datasets", "typing_extensions", "networkx"):
            (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
        plug_in = "from gossamer.topology.classic import ring\nfrom gossamer.workloads.datasets import digits\n"
        (tmp_path / "plug_in_here.py").write_text(plug_in + "def few(options): return digits({'limit': 60})\n")
        workload = EXPERIMENT["workload"] | {"dataset": {"name": "plug_in_here:few"}}
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"workload": workload}))
        monkeypatch.chdir(tmp_path)
        yield tmp_path
        sys.modules.pop("plug_in_here", None)

    def test_the_working_folder_comes_last(self, folder: Path) -> None:
        command = [sys.executable, "-m", "gossamer", "topology", "show", "geometric", "-n", "20"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert (done.returncode, done.stderr) == (0, "")

    def test_run_says_what_it_imports(self, folder: Path) -> None:
        path = list(sys.path)
        done = invoke("run", "e.yaml", "--out", "out", "--quiet")
        assert done.exit_code == 0, done.stderr
        told = f"dataset 'plug_in_here:few': importing 'plug_in_here' from {str(folder / 'plug_in_here.py')!r}\n"
        assert done.stderr == told
        assert sys.path == path

    @pytest.mark.parametrize(
        "command", [["coverage", "e.yaml"], ["topology", "show", "plug_in_here:ring", "-n", "4"]], ids=lambda c: c[0]
    )
    def test_commands_that_only_look_import_nothing(self, folder: Path, command: list[str]) -> None:
        done = invoke(*command)
        assert done.exit_code == 2
        assert "names code in 'plug_in_here', which this command imports only with --trust" in done.stderr
        assert "plug_in_here" not in sys.modules
        assert invoke(*command, "--trust").exit_code == 0

    @pytest.mark.parametrize("command", ["run", "coverage", "resume", "sweep"])
    def test_a_strangers_file(self, tmp_path: Path, command: str) -> None:
        workload = {"dataset": {"name": "subprocess:call", "args": ["touch", str(tmp_path / "touched")]}}
        (tmp_path / "e.yaml").write_text(yaml.safe_dump(EXPERIMENT | {"workload": workload | {"model": "softmax"}}))
        given = tmp_path / "e.yaml"
        if command == "resume":
            given = tmp_path / "run"
            given.mkdir()
            (given / "config.yaml").write_text((tmp_path / "e.yaml").read_text())
        more = ["--engine", "local", "train.lr=0.1,0.2"] if command == "sweep" else []
        done = invoke(command, given, *more, *(["--out", tmp_path / "out"] if command in ("run", "sweep") else []))
        assert done.exit_code == 2, done.output
        assert "'subprocess:call' names code of Python's library" in done.output
        assert not (tmp_path / "touched").exists()
        assert command == "sweep" or not (tmp_path / "out").exists()  # a sweep has a table of what failed


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code"),
        [(ConfigError("no"), 2), (QuorumError("no"), 2), (EngineError("no"), 2), (Interrupted("no"), 130)],
        ids=lambda value: type(value).__name__,
    )
    def test_message_alone_and_its_exit_code(
        self, monkeypatch: pytest.MonkeyPatch, error: GossamerError, code: int
    ) -> None:
        def fail(*arguments: Any) -> None:
            """Raise the error."""
            raise error

        monkeypatch.setattr(experiment, "run", fail)
        done = invoke("run", "e.yaml")
        assert (done.exit_code, done.stdout, done.stderr) == (code, "", "error: no\n")

    def test_long_words_are_cut(self) -> None:
        done = invoke("run", "e" * 5000)
        assert done.stderr.startswith("error: cannot read configuration 'eeeee")
        assert len(done.stderr) < 400

    def test_keyboard_interrupt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*arguments: Any) -> None:
            """Raise what Ctrl-C raises."""
            raise KeyboardInterrupt

        monkeypatch.setattr(experiment, "run", interrupt)
        done = invoke("run", "e.yaml")
        assert (done.exit_code, done.stdout) == (130, "")
        assert "Traceback" not in done.stderr

    def test_a_bug_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(experiment, "run", lambda *arguments: 1 / 0)
        done = invoke("run", "e.yaml")
        assert isinstance(done.exception, ZeroDivisionError)
        assert done.exit_code == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            ["run"],
            ["walk"],
            ["plot", "d"],
            ["plot", "-o", "a.png"],
            ["run", "e.yaml", "--no-such"],
            ["resume", "a", "--lr", "1"],
            ["run", "e.yaml", "--out", ""],
            ["run", "e.yaml", "--out="],
            ["resume", ""],
        ],
        ids=" ".join,
    )
    def test_wrong_usage(self, arguments: list[str]) -> None:
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "Usage: " in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run", "none.yaml"], "cannot read configuration 'none.yaml' (No such file or directory): give"),
            (["resume", "none"], "'none' is not a run directory"),
            (["plot", "none", "-o", "a.png"], "no directory 'none'"),
            (["plot", "none", "-o", "a.gif"], "cannot tell the format of 'a.gif'"),
            (["plot", "none", "--x", "bytes", "--spec", "s.yaml", "-o", "a.png"], "'s.yaml' names the axes"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_real_mistakes(self, arguments: list[str], message: str) -> None:
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1


class TestVersion:
    def test_it_is_that_of_the_package(self) -> None:
        done = invoke("--version")
        assert (done.exit_code, done.stdout, done.stderr) == (0, f"gossamer {version('gossamer')}\n", "")


class TestHelp:
    def test_commands_and_nothing_else(self) -> None:
        done = invoke("--help")
        assert done.exit_code == 0
        commands = [
            "run",
            "resume",
            "sweep",
            "plot",
            "coverage",
            "describe",
            "doctor",
            "profile",
            "export",
            "runs",
            "table",
            "topology",
            "node",
            "offload",
        ]
        assert re.findall(r"^│ (\w+) ", done.stdout, re.MULTILINE) == commands
        assert "--install-completion" in done.stdout

    @pytest.mark.parametrize("command", ["", "run", "resume", "sweep", "export", "topology show"])
    def test_every_command_takes_h(self, command: str) -> None:
        assert invoke(*command.split(), "-h").stdout == invoke(*command.split(), "--help").stdout

    def test_nothing_heavy_is_loaded(self) -> None:
        program = f"""
import atexit, sys
heavy = ("torch", "numpy", "matplotlib", "pydantic", "yaml", "gossamer.experiment", "gossamer.reports.plots")
atexit.register(lambda: print([name for name in heavy if name in sys.modules], file=sys.stderr))
{MAIN}
"""
        done = python(program, "--help")
        assert done.returncode == 0
        assert done.stderr == "[]\n"


class TestStreams:
    def test_a_pipe_gets_the_directory_alone_and_warnings_and_progress_on_standard_error(self) -> None:
        done = python(FAKE + MAIN, "run", "e.yaml", "odd")
        line = "digits: 2 rounds in 0:00:00, accuracy 50.0%, 1.0 kB\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, "some/run\n", f"warning: odd\n{line}")
        done = python(FAKE + MAIN, "run", "e.yaml", "odd", "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, "some/run\n", "warning: odd\n")

    def test_a_terminal_gets_progress_on_standard_error(self) -> None:
        stdout, text = on_terminal(FAKE + MAIN, 100)
        assert stdout == "some/run\n"
        assert "digits: 2 rounds in 0:00:00, accuracy 50.0%, 1.0 kB" in text
        assert "3/3 trained" in text
        assert text.count("warning: odd\r\n") == 1

    @pytest.mark.parametrize("columns", [60, 80])
    def test_a_narrow_terminal_has_one_line(self, columns: int) -> None:
        often = "import gossamer.cli.progress\ngossamer.cli.progress.REFRESH_SECONDS = 0\n"
        program = FAKE.replace('"digits", 2', '"digits-with-a-name-that-is-long", 2') + often + MAIN
        _, text = on_terminal(program, columns)
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
        bars = [line for line in lines if "━" in line and "rounds" in line]
        assert len(bars) > 2
        assert max(map(len, bars)) <= columns
        assert text.count("\x1b[1A") <= 1  # which would go up to a second line

    def test_what_changes_nothing_is_told_once_a_method(self, tmp_path: Path) -> None:
        methods = {"wide": {"train.lr": 0.2}, "moved": {"submodel.stride": 3}}
        file = tmp_path / "e.yaml"
        file.write_text(yaml.safe_dump(EXPERIMENT | {"rounds": 1, "methods": methods}))
        reason = "submodel.stride = 3 changes nothing, because all participants train the whole model: leave it out"
        told = f"warning: moved: {reason}, or correct it\n"
        for command in ("run", "sweep"):
            chosen = ["--quiet", *(["--engine", "local"] if command == "sweep" else [])]
            done = invoke(command, file, "--out", tmp_path / command, *chosen)
            assert (done.exit_code, done.stderr) == (0, told)
            assert read_events(tmp_path / command / "moved" / "seed-1")[1]["message"].startswith(reason)
        assert invoke("resume", tmp_path / "run", "-q").stderr == told

    @pytest.mark.parametrize(
        "command", [["run", "e.yaml", "-q"], ["doctor", "--json"], ["--help"]], ids=lambda words: words[0]
    )
    def test_a_reader_that_is_gone_is_no_reason_to_complain(self, command: list[str]) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        program = [sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + FAKE + MAIN, *command]
        done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=200)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    @pytest.mark.parametrize(
        "command", [["run", "e.yaml", "-q"], ["topology", "list"], ["--help"]], ids=lambda words: words[0]
    )
    def test_a_full_device_is_one_sentence(self, command: list[str], unbuffered: str) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", FAKE + MAIN, *command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                timeout=200,
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            )
        assert done.returncode == 2
        assert done.stderr == (
            "error: cannot write the output (No space left on device): free space, or redirect it elsewhere\n"
        )

    def test_streams_that_are_closed(self) -> None:
        """As in some services; what the run opens afterwards has other numbers than theirs."""
        told = "fake.run = lambda *arguments: sys.exit(100 + open('/dev/null').fileno())\n"
        words = [sys.executable, "-c", FAKE + told + MAIN, "run", "e.yaml"]
        shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
        assert subprocess.run(shell, check=False, timeout=60).returncode > 102

    def test_a_bug_shows_its_traceback(self) -> None:
        done = python(FAKE + "fake.run = lambda *arguments: 1 / 0\n" + MAIN, "run", "e.yaml")
        assert done.returncode == 1
        assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")
        assert done.stderr.startswith("Traceback")
