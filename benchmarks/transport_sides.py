"""The contenders of transport.py: a TCP socket, bare grpcio and gossamer, each a server and a client."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

BLOCK_BYTES = 1 << 20  # of a TCP socket's reads and writes, and of bare grpcio's messages
DIGEST_BYTES = 32
Step = Callable[[], object]


class Side(Protocol):
    """A contender's server or client."""

    def __call__(self, options: argparse.Namespace) -> Any:
        """Run it."""


def ready(address: str) -> None:
    """Tell the client where to dial."""
    print(address, flush=True)


# ---- a TCP socket


def tcp_server(options: argparse.Namespace) -> None:
    """Take what comes, and send as much, until the client leaves."""
    row = memoryview(bytearray(options.bytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready(f"127.0.0.1:{listener.getsockname()[1]}")
        connection, _ = listener.accept()
        with connection:
            while command := connection.recv(1):
                if command == b"u":
                    tcp_receive(connection, row, options.digest)
                    connection.sendall(b"!")
                else:
                    tcp_send(connection, row, options.digest)


def tcp_client(options: argparse.Namespace) -> dict[str, Step]:
    """Return what sends and what receives once."""
    host, _, port = options.address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    row = memoryview(bytearray(options.bytes))

    def up() -> None:
        """Send, and wait until it was taken."""
        connection.sendall(b"u")
        tcp_send(connection, row, options.digest)
        assert connection.recv(1) == b"!"

    def down() -> None:
        """Receive."""
        connection.sendall(b"d")
        tcp_receive(connection, row, options.digest)

    return {"up": up, "down": down}


def tcp_send(connection: socket.socket, row: memoryview, with_digest: bool) -> None:
    """Send all of `row`, and its digest."""
    digest = hashlib.sha256()
    for start in range(0, len(row), BLOCK_BYTES):
        block = row[start : start + BLOCK_BYTES]
        if with_digest:
            digest.update(block)
        connection.sendall(block)
    if with_digest:
        connection.sendall(digest.digest())


def tcp_receive(connection: socket.socket, row: memoryview, with_digest: bool) -> None:
    """Receive all of `row`, and compare its digest."""
    digest, start = hashlib.sha256(), 0
    while start < len(row):
        size = connection.recv_into(row[start : start + BLOCK_BYTES])
        assert size
        if with_digest:
            digest.update(row[start : start + size])
        start += size
    if with_digest:
        assert connection.recv(DIGEST_BYTES, socket.MSG_WAITALL) == digest.digest()


# ---- bare grpcio


def grpcio_server(options: argparse.Namespace) -> None:
    """Copy what comes to where it belongs, send as much, and echo what is small, until standard input ends."""
    import grpc

    row = memoryview(bytearray(options.bytes))

    def up(blocks: Iterator[bytes], context: Any) -> bytes:
        """Copy blocks into the row."""
        start = 0
        for block in blocks:
            row[start : start + len(block)] = block
            start += len(block)
        return b"!"

    handlers = {
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "Down": grpc.unary_stream_rpc_method_handler(lambda request, context: blocks_of(row)),
        "Echo": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        "Echoes": grpc.stream_stream_rpc_method_handler(lambda requests, context: requests),
    }
    server = grpc.server(ThreadPoolExecutor(8), (grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    ready(f"127.0.0.1:{port}")
    sys.stdin.readline()
    server.stop(0).wait()


def blocks_of(row: memoryview) -> Iterator[bytes]:
    """Yield copies of a row's blocks, as grpcio sends bytes only."""
    return (bytes(row[start : start + BLOCK_BYTES]) for start in range(0, len(row), BLOCK_BYTES))


def grpcio_client(options: argparse.Namespace) -> dict[str, Step]:
    """Return what sends, what receives, and what makes a round trip, once."""
    import grpc

    channel = grpc.insecure_channel(options.address)
    row, small = memoryview(bytearray(options.bytes)), bytes(options.small_bytes)
    send, receive = channel.stream_unary("/bare/Up"), channel.unary_stream("/bare/Down")
    echo = channel.unary_unary("/bare/Echo")

    def down() -> None:
        """Copy blocks that come into the row."""
        start = 0
        for block in receive(b""):
            row[start : start + len(block)] = block
            start += len(block)

    class Wanted:
        """What a stream of requests is made of, one after another."""

        def __iter__(self) -> Iterator[bytes]:
            while True:
                asked.acquire()
                yield small

    asked = threading.Semaphore(0)
    answers: Any = None

    def stream() -> None:
        """Make a round trip on a stream that stays open."""
        nonlocal answers
        if answers is None:
            answers = channel.stream_stream("/bare/Echoes")(iter(Wanted()))
        asked.release()
        next(answers)

    return {
        "up": lambda: send(blocks_of(row)),
        "down": down,
        "grpcio-unary": lambda: echo(small, timeout=60),
        "grpcio-stream": stream,
    }


# ---- gossamer


def limits_of(options: argparse.Namespace) -> Any:
    """Return the limits of either side."""
    from gossamer.transport import Limits

    return Limits(chunk_bytes=options.chunk_bytes, messages_per_second=1e9, nodes=max(1000, options.idle))


def gossamer_server(options: argparse.Namespace) -> None:
    """Read rows into one that is there, and send it where it is wanted, until standard input ends."""
    import torch

    from gossamer.transport import Message, Received, Server

    torch.set_num_threads(1)
    row = torch.zeros(options.bytes // 4)
    credentials = kit(options.kit, "server") if options.kit else None
    with Server(
        "127.0.0.1:0",
        accept=lambda header: {"x": row} if header.num_bytes else None,
        credentials=credentials,
        limits=limits_of(options),
    ) as server:
        ready(server.address)
        threading.Thread(target=lambda: (sys.stdin.readline(), server.close()), daemon=True).start()
        while (event := server.receive(None)) is not None:
            if isinstance(event, Received) and event.message.kind in ("want", "job"):
                arrays = {"x": row} if event.message.kind == "want" else {}
                server.send(event.node, Message("given", event.message.address, event.message.body, arrays))


def gossamer_client(options: argparse.Namespace) -> dict[str, Step]:
    """Return what sends, what receives, and what makes a round trip, once."""
    import torch

    from gossamer.transport import Address, Client, Message

    torch.set_num_threads(1)
    row, numbers = torch.zeros(options.bytes // 4), itertools.count()
    small = {"x": "y" * options.small_bytes}
    client = Client(
        options.address,
        name="client",
        accept=lambda header: {"x": row} if header.num_bytes else None,
        credentials=kit(options.kit, "client") if options.kit else None,
        server_name="server" if options.kit else None,
        limits=limits_of(options),
    )

    def send(kind: str, arrays: dict[str, torch.Tensor]) -> None:
        """Send, and wait for the receipt."""
        assert client.send(Message(kind, Address("run", next(numbers), 0, 0), small, arrays))

    def ask(kind: str) -> None:
        """Send, and wait for the answer."""
        send(kind, {})
        assert client.receive(60) is not None

    return {
        "up": lambda: send("row", {"x": row}),
        "down": lambda: ask("want"),
        "gossamer-receipt": lambda: send("small", {}),
        "gossamer-job": lambda: ask("job"),
    }


def make_kits(folder: Path) -> None:
    """Write certificates and keys of a server and a client."""
    from gossamer.transport import certificates

    now = datetime.now(UTC)
    authority = certificates.make_authority("benchmark", now)
    (folder / "authority").write_bytes(authority.certificate)
    for name in ("server", "client"):
        pair = certificates.issue(authority, "benchmark", name, [name, "127.0.0.1"], 1, now)
        (folder / f"{name}.certificate").write_bytes(pair.certificate)
        (folder / f"{name}.key").write_bytes(pair.key)


def kit(folder: str, name: str) -> Any:
    """Read what `make_kits` wrote."""
    from gossamer.transport import Credentials, verify_tokens

    token = "benchmark"
    verify = verify_tokens({"client": hashlib.sha256(token.encode()).hexdigest()})
    certificate, key, authority = (
        (Path(folder) / file).read_bytes() for file in (f"{name}.certificate", f"{name}.key", "authority")
    )
    return Credentials(certificate, key, authority, token, verify)


SIDES: dict[str, tuple[Side, Side]] = {
    "tcp": (tcp_server, tcp_client),
    "grpcio": (grpcio_server, grpcio_client),
    "gossamer": (gossamer_server, gossamer_client),
}
