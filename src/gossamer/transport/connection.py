"""A client's connection to its server, until it is lost."""

from __future__ import annotations

import threading
from typing import Any, Protocol

from gossamer.errors import Disconnected, Dropped, GossamerError, Refused, TransportError, one_line
from gossamer.profiling import recorder
from gossamer.transport import gossamer_pb2 as pb
from gossamer.transport.calls import DELIVER, DELIVER_STREAM, JOIN, NODE, SERVICE, SESSION, TOKEN, options
from gossamer.transport.credentials import Credentials
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import Counts, Limits
from gossamer.transport.messages import Json, decode_json
from gossamer.transport.order import Busy
from gossamer.transport.reading import Frames

_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_BUSY = ("ABORTED", "RESOURCE_EXHAUSTED")
_FOREIGN = ("CERTIFICATE_VERIFY_FAILED", "certificate signature failure", "Hostname Verification")  # said by TLS


class Joining(Protocol):
    """Who joins: called in the thread that reads."""

    def begin(self, server_id: str) -> None:
        """Be told, before any message is read, which server it is."""

    def read(self, frames: Frames) -> None:
        """Read one message."""

    def end(self) -> None:
        """Be told that the connection is lost."""


class Connection:
    """One channel of gRPC, the call that joined on it, and the thread that reads what the server sends.

    Attributes:
        welcome: what the server said when this node joined.
        error: why the connection is lost; None: it is not.
    """

    def __init__(
        self,
        server: str,
        name: str,
        credentials: Credentials | None,
        server_name: str | None,
        limits: Limits,
        counts: Counts,
    ) -> None:
        """Dial; nothing is sent yet."""
        import grpc

        arguments: list[tuple[str, int | str]] = [*options(limits), ("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            self._channel = grpc.insecure_channel(server, arguments)
        else:
            if server_name is not None:
                arguments.append(("grpc.ssl_target_name_override", server_name))
            secure = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
            self._channel = grpc.secure_channel(server, secure, arguments)
        self._limits = limits
        self._counts = counts
        self._metadata = [(NODE, name), (TOKEN, credentials.token if credentials is not None else "")]
        self._join = self._channel.unary_stream(f"/{SERVICE}/{JOIN}")
        self._deliver = self._channel.unary_unary(f"/{SERVICE}/{DELIVER}")
        self._deliver_stream = self._channel.stream_unary(f"/{SERVICE}/{DELIVER_STREAM}")
        self._call: Any = None
        self._settled = threading.Event()  # joined, or lost
        self.welcome: Json = {}
        self.error: TransportError | None = None

    def join(self, hello: bytes, timeout_seconds: float, client: Joining) -> None:
        """Join, and read messages in a thread from then on.

        Args:
            hello: encoded `Hello`.
            client: who reads what comes.

        Raises:
            TransportError: the node could not join.
        """
        self._call = self._join(hello, timeout=self._limits.join_seconds, metadata=self._metadata)
        threading.Thread(target=self._read, args=(client,), name="transport-reader", daemon=True).start()
        if not self._settled.wait(timeout_seconds):
            self.close(Disconnected("no answer"))
        if self.error is not None:
            raise self.error

    def deliver(self, outgoing: Outgoing, timeout_seconds: float) -> Any:
        """Send one message; returns the receipt.

        Raises:
            Busy: the server cannot take it now.
            TransportError: it is refused, or the connection is lost.
        """
        import grpc

        try:
            if outgoing.is_one_frame:
                answer = self._deliver(next(outgoing.frames()), timeout=timeout_seconds, metadata=self._metadata)
            else:
                answer = self._deliver_stream(outgoing.frames(), timeout=timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        finally:
            self._counts.add(sent_bytes=outgoing.wire_bytes)
            recorder.count_bytes(lambda: outgoing.wire_bytes)
        return pb.Receipt.FromString(answer)

    def close(self, error: TransportError) -> None:
        """Give the connection up."""
        self.error = self.error or error
        if self._call is not None:
            self._call.cancel()
        self._channel.close()
        self._settled.set()

    def _read(self, client: Joining) -> None:
        """Read all that the server sends, until the call ends."""
        import grpc

        try:
            frames = Frames(self._call, self._counts)
            self._start(frames, client)
            while True:
                client.read(frames)
        except grpc.RpcError as error:
            self.error = self.error or error_of(error)
        except Dropped as error:
            self.error = self.error or Disconnected(f"the server sends what is no message ({error.reason})")
        except GossamerError as error:
            self.error = self.error or TransportError(str(error))
        except Exception as error:
            self.error = self.error or TransportError(f"reading a message fails with {one_line(error)}")
        self._call.cancel()
        self._settled.set()
        client.end()

    def _start(self, frames: Frames, client: Joining) -> None:
        """Read the server's welcome."""
        frame = frames.read()
        if frame is None or frame.welcome is None:
            raise Dropped("no welcome")
        self._metadata.append((SESSION, frame.welcome.session))
        self.welcome = decode_json(frame.welcome.body, self._limits.body_bytes)
        client.begin(frame.welcome.server)
        self._settled.set()


def error_of(error: Any) -> TransportError:
    """Return what an error of gRPC means to a client."""
    code, sentence = error.code().name, " ".join((error.details() or "").split())
    if code in _REFUSALS:
        return Refused(sentence)
    if code in _BUSY:
        return Busy(sentence)
    if code == "INVALID_ARGUMENT":
        return TransportError(sentence)
    if any(words in sentence for words in _FOREIGN):
        return Foreign(f"what answers there is no server of this federation: its certificate does not fit ({sentence})")
    if code == "UNIMPLEMENTED":
        return Foreign("what answers there is no server of gossamer, or of another version")
    if code == "DEADLINE_EXCEEDED":
        return Disconnected("the server did not answer in time")
    return Disconnected(sentence or code)


class Foreign(Disconnected):
    """What answers is none of this federation, so there is no use in trying again."""
