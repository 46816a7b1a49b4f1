"""A wire between a client and a server that can be cut: nothing goes through any more, and nobody is told."""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self


class Wire:
    """Forwards TCP connections to an address, until it is cut.

    Attributes:
        address: host:port to dial.
        forwarded_bytes: so far.
    """

    def __init__(self, target: str, bytes_per_second: float = math.inf) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._bytes_per_second = bytes_per_second
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._is_cut = threading.Event()
        self.forwarded_bytes = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def cut(self) -> None:
        """Forward nothing any more; connections stay open, and new ones are accepted and never answered."""
        self._is_cut.set()

    def mend(self) -> None:
        """Forward new connections again."""
        self._is_cut.clear()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._sockets.append(near)
                if self._is_cut.is_set():
                    continue
                try:
                    far = socket.create_connection(self._target)
                except OSError:  # nobody listens there yet
                    near.close()
                    continue
                self._sockets.append(far)
                lost = threading.Event()
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, target, lost), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._is_cut.is_set():
                    lost.set()
                if lost.is_set():
                    continue
                time.sleep(len(data) / self._bytes_per_second)
                target.sendall(data)
                self.forwarded_bytes += len(data)
            if not lost.is_set():
                target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
