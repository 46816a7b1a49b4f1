"""What is installed, what the machine has, and what should be changed before a long run."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gossamer import memory, registry
from gossamer.memory import machine_memory, number_in
from gossamer.storage.tables import aligned

REQUIRED = (
    *("gossamer", "torch", "numpy", "scipy", "networkx", "ray", "grpcio", "protobuf", "pydantic", "PyYAML", "typer"),
    *("rich", "matplotlib", "safetensors", "scikit-learn", "datasets"),
)
OPTIONAL = ("tensorboard", "mlflow", "wandb", "perfetto", "opentelemetry-sdk", "transformers")
MIN_TORCH = (2, 10)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MIN_DISK_BYTES = 2e9
MIN_MEMORY_BYTES = 1e9
MIN_SHARED_BYTES = 1e9
SHARED_MEMORY = Path("/dev/shm")
PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Advice:
    """A problem, and its remedy."""

    problem: str
    remedy: str


@dataclass
class Examination:
    """What was found.

    Attributes:
        versions: version of each package; None where it is not installed.
        machine: processors, memory and disks.
        torch: threads and accelerators, or the error of its import.
        ray: version or the error of its import, and the clusters with a node here.
        data: folders of data sets and caches.
        warnings: problems and remedies.
    """

    versions: dict[str, str | None] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    torch: dict[str, Any] = field(default_factory=dict)
    ray: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    warnings: list[Advice] = field(default_factory=list)


def examine() -> Examination:
    """Examine this interpreter and this machine, without changing anything."""
    found = Examination(_versions(), _machine(), _torch(), _ray(), _data())
    found.warnings += [
        *_version_warnings(found.versions),
        *_torch_warnings(found),
        *_ray_warnings(found),
        *_machine_warnings(found.machine),
        *_data_warnings(found.data),
    ]
    return found


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*REQUIRED, *OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _machine() -> dict[str, Any]:
    total, available = machine_memory()
    return {
        "platform": platform.platform(),
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "container_cores": _container_cores(),
        "memory_bytes": total,
        "available_memory_bytes": available,
        "shared_memory_free_bytes": _free(SHARED_MEMORY),
        "fork": "fork" in multiprocessing.get_all_start_methods(),
        "disk_free_bytes": _free(Path.cwd()),
        "thread_variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
    }


def _container_cores() -> float | None:
    """Return the container's limit of processor time in cores, or None where it has none."""
    try:
        quota, period = (memory.CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota_us, period_us = (
        number_in(memory.CGROUP / "cpu" / "cpu.cfs_quota_us"),
        number_in(memory.CGROUP / "cpu" / "cpu.cfs_period_us"),
    )
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _free(path: Path) -> int | None:
    """Return the free bytes of the disk of `path`, which need not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch

        cuda = torch.cuda.is_available()
        return {
            "num_threads": torch.get_num_threads(),
            "cuda": cuda,
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if cuda
            else [],
        }
    except Exception as error:  # a broken installation, which is to be reported, may fail in any way
        return {"error": f"{type(error).__name__}: {error}"}


def _ray() -> dict[str, Any]:
    from gossamer.cli.ray_clusters import find_clusters
    from gossamer.engines.ray import ray_version

    clusters = [asdict(cluster) for cluster in find_clusters(PROCESSES)]
    try:
        return {"version": ray_version(), "clusters": clusters}
    except Exception as error:  # likewise
        return {"error": f"{type(error).__name__}: {error}", "clusters": clusters}


def _data() -> dict[str, Any]:
    given = os.environ.get("GOSSAMER_DATA")
    root = Path(given) if given else None
    folder = os.environ.get("GOSSAMER_CACHE")
    cache = Path(folder) if folder else Path.home() / ".cache" / "gossamer"
    complete, incomplete, others = _folders(root)
    return {
        "gossamer_data": given,
        "exists": root is not None and root.is_dir(),
        "datasets": complete,
        "incomplete_datasets": incomplete,
        "other_folders": others,
        "cache": str(cache),
        "cache_writable": _writable(cache),
        "cache_free_bytes": _free(cache),
    }


def _folders(root: Path | None) -> tuple[list[str], list[str], list[str]]:
    """Return the complete data sets in `root`, those that lack a split, and the other folders."""
    complete: list[str] = []
    incomplete: list[str] = []
    others: list[str] = []
    try:
        folders = sorted(child for child in root.iterdir() if child.is_dir()) if root is not None else []
    except OSError:
        folders = []
    for folder in folders:
        if folder.name not in registry.BUILTIN["dataset"]:
            others.append(folder.name)
        elif all((folder / f"{split}.parquet").is_file() for split in ("train", "test")):
            complete.append(folder.name)
        else:
            incomplete.append(folder.name)
    return complete, incomplete, others


def _writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _version_warnings(versions: dict[str, str | None]) -> Iterator[Advice]:
    missing = [package for package in REQUIRED if versions[package] is None and package != "gossamer"]
    if missing:
        yield Advice(f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    if versions["gossamer"] is None:
        yield Advice(
            "gossamer itself is not installed, only importable", "pip install it, so that runs record its version"
        )
    torch = versions["torch"]
    if torch is not None and tuple(int(part) for part in torch.split(".")[:2]) < MIN_TORCH:
        oldest = ".".join(map(str, MIN_TORCH))
        yield Advice(f"torch {torch} is older than {oldest}", f"pip install 'torch>={oldest}'")


def _torch_warnings(found: Examination) -> Iterator[Advice]:
    torch, usable = found.torch, found.machine["num_usable_cores"] or 1
    if "error" in torch:
        yield Advice(
            f"torch cannot be imported ({torch['error']})", "install torch again: pip install --force-reinstall torch"
        )
    elif torch["num_threads"] > usable:
        yield Advice(
            f"torch uses {torch['num_threads']} threads on {usable} usable cores",
            f"set OMP_NUM_THREADS={usable}, or unset it",
        )
    for name, value in found.machine["thread_variables"].items():
        yield Advice(
            f"{name}={value} is set, but every worker computes with one thread",
            f"unset {name}; choose engine.workers instead",
        )


def _ray_warnings(found: Examination) -> Iterator[Advice]:
    if "error" in found.ray:
        yield Advice(f"Ray cannot be imported ({found.ray['error']})", "install it again: pip install ray")
    free = found.machine["shared_memory_free_bytes"]
    for cluster in found.ray["clusters"]:
        address, size = cluster["address"], cluster["object_store_bytes"]
        if cluster["exposed"] and not cluster["has_token"]:
            yield Advice(
                f"Ray at {address} runs whatever code it is sent, without asking for a token, and other machines can"
                f" reach {_ports(cluster)}",
                "start it with RAY_AUTH_MODE=token (docs/clusters.md), and keep its ports behind a firewall",
            )
        if "dashboard" in cluster["exposed"]:
            yield Advice(
                f"other machines can reach the dashboard of Ray at {address}",
                "start it with --dashboard-host=127.0.0.1, and look at it through an ssh tunnel",
            )
        if size is not None and free is not None and size > free:
            yield Advice(
                f"the object store of Ray at {address} may grow to {_gigabytes(size)}, but {_gigabytes(free)} are free"
                f" in {SHARED_MEMORY}",
                f"start it with --object-store-memory={int(0.8 * free)}, or give the container more:"
                " docker run --shm-size",
            )


def _ports(cluster: dict[str, Any]) -> str:
    return ", ".join(f"{kind} ({' '.join(map(str, ports))})" for kind, ports in cluster["exposed"].items())


def _machine_warnings(machine: dict[str, Any]) -> Iterator[Advice]:
    quota, usable = machine["container_cores"], machine["num_usable_cores"] or 1
    if quota is not None and quota < usable:
        workers = max(1, int(quota))
        yield Advice(f"the container may use {quota:g} of {usable} cores", f"set engine.workers={workers}")
    if not machine["fork"]:
        yield Advice("this system cannot fork, so there are no worker processes", "set engine.workers=0, or use Linux")
    yield from _low(machine["available_memory_bytes"], MIN_MEMORY_BYTES, "memory is available", "end other programs")
    yield from _low(
        machine["shared_memory_free_bytes"],
        MIN_SHARED_BYTES,
        f"is free in {SHARED_MEMORY}, where Ray keeps its objects",
        "give the container more: docker run --shm-size=4g",
    )
    yield from _low(machine["disk_free_bytes"], MIN_DISK_BYTES, "is free on this disk", "free some, or give --out DIR")


def _data_warnings(data: dict[str, Any]) -> Iterator[Advice]:
    if data["gossamer_data"] and not data["exists"]:
        yield Advice(f"GOSSAMER_DATA = {data['gossamer_data']!r} is not a folder", "correct it, or unset it")
    for name in data["incomplete_datasets"]:
        yield Advice(
            f"data set {name!r} in GOSSAMER_DATA lacks train.parquet or test.parquet", "add it, or remove the folder"
        )
    if not data["cache_writable"]:
        yield Advice(f"the cache {data['cache']!r} cannot be written", "set GOSSAMER_CACHE to a folder of yours")
    elif data["cache_free_bytes"] is not None:
        remedy = "free some, or set GOSSAMER_CACHE to another disk"
        yield from _low(data["cache_free_bytes"], MIN_DISK_BYTES, f"is free for the cache {data['cache']!r}", remedy)


def _low(num_bytes: int | None, limit: float, what: str, remedy: str) -> Iterator[Advice]:
    if num_bytes is not None and num_bytes < limit:
        yield Advice(f"only {num_bytes / 1e9:.1f} GB {what}", remedy)


def render(found: Examination, as_json: bool) -> str:
    """Return a table with warnings, or one JSON object."""
    if as_json:
        return json.dumps(asdict(found), indent=2)
    warnings = [f"warning: {advice.problem}: {advice.remedy}" for advice in found.warnings]
    return "\n".join([aligned(_rows(found)), "", *(warnings or ["nothing to change"])])


def _rows(found: Examination) -> Iterator[tuple[str, str]]:
    for package, number in found.versions.items():
        yield package, number or "not installed" + (" (optional)" if package in OPTIONAL else "")
    machine, data = found.machine, found.data
    quota = machine["container_cores"]
    limit = f", {quota:g} by the container's limit" if quota is not None else ""
    yield "cores", f"{machine['num_usable_cores']} usable of {machine['num_cores']}{limit}"
    yield (
        "memory",
        f"{_gigabytes(machine['available_memory_bytes'])} available of {_gigabytes(machine['memory_bytes'])}",
    )
    yield "shared memory", f"{_gigabytes(machine['shared_memory_free_bytes'])} free in {SHARED_MEMORY}"
    yield "disk", f"{_gigabytes(machine['disk_free_bytes'])} free in the current directory"
    yield "fork", "available" if machine["fork"] else "not available"
    yield "CUDA", _accelerator(found.torch)
    yield "Ray", "cannot be imported" if "error" in found.ray else f"{found.ray['version']} can be imported"
    for cluster in found.ray["clusters"]:
        token = {True: "with a token", False: "without a token", None: "of another user"}[cluster["has_token"]]
        store = f"object store up to {_gigabytes(cluster['object_store_bytes'])}"
        yield "Ray cluster", f"{cluster['address']}, {token}, {store}, exposed: {_ports(cluster) or 'nothing'}"
    if not found.ray["clusters"]:
        yield "Ray cluster", "none has a node here"
    yield "GOSSAMER_DATA", data["gossamer_data"] or "not set: what is not embedded is fetched from the Hugging Face hub"
    if data["exists"]:
        yield "data sets", ", ".join(data["datasets"]) or "none"
        yield "other folders", ", ".join(data["other_folders"]) or "none"
    yield "cache", f"{data['cache']} ({_gigabytes(data['cache_free_bytes'])} free)"


def _accelerator(torch: dict[str, Any]) -> str:
    if "error" in torch:
        return "unknown: torch cannot be imported"
    present = ", ".join(torch["devices"]) if torch["cuda"] else "not available"
    return f"{present}; the local engine trains on the CPU"


def _gigabytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"
