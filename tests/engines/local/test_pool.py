"""The pool of worker processes: who gets what, in which order replies come, and how it ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import environment, wait_for
from gossamer.engines.local.pool import JOBS_AHEAD, Handler, Message, WorkerPool
from gossamer.errors import DataError, EngineError, GossamerError

MakePool = Callable[[int, Handler], WorkerPool]
PROGRAM = """
import os, signal
from gossamer.engines.local.pool import WorkerPool
def handler(message):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: print may write the end of the line apart
    if message["stuck"]:
        signal.pause()
    return {}
pool = WorkerPool(3, lambda _: handler)
list(pool.map(({"stuck": number == 0} for number in range(3)), lambda: False))
"""


def never() -> bool:
    return False


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or a zombie that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Make pools that are closed after the test."""
    made: list[WorkerPool] = []

    def make(num_workers: int, handler: Handler) -> WorkerPool:
        made.append(WorkerPool(num_workers, lambda _: handler))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def echo(message: Message) -> Message:
    return message | {"pid": os.getpid()}


class TestMap:
    @pytest.mark.parametrize("num_workers", [1, 2, 3])
    @pytest.mark.parametrize("num_jobs", [0, 1, 2, 3, 20])
    def test_one_reply_a_job(self, make_pool: MakePool, num_workers: int, num_jobs: int) -> None:
        pool = make_pool(num_workers, echo)
        for _ in range(2):  # a pool is used again and again
            replies = list(pool.map(({"n": n} for n in range(num_jobs)), never))
            assert sorted(reply["n"] for reply in replies) == list(range(num_jobs))
            if num_workers == 1:
                assert [reply["n"] for reply in replies] == list(range(num_jobs))

    def test_few_jobs_are_shared_evenly(self, make_pool: MakePool) -> None:
        replies = list(make_pool(3, echo).map(({} for _ in range(3)), never))
        assert len({reply["pid"] for reply in replies}) == 3
        assert os.getpid() not in {reply["pid"] for reply in replies}

    def test_replies_come_as_they_arrive(self, make_pool: MakePool) -> None:
        """One worker is held up until all other jobs are done; they are given to the other one."""
        released: Event = multiprocessing.get_context("fork").Event()

        def handler(message: Message) -> Message:
            assert message["n"] > 0 or released.wait(60)
            return message

        arrived = []
        for reply in make_pool(2, handler).map(({"n": n} for n in range(12)), never):
            arrived.append(reply["n"])
            if len(arrived) == 12 - JOBS_AHEAD:
                released.set()
        assert arrived[-JOBS_AHEAD:] == [0, 2]  # what the first worker was given ahead

    def test_jobs_are_drawn_as_needed(self, make_pool: MakePool) -> None:
        drawn = 0

        def jobs() -> Iterator[Message]:
            nonlocal drawn
            for n in range(50):
                drawn += 1
                yield {"n": n}

        replies = make_pool(2, echo).map(jobs(), never)
        assert drawn == 0
        for received in range(1, 51):
            next(replies)
            assert drawn <= 2 * JOBS_AHEAD + received - 1

    def test_numbers_survive(self, make_pool: MakePool) -> None:
        numbers = [0.1, 1e-300, -0.0, float("inf"), 2**60, 1 / 3]
        (reply,) = make_pool(1, echo).map([{"numbers": numbers}], never)
        assert reply["numbers"] == numbers
        (reply,) = make_pool(1, echo).map([{"n": float("nan")}], never)
        assert reply["n"] != reply["n"]


class TestStop:
    def test_a_stuck_worker_is_not_waited_for(self, make_pool: MakePool) -> None:
        def handler(message: Message) -> Message:
            if message["n"] == 1:
                signal.pause()
            return message

        stopped = []
        pool = make_pool(2, handler)
        replies = pool.map(({"n": n} for n in range(4)), lambda: len(stopped) > 0)
        first = next(replies)
        stopped.append(True)
        assert first["n"] == 0
        assert {reply["n"] for reply in replies} <= {2}

    def test_close_ends_busy_and_idle_workers(self, make_pool: MakePool) -> None:
        def handler(message: Message) -> Message:
            if message.get("stuck"):
                signal.pause()
            return {"pid": os.getpid()}

        pool = make_pool(2, handler)
        pids = {reply["pid"] for reply in pool.map(({} for _ in range(2)), never)}
        next(pool.map([{}, {"stuck": True}], never))
        pool.close()
        assert all(is_gone(pid) for pid in pids)
        pool.close()  # harmless

    def test_workers_vanish_with_a_killed_parent(self) -> None:
        """Busy or idle: nothing is left of them, although nobody told them to go."""
        command = [sys.executable, "-c", PROGRAM]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True) as parent:
            assert parent.stdout is not None
            pids = [json.loads(parent.stdout.readline()) for _ in range(3)]
            assert len(set(pids)) == 3
            assert not any(is_gone(pid) for pid in pids)
            parent.kill()
            wait_for(lambda: all(is_gone(pid) for pid in pids))


