"""The run directory: creation, append-only logs, torn lines, and cutting back to a commit."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import CheckpointError, ConfigError, DataError, StorageError
from gossamer.storage.jsonl import Position
from gossamer.storage.runlog import RunLog, new_directory, read_config, read_events, read_metrics

CONFIG = {"zeta": 1, "alpha": {"lr": 1e-5, "name": "no"}, "list": [1, 2.5, None, True]}


def create(directory: Path, **options: Any) -> RunLog:
    return RunLog.create(directory, CONFIG, **options)


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.fails = fails
        self.closed = False

    def log(self, record: Mapping[str, Any]) -> None:
        if self.fails:
            raise RuntimeError("tracker is down")
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_create_writes_what_it_promises(tmp_path: Path) -> None:
    create(tmp_path / "run", environment={"engine": "local"}).close()
    entries = {path.name for path in (tmp_path / "run").iterdir()}
    assert entries == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "trace",
        "checkpoints",
        "plots",
        ".lock",
    }
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["engine"] == "local"
    assert environment["versions"]["torch"].startswith("2.")
    assert environment["started"].endswith("+00:00")
    assert environment["num_cpus"] == os.cpu_count()


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    create(tmp_path).close()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:  # holds the run until it is told to go
        log = RunLog.open(tmp_path)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0 if log.positions() else 1)
    assert os.read(ready[0], 1) == b"x"
    with pytest.raises(ConfigError, match="another process works on the run in"):
        RunLog.open(tmp_path)
    os.write(go[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    RunLog.open(tmp_path).close()


def test_config_comes_back_with_its_key_order(tmp_path: Path) -> None:
    create(tmp_path).close()
    config = read_config(tmp_path)
    assert config == CONFIG
    assert list(config) == ["zeta", "alpha", "list"]


def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    with create(tmp_path) as log:
        log.log_metrics({"round": 0})
    with pytest.raises(ConfigError, match="already holds a run: resume it"):
        create(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        create(tmp_path)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"round": 0}]


def test_a_creation_cut_short_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def fail_on_config(source: Path, target: Path) -> None:
        if target.name == "config.yaml":
            raise OSError(errno.ENOSPC, "full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_config)
    with pytest.raises(StorageError, match="no space left"):
        create(tmp_path)
    with pytest.raises(ConfigError, match="not a run directory"):
        RunLog.open(tmp_path)
    monkeypatch.undo()
    create(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_a_config_that_yaml_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written as YAML"):
        RunLog.create(tmp_path, {"callback": object()})
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("reader", [RunLog.open, read_metrics, read_events, read_config])
def test_what_is_no_run_directory_is_named(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(ConfigError, match=r"elsewhere.* is not a run directory"):
        reader(tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", ""])
def test_a_spoilt_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(tmp_path)


def test_a_directory_in_the_place_of_a_log_is_named(tmp_path: Path) -> None:
    create(tmp_path).close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot read the log '.*metrics\.jsonl' \(Is a directory\): move away"):
        read_metrics(tmp_path)
    with pytest.raises(StorageError, match=r"metrics\.jsonl' \(Is a directory\)"):
        RunLog.open(tmp_path)


def test_records_come_back_as_plain_json(tmp_path: Path) -> None:
    record = {
        "round": np.int64(3),
        "loss": float("nan"),
        "worst": [float("inf"), np.float32(0.5), -np.inf],
        "global": {"accuracy": torch.tensor(0.25), 1: (True, None)},
        "text": "line\nbreak \u2028 \ud800",
    }
    with create(tmp_path) as log:
        log.log_metrics(record)
    assert read_metrics(tmp_path) == [
        {
            "round": 3,
            "loss": None,
            "worst": [math.inf, 0.5, -math.inf],
            "global": {"accuracy": 0.25, "1": [True, None]},
            "text": "line\nbreak \u2028 \ud800",
        }
    ]


def test_events_carry_kind_time_and_fields(tmp_path: Path) -> None:
    with create(tmp_path) as log:
        log.log_event("dropped", client=7, reason="non-finite update")
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["client"], event["reason"]) == ("dropped", 7, "non-finite update")
    assert event["time"].endswith("+00:00")


def test_each_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    write = os.write

    def counting(descriptor: int, content: bytes) -> int:
        writes.append(content)
        return write(descriptor, content)

    with create(tmp_path) as log:
        monkeypatch.setattr(os, "write", counting)
        log.log_metrics({"round": 0, "x": "y" * 100_000})
        log.log_metrics({"round": 1})
        assert [line[-1:] for line in writes] == [b"\n", b"\n"]
        assert len(read_metrics(tmp_path)) == 2  # visible at once: nothing is buffered


@pytest.mark.parametrize("code", [errno.ENOSPC, None])
def test_a_refused_line_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    write = os.write

    def refuse(descriptor: int, content: bytes) -> int:
        if code is not None:
            raise OSError(code, "full")
        return write(descriptor, content[:5])

    with create(tmp_path) as log:
        log.log_metrics({"round": 0})
        monkeypatch.setattr(os, "write", refuse)
        with pytest.raises(StorageError, match=r"no space left.*metrics\.jsonl"):
            log.log_metrics({"round": 1})
        monkeypatch.undo()
        log.log_metrics({"round": 2})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"round": 0}, {"round": 2}]


def read_lines(path: Path) -> list[Any]:
    """Return all records, each of which has a digest."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(len(record.pop("digest")) == 16 for record in records)
    return records


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=4), data=st.data()
)
def test_a_log_cut_at_any_byte_yields_a_prefix_and_is_repaired(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("run")
    with mock.patch.object(os, "fsync"), create(directory) as log:
        for record in records:
            log.log_metrics(record)
    path = directory / "metrics.jsonl"
    cut = data.draw(st.integers(0, path.stat().st_size))
    num_whole = path.read_bytes()[:cut].count(b"\n")
    os.truncate(path, cut)
    assert read_metrics(directory) == records[:num_whole]
    with RunLog.open(directory) as log:
        log.log_metrics({"after": 1})
    assert read_lines(path) == [*records[:num_whole], {"after": 1}]


@pytest.mark.parametrize("tail", [b'{"round": 1}', b'{"rou', b"\0\0\0\0"])
def test_a_torn_last_line_is_ignored_and_replaced(tmp_path: Path, tail: bytes) -> None:
    with create(tmp_path) as log:
        log.log_event("first")
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert [event["kind"] for event in read_events(tmp_path)] == ["first"]
    with RunLog.open(tmp_path) as log:
        log.log_event("second")
    assert [event["kind"] for event in read_events(tmp_path)] == ["first", "second"]


@pytest.mark.parametrize("rest", [b'{"round": 2}\n', b'{"rou', b""])
def test_a_malformed_line_elsewhere_is_named(tmp_path: Path, rest: bytes) -> None:
    create(tmp_path).close()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"round": 0}\nnonsense\n' + rest)
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(tmp_path)


