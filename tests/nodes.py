"""Nodes of a federation as threads of a test."""

from __future__ import annotations

import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from gossamer.engines.network.client import ClientNode
from gossamer.task import task_of
from gossamer.transport import Client
from gossamer.transport.audit import no_audit
from gossamer.transport.messages import Audit

HOOKED: list[bool] = []
UNPICKLED: list[list[str]] = []  # of those who watch: audit hooks cannot be removed


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        for found in UNPICKLED:
            found.append(str(arguments))


@contextmanager
def unpickling() -> Iterator[list[str]]:
    """Watch what any thread of this process looks up while it unpickles."""
    if not HOOKED:
        sys.addaudithook(_watch)
        HOOKED.append(True)
    found = list[str]()
    UNPICKLED.append(found)
    try:
        yield found
    finally:
        UNPICKLED.remove(found)


def free_port() -> int:
    """Return a port on which nobody listens, below those that the system gives to connections in the meantime."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port


def client_in_thread(address: str, task: Any, directory: Path, *, audit: Audit = no_audit, **options: Any) -> Thread:
    """Start a node that is client 3 of whatever run a server at an address has; a task is what it trains."""
    node = ClientNode(
        dial=lambda hello, seconds: Client(address, name="a", hello=hello, timeout_seconds=seconds, audit=audit),
        clients=[3],
        make_task=lambda config: task,
        directory=directory,
        audit=audit,
        **options,
    )
    thread = Thread(target=node.run, daemon=True)
    thread.start()
    return thread


class Nodes:
    """Nodes in threads of this process, each of which is some clients, and dials one server."""

    def __init__(self, directory: Path) -> None:
        self.address, self._directory = f"127.0.0.1:{free_port()}", directory
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()
        self.errors: list[BaseException] = []

    def start(
        self, clients: Sequence[int], make_task: Callable[[Mapping[str, Any]], Any] = task_of, **options: Any
    ) -> None:
        """Start a node."""
        name = f"node-{clients[0]}"

        def dial(hello: Mapping[str, Any], seconds: float) -> Client:
            """Dial the server."""
            return Client(self.address, name=name, hello=hello, timeout_seconds=seconds)

        given = {"is_simulated": True, "linger_seconds": 0.0, "patience_seconds": 60.0} | options
        node = ClientNode(
            dial=dial,
            clients=clients,
            make_task=make_task,
            directory=self._directory / name,
            stop=self._over.is_set,
            **given,
        )
        self._threads.append(threading.Thread(target=self._run, args=(node,), daemon=True))
        self._threads[-1].start()

    def _run(self, node: ClientNode) -> None:
        try:
            node.run()
        except BaseException as error:
            self.errors.append(error)

    def join(self) -> None:
        """Wait for all of them to end."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def end(self) -> None:
        """End them."""
        self._over.set()
        self.join()


def real(config: Mapping[str, Any], nodes: Nodes, **engine: Any) -> dict[str, Any]:
    """Return a configuration whose clients are nodes."""
    return {**config, "engine": {**config["engine"], "name": "network", "address": nodes.address, **engine}}
