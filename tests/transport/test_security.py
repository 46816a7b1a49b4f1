"""Mutual TLS and tokens: who gets in, and that nobody else's message is read."""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from certificates import Authority
from gossamer.errors import ConfigError, Disconnected, GossamerError, Refused
from gossamer.transport import (
    Address,
    Caller,
    Client,
    Credentials,
    Joined,
    Limits,
    Message,
    Received,
    Server,
    arrays,
    reading,
    service,
    verify_tokens,
)
from gossamer.transport.calls import SERVICE
from gossamer.transport.connection import Connection
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import Counts

TIMEOUT = 60.0
TOKENS = {"a": "token-of-a", "b": "token-of-b"}
MESSAGE = Message("update", Address("run", 0, 0, 0), {}, {"x": torch.ones(100_000)})
LONG = Message("update", Address("run", 0, 0, 0), {}, {"x": torch.ones(600_000)})


@pytest.fixture(scope="module")
def authority() -> Authority:
    """Return a new authority."""
    return Authority.new()


def server_credentials(authority: Authority, **changes: Any) -> Credentials:
    """Return credentials of a server that knows the tokens of its clients."""
    certificate, key = authority.issue("server")
    verify = verify_tokens({name: hashlib.sha256(token.encode()).hexdigest() for name, token in TOKENS.items()})
    return Credentials(certificate, key, authority.pem, **{"verify": verify, **changes})


def client_credentials(
    authority: Authority, name: str = "a", days: float = 1, token: str = "token-of-a"
) -> Credentials:
    """Return credentials of a client."""
    certificate, key = authority.issue(name, days)
    return Credentials(certificate, key, authority.pem, token)


@pytest.fixture
def told() -> list[tuple[str, dict[str, Any]]]:
    """Return a list for what is audited."""
    return []


@pytest.fixture
def server(authority: Authority, told: list[tuple[str, dict[str, Any]]]) -> Iterator[Server]:
    """Return a server with credentials, which notes what it audits."""
    with Server(
        "0.0.0.0:0", credentials=server_credentials(authority), audit=lambda kind, **fields: told.append((kind, fields))
    ) as found:
        yield found


def join(
    server: Server,
    credentials: Credentials | None,
    name: str = "a",
    server_name: str = "server",
    seconds: float = TIMEOUT,
) -> Client:
    """Return a client of a server; who is not told why tries again for so many `seconds`."""
    address = f"127.0.0.1:{server.address.rpartition(':')[2]}"
    return Client(address, name=name, credentials=credentials, server_name=server_name, timeout_seconds=seconds)


def test_messages_go_both_ways(server: Server, authority: Authority) -> None:
    with join(server, client_credentials(authority)) as client:
        found = server.receive(TIMEOUT)
        assert isinstance(found, Joined)
        assert "a" in found.hello.identities
        assert client.send(MESSAGE)
        assert isinstance(server.receive(TIMEOUT), Received)
        server.send("a", MESSAGE).result(TIMEOUT)
        received = client.receive(TIMEOUT)
        assert received is not None
        assert torch.equal(received.message.arrays["x"], MESSAGE.arrays["x"])


def test_others_are_refused(server: Server, authority: Authority, told: list[tuple[str, dict[str, Any]]]) -> None:
    other = Authority.new()
    mixed = client_credentials(other)
    refused: list[tuple[Credentials | None, str, type[GossamerError], str]] = [
        (client_credentials(authority, token="token-of-b"), "a", Refused, "its token is another one"),
        (client_credentials(authority, token=""), "a", Refused, "its token is another one"),
        (client_credentials(authority, "c"), "c", Refused, "node 'c' is unknown here"),
        (client_credentials(authority, "b", token="token-of-a"), "a", Refused, "shows a certificate of another name"),
        (client_credentials(authority, days=-1), "a", Disconnected, "could not join"),
        (Credentials(mixed.certificate, mixed.key, authority.pem, "token-of-a"), "a", Disconnected, "could not join"),
        (client_credentials(other), "a", Disconnected, "its certificate does not fit"),
        (None, "a", Disconnected, "could not join"),
    ]
    for credentials, name, kind, sentence in refused:
        with pytest.raises(kind, match=sentence):
            join(server, credentials, name, seconds=0.4 if sentence == "could not join" else TIMEOUT)
    assert server.nodes() == {}
    assert server.receive(0.0) is None
    assert {kind for kind, _ in told} == {"refused"}
    assert not any(token in str(told) for token in TOKENS.values())


