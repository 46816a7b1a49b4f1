"""Rows that cross ranks, between real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gossamer.aggregate import TreeSum, tree_sum
from gossamer.distributed.environment import INTERFACE
from gossamer.distributed.links import GroupBroken
from gossamer.engines.collective.clients import sums_of_all
from gossamer.engines.collective.group import LOOPBACK, Group, address_of
from gossamer.engines.collective.rows import swap_rows_
from gossamer.errors import ConfigError

NUM_PEERS = 11
CASES: dict[str, list[list[int]]] = {  # [receiver, sender]
    "everybody hears everybody": [[i, j] for i in range(NUM_PEERS) for j in range(NUM_PEERS)],
    "a shift": [[i, (i + 3) % NUM_PEERS] for i in range(NUM_PEERS)],
    "one way": [[0, 10]],
    "within ranks only": [[0, 1], [5, 4], [10, 9]],
    "nobody": [],
}
STORES = {"00000000000000000000000000000000"}  # torch's store listens everywhere
SPANS = [[0, 4], [4, 8], [8, 11]]


def arrays(seed: int) -> dict[str, torch.Tensor]:
    """Rows of all peers, of odd sizes, so that no array begins where the last one's dtype would have it."""
    source = torch.Generator().manual_seed(seed)
    return {
        "holders": torch.randint(0, 2, (NUM_PEERS, 3), generator=source, dtype=torch.uint8),
        "x": torch.randn(NUM_PEERS, 5, generator=source),
        "y": torch.randn(NUM_PEERS, 1, generator=source, dtype=torch.float64),
    }


def heard_of(edges: list[list[int]]) -> Callable[[int, int, int, int], NDArray[np.int64] | None]:
    """Return what lists the senders in a range of whom receivers in another one hear."""

    def heard(first: int, last: int, low: int, high: int) -> NDArray[np.int64] | None:
        """Return the senders, sorted; None: there are none."""
        found = sorted({sender for receiver, sender in edges if first <= receiver < last and low <= sender < high})
        return np.array(found) if found else None

    return heard


class Rendezvous:
    """A store at which the members of groups find each other."""

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._num_groups = 0

    def members(self, size: int, seconds: float) -> list[Member]:
        """Return the members of another group."""
        self._num_groups += 1
        return [Member(self._store.port, str(self._num_groups), rank, size, seconds) for rank in range(size)]


class Member(NamedTuple):
    """What a process needs to know to join a group."""

    port: int
    name: str
    rank: int
    size: int
    seconds: float

    def join(self) -> Group:
        """Join the group."""
        limit = timedelta(seconds=self.seconds)
        store = TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False, timeout=limit)
        return Group(PrefixStore(self.name, store), self.rank, self.size, timeout_seconds=self.seconds)


