"""Verdicts on offloading: what must win, what must lose, and what nobody can tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer.errors import ConfigError
from gossamer.profiling.advice import CANNOT_TELL, LOSE, WIN, Verdict, is_nothing_worth, judge
from gossamer.profiling.devices import Accelerator, Device, Number, read_device
from gossamer.profiling.graphs import ARRIVE, graph_of
from gossamer.profiling.offload import STAGES, costs_of, move, stage_named
from gossamer.profiling.replay import Graph, Node, replay
from gossamer.profiling.trace import Trace, read_trace
from gossamer.reports.profile import delay_share, offload, render_offload
from traces import span, write

MB = 1_000_000
ENGINE_GAIN = {"deflate": 45.0, "zstd": 1.8}  # of BlueField-2 over a core of a host, by zlib and zstd


def rounds(*stages: tuple[str, float, int], train: float = 0.1) -> list[Graph]:
    """Return six equal rounds of one thread: training, then stages of (kind, seconds, bytes)."""
    nodes = [Node("driver", "train", train, train)]
    nodes += [Node("driver", kind, seconds, seconds, num_bytes) for kind, seconds, num_bytes in stages]
    return [Graph([*nodes, Node("driver", "update", 0.01, 0.01)])] * 6


def emulated(**values: float) -> Device:
    """Return the emulated device with other numbers."""
    device = read_device("emulated")
    changed = {name: replace(device.numbers[name], value=value, lo=value, hi=value) for name, value in values.items()}
    return replace(device, numbers=device.numbers | changed)


def verdict_of(graphs: list[Graph], device: Device, name: str) -> Verdict:
    """Return the verdict on one stage."""
    (found,) = judge(graphs, device, [stage_named(name)])
    return found


def seconds(graph: Graph, device: Device, name: str, **place: float) -> float:
    """Return how long a round is with a stage moved."""
    stage = stage_named(name)
    return move(graph, stage, costs_of(device, stage, stage.kinds[:1], place)).seconds


def compressions(kind: str, sizes: list[int], num_cores: int = 1) -> list[Graph]:
    """Return rounds that compress pieces of some bytes, by the published ratio to BlueField-2's engine for one core."""
    seconds_per_byte = ENGINE_GAIN[kind] / read_device("bluefield-2").engines["deflate"].numbers["throughput"].value
    return rounds(*((kind, size * seconds_per_byte / num_cores, size) for size in sizes), train=0.01)


