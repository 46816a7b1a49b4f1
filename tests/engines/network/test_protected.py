"""Federations over mutual TLS, and clients that refuse what a curious server asks for."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gossamer
from federation import assert_same, configure
from gossamer import experiment
from gossamer.cli.following import to_stderr
from gossamer.cli.main import app
from gossamer.cli.node import _task_maker
from gossamer.engines.network.client import ClientNode
from gossamer.errors import ConfigError, PolicyError
from gossamer.experiment import Hooks
from gossamer.storage.jsonl import read
from gossamer.task import task_of
from gossamer.transport import Client
from gossamer.transport.audit import AuditLog
from gossamer.transport.authentication import load_kit
from gossamer.transport.policy import Policy
from gossamer.transport.provisioning import provision
from nodes import free_port, unpickling


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the kits of a server and two clients."""
    root = tmp_path_factory.mktemp("federation")
    (root / "FEDERATION.yaml").write_text("name: f\nserver: {hosts: [127.0.0.1]}\nnodes: [a, b]\n")
    provision(root / "FEDERATION.yaml", root / "made")
    return root / "made" / "kits"


def test_the_bits_over_tls_the_audit_and_no_secret(kits: Path, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    address, config = f"127.0.0.1:{free_port()}", configure({})
    engine = {**config["engine"], "name": "network", "address": address, "kit": str(kits / "server")}
    logs = {name: AuditLog(tmp_path / f"{name}.jsonl") for name in "ab"}

    def node(name: str, clients: list[int]) -> ClientNode:
        """Return a node with its kit, for some clients."""
        kit = load_kit(kits / name)

        def dial(hello: Mapping[str, Any], seconds: float) -> Client:
            """Join the server with the credentials of the kit."""
            credentials, log = kit.credentials(), logs[name].record
            return Client(address, name=name, hello=hello, credentials=credentials, audit=log, timeout_seconds=seconds)

        return ClientNode(
            dial=dial,
            clients=clients,
            make_task=_task_maker(clients[0], None, Policy()),
            directory=tmp_path / name,
            patience_seconds=60.0,
            linger_seconds=0.0,
            is_simulated=True,
            policy=Policy(max_epochs=5),
            tell=to_stderr,
            audit=logs[name].record,
        )

    threads = [
        threading.Thread(target=node(name, list(range(n, 8, 2))).run, daemon=True) for n, name in enumerate("ab")
    ]
    caplog.set_level(logging.DEBUG)
    with unpickling() as unpickled:  # at the server and at both nodes, which are threads of this process
        for thread in threads:
            thread.start()
        run = experiment.run({**config, "engine": engine}, out=tmp_path / "network", hooks=Hooks(tell=to_stderr))
        for thread in threads:
            thread.join(30)
        assert unpickled == []
        pickle.loads(pickle.dumps(ConfigError("x")))
        assert len(unpickled) == 1, "the hook works"
    assert_same(run, gossamer.run(config, out=tmp_path / "local"))
    records = read(tmp_path / "network" / "audit.jsonl")
    assert {one["node"] for one in records} == {"a", "b"}
    assert {"joined", "sent", "received"} <= {one["kind"] for one in records}
    updates = {one["sha256"] for one in records if one.get("message") in ("update", "counts")}
    sent = [one for name in "ab" for one in read(tmp_path / f"{name}.jsonl") if one["kind"] == "sent"]
    assert updates == {one["sha256"] for one in sent} != set()
    secrets = [
        line
        for path in kits.parent.rglob("*")
        if path.name in ("token", "node.key", "ca.key")
        for line in path.read_text().split("\n")[:2]
        if len(line) > 40
    ]
    assert len(secrets) == 7
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if any(secret.encode() in path.read_bytes() for secret in secrets)] == []
    shown = "".join(capfd.readouterr()) + caplog.text
    assert "joined as client" in shown
    assert not any(secret in shown for secret in secrets)


