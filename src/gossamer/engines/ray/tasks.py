"""Independent pieces of work as Ray tasks of one CPU each."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gossamer.engines.ray.actor_pool import POLL_SECONDS
from gossamer.engines.ray.cluster import start_ray, watch_daemons
from gossamer.registry import load_object

MAX_RETRIES = 3  # of a task whose worker or node died
STOP_SECONDS = 60.0  # that a task has for stopping politely


def run_tasks(
    function: str,
    messages: Mapping[str, str],
    *,
    address: str | None = None,
    num_parallel: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, str | Exception]]:
    """Call a function once for every message, and yield (key, what came of it) as the calls end.

    A call whose worker or node died is made again, so it must continue what it finds begun. Once `stop` turns true,
    calls that wait are dropped, and those that run are interrupted as by Ctrl-C and get `STOP_SECONDS` to return.

    Args:
        function: ``module:attr``, which takes and returns a string.
        messages: ``{key: argument}``.
        address: None: a Ray of our own; else "auto" or the address of a cluster.
        num_parallel: most calls at once; None: as many as there are CPUs.

    Raises:
        EngineError: Ray does not start, or there is no such cluster.
    """
    leave = start_ray(address, num_parallel)
    try:
        yield from _run(function, messages, num_parallel or len(messages), stop)
    finally:
        leave()


def _run(
    function: str, messages: Mapping[str, str], num_parallel: int, stop: Callable[[], bool]
) -> Iterator[tuple[str, str | Exception]]:
    import ray

    origin = [os.path.abspath(path) for path in sys.path], os.getcwd()
    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(_call)
    waiting, flying = deque(messages.items()), dict[Any, str]()
    deadline, check = float("inf"), watch_daemons()
    while (waiting or flying) and time.monotonic() < deadline:
        while waiting and len(flying) < num_parallel:
            key, message = waiting.popleft()
            flying[remote.remote(function, message, origin)] = key
        check()
        ready, _ = ray.wait(list(flying), num_returns=1, timeout=POLL_SECONDS)
        for one in ready:
            yield flying.pop(one), _result(one)
        if stop() and deadline == float("inf"):
            deadline = time.monotonic() + STOP_SECONDS
            waiting.clear()
            for one in flying:
                ray.cancel(one)


def _result(reference: Any) -> str | Exception:
    import ray

    try:
        found: str = ray.get(reference)
    except ray.exceptions.RayError as error:
        return error
    return found


def _call(function: str, message: str, origin: tuple[list[str], str]) -> str:
    """Do one piece of work where the driver would: with its modules, and its folder if this machine has it."""
    import torch

    paths, folder = origin
    sys.path += [path for path in paths if path not in sys.path]
    if os.path.isdir(folder):
        os.chdir(folder)
    torch.set_num_threads(1)
    found: str = load_object(function)(message)
    return found
