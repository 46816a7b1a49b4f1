"""What the transport costs: bulk data against a raw TCP socket, small messages against bare grpcio, idle clients.

``bulk``: parameters up (client to server) and down over loopback, each into memory that is there: a TCP socket; a TCP
socket with the SHA-256 of all data at both ends; a stream of bare grpcio whose chunks are copied to where they belong;
gossamer, plain and with mutual TLS. ``small``: round trips of messages without arrays: a bare unary call and a bare
stream of grpcio; a message of a client with its receipt, and a job with its answer, of gossamer. ``idle``: memory and
processor time of a server whose clients are connected and silent. ``chunks``: ``bulk`` of gossamer by size of chunk.

Contenders run in turn, each a client and a server in processes of their own. Goals are ratios to the TCP socket.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from harness import Gate, Report, machine, measure, timed
from quiet import read

BULK = ("tcp", "tcp-sha256", "grpcio", "gossamer", "gossamer-mtls")
SMALL = ("grpcio-unary", "grpcio-stream", "gossamer-receipt", "gossamer-job")
GOALS = {"gossamer": 0.7, "gossamer-mtls": 0.5}  # of the TCP socket's speed, at least
CHUNKS = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
BLOCK_BYTES = 1 << 20  # of a TCP socket's reads and writes, and of bare grpcio's messages
IDLE_SECONDS = 10.0
DIGEST_BYTES = 32
Step = Callable[[], object]


class Side(Protocol):
    """A contender's server or client."""

    def __call__(self, options: argparse.Namespace) -> Any:
        """Run it."""


