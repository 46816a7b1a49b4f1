"""Faults of machines: a federation of five clients with mixed capacities, and one that keep private state.

Server and clients are processes that talk over loopback. Each run has one fault. Algorithm, seed, client and instant
are drawn:

- kill-client-in-training, kill-client-in-sending: SIGKILL of a client between two local steps, or two frames of its
  update; another process takes its place;
- stop-client: SIGSTOP there; then SIGCONT, soon or after the server has given the client up, or SIGKILL and another
  process;
- kill-server-in-commit, kill-server-in-round: SIGKILL after one of the steps of a commit, or before a job is sent;
- restart-server: SIGTERM, before a job is sent;
- cut-cable: the network is down for five seconds, for all of them;
- slow-client: all that a client sends and receives goes through a line of SLOW_BYTES_PER_SECOND;
- full-disk-at-server, full-disk-at-client: from an instant after the first commit on, the disk refuses all writes;
- late-client, late-slow-client: a client is stopped, or slow, for longer than a round may last.

A server that ends is started again, in the same directory, and so is a client that ends with an error. The runs end
with the bits of a calm one, on the local engine; the late ones, which drop clients by the clock, with those of a
simulation that replays what was dropped. Peers without a server have kinds of their own, see faults_on_peers.py. Each
run has a network of its own, where the system lets it; where not, no cable is cut.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch

import faults_on_peers
import gossamer
from forked import LIMIT_SECONDS, firing, kill_group, pause, refused, start, wait, write_digest
from golden_hashes import LEVELS, federated
from gossamer import experiment
from gossamer.engines.network import engine
from gossamer.engines.network.client import ClientNode
from gossamer.engines.training import trainer
from gossamer.storage.checkpoint import Checkpoints
from gossamer.storage.runlog import CONFIG, EXPERIMENT, read_events
from gossamer.task import task_of
from gossamer.transport import Client, Limits, Server
from gossamer.transport.frames import Outgoing
from networks import be_wire, can_cut, free_port, make_network, set_cable

NUM_FAULTS = 200
NUM_SEEDS = 2
NUM_CLIENTS = 5
NUM_AT_ONCE = 2  # runs
SLOW_BYTES_PER_SECOND = 60e3  # of a line
LATE_BYTES_PER_SECOND, DEADLINE_SECONDS = 12e3, 2.0  # in which such a line does not get all through
CUT_SECONDS = 5.0
SILENCE_SECONDS = 1.5  # after which a server here gives up a process that does not answer; a user's own has 30
FRAME_BYTES = 4096  # of an update
PATIENCE_SECONDS = 30.0
CLIENTS = ("kill-client-in-training", "kill-client-in-sending", "stop-client", "late-client", "full-disk-at-client")
SERVER = ("kill-server-in-commit", "kill-server-in-round", "restart-server", "full-disk-at-server")
LATE = ("late-client", "late-slow-client")
SLOW = ("slow-client", "late-slow-client")
KEEPING = (*LATE, "full-disk-at-client")  # faults of clients that keep private state
CUT = ("cut-cable", *faults_on_peers.CUT)
KINDS = (*CLIENTS, *SERVER, "slow-client", "late-slow-client", "cut-cable", *faults_on_peers.KINDS)
CALLS = {"kill-server-in-commit": 15, "full-disk-at-server": 4, "full-disk-at-client": 4, "late-client": 4}
FEDERATED = {"fedrolex": federated("fedrolex", LEVELS, True), "scaffold": federated("scaffold", [1.0], True)}
EXPERIMENTS = FEDERATED | faults_on_peers.EXPERIMENTS

Fault = dict[str, Any]


def configuration(fault: Fault, **changes: Any) -> dict[str, Any]:
    """Return a run in which all clients take part in every round, which is committed."""
    config = FEDERATED[fault["experiment"]]
    clients = {"num": NUM_CLIENTS, "per_round": NUM_CLIENTS}
    if fault["kind"] in LATE:  # when such a client has not told, either, how good the model is
        clients |= {"deadline_seconds": DEADLINE_SECONDS, "quorum": 0.1}
        config = config | {"workload": config["workload"] | {"local_evaluation": False}}
        config |= {"evaluation": config["evaluation"] | {"on_clients": False}}
    given = {"seed": fault["seed"], "rounds": 4, "checkpoint": {"every_seconds": 0}, "clients": clients}
    return config | given | {"engine": config["engine"] | {"workers": 0}} | changes


# ---- server and clients


def serve(fault: Fault, directory: Path, address: str, is_new: bool) -> int:
    """Be the server of a run, or of one that goes on."""
    if is_new:
        prepare_server(fault, directory)
    if fault["kind"] == "stop-client":
        engine.Server = partial(Server, limits=Limits(silence_seconds=SILENCE_SECONDS))  # type: ignore[misc,assignment]
    if any((directory / name).exists() for name in (CONFIG, EXPERIMENT)):
        experiment.resume(directory)
    else:
        config = configuration(fault)
        experiment.run(config | {"engine": config["engine"] | {"name": "network", "address": address}}, out=directory)
    return 0


def prepare_server(fault: Fault, directory: Path) -> None:
    """Let something fail at the server."""
    kind = fault["kind"]
    number = {"restart-server": signal.SIGTERM, "cut-cable": None}.get(kind, signal.SIGKILL)
    fire = firing(fault["at"], directory.with_suffix(".fired"), number)
    if kind == "kill-server-in-commit":
        Checkpoints.commit = partialmethod(Checkpoints.commit, on_step=fire)  # type: ignore[assignment]
    elif kind in ("kill-server-in-round", "restart-server", "cut-cable"):
        send = engine.NetworkEngine._send_job

        def fire_and_send(*arguments: Any) -> None:
            """Fire before a job is sent."""
            fire()
            send(*arguments)

        engine.NetworkEngine._send_job = fire_and_send  # type: ignore[assignment]
    elif kind == "full-disk-at-server":
        os.fsync, os.pwrite = (refused(call, fault["at"], directory) for call in (os.fsync, os.pwrite))


def take_part(fault: Fault, client: int, directory: Path, address: str, is_new: bool) -> int:
    """Be a client."""
    if is_new and client == fault["client"] and fault["kind"] in CLIENTS:
        prepare_client(fault, directory)

    def dial(hello: Mapping[str, Any], seconds: float) -> Client:
        """Join the server, and send updates in several frames."""
        limits = Limits(chunk_bytes=FRAME_BYTES)
        return Client(address, name=f"client-{client}", hello=hello, limits=limits, timeout_seconds=seconds)

    ClientNode(
        dial=dial,
        clients=[client],
        make_task=task_of,
        directory=directory.with_suffix(".nodes") / str(client),
        patience_seconds=PATIENCE_SECONDS,
        linger_seconds=0.0,
        is_simulated=True,
        tell=lambda line: print(f"client {client}: {line}", flush=True),
    ).run()
    return 0


def prepare_client(fault: Fault, directory: Path) -> None:
    """Let something fail at a client."""
    number = signal.SIGKILL if fault["kind"].startswith("kill") else signal.SIGSTOP
    fire = firing(fault["at"], directory.with_suffix(".fired"), number)
    if fault["kind"] == "full-disk-at-client":
        os.fsync = refused(os.fsync, fault["at"], directory)
    elif fault["where"] == "sending":
        frames = Outgoing.frames

        def fire_and_frames(outgoing: Outgoing) -> Iterator[bytes]:
            """Fire before a frame of an update is sent."""
            for frame in frames(outgoing):
                fire()
                yield frame

        Outgoing.frames = fire_and_frames  # type: ignore[method-assign]
    else:
        differentiate = trainer.differentiate

        def fire_and_differentiate(*arguments: Any) -> Any:
            """Fire before a local step."""
            fire()
            return differentiate(*arguments)

        trainer.differentiate = fire_and_differentiate


# ---- one run


class Federation:
    """The processes of a run, which this one starts, and starts again."""

    def __init__(self, fault: Fault, directory: Path) -> None:
        """Start the server, and the clients."""
        self.fault, self.directory = fault, directory
        self.log, self.marker = directory.with_suffix(".log"), directory.with_suffix(".fired")
        self.address = f"127.0.0.1:{free_port()}"
        self.codes: list[int] = []
        self.wire = self._start_wire() if fault["kind"] in SLOW else None
        self.server = self._start_server(True)
        self.clients = {self._start_client(client, True): client for client in range(NUM_CLIENTS)}

    def _start(self, do: Callable[[], int]) -> int:
        return start(do, self.log, own_group=False)

    def _start_server(self, is_new: bool) -> int:
        return self._start(partial(serve, self.fault, self.directory, self.address, is_new))

    def _start_client(self, client: int, is_new: bool) -> int:
        is_slow = self.wire is not None and client == self.fault["client"]
        address = self.wire if is_slow else self.address
        return self._start(partial(take_part, self.fault, client, self.directory, address, is_new))

    def _start_wire(self) -> str:
        """Start a slow line to the server; returns where it is dialled."""
        file = self.directory.with_suffix(".wire")
        speed = LATE_BYTES_PER_SECOND if self.fault["kind"] in LATE else SLOW_BYTES_PER_SECOND
        self._start(partial(be_wire, self.address, speed, file, self.marker))
        while not file.exists():
            time.sleep(0.01)
        return file.read_text()

    def run(self) -> None:
        """Wait until the run is over, and all clients have ended; deal with the fault once it has fired."""
        dealing: Iterator[None] | None = None
        while self.codes[-1:] != [0] or (self.clients and self.fault["kind"] not in LATE):
            if dealing is None and self.marker.exists():
                dealing = self._deal()
            if dealing is not None:
                next(dealing, None)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                self._ended(pid, os.waitstatus_to_exitcode(status))
            else:
                time.sleep(0.01)

    def _ended(self, pid: int, code: int) -> None:
        """Take note of a process that has ended, and start it again if it should not have."""
        if pid == self.server:
            self.codes.append(code)
            if code and len(self.codes) < 3:
                self.server = self._start_server(False)
        elif pid in self.clients:
            client = self.clients.pop(pid)
            if code:
                self.clients[self._start_client(client, False)] = client

    def _deal(self) -> Iterator[None]:
        """Do what belongs to the fault after it has fired, in steps."""
        then = self.fault["then"]
        if self.fault["kind"] == "cut-cable":
            set_cable(False)
            yield from pause(CUT_SECONDS)
            set_cable(True)
        elif then is not None:
            yield from pause({"soon": 0.5, "killed": 0.5, "given up": 0.0, "late": 1.5 * DEADLINE_SECONDS}[then])
            while then == "given up" and not self.have_left():
                yield
            os.kill(int(self.marker.read_text()), signal.SIGKILL if then == "killed" else signal.SIGCONT)

    def have_left(self) -> bool:
        """Say whether a client has left since the fault fired, by the log of the run."""
        since = self.marker.stat().st_mtime
        left = [event["time"] for event in read_events(self.directory) if event["kind"] == "left"]
        return any(datetime.fromisoformat(at).timestamp() > since for at in left)


def be_federation(fault: Fault, directory: Path, result: Path) -> int:
    """Run a federation with one fault, and compare it with what it is to be; writes what was found."""
    make_network()
    began = time.monotonic()
    federation = Federation(fault, directory)
    federation.run()
    seconds, log = time.monotonic() - began, federation.log
    digests = [directory.with_suffix(suffix) for suffix in (".digest", ".replayed")]
    wait(start(partial(write_digest, partial(gossamer.load, directory), digests[0]), log, own_group=False))
    dropped = [event for event in read_events(directory) if event["kind"] == "update-dropped"]
    fired = federation.marker.exists()
    if fault["kind"] in LATE:
        config, out = configuration(fault, replay=str(directory)), directory.with_suffix(".again")
        replay = partial(write_digest, partial(gossamer.run, config, out=out), digests[1])
        wait(start(replay, log, own_group=False))
        fired &= fault["client"] in {event["client"] for event in dropped}
    elif fault["kind"] == "cut-cable":
        fired &= federation.have_left()
    found = {"fired": fired, "codes": federation.codes, "dropped": len(dropped), "seconds": round(seconds, 1)}
    found["digests"] = [path.read_text() for path in digests if path.exists()]
    result.write_text(json.dumps(found))
    return 0


def judged(fault: Fault, directory: Path, code: int | None, expected: str) -> dict[str, Any]:
    """Return what is told of a run that has ended; `expected` is the digest of a calm one."""
    found: dict[str, Any] = {"fired": False, "equal": False, "hung": code is None}
    result, log = directory.with_suffix(".json"), directory.with_suffix(".log")
    if result.exists():
        found |= json.loads(result.read_text())
        digests = found.pop("digests")
        wanted = digests[1:] if fault["kind"] in (*LATE, *faults_on_peers.ABSENT) else [expected]
        found["equal"] = digests[:1] == wanted
    return fault | found | ({} if found["equal"] else {"said": log.read_text(errors="replace")[-3000:]})


# ---- all of them


def drawn(kind: str, source: random.Random, experiments: list[str]) -> Fault:
    """Return a fault of a kind."""
    if kind in faults_on_peers.KINDS:
        return faults_on_peers.drawn(kind, source, experiments)
    experiments = [name for name in experiments if name in FEDERATED] or list(FEDERATED)
    where = "sending" if kind == "kill-client-in-sending" else "training"
    then: str | None = None
    if kind == "stop-client":
        where, then = source.choice(("training", "sending")), source.choice(("soon", "given up", "killed"))
    if kind == "late-client":
        where, then = source.choice(("training", "sending")), "late"
    keeping = [name for name in experiments if name == "scaffold"]
    return {
        "kind": kind,
        "experiment": source.choice(keeping if kind in KEEPING and keeping else experiments),
        "seed": source.randrange(NUM_SEEDS),
        "client": source.randrange(NUM_CLIENTS),
        "where": where,
        "then": then,
        "at": source.randint(1, CALLS.get(kind, 8)),
    }


def reference(fault: Fault, folder: Path) -> str:
    """Return the digest of a calm run of the local engine."""
    calm = folder / f"{fault['experiment']}-{fault['seed']}"
    path = calm.with_suffix(".digest")
    if not path.exists():
        job: Callable[[], int]
        if fault["kind"] in faults_on_peers.KINDS:
            config = faults_on_peers.configuration(fault | {"kind": "none"})
            job = partial(faults_on_peers.run_and_write, config, calm, path)
        else:
            config = configuration(fault | {"kind": "none"})
            job = partial(write_digest, partial(gossamer.run, config, out=calm), path)
        wait(start(job, calm.with_suffix(".log")))
    return path.read_text()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Try until that many faults have fired, or twice as many were tried; return what the JSON says of them."""
    torch.set_num_threads(1)
    source, names = random.Random(options.seed), options.experiments or list(EXPERIMENTS)
    cutting = can_cut(folder / "network.log")
    kinds = [kind for kind in options.kinds or KINDS if cutting or kind not in CUT]
    wanted = [kinds[number % len(kinds)] for number in range(options.faults)][::-1]
    running: dict[int, tuple[Fault, Path, float]] = {}
    results, number = list[dict[str, Any]](), 0
    while running or (wanted and number < 2 * options.faults):
        if wanted and len(running) < NUM_AT_ONCE and number < 2 * options.faults:
            fault, directory = drawn(wanted.pop(), source, names), folder / str(number)
            reference(fault, folder)
            be = faults_on_peers.be_peers if fault["kind"] in faults_on_peers.KINDS else be_federation
            job = partial(be, fault, directory, directory.with_suffix(".json"))
            running[start(job, directory.with_suffix(".log"))] = fault, directory, time.monotonic()
            number += 1
        for pid, code in ended(running):
            fault, directory, _ = running.pop(pid)
            results.append(judged(fault, directory, code, reference(fault, folder)))
            wanted += [] if results[-1]["fired"] else [fault["kind"]]
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        time.sleep(0.02)
    fired = [one for one in results if one["fired"]]
    return {
        "experiments": {name: sum(one["experiment"] == name for one in fired) for name in names},
        "fired": dict(sorted(Counter(one["kind"] for one in fired).items())),
        "left_out": {} if cutting else dict.fromkeys(CUT, "the system gives no network namespaces"),
        "faults": len(fired),
        "all_equal": all(one["equal"] for one in results),
        "hung": sum(one["hung"] for one in results),
        "wrong": [one for one in results if not one["equal"]],
        "longest_seconds": max(one.get("seconds", LIMIT_SECONDS) for one in results),
    }


def ended(running: Mapping[int, tuple[Fault, Path, float]]) -> list[tuple[int, int | None]]:
    """Return the processes that have ended, and their codes; None: one had to be killed."""
    found: list[tuple[int, int | None]] = []
    for pid, (_, _, began) in running.items():
        is_over, status = os.waitpid(pid, os.WNOHANG)
        if is_over:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it has left
            found.append((pid, os.waitstatus_to_exitcode(status)))
        elif time.monotonic() - began > LIMIT_SECONDS:
            kill_group(pid)
            found.append((pid, None))
    return found
