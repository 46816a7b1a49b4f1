"""The doctor: what it finds and what it advises, on machines that are made up here."""

from __future__ import annotations

import ipaddress
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import types
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gossamer import memory
from gossamer.cli import doctor
from gossamer.cli.doctor import Examination, examine, render
from gossamer.cli.main import app
from gossamer.cli.ray_clusters import Cluster, find_clusters


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine about which there is nothing to say; each test spoils one thing."""
    for name in (*doctor.THREAD_VARIABLES, "GOSSAMER_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:    8000000 kB\n")
    monkeypatch.setattr(memory, "MEMORY_FACTS", meminfo)
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(doctor, "PROCESSES", tmp_path / "proc")
    monkeypatch.setattr(doctor, "version", lambda package: {"torch": "2.13.0+cpu"}.get(package, "1.2.3"))
    monkeypatch.setattr(doctor, "_free", lambda path: 50 * 10**9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["fork", "spawn"])
    set_torch(monkeypatch)


def set_torch(monkeypatch: pytest.MonkeyPatch, num_threads: int = 2, devices: tuple[str, ...] = ()) -> None:
    torch = types.ModuleType("torch")
    cuda = types.SimpleNamespace(
        is_available=lambda: bool(devices),
        device_count=lambda: len(devices),
        get_device_name=lambda index: devices[index],
    )
    torch.cuda, torch.get_num_threads = cuda, lambda: num_threads  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)


def advice(found: Examination) -> str:
    """Return the only warning there is."""
    (only,) = found.warnings
    return f"{only.problem}: {only.remedy}"


def add_process(tmp_path: Path, number: int, *command: str, parent: int = 1, sockets: tuple[int, ...] = ()) -> Path:
    """Add a process to the made-up /proc."""
    process = tmp_path / "proc" / str(number)
    (process / "fd").mkdir(parents=True)
    (process / "cmdline").write_text("\0".join(command) + "\0")
    (process / "stat").write_text(f"{number} (ray :: (x)) S {parent} 0")
    (process / "environ").write_text("HOME=/root\0")
    for index, inode in enumerate(sockets):
        (process / "fd" / str(index)).symlink_to(f"socket:[{inode}]")
    return process


def listen(tmp_path: Path, *addresses: str) -> None:
    """Let sockets 1, 2, ... listen at addresses, ports 8001, 8002, ..., in the made-up /proc; one more is connected."""
    tables: dict[str, list[str]] = {"tcp": ["header"], "tcp6": ["header"]}
    for index, text in enumerate([*addresses, "192.0.2.7"], start=1):
        address = ipaddress.ip_address(text)
        packed = address.packed
        words = "".join(packed[i : i + 4][::-1].hex().upper() for i in range(0, len(packed), 4))
        state = "0A" if index <= len(addresses) else "01"
        tables["tcp" if address.version == 4 else "tcp6"].append(
            f"{index}: {words}:{8000 + index:04X} 0:0 {state} 0:0 0:0 0 0 0 {index}"
        )
    for name, lines in tables.items():
        (tmp_path / "proc" / "net").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / "net" / name).write_text("\n".join(lines))


RAYLET = ("/x/ray/core/raylet", "--object_store_memory=5000000000", "--gcs-address=192.0.2.1:8003")


def test_healthy_machine() -> None:
    found = examine()
    assert found.warnings == []
    text = render(found, as_json=False)
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line)
    assert lines["torch"] == "2.13.0+cpu"
    assert lines["ray"] == lines["grpcio"] == "1.2.3"
    assert lines["memory"] == "8.2 GB available of 16.4 GB"
    assert lines["CUDA"] == "not available; the local engine trains on the CPU"
    assert lines["fork"] == "available"
    assert "Ray cluster        none has a node here" in text
    assert text.endswith("nothing to change")


def test_json_holds_the_same_facts() -> None:
    found = json.loads(render(examine(), as_json=True))
    assert found["versions"]["torch"] == "2.13.0+cpu"
    assert found["machine"]["num_usable_cores"] == 2
    assert found["machine"]["available_memory_bytes"] == 8_000_000 * 1024
    assert found["warnings"] == []


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("scipy", "wandb"):
            raise PackageNotFoundError(package)
        return "3.0"

    monkeypatch.setattr(doctor, "version", version)
    found = examine()
    assert advice(found) == "not installed: scipy: pip install scipy"  # and nothing about an optional package
    assert found.versions["wandb"] is None


@pytest.mark.parametrize(("number", "is_old"), [("2.9.1", True), ("1.13.0", True), ("2.10.0", False), ("3.0", False)])
def test_old_torch(monkeypatch: pytest.MonkeyPatch, number: str, is_old: bool) -> None:
    monkeypatch.setattr(doctor, "version", lambda package: number)
    assert [w.problem for w in examine().warnings] == ([f"torch {number} is older than 2.10"] if is_old else [])


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = examine()
    assert advice(found).startswith("torch cannot be imported (ModuleNotFoundError: ")
    assert "unknown: torch cannot be imported" in render(found, as_json=False)


def test_ray_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert advice(examine()).startswith("Ray cannot be imported (ModuleNotFoundError: ")


def test_ray_cluster_that_anybody_may_use(tmp_path: Path) -> None:
    listen(tmp_path, "::", "0.0.0.0", "192.0.2.1", "127.0.0.1", "::1", "::", "0.0.0.0")
    add_process(tmp_path, 10, *RAYLET, sockets=(1, 4))
    add_process(tmp_path, 11, "ray::IDLE", parent=10, sockets=(2, 5))
    add_process(tmp_path, 12, "/x/gcs_server", sockets=(3,))
    add_process(tmp_path, 13, "ray::IDLE", parent=99, sockets=(6,))  # of another cluster
    add_process(tmp_path, 14, "/x/gcs_server", sockets=(6,))
    add_process(tmp_path, 15, "python", "serve.py", "--gcs-address=192.0.2.1:8003", sockets=(7,))
    found = examine()
    assert advice(found) == (
        "Ray at 192.0.2.1:8003 runs whatever code it is sent, without asking for a token, and other machines can reach"
        " raylet (8001), worker (8002), gcs_server (8003): start it with RAY_AUTH_MODE=token (docs/clusters.md), and"
        " keep its ports behind a firewall"
    )
    assert "Ray cluster        192.0.2.1:8003, without a token, object store up to 5.0 GB" in render(found, False)


def test_ray_cluster_with_a_token_or_on_loopback(tmp_path: Path) -> None:
    listen(tmp_path, "0.0.0.0")
    process = add_process(tmp_path, 10, *RAYLET, sockets=(1,))
    (process / "environ").write_text("A=b\0RAY_AUTH_MODE=token\0")
    assert examine().warnings == []
    (process / "environ").write_text("A=b\0RAY_AUTH_MODE=disabled\0")
    assert "without asking for a token" in advice(examine())
    listen(tmp_path, "127.0.0.1")
    assert examine().warnings == []


def test_ray_dashboard_that_others_can_reach(tmp_path: Path) -> None:
    listen(tmp_path, "192.0.2.1", "0.0.0.0")
    (add_process(tmp_path, 10, *RAYLET) / "environ").write_text("RAY_AUTH_MODE=token")
    command = ("/x/python", "-u", "/x/ray/dashboard/dashboard.py", "--host=0.0.0.0", "--gcs-address=192.0.2.1:8003")
    add_process(tmp_path, 11, *command, sockets=(2,))
    assert advice(examine()).endswith("--dashboard-host=127.0.0.1, and look at it through an ssh tunnel")


def test_ray_object_store_larger_than_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_process(tmp_path, 10, *RAYLET)
    monkeypatch.setattr(doctor, "_free", lambda path: 2 * 10**9 if path == doctor.SHARED_MEMORY else 50 * 10**9)
    assert advice(examine()).startswith(
        "the object store of Ray at 192.0.2.1:8003 may grow to 5.0 GB, but 2.0 GB are free in /dev/shm:"
        " start it with --object-store-memory=1600000000"
    )


@given(st.lists(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)), max_size=5))
def test_ports_are_exposed_unless_on_loopback(addresses: list[Any]) -> None:
    always = ["127.0.0.1", "127.9.9.9", "::1", "::", "0.0.0.0", "::ffff:127.0.0.1", "::ffff:192.0.2.1"]
    texts = [*map(str, addresses), *always]
    with tempfile.TemporaryDirectory() as folder:
        listen(Path(folder), *texts)
        add_process(Path(folder), 10, *RAYLET, sockets=tuple(range(1, len(texts) + 2)))
        (cluster,) = find_clusters(Path(folder) / "proc")
    expected = []
    for port, text in enumerate(texts, start=8001):
        address = ipaddress.ip_address(text)
        plain = getattr(address, "ipv4_mapped", None) or address
        expected += [] if plain.is_loopback else [port]
    assert cluster.exposed == {"raylet": expected}


def test_clusters_that_the_kernel_knows() -> None:
    """A process that calls itself a raylet and listens twice; no Ray is started."""
    program = (
        "import socket, sys; a, b = socket.create_server(('', 0)), socket.create_server(('127.0.0.1', 0));"
        "print(a.getsockname()[1], flush=True); sys.stdin.read()"
    )
    command = ["raylet", "-c", program, "--gcs-address=192.0.2.9:1", "--object_store_memory=77"]
    with subprocess.Popen(
        command,
        executable=sys.executable,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "token"},
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        found = [cluster for cluster in find_clusters() if cluster.address == "192.0.2.9:1"]
        process.communicate("")
    assert found == [Cluster("192.0.2.9:1", 77, True, {"raylet": [port]})]


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    set_torch(monkeypatch, num_threads=8)
    assert advice(examine()) == "torch uses 8 threads on 2 usable cores: set OMP_NUM_THREADS=2, or unset it"


def test_thread_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert advice(examine()).startswith("OMP_NUM_THREADS=4 is set")


def test_cuda_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    set_torch(monkeypatch, devices=("A", "B"))
    assert "A, B; the local engine trains on the CPU" in render(examine(), as_json=False)


@pytest.mark.parametrize(
    "files",
    [
        {"cpu.max": "150000 100000"},
        {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"},
    ],
    ids=["v2", "v1"],
)
def test_cores_that_a_container_may_use(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert advice(examine()) == "the container may use 1.5 of 2 cores: set engine.workers=1"


@pytest.mark.parametrize(
    "files", [{"cpu.max": "max 100000"}, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}]
)
def test_container_without_a_limit(tmp_path: Path, files: dict[str, str]) -> None:
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert examine().warnings == []


def test_memory_that_a_container_may_use(tmp_path: Path) -> None:
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "memory.max").write_text("500000000\n")
    found = examine()
    assert found.machine["memory_bytes"] == 500_000_000
    assert advice(found) == "only 0.5 GB memory is available: end other programs"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (doctor.SHARED_MEMORY, "is free in /dev/shm"),
        (Path.cwd(), "is free on this disk"),
        (None, "is free for the cache"),
    ],
    ids=["shared memory", "disk", "cache"],
)
def test_low_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: Path | None, words: str) -> None:
    low = place or tmp_path / "cache"
    monkeypatch.setattr(doctor, "_free", lambda path: 64 * 10**6 if path == low else 50 * 10**9)
    assert advice(examine()).startswith(f"only 0.1 GB {words}")


def test_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert "engine.workers=0" in advice(examine())


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in ("mnist/train.parquet", "mnist/test.parquet", "cifar10/train.parquet", "speech/a.npz", "loose.txt"):
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "data"))
    found = examine()
    assert (found.data["datasets"], found.data["other_folders"]) == (["mnist"], ["speech"])
    assert advice(found).startswith("data set 'cifar10' in GOSSAMER_DATA lacks train.parquet or test.parquet")
    assert f"GOSSAMER_DATA      {tmp_path / 'data'}\ndata sets          mnist\n" in render(found, as_json=False)


def test_data_folder_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path / "nowhere"))
    assert "nowhere' is not a folder" in advice(examine())


def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file" / "cache"))
    assert advice(examine()).endswith("set GOSSAMER_CACHE to a folder of yours")


def test_command_succeeds_with_warnings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    shown, as_json = CliRunner().invoke(app, ["doctor"]), CliRunner().invoke(app, ["doctor", "--json"])
    assert (shown.exit_code, as_json.exit_code) == (0, 0)
    assert "warning: OMP_NUM_THREADS=4" in shown.stdout
    assert json.loads(as_json.stdout)["machine"]["thread_variables"] == {"OMP_NUM_THREADS": "4"}


def test_this_very_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = examine()
    assert found.machine["num_usable_cores"] >= 1
    assert found.machine["disk_free_bytes"] > 0
    assert found.torch["num_threads"] >= 1
    assert found.versions["torch"] is not None
