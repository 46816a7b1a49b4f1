"""Memory that processes of one machine share: what waiting for one that is gone or stopped says, and what is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
import torch

from gossamer.distributed import shared
from gossamer.distributed.shared import MAX_SEGMENTS, SharedMemory


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that does nothing."""
    with subprocess.Popen(["sleep", "50"]) as started:
        yield started
        started.kill()


@pytest.fixture
def memory(process: subprocess.Popen[bytes]) -> Iterator[SharedMemory]:
    """Return the memory of rank 0, beside a rank 1 that never reads nor writes."""
    (inbox, theirs), (unread, outbox) = os.pipe(), os.pipe()
    yield SharedMemory(0, 2, {1: process.pid}, {1: (inbox, outbox)})
    for file in (inbox, theirs, unread, outbox):
        os.close(file)


def test_a_process_that_is_stopped(
    process: subprocess.Popen[bytes], memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed long before the timeout, by whoever waits for its message, and by whoever waits until it reads."""
    monkeypatch.setattr(shared, "STOPPED_SECONDS", 0.3)
    monkeypatch.setattr(shared, "WATCH_SECONDS", 0.1)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=rf"process {process.pid} has been stopped for 0\.\d+ s"):
        memory.receive(1, 0, memory.ask(1, 0), 50.0)
    *first, last = [memory.send({1: [torch.ones(3)]}, 0) for _ in range(shared.AHEAD + 1)]
    for one in first:
        memory.finish(one, 50.0)
    with pytest.raises(RuntimeError, match="has been stopped for"):
        memory.finish(last, 50.0)


def test_a_process_that_is_only_slow(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "STOPPED_SECONDS", 0.1)
    monkeypatch.setattr(shared, "WATCH_SECONDS", 0.05)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"nothing came for 0\.5 s"):
        memory.receive(1, 0, memory.ask(1, 0), 0.5)
    assert time.monotonic() - began >= 0.5


def test_segments_that_are_kept(memory: SharedMemory) -> None:
    """Messages of ever other sizes, all read, leave a few segments, each with two open files."""
    before = len(os.listdir("/proc/self/fd"))
    for power in range(8, 8 + 2 * MAX_SEGMENTS):
        segment, use = memory.send({1: [torch.empty(1 << power, dtype=torch.uint8)]}, 0)
        segment._flags[1] = use  # as its reader does
    assert len(memory._own) == MAX_SEGMENTS
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * MAX_SEGMENTS