def test_nothing_of_those_who_are_refused_is_decoded(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no right to call sends a whole update, and none of it goes through a decoder."""
    decoded = Counter[str]()

    def count(module: Any, name: str) -> None:
        """Replace a function by one that counts its calls."""
        original = vars(module)[name]

        def counted(*arguments: Any) -> Any:
            """Count the call."""
            decoded[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, counted)

    for module, name in ((reading, "split"), (reading, "Incoming"), (service, "decode_json"), (arrays, "allocate")):
        count(module, name)

    def verify(caller: Caller) -> None:
        """Refuse callers that are revoked."""
        if caller.name == "revoked":
            raise Refused("the certificate of node 'revoked' is revoked")
        tokens(caller)

    tokens = server_credentials(authority).verify
    assert tokens is not None
    limits, counts = Limits(), Counts()
    refused: dict[str, tuple[Credentials | None, type[GossamerError]]] = {
        "no TLS": (None, Disconnected),
        "no token": (client_credentials(authority, token=""), Refused),
        "another token": (client_credentials(authority, token="token-of-b"), Refused),
        "another authority": (client_credentials(Authority.new()), Disconnected),
        "expired": (client_credentials(authority, days=-1), Disconnected),
        "another's certificate": (client_credentials(authority, "b"), Refused),
        "revoked": (client_credentials(authority, "revoked"), Refused),
    }
    with Server("127.0.0.1:0", credentials=server_credentials(authority, verify=verify)) as server:
        for case, (credentials, kind) in refused.items():
            name = "revoked" if case == "revoked" else "a"
            connection = Connection(server.address, name, credentials, "server", limits, counts)
            for message in (MESSAGE, LONG):  # of one frame, and of several
                with pytest.raises(kind):
                    connection.deliver(Outgoing(message, limits), TIMEOUT)
            connection.close(Disconnected("it is over"))
            with pytest.raises(kind):
                join(server, credentials, name, seconds=0.4 if kind is Disconnected else TIMEOUT)
        assert decoded == Counter()
        assert server.receive(0.0) is None
        with join(server, client_credentials(authority)) as client:
            for message in (MESSAGE, replace(LONG, address=Address("run", 1, 0, 0))):
                assert client.send(message)
        assert min(decoded[name] for name in ("split", "Incoming", "decode_json", "allocate")) > 0, "all are counted"


def test_a_server_of_another_name_is_none(server: Server, authority: Authority) -> None:
    with pytest.raises(Disconnected, match="its certificate does not fit"):
        join(server, client_credentials(authority), server_name="peer-3")


def test_who_is_revoked_is_out_at_the_next_message(authority: Authority) -> None:
    revoked: set[str] = set()

    def verify(caller: Caller) -> None:
        """Refuse callers that are revoked."""
        if caller.name in revoked:
            raise Refused(f"the certificate of node {caller.name!r} is revoked")

    with (
        Server("127.0.0.1:0", credentials=server_credentials(authority, verify=verify)) as server,
        join(server, client_credentials(authority)) as client,
    ):
        assert client.send(MESSAGE)
        revoked.add("a")
        future = server.send("a", MESSAGE)
        with pytest.raises(Refused, match="is revoked"):
            client.receive(TIMEOUT)
        with pytest.raises(Disconnected):
            future.result(TIMEOUT)
        with pytest.raises(Refused, match="is revoked"):
            client.reconnect(TIMEOUT)


def test_a_server_without_tokens_is_refused(authority: Authority) -> None:
    with pytest.raises(ConfigError, match=r"needs Credentials\.verify"):
        Server("127.0.0.1:0", credentials=server_credentials(authority, verify=None))


def test_secrets_are_shown_nowhere(authority: Authority) -> None:
    credentials = client_credentials(authority)
    assert "token-of-a" not in repr(credentials)
    assert "KEY" not in repr(credentials)
    assert "secret" not in repr(Caller("a", "secret", b"", (), ""))
    with pytest.raises(Disconnected) as caught:
        Client("127.0.0.1:1", name="a", credentials=credentials, timeout_seconds=0.1)
    assert "token-of-a" not in "".join(traceback.format_exception(caught.value))


class TestCalls:
    """What a stranger's own program may call."""

    @pytest.fixture
    def channel(self) -> Iterator[grpc.Channel]:
        """Return a bare channel to a server."""
        with (
            Server("127.0.0.1:0", limits=Limits(call_seconds=60)) as server,
            grpc.insecure_channel(server.address) as found,
        ):
            yield found

    def fails(
        self, channel: grpc.Channel, method: str, metadata: Any = (("gossamer-node", "a"),), timeout: Any = TIMEOUT
    ) -> Any:
        """Return the status code with which a call fails."""
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=timeout, metadata=metadata)
        return caught.value.code()  # type: ignore[attr-defined]

    def test_unknown_ones_fail(self, channel: grpc.Channel) -> None:
        for method in (f"/{SERVICE}/Stop", "/x/Join", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
            assert self.fails(channel, method) is grpc.StatusCode.UNIMPLEMENTED

    def test_need_a_deadline(self, channel: grpc.Channel) -> None:
        assert self.fails(channel, f"/{SERVICE}/Deliver", timeout=None) is grpc.StatusCode.INVALID_ARGUMENT
        assert self.fails(channel, f"/{SERVICE}/Deliver", timeout=3600) is grpc.StatusCode.INVALID_ARGUMENT

    def test_need_a_session(self, channel: grpc.Channel) -> None:
        assert self.fails(channel, f"/{SERVICE}/Deliver") is grpc.StatusCode.FAILED_PRECONDITION

    def test_need_a_name(self, channel: grpc.Channel) -> None:
        assert self.fails(channel, f"/{SERVICE}/Deliver", metadata=()) is grpc.StatusCode.PERMISSION_DENIED

    def test_of_another_version_are_told(self, channel: grpc.Channel) -> None:
        call = channel.unary_stream(f"/{SERVICE}/Join")(
            b"\x08\x63", timeout=TIMEOUT, metadata=(("gossamer-node", "a"),)
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert "version 99" in caught.value.details()  # type: ignore[attr-defined]

    def test_health(self, channel: grpc.Channel) -> None:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