class TestClosedForms:
    def test_a_synchronous_stage_takes_submit_link_and_slowdown(self) -> None:
        device = emulated(slowdown_cpu=3, link_latency=1e-3, link_bandwidth=1e8, submit=2e-3)
        (graph, *_) = rounds(("compress", 0.02, MB))
        expected = 0.1 + 2e-3 + (1e-3 + 0.01) + 3 * 0.02 + (0.01 + 1e-3) + 0.01
        assert seconds(graph, device, "codec") == pytest.approx(expected, abs=1e-9)

    def test_a_background_stage_costs_the_host_the_copy_alone(self) -> None:
        device = emulated(slowdown_copy=2, link_latency=1e-3, link_bandwidth=1e8, submit=2e-3)
        (graph, *_) = rounds(("checkpoint", 0.05, MB))
        assert seconds(graph, device, "checkpoint") == pytest.approx(0.1 + 2e-3 + 0.01 + 1e-3 + 0.01, abs=1e-9)

    def test_what_a_relay_adds_up_crosses_the_link_once(self) -> None:
        """Two updates arrive at the device, which adds them up; the mean alone goes on to the host."""
        device = emulated(slowdown_stream=2, link_latency=1e-3, link_bandwidth=1e8, submit=0, memory_bandwidth=1e12)
        arrive, add, combine = (ARRIVE, 0.01, MB), ("aggregate", 0.02, MB), ("combine", 0.01, MB)
        (graph, *_) = rounds(arrive, add, arrive, add, combine)
        own = 2 * (2 * 0.01 + 2 * 0.02 + 0.01)
        assert seconds(graph, device, "relay") == pytest.approx(0.1 + 1e-3 + own + 0.01 + 1e-3 + 0.01, abs=1e-9)
        found = verdict_of([graph] * 6, device, "relay")
        assert found.link_bytes == MB
        (third,) = [one for one in found.advice if one.name == "A3"]
        assert third.is_met
        assert "1,000,000 bytes a round cross its link instead of 2,000,000" in third.why

    def test_a_relay_of_one_update_saves_no_bytes(self) -> None:
        (graph, *_) = rounds((ARRIVE, 0.01, MB), ("combine", 0.01, MB))
        found = verdict_of([graph] * 6, emulated(), "relay")
        assert {one.name: one.is_met for one in found.advice}["A3"] is False

    def test_there_is_no_relay_where_nothing_arrives(self) -> None:
        graphs = rounds(("receive", 0.01, MB), ("aggregate", 0.02, MB))
        assert [one.stage for one in judge(graphs, emulated())] == ["aggregation"]

    def test_a_device_that_cannot_keep_up_makes_the_round_longer(self) -> None:
        (graph, *_) = rounds(("checkpoint", 0.05, MB))
        device = emulated(slowdown_copy=20, link_latency=1e-3, link_bandwidth=1e8)
        assert seconds(graph, device, "checkpoint") == pytest.approx(0.01 + 1e-3 + 20 * 0.05 + 1e-3, abs=1e-9)

    def test_pieces_of_a_pipeline_overlap(self) -> None:
        nodes = [Node("driver", kind, 0.01, 0.01) for _ in range(10) for kind in ("receive", "aggregate")]
        graph = Graph([*nodes, Node("driver", "update", 0.01, 0.01)])
        device = emulated(slowdown_stream=1, link_latency=0, submit=0)
        assert seconds(graph, device, "aggregation") == pytest.approx(0.01 + 10 * 0.01 + 0.01, abs=1e-9)

    def test_threads_do_not_wait_for_their_turn_on_the_link(self) -> None:
        device = emulated(cores=2, slowdown_cpu=10, link_latency=0, link_bandwidth=1e9, submit=0)
        # As recorded, slow compresses first; ten times as slowly, quick is done long before it.
        graph = Graph([Node("slow", "compress", 0.05, 0.05, MB), Node("quick", "compress", 0.01, 0.01, MB)])
        graph.add(Node("quick", "train", 0.3), [])
        assert seconds(graph, device, "codec") == pytest.approx(0.002 + 0.5, abs=1e-9)

    def test_all_threads_share_the_time_of_the_link(self) -> None:
        device = emulated(slowdown_cpu=1, link_latency=0, link_bandwidth=1e8, submit=0)
        graph = Graph([Node(f"w{number}", "compress", 0.01, 0.01, 10 * MB) for number in range(5)])
        assert seconds(graph, device, "codec") == pytest.approx(5 * 0.1, abs=1e-9)

    def test_sums_stay_on_the_device_until_they_are_combined(self) -> None:
        device = emulated(slowdown_stream=1, link_latency=1e-3, link_bandwidth=1e8, submit=0)
        (graph, *_) = rounds(("aggregate", 0.02, MB), ("combine", 0.03, 2 * MB))
        # The payload crosses (0.01 s), is added up and combined there, and what comes of it crosses back (0.02 s).
        expected = 0.1 + (0.01 + 1e-3) + 0.02 + 0.03 + (0.02 + 1e-3) + 0.01
        assert seconds(graph, device, "aggregation") == pytest.approx(expected, abs=1e-9)
        stage = stage_named("aggregation")
        assert move(graph, stage, costs_of(device, stage, stage.kinds, {})).link_bytes == 3 * MB

    def test_a_commit_and_its_digests_are_one_piece(self) -> None:
        device = emulated(slowdown_copy=2, link_latency=1e-3, link_bandwidth=1e8, submit=2e-3)
        (graph, *_) = rounds(*(("checkpoint", 0.02, MB), ("digest", 0.005, MB), ("checkpoint", 0.005, 0)))
        assert seconds(graph, device, "checkpoint") == pytest.approx(0.1 + 2e-3 + 0.01 + 1e-3 + 0.01, abs=1e-9)
        stage = stage_named("checkpoint")
        moved = move(graph, stage, costs_of(device, stage, stage.kinds, {}))
        assert (moved.link_bytes, moved.device_seconds) == (MB, pytest.approx(2 * 0.03))

    def test_copies_and_answers_take_the_hosts_time(self) -> None:
        stage = stage_named("codec")
        free = costs_of(
            emulated(slowdown_cpu=1, link_latency=0, link_bandwidth=1e15, submit=0), stage, ("compress",), {}
        )
        costs = free._replace(submit_seconds_per_byte=1e-9, take=0.002, take_seconds_per_byte=3e-9)
        (graph, *_) = rounds(("compress", 0.02, MB))
        moved = move(graph, stage, costs)
        assert moved.seconds == pytest.approx(0.1 + 0.001 + 0.02 + 0.002 + 0.003 + 0.01, abs=1e-8)
        assert moved.freed_seconds == pytest.approx(0.02 - 0.001 - 0.005, abs=1e-8)

    def test_time_that_is_no_processor_time_stays(self) -> None:
        graph = Graph([Node("driver", "compress", 0.05, 0.01)])
        device = emulated(slowdown_cpu=3, link_latency=0, submit=0)
        assert seconds(graph, device, "codec") == pytest.approx(0.04 + 3 * 0.01, abs=1e-9)

    def test_memory_bounds_a_core(self) -> None:
        graph = Graph([Node("driver", "mix", 0.01, 0.01, 100 * MB)])
        device = emulated(slowdown_matrix=2, memory_bandwidth=1e9, link_bandwidth=1e15, link_latency=0, submit=0)
        assert seconds(graph, device, "mixing") == pytest.approx(0.1, abs=1e-5)


