"""Faults of peers without a server: four processes that dial each other over loopback, of which one is struck.

- kill-peer-in-training, kill-peer-in-sending, kill-peer-in-commit: SIGKILL of a peer between two local steps, before it
  sends a frame, or after one of the steps of a commit; it is started again, and goes on from its own commit;
- stop-peer: SIGSTOP while it trains, then SIGCONT, or SIGKILL and another process;
- slow-peer: all that a peer is sent goes through a slow line;
- cut-peers: the cable between all peers is cut until one of them notices;
- full-disk-at-peer: from an instant after its first commit on, its disk refuses all writes, and it ends; then it is
  started again, with room.

In these the others wait, and every peer ends with the bits of a calm run on the local engine. In absent-peer,
absent-slow-peer and absent-cut-peers the same happens, but peers go on after PATIENCE_SECONDS without the rows that are
missing; all end with the bits of a simulation that replays who was absent for whom.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import gossamer
from forked import firing, pause, refused, start, wait
from golden_hashes import IMAGES, LEVELS, decentralized, modes
from gossamer import experiment
from gossamer.engines.training import trainer
from gossamer.storage.checkpoint import STATE, Checkpoints
from gossamer.storage.runlog import CHECKPOINTS, CONFIG, read_events, read_metrics
from gossamer.transport.frames import Outgoing
from networks import be_wire, free_port, make_network, set_cable

NUM_PEERS, NUM_ROUNDS = 4, 5
NUM_SEEDS = 2
PATIENCE_SECONDS = 0.4
CUT_SECONDS = 10.0  # after which a peer must have noticed that a cable is cut
AWAY = "is away; waiting for it ("  # what it says then
SLOW_BYTES_PER_SECOND, LATE_BYTES_PER_SECOND = 60e3, 12e3
MAX_STARTS = 3  # of a peer
ABSENT = ("absent-peer", "absent-slow-peer", "absent-cut-peers")
CUT = ("cut-peers", "absent-cut-peers")
SLOW = ("slow-peer", "absent-slow-peer")
KILLS = ("kill-peer-in-training", "kill-peer-in-sending", "kill-peer-in-commit")
KINDS = (*KILLS, "stop-peer", "full-disk-at-peer", "slow-peer", "cut-peers", *ABSENT)
CALLS = {"kill-peer-in-commit": 15, "full-disk-at-peer": 4}
EXPERIMENTS = {
    "dsgd": decentralized("dsgd", "od-equidyn", IMAGES)
    | {"submodel": {"capacities": LEVELS}, "engine": {"modes": modes(LEVELS, stacked=True)}},
    "dsgt": decentralized("dsgt", "ring", IMAGES),
}

Fault = dict[str, Any]


def configuration(fault: Fault, **changes: Any) -> dict[str, Any]:
    """Return a run of peers, of which every phase is committed."""
    config = EXPERIMENTS[fault["experiment"]]
    peers = config["peers"] | {"num": NUM_PEERS}
    if fault["kind"] in ABSENT:
        peers |= {"absent_neighbour": "renormalise", "patience_seconds": PATIENCE_SECONDS}
    given = {"seed": fault["seed"], "rounds": NUM_ROUNDS, "peers": peers, "checkpoint": {"every_seconds": 0}}
    return config | given | {"engine": config["engine"] | {"workers": 0}} | changes


def drawn(kind: str, source: random.Random, experiments: list[str]) -> Fault:
    """Return a fault of a kind, of one of some experiments if they are of peers."""
    names = [name for name in experiments if name in EXPERIMENTS] or list(EXPERIMENTS)
    return {
        "kind": kind,
        "experiment": "dsgt" if kind in SLOW else source.choice(names),  # whose messages are large
        "seed": source.randrange(NUM_SEEDS),
        "client": source.randrange(NUM_PEERS),
        "then": {"stop-peer": source.choice(("goes on", "killed")), "absent-peer": "goes on"}.get(kind),
        "at": source.randint(1, CALLS.get(kind, 8)),
    }


# ---- one peer


def take_part(fault: Fault, peer: int, directory: Path, book: Path, address: str, is_new: bool) -> int:
    """Be a peer, or be it again."""
    where = directory / f"peer-{peer}"
    if is_new and peer == fault["client"]:
        prepare(fault, where)
    hooks = experiment.Hooks(tell=lambda line: print(f"peer {peer}: {line}", flush=True))
    if (where / CONFIG).exists():
        experiment.resume(where, hooks)
        return 0
    config = configuration(fault)
    engine = config["engine"] | {"name": "network", "peer": peer, "peers_file": str(book), "address": address}
    experiment.run(config | {"engine": engine}, out=where, hooks=hooks)
    return 0


def prepare(fault: Fault, where: Path) -> None:
    """Let something fail at a peer."""
    kind = fault["kind"]
    number = signal.SIGKILL if kind in KILLS else None if kind in CUT else signal.SIGSTOP
    fire = firing(fault["at"], where.with_suffix(".fired"), number)
    if kind == "full-disk-at-peer":
        os.fsync = refused(os.fsync, fault["at"], where)
    elif kind == "kill-peer-in-commit":
        Checkpoints.commit = partialmethod(Checkpoints.commit, on_step=fire)  # type: ignore[assignment]
    elif kind == "kill-peer-in-sending":
        Outgoing.frames = before(fire, Outgoing.frames)  # type: ignore[method-assign]
    elif kind not in SLOW:
        trainer.differentiate = before(fire, trainer.differentiate)


def before(fire: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that is preceded by another one."""

    def fire_and_call(*arguments: Any) -> Any:
        """Do both."""
        fire()
        return call(*arguments)

    return fire_and_call


