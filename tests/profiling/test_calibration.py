"""Device files from what was measured: of this machine, and from what tools wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from gossamer.cli.main import app
from gossamer.errors import DataError
from gossamer.profiling import calibration
from gossamer.profiling.calibration import entry, read_doca_bench, read_perftest, read_stress_ng
from gossamer.profiling.devices import read_device

STRESS_NG = """---
system-info:
      stress-ng-version: 0.15.06
      date-yyyy-mm-dd: 2026:12:01
      version: '#1 SMP PREEMPT_DYNAMIC @0'

metrics:
    - stressor: cpu
      bogo-ops: 348
      bogo-ops-per-second-usr-sys-time: {cpu}
      bogo-ops-per-second-real-time: 343.736631

    - stressor: memcpy
      bogo-ops: 88
      bogo-ops-per-second-usr-sys-time: {memcpy}
      max-rss: 6616

    - stressor: fork
      bogo-ops-per-second-usr-sys-time: 0.0
...
"""
BANDWIDTH = """---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 2          5000             4.26               3.88           2.036842
 65536      1000             2757.96            2757.93\t\t   0.044127
---------------------------------------------------------------------------------------
"""
LATENCY = """ #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]   99% percentile[usec]
 2       1000          0.81           3.10         0.85                0.93          1.2
 64      1000          0.91           3.10         0.95                0.99          1.3
"""
TABLE = "cfg.core.count,stats.input.throughput.bytes,stats.output.jobs\n1,{0},9\n2,{1},8\n3,{2},8\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with what each tool wrote."""
    (tmp_path / "host.yaml").write_text(STRESS_NG.format(cpu=2000.0, memcpy=500.0))
    (tmp_path / "card.yaml").write_text(STRESS_NG.format(cpu=500.0, memcpy=250.0))
    (tmp_path / "bw.txt").write_text(BANDWIDTH)
    (tmp_path / "lat.txt").write_text(LATENCY)
    (tmp_path / "bench.csv").write_text(TABLE.format("1000000000", "8 Gb/s", "1.1e9 B/s"))
    return tmp_path


def call(*arguments: object) -> Result:
    """Run ``gossamer offload``."""
    return CliRunner().invoke(app, ["offload", *(str(one) for one in arguments)])


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=30))
def test_bounds_enclose_the_value(values: list[float]) -> None:
    found = entry(values, "s", "x")
    assert found["lo"] <= found["value"] <= found["hi"]


def test_slowdowns_are_ratios_of_processor_time(files: Path) -> None:
    found = read_stress_ng(files / "host.yaml", files / "card.yaml")
    assert {name: one["value"] for name, one in found.items()} == {"slowdown_cpu": 4.0, "slowdown_copy": 2.0}
    assert (found["slowdown_cpu"]["lo"], found["slowdown_cpu"]["hi"]) == pytest.approx((3.6, 4.4))
    assert all(one["tag"] == "measured" for one in found.values())


def test_links_are_read(files: Path) -> None:
    assert read_perftest(files / "bw.txt")["link_bandwidth"]["value"] == pytest.approx(2757.93 * 2**20, rel=1e-3)
    assert read_perftest(files / "lat.txt")["link_latency"]["value"] == pytest.approx(0.85e-6)


def test_a_damaged_row_of_perftest_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bw.txt"
    path.write_text(" #bytes  #iterations  BW average[MB/sec]\n 2  5  1.5\n 4  5  2.5.1\n 8  5  .\n")
    assert read_perftest(path)["link_bandwidth"]["value"] == pytest.approx(1.5 * 2**20, rel=1e-3)


def test_engines_are_read_in_their_units(files: Path) -> None:
    found = read_doca_bench(files / "bench.csv")["throughput"]
    assert (found["value"], found["lo"], found["hi"]) == pytest.approx((1e9, 1e9, 1.09e9), rel=1e-6)
    assert found["source"] == "doca_bench: stats.input.throughput.bytes in bench.csv, 3 rows"
    assert read_doca_bench(files / "bench.csv", "stats.output.jobs")["throughput"]["value"] == 8


def test_this_host_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(calibration, "ROUND_TRIPS", 20)
    assert call("calibrate", "-o", tmp_path / "here.yaml").exit_code == 0
    device = read_device(str(tmp_path / "here.yaml"))
    assert device.name == "here"
    assert device.numbers["submit"].tag == "measured"
    assert 0 < device.numbers["submit"].value < 1
    assert device.numbers["slowdown_cpu"].value == 1


def test_a_card_takes_over_what_was_measured(files: Path) -> None:
    tools = "--stress-ng", files / "host.yaml", files / "card.yaml", "--doca-bench", files / "bench.csv"
    links = "--perftest", files / "bw.txt", "--perftest", files / "lat.txt"
    result = call("calibrate", "-o", files / "mine.yaml", "--base", "bluefield-2", *tools, *links)
    assert result.exit_code == 0, result.output
    found, before = read_device(str(files / "mine.yaml")), read_device("bluefield-2")
    assert found.numbers["slowdown_cpu"].value == 4.0
    assert found.numbers["slowdown_matrix"] == before.numbers["slowdown_matrix"]
    assert {found.numbers[name].tag for name in ("link_bandwidth", "link_latency")} == {"measured"}
    assert found.engines["deflate"].numbers["throughput"].value == pytest.approx(1e9)
    assert found.engines["deflate"].numbers["latency"] == before.engines["deflate"].numbers["latency"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--stress-ng", "host.yaml", "bw.txt"], "bw.txt"),
        (["--stress-ng", "host.yaml", "none.yaml"], "none.yaml"),
        (["--perftest", "bench.csv"], "has no table with BW average"),
        (["--perftest", "none.txt"], "cannot read"),
        (["--doca-bench", "bench.csv"], "device 'host' has no engine 'deflate' (known: none)"),
        (["--doca-bench", "bench.csv", "--column", "stats.input.troughput.bytes"], "did you mean"),
        (["--doca-bench", "lat.txt"], "has 0 columns of a throughput"),
        (["--column", "a"], "--column a changes nothing without --doca-bench"),
        (["--base", "bluefield-9"], "unknown device 'bluefield-9'"),
        (["--base", "bluefield-2", "--engine", "x", "--doca-bench", "bench.csv"], "has no engine 'x' (known: deflate"),
    ],
)
def test_bad_input_is_one_sentence(
    files: Path, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "host_numbers", lambda: read_device("host").numbers)
    monkeypatch.chdir(files)
    result = call("calibrate", "-o", "made.yaml", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (files / "made.yaml").exists()


def test_a_file_that_exists_is_kept(files: Path) -> None:
    result = call("calibrate", "-o", files / "host.yaml")
    assert result.exit_code == 2
    assert "exists: choose another file" in result.stderr


@pytest.mark.parametrize("text", ["", "fast", "3 apples/s", "-1 GiB/s", "1.2.3"])
def test_what_is_no_speed_is_refused(files: Path, text: str) -> None:
    (files / "bench.csv").write_text(TABLE.format("1", text, "1"))
    with pytest.raises(DataError, match="is no speed"):
        read_doca_bench(files / "bench.csv")
