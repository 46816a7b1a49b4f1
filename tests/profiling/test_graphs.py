"""Graphs of recorded rounds: waits stretch, messages link, and the recorded round comes out again."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.profiling.graphs import ARRIVE, graph_of
from gossamer.profiling.replay import Graph, replay
from gossamer.profiling.trace import Lane, Round, Segment, read_trace
from traces import span, write


def recorded(directory: Path, train: float = 20.0) -> Graph:
    """Return a round in which a worker trains for a driver; times in milliseconds."""
    end = 6 + train
    driver = [
        span("plan", 0, 4),
        span("send", 4, 5, message="w<1"),
        span("wait", 5, end + 1.5),
        span("receive", end + 2, end + 3, message="w>1"),
        span("aggregate", end + 3, end + 7),
    ]
    worker = [
        span("wait", -50, 4.5),
        span("receive", 5, 6, message="w<1"),
        span("train", 6, end),
        span("send", end, end + 1, message="w>1"),
        span("wait", end + 1, end + 90),
    ]
    write(directory, "driver", driver, [(1, 0, end + 7)])
    write(directory, "worker", worker, pid=2)
    return graph_of(read_trace(directory).rounds[0])


def test_the_recorded_round_is_replayed(tmp_path: Path) -> None:
    assert replay(recorded(tmp_path)).seconds == pytest.approx(0.033, abs=1e-9)


@pytest.mark.parametrize("train", [1.0, 20.0, 300.0])
def test_waits_stretch_with_what_is_waited_for(tmp_path: Path, train: float) -> None:
    slow = recorded(tmp_path / "recorded").scaled(lambda node: train / 20 if node.kind == "train" else 1.0)
    true = recorded(tmp_path / "true", train)
    assert replay(slow).seconds == pytest.approx(replay(true).seconds, abs=1e-9)


def test_the_critical_path_leads_through_the_worker(tmp_path: Path) -> None:
    graph = recorded(tmp_path)
    kinds = [graph.nodes[number].kind for number in replay(graph).critical_path()]
    assert [kind for kind in kinds if kind in ("plan", "train", "aggregate")] == ["plan", "train", "aggregate"]


def test_a_quiet_graph_has_no_waits_for_processors(tmp_path: Path) -> None:
    """The driver, once woken, waits for a processor for 3 ms, the worker for 5 ms while it trains."""
    driver = [
        span("send", 0, 1, message="w<1"),
        span("wait", 1, 34, cpu=0, delay=3),
        span("receive", 34, 35, message="w>1"),
    ]
    worker = [
        span("wait", -50, 0.5, cpu=0),
        span("receive", 0.5, 1, message="w<1"),
        span("train", 1, 30, delay=5),
        span("send", 30, 31, message="w>1"),
    ]
    write(tmp_path, "driver", driver, [(1, 0, 35)])
    write(tmp_path, "worker", worker, pid=2)
    (one,) = read_trace(tmp_path).rounds
    assert replay(graph_of(one)).seconds == pytest.approx(0.035, abs=1e-9)
    assert replay(graph_of(one, is_quiet=True)).seconds == pytest.approx(0.035 - 0.003 - 0.005, abs=1e-9)


def test_a_wait_for_nobody_lasts_as_long_as_it_did(tmp_path: Path) -> None:
    write(tmp_path, "driver", [span("plan", 0, 2), span("wait", 2, 7), span("log", 7, 8)], [(1, 0, 8)])
    assert replay(graph_of(read_trace(tmp_path).rounds[0])).seconds == pytest.approx(0.008, abs=1e-9)


def test_names_of_processes_do_not_matter(tmp_path: Path) -> None:
    recorded(tmp_path)
    before = replay(graph_of(read_trace(tmp_path).rounds[0])).seconds
    path = next((tmp_path / "trace").glob("worker*"))
    path.write_text(path.read_text().replace('"process": "worker"', '"process": "actor"').replace("w<", "x<"))
    driver = next((tmp_path / "trace").glob("driver*"))
    driver.write_text(driver.read_text().replace("w<", "x<"))
    assert replay(graph_of(read_trace(tmp_path).rounds[0])).seconds == before


@pytest.mark.parametrize(
    ("sender", "others", "expected"),
    [
        ("client", True, True),  # a node of the run
        ("worker", True, False),  # a process of the driver's machine
        (None, True, False),  # sent in another round, maybe
        (None, False, True),  # by a client that has no trace here
    ],
)
def test_what_comes_from_other_machines_is_told(sender: str | None, others: bool, expected: bool) -> None:
    driver = [Segment("receive", 0.0, 1.0, 1.0, num_bytes=9, message="m"), Segment("aggregate", 1.0, 2.0, 1.0)]
    lanes = {Lane("driver", "driver", 1, 1): driver}
    if sender is not None:
        lanes[Lane(sender, sender, 2, 2)] = [Segment("send", 0.0, 0.5, 0.5, message="m")]
    elif others:
        lanes[Lane("client", "client", 2, 2)] = [Segment("train", 0.0, 0.5, 0.5)]
    one = Round(1, 2.0, lanes)
    kinds = {node.kind for node in graph_of(one, marks_arrivals=True).nodes if node.resource == "driver"}
    assert kinds == {ARRIVE if expected else "receive", "aggregate"}
    assert ARRIVE not in {node.kind for node in graph_of(one).nodes}
