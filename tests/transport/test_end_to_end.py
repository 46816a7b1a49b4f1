"""A server and its clients over loopback, in one process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gossamer.errors import ConfigError, Disconnected, Dropped, Refused, TransportError
from gossamer.transport import (
    Address,
    Client,
    Expectations,
    Gone,
    Joined,
    Limits,
    Message,
    Received,
    Refusal,
    Server,
    Welcome,
)

TIMEOUT = 60.0
LIMITS = Limits(message_bytes=1 << 26, chunk_bytes=1 << 16, inbox_bytes=1 << 27, call_seconds=TIMEOUT)


@pytest.fixture
def server() -> Iterator[Server]:
    """Return a server."""
    with Server("127.0.0.1:0", limits=LIMITS) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """Return a client that has joined the server."""
    with Client(server.address, name="a", limits=LIMITS, timeout_seconds=TIMEOUT) as found:
        assert isinstance(server.receive(TIMEOUT), Joined)
        yield found


def address(round: int = 0, attempt: int = 0, sender: int = 0) -> Address:
    """Return an address of the run's first phase."""
    return Address("run", round, 0, sender, attempt)


def message(round: int = 0, kind: str = "update", **arrays: torch.Tensor) -> Message:
    """Return a message of a round, with arrays."""
    return Message(kind, address(round), {"loss": 0.5}, arrays)


def next_message(receiver: Server | Client) -> Message:
    """Return the next message that comes."""
    found = receiver.receive(TIMEOUT)
    assert isinstance(found, Received)
    return found.message


def same(a: Message, b: Message) -> bool:
    """Say whether two messages are equal, bit for bit."""
    equal = all(torch.equal(a.arrays[name].view(torch.uint8), b.arrays[name].view(torch.uint8)) for name in b.arrays)
    return (a.kind, a.address, a.body, set(a.arrays)) == (b.kind, b.address, b.body, set(b.arrays)) and equal


ARRAYS = {
    "row": torch.randn(1, 100_001),
    "odd": torch.arange(7, dtype=torch.int8),
    "bits": torch.tensor([[True], [False]]),
    "half": torch.randn(33_000).to(torch.bfloat16),
    "none": torch.empty(0, 5, dtype=torch.float64),
}


