"""`gossamer node provision`: what is made, kept, renewed and revoked, and how mistakes are told."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gossamer.cli.main import app
from gossamer.errors import AuthenticationError, ConfigError, GossamerWarning
from gossamer.transport import certificates
from gossamer.transport.authentication import hash_of, read_members
from gossamer.transport.provisioning import provision

FEDERATION = """
name: hospitals
server:
  hosts: [fl.example.org, 10.0.0.5]
nodes: [charite, ucsf]
"""
PEERS = "name: ring\nnodes:\n- {name: a, hosts: [a.example.org]}\n- {name: b, hosts: ['::1']}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the file of a federation."""
    path = tmp_path / "FEDERATION.yaml"
    path.write_text(FEDERATION)
    return path


def invoke(*arguments: Any) -> Any:
    """Run ``gossamer node provision`` in this process, and return its outcome."""
    return CliRunner().invoke(app, ["node", "provision", *map(str, arguments)])


def content(directory: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a folder but locks."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The first call, and in its attribute ``directory`` what it made."""
    root = tmp_path_factory.mktemp("first")
    (root / "FEDERATION.yaml").write_text(FEDERATION)
    done = invoke(root / "FEDERATION.yaml", "-o", root / "federation")
    assert done.exit_code == 0, done.output
    done.directory = root / "federation"
    return done


@pytest.fixture
def directory(first: Any, tmp_path: Path) -> Path:
    """A copy of what the first call made."""
    shutil.copytree(first.directory, tmp_path / "federation")
    return tmp_path / "federation"


class TestWhatIsMade:
    @pytest.fixture(autouse=True)
    def made(self, first: Any, directory: Path) -> Any:
        self.directory = directory
        return first

    def test_what_is_told(self, made: Any) -> None:
        *lines, last = made.stdout.splitlines()
        assert [line.split()[:3] for line in lines] == [
            ["server", "server", "new"],
            ["charite", "client", "new"],
            ["ucsf", "client", "new"],
        ]
        assert all(re.search(r"expires \d{4}-\d\d-\d\d +/", line) for line in lines)
        assert last == str(made.directory)

    def test_files(self) -> None:
        kit = {"ca.crt", "kit.json", "node.crt", "node.key", "README.md", "token"}
        assert {path.name for path in (self.directory / "kits" / "ucsf").iterdir()} == kit
        assert {path.name for path in (self.directory / "kits" / "server").iterdir()} == kit | {"members.json"}
        secrets = [path for path in self.directory.rglob("*") if path.suffix == ".key" or path.name == "token"]
        assert len(secrets) == 7
        assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
        folders = [self.directory / "authority", *(self.directory / "kits").iterdir()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}

    def test_secrets_are_nowhere_else(self, made: Any) -> None:
        files = content(self.directory)
        tokens = {name: text.strip() for name, text in files.items() if name.endswith("token")}
        assert len(set(tokens.values())) == 3
        for secret in tokens.values():
            assert len(secret) >= 43
            assert [name for name, text in files.items() if secret in text] == [
                name for name, text in tokens.items() if text == secret
            ]
            assert secret.decode() not in made.output
        assert "PRIVATE KEY" not in made.output
        assert [name for name, text in files.items() if b"PRIVATE KEY" in text] == [
            "authority/ca.key",
            "kits/charite/node.key",
            "kits/server/node.key",
            "kits/ucsf/node.key",
        ]

    def test_the_server_knows_hashes_alone(self) -> None:
        members = read_members(self.directory / "members.json")
        assert (self.directory / "kits" / "server" / "members.json").read_bytes() == (
            self.directory / "members.json"
        ).read_bytes()
        token = (self.directory / "kits" / "ucsf" / "token").read_text().strip()
        assert members.nodes["ucsf"].token_sha256 == hash_of(token)

    def test_the_command_in_the_readme(self) -> None:
        assert "gossamer node client --kit . --data DATA" in (self.directory / "kits/ucsf/README.md").read_text()
        server = (self.directory / "kits/server/README.md").read_text()
        assert "gossamer node server EXPERIMENT.yaml --kit . --listen 0.0.0.0:8443" in server
        facts = json.loads((self.directory / "kits/ucsf/kit.json").read_text())
        assert (facts["server"], facts["number"]) == ("fl.example.org:8443", 1)

    def test_again_nothing_changes(self, file: Path) -> None:
        before = content(self.directory)
        done = invoke(file, "-o", self.directory)
        assert {line.split()[2] for line in done.stdout.splitlines()[:-1]} == {"kept"}
        assert content(self.directory) == before

    def test_a_node_is_added(self, file: Path) -> None:
        before = content(self.directory)
        file.write_text(FEDERATION.replace("ucsf", "ucsf, upenn"))
        states = {one.node: one.state for one in provision(file, self.directory)}
        assert states == {"server": "kept", "charite": "kept", "ucsf": "kept", "upenn": "new"}
        after = content(self.directory)
        changed = {name for name, text in before.items() if after[name] != text}
        assert changed == {"members.json", "kits/server/members.json"}
        numbers = {name: one.number for name, one in read_members(self.directory / "members.json").nodes.items()}
        assert numbers == {"server": None, "charite": 0, "ucsf": 1, "upenn": 2}

    def test_a_kit_that_was_handed_over_is_not_made_again(self, file: Path) -> None:
        os.rename(self.directory / "kits" / "ucsf", self.directory.parent / "ucsf")
        told = {one.node: one for one in provision(file, self.directory)}
        assert (told["ucsf"].state, told["ucsf"].kit) == ("kept", None)

    def test_renewed(self, file: Path) -> None:
        before = read_members(self.directory / "members.json").nodes["ucsf"]
        old = content(self.directory / "kits" / "ucsf")
        (line,) = [one for one in provision(file, self.directory, renew=["ucsf"]) if one.node == "ucsf"]
        assert line.state == "renewed"
        new, members = content(self.directory / "kits" / "ucsf"), read_members(self.directory / "members.json")
        assert {name for name in new if new[name] != old[name]} >= {"node.crt", "node.key", "token"}
        assert members.revoked == {before.serial: "ucsf"}
        assert members.nodes["ucsf"].serial != before.serial

    def test_revoked_until_renewed(self, file: Path) -> None:
        done = invoke(file, "-o", self.directory, "--revoke", "ucsf")
        assert "ucsf                 client  revoked  kept out\n" in done.stdout
        for _ in range(2):  # the file still names it
            members = read_members(self.directory / "kits/server/members.json")
            assert members.nodes["ucsf"].is_revoked
            assert members.revoked == {members.nodes["ucsf"].serial: "ucsf"}
            assert not (self.directory / "kits" / "ucsf").exists()
            provision(file, self.directory)
        provision(file, self.directory, renew=["ucsf"])
        members = read_members(self.directory / "members.json")
        assert not members.nodes["ucsf"].is_revoked
        assert members.nodes["ucsf"].serial not in members.revoked

    def test_certificates(self) -> None:
        authority = (self.directory / "authority" / "ca.crt").read_bytes()
        for node in ("server", "charite", "ucsf"):
            pem = (self.directory / "kits" / node / "node.crt").read_bytes()
            facts = certificates.read(pem)
            assert (facts.federation, facts.node) == ("hospitals", node)
            assert facts.begins < datetime.now(UTC) < facts.expires < datetime.now(UTC) + timedelta(days=366)
            assert certificates.is_issued_by(pem, authority)
        assert not certificates.is_issued_by(authority, pem)


def test_what_certificates_allow(directory: Path) -> None:
    """By the library itself: hosts of the server, and that the key of a client cannot stand for the server."""
    from cryptography import x509

    def extensions(node: str) -> tuple[set[str], list[str]]:
        """Return the purposes and the names that a node's certificate has."""
        found = x509.load_pem_x509_certificate((directory / "kits" / node / "node.crt").read_bytes())
        purposes = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return {one._name for one in purposes}, [str(one.value) for one in names]

    assert extensions("ucsf") == ({"clientAuth"}, ["gossamer:hospitals:ucsf"])
    purposes, names = extensions("server")
    assert purposes == {"clientAuth", "serverAuth"}
    assert names[1:] == ["fl.example.org", "10.0.0.5", "localhost", "127.0.0.1", "server"]


def test_peers_without_a_server(file: Path, tmp_path: Path) -> None:
    file.write_text(PEERS)
    told = provision(file, tmp_path / "ring")
    assert [(one.node, one.kind) for one in told] == [("a", "peer"), ("b", "peer")]
    assert (tmp_path / "ring/kits/b/members.json").exists()


def test_after_a_kill_the_command_is_repeated(file: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kit that was written before the list of members could name it is made again."""
    file.write_text(FEDERATION.replace("ucsf", "ucsf, upenn"))
    from gossamer.transport import provisioning

    with monkeypatch.context() as patch:
        patch.setattr(provisioning, "write_atomically", lambda path, text: interrupt())
        with pytest.raises(KeyboardInterrupt):
            provision(file, directory)
    assert (directory / "kits/upenn/token").exists()
    assert "upenn" not in read_members(directory / "members.json").nodes
    provision(file, directory)
    token = (directory / "kits/upenn/token").read_text().strip()
    assert read_members(directory / "members.json").nodes["upenn"].token_sha256 == hash_of(token)


def interrupt() -> None:
    """Raise what Ctrl-C raises."""
    raise KeyboardInterrupt


def test_a_first_call_that_fails_leaves_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.transport import provisioning

    monkeypatch.setattr(provisioning, "write_atomically", lambda path, text: interrupt())
    with pytest.raises(KeyboardInterrupt):
        provision(file, tmp_path / "deep" / "federation")
    assert not (tmp_path / "deep").exists()


BAD = [
    ("nodes: [charite, ucsf]", "nodes: [ucsf, ucsf]", r"nodes names 'ucsf' twice: give each node a name of its own"),
    ("nodes: [charite, ucsf]", "nodes: [UCSF, ucsf]", r"nodes names 'ucsf' and 'UCSF', which are one folder"),
    ("nodes: [charite, ucsf]", "nodes: [server]", r"names 'server', which is the name of the server"),
    ("nodes: [charite, ucsf]", "nodes: [../up]", r"name = '../up': use letters, digits"),
    ("nodes: [charite, ucsf]", "nodes: ['a b']", r"use letters, digits"),
    ("nodes: [charite, ucsf]", f"nodes: [{'x' * 64}]", r"63 at most"),
    ("nodes: [charite, ucsf]", "nodes: []", r"nodes = \[\]: name at least one node"),
    ("nodes: [charite, ucsf]", "nodes: [{name: fl.example.org}]", r"also a host of node 'server'"),
    ("nodes: [charite, ucsf]", "nodes: [7]", r"nodes"),
    ("nodes: [charite, ucsf]", "node: [a]", r"unknown key 'FEDERATION.yaml.node'; did you mean 'nodes'"),
    ("hosts: [fl.example.org, 10.0.0.5]", "hosts: []", r"give at least one host"),
    ("hosts: [fl.example.org, 10.0.0.5]", "port: 1", r"missing key 'FEDERATION.yaml.server.hosts': add it"),
    ("hosts: [fl.example.org, 10.0.0.5]", "hosts: ['fl.example.org:8443']", r"without a port"),
    ("hosts: [fl.example.org, 10.0.0.5]", "hosts: [0.0.0.0]", r"'0.0.0.0' is an address to listen on"),
    (
        "server:\n  hosts: [fl.example.org, 10.0.0.5]\n",
        "",
        r"names no host of a server, and node 'charite' has no hosts",
    ),
    ("name: hospitals", "name: a/b", r"use letters, digits"),
    ("name: hospitals", "name: hospitals\ndays: 0", r"days = 0"),
    (FEDERATION, "- a\n", r"must hold a mapping"),
]


@pytest.mark.parametrize(("good", "bad", "sentence"), BAD)
def test_bad_files(file: Path, tmp_path: Path, good: str, bad: str, sentence: str) -> None:
    assert good in FEDERATION
    file.write_text(FEDERATION.replace(good, bad))
    done = invoke(file, "-o", tmp_path / "federation")
    assert done.exit_code == 2
    assert re.search(sentence, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "federation").exists()


class TestBadDirectories:
    def test_no_file(self, tmp_path: Path) -> None:
        done = invoke(tmp_path / "nothing.yaml", "-o", tmp_path / "federation")
        assert done.exit_code == 2
        assert "cannot read federation" in done.stderr

    def test_something_else(self, file: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("")
        with pytest.raises(ConfigError, match=r"holds other files, such as 'thesis.tex': choose a new directory"):
            provision(file, tmp_path / "mine")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]

    def test_another_federation(self, file: Path, directory: Path) -> None:
        before = content(directory)
        file.write_text(FEDERATION.replace("hospitals", "banks"))
        with pytest.raises(ConfigError, match=r"holds federation 'hospitals', not 'banks': choose another directory"):
            provision(file, directory)
        assert content(directory) == before

    def test_the_authority_has_expired(self, file: Path, tmp_path: Path) -> None:
        provision(file, tmp_path / "federation", now=datetime(2010, 1, 1, tzinfo=UTC))
        with pytest.raises(AuthenticationError, match=r"authority of federation 'hospitals' expired on 20\d\d-"):
            provision(file, tmp_path / "federation")

    @pytest.mark.parametrize("damage", ["", "no key\n"])
    def test_the_key_of_the_authority_is_lost(self, file: Path, directory: Path, damage: str) -> None:
        key = directory / "authority" / "ca.key"
        key.unlink()
        if damage:
            key.write_text(damage)
        with pytest.raises(ConfigError, match=r"cannot read the authority in .*: restore ca.crt and ca.key"):
            provision(file, directory)

    def test_the_key_of_another_authority(self, file: Path, directory: Path) -> None:
        key = (directory / "kits" / "ucsf" / "node.key").read_bytes()
        (directory / "authority" / "ca.key").write_bytes(key)
        with pytest.raises(ConfigError, match=r"is not the key of ca.crt: restore both"):
            provision(file, directory)

    @pytest.mark.parametrize(
        ("renew", "revoke", "sentence"),
        [
            (["ucfs"], [], r"no node 'ucfs'; did you mean 'ucsf'\?"),
            ([], ["nobody"], r"no node 'nobody' \(known: server, charite, ucsf\)"),
            (["ucsf"], ["ucsf"], r"node 'ucsf' is to be renewed and revoked"),
            ([], ["server"], r"the server cannot be revoked"),
        ],
    )
    def test_names(self, file: Path, directory: Path, renew: list[str], revoke: list[str], sentence: str) -> None:
        before = content(directory)
        with pytest.raises(ConfigError, match=sentence):
            provision(file, directory, renew, revoke)
        assert content(directory) == before


class TestWarnings:
    def test_a_node_that_the_file_no_longer_names(self, file: Path, directory: Path) -> None:
        file.write_text(FEDERATION.replace(", ucsf", ""))
        with pytest.warns(GossamerWarning, match=r"'ucsf' is no longer in the file, .* with --revoke ucsf"):
            provision(file, directory)

    def test_other_hosts(self, file: Path, directory: Path) -> None:
        file.write_text(FEDERATION.replace("fl.example.org", "new.example.org"))
        with pytest.warns(GossamerWarning, match=r"hosts of node 'server' were .* and are now .*--renew server"):
            provision(file, directory)

    def test_what_expires_soon(self, file: Path, tmp_path: Path) -> None:
        file.write_text(FEDERATION + "days: 20\n")
        with pytest.warns(GossamerWarning, match="expires on") as told:
            provision(file, tmp_path / "federation")
        assert [str(one.message) for one in told] == [
            f"the certificate of node {name!r} expires on {datetime.now(UTC) + timedelta(days=20):%Y-%m-%d}: replace it"
            f" with --renew {name}"
            for name in ("server", "charite", "ucsf")
        ]
