"""Connections that are cut, slow, stopped, or used for more than they may be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gossamer.errors import Disconnected, TransportError
from gossamer.transport import Address, Client, Gone, Joined, Limits, Message, Received, Server
from gossamer.transport.limits import Inbox
from hostile_messages import EXPECTED, Attacker, good
from wires import Wire

TIMEOUT = 60.0
NAMESPACE = (
    "unshare",
    "--user",
    "--map-root-user",
    "--net",
)  # a network of its own, where the system lets users have one


def message(round: int, num_bytes: int) -> Message:
    """Return an update of so many bytes."""
    return Message("update", Address("run", round, 0, 0), {}, {"x": torch.zeros(num_bytes, dtype=torch.uint8)})


def poll(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def has_namespaces() -> bool:
    """Say whether network namespaces can be made here."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return (
        subprocess.run([*NAMESPACE, "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not has_namespaces(), reason="the system gives no network namespaces to users")
def test_a_cut_cable_is_noticed() -> None:
    script = Path(__file__).with_name("cut_cable.py")
    done = subprocess.run(
        [*NAMESPACE, sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"server", "client", "sending"}


def test_a_process_that_does_not_answer_is_given_up() -> None:
    limits = Limits(keepalive_seconds=0.2, silence_seconds=0.5)
    with (
        Server("127.0.0.1:0", limits=limits) as server,
        Wire(server.address) as wire,
        Client(wire.address, name="a", limits=limits) as client,
    ):
        assert isinstance(server.receive(TIMEOUT), Joined)
        assert client.send(message(0, 10))
        assert isinstance(server.receive(TIMEOUT), Received)
        wire.cut()
        assert isinstance(server.receive(TIMEOUT), Gone)
        with pytest.raises(Disconnected):
            client.receive(TIMEOUT)
        wire.mend()
        client.reconnect(TIMEOUT)
        assert not client.send(message(0, 10))
        assert client.send(message(1, 10))


def test_a_slow_line_is_none_that_is_cut() -> None:
    """What is sent takes longer than the cut of a cable would be noticed in."""
    limits = Limits(keepalive_seconds=0.1, keepalive_timeout_seconds=0.2)
    with (
        Server("127.0.0.1:0", limits=limits) as server,
        Wire(server.address, bytes_per_second=4e6) as wire,
        Client(wire.address, name="a", limits=limits) as client,
    ):
        assert isinstance(server.receive(TIMEOUT), Joined)
        assert client.send(message(0, 4_000_000))
        assert isinstance(server.receive(TIMEOUT), Received)


class TestSlowReaders:
    """Who is not read waits, without memory being taken for what it sends."""

    SMALL = Limits(inbox_bytes=(4 << 20) + (1 << 13))
    SIZE = 3 << 20

    def test_a_server_that_reads_slowly(self) -> None:
        with Server("127.0.0.1:0", limits=self.SMALL) as server, Client(server.address, name="a") as client:
            assert isinstance(server.receive(TIMEOUT), Joined)
            assert client.send(message(0, self.SIZE))
            with pytest.raises(Disconnected, match="did not answer in time"):
                client.send(message(1, self.SIZE), timeout_seconds=0.3)
            client.reconnect(TIMEOUT)
            sending = threading.Thread(target=client.send, args=(message(1, self.SIZE),))
            sending.start()
            rounds = []
            while len(rounds) < 2:
                event = server.receive(TIMEOUT)
                assert event is not None
                if isinstance(event, Received):
                    rounds.append(event.message.address.round)
            assert rounds == [0, 1]
            sending.join(TIMEOUT)

    def test_a_client_that_reads_slowly(self) -> None:
        with Server("127.0.0.1:0") as server, Client(server.address, name="a", limits=self.SMALL) as client:
            futures = [server.send("a", message(round, self.SIZE)) for round in range(20)]
            futures[0].result(TIMEOUT)
            assert not futures[-1].done()  # 60 MiB, of which the client has room for 4, and the connection for few
            for round in range(20):
                found = client.receive(TIMEOUT)
                assert found is not None
                assert found.message.address.round == round
            assert futures[-1].result(TIMEOUT)

    def test_a_message_that_never_fits(self) -> None:
        with (
            Server("127.0.0.1:0", limits=self.SMALL) as server,
            Client(server.address, name="a") as client,
            pytest.raises(TransportError, match="too large"),
        ):
            client.send(message(0, 5 << 20))


class TestRates:
    @pytest.fixture
    def server(self) -> Iterator[Server]:
        """Return a server that takes one message a second, and one call at a time."""
        limits = Limits(messages_per_second=1, calls_per_node=1, call_seconds=30)
        with Server("127.0.0.1:0", limits=limits) as found:
            yield found

    def test_more_messages_than_may_be(self, server: Server) -> None:
        attacker = Attacker(server.address)  # counts as the first of two
        assert attacker.send(good()) == "taken"
        assert attacker.send(good()) == "failed: ABORTED"
        attacker.close()

    def test_a_client_waits(self) -> None:
        with (
            Server("127.0.0.1:0", limits=Limits(messages_per_second=20)) as server,
            Client(server.address, name="a") as client,
        ):
            assert all(client.send(message(round, 0)) for round in range(45))

    def test_inbox(self) -> None:
        inbox = Inbox(10)
        assert inbox.take(6, 0.0)
        assert not inbox.take(5, 0.0)
        assert inbox.take(4, 0.0)
        inbox.give_back(6)
        assert inbox.take(5, 0.0)
        inbox.close()
        assert not inbox.take(1, None)


def test_a_message_that_is_broken_off_leaves_nothing() -> None:
    """Neither its place in the order, nor its part of the inbox, nor its call stays taken."""
    limits = Limits(inbox_bytes=(4 << 20) + (1 << 13), calls_per_node=1, call_seconds=30)
    with Server("127.0.0.1:0", limits=limits) as server:
        attacker = Attacker(server.address)
        for number in range(1, 4):
            before = server.traffic()["attacker"].received_bytes
            call = attacker.begin(good(EXPECTED, torch.zeros(700_000))[:-1])
            poll(lambda before=before: server.traffic()["attacker"].received_bytes > before + 2_000_000)
            call.cancel()
            poll(lambda number=number: server.dropped["interrupted"] == number)
        assert attacker.send(good(EXPECTED, torch.zeros(700_000))) == "taken"
        attacker.close()


def test_more_calls_of_a_node_than_may_be() -> None:
    with Server("127.0.0.1:0", limits=Limits(calls_per_node=1, call_seconds=30)) as server:
        attacker = Attacker(server.address)
        call = attacker.begin(good()[:-1])
        poll(lambda: server.traffic()["attacker"].received_bytes > 0)
        assert attacker.send(good(EXPECTED, kind="other")) == "failed: ABORTED"
        call.cancel()
        attacker.close()


def test_a_server_may_have_a_file_for_each_node() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 1000), before[1]))
    try:
        with Server("127.0.0.1:0", limits=Limits(nodes=1000)):
            allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert allowed > 1000 or allowed == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
