"""The side-car process: what it is handed and hands back, the time that it emulates, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from federation import wait_for
from gossamer.errors import DataError, EngineError
from gossamer.profiling import emulation, recorder
from gossamer.profiling.emulation import AHEAD, Inbox, Link, Outbox, Places, device_seconds
from gossamer.profiling.offload import Costs, Offload, stage_named
from gossamer.profiling.sidecar import Handler, Message, Port, SideCar
from gossamer.profiling.trace import read_trace

QUICK = Costs(1.0, 1, 0.0, 0.0, 0.0, 0.0)


def double(message: Message, arrays: list[Tensor]) -> tuple[Message, list[Tensor]]:
    """Return arrays doubled, and the message; fail, end, sleep or wait for a file where it says so."""
    if "fail" in message:
        raise {"ours": DataError("bad rows: correct them"), "theirs": ZeroDivisionError("x")}[message["fail"]]
    if message.get("end"):
        os._exit(7)
    time.sleep(message.get("seconds", 0.0))
    if "until" in message:
        wait_for(Path(message["until"]).exists)
    return dict(message), [2 * value for value in arrays]


@contextmanager
def started(name: str = "aggregation", costs: Costs = QUICK, handler: Handler = double) -> Iterator[SideCar]:
    """Yield a side-car that does a stage."""
    car = SideCar(Offload(stage_named(name), costs), lambda: handler)
    try:
        yield car
    finally:
        car.close()


class TestPieces:
    def test_come_back_in_their_order_whatever_is_under_way(self) -> None:
        with started() as car:
            for number in range(3 * AHEAD):
                car.submit({"number": number}, [torch.full((number + 1,), float(number))])
            answer = car.result()
        assert answer.message == {"number": 3 * AHEAD - 1}
        assert torch.equal(answer.arrays[0], torch.full((3 * AHEAD,), 2.0 * (3 * AHEAD - 1)))

    def test_memory_grows_with_them(self) -> None:
        with started() as car:
            for size in (1, 10_000, 3, 300_000):
                car.submit({}, [torch.ones(size), torch.arange(size)])
                ones, numbers = car.result().arrays
                assert torch.equal(ones, torch.full((size,), 2.0))
                assert torch.equal(numbers, 2 * torch.arange(size))

    def test_memory_that_was_used_last_is_used_again(self) -> None:
        places = Places()
        assert [places.take() for _ in range(AHEAD)] == list(range(AHEAD))
        places.free()
        places.free()
        assert (places.take(), places.take()) == (1, 0)
        with started() as car:
            for _ in range(3 * AHEAD):
                car.submit({}, [torch.ones(10)])
                car.drain()
            assert sum(place is not None for place in car._outbox._places) == 1

    def test_errors_come_back_as_what_they_are(self) -> None:
        with started() as car:
            car.submit({"fail": "ours"})
            with pytest.raises(DataError, match="bad rows"):
                car.result()
            car.submit({"fail": "theirs"})
            with pytest.raises(EngineError, match="side-car failed with ZeroDivisionError: x") as caught:
                car.drain()
            assert "in double" in vars(caught.value)["__notes__"][0]

    @pytest.mark.parametrize("message", [{"end": True}, {"seconds": 60}])
    def test_an_end_is_one_sentence(self, message: Message) -> None:
        with started() as car:
            car.submit(message)
            if "seconds" in message:
                (process,) = multiprocessing.active_children()
                os.kill(process.pid or 0, signal.SIGKILL)
            with pytest.raises(EngineError, match=r"ended with exit code -?\d: resume the run, or .* offload=null"):
                car.result()

    def test_whoever_waits_may_be_stopped(self) -> None:
        def stop() -> None:
            """Stop the run."""
            raise InterruptedError

        with started() as car:
            car._check = stop
            car.submit({"seconds": 60})
            with pytest.raises(InterruptedError):
                car.result()

    def test_processes_that_are_forked_later_have_connections_of_their_own(self) -> None:
        def ask(port: Port, number: int) -> None:
            """Hand over some pieces, and end well if what comes of each is right."""
            found = [port.call({}, [torch.full((3,), float(number))]).arrays[0] for _ in range(5)]
            os._exit(0 if all(torch.equal(one, torch.full((3,), 2.0 * number)) for one in found) else 1)

        with started("codec") as car:
            port = car.port
            assert torch.equal(port.call({}, [torch.ones(2)]).arrays[0], torch.full((2,), 2.0))
            children = [multiprocessing.get_context("fork").Process(target=ask, args=(port, n)) for n in (1, 2, 3)]
            for child in children:
                child.start()
            for child in children:
                child.join(timeout=60)
            assert [child.exitcode for child in children] == [0, 0, 0]
            assert port.call({"seconds": 0}).message == {"seconds": 0}
        with pytest.raises(EngineError, match=r"side-car process \d+, which does codec, ended: resume"):
            port.call({})


class TestMemory:
    @settings(max_examples=20, deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(0, 7), st.sampled_from(["float32", "int64", "bool", "uint8"]))
        )
    )
    def test_arrays_are_read_as_they_were_written(self, described: list[tuple[int, int, str]]) -> None:
        arrays = [torch.ones(rows, d, dtype=vars(torch)[dtype]) for rows, d, dtype in described]
        found = Inbox().read(Outbox().write(1, arrays))
        assert len(found) == len(arrays)
        for ours, theirs in zip(arrays, found, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


class TestTime:
    def test_a_core_is_slower_and_a_disk_is_not(self) -> None:
        costs = QUICK._replace(slowdown=3.0, memory_seconds_per_byte=1e-6)
        assert device_seconds(costs, 0.1, 0.02, 1000) == pytest.approx(0.32)
        assert device_seconds(costs, 0.1, 0.02, 1_000_000) == pytest.approx(1.02)

    def test_an_engine_goes_by_its_rates(self) -> None:
        costs = QUICK._replace(slowdown=3.0, engine=(0.5, 1e-6))
        assert device_seconds(costs, 0.1, 0.0, 1_000_000) == pytest.approx(1.5)

    def test_transfers_follow_one_another_on_a_link(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(emulation, "time", SimpleNamespace(monotonic=lambda: 1000.0))
        link = Link(QUICK._replace(link_seconds_per_byte=1.0, link_latency=100.0))
        assert link.arrival(10) == 1110
        assert link.arrival(5) == 1115

    def test_a_piece_takes_no_less_than_link_and_device(self) -> None:
        costs = QUICK._replace(link_seconds_per_byte=1e-4, link_latency=0.005, engine=(0.02, 0.0))
        with started(costs=costs) as car:
            began = time.monotonic()
            car.submit({}, [torch.zeros(25)])
            car.result()
            assert time.monotonic() - began >= 2 * (0.01 + 0.005) + 0.02

    def test_in_the_background_the_host_waits_for_the_copy_alone(self, tmp_path: Path) -> None:
        costs, done = QUICK._replace(link_latency=0.02), tmp_path / "done"
        with recorder.recording(tmp_path / "trace"), started("checkpoint", costs) as car, recorder.round_span(1):
            began = time.monotonic()
            car.submit({"until": str(done)})  # would never return if it waited for the device
            assert time.monotonic() - began >= 0.02
            done.touch()
            car.drain()


def test_it_records_in_a_lane_of_its_own(tmp_path: Path) -> None:
    with recorder.recording(tmp_path / "trace"), started() as car, recorder.round_span(1):
        car.submit({}, [torch.zeros(10)])
        car.drain()
    (one,) = read_trace(tmp_path).rounds
    lanes = {lane.process: segments for lane, segments in one.lanes.items()}
    assert set(lanes) == {"driver", "side-car"}
    sent = [each.message for each in lanes["driver"] if each.kind == "send"]
    assert sent == [each.message for each in lanes["side-car"] if each.kind == "receive"] != []
    assert "aggregate" in [each.kind for each in lanes["side-car"]]