class TestNegativeControls:
    def test_a_tiny_payload_loses_on_an_accelerator(self) -> None:
        found = verdict_of(rounds(*[("deflate", 2e-6, 100)] * 50), read_device("bluefield-2"), "compression")
        assert found.verdict == LOSE
        assert found.engine == "deflate"
        assert [one.is_met for one in found.advice if one.name == "A1"] == [False]

    def test_a_synchronous_offload_at_slowdown_three_loses(self) -> None:
        found = verdict_of(rounds(("compress", 0.05, MB)), emulated(), "codec")
        assert found.verdict == LOSE
        assert "never saves time" in found.reason
        assert found.change.mean > 0
        assert found.freed_cpu_seconds == pytest.approx(0.05, rel=1e-3)
        assert [one.is_met for one in found.advice if one.name == "A4"] == [False]

    def test_nothing_is_worth_offloading_from_a_run_that_computes(self) -> None:
        graphs = rounds(("aggregate", 0.001, MB), ("log", 1e-4, 100), train=10.0)
        for name in ("bluefield-2", "bluefield-3", "emulated", "host"):
            assert is_nothing_worth(judge(graphs, read_device(name)))

    def test_zlib_wins_large_on_a_deflate_engine_and_zstd_does_not(self) -> None:
        device = read_device("bluefield-2")
        engine_seconds = 100 * MB / device.engines["deflate"].numbers["throughput"].value
        zlib, zstd = (
            verdict_of(rounds((kind, gain * engine_seconds, 100 * MB)), device, "compression")
            for kind, gain in ENGINE_GAIN.items()
        )
        assert zlib.verdict == WIN
        assert zlib.change.mean < -0.9
        assert zstd.change.mean > zlib.change.mean + 0.4

    @pytest.mark.parametrize("num_bytes", [100_000, 300_000, MB])
    def test_zstd_of_a_model_does_not_win_where_zlib_wins_large(self, num_bytes: int) -> None:
        device = read_device("bluefield-2")
        zlib, zstd = (verdict_of(compressions(kind, [num_bytes] * 50), device, "compression") for kind in ENGINE_GAIN)
        assert zlib.verdict == WIN
        assert zlib.worst.hi < -0.7
        assert zstd.verdict == CANNOT_TELL
        assert "deflate.latency" in zstd.deciding

    def test_zstd_of_two_cores_loses_where_zlib_of_two_still_wins_large(self) -> None:
        device = read_device("bluefield-2")
        zlib, zstd = (
            verdict_of(compressions(kind, [100 * MB], num_cores=2), device, "compression") for kind in ENGINE_GAIN
        )
        assert zlib.verdict == WIN
        assert zlib.worst.hi < -0.8
        assert zstd.verdict == LOSE

    def test_an_engine_that_only_decompresses_is_not_used(self) -> None:
        device = read_device("bluefield-2")
        one_way = replace(device.engines["deflate"], directions=("decompress",))
        found = verdict_of(rounds(("deflate", 1.0, MB)), replace(device, engines={"deflate": one_way}), "compression")
        assert found.engine is None


