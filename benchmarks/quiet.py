"""Whether anything else used the processors while something was timed, by what Linux counts.

Two workers on two cores run at half their speed as soon as a third process is busy anywhere on the machine, and no
number of theirs says so: their own processor time stays the same. What tells is the processor time of everybody else:

- ``/proc/stat`` has the time that cores were idle, to the microsecond where they sleep without a timer's ticks. Cores
  that were not idle worked for somebody: for a process, for the kernel, or, in the eyes of a virtual machine, for
  another one ("steal"). Its other columns count who happens to run at a tick, and miss what is short;
- ``/proc/<pid>/stat`` has that of a process, and that of its children that it has waited for. Added up over the
  benchmark, its children, theirs and so on, it is what the trial itself used, at any instant, whoever has ended since;
- what is left belongs to others. Divided by the seconds that passed it is a share of one core: the most that a trial
  can have lost to them on average.

So a trial need not keep all cores busy to be judged, and may start by importing on one of them. Waiting of the trial's
processes for each other, which the kernel's run delay cannot tell from waiting for others, does not count.

Limits. The counters are printed in steps of 10 ms, so what takes less than half a second cannot be judged by itself.
What others did to caches and memory bandwidth from outside a virtual machine is not seen at all. A process whose
parent ignores that its children end (Ray's raylet does) takes what it used along when it ends, and then appears as
somebody else: the start of a Ray, in which idle workers end, may look up to a processor second noisier than it was.
Where there is no ``/proc/stat``, or it does not add up to the seconds that passed (some sandboxes show zeros), nothing
is known: then every trial is accepted, and said to be one of which nothing is known.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

MAX_SHARE = 0.05  # of one core that others may use on average
ROUNDING_SECONDS = 0.03  # by which the counters of a short trial may be off
MAX_DOUBT = 0.25  # by which the columns may miss the time that passed
ROOT = "GOSSAMER_BENCHMARK_ROOT"  # the process under which all contenders run


class Reading(NamedTuple):
    """The counters at an instant.

    Attributes:
        seconds: of the monotonic clock, which all processes of a machine share.
        cores: how many there are.
        counted: seconds of all cores in all columns together; grows by `cores` a second if the columns tell the truth.
        idle: seconds of all cores without anything to do.
        own: processor seconds that the benchmark and all its descendants have used.
    """

    seconds: float
    cores: int
    counted: float
    idle: float
    own: float


class Usage(NamedTuple):
    """What the processors did between two readings.

    Attributes:
        seconds: that passed.
        own: processor seconds of the benchmark and its descendants.
        others: seconds that cores were busy for somebody else; None: nothing is known.
    """

    seconds: float
    own: float
    others: float | None

    @property
    def share(self) -> float | None:
        """Cores that others kept busy on average, or None."""
        return None if self.others is None else self.others / max(self.seconds, 1e-9)


def read(root: int | None = None, proc: Path = Path("/proc")) -> Reading | None:
    """Read the counters; takes a few milliseconds. None where there are none.

    Args:
        root: the process whose descendants are the benchmark; None: the one that the variable `ROOT` names, else this.
        proc: where the kernel tells about processes.
    """
    root = root or int(os.environ.get(ROOT, os.getpid()))
    try:
        first, *others = (proc / "stat").read_text().splitlines()
        seconds = time.monotonic()
        ticks = os.sysconf("SC_CLK_TCK")
        columns = [int(value) / ticks for value in first.split()[1:9]]  # guests', behind them, are in "user", too
    except (OSError, ValueError, AttributeError):
        return None
    cores = sum(line.startswith("cpu") for line in others)
    own = tree_ticks(_processes(proc), root) / ticks
    return Reading(seconds, cores, sum(columns), columns[3] + columns[4], own)


def tree_ticks(processes: Mapping[int, tuple[int, int]], root: int) -> int:
    """Add up the ticks of a process and all its descendants.

    Args:
        processes: the parent and the ticks of every process.
        root: number of the first one.
    """
    children = defaultdict(list)
    for process, (parent, _) in processes.items():
        children[parent].append(process)
    found = [root]
    for process in found:
        found += children[process]
    return sum(processes[process][1] for process in found if process in processes)


def descendants(root: int, proc: Path = Path("/proc")) -> list[int]:
    """Return the processes that a process, its children and theirs started and that are still there."""
    processes = _processes(proc)
    found = [root]
    for ancestor in found:
        found += [process for process, (parent, _) in processes.items() if parent == ancestor]
    return found[1:]


def usage(before: Reading | None, after: Reading | None) -> Usage:
    """Return what happened between two readings."""
    if before is None or after is None:
        return Usage(0.0, 0.0, None)
    seconds, own = after.seconds - before.seconds, after.own - before.own
    passed, counted = after.cores * seconds, after.counted - before.counted
    if abs(counted - passed) > MAX_DOUBT * passed + after.cores * ROUNDING_SECONDS:
        return Usage(seconds, own, None)
    return Usage(seconds, own, max(0.0, passed - (after.idle - before.idle) - own))


def together(usages: Iterable[Usage]) -> Usage:
    """Return what happened in several stretches of time."""
    seconds, own, others = zip(*usages, strict=True)
    return Usage(sum(seconds), sum(own), None if None in others else sum(others))


def is_quiet(used: Usage, max_share: float = MAX_SHARE) -> bool | None:
    """Tell whether others left the processors alone; None where nothing is known.

    Args:
        used: between the start and the end of what was timed.
        max_share: of one core that others may use on average.
    """
    return None if used.others is None else used.others <= max_share * used.seconds + ROUNDING_SECONDS


def wait_until_quiet(
    patience: float,
    max_share: float = MAX_SHARE,
    reader: Callable[[], Reading | None] = read,
    sleep: Callable[[float], None] = time.sleep,
    window: float = 1.0,
) -> bool:
    """Wait until others leave the processors alone for a while; returns False if they do not in time.

    Args:
        patience: seconds to wait at most.
        max_share: of one core that others may use.
        reader, sleep: for tests.
        window: seconds that are looked at together.
    """
    for _ in range(int(patience / window)):
        before = reader()
        sleep(window)
        if is_quiet(usage(before, reader()), max_share) is not False:
            return True
    return False


def _processes(proc: Path) -> dict[int, tuple[int, int]]:
    """Return the parent of every process, and the ticks of it and of the children that it has waited for."""
    found = {}
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                text = (proc / name / "stat").read_bytes()
            except OSError:  # it ended in between
                continue
            fields = text[text.rindex(b")") + 2 :].split()
            found[int(name)] = int(fields[1]), sum(map(int, fields[11:15]))
    return found
