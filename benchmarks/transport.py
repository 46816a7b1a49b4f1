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
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import Gate, Report, machine, measure, timed
from quiet import read
from transport_sides import SIDES, make_kits

BULK = ("tcp", "tcp-sha256", "grpcio", "gossamer", "gossamer-mtls")
SMALL = ("grpcio-unary", "grpcio-stream", "gossamer-receipt", "gossamer-job")
GOALS = {"gossamer": 0.7, "gossamer-mtls": 0.5}  # of the TCP socket's speed, at least
CHUNKS = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
IDLE_SECONDS = 10.0


def processor_seconds() -> float:
    """Return what this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- one contender: a client that starts its server


def run_contender(options: argparse.Namespace) -> None:
    """Start the server, time the client, and print JSON."""
    serve, dial = SIDES[options.contender.partition("-")[0]]
    options.digest = options.contender == "tcp-sha256"
    if options.serve:
        serve(options)
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
    """Return speeds by contender, and their ratios to the TCP socket, without and with digests, and to bare grpcio."""
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
        for bound in ("tcp", "tcp-sha256", "grpcio"):
            for way in ("up", "down"):
                key = f"{way}_megabytes_per_second"
                one[f"{way} / {bound}"] = one[key] / found[bound][key] if bound in found else None
    return found


def shared(options: argparse.Namespace) -> list[str]:
    """Return the options of all who transfer in bulk."""
    return ["--bytes", str(options.bytes), "--times", str(options.times)]


def bulk(options: argparse.Namespace, gate: Gate, folder: str) -> Report:
    """Measure the transfer of parameters; `folder` has the kits."""
    kits = {"gossamer-mtls": ["--kit", folder]}
    commands = {name: command(name, *shared(options), *kits.get(name, [])) for name in BULK}
    found = bulk_report(interleaved(commands, options, gate), options.bytes)
    goals = {
        f"{name}, {way}": {"value": found[name][f"{way} / tcp"], "at_least": least}
        for name, least in GOALS.items()
        for way in ("up", "down")
    }
    return {"bulk": found, "goals": goals}


def chunks(options: argparse.Namespace, gate: Gate, folder: str) -> Report:
    """Measure the transfer of parameters by size of chunk."""
    commands = {
        f"gossamer-{size}": command("gossamer", *shared(options), "--chunk-bytes", str(size)) for size in CHUNKS
    }
    return {"chunks": bulk_report(interleaved(commands, options, gate), options.bytes)}


def small(options: argparse.Namespace, gate: Gate) -> Report:
    """Measure round trips of small messages."""
    trips = ["--times", str(options.round_trips), "--bytes", "4", "--small-bytes", str(options.small_bytes)]
    commands = {name: command(name, *trips, "--warmup", "200") for name in SMALL}
    trials = interleaved(commands, options, gate)
    found = {
        name: {
            "round_trips_per_second": statistics.median(1 / one["seconds"][name] for one in of_one.results),
            **of_one.report(),
        }
        for name, of_one in trials.items()
    }
    return {"small": found}


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
    gate, before = Gate.of(options), machine()
    result: Report = {"benchmark": "transport", "machine": before, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        make_kits(Path(folder))
        for part in (bulk, chunks):
            if part.__name__ in options.parts:
                result |= part(options, gate, folder)
    if "small" in options.parts:
        result |= small(options, gate)
    if "idle" in options.parts:
        result["idle"] = idle(options.idle)
    print(json.dumps({**result, **gate.report()}, indent=1))


def interleaved(commands: dict[str, list[str]], options: argparse.Namespace, gate: Gate) -> Any:
    """Run contenders in turn; a trial is judged by its timed part."""
    measures = {name: lambda one=one: measure(one) for name, one in commands.items()}
    return gate.interleave(measures, options.repeats, timed, lambda one: json.dumps(one["seconds"]))


if __name__ == "__main__":
    main()
