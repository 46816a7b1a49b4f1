"""Bad messages of a node that has joined, by a program of its own: each must be dropped or refused."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import torch
import zstandard

from gossamer.transport import Address, Expectations, Limits, Message
from gossamer.transport import gossamer_pb2 as pb
from gossamer.transport.calls import DELIVER, DELIVER_STREAM, JOIN, NODE, SERVICE, SESSION, VERSION
from gossamer.transport.frames import Outgoing
from gossamer.transport.limits import FRAME_BYTES

NODE_NAME = "attacker"
LIMITS = Limits(
    message_bytes=1 << 20,
    body_bytes=1 << 12,
    arrays=8,
    inbox_bytes=1 << 24,
    chunk_bytes=1 << 10,
    call_seconds=30.0,
    messages_per_second=1e9,
)
EXPECTED = Address("run", 3, 0, 5, 1)
TAKEN = Address("run", 2, 0, 5, 0)  # taken before
ROW = torch.arange(1000, dtype=torch.float32)

Frames = list[bytes]


def expectations() -> Expectations:
    """Return what a server expects: the two good messages."""
    found = Expectations()
    for address in (TAKEN, EXPECTED):
        found.expect(NODE_NAME, "update", address, {"row": torch.zeros(1000)})
    return found


def good(address: Address = EXPECTED, row: torch.Tensor = ROW, kind: str = "update", **limits: Any) -> Frames:
    """Return the frames of a message."""
    return list(
        Outgoing(Message(kind, address, {}, {"row": row}), Limits(**{"chunk_bytes": 1 << 10, **limits})).frames()
    )


def single(header: pb.Header, data: bytes = b"") -> Frames:
    """Return one frame, with the right digest."""
    encoded = header.SerializeToString()
    digest = hashlib.sha256(encoded + data).digest()
    return [pb.Frame(header=encoded, chunk=data, sha256=digest).SerializeToString()]


def header_of(**changes: Any) -> pb.Header:
    """Return the header of the good message, changed."""
    header = pb.Header.FromString(pb.Frame.FromString(good()[0]).header)
    for name, value in changes.items():
        setattr(header, name, value)
    return header


def specs(described: Any) -> bytes:
    encoded = json.dumps(described).encode()
    return len(encoded).to_bytes(8, "little") + encoded


# ---- one function for each kind; all are made from a generator of random numbers


def too_large(draw: random.Random) -> Frames:
    size = draw.choice([(1 << 20) + 1, 1 << 32, 1 << 45, 2**63])
    arrays = specs({"row": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return single(header_of(num_bytes=size, arrays=arrays))


def large_body(draw: random.Random) -> Frames:
    return single(header_of(body=json.dumps({"x": "y" * draw.randint(1 << 12, 1 << 21)}).encode()))


def many_arrays(draw: random.Random) -> Frames:
    number = draw.randint(9, 2000)
    described = {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(number)}
    return single(header_of(num_bytes=0, arrays=specs(described)))


def large_frame(draw: random.Random) -> Frames:
    return [*good()[:1], bytes(FRAME_BYTES + draw.randint(1, 100))]


def more_data(draw: random.Random) -> Frames:
    frames = good()
    return [*frames[:-1], pb.Frame(chunk=bytes(draw.randint(1, 2000))).SerializeToString(), frames[-1]]


def truncated(draw: random.Random) -> Frames:
    frames = good()
    return frames[: draw.randint(1, len(frames) - 1)]


def frame_left_out(draw: random.Random) -> Frames:
    frames = good()
    del frames[draw.randrange(len(frames))]
    return frames


def frames_swapped(draw: random.Random) -> Frames:
    frames = good()
    i, j = draw.sample(range(len(frames)), 2)
    frames[i], frames[j] = frames[j], frames[i]
    return frames


def cut_frame(draw: random.Random) -> Frames:
    frames = good()
    which = draw.randrange(len(frames))
    frames[which] = frames[which][: draw.randrange(len(frames[which]))]
    return frames


def flipped_bit(draw: random.Random) -> Frames:
    frames = good()
    which = draw.randrange(len(frames))
    changed = bytearray(frames[which])
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    frames[which] = bytes(changed)
    return frames


def wrong_digest(draw: random.Random) -> Frames:
    return [*good()[:-1], pb.Frame(sha256=draw.randbytes(draw.choice([1, 31, 32, 33]))).SerializeToString()]


def wrong_shape(draw: random.Random) -> Frames:
    shape = draw.choice([(999,), (1001,), (1000, 1), (10, 100), (), (0,)])
    return good(row=torch.zeros(shape))


def wrong_dtype(draw: random.Random) -> Frames:
    return good(row=torch.zeros(1000).to(draw.choice([torch.float64, torch.int32, torch.bool, torch.float16])))


def wrong_specs(draw: random.Random) -> Frames:
    described = {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}
    key = draw.choice(list(described))
    described[key] = draw.choice([None, [], [-1], [2**70], [0, 2**63], [4000, 0], "F99", 3.5, {}, [[1000]]])
    return single(header_of(arrays=specs({"row": described})), bytes(4000))


def random_specs(draw: random.Random) -> Frames:
    return single(header_of(arrays=draw.randbytes(draw.randint(0, 100)), num_bytes=draw.randint(0, 4000)), bytes(4000))


def wrong_address(draw: random.Random) -> Frames:
    run, round, sender = draw.choice(
        [("other", 3, 5), ("run", draw.randint(4, 2**31), 5), ("run", 3, draw.randint(6, 99))]
    )
    return good(Address(run, round, 0, sender, draw.randint(0, 3)))


def malformed_address(draw: random.Random) -> Frames:
    header = header_of()
    changes: Sequence[tuple[str, Any]] = [("run", "\n" * 9), ("run", ""), ("sender", -2), ("run", "x" * 10_000)]
    setattr(header.address, *draw.choice(changes))
    return single(header, ROW.numpy().tobytes())


def wrong_attempt(draw: random.Random) -> Frames:
    return good(Address("run", 3, 0, 5, draw.choice([0, 2, 7, 2**32 - 1])))


def stale(draw: random.Random) -> Frames:
    return good(Address("run", draw.randint(0, 1), 0, 5, draw.randint(0, 9)))


def replayed(draw: random.Random) -> Frames:
    return good(TAKEN)


def wrong_kind(draw: random.Random) -> Frames:
    header = header_of(kind=draw.choice(["", "stop", "train", "../../etc", "u" * 1000]))
    return single(header, ROW.numpy().tobytes())


def bad_body(draw: random.Random) -> Frames:
    body = draw.choice([b"[]", b"{", b"\xff", b'"x"', b"[" * 4000, b'{"a":' * 700, b"1" * 4000, b"null"])
    return single(header_of(body=body), ROW.numpy().tobytes())


def random_bytes(draw: random.Random) -> Frames:
    return [draw.randbytes(draw.randint(0, 3000)) for _ in range(draw.randint(1, 5))]


def random_after_header(draw: random.Random) -> Frames:
    return [good()[0], *random_bytes(draw)]


def bomb(draw: random.Random) -> Frames:
    """A chunk that says that it is large, or does not say how large it is, or says so of less than it is."""
    size = draw.choice([4001, 1 << 20, 1 << 23])
    packed = zstandard.ZstdCompressor(write_content_size=draw.random() < 0.7).compress(bytes(size))
    return packed_frames(packed)


def bomb_that_lies(draw: random.Random) -> Frames:
    packed = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    at = packed.index((1 << 20).to_bytes(4, "little"))
    packed[at : at + 4] = draw.choice([0, 1, 4000, 2**31]).to_bytes(4, "little")
    return packed_frames(bytes(packed))


def bomb_of_random_bytes(draw: random.Random) -> Frames:
    return packed_frames(draw.choice([b"", b"\x28\xb5\x2f\xfd"]) + draw.randbytes(draw.randint(1, 100)))


def packed_frames(packed: bytes) -> Frames:
    encoded = header_of(compression=pb.ZSTD).SerializeToString()
    digest = hashlib.sha256(encoded + bytes(4000)).digest()
    return [pb.Frame(header=encoded, chunk=packed, sha256=digest).SerializeToString()]


def unknown_compression(draw: random.Random) -> Frames:
    return single(header_of(compression=draw.randint(2, 100)), ROW.numpy().tobytes())


def two_headers(draw: random.Random) -> Frames:
    frames = good()
    frames.insert(draw.randint(1, len(frames) - 1), frames[0])
    return frames


def empty_frames(draw: random.Random) -> Frames:
    return [good()[0], *[b""] * draw.randint(1, 10)]


KINDS: dict[str, Callable[[random.Random], Frames]] = {
    kind.__name__: kind
    for kind in (
        too_large,
        large_body,
        many_arrays,
        large_frame,
        more_data,
        truncated,
        frame_left_out,
        frames_swapped,
        cut_frame,
        flipped_bit,
        wrong_digest,
        wrong_shape,
        wrong_dtype,
        wrong_specs,
        random_specs,
        wrong_address,
        malformed_address,
        wrong_attempt,
        stale,
        replayed,
        wrong_kind,
        bad_body,
        random_bytes,
        random_after_header,
        bomb,
        bomb_that_lies,
        bomb_of_random_bytes,
        unknown_compression,
        two_headers,
        empty_frames,
    )
}


def cases(number: int, seed: str) -> Iterator[tuple[str, Frames]]:
    """Yield bad messages, of all kinds in turn."""
    names = list(KINDS)
    for index in range(number):
        name = names[index % len(names)]
        yield name, KINDS[name](random.Random(f"{seed}-{index}"))


class Attacker:
    """Joins as a node that keeps to the rules, and then does not."""

    def __init__(self, address: str) -> None:
        options = [("grpc.max_send_message_length", -1)]
        self._closed = threading.Event()
        self._channel = grpc.insecure_channel(address, options)
        self._metadata = [(NODE, NODE_NAME)]
        hello = pb.Hello(version=VERSION, instance="x").SerializeToString()
        self._call = self._channel.unary_stream(f"/{SERVICE}/{JOIN}")(hello, timeout=3600, metadata=self._metadata)
        self._metadata.append((SESSION, pb.Frame.FromString(next(self._call)).welcome.session))
        self._deliver = self._channel.unary_unary(f"/{SERVICE}/{DELIVER}")
        self._deliver_stream = self._channel.stream_unary(f"/{SERVICE}/{DELIVER_STREAM}")

    def send(self, frames: Frames) -> str:
        """Send frames; returns "taken", "dropped: " with the reason, or "failed: " with a status."""
        try:
            if len(frames) == 1:
                answer = self._deliver(frames[0], timeout=30, metadata=self._metadata)
            else:
                answer = self._deliver_stream(iter(frames), timeout=30, metadata=self._metadata)
        except grpc.RpcError as error:
            return f"failed: {error.code().name}"  # type: ignore[attr-defined]
        receipt = pb.Receipt.FromString(answer)
        return "taken" if receipt.outcome == pb.TAKEN else f"dropped: {receipt.reason}"

    def begin(self, frames: Frames) -> Any:
        """Send frames, and leave the call open; returns it."""

        def and_wait() -> Iterator[bytes]:
            yield from frames
            self._closed.wait(30)

        return self._deliver_stream.future(and_wait(), timeout=30, metadata=self._metadata)

    def close(self) -> None:
        self._closed.set()
        self._call.cancel()
        self._channel.close()