@pytest.fixture(autouse=True)
def on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let groups listen on the loopback interface."""
    monkeypatch.setenv(INTERFACE, "lo")


def run_member(member: Member, mode: str) -> None:
    """Be one member of a group: swap the rows of all cases, through memory or sockets, or go after the first one."""
    with closing(member.join()) as group:
        low, high = SPANS[member.rank]
        if mode == "sockets":
            group.links.close()  # as between machines
        elif mode != "die":
            assert all(group.links.is_near(rank) for rank in group.others)
        for seed, edges in enumerate([*CASES.values()] * (2 if mode == "die" else 1)):
            if mode == "die" and member.rank == 0 and seed:  # not while the others join
                os.kill(os.getpid(), signal.SIGKILL)
            everyone = arrays(seed)
            mine = {name: torch.zeros_like(value) for name, value in everyone.items()}
            for name, value in everyone.items():
                mine[name][low:high] = value[low:high]
            try:
                sent, came = swap_rows_(group, SPANS, mine, heard_of(edges))
            except GroupBroken:
                print("broken")
                return
            told = {sender for receiver, sender in edges if low <= receiver < high} | set(range(low, high))
            assert sorted(came.tolist()) == sorted(told - set(range(low, high)))
            for name, value in everyone.items():
                rows = sorted(told)
                assert torch.equal(mine[name][rows], value[rows]), (name, seed)
                others = [peer for peer in range(NUM_PEERS) if peer not in told]
                assert not mine[name][others].any()
            print(sent)
        if mode in ("memory", "sockets"):
            check_messages(group)
            check_sums(group)


def check_messages(group: Group) -> None:
    """What ranks tell all, and what they send each other, arrives as it was."""
    told = [{"rank": rank, "text": "x" * (5000 * rank)} for rank in range(group.size)]
    assert group.tell_all(told[group.rank]) == told
    sent = [*arrays(group.rank).values(), torch.empty(0, 3)]
    waits = [group.send(rank, {"from": group.rank}, sent) for rank in group.others]
    for rank in group.others:
        message, came = group.receive(rank)
        assert message == {"from": rank}
        assert all(map(torch.equal, came, [*arrays(rank).values(), torch.empty(0, 3)]))
    for wait in waits:
        wait()


def check_sums(group: Group) -> None:
    """Sums of all ranks have the bits of one tree, though one rank has two parts of it, and one variant is of few."""
    rows = torch.randn(group.size + 1, 1001, generator=torch.Generator().manual_seed(0))
    tree, narrow = TreeSum(len(rows)), TreeSum(2)
    for index in range(group.rank, group.rank + 1 + (group.rank == group.size - 1)):
        tree.add(index, rows[index].clone())
    if group.rank < 2:
        narrow.add(group.rank, rows[group.rank, :2].clone())
    found = sums_of_all(group, {(0, "x"): tree, (1, "x"): narrow})
    assert torch.equal(found[0, "x"], cast(Tensor, tree_sum([*rows.clone()])))
    assert torch.equal(found[1, "x"], rows[0, :2] + rows[1, :2])


@pytest.fixture
def run_group() -> Iterator[Callable[[list[Member], str], list[list[str]]]]:
    """Run the members of a group, each in a process of its own, and return what they print."""
    started: list[subprocess.Popen[str]] = []

    def run(members: list[Member], mode: str = "") -> list[list[str]]:
        """Run this file in a process, and return what each member printed."""
        command = [sys.executable, __file__, json.dumps(members), mode]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
        ended = json.loads(started[-1].communicate(timeout=200)[0])
        died = [code for code, _ in ended]
        assert died == [-signal.SIGKILL if mode == "die" and member.rank == 0 else 0 for member in members]
        return [printed for _, printed in ended]

    yield run
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["memory", "sockets"])
def test_rows_that_others_hear(run_group: Callable[..., list[list[str]]], mode: str) -> None:
    """What is heard arrives, nothing else, in one message for each pair of ranks; and what was sent is counted."""
    rendezvous = Rendezvous()
    told = run_group(rendezvous.members(3, 90), mode)
    row_bytes = 3 + 5 * 4 + 8
    for (low, high), counts in zip(SPANS, told, strict=True):
        expected = []
        for edges in CASES.values():
            messages = [
                {sender for receiver, sender in edges if low <= sender < high and first <= receiver < last}
                for first, last in SPANS
                if [first, last] != [low, high]
            ]
            expected.append(sum(map(len, messages)) * row_bytes)
        assert [int(count) for count in counts] == expected


def test_a_member_that_dies(run_group: Callable[..., list[list[str]]]) -> None:
    """Whoever waits for it notices, the others once they do."""
    rendezvous = Rendezvous()
    told = run_group(rendezvous.members(3, 90), "die")
    assert [printed[-1] for printed in told[1:]] == ["broken", "broken"]


def test_members_that_do_not_come(run_group: Callable[..., list[list[str]]]) -> None:
    """One of three waits in vain, and can be in another group afterwards, with processes that know nothing of it."""
    rendezvous = Rendezvous()
    with pytest.raises(GroupBroken, match="a group of 3 did not form"):
        rendezvous.members(3, 1)[1].join()
    members = rendezvous.members(3, 90)
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(run_group, [members[0], members[2]])
        with closing(members[1].join()) as group:
            for seed, edges in enumerate(CASES.values()):
                swap_rows_(group, SPANS, arrays(seed), heard_of(edges))
        assert all(len(told) == len(CASES) for told in others.result())


def listening() -> set[str]:
    """Return the addresses, as the kernel writes them, at which this process listens."""
    sockets, found = set(), set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it was closed in the meantime
            sockets.add(os.readlink(path))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's list of sockets")
def test_loopback_only() -> None:
    rendezvous = Rendezvous()
    with closing(rendezvous.members(1, 90)[0].join()):
        assert "0100007F" in listening()
        assert "00000000" not in listening() - STORES


def test_interfaces() -> None:
    assert address_of("lo") == LOOPBACK
    with pytest.raises(ConfigError, match=r"'no-such' is no interface of .* with an IPv4 address \(No such device\)"):
        address_of("no-such")


def start(member: Member, mode: str) -> tuple[int, int]:
    """Fork a member, which does not import torch anew; return its process, and where it is read what it prints."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(writing, 1)
        code = 1
        try:
            run_member(member, mode)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    os.close(writing)
    return process, reading


def read(descriptor: int) -> str:
    """Read until all that write have ended."""
    with open(descriptor) as file:
        return file.read()


def main(arguments: list[str]) -> None:
    """Run the members of a group; print how each ended, and what it printed."""
    started = [start(Member(*member), arguments[1]) for member in json.loads(arguments[0])]
    printed = [read(reading).split() for _, reading in started]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, _ in started]
    print(json.dumps([*zip(codes, printed, strict=True)]))


if __name__ == "__main__":
    main(sys.argv[1:])