# ---- one run


class Group:
    """The processes of a run, which this one starts, and starts again."""

    def __init__(self, fault: Fault, directory: Path) -> None:
        """Start all peers, and for a slow one a line by which the others reach it."""
        self.fault, self.directory, self.log = fault, directory, directory.with_suffix(".log")
        directory.mkdir()
        self.marker = directory / f"peer-{fault['client']}.fired"
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(NUM_PEERS)]
        dialled = list(self.addresses)
        if fault["kind"] in SLOW:
            dialled[fault["client"]] = self._start_wire(self.addresses[fault["client"]])
        self.book = directory / "addresses.yaml"
        self.book.write_text(json.dumps({"peers": dialled}))
        self.num_away = 0  # times that one was before the fault fired, as when others start later
        self.codes: dict[int, list[int]] = {peer: [] for peer in range(NUM_PEERS)}
        self.peers = {self._start(peer, True): peer for peer in range(NUM_PEERS)}

    def _start(self, peer: int, is_new: bool) -> int:
        job = partial(take_part, self.fault, peer, self.directory, self.book, self.addresses[peer], is_new)
        return start(job, self.log, own_group=False)

    def _start_wire(self, target: str) -> str:
        file = self.directory / "wire"
        speed = LATE_BYTES_PER_SECOND if self.fault["kind"] in ABSENT else SLOW_BYTES_PER_SECOND
        start(partial(be_wire, target, speed, file, self.marker), self.log, own_group=False)
        while not file.exists():
            time.sleep(0.01)
        return file.read_text()

    def run(self) -> None:
        """Wait until all peers have ended; deal with the fault once it has fired."""
        dealing: Iterator[None] | None = None
        while self.peers:
            if dealing is None and self.marker.exists():
                self.num_away = self.log.read_text(errors="replace").count(AWAY)
                dealing = self._deal()
            if dealing is not None:
                next(dealing, None)
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid not in self.peers:
                time.sleep(0.01)
                continue
            peer, code = self.peers.pop(pid), os.waitstatus_to_exitcode(status)
            self.codes[peer].append(code)
            if code and len(self.codes[peer]) < MAX_STARTS:
                self.peers[self._start(peer, False)] = peer

    def _deal(self) -> Iterator[None]:
        """Do what belongs to the fault after it has fired, in steps."""
        if self.fault["kind"] in CUT:
            set_cable(False)
            if self.fault["kind"] in ABSENT:
                yield from pause(3 * PATIENCE_SECONDS)
            end = time.monotonic() + CUT_SECONDS
            while self.fault["kind"] not in ABSENT and not self._is_noticed() and time.monotonic() < end:
                yield
            set_cable(True)
        elif self.fault["then"] is not None:
            yield from pause(3 * PATIENCE_SECONDS)
            number = signal.SIGKILL if self.fault["then"] == "killed" else signal.SIGCONT
            os.kill(int(self.marker.read_text()), number)

    def has_fired(self) -> bool:
        """Say whether the fault was felt: somebody was killed, refused by a disk, away, or missed."""
        kind, victim = self.fault["kind"], self.fault["client"]
        if not self.marker.exists() and kind not in SLOW:
            return False
        if kind in KILLS or kind == "full-disk-at-peer" or self.fault["then"] == "killed":
            return self.codes[victim][0] != 0
        if kind in ABSENT:
            return any(
                event["kind"] == "neighbours-absent"
                for peer in range(NUM_PEERS)
                for event in read_events(self.directory / f"peer-{peer}")
            )
        return self._is_noticed() if kind in CUT else self.marker.exists()

    def _is_noticed(self) -> bool:
        """Say whether a peer has told, since the fault fired, that another one is away."""
        return self.log.read_text(errors="replace").count(AWAY) > self.num_away


def be_peers(fault: Fault, directory: Path, result: Path) -> int:
    """Run peers with one fault, and write what was found: digests of their rows, and of the replay's if it has some."""
    make_network()
    began = time.monotonic()
    group = Group(fault, directory)
    group.run()
    seconds, log = time.monotonic() - began, group.log
    digests = [directory.with_suffix(suffix) for suffix in (".digest", ".replayed")]
    places = [directory / f"peer-{peer}" for peer in range(NUM_PEERS)]
    wait(start(partial(write_rows, places, digests[0]), log, own_group=False))
    if fault["kind"] in ABSENT:
        again = directory.with_suffix(".again")
        config = configuration(fault, replay=str(directory))
        wait(start(partial(run_and_write, config, again, digests[1]), log, own_group=False))
    found = {"fired": group.has_fired(), "codes": group.codes, "seconds": round(seconds, 1)}
    found["digests"] = [path.read_text() for path in digests if path.exists()]
    result.write_text(json.dumps(found))
    return 0


def write_rows(directories: list[Path], path: Path) -> int:
    """Write a digest of all peers' models in the last commits of some runs, if these have ended."""
    found = hashlib.sha256()
    for directory in directories:
        latest = Checkpoints(directory / CHECKPOINTS).latest()
        if latest is None or read_metrics(directory)[-1]["round"] != NUM_ROUNDS:
            return 1
        found.update(latest.arrays[f"{STATE}x"].numpy().tobytes())
    path.write_text(found.hexdigest())
    return 0


def run_and_write(config: dict[str, Any], directory: Path, path: Path) -> int:
    """Run an experiment on the local engine, and write the digest of its peers' models."""
    gossamer.run(config, out=directory)
    return write_rows([directory], path)
