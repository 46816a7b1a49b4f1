"""Processes that are forked from one that has imported everything and computes nothing, and what fails in them."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from golden_hashes import digest
from gossamer.errors import GossamerError

LIMIT_SECONDS = 120.0  # of a job, after which it counts as hung


def start(do: Callable[[], int], log: Path, own_group: bool = True) -> int:
    """Fork a process that does something, says what it has to say in a file, and ends with the code that it returns.

    Args:
        do: callback; its code.
        log: file that is written on.
        own_group: whether it makes a group with all that it starts, or stays in that of its parent.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if own_group:
                os.setpgid(0, 0)
            code = do()
        except GossamerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    return pid


def wait(pid: int, while_waiting: Callable[[], None] = lambda: None) -> int | None:
    """Return the code with which a process ends, or None if it had to be killed, with all that it started."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        while_waiting()
        time.sleep(0.02)
    kill_group(pid)
    return None


def pause(seconds: float) -> Iterator[None]:
    """Take so long, in steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield


def kill_group(pid: int) -> None:
    """Kill a process that made a group, with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def write_digest(make: Callable[[], Any], path: Path) -> int:
    """Write the digest of a run's model and metrics."""
    path.write_text(digest(make()))
    return 0


def firing(at: int, marker: Path, number: signal.Signals | None) -> Callable[..., None]:
    """Return what, in its `at`-th call, writes the number of its process in a file, and sends it a signal.

    Args:
        at: counted from 1.
        marker: the file.
        number: of the signal; None: it sends none.
    """
    calls = 0

    def fire(*_: Any) -> None:
        """Count, or fire."""
        nonlocal calls
        calls += 1
        if calls == at:
            aside = marker.with_name(marker.name + ".writing")
            aside.write_text(str(os.getpid()))
            aside.replace(marker)
            if number is not None:
                os.kill(os.getpid(), number)

    return fire


def refused(call: Callable[..., Any], at: int, directory: Path) -> Callable[..., Any]:
    """Return a call that a full disk refuses from the `at`-th on, counted from the first commit of a run on."""
    calls = 0

    def call_or_refuse(*arguments: Any) -> Any:
        """Be the call, or raise what the system would."""
        nonlocal calls
        calls += any((directory / "checkpoints").glob("0*"))
        if calls < at:
            return call(*arguments)
        directory.with_suffix(".fired").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return call_or_refuse
