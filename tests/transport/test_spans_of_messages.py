"""What the transport records of a message: each stage at either end, with the bytes that it counts itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from gossamer.profiling import recorder
from gossamer.transport import Address, Client, Joined, Limits, Message, Received, Server

TIMEOUT = 60.0
NUM_FLOATS = 50_000


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_stages_and_bytes(compression: str, tmp_path: Path) -> None:
    limits = Limits(chunk_bytes=1 << 17, compression=compression, call_seconds=TIMEOUT)
    row = {"x": torch.arange(NUM_FLOATS, dtype=torch.float32)}
    with recorder.recording(tmp_path / "trace"):
        with (
            Server("127.0.0.1:0", limits=limits) as server,
            Client(server.address, name="a", limits=limits, timeout_seconds=TIMEOUT) as client,
        ):
            assert isinstance(server.receive(TIMEOUT), Joined)
            client.send(Message("update", Address("run", 3, 0, 7), {}, row))
            assert isinstance(server.receive(TIMEOUT), Received)
            server.send("a", Message("model", Address("run", 4, 0, -1), {}, row)).result(TIMEOUT)
            assert client.receive(TIMEOUT) is not None
        traffic = server.traffic()["a"]
    (path,) = (tmp_path / "trace").iterdir()
    spans = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    found = Counter[tuple[str, str]]()
    for kind, *_, num_bytes, message in spans:
        found[kind, message] += num_bytes
    assert found["send", "a>update.3.0.7.0"] == found["receive", "a>update.3.0.7.0"] == traffic.received_bytes
    assert found["send", "a<model.4.0.-1.0"] == found["receive", "a<model.4.0.-1.0"] == traffic.sent_bytes
    hops = {message for kind, message in found if ":" in message}
    assert hops == {"a>update.3.0.7.0:taken", "a<model.4.0.-1.0:queued", "a<model.4.0.-1.0:taken"}
    assert found["checksum", ""] == 4 * 4 * NUM_FLOATS  # both ways, at both ends
    assert found["zstd", ""] == (2 * 4 * NUM_FLOATS if compression == "zstd" else 0)
    assert (0 < found["decompress", ""] < found["zstd", ""]) == (compression == "zstd")


def test_a_node_that_dials_two_servers_names_them(tmp_path: Path) -> None:
    """What it sends to both is the same but for their names; without names of servers, ids would be equal."""
    message = Message("row", Address("run", 1, 0, 2), {}, {})
    with (
        recorder.recording(tmp_path / "trace"),
        Server("127.0.0.1:0", trace_name="b") as one,
        Server("127.0.0.1:0", trace_name="c") as two,
    ):
        for server, name in ((one, "b"), (two, "c")):
            with Client(server.address, name="a", trace_name=name, timeout_seconds=TIMEOUT) as client:
                assert isinstance(server.receive(TIMEOUT), Joined)
                client.send(message)
                assert isinstance(server.receive(TIMEOUT), Received)
                server.send("a", message).result(TIMEOUT)
                assert client.receive(TIMEOUT) is not None
    (path,) = (tmp_path / "trace").iterdir()
    spans = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    ids = Counter((kind, message) for kind, *_, message in spans if message)
    assert set(ids.values()) == {1}
    assert {message for _, message in ids if ":" not in message} == {
        f"a@{name}{way}row.1.0.2.0" for name in "bc" for way in "<>"
    }
