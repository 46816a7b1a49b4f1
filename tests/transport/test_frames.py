"""Frames against protobuf's own code, and arrays against safetensors' own code."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from gossamer.errors import Dropped
from gossamer.transport import Address, Limits, Message
from gossamer.transport import gossamer_pb2 as pb
from gossamer.transport.arrays import decode_specs, encode_specs, in_order
from gossamer.transport.frames import Incoming, Outgoing, in_chunks, split

ADDRESS = Address("run", 3, 1, 4, 2)
ARRAYS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7, dtype=torch.float64),
    "c": torch.tensor([True, False, True]),
    "d": torch.randn(4).to(torch.bfloat16),
    "e": torch.tensor(3, dtype=torch.int16),
}


def outgoing(chunk_bytes: int) -> Outgoing:
    return Outgoing(Message("update", ADDRESS, {"loss": 1.5}, ARRAYS), Limits(chunk_bytes=chunk_bytes))


@pytest.mark.parametrize("chunk_bytes", [1, 3, 64, 200, 1 << 20])
def test_frames_are_those_of_protobuf(chunk_bytes: int) -> None:
    sent = outgoing(chunk_bytes)
    encoded = list(sent.frames())
    frames = [pb.Frame.FromString(one) for one in encoded]
    assert [one.SerializeToString() for one in frames] == encoded
    data = b"".join(one.chunk for one in frames)
    header = pb.Header.FromString(frames[0].header)
    assert {name: getattr(header.address, name) for name in vars(ADDRESS)} == vars(ADDRESS)
    assert frames[-1].sha256 == hashlib.sha256(frames[0].header + data).digest()
    assert sent.sha256 == frames[-1].sha256.hex()
    assert max(len(one.chunk) for one in frames) <= chunk_bytes
    for frame, one in zip(frames, map(split, encoded), strict=True):
        assert (frame.header, frame.chunk, frame.sha256) == (one.header, bytes(one.chunk), one.sha256)


def test_header_and_data_are_a_safetensors_file() -> None:
    frames = [pb.Frame.FromString(one) for one in outgoing(50).frames()]
    file = pb.Header.FromString(frames[0].header).arrays + b"".join(one.chunk for one in frames)
    found = load(file)
    assert set(found) == set(ARRAYS)
    assert all(torch.equal(found[name], ARRAYS[name]) for name in ARRAYS)


def test_specs_of_a_file_that_safetensors_wrote() -> None:
    file = save(ARRAYS)
    end = 8 + int.from_bytes(file[:8], "little")
    specs = decode_specs(file[:end], len(file) - end, 10)
    assert specs == {name: (one.dtype, tuple(one.shape)) for name, one in ARRAYS.items()}


@given(
    sizes=st.lists(st.integers(0, 9), max_size=6),
    chunk_bytes=st.integers(1, 20),
)
def test_chunks_are_all_bytes_in_order(sizes: list[int], chunk_bytes: int) -> None:
    views = [memoryview(bytes([number] * size)) for number, size in enumerate(sizes)]
    chunks = [(b"".join(pieces), size) for pieces, size in in_chunks(views, chunk_bytes)]
    assert b"".join(chunk for chunk, _ in chunks) == b"".join(views)
    assert all(len(chunk) == size for chunk, size in chunks)
    assert all(size == chunk_bytes for _, size in chunks[:-1])


@given(frame=st.binary(max_size=30))
def test_any_bytes_are_what_protobuf_says(frame: bytes) -> None:
    try:
        expected = pb.Frame.FromString(frame)
    except Exception:
        expected = None
    try:
        found = split(frame)
    except Dropped:
        assert expected is None
        return
    assert expected is not None
    assert (found.header, bytes(found.chunk), found.sha256) == (expected.header, expected.chunk, expected.sha256)


def specs_of(**changes: object) -> bytes:
    text = {"dtype": '"F32"', "shape": "[2]", "data_offsets": "[0,8]", **changes}
    encoded = ("{" + '"x":{' + ",".join(f'"{key}":{value}' for key, value in text.items()) + "}}").encode()
    return len(encoded).to_bytes(8, "little") + encoded


class TestSpecs:
    def test_good(self) -> None:
        assert decode_specs(specs_of(), 8, 1) == {"x": (torch.float32, (2,))}
        assert decode_specs(encode_specs(in_order(ARRAYS)), 129, 5).keys() == ARRAYS.keys()
        assert decode_specs(encode_specs({}), 0, 0) == {}

    @pytest.mark.parametrize(
        "changes",
        [
            {"dtype": '"F31"'},
            {"dtype": "4"},
            {"shape": "[3]"},
            {"shape": "[-2]"},
            {"shape": "[2.0]"},
            {"shape": "[true,2]"},
            {"shape": '"2"'},
            {"shape": "2"},
            {"shape": "[" + "1," * 20 + "2]"},
            {"shape": "[0,1000000000000000000000]", "data_offsets": "[0,0]"},
            {"data_offsets": "[8,16]"},
            {"data_offsets": "[0,9]"},
            {"data_offsets": "null"},
            {"more": "1"},
        ],
    )
    def test_bad(self, changes: dict[str, str]) -> None:
        with pytest.raises(Dropped, match="malformed arrays"):
            decode_specs(specs_of(**changes), 8, 1)

    @pytest.mark.parametrize(
        "encoded", [b"", b"\x08", b"\xff" * 8 + b"{}", specs_of()[:-1], specs_of() + b" ", b"\0" * 8]
    )
    def test_bad_bytes(self, encoded: bytes) -> None:
        with pytest.raises(Dropped, match="malformed arrays"):
            decode_specs(encoded, 8, 1)

    def test_deep_json(self) -> None:
        deep = b"[" * 100_000
        with pytest.raises(Dropped, match="malformed arrays"):
            decode_specs(len(deep).to_bytes(8, "little") + deep, 8, 1)

    def test_one_name_twice(self) -> None:
        text = specs_of()[8:-1] + b"," + specs_of()[9:]
        with pytest.raises(Dropped, match="malformed arrays"):
            decode_specs(len(text).to_bytes(8, "little") + text, 8, 2)

    def test_too_many(self) -> None:
        with pytest.raises(Dropped, match="too many arrays"):
            decode_specs(specs_of(), 8, 0)


class TestIncoming:
    def of(self, limits: Limits | None = None) -> tuple[Incoming, list[bytes]]:
        frames = list(outgoing(64).frames())
        return Incoming("a", pb.Frame.FromString(frames[0]).header, limits or Limits()), frames

    def test_is_what_was_sent(self) -> None:
        incoming, frames = self.of()
        incoming.read_into(None)
        for frame in frames[1:-1]:
            incoming.add(split(frame).chunk)
        found, digest = incoming.finish(split(frames[-1]).sha256)
        assert (found.kind, found.address, found.body) == ("update", ADDRESS, {"loss": 1.5})
        assert all(torch.equal(found.arrays[name], ARRAYS[name]) for name in ARRAYS)
        assert digest == split(frames[-1]).sha256.hex()

    def test_limits_are_checked_by_the_header(self) -> None:
        with pytest.raises(Dropped, match="too large"):
            self.of(Limits(message_bytes=128))
        with pytest.raises(Dropped, match="too many arrays"):
            self.of(Limits(arrays=4))
        with pytest.raises(Dropped, match="malformed header"):
            self.of(Limits(body_bytes=5))

    def test_too_much_and_too_little(self) -> None:
        incoming, frames = self.of()
        incoming.read_into(None)
        with pytest.raises(Dropped, match="truncated"):
            incoming.finish(b"")
        incoming.add(memoryview(bytes(129)))
        with pytest.raises(Dropped, match="wrong digest"):
            incoming.finish(split(frames[-1]).sha256)
        with pytest.raises(Dropped, match="too much data"):
            incoming.add(memoryview(b"x"))

    def test_booleans_are_zero_or_one(self) -> None:
        sent = Outgoing(Message("update", ADDRESS, {}, {"x": torch.tensor([True])}), Limits())
        incoming = Incoming("a", sent.header, Limits())
        incoming.read_into(None)
        incoming.add(memoryview(b"\2"))
        with pytest.raises(Dropped, match="malformed arrays"):
            incoming.finish(hashlib.sha256(sent.header + b"\2").digest())

    @pytest.mark.parametrize("target", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)])
    def test_targets_are_equal_arrays(self, target: torch.Tensor) -> None:
        sent = Outgoing(Message("update", ADDRESS, {}, {"x": torch.zeros(2)}), Limits())
        with pytest.raises(Dropped, match="wrong arrays"):
            Incoming("a", sent.header, Limits()).read_into({"x": target})
        with pytest.raises(Dropped, match="wrong arrays"):
            Incoming("a", sent.header, Limits()).read_into({"y": torch.zeros(2)})


def test_a_digest_covers_the_header() -> None:
    frames = [pb.Frame.FromString(one) for one in outgoing(1 << 20).frames()]
    other = Outgoing(Message("update", replace(ADDRESS, round=4), {"loss": 1.5}, ARRAYS), Limits())
    incoming = Incoming("a", other.header, Limits())
    incoming.read_into(None)
    incoming.add(memoryview(frames[0].chunk))
    with pytest.raises(Dropped, match="wrong digest"):
        incoming.finish(frames[0].sha256)
