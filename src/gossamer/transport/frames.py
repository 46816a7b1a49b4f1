"""Messages as frames: one header, chunks of data, a digest at last (`gossamer.proto`).

A chunk is by far the most of what is sent. Its frame is therefore put together, and taken apart, by hand: protobuf's
own code would copy it twice more at either end. What comes out is what that code makes, which a test holds it against.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from torch import Tensor

from gossamer.errors import Dropped, TransportError
from gossamer.profiling import recorder
from gossamer.transport import arrays as wire
from gossamer.transport import gossamer_pb2 as pb
from gossamer.transport.digests import Digest
from gossamer.transport.limits import MAX_CHUNK_BYTES, Limits
from gossamer.transport.messages import Address, Header, Message, check_address, decode_json, encode_json
from gossamer.transport.zstd import compress, decompress

GRPC_BYTES = 5  # that gRPC puts before each frame
_CHUNK_TAG = b"\x12"  # field 2, bytes


class Frame(NamedTuple):
    """A frame's fields; those that it lacks are empty."""

    header: bytes
    chunk: memoryview
    sha256: bytes
    welcome: Any


class Outgoing:
    """A message that is ready to be sent; nothing of its arrays is copied before they are."""

    def __init__(self, message: Message, limits: Limits) -> None:
        """Check the message, and encode its header.

        Raises:
            TransportError: it is malformed or over a limit.
        """
        check_address(message.kind, message.address)
        arrays = wire.in_order(message.arrays)
        self.message = message
        self.num_bytes = message.num_bytes
        if self.num_bytes > limits.message_bytes or len(arrays) > limits.arrays:
            raise TransportError(
                f"message {message.kind!r} of {len(arrays)} arrays and {self.num_bytes} bytes is over the limits of"
                f" {limits.arrays} and {limits.message_bytes}: send less, or raise them at both ends"
            )
        self._compression = limits.compression
        self._chunk_bytes = limits.chunk_bytes
        with recorder.span("serialise"):
            self.header: bytes = pb.Header(
                address=pb.Address(**vars(message.address)),
                kind=message.kind,
                body=encode_json(message.body, limits.body_bytes),
                arrays=wire.encode_specs(arrays),
                num_bytes=self.num_bytes,
                compression=pb.ZSTD if limits.compression == "zstd" else pb.NONE,
            ).SerializeToString()
            recorder.count_bytes(lambda: len(self.header))
        self._views = [wire.view_of(array) for array in arrays.values() if array.numel()]
        self.wire_bytes = 0
        self.sha256 = ""

    @property
    def is_one_frame(self) -> bool:
        """Whether it fits into one frame."""
        return self.num_bytes <= self._chunk_bytes

    def frames(self) -> Iterator[bytes]:
        """Yield the frames, each made when it is asked for; then `wire_bytes` and `sha256` are known."""
        self.wire_bytes = 0
        for frame in self._single() if self.is_one_frame else self._stream():
            self.wire_bytes += len(frame) + GRPC_BYTES
            yield frame

    def _single(self) -> Iterator[bytes]:
        with recorder.span("serialise", self.num_bytes):
            data = b"".join(self._views)
        with recorder.span("checksum", self.num_bytes):
            digest = hashlib.sha256(self.header)
            digest.update(data)
        self.sha256 = digest.hexdigest()
        yield self._frame(header=self.header, chunk=self._packed(data), sha256=digest.digest())

    def _stream(self) -> Iterator[bytes]:
        digest = Digest(self.header)
        yield self._frame(header=self.header)
        for pieces, size in in_chunks(self._views, self._chunk_bytes):
            if self._compression == "none":
                prefix = _CHUNK_TAG + _varint(size)
                with recorder.span("serialise", size):
                    frame = b"".join((prefix, *pieces))
                digest.update(memoryview(frame)[len(prefix) :])
            else:
                data = b"".join(pieces)
                digest.update(memoryview(data))
                packed = self._packed(data)
                frame = b"".join((_CHUNK_TAG, _varint(len(packed)), packed))
            yield frame
        sha256 = digest.digest()
        self.sha256 = sha256.hex()
        yield self._frame(sha256=sha256)

    def _packed(self, data: bytes) -> bytes:
        if self._compression != "zstd" or not data:
            return data
        with recorder.span("zstd", len(data)):
            return compress(data)

    @staticmethod
    def _frame(**fields: Any) -> bytes:
        encoded: bytes = pb.Frame(**fields).SerializeToString()
        return encoded