class TestVerdicts:
    def test_a_checkpoint_in_the_background_wins(self) -> None:
        found = verdict_of(rounds(("checkpoint", 0.05, MB)), read_device("bluefield-2"), "checkpoint")
        assert found.verdict == WIN
        assert {one.name: one.is_met for one in found.advice} == {"A1": None, "A2": True, "A3": False, "A4": True}
        assert 0 < found.utilisation < 1

    @pytest.mark.parametrize(
        ("kind", "name", "freed"),
        [("aggregate", "aggregation", 3 - 1), ("compress", "codec", 2 - 2), ("digest", "checksum", 1 - 1)],
    )
    def test_memory_of_the_host_is_read_and_written_less_but_for_what_crosses(
        self, kind: str, name: str, freed: int
    ) -> None:
        found = verdict_of(rounds((kind, 0.05, MB), (kind, 0.05, MB)), emulated(), name)
        assert found.memory_bytes == pytest.approx(freed * 2 * MB)

    def test_break_even_is_where_the_round_is_as_long(self) -> None:
        graphs, device = rounds(("checkpoint", 0.05, MB)), emulated()
        found = verdict_of(graphs, device, "checkpoint")
        assert found.break_even_slowdown is not None
        again = verdict_of(graphs, emulated(slowdown_copy=found.break_even_slowdown), "checkpoint")
        assert abs(again.change.mean) < 1e-4

    def test_an_assumed_number_decides(self) -> None:
        device = emulated(slowdown_copy=1)
        guess = Number(1e-3, 1e-6, 0.2, "s", "a guess", "assumed")
        found = verdict_of(
            rounds(("checkpoint", 0.05, MB)),
            replace(device, numbers=device.numbers | {"submit": guess}),
            "checkpoint",
        )
        assert found.verdict == CANNOT_TELL
        assert found.deciding == ["submit"]
        assert "submit is assumed" in found.reason

    @pytest.mark.parametrize("name", ["bluefield-2", "bluefield-3", "host"])
    @pytest.mark.parametrize("pieces", [("checkpoint", 0.05, MB), ("aggregate", 0.05, 10 * MB), ("mix", 0.03, MB)])
    def test_no_assumed_number_flips_a_verdict(self, name: str, pieces: tuple[str, float, int]) -> None:
        graphs, device = rounds(pieces), read_device(name)
        (found,) = judge(graphs, device)
        for key, number in device.numbers.items():
            for value in (number.lo, number.hi):
                fixed = replace(number, value=value, lo=value, hi=value)
                (again,) = judge(graphs, replace(device, numbers=device.numbers | {key: fixed}))
                assert found.verdict in (CANNOT_TELL, again.verdict)

    @pytest.mark.parametrize("kind", ENGINE_GAIN)
    @pytest.mark.parametrize("num_bytes", [100, 10_000, 300_000, 2 * MB, 100 * MB])
    def test_no_assumed_number_of_an_engine_flips_a_verdict(self, kind: str, num_bytes: int) -> None:
        graphs, device = compressions(kind, [num_bytes] * 3), read_device("bluefield-2")
        (found,) = judge(graphs, device)
        engine, verdicts = device.engines["deflate"], set()
        assumed = {name: number for name, number in engine.numbers.items() if number.is_assumed}
        assert set(assumed) == {"latency", "start"}
        for name, number in assumed.items():
            for value in np.geomspace(number.lo, number.hi, 4):
                fixed = replace(number, value=value, lo=value, hi=value)
                changed = replace(engine, numbers=engine.numbers | {name: fixed})
                verdicts.add(verdict_of(graphs, replace(device, engines={"deflate": changed}), "compression").verdict)
        assert found.verdict == CANNOT_TELL or verdicts == {found.verdict}

    @pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
    def test_the_round_is_monotone_in_the_slowdown(self, stage: str) -> None:
        kind = stage_named(stage).kinds[0]
        (graph, *_) = rounds((kind, 0.02, MB), ("receive", 0.01, 0), (kind, 0.03, MB))
        number = stage_named(stage).slowdown
        found = [seconds(graph, emulated(**{number: k}), stage) for k in (0.1, 0.5, 1.0, 2.0, 3.0, 10.0)]
        assert found == sorted(found)

    def test_a_stage_that_was_not_recorded_is_left_out(self) -> None:
        assert judge(rounds(), emulated()) == []

    def test_an_unknown_stage_is_told(self) -> None:
        with pytest.raises(ConfigError, match="unknown stage 'agregation'; did you mean 'aggregation'"):
            stage_named("agregation")

    def test_an_engine_is_used_only_for_its_kinds(self) -> None:
        numbers: dict[str, Any] = read_device("bluefield-2").engines["deflate"].numbers
        device = replace(emulated(), engines={"crypto": Accelerator(("encrypt",), ("encrypt",), numbers)})
        assert device.engine_for(["encrypt"], "encrypt") == "crypto"
        assert device.engine_for(["encrypt"], "decrypt") is None
        assert device.engine_for(["deflate"], "compress") is None


