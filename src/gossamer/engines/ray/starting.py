"""A Ray of our own, or a cluster to join."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gossamer.errors import EngineError

CONNECT_SECONDS = 10.0  # in which a cluster must answer


def start_ray(address: str | None, num_cpus: int | None) -> Callable[[], None]:
    """Start a Ray of our own on this machine, or join a cluster; return what stops or leaves it.

    Args:
        address: None for a Ray of our own, else "auto" or the address of a cluster.
        num_cpus: of a Ray of our own; None: all.

    Raises:
        EngineError: there is no such cluster, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:  # seconds that Ray's agents look for a head that was killed with us, before they go too
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
        # Ray's server would keep a record of every call, up to 100,000, for a dashboard that is not there.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        # What is freed is soon written again, where its pages are; Ray would wait a second and take fresh ones.
        os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")
        if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
            # Ray listens to other machines, and runs what they send; it reads these when it is imported.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    if ray.is_initialized():
        return lambda: None
    given: dict[str, Any] = {"address": address or "local"}  # "local" where another Ray runs here, too
    if address is None:
        given |= {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        _require_answer(address)
        with _same_sigterm():
            ray.init(**given, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split())[:300]
        if address is None:
            raise EngineError(f"cannot start Ray ({reason}): look at what gossamer doctor says") from None
        raise EngineError(
            f"cannot join the Ray cluster at {address!r} ({reason}): start it with ray start --head, give its token by"
            " RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH if it asks for one, or leave engine.address out"
        ) from None
    return ray.shutdown


def is_running() -> bool:
    """Say whether this process has started or joined a Ray already."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _require_answer(address: str | None) -> None:
    """Raise an `OSError` unless somebody listens at ``host:port``, because Ray would wait for hours."""
    meant = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    host, _, port = (meant or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Keep who handles SIGTERM: Ray would exit at once, where a run stops politely."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_main and callable(before):
            signal.signal(signal.SIGTERM, before)
