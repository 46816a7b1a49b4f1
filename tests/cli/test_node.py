"""``gossamer node provision``, ``status`` and ``stop``: what they print and do, without torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.engines.network.state import FILE, NODES

WITHOUT = "import sys\nfor name in ('torch', 'grpc', 'numpy'): sys.modules[name] = None\n"
MAIN = "from gossamer.cli.main import main; main()"


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process in which torch cannot be imported."""
    command = [sys.executable, "-c", WITHOUT + MAIN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


HOLD = """
import sys, time
from pathlib import Path
from gossamer.storage.disk import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def tell(directory: Path, process: int) -> None:
    """Write what the server of a run tells."""
    told = {"process": process, "address": "127.0.0.1:8443", "clients": 4, "rounds": 9, "done": 2, "phase": 0}
    nodes = [{"name": "a", "clients": [0, 2]}, {"name": "b", "clients": [1]}]
    (directory / NODES).mkdir()
    (directory / NODES / FILE).write_text(json.dumps({**told, "waiting": [2, 3], "nodes": nodes}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for the server of a run in `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        tell(tmp_path, process.pid)
        yield process
        process.kill()


def test_provision_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "FEDERATION.yaml").write_text("name: f\nserver: {hosts: [127.0.0.1]}\nnodes: [a]\n")
    done = without_torch("node", "provision", tmp_path / "FEDERATION.yaml", "-o", tmp_path / "made")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "made")
    assert (tmp_path / "made" / "kits" / "a" / "token").exists()


def test_status(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    text, found = (CliRunner().invoke(app, ["node", "status", str(tmp_path), *more]) for more in ([], ["--json"]))
    needs_no_torch = without_torch("node", "status", tmp_path)
    assert text.stdout.splitlines() == [
        "listening on 127.0.0.1:8443, 2 of 9 rounds done",
        "3 of 4 clients are there",
        "  a: client 0, 2; 1 at work",
        "  b: client 1",
        "waiting for client 3",
    ]
    assert needs_no_torch.stdout == text.stdout
    assert json.loads(found.stdout)["waiting"] == [2, 3]


def test_stop(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["node", "stop", str(tmp_path)]).exit_code == 0
    assert server.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize("command", ["status", "stop"])
def test_where_no_server_is_at_work(command: str, tmp_path: Path) -> None:
    tell(tmp_path, os.getpid())
    for directory, told in (
        (tmp_path, f"no server is at work in {str(tmp_path)!r}"),
        (tmp_path / "none", "is not the directory of a run of real clients"),
    ):
        done = CliRunner().invoke(app, ["node", command, str(directory)])
        assert done.exit_code == 2
        assert told in done.stderr
