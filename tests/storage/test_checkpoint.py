"""Commits are atomic: whatever interrupts one, what is read back is one commit or another, whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from gossamer.errors import CheckpointError, ConfigError, EngineError, StorageError
from gossamer.storage import checkpoint
from gossamer.storage.checkpoint import Checkpoint, Checkpoints
from gossamer.storage.jsonl import Position

FILES = ("arrays.safetensors", "progress.json", "manifest.json")
LOGS = {"metrics.jsonl": Position(120, "0123456789abcdef"), "events.jsonl": Position()}


def state(round: int) -> dict[str, torch.Tensor]:
    return {
        "x": torch.arange(7, dtype=torch.float32) + round,
        "count": torch.tensor([round]),
        "empty": torch.zeros(0, 3),
    }


def commit(store: Checkpoints, round: int, **options: Any) -> Path:
    return store.commit(round, state(round), {"round": round, "loss": round / 3}, LOGS, **options)


def assert_is(found: Checkpoint | None, round: int) -> None:
    assert found is not None
    assert found.round == round
    assert found.progress == {"round": round, "loss": round / 3}
    assert found.logs == LOGS
    assert found.arrays.keys() == state(round).keys()
    for name, tensor in state(round).items():
        assert found.arrays[name].dtype == tensor.dtype
        assert torch.equal(found.arrays[name], tensor)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_commit_comes_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.latest() is None
    phases: list[str] = []
    path = commit(store, 3, on_step=phases.append)
    assert path == tmp_path / "checkpoints" / "00000003"
    assert names(path) == sorted(FILES)
    assert phases == ["arrays", "progress", "manifest", "renamed", "pruned"]
    found = Checkpoints(tmp_path / "checkpoints").latest()
    assert_is(found, 3)
    assert found is not None
    assert found.path == path
    assert found.damaged == []


def test_arrays_of_any_dtype_shape_and_overlap_keep_their_bits(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    arrays = {
        "base": base,
        "same": base,
        "row": base[1],
        "column": base[:, 2],
        "half": base.to(torch.bfloat16),
        "flags": base > 0,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "special": torch.tensor([float("nan"), -0.0, float("inf")]),
        "learned": torch.nn.Parameter(base.clone()),
    }
    store = Checkpoints(tmp_path)
    store.commit(0, arrays, {}, {})
    found = store.latest()
    assert found is not None
    assert found.arrays.keys() == arrays.keys()
    for name, tensor in arrays.items():
        got = found.arrays[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(got.flatten().view(torch.uint8), tensor.detach().flatten().contiguous().view(torch.uint8))
        assert got.data_ptr() % 64 == 0
        got.zero_()  # owned by the caller, not a window on the file
    assert torch.equal(store.latest().arrays["base"], base)  # type: ignore[union-attr]


def test_only_the_newest_stay(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for round in range(0, 50, 10):
        commit(store, round)
    assert names(tmp_path) == ["00000020", "00000030", "00000040"]


def test_keeping_fewer_than_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot keep 1 checkpoints"):
        Checkpoints(tmp_path, keep=1)


def test_leftovers_go_when_opened(tmp_path: Path) -> None:
    commit(Checkpoints(tmp_path), 1)
    shutil.copytree(tmp_path / "00000001", tmp_path / ".writing-2")
    shutil.copytree(tmp_path / "00000001", tmp_path / ".deleting-00000000")
    (tmp_path / ".writing-2" / "manifest.json").unlink()
    assert_is(Checkpoints(tmp_path).latest(), 1)
    assert names(tmp_path) == ["00000001"]


def test_stray_files_among_the_commits(tmp_path: Path) -> None:
    """Whatever their names: they are passed over, and replaced where a commit goes."""
    directory = tmp_path / "checkpoints"
    commit(Checkpoints(directory), 1)
    for name in (".writing-2", ".deleting-2", "00000003", "00000002.1", "notes.txt"):
        (directory / name).write_text("stray")
    (directory / "00000004").symlink_to(tmp_path)
    store = Checkpoints(directory)
    assert_is(store.latest(), 1)
    for round in (2, 3):
        commit(store, round)
    assert_is(Checkpoints(directory).latest(), 3)
    assert (directory / "notes.txt").read_text() == "stray"
    assert tmp_path.is_dir()


def test_rounds_order_by_number(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 99_999_999)
    commit(store, 100_000_000)
    assert_is(store.latest(), 100_000_000)


def test_a_commit_is_the_newest_afterwards(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for round in (10, 20, 15):
        commit(store, round)
    assert names(tmp_path) == ["00000010", "00000015"]


def test_phases_stand_between_rounds(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=4)
    for round, phase in [(1, 0), (1, 1), (1, 2), (2, 0), (2, 10), (2, 9)]:
        commit(store, round, phase=phase)
    assert names(tmp_path) == ["00000001-1", "00000001-2", "00000002", "00000002-9"]
    found = store.latest()
    assert_is(found, 2)
    assert found is not None
    assert found.phase == 9
    commit(store, 2, phase=9)
    assert names(tmp_path)[-1] == "00000002-9.1"


@pytest.mark.parametrize("damaged", [True, False])
def test_a_round_committed_again_replaces_the_first(tmp_path: Path, damaged: bool) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    store.commit(2, {}, {"first": True}, {})
    if damaged:
        (tmp_path / "00000002" / "progress.json").write_text("{}")
        assert_is(store.latest(), 1)
    present: list[list[str]] = []
    commit(store, 2, on_step=lambda phase: present.append(names(tmp_path)))
    assert all({"00000001", "00000002"} <= set(moment) for moment in present[:4])
    assert names(tmp_path) == ["00000001", "00000002.1"]
    assert_is(Checkpoints(tmp_path).latest(), 2)
    commit(store, 2)
    commit(store, 3)
    assert names(tmp_path) == ["00000002.2", "00000003"]


def test_damaged_commits_do_not_count_as_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 10)
    commit(store, 15)
    (tmp_path / "00000015" / "manifest.json").unlink()
    assert_is(store.latest(), 10)
    commit(store, 16)
    assert names(tmp_path) == ["00000010", "00000016"]


@pytest.mark.parametrize("name", FILES)
def test_every_bit_counts(tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    path = commit(store, 2) / name
    content = path.read_bytes()
    for position in range(0, len(content) - 1, 3):
        spoilt = bytearray(content)
        spoilt[position] ^= 1 << position % 8
        path.write_bytes(spoilt)
        found = store.latest()
        assert_is(found, 1)
        assert found is not None
        assert len(found.damaged) == 1
        assert "00000002' is damaged" in found.damaged[0]
    path.write_bytes(content)
    assert_is(store.latest(), 2)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_found_out(tmp_path: Path, name: str) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    path = commit(store, 2) / name
    content = path.read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 2}:
        path.write_bytes(content[:length])
        assert_is(store.latest(), 1)
    path.unlink()
    found = store.latest()
    assert_is(found, 1)
    assert found is not None
    assert name in found.damaged[0]


def test_an_unknown_format_is_passed_over_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    commit(store, 2)
    monkeypatch.undo()
    found = store.latest()
    assert_is(found, 1)
    assert found is not None
    assert "its format is 99, but this version reads 2 and 3" in found.damaged[0]


def test_no_usable_commit_names_each(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    (commit(store, 1) / "manifest.json").write_text("[]")
    (commit(store, 2) / "arrays.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00000002.*cannot be read.*00000001.*malformed.*restore one"):
        store.latest()


@pytest.mark.parametrize("progress", [{"loss": float("nan")}, {"thing": object()}])
def test_progress_that_is_no_json_is_refused(tmp_path: Path, progress: dict[str, Any]) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    with pytest.raises(CheckpointError, match="progress of round 2 is not valid JSON"):
        store.commit(2, {}, progress, {})
    assert names(tmp_path) == ["00000001"]


def test_a_negative_round_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="round -1"):
        commit(Checkpoints(tmp_path), -1)


def with_two_commits(root: Path, k: int) -> Path:
    """Return a fresh directory, the k-th under `root`, that holds commits of rounds 1 and 2."""
    if not (root / "template").exists():
        store = Checkpoints(root / "template")
        commit(store, 1)
        commit(store, 2)
    return Path(shutil.copytree(root / "template", root / str(k)))


# Failures of the disk: the k-th call of any of these raises, for every k.
CALLS = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"), (checkpoint, "save_file")]


@contextmanager
def failing_at(k: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let the k-th of all calls in CALLS raise ENOSPC; yields the names of the calls so far."""
    seen: list[str] = []

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) == k:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, wrap(name, getattr(module, name)))
        yield seen