class TestWorkers:
    def test_surroundings(self, make_pool: MakePool) -> None:
        """One thread each; Ctrl-C is the parent's business; what the parent had in memory is there."""
        shared, before = torch.arange(5), torch.get_num_threads()

        def handler(message: Message) -> Message:
            os.kill(os.getpid(), signal.SIGINT)
            return {"threads": torch.get_num_threads(), "sum": int(shared.sum()), "pid": os.getpid()}

        torch.set_num_threads(2)
        handler_before = signal.signal(signal.SIGINT, signal.default_int_handler)
        pool = make_pool(2, handler)
        signal.signal(signal.SIGINT, handler_before)
        torch.set_num_threads(before)
        replies = list(pool.map(({} for _ in range(4)), never))
        assert [(reply["threads"], reply["sum"]) for reply in replies] == [(1, 10)] * 4

    def test_a_handler_of_its_own(self) -> None:
        """`make_handler` runs in each worker, after the fork."""

        def make_handler() -> Handler:
            made_in, calls = os.getpid(), []

            def handle(message: Message) -> Message:
                calls.append(message)
                return {"made_in": made_in, "pid": os.getpid(), "calls": len(calls)}

            return handle

        pool = WorkerPool(2, lambda _: make_handler())
        replies = list(pool.map(({} for _ in range(2)), never))
        pool.close()
        assert all(reply["made_in"] == reply["pid"] and reply["calls"] == 1 for reply in replies)

    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (
                ValueError("no\nway"),
                EngineError,
                r"^worker process \d+ failed with ValueError: no way \(.*test_pool.py, l",
            ),
            (KeyError(), EngineError, r"failed with KeyError \(.*, line \d+\): correct it; engine.workers=0 trains in"),
            (DataError("no data: add some"), GossamerError, "^no data: add some$"),
            (MemoryError("no"), GossamerError, r"^memory is short \(.*\): take a smaller model"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_failures(self, make_pool: MakePool, error: Exception, kind: Any, message: str) -> None:
        def handler(_: Message) -> Message:
            raise error

        with pytest.raises(kind, match=message) as caught:
            list(make_pool(2, handler).map([{}, {}], never))
        assert "\n" not in str(caught.value)
        notes = getattr(caught.value, "__notes__", [])
        assert [note.startswith("Traceback (most recent call last)") for note in notes] == [True] * (
            kind is EngineError
        )

    def test_one_that_hangs_is_replaced(self, tmp_path: Path) -> None:
        """It neither answers nor uses the processor; one that does is left alone, however long it takes."""
        flag = tmp_path / "flag"
        flag.touch()

        def handler(message: Message) -> Message:
            if message["n"] == 1 and flag.exists():
                flag.unlink()
                signal.pause()
            until = time.process_time() + 0.5
            while message["n"] == 0 and time.process_time() < until:
                pass
            return message

        told: list[Any] = []
        pool = WorkerPool(
            2, lambda _: handler, silent_seconds=0.3, on_event=lambda kind, **fields: told.append((kind, fields))
        )
        assert sorted(reply["n"] for reply in pool.map(({"n": n} for n in range(4)), never)) == [0, 1, 2, 3]
        pool.close()
        ((kind, fields),) = told
        assert kind == "worker-replaced"
        assert fields["reason"].startswith("gave no sign of life for ")

    @pytest.mark.parametrize("code", [1, 3])
    def test_death(self, make_pool: MakePool, code: int) -> None:
        def handler(_: Message) -> Message:
            os._exit(code)

        pool = make_pool(2, handler)
        for _ in range(2):  # the first time on waiting for the reply, then on sending
            with pytest.raises(EngineError, match=rf"worker process \d+ died with exit code {code} .*resume the run"):
                list(pool.map([{}], never))