def processor_seconds() -> float:
    """Return what this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


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
        connection.sendall(b"u")
        tcp_send(connection, row, options.digest)
        assert connection.recv(1) == b"!"

    def down() -> None:
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

    import threading

    asked = threading.Semaphore(0)
    answers: Any = None

    def stream() -> None:
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
    import threading

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
    import itertools

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
        assert client.send(Message(kind, Address("run", next(numbers), 0, 0), small, arrays))

    def ask(kind: str) -> None:
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


# ---- one contender: a client that starts its server


SIDES: dict[str, tuple[Side, Side]] = {
    "tcp": (tcp_server, tcp_client),
    "grpcio": (grpcio_server, grpcio_client),
    "gossamer": (gossamer_server, gossamer_client),
}


def ready(address: str) -> None:
    """Tell the client where to dial."""
    print(address, flush=True)


def run_contender(options: argparse.Namespace) -> None:
    """Start the server, time the client, and print JSON."""
    serve, dial = SIDES[options.contender.partition("-")[0]]
    options.digest = options.contender == "tcp-sha256"
    if options.serve:
        serve(options)
        report = {"processor_seconds": processor_seconds()}
        print(json.dumps(report), flush=True)
        return
    began = read()
    with subprocess.Popen(
        [sys.executable, *sys.argv, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        options.address = process.stdout.readline().strip()
        steps = dial(options)
        names = [options.contender] if options.contender in SMALL else ["up", "down"]
        chosen = {name: steps[name] for name in names}
        times: dict[str, list[float]] = {name: [] for name in chosen}
        for step in chosen.values():
            for _ in range(options.warmup):
                step()
        warm, used = read(), processor_seconds()
        for _ in range(options.times):
            for name, step in chosen.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        used, end = processor_seconds() - used, read()
        print(
            json.dumps(
                {
                    "contender": options.contender,
                    "seconds": {name: statistics.median(found) for name, found in times.items()},
                    "processor_seconds_of_the_client": used / options.times,
                    "readings": [began, warm, end],
                    "versions": {name: version(name) for name in ("grpcio", "protobuf", "torch")},
                }
            ),
            flush=True,
        )
        os._exit(0)  # the server ends with its standard input, or its connection


def command(contender: str, *more: str) -> list[str]:
    """Return the command of a contender."""
    return [sys.executable, __file__, "--contender", contender, *more]


# ---- idle clients


def resident_bytes(process: int) -> int:
    """Return the memory that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def used_seconds(process: int) -> float:
    """Return the processor time of another process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle(number: int) -> Report:
    """Connect silent clients to a server; returns what it holds and uses."""
    from gossamer.transport import Client, Limits

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    serving = [*command("gossamer", "--serve", "--bytes", "4", "--idle", str(number))]
    with subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address, before = process.stdout.readline().strip(), resident_bytes(process.pid)
        began, limits = time.monotonic(), Limits(nodes=number)
        clients = [Client(address, name=f"node-{i}", limits=limits, timeout_seconds=60) for i in range(number)]
        joined = time.monotonic() - began
        time.sleep(2)
        start, used = time.monotonic(), used_seconds(process.pid)
        time.sleep(IDLE_SECONDS)
        share = (used_seconds(process.pid) - used) / (time.monotonic() - start)
        connected = sum(client.connected for client in clients)
        held = resident_bytes(process.pid)
        for client in clients:
            client.close()
        process.stdin.close()
    return {
        "clients": number,
        "connected": connected,
        "seconds_to_join": joined,
        "server_bytes_before": before,
        "server_bytes": held,
        "bytes_a_client": (held - before) / number,
        "share_of_a_core": share,
    }


# ---- all of them


def bulk_report(trials: Any, num_bytes: int) -> dict[str, Report]:
    """Return speeds by contender, and their ratios to the TCP socket."""
    found: dict[str, Report] = {}
    for name, of_one in trials.items():
        speeds = {
            way: statistics.median(num_bytes / 1e6 / one["seconds"][way] for one in of_one.results)
            for way in ("up", "down")
        }
        used = statistics.median(one["processor_seconds_of_the_client"] for one in of_one.results)
        found[name] = {**{f"{way}_megabytes_per_second": speed for way, speed in speeds.items()}, **of_one.report()}
        found[name]["processor_seconds_of_the_client"] = used
    for one in found.values():
        for way in ("up", "down"):
            key = f"{way}_megabytes_per_second"
            one[f"{way} / tcp"] = one[key] / found["tcp"][key] if "tcp" in found else None
    return found


def main() -> None:
    """Run all parts, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["bulk", "small", "idle", "chunks"])
    parser.add_argument("--bytes", type=int, default=100_000_000, help="of the parameters")
    parser.add_argument("--small-bytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--times", type=int, default=10, help="transfers of a process")
    parser.add_argument("--round-trips", type=int, default=3000, help="of a process")
    parser.add_argument("--idle", type=int, default=1000, help="clients")
    parser.add_argument("--chunk-bytes", type=int, default=1 << 20)
    parser.add_argument("--warmup", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--kit", default="", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    Gate.add_options(parser)
    options = parser.parse_args()
    if options.contender:
        run_contender(options)
        return
    import tempfile

    gate, before = Gate.of(options), machine()
    result: Report = {"benchmark": "transport", "machine": before, "python": platform.python_version()}
    shared = ["--bytes", str(options.bytes), "--times", str(options.times)]
    with tempfile.TemporaryDirectory() as folder:
        make_kits(Path(folder))
        if "bulk" in options.parts:
            kits = {"gossamer-mtls": ["--kit", folder]}
            commands = {name: command(name, *shared, *kits.get(name, [])) for name in BULK}
            found = bulk_report(interleaved(commands, options, gate), options.bytes)
            result["bulk"] = found
            result["goals"] = {
                f"{name}, {way}": {"value": found[name][f"{way} / tcp"], "at_least": least}
                for name, least in GOALS.items()
                for way in ("up", "down")
            }
        if "chunks" in options.parts:
            commands = {f"gossamer-{size}": command("gossamer", *shared, "--chunk-bytes", str(size)) for size in CHUNKS}
            result["chunks"] = bulk_report(interleaved(commands, options, gate), options.bytes)
    if "small" in options.parts:
        trips = ["--times", str(options.round_trips), "--bytes", "4", "--small-bytes", str(options.small_bytes)]
        commands = {name: command(name, *trips, "--warmup", "200") for name in SMALL}
        trials = interleaved(commands, options, gate)
        result["small"] = {
            name: {
                "round_trips_per_second": statistics.median(1 / one["seconds"][name] for one in of_one.results),
                **of_one.report(),
            }
            for name, of_one in trials.items()
        }
    if "idle" in options.parts:
        result["idle"] = idle(options.idle)
    print(json.dumps({**result, **gate.report()}, indent=1))


def interleaved(commands: dict[str, list[str]], options: argparse.Namespace, gate: Gate) -> Any:
    """Run contenders in turn; a trial is judged by its timed part."""
    measures = {name: lambda one=one: measure(one) for name, one in commands.items()}
    return gate.interleave(measures, options.repeats, timed, lambda one: json.dumps(one["seconds"]))


if __name__ == "__main__":
    main()