def test_truncate_goes_back_to_the_offsets(tmp_path: Path) -> None:
    with create(tmp_path) as log:
        log.log_metrics({"round": 0})
        log.log_event("warning")
        log.sync()
        positions = log.positions()
        sizes = {name: position.num_bytes for name, position in positions.items()}
        assert sizes == {name: (tmp_path / name).stat().st_size for name in ("metrics.jsonl", "events.jsonl")}
        log.log_metrics({"round": 1})
        log.log_event("retry")
        log.truncate(positions)
        assert log.positions() == positions
        log.log_metrics({"round": 1, "again": True})
    assert read_metrics(tmp_path) == [{"round": 0}, {"round": 1, "again": True}]
    assert [event["kind"] for event in read_events(tmp_path)] == ["warning"]


class TestCheck:
    """Two rounds and an event are committed, and one more round is logged."""

    @pytest.fixture
    def positions(self, tmp_path: Path) -> dict[str, Position]:
        with create(tmp_path) as log:
            log.log_metrics({"round": 1})
            log.log_metrics({"round": 2})
            log.log_event("warning")
            positions = log.positions()
            log.log_metrics({"round": 3})
        return positions

    def check(self, directory: Path, positions: dict[str, Position] | None) -> None:
        with RunLog.open(directory) as log:
            log.check(positions)

    def test_what_follows_the_commit_does_not_matter(self, tmp_path: Path, positions: dict[str, Position]) -> None:
        self.check(tmp_path, positions)
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-9] + b"nonsense\n")
        self.check(tmp_path, positions)

    def test_lines_that_were_cut(self, tmp_path: Path, positions: dict[str, Position]) -> None:
        os.truncate(tmp_path / "events.jsonl", 0)
        with pytest.raises(CheckpointError, match=r"events.jsonl' holds 0 bytes but the commit was made at \d+"):
            self.check(tmp_path, positions)

    @pytest.mark.parametrize("change", [lambda lines: lines[1:], lambda lines: [lines[1], lines[0], lines[2]]])
    def test_lines_that_were_removed_or_moved(self, tmp_path: Path, positions: Any, change: Any) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
        with pytest.raises(DataError, match=r"line 1 of .*metrics.jsonl' is not as it was written"):
            read_metrics(tmp_path)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl'"):
            self.check(tmp_path, positions)

    def test_a_log_of_another_run(self, tmp_path: Path, positions: dict[str, Position]) -> None:
        with create(tmp_path / "other") as log:
            log.log_metrics({"round": 1})
            log.log_metrics({"round": 4})
        os.replace(tmp_path / "other/metrics.jsonl", tmp_path / "metrics.jsonl")
        with pytest.raises(CheckpointError, match=r"metrics.jsonl' holds other lines than at the commit"):
            self.check(tmp_path, positions)

    def test_without_digests(self, tmp_path: Path, positions: dict[str, Position]) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"round": 1}\n{"round": 2}\n' + " " * 100)
        assert read_metrics(tmp_path) == [{"round": 1}, {"round": 2}]
        with pytest.raises(CheckpointError, match=r"metrics.jsonl' holds other lines than at the commit"):
            self.check(tmp_path, positions)

    def test_rounds_without_a_commit(self, tmp_path: Path, positions: dict[str, Position]) -> None:
        with pytest.raises(CheckpointError, match=r"metrics.jsonl' holds 3 rounds, but .*checkpoints' no commit"):
            self.check(tmp_path, None)
        with RunLog.open(tmp_path) as log:
            log.erase()
            log.check(None)

    def test_each_bit_counts(self, tmp_path: Path, positions: dict[str, Position]) -> None:
        """Readers notice it without a commit; only an end of the whole log may read as torn."""
        path = tmp_path / "metrics.jsonl"
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            with pytest.raises(DataError, match=r"metrics.jsonl"):
                read_metrics(tmp_path)


