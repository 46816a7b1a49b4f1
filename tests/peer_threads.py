"""Peers of a decentralized run as threads of a test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from federation import wait_for
from gossamer.engines.network.addresses import OBSERVER
from gossamer.errors import GossamerError
from gossamer.experiment import Hooks, Run, resume, run
from gossamer.storage.checkpoint import STATE, Checkpoints
from gossamer.storage.runlog import CHECKPOINTS


class Watch:
    """Calls back after each round."""

    def __init__(self, on_round: Callable[[int], None]) -> None:
        self._on_round = on_round

    def on_block(self, round: int, done: int, total: int) -> None:
        """Nothing is asked of blocks."""

    def on_round(self, record: Mapping[str, Any]) -> None:
        """Call back with the number of the round."""
        self._on_round(record["round"])


class Peers:
    """Peers, and an observer, in threads of this process, which find each other in a folder."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory, self.config = directory, config
        self.book = directory / "addresses"
        self.book.mkdir(parents=True)
        self._threads: dict[int | None, threading.Thread] = {}
        self.runs: dict[int | None, Run] = {}
        self.errors: dict[int | None, GossamerError] = {}

    def where(self, peer: int | None) -> Path:
        """Return the run directory of a peer, or of the observer."""
        return self.directory / f"node-{peer}"

    def start(self, peer: int | None, hooks: Hooks | None = None, **changes: Any) -> None:
        """Start one, or start it again; the observer listens then, or others would send it nothing of their rounds."""
        engine = {**self.config["engine"], "name": "network", "peers_file": str(self.book), "peer": peer, **changes}
        given = {**self.config, "engine": {**engine, "address": "127.0.0.1:0"}}
        where = self.where(peer)
        begin = partial(resume, where, hooks) if where.exists() else partial(run, given, (), where, hooks)

        def take_part() -> None:
            """Keep what comes of it."""
            try:
                self.runs[peer] = begin()
            except GossamerError as error:
                self.errors[peer] = error

        self._threads[peer] = threading.Thread(target=take_part, daemon=True)
        self._threads[peer].start()
        if peer is None:
            wait_for((self.book / OBSERVER).exists)

    def join(self, *peers: int | None) -> None:
        """Wait for some to end, or for all."""
        for peer in peers or list(self._threads):
            self._threads[peer].join(60)
            assert not self._threads[peer].is_alive(), f"peer {peer} does not end"


def ended_after(number: int) -> Hooks:
    """Return hooks that end a run after a round."""
    over = threading.Event()
    watch = Watch(lambda round: over.set() if round >= number else None)
    return Hooks(observer=lambda name, num_rounds: watch, is_ended=over.is_set)


def committed_rows(directory: Path) -> torch.Tensor:
    """Return the models of a run's last commit, [n, d]."""
    latest = Checkpoints(directory / CHECKPOINTS).latest()
    assert latest is not None
    return latest.arrays[f"{STATE}x"]