class TestCurious:
    """What `gossamer node client` does with a configuration, without a server."""

    @pytest.fixture
    def config(self) -> dict[str, Any]:
        """Return a resolved configuration."""
        from gossamer.config import loading
        from gossamer.config.resolve import resolve

        return resolve(loading.parse(configure({}))).config.model_dump(mode="json")

    def test_a_good_one_is_accepted(self, config: dict[str, Any]) -> None:
        assert _task_maker(0, None, Policy())(config).seed == config["seed"]

    @pytest.mark.parametrize("key", ["model", "dataset"])
    def test_code_is_refused_before_it_is_imported(
        self, config: dict[str, Any], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        marker = tmp_path / "marker"
        (tmp_path / f"evil_{key}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Thing: ...\n")
        monkeypatch.syspath_prepend(tmp_path)
        config["workload"][key] = {"name": f"evil_{key}:Thing"}
        with pytest.raises(PolicyError, match=rf"workload.{key} = 'evil_{key}:Thing'"):
            _task_maker(0, None, Policy())(config)
        assert not marker.exists()
        with pytest.raises(ConfigError):
            task_of(config)  # as anybody who has no policy would
        assert marker.exists()

    def test_own_data_may_be_code_of_ones_own(
        self, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "from gossamer.workloads.datasets import synthetic\n\n\n"
        text += "def data(options): return synthetic({'num_train': 30})\n"
        (tmp_path / "data_of_a_client.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        config["workload"]["dataset"] = {"name": "table", "path": "/etc/passwd"}
        task = _task_maker(2, "data_of_a_client:data", Policy())(config)
        assert task.workload.num_samples[2] == 30

    @pytest.mark.parametrize("run", ["../../up", "/etc", "", 7, "x" * 64])
    def test_a_run_names_no_folder(self, config: dict[str, Any], run: Any, tmp_path: Path) -> None:
        class Asking:
            """A connection that only has a welcome."""

            welcome = {"run": run, "config": config}

            def close(self) -> None: ...

        node = ClientNode(
            dial=lambda hello, seconds: Asking(),
            clients=[0],
            make_task=task_of,
            directory=tmp_path / "in",  # type: ignore[arg-type,return-value]
        )
        with pytest.raises(PolicyError, match="must not name a folder here"):
            node.run()
        assert list(tmp_path.iterdir()) == []


class TestSentences:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--simulate", "0"], r"no server is named: give --server HOST:PORT"),
            (["--simulate", "0", "--server", "10.0.0.5:1", "--patience", "1"], r"without mutual TLS and a token"),
            (["--simulate", "0", "--server", "127.0.0.1:1", "--trust", "--policy", "p.yaml"], r"give one of them"),
            (["--simulate", "0", "--server", "127.0.0.1:1", "--policy", "p.yaml"], r"cannot read policy 'p.yaml'"),
            (["--simulate", "0", "--kit", "nowhere"], r"'nowhere' holds no start-up kit"),
            (["--simulate", "0", "--kit", "KITS/a", "--name", "b"], r"--name b is not the name of the kit, 'a'"),
        ],
    )
    def test_of_clients(
        self, arguments: list[str], sentence: str, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(
            app, ["node", "client", *(one.replace("KITS", str(kits)) for one in arguments)], catch_exceptions=False
        )
        assert done.exit_code == 2
        assert re.search(sentence, done.stderr), done.stderr

    def test_of_servers(self, kits: Path, tmp_path: Path) -> None:
        config = configure({})
        for engine, sentence in (
            ({"address": "0.0.0.0:0"}, r"without mutual TLS and a token"),
            ({"address": "0.0.0.0:0", "kit": str(tmp_path)}, r"holds no start-up kit"),
        ):
            with pytest.raises(ConfigError, match=sentence):
                gossamer.run(
                    {**config, "engine": {**config["engine"], "name": "network", **engine}}, out=tmp_path / "run"
                )
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
