"""Where actors come from, and what is handed to them."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.engines.base import Record
from gossamer.errors import EngineError
from gossamer.registry import load_object
from gossamer.workloads.datasets import ImageData


def make_actor(cls: type, *arguments: Any, num_gpus: int = 0) -> Callable[[], Any]:
    """Return what starts an actor of one CPU, with GPUs of its own if asked.

    Ray neither restarts it nor repeats its calls, since `ActorPool` does.
    """

    def make() -> Any:
        """Start one."""
        import ray

        return ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(cls).remote(*arguments)

    return make


def num_cpus() -> int:
    """Return the number of CPUs of the cluster."""
    return max(1, _resource("CPU"))


def num_gpus() -> int:
    """Return the number of GPUs of the cluster."""
    return _resource("GPU")


def _resource(name: str) -> int:
    import ray

    resources: Mapping[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get(name, 0))


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Return tensors as numpy arrays on the same memory, which Ray stores without pickling their data."""
    return {name: value.numpy() for name, value in tensors.items()}


def put_data(workload: Any) -> list[Any]:
    """Put a workload's data into the object store, so that all actors of a node read one copy.

    Returns:
        [a reference]: in a list, for an actor to fetch when it can; [] if its class does not take ``data``, or its
        data are no dataclass that other processes can import, or are read while training: then every actor loads its
        own.
    """
    if "data" not in inspect.signature(type(workload)).parameters:
        return []
    data = workload.data
    has_name = type(data).__module__ != "__main__" and "<locals>" not in type(data).__qualname__
    if not (dataclasses.is_dataclass(data) and has_name) or (isinstance(data, ImageData) and data.is_lazy):
        return []
    import ray

    return [ray.put(pack(data))]


def get_data(references: list[Any]) -> Any:
    """Return what `put_data` put; its tensors must not be written to. None if there is nothing."""
    if not references:
        return None
    return unpack(*get_or_end(references[0]))


def get_or_end(reference: Any) -> Any:
    """Return an object of the store, in an actor, which ends where its node's daemon is gone.

    It would be ended soon by itself; until then Ray raises errors of sockets, which look like errors of the call.
    """
    import ray

    try:
        return ray.get(reference)
    except OSError:
        os._exit(1)


def pack(data: Any) -> tuple[str, Record]:
    """Return ``module:name`` of a dataclass, and what its fields hold, with arrays for tensors."""
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data) if field.init}
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in values.items()}
    return f"{type(data).__module__}:{type(data).__qualname__}", arrays


def unpack(name: str, arrays: Record) -> Any:
    """Return the dataclass, on the memory of the arrays."""
    values = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in arrays.items()}
    return load_object(name)(**values)


CONNECT_SECONDS = 10.0  # in which a cluster must answer


def start_ray(address: str | None, num_cpus: int | None) -> Callable[[], None]:
    """Start a Ray of our own on this machine, or join a cluster; return what stops or leaves it.

    Args:
        address: None for a Ray of our own, else "auto" or the address of a cluster.
        num_cpus: number of CPUs of a Ray that is started here; None: all.

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
        with _own_signals():
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


DAEMONS = ("raylet", "gcs_server")


def watch_daemons() -> Callable[[], None]:
    """Return what raises an `EngineError` once a daemon of a Ray that this process has started is gone.

    Calls would not fail then, but wait; of a cluster that was joined it tells nothing.
    """
    parent = str(os.getpid())
    found = {path: _status(path) for path in Path("/proc").glob("[0-9]*/stat")}
    ours = {path: name for path, (name, state, of) in found.items() if of == parent and name in DAEMONS}

    def check() -> None:
        """Look at each of them."""
        for path, name in ours.items():
            if _status(path)[:2] in ((name, "Z"), (name, "X"), ("", "")):
                raise EngineError(
                    f"Ray's process {name} ended, as when it was killed or memory was short: look at the logs in"
                    " /tmp/ray/session_latest/logs, then resume"
                )

    return check


def _status(path: Path) -> tuple[str, str, str]:
    """Return name, state and parent of a process, empty where it is gone."""
    try:
        name, _, rest = path.read_text(errors="replace").partition("(")[2].rpartition(")")
    except OSError:
        return "", "", ""
    state, parent = rest.split()[:2]
    return name, state, parent


def _require_answer(address: str | None) -> None:
    """Raise an `OSError` unless somebody listens at ``host:port``, because Ray would wait for hours."""
    meant = os.environ.get("RAY_ADDRESS") if address == "auto" else address
    host, _, port = (meant or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep who handles SIGTERM: Ray would exit at once, where a run stops politely.

    Ray's processes do not heed a terminal that hangs up, which is told to all of them: a run commits what they hold.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGQUIT))  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main and callable(before):
            signal.signal(signal.SIGTERM, before)