def test_a_full_disk_at_any_call_leaves_earlier_commits_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = set()
    for k in range(1, 100):
        store = Checkpoints(directory := with_two_commits(tmp_path, k))
        with failing_at(k, monkeypatch) as seen, suppress(StorageError):
            commit(store, 3)
        if len(seen) < k:
            break
        found = Checkpoints(directory).latest()
        assert found is not None
        assert found.round in (2, 3)
        assert_is(found, found.round)
        assert found.damaged == []
        assert not list(directory.glob(".writing-*"))
        if found.round == 2:
            assert names(directory) == ["00000001", "00000002"]
        outcomes.add(found.round)
        commit(Checkpoints(directory), 4)  # and the run can go on
    else:
        pytest.fail("the number of calls was not exhausted")
    assert outcomes == {2, 3}
    assert {"fsync", "rename", "mkdir", "unlink", "save_file"} <= set(seen)


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    store = Checkpoints(tmp_path)
    commit(store, 1)
    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(StorageError, match="no space left on the device"):
        commit(store, 2)
    assert names(tmp_path) == ["00000001"]


def test_a_real_refusal_inside_safetensors(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            store.commit(2, {"x": torch.zeros(100_000)}, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["00000001"]


# Kills: a forked child dies at the k-th step that touches the file system, for every k.
def commit_and_die(directory: Path, k: int) -> bool:
    """Return whether the child lived to finish."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    num_steps = 0

    def step(event: str) -> None:
        nonlocal num_steps
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fsync", "save_file"}:
            num_steps += 1
            if num_steps == k:
                os._exit(9)

    def before(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any) -> Any:
            step(name)
            return call(*args)

        return stepped

    try:
        store = Checkpoints(directory)
        os.fsync = before("fsync", os.fsync)
        checkpoint.save_file = before("save_file", checkpoint.save_file)  # type: ignore[attr-defined]
        sys.addaudithook(lambda event, arguments: step(event))
        commit(store, 3)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_kill_at_any_step_leaves_the_previous_or_the_new_commit(tmp_path: Path) -> None:
    rounds = []
    for k in range(1, 100):
        directory = with_two_commits(tmp_path, k)
        finished = commit_and_die(directory, k)
        whole = [path.name for path in directory.iterdir() if not path.name.startswith(".")]
        assert len(whole) >= 2  # never fewer than before
        assert all(names(directory / name) == sorted(FILES) for name in whole)
        found = Checkpoints(directory).latest()
        assert found is not None
        assert_is(found, found.round)
        assert found.damaged == []
        rounds.append(found.round)
        if finished:
            break
    assert len(rounds) > 15
    assert rounds == sorted(rounds)
    assert set(rounds) == {2, 3}
    assert names(directory) == ["00000002", "00000003"]


def save_rows(directory: Path) -> dict[str, dict[str, Any]]:
    """Write what two other processes have."""
    for number in range(2):
        checkpoint.save_arrays(
            directory / checkpoint.ROWS.format(number), {"rows": torch.arange(6).view(3, 2) + number}
        )
    return {path.name: checkpoint.describe_file(path) for path in sorted(directory.iterdir())}


def test_rows_of_several_processes_are_one_array(tmp_path: Path) -> None:
    store, rows = Checkpoints(tmp_path), torch.cat([torch.arange(6).view(3, 2) + number for number in range(2)])
    path = commit(store, 1, save_rows=save_rows)
    assert names(path) == sorted([*FILES, "rows-00000.safetensors", "rows-00001.safetensors"])
    for found in (store.latest(), checkpoint.read_latest(tmp_path)):
        assert found is not None
        assert torch.equal(found.arrays["rows"], rows)
        assert torch.equal(found.arrays["x"], state(1)["x"])
        assert torch.equal(found.below("ro")["ws"], rows)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"spoilt"), lambda path: path.unlink()])
def test_rows_that_are_damaged_are_named(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    store = Checkpoints(tmp_path)
    commit(store, 1)
    spoil(commit(store, 2, save_rows=save_rows) / "rows-00001.safetensors")
    found = store.latest()
    assert_is(found, 1)
    assert found is not None
    assert "rows-00001.safetensors" in found.damaged[0]


def test_rows_that_are_refused_leave_earlier_commits_alone(tmp_path: Path) -> None:
    def refuse(directory: Path) -> dict[str, dict[str, Any]]:
        save_rows(directory)
        raise EngineError("rank 1: no space left")

    store = Checkpoints(tmp_path)
    commit(store, 1)
    with pytest.raises(EngineError, match="no space left"):
        commit(store, 2, save_rows=refuse)
    assert names(tmp_path) == ["00000001"]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = commit(Checkpoints(tmp_path), 1)
    header_length = int.from_bytes((path / "arrays.safetensors").read_bytes()[:8], "little")
    header = json.loads((path / "arrays.safetensors").read_bytes()[8 : 8 + header_length])
    assert header["x"]["dtype"] == "F32"
    for name in ("progress.json", "manifest.json"):
        json.loads((path / name).read_text())