class Incoming:
    """A message that is being read."""

    def __init__(self, node: str, encoded: bytes, limits: Limits) -> None:
        """Read the header; no memory is taken for arrays.

        Raises:
            Dropped: it is malformed, or over a limit.
        """
        try:
            header = pb.Header.FromString(encoded)
            address = Address(**{name: getattr(header.address, name) for name in Address.__dataclass_fields__})
            check_address(header.kind, address)
            body = decode_json(header.body, limits.body_bytes)
        except (DecodeError, TransportError):
            raise Dropped("malformed header") from None
        if header.compression not in (pb.NONE, pb.ZSTD):
            raise Dropped("unknown compression")
        if header.num_bytes > limits.message_bytes:
            raise Dropped("too large")
        specs = wire.decode_specs(header.arrays, header.num_bytes, limits.arrays)
        self.header = Header(node, header.kind, address, body, specs, header.num_bytes)
        self._is_compressed = header.compression == pb.ZSTD
        self._digest = Digest(encoded)
        self._arrays: dict[str, Tensor] = {}
        self._views: list[memoryview] = []
        self._left = header.num_bytes

    def read_into(self, targets: Mapping[str, Tensor] | None) -> None:
        """Take the memory of `targets` for the arrays, or memory of their own.

        Raises:
            Dropped: the targets are other arrays.
        """
        specs = self.header.specs
        self._arrays = wire.allocate(specs) if targets is None else wire.check_targets(targets, specs)
        self._views = [wire.view_of(array) for array in self._arrays.values() if array.numel()]

    def add(self, chunk: memoryview) -> None:
        """Copy a chunk to where it belongs.

        Raises:
            Dropped: it is more than what is left, or cannot be decompressed to as much.
        """
        if self._is_compressed:
            with recorder.span("decompress", len(chunk)):
                chunk = decompress(chunk, min(self._left, MAX_CHUNK_BYTES))
        if len(chunk) > self._left:
            raise Dropped("too much data")
        self._digest.update(chunk)
        self._left -= len(chunk)
        start = 0
        while start < len(chunk):
            target = self._views[0]
            size = min(len(target), len(chunk) - start)
            target[:size] = chunk[start : start + size]
            start += size
            if size == len(target):
                self._views.pop(0)
            else:
                self._views[0] = target[size:]

    def finish(self, sha256: bytes) -> tuple[Message, str]:
        """Return the message and its digest.

        Raises:
            Dropped: data is missing, or the digest is another one.
        """
        if self._left:
            raise Dropped("truncated")
        if self._digest.digest() != sha256:
            raise Dropped("wrong digest")
        wire.check_values(self._arrays)
        header = self.header
        return Message(header.kind, header.address, header.body, self._arrays), sha256.hex()


def split(frame: bytes) -> Frame:
    """Return a frame's fields; of a chunk alone: a view of it.

    Raises:
        Dropped: it is malformed.
    """
    start = _end_of_varint(frame) if frame[:1] == _CHUNK_TAG else 0
    if start and int_of_varint(frame[1:start]) == len(frame) - start:
        return Frame(b"", memoryview(frame)[start:], b"", None)
    try:
        found = pb.Frame.FromString(frame)
    except DecodeError:
        raise Dropped("malformed frame") from None
    welcome = found.welcome if found.HasField("welcome") else None
    return Frame(found.header, memoryview(found.chunk), found.sha256, welcome)


def in_chunks(views: Sequence[memoryview], chunk_bytes: int) -> Iterator[tuple[list[memoryview], int]]:
    """Yield pieces of the views, in order, that make chunks of `chunk_bytes`, at last of what is left, and sizes."""
    pieces: list[memoryview] = []
    room = chunk_bytes
    for view in views:
        start = 0
        while start < len(view):
            piece = view[start : start + room]
            pieces.append(piece)
            start += len(piece)
            room -= len(piece)
            if not room:
                yield pieces, chunk_bytes
                pieces, room = [], chunk_bytes
    if pieces:
        yield pieces, chunk_bytes - room


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _end_of_varint(frame: bytes) -> int:
    """Return where the number after a frame's first byte ends; 0: it is longer than a chunk's size can be."""
    return next((position + 1 for position, byte in enumerate(frame[1:6], 1) if byte < 0x80), 0)


def int_of_varint(encoded: bytes) -> int:
    """Return the number that protobuf encodes so."""
    return sum((byte & 0x7F) << 7 * position for position, byte in enumerate(encoded))
