"""Numbers of devices that are measured: of this machine here, and of cards by tools that ran on them."""

from __future__ import annotations

import csv
import math
import mmap
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from gossamer.errors import ConfigError, DataError, nearest, storage_errors
from gossamer.profiling.devices import device_of, read_device, read_numbers
from gossamer.profiling.handing import measured_handing

TRIALS = 15
COPY_BYTES = 1 << 26  # more than caches hold
ROUND_TRIPS, ECHOES = 500, 3
PIPE_BYTES = 64
STRESSORS = {  # of stress-ng, and the slowdown that each tells
    "cpu": "slowdown_cpu",
    "stream": "slowdown_stream",
    "matrix": "slowdown_matrix",
    "memcpy": "slowdown_copy",
    "crypt": "slowdown_crypto",
}
RATE = "bogo-ops-per-second-usr-sys-time"  # a second of processor time, so it is that of one thread
DOUBT = 0.1  # by which one reading may be off
MIB = 1 << 20
NUMBERS = r"(\s*\d+(\.\d*)?(?=\s|$))+\s*"  # a row of perftest's table
HEADINGS = r"#\w+|(?:BW |[\d.]+% )?\w+\[[^\]]+\]"  # of perftest's tables, such as "BW average[MB/sec]"
SPEEDS = {"b": 0.125, "B": 1.0}
PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
Entry = dict[str, Any]


def entry(values: Sequence[float], unit: str, source: str, tag: str = "measured") -> Entry:
    """Return a number as a device file has it: the median of readings, and 5 and 95 % of them as bounds.

    One reading alone may be off by `DOUBT` either way.
    """
    lo, hi = (
        (values[0] * (1 - DOUBT), values[0] * (1 + DOUBT)) if len(values) == 1 else np.quantile(values, [0.05, 0.95])
    )
    value = float(f"{median(values):.4g}")
    bounds = min(value, float(f"{lo:.4g}")), max(value, float(f"{hi:.4g}"))
    return {"value": value, "lo": bounds[0], "hi": bounds[1], "unit": unit, "tag": tag, "source": source}


def host_numbers() -> dict[str, Entry]:
    """Measure this machine, as if a spare core of it were the device; takes some seconds.

    A copy within memory gives the bandwidth of memory, one into memory that processes share that of the link, a byte
    that another process sends back its latency, and an echo of a side-car what a submission takes. The line rate is
    what the system tells of its fastest network interface, or assumed.
    """
    here = f"gossamer offload calibrate on {_processor()}, {TRIALS} trials"
    one, cores = "the host's own core", float(len(os.sched_getaffinity(0)))
    found = {"cores": entry([cores] * 2, "cores", f"{here}: processors that this process may use")}
    found |= {name: entry([1.0] * 2, "times", one, "derived") for name in STRESSORS.values()}
    source, target = np.ones(COPY_BYTES, dtype=np.uint8), np.ones(COPY_BYTES, dtype=np.uint8)
    shared = np.frombuffer(mmap.mmap(-1, COPY_BYTES), dtype=np.uint8)
    latency, submit = _latencies(), [measured_handing().submit for _ in range(ECHOES)]
    found |= {
        "memory_bandwidth": entry(_rates(source, target, 2), "bytes/s", f"{here}: bytes read and written by copies"),
        "link_bandwidth": entry(_rates(source, shared, 1), "bytes/s", f"{here}: copies into memory that is shared"),
        "link_latency": entry(latency, "s", f"{here}: half of a round trip between two processes"),
        "submit": entry(submit, "s", f"{here}: handing an empty piece to a side-car"),
        "line_rate": _line_rate(),
    }
    return found


def _rates(source: Any, target: Any, times: int) -> list[float]:
    """Return bytes a second of copies, each byte counted so many times."""
    found = []
    for _ in range(TRIALS + 1):
        began = time.perf_counter()
        np.copyto(target, source)
        found.append(times * len(source) / (time.perf_counter() - began))
    return found[1:]  # the first brings pages into being


