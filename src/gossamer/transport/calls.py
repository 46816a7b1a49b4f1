"""What the server's and the client's side of a call share: names, options, deadlines and waits."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from gossamer.transport.limits import FRAME_BYTES, Limits

VERSION = 1  # of the protocol
SERVICE = "gossamer.transport.v1.Transport"
JOIN, DELIVER, DELIVER_STREAM = "Join", "Deliver", "DeliverStream"
NODE, TOKEN, SESSION = "gossamer-node", "gossamer-token", "gossamer-session"  # keys of metadata
LONGEST_WAIT_SECONDS = 5.0
WINDOW_BYTES = 2 << 20  # of one call, that may be on its way
_METADATA_BYTES = 8192


class Failure(Exception):
    """A call fails with a status of gRPC.

    Attributes:
        code: name of the status.
        sentence: what the caller is told.
    """

    def __init__(self, code: str, sentence: str) -> None:
        """Keep both."""
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


def options(limits: Limits) -> list[tuple[str, int]]:
    """Return the options of a server or a channel of gRPC."""
    alive, answer = round(limits.keepalive_seconds * 1000), round(limits.keepalive_timeout_seconds * 1000)
    return [
        ("grpc.max_receive_message_length", FRAME_BYTES),
        ("grpc.max_send_message_length", FRAME_BYTES),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES),
        ("grpc.keepalive_time_ms", alive),
        ("grpc.keepalive_timeout_ms", answer),
        ("grpc.http2.ping_timeout_ms", round(limits.silence_seconds * 1000)),
        # A window that is found by pings grows until these wait behind megabytes of data, on a slow line for too long.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", alive),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", min(alive, 500)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.enable_retries", 0),
    ]


def waits(seconds: float) -> Iterator[float]:
    """Sleep between attempts, with exponential backoff and jitter, and yield the seconds left; ends after `seconds`.

    The first attempt is at once.
    """
    end, longest = time.monotonic() + seconds, 0.1
    yield seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, longest * random.uniform(0.5, 1.0)))
        longest = min(2 * longest, LONGEST_WAIT_SECONDS)
        if (left := end - time.monotonic()) > 0:
            yield left
