"""A provisioned federation over real connections: who gets in, what is logged, and that nothing is unpickled."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.errors import AuthenticationError, Disconnected, GossamerError, Refused
from gossamer.storage.jsonl import read
from gossamer.transport import Address, Client, Joined, Message, Received, Server
from gossamer.transport.audit import AuditLog
from gossamer.transport.authentication import Kit, load_kit
from gossamer.transport.provisioning import provision

TIMEOUT = 60.0
MESSAGE = Message("update", Address("run", 0, 0, 0), {"loss": 0.5}, {"x": torch.ones(10_000)})


@pytest.fixture
def server(directory: Path) -> Iterator[Server]:
    """Return a server with its kit."""
    log = AuditLog(directory / "audit.jsonl")
    kit = load_kit(directory / "kits" / "server")
    with Server("0.0.0.0:0", credentials=kit.credentials(), audit=log.record) as found:
        yield found
    log.close()


def join(server: Server, kit: Kit, name: str = "", seconds: float = TIMEOUT) -> Client:
    """Return a client of a server; who is not told why tries again for so many `seconds`."""
    address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
    return Client(address, name=name or kit.node, credentials=kit.credentials(), timeout_seconds=seconds)


def exchange(server: Server, client: Client) -> Message:
    """Send a message up and down, and return what came back."""
    assert isinstance(server.receive(TIMEOUT), Joined)
    assert client.send(MESSAGE)
    found = server.receive(TIMEOUT)
    assert isinstance(found, Received)
    server.send("ucsf", found.message).result(TIMEOUT)
    received = client.receive(TIMEOUT)
    assert received is not None
    return received.message


def test_a_member_is_let_in_and_the_log_tells(server: Server, directory: Path, capfd: Any, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    kit = load_kit(directory / "kits" / "ucsf")
    with join(server, kit) as client:
        assert torch.equal(exchange(server, client).arrays["x"], MESSAGE.arrays["x"])
    server.close()
    records = read(directory / "audit.jsonl")
    assert [one["kind"] for one in records[:3]] == ["joined", "received", "sent"]
    assert {one["node"] for one in records} == {"ucsf"}
    assert records[1]["num_bytes"] == 40_000
    assert (records[1]["message"], records[1]["round"], len(records[1]["sha256"])) == ("update", 0, 64)
    shown = "".join(capfd.readouterr()) + caplog.text + (directory / "audit.jsonl").read_text()
    shown += Path("/proc/self/cmdline").read_text() if Path("/proc/self/cmdline").exists() else ""
    secrets = [path for path in directory.parent.rglob("*") if path.name in ("token", "node.key", "ca.key")]
    assert len(secrets) == 14
    assert not any(line in shown for path in secrets for line in path.read_text().split("\n")[:2] if len(line) > 40)


def test_others_are_refused_before_anything_is_read(server: Server, directory: Path) -> None:
    ucsf, charite = (load_kit(directory / "kits" / name) for name in ("ucsf", "charite"))
    stranger = load_kit(directory.parent / "stranger" / "kits" / "ucsf")
    refused: list[tuple[Kit, str, type[GossamerError], str]] = [
        (replace(ucsf, token=""), "", Refused, "gave another token"),
        (replace(ucsf, token=charite.token), "", Refused, "gave another token"),
        (ucsf, "charite", Refused, "certificate of another name"),
        (stranger, "", Disconnected, "certificate"),
        (replace(stranger, authority=ucsf.authority, token=ucsf.token), "", Disconnected, "could not join"),
    ]
    for kit, name, kind, sentence in refused:
        with pytest.raises(kind, match=sentence):
            join(server, kit, name, seconds=0.4 if sentence == "could not join" else TIMEOUT)
    assert server.nodes() == {}
    server.close()
    assert {one["kind"] for one in read(directory / "audit.jsonl")} == {"refused"}


@pytest.mark.parametrize("change", ["revoke", "renew"])
def test_who_is_revoked_or_renewed_is_out_at_the_next_call(server: Server, directory: Path, change: str) -> None:
    old = load_kit(directory / "kits" / "ucsf")
    with join(server, old) as client:
        exchange(server, client)
        provision(directory.parent / "FEDERATION.yaml", directory, **{change: ["ucsf"]})
        with pytest.raises(GossamerError, match="was revoked or replaced"):
            client.send(replace(MESSAGE, address=Address("run", 1, 0, 0)))
    with pytest.raises(Refused, match="was revoked or replaced"):
        join(server, old)
    if change == "renew":
        join(server, load_kit(directory / "kits" / "ucsf")).close()


def test_a_client_cannot_stand_for_the_server(directory: Path) -> None:
    """Its certificate is for clients alone, whatever address it is dialled by."""
    charite, server = (load_kit(directory / "kits" / name) for name in ("charite", "server"))
    false = replace(server, certificate=charite.certificate, key=charite.key)
    with Server("127.0.0.1:0", credentials=false.credentials()) as listening:
        for name in (None, "charite", "server"):
            with pytest.raises(Disconnected, match="certificate"):
                Client(
                    listening.address,
                    name="ucsf",
                    credentials=load_kit(directory / "kits" / "ucsf").credentials(),
                    server_name=name,
                    timeout_seconds=TIMEOUT,
                )


def test_peers_find_each_other_by_name(tmp_path: Path) -> None:
    file = tmp_path / "FEDERATION.yaml"
    file.write_text("name: ring\nnodes:\n- {name: a, hosts: [a.example.org]}\n- {name: b, hosts: [b.example.org]}\n")
    provision(file, tmp_path / "ring")
    a, b = (load_kit(tmp_path / "ring" / "kits" / name) for name in "ab")
    with Server("127.0.0.1:0", credentials=a.credentials()) as server:
        Client(server.address, name="b", credentials=b.credentials(), server_name="a", timeout_seconds=TIMEOUT).close()
        with pytest.raises(Disconnected, match="certificate"):
            Client(server.address, name="b", credentials=b.credentials(), server_name="b", timeout_seconds=TIMEOUT)


UNPICKLED: list[str] = []  # what `pickle` looked up while `WATCHED` had an entry; hooks cannot be removed
WATCHED: list[bool] = []


def test_nothing_is_unpickled_while_messages_are_handled(server: Server, directory: Path) -> None:
    import pickle

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        """Note which classes are unpickled."""
        if event == "pickle.find_class" and WATCHED:
            UNPICKLED.append(str(arguments))

    sys.addaudithook(hook)
    harmful = pickle.dumps(AuthenticationError("x"))
    WATCHED.append(True)
    try:
        with join(server, load_kit(directory / "kits" / "ucsf")) as client:
            exchange(server, client)
            body = {"pickled": harmful.decode("latin-1")}
            bytes_of_pickle = {"x": torch.frombuffer(bytearray(harmful), dtype=torch.uint8)}
            assert client.send(Message("update", Address("run", 2, 0, 0), body, bytes_of_pickle))
            assert isinstance(server.receive(TIMEOUT), Received)
        assert UNPICKLED == []
        pickle.loads(harmful)
        assert len(UNPICKLED) == 1  # the hook works
    finally:
        WATCHED.clear()
