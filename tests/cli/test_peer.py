"""``gossamer node peer`` and ``observer``: what is wrong is told in one sentence, with exit code 2."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gossamer.cli.main import app
from slow_peers import decentralized


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a configuration of four peers, in a file."""
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(decentralized({"peers.num": 4})))
    return path


def addresses(folder: Path, text: str) -> Path:
    """Write a file of addresses."""
    path = folder / "addresses.yaml"
    path.write_text(text)
    return path


def invoke(*arguments: Any) -> Any:
    """Run ``gossamer node`` in this process, and return its outcome."""
    return CliRunner().invoke(app, ["node", *(str(argument) for argument in arguments)])


FOUR = "peers: [127.0.0.1:9001, 127.0.0.1:9002, 127.0.0.1:9003, 127.0.0.1:9004]\n"


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        (FOUR, [], "which peer this is is not known: give --id K, or the --kit DIR of a peer"),
        (FOUR, ["--id", "4"], "--id 4: the run has the peers 0..3: give one of them"),
        ("peers: [127.0.0.1:9001, 127.0.0.1:9002]\n", ["--id", "0"], "has 2 addresses, but the run has 4 peers"),
        (
            "peers: ['127.0.0.1:9001', '127.0.0.1:9002', '127.0.0.1:9001', '127.0.0.1:9004']\n",
            ["--id", "0"],
            "has the address '127.0.0.1:9001' twice",
        ),
        ("peers: [a, b, c, d]\n", ["--id", "0"], "an address in addresses.yaml is 'a': give HOST:PORT"),
        ("- 127.0.0.1:9001\n", ["--id", "0"], "must hold a mapping with peers, a list of HOST:PORT"),
        ("server: 127.0.0.1:9001\n", ["--id", "0"], "addresses.yaml"),
        (FOUR, ["--id", "0", "--kit", "nothing"], "holds no start-up kit"),
        (FOUR, ["--id", "0", "--listen", "9001"], "engine.address = 9001"),
        (FOUR, ["--id", "0", "rounds=0"], "rounds = 0"),
    ],
)
def test_refused(file: Path, text: str, options: list[str], sentence: str) -> None:
    out = file.parent / "run"
    done = invoke("peer", file, *options, "--peers", addresses(file.parent, text), "--out", out, "--quiet")
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.stderr.split())
    assert done.stderr.count("\n") == 1
    assert not (out / "config.yaml").exists()


def test_a_file_that_is_missing(file: Path) -> None:
    done = invoke(
        "peer", file, "--id", 0, "--peers", file.parent / "nothing.yaml", "--quiet", "--out", file.parent / "r"
    )
    assert done.exit_code == 2, done.output
    assert "nothing.yaml" in done.stderr


def test_a_port_that_is_in_use(file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        book = addresses(file.parent, FOUR)
        done = invoke(
            "peer", file, "--id", 0, "--listen", listen, "--peers", book, "--quiet", "--out", file.parent / "r"
        )
    assert done.exit_code == 2, done.output
    assert f"cannot listen on {listen}: choose a port that is free" in done.stderr


def test_a_federation_has_no_peers(file: Path) -> None:
    config = decentralized() | {"peers": None, "clients": {"num": 4, "per_round": 2}, "algorithm": "fedavg"}
    file.write_text(yaml.safe_dump(config))
    book = addresses(file.parent, FOUR)
    done = invoke("peer", file, "--id", 0, "--peers", book, "--quiet", "--out", file.parent / "r")
    assert done.exit_code == 2, done.output
    assert "the run has clients and a server, and no peers" in done.stderr