def _latencies() -> list[float]:
    """Return seconds of a message to another process, of each trial."""
    there, back = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there[1])  # or it would never see the end
        while data := os.read(there[0], PIPE_BYTES):
            os.write(back[1], data)
        os._exit(0)
    latency = list[float]()
    try:
        for _ in range(TRIALS):
            began = time.perf_counter()
            for _ in range(ROUND_TRIPS):
                os.write(there[1], b"x")
                os.read(back[0], PIPE_BYTES)
            latency.append((time.perf_counter() - began) / ROUND_TRIPS / 2)
    finally:
        for end in (*there, *back):
            os.close(end)
        os.waitpid(child, 0)
    return latency


def _processor() -> str:
    """Return the name of the processor."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else []
    named = next((line for line in lines if line.lower().startswith("model name")), "")
    return named.partition(":")[2].strip() or os.uname().machine


def _line_rate(folder: Path = Path("/sys/class/net")) -> Entry:
    """Return what the fastest interface can do; unknown ones are assumed to have a gigabit."""
    speeds = []
    for path in folder.glob("*/speed"):
        try:
            speeds.append(int(path.read_text()))
        except (OSError, ValueError):  # an interface that is down has none
            continue
    if not any(speed > 0 for speed in speeds):
        known = {"value": 1.25e8, "lo": 1.25e8, "hi": 1.25e10, "unit": "bytes/s", "tag": "assumed"}
        return known | {"source": "no interface tells its speed; bounds are a guess"}
    return entry([max(speeds) * 1e6 / 8] * 2, "bytes/s", "the system's own word for its fastest interface", "vendor")


def read_stress_ng(host: Path, card: Path) -> dict[str, Entry]:
    """Return slowdowns of a card against a host, from files that ``stress-ng --metrics --yaml FILE`` wrote on each.

    Raises:
        DataError: a file is none of these, or they have no stressor in common that is of use.
    """
    rates = [_stress_ng_rates(path) for path in (host, card)]
    common = [name for name in STRESSORS if all(name in one for one in rates)]
    if not common:
        raise DataError(
            f"{str(host)!r} and {str(card)!r} have none of the stressors {', '.join(STRESSORS)} in common: run"
            " stress-ng with them on both"
        )
    source = f"stress-ng on both: {RATE} in {host.name} by that in {card.name}; bounds: {DOUBT:.0%}"
    return {STRESSORS[name]: entry([rates[0][name] / rates[1][name]], "times", source) for name in common}


def _stress_ng_rates(path: Path) -> dict[str, float]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise DataError(
            f"cannot read {str(path)!r} ({' '.join(str(error).split())}): write it by stress-ng --metrics --yaml FILE"
        ) from None
    rows = data.get("metrics") if isinstance(data, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"{str(path)!r} has no metrics: write it by stress-ng --metrics --yaml FILE")
    found = dict[str, float]()
    for row in rows:
        rate = row.get(RATE)
        if isinstance(rate, int | float) and rate > 0 and math.isfinite(rate):
            found[str(row.get("stressor"))] = float(rate)
    return found


def read_doca_bench(path: Path, column: str | None = None) -> dict[str, Entry]:
    """Return the throughput of an engine from a table that ``doca_bench --csv-output-file FILE`` wrote.

    Args:
        column: of the throughput, in bytes a second or with a unit, such as ``12.1 GiB/s``; None: the only one whose
            name has ``throughput`` and ``byte``.

    Raises:
        DataError: there is no such column, or a value in it is no speed.
    """
    rows = _rows(path)
    names = [name for name in rows[0] if name]
    if column is not None and column not in names:
        raise DataError(f"{str(path)!r} has no column {column!r}{nearest(column, names)}: name one of its header")
    fitting = [column] if column else [n for n in names if "throughput" in n.lower() and "byte" in n.lower()]
    if len(fitting) != 1:
        raise DataError(
            f"{str(path)!r} has {len(fitting)} columns of a throughput in bytes: name the column, one of"
            f" {', '.join(names)}"
        )
    values = [_speed(path, row[fitting[0]]) for row in rows]
    return {"throughput": entry(values, "bytes/s", f"doca_bench: {fitting[0]} in {path.name}, {len(values)} rows")}


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {str(path)!r} ({error}): give CSV with a header") from None
    if not rows:
        raise DataError(f"{str(path)!r} has no rows below its header: give a table of doca_bench")
    return rows


def _speed(path: Path, text: str | None) -> float:
    """Return bytes a second."""
    match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*(?:([KMG]i?)?([bB])(?:/s|ps))?\s*", text or "")
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not number > 0:
        raise DataError(f"{str(path)!r}: {text!r} is no speed: give bytes a second, or a unit such as GiB/s")
    return number * PREFIXES[match[2] or ""] * SPEEDS[match[3] or "B"]


def read_perftest(path: Path) -> dict[str, Entry]:
    """Return bandwidth or latency of the link from what a program of perftest printed, such as ``ib_write_bw``.

    The bandwidth is that of the largest messages, in MiB a second as these programs count; the latency the typical one
    of the smallest messages.

    Raises:
        DataError: it has no table of results.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r} ({error.strerror}): give what perftest printed") from None
    columns, rows = list[str](), list[list[float]]()
    for line in lines:
        if line.strip().startswith("#bytes"):
            columns = re.findall(HEADINGS, line)
        elif columns and re.fullmatch(NUMBERS, line) and len(numbers := line.split()) == len(columns):
            rows.append([float(one) for one in numbers])
    rows = sorted(row for row in rows if row[0] > 0)
    for name, number, unit, pick, scale in (
        ("BW average[MB/sec]", "link_bandwidth", "bytes/s", -1, float(MIB)),
        ("t_typical[usec]", "link_latency", "s", 0, 1e-6),
    ):
        if rows and name in columns:
            value = rows[pick][columns.index(name)] * scale
            if value > 0:
                source = f"perftest: {name} of {rows[pick][0]:g} bytes in {path.name}; bounds: {DOUBT:.0%}"
                return {number: entry([value], unit, source)}
    raise DataError(
        f"{str(path)!r} has no table with BW average[MB/sec] or t_typical[usec]: give what perftest printed"
    )