def test_sync_reaches_both_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    with create(tmp_path) as log:
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
        log.sync()
    assert sorted(Path(path).name for path in synced) == ["events.jsonl", "metrics.jsonl"]


def test_sinks_receive_plain_metrics_and_are_closed(tmp_path: Path) -> None:
    sink = Recorder()
    with create(tmp_path) as log:
        log.sinks = [sink]
        log.log_metrics({"round": np.int64(0), "loss": float("nan")})
        log.log_event("warning")
    assert sink.records == [{"round": 0, "loss": None}]
    assert sink.closed


def test_a_failing_sink_is_dropped_and_named_once(tmp_path: Path) -> None:
    good = Recorder()
    with create(tmp_path) as log:
        log.sinks = [Recorder(fails=True), good]
        log.log_metrics({"round": 0})
        log.log_metrics({"round": 1})
    assert [record["round"] for record in good.records] == [0, 1]
    assert len(read_metrics(tmp_path)) == 2
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["sink"], event["error"]) == (
        "sink-dropped",
        "Recorder",
        "RuntimeError: tracker is down",
    )


def test_close_twice_is_harmless(tmp_path: Path) -> None:
    log = create(tmp_path)
    log.close()
    log.close()


def test_new_directories_are_distinct_even_in_a_race(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_directory(tmp_path / "runs", "digits"), range(24)))
    assert len(set(made)) == 24
    assert all(path.is_dir() and path.name.startswith("digits-2") for path in made)


@pytest.mark.parametrize("name", ["", "a/b"])
def test_a_name_that_cannot_name_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run directory"):
        new_directory(tmp_path, name)