def test_moving_nothing_changes_nothing() -> None:
    (graph, *_) = rounds(("aggregate", 0.02, MB))
    stage = stage_named("checkpoint")
    moved = move(graph, stage, costs_of(emulated(), stage, stage.kinds, {}))
    assert moved.seconds == replay(graph).seconds
    assert moved.freed_seconds == moved.link_bytes == 0


def zstd_trace(directory: Path, delay: float, train_delay: float = 0.0) -> Trace:
    """Return four rounds: 100 ms of training, and 175 MB in 200 ms, as zstd on two cores; waits in ms come on top."""
    spans, marks, at = [], [], 0.0
    for number in range(4):
        trained = at + 100 + train_delay
        end = trained + 200 + delay
        spans.append(span("train", at, trained, delay=train_delay))
        spans.append(span("zstd", trained, end, num_bytes=175 * MB, delay=delay))
        marks.append((number + 1, at, end))
        at = end
    write(directory, "driver", spans, marks)
    return read_trace(directory)


class TestBusyMachine:
    def test_a_device_does_not_save_what_waited_for_a_processor(self, tmp_path: Path) -> None:
        device, stages = read_device("bluefield-2"), [stage_named("compression")]
        quiet, busy = zstd_trace(tmp_path / "quiet", 0.0), zstd_trace(tmp_path / "busy", 540.0, 30.0)
        (as_recorded,) = judge([graph_of(one) for one in busy.rounds], device, stages)
        assert as_recorded.verdict == WIN
        (expected,), (found,) = (offload(trace, device, stages) for trace in (quiet, busy))
        assert found.verdict == expected.verdict == LOSE
        assert found.change == pytest.approx(expected.change)
        assert found.seconds == pytest.approx(0.2)

    def test_a_caveat_tells_of_waits_above_two_percent(self, tmp_path: Path) -> None:
        device = read_device("bluefield-2")
        for name, delay, is_told in (("quiet", 0.0, False), ("hardly", 6.0, False), ("busy", 700.0, True)):
            trace = zstd_trace(tmp_path / name, delay)
            verdicts, share = offload(trace, device), delay_share(trace)
            assert share == pytest.approx(delay / (300 + delay))
            plain = json.loads(render_offload(verdicts, device, share, as_json=True))
            assert plain["delay_share"] == share
            assert (plain["caveat"] is not None) == is_told
            assert ("waited for a processor for up to 70.0%" in render_offload(verdicts, device, share)) == is_told
