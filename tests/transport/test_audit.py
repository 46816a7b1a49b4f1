"""The audit log: what it holds, what it never holds, and that it outlives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import DataError
from gossamer.storage.jsonl import read
from gossamer.transport.audit import AuditLog

ADDRESS = {"run": "r", "round": 3, "phase": 0, "sender": 7, "attempt": 1}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_written(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", Clock())
    log.record("joined", node="ucsf", peer="ipv4:10.0.0.7:4000")
    log.record("sent", node="ucsf", message="train", address=ADDRESS, sha256="ab", num_bytes=12, wire_bytes=9)
    log.close()
    assert read(tmp_path / "audit.jsonl") == [
        {"time": 100.0, "kind": "joined", "node": "ucsf", "peer": "ipv4:10.0.0.7:4000"},
        {"time": 100.0, "kind": "sent", "node": "ucsf", "message": "train", **ADDRESS, "sha256": "ab"}
        | {"num_bytes": 12, "wire_bytes": 9},
    ]


@pytest.mark.parametrize("more", [{"token": "s3cret"}, {"body": {"token": "s3cret"}}, {"address": {"token": "s3cret"}}])
def test_nothing_else_is(tmp_path: Path, more: dict[str, Any]) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", Clock())
    log.record("received", node="ucsf", **more)
    assert "s3cret" not in (tmp_path / "audit.jsonl").read_text()
    assert read(tmp_path / "audit.jsonl") == [{"time": 100.0, "kind": "received", "node": "ucsf"}]


def test_texts_of_strangers_are_short_and_one_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", Clock())
    log.record("refused", node='a\n{"kind": "joined"}\ud800' + "x" * 10_000, reason="no")
    assert len((tmp_path / "audit.jsonl").read_bytes()) < 1000
    (record,) = read(tmp_path / "audit.jsonl")
    assert (record["kind"], len(record["node"])) == ("refused", 300)


def test_a_flood_is_counted_not_written(tmp_path: Path) -> None:
    clock = Clock()
    log = AuditLog(tmp_path / "audit.jsonl", clock)
    for number in range(1000):
        log.record("refused", node=str(number), reason="no")
        clock.now += 0.001
    log.record("joined", node="ucsf")
    clock.now += 10
    log.record("dropped", node="ucsf", reason="stale")
    *refused, joined, dropped = read(tmp_path / "audit.jsonl")
    assert [record["node"] for record in refused] == [str(number) for number in range(100)]
    assert joined["node"] == "ucsf"
    assert dropped["num_untold"] == 900


def test_a_torn_line_is_replaced_and_a_changed_one_noticed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, Clock())
    log.record("joined", node="a")
    log.close()
    with path.open("ab") as file:
        file.write(b'{"time": 1, "kin')
    log = AuditLog(path, Clock())
    log.record("left", node="a")
    log.close()
    assert [record["kind"] for record in read(path)] == ["joined", "left"]
    path.write_text(path.read_text().replace('"a"', '"b"', 1))
    with pytest.raises(DataError, match="not as it was written"):
        read(path)