class TestMessages:
    @pytest.mark.parametrize("arrays", [{}, {"few": torch.randn(10)}, ARRAYS], ids=["none", "one frame", "stream"])
    @pytest.mark.parametrize("compression", ["none", "zstd"])
    def test_arrive_both_ways(self, arrays: dict[str, torch.Tensor], compression: Any) -> None:
        limits = Limits(chunk_bytes=1 << 16, compression=compression)
        with Server("127.0.0.1:0", limits=limits) as server, Client(server.address, name="a", limits=limits) as client:
            assert isinstance(server.receive(TIMEOUT), Joined)
            sent = message(**arrays)
            assert client.send(sent)
            assert same(next_message(server), sent)
            digest = server.send("a", sent).result(TIMEOUT)
            found = client.receive(TIMEOUT)
            assert found is not None
            assert same(found.message, sent)
            assert found.sha256 == digest
            assert all(array.data_ptr() % 64 == 0 for array in found.message.arrays.values() if array.numel())

    def test_scalars_keep_their_shape(self, server: Server, client: Client) -> None:
        client.send(message(x=torch.tensor(2.5)))
        assert torch.equal(next_message(server).arrays["x"], torch.tensor(2.5))

    def test_are_read_into_rows(self) -> None:
        rows, expected = torch.zeros(3, 50_000), Expectations()
        expected.expect("a", "update", address(), {"row": rows[1]})
        with (
            Server("127.0.0.1:0", limits=LIMITS, accept=expected) as server,
            Client(server.address, name="a", limits=LIMITS) as client,
        ):
            client.send(message(row=torch.ones(50_000)))
            assert isinstance(server.receive(TIMEOUT), Joined)
            assert next_message(server).arrays["row"].data_ptr() == rows[1].data_ptr()
            assert rows.sum(dim=1).tolist() == [0, 50_000, 0]
            with pytest.raises(Dropped, match="unexpected"):
                client.send(message(round=1, row=torch.ones(50_000)))
            expected.expect("a", "update", address(2), {"row": (torch.float64, (2,))})
            with pytest.raises(Dropped, match="wrong arrays"):
                client.send(message(round=2, row=torch.ones(2)))
            assert server.dropped == {"unexpected": 1, "wrong arrays": 1}

    def test_that_are_early_wait(self) -> None:
        expected = Expectations(hold_seconds=TIMEOUT)
        with (
            Server("127.0.0.1:0", limits=LIMITS, accept=expected) as server,
            Client(server.address, name="a", limits=LIMITS) as client,
        ):
            sending = threading.Thread(target=client.send, args=(message(round=5, row=torch.ones(3)),))
            sending.start()
            assert isinstance(server.receive(TIMEOUT), Joined)
            expected.expect("a", "update", address(5), {"row": (torch.float32, (3,))})
            assert next_message(server).address.round == 5
            sending.join(TIMEOUT)

    def test_are_taken_at_most_once_and_in_order(self, server: Server, client: Client) -> None:
        assert client.send(message(round=3))
        assert not client.send(message(round=3))
        assert not client.send(message(round=2))
        assert client.send(Message("update", address(3, attempt=1)))
        assert client.send(Message("update", address(0, sender=1)))
        assert client.send(Message("loss", address(0)))
        assert server.dropped == {"duplicate": 1, "stale": 1}
        assert [next_message(server).address for _ in range(4)] == [
            address(3),
            address(3, 1),
            address(0, sender=1),
            address(0),
        ]
        for number in (3, 3, 2, 4):
            server.send("a", message(number, "train")).result(TIMEOUT)
        assert [next_message(client).address.round for _ in range(2)] == [3, 4]
        assert client.dropped == {"duplicate": 1, "stale": 1}

    def test_are_counted(self, server: Server, client: Client) -> None:
        client.send(message(row=torch.ones(100_000)))
        server.send("a", message(row=torch.ones(50_000))).result(TIMEOUT)
        next_message(client)
        up, down = client.traffic().sent_bytes, client.traffic().received_bytes
        assert 400_000 < up < 401_000
        assert 200_000 < down < 201_000
        assert client.traffic().sent_messages == client.traffic().received_messages == 1

    @pytest.mark.parametrize(
        ("bad", "told"),
        [
            (Message("Update", address()), "no kind"),
            (Message("update", Address("a b", 0, 0, 0)), "no id of a run"),
            (Message("update", Address("run", -1, 0, 0)), "round -1"),
            (Message("update", Address("run", 0, 0, -2)), "sender -2"),
            (Message("update", address(), {"x": object()}), "JSON"),
            (Message("update", address(), {"x": "y" * (1 << 20)}), "more than 1048576"),
            (Message("update", address(), {}, {"x": torch.ones(4, 4).t()[:2]}), "contiguous"),
            (Message("update", address(), {}, {"x": torch.ones(2, dtype=torch.complex64)}), "complex64"),
            (Message("update", address(), {}, {"x": torch.empty(1 << 27, dtype=torch.uint8)}), "over the limits"),
        ],
    )
    def test_that_cannot_be_sent(self, client: Client, bad: Message, told: str) -> None:
        with pytest.raises(TransportError, match=told):
            client.send(bad)