def made_device(
    name: str, base: str | None, numbers: Mapping[str, Entry], throughputs: Mapping[str, Mapping[str, Entry]]
) -> dict[str, Any]:
    """Return the content of a device file.

    Args:
        name: of the device.
        base: of the device whose numbers stand where none is given, see `read_device`; None: this machine is measured.
        numbers: those that take the place of its numbers.
        throughputs: likewise, by engines of the base.

    Raises:
        ConfigError: there is no such device, or it has no such engine.
    """
    if base is None:
        found: dict[str, Any] = {"description": "a spare core of this host", "numbers": host_numbers(), "engines": {}}
    else:
        read_device(base)
        found = dict(read_numbers(base))
    engines = {
        key: {**engine, "numbers": dict(engine["numbers"])} for key, engine in (found.get("engines") or {}).items()
    }
    for engine, told in throughputs.items():
        if engine not in engines:
            known = ", ".join(engines) or "none"
            raise ConfigError(f"device {base or 'host'!r} has no engine {engine!r} (known: {known}): choose its --base")
        engines[engine]["numbers"] |= told
    made = {"name": name, "description": found["description"], "numbers": {**found["numbers"], **numbers}}
    made |= {"engines": engines} if engines else {}
    device_of(f"device {name!r}", made)
    return made


def write_device(path: Path, made: Mapping[str, Any]) -> None:
    """Write a device file.

    Raises:
        StorageError: the disk refuses it.
    """
    with storage_errors(path):
        path.write_text(yaml.safe_dump(dict(made), sort_keys=False, width=1000), encoding="utf-8")