class TestNodes:
    def test_join_and_are_told(self) -> None:
        with Server("127.0.0.1:0", admit=lambda hello: Welcome({"you": hello.node, **hello.body})) as server:
            with Client(server.address, name="a", hello={"samples": 3}) as client:
                assert client.welcome == {"you": "a", "samples": 3}
                assert set(server.nodes()) == {"a"}
                found = server.receive(TIMEOUT)
                assert isinstance(found, Joined)
                assert found.hello.body == {"samples": 3}
            assert isinstance(server.receive(TIMEOUT), Gone)
            assert server.nodes() == {}
            with pytest.raises(Disconnected, match="not connected"):
                server.send("a", message())

    def test_are_refused(self) -> None:
        with (
            Server("127.0.0.1:0", admit=lambda hello: Refusal("only b may join")) as server,
            pytest.raises(Refused, match="only b may join"),
        ):
            Client(server.address, name="a")

    def test_of_one_name_are_one(self, server: Server, client: Client) -> None:
        with pytest.raises(Disconnected, match="'a' is connected already"):
            Client(server.address, name="a", timeout_seconds=0.5)
        client.reconnect(TIMEOUT)
        assert isinstance(server.receive(TIMEOUT), Gone | Joined)
        assert client.send(message())

    def test_may_be_admitted_later(self) -> None:
        answers = iter([Refusal("later", retry=True), Welcome()])
        with (
            Server("127.0.0.1:0", admit=lambda hello: next(answers)) as server,
            Client(server.address, name="a", timeout_seconds=TIMEOUT) as client,
        ):
            assert client.connected

    def test_are_not_more_than_may_be(self) -> None:
        with (
            Server("127.0.0.1:0", limits=Limits(nodes=1)) as server,
            Client(server.address, name="a"),
            pytest.raises(Disconnected, match="1 nodes are connected"),
        ):
            Client(server.address, name="b", timeout_seconds=0.2)

    def test_reconnect_and_send_again(self, server: Server, client: Client) -> None:
        assert client.send(message())
        server.disconnect("a", "for a test")
        with pytest.raises(Disconnected, match="for a test"):
            client.receive(TIMEOUT)
        with pytest.raises(Disconnected):
            client.send(message(round=1))
        client.reconnect(TIMEOUT)
        assert not client.send(message())
        assert client.send(message(round=1))
        assert [type(server.receive(TIMEOUT)) for _ in range(4)] == [Received, Gone, Joined, Received]

    def test_outlive_a_server(self, server: Server, client: Client) -> None:
        server.send("a", message(round=7)).result(TIMEOUT)
        assert next_message(client).address.round == 7
        server.close("for a test")
        with pytest.raises(Disconnected, match="for a test"):
            client.receive(TIMEOUT)
        with Server(server.address, limits=LIMITS) as another:
            client.reconnect(TIMEOUT)
            another.send("a", message(round=7)).result(TIMEOUT)
            assert next_message(client).address.round == 7

    def test_have_no_more_waiting_than_may_be(self, server: Server, client: Client) -> None:
        big = {"x": torch.empty(1 << 26, dtype=torch.uint8)}

        def send_all() -> None:
            """Send a thousand large messages."""
            for number in range(1000):
                futures.append(server.send("a", Message("train", address(number), {}, big)))

        futures: list[Future[str]] = []
        with pytest.raises(TransportError, match="64 messages wait to be sent to node 'a'"):
            send_all()
        server.disconnect("a", "for a test")
        with pytest.raises(Disconnected):
            futures[-1].result(TIMEOUT)


class TestAddresses:
    @pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:9000", "example.org:1"])
    def test_beyond_loopback_are_refused(self, listen: str) -> None:
        with pytest.raises(ConfigError, match="without mutual TLS and a token is refused: make credentials with"):
            Server(listen)
        with pytest.raises(ConfigError, match="without mutual TLS and a token is refused"):
            Client(listen, name="a")

    @pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:x", ":1", "127.0.0.1:70000", ""])
    def test_that_are_none(self, listen: str) -> None:
        with pytest.raises(ConfigError, match="give HOST:PORT"):
            Server(listen)

    def test_that_are_taken(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(ConfigError, match="cannot listen"):
                Server(f"127.0.0.1:{taken.getsockname()[1]}")

    def test_where_nobody_listens(self) -> None:
        with pytest.raises(Disconnected, match="could not join the server"):
            Client("127.0.0.1:1", name="a", timeout_seconds=0.3)


def test_names_of_nodes() -> None:
    with pytest.raises(TransportError, match="no name of a node"):
        Client("127.0.0.1:1", name="a/b")


def test_audit() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    with (
        Server("127.0.0.1:0", audit=lambda kind, **fields: told.append((kind, fields))) as server,
        Client(server.address, name="a") as client,
    ):
        client.send(message(x=torch.ones(2)))
        client.send(message())
        digest = server.send("a", message()).result(TIMEOUT)
        next_message(client)
    kinds = [kind for kind, _ in told]
    assert kinds == ["joined", "received", "dropped", "sent", "left"]
    received, sent = told[1][1], told[3][1]
    assert received["node"] == "a"
    assert received["num_bytes"] == 8
    assert received["address"] == {"run": "run", "round": 0, "phase": 0, "sender": 0, "attempt": 0}
    assert sent["sha256"] == digest
