"""Work on actors that die, hang or never come up: every result comes once, or the batch ends with a sentence."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federation import wait_for
from gossamer.engines.ray.actor_pool import AHEAD, CPU, GPU, MAX_FAILURES, READY, ActorPool, Call
from gossamer.errors import DataError, EngineError, RoundAborted

pytestmark = pytest.mark.usefixtures("one_ray")


def tiny(flag: str = "", fault: str = "") -> type:
    """Return a class of actors; one made in a function reaches Ray's processes by value."""

    class Tiny:
        """An actor that fails once, as `fault` says."""

        def __init__(self) -> None:
            if fault == "raise":
                raise ArithmeticError("it cannot count to 3")
            if fault == "die" and self._is_first(flag):
                os.kill(os.getpid(), signal.SIGKILL)

        def _is_first(self, path: str) -> bool:
            try:
                with open(path, "x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                return False
            return True

        def ready(self) -> bool:
            """Say that it has started."""
            return True

        def pid(self) -> int:
            """Return the number of its process."""
            return os.getpid()

        def work(self, value: int, fault: str = "", path: str = "") -> Any:
            """Return the square of a value, after it went wrong; only the first time if there is a path."""
            if fault and (not path or self._is_first(path)):
                if fault in ("kill", "stop"):
                    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
                    with open(f"{path}.late", "w"):  # it was let go again
                        return "late"
                raise {"refuse": DataError, "raise": ArithmeticError}[fault](f"{value} is too large: take less")
            return value**2

        def until(self, path: str) -> bool:
            deadline = time.monotonic() + 60
            while not os.path.exists(path) and time.monotonic() < deadline:
                time.sleep(0.01)
            return os.path.exists(path)

        def parts(self) -> tuple[int, list[int], list[int]]:
            return 1, [2], [3]

    return Tiny


@contextmanager
def acting(num_actors: int, cls: type | None = None, num_cpus: int = 1, **options: Any) -> Iterator[ActorPool]:
    """Start actors, and kill them afterwards."""
    import ray

    remote = ray.remote(num_cpus=num_cpus, max_restarts=0)(cls or tiny())
    actors = ActorPool(remote.remote, num_actors, **options)
    try:
        yield actors
    finally:
        actors.stop()


def squares(count: int, faults: dict[int, tuple[str, ...]] | None = None) -> Iterator[Call]:
    """Yield calls of ``work``, some of them with faults."""
    return (Call(number, "work", (number, *(faults or {}).get(number, ()))) for number in range(count))


def assert_squares(found: list[tuple[Any, Any]], count: int) -> None:
    """Check that each result is there once."""
    assert sorted(found) == [(number, number**2) for number in range(count)]


class Told:
    """Writes down what happened."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind} | fields)

    def count(self, kind: str, reason: str) -> int:
        """Return how many events have this kind and reason."""
        return sum((event["kind"], event["reason"]) == (kind, reason) for event in self.events)


def pids(actors: ActorPool) -> Counter[int]:
    """Return which process answered how many of as many calls as there are actors, once all are up."""
    calls = [Call(number, "pid", ()) for number in range(len(actors))]
    wait_for(lambda: bool(dict(actors.map(calls))) and all(actor.starting is None for actor in actors._actors))
    return Counter(dict(actors.map(calls)).values())


class TestWithoutFaults:
    def test_every_call_once(self) -> None:
        with acting(2) as actors:
            assert_squares(list(actors.map(squares(20))), 20)
            assert list(actors.map([])) == []

    def test_a_few_are_spread_evenly(self) -> None:
        with acting(3) as actors:
            assert sorted(pids(actors).values()) == [1, 1, 1]

    def test_drawn_lazily(self) -> None:
        drawn = 0

        def calls() -> Iterator[Call]:
            nonlocal drawn
            for call in squares(30):
                drawn += 1
                yield call

        with acting(2) as actors:
            for number, _ in enumerate(actors.map(calls())):
                assert drawn - number <= AHEAD * len(actors)

    def test_stops_when_asked(self) -> None:
        found: list[Any] = []
        with acting(1) as actors:
            found.extend(result for result in actors.map(squares(10), lambda: len(found) == 3))
        assert len(found) <= 3

    def test_several_results(self) -> None:
        import ray

        with acting(1) as actors:
            ((_, (first, *others)),) = actors.map([Call("parts", "parts", (), num_returns=3)])
        assert (first, ray.get(others)) == (1, [[2], [3]])

    def test_resized(self) -> None:
        with acting(1) as actors:
            first = set(pids(actors))
            actors.resize(3)
            more = set(pids(actors))
            actors.resize(1)
            assert (len(actors), len(more)) == (1, 3)
            assert set(pids(actors)) == first < more
            wait_for(lambda: not any(is_alive(pid) for pid in more - first))


class TestKinds:
    def test_every_call_goes_to_its_kind(self, tmp_path: Path) -> None:
        """Also after an actor of either kind died, and while one kind has nothing left to do."""
        import ray

        remote = ray.remote(num_cpus=1, max_restarts=0)(tiny())
        told = Told()
        with acting(2, on_event=told, others={GPU: (remote.remote, 1)}) as actors:
            assert len(actors) == 2
            wait_for(lambda: bool(list(actors.map({GPU: [READY], CPU: [READY]}))) and not starting(actors))
            for kinds in ({CPU: 6, GPU: 2}, {CPU: 1, GPU: 7}, {GPU: 3}, {CPU: 4}):
                calls = {kind: [Call((kind, i), "pid", ()) for i in range(count)] for kind, count in kinds.items()}
                found = list(actors.map(calls))
                assert Counter(kind for (kind, _), _ in found) == kinds
                processes = {kind: {pid for (one, _), pid in found if one == kind} for kind in kinds}
                assert len(processes.get(GPU, {0})) == 1
                assert not processes.get(GPU, set()) & processes.get(CPU, set())
            faults = {
                kind: [Call((kind, i), "work", (i, *(["kill", str(tmp_path / kind)] * (i == 1)))) for i in range(4)]
                for kind in (CPU, GPU)
            }
            assert dict(actors.map(faults)) == {(kind, i): i**2 for kind in (CPU, GPU) for i in range(4)}
            assert told.count("actor-replaced", "ActorDiedError") == 2
            assert sorted(actor.kind for actor in actors._actors) == [CPU, CPU, GPU]
            actors.resize(1)
            assert sorted(actor.kind for actor in actors._actors) == [CPU, GPU]
            with pytest.raises(EngineError, match="no Ray actor of kind tpu"):
                list(actors.map({"tpu": [READY]}))
        assert actors._actors == []


def starting(actors: ActorPool) -> bool:
    """Say whether an actor of a pool is being started."""
    return any(actor.starting is not None for actor in actors._actors)


def is_alive(pid: int) -> bool:
    """Say whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestFaults:
    @pytest.mark.parametrize("num_actors", [1, 2])
    def test_killed_within_a_call(self, tmp_path: Path, num_actors: int) -> None:
        told, faults = Told(), {number: ("kill", str(tmp_path / str(number))) for number in (0, 7)}
        with acting(num_actors, on_event=told) as actors:
            assert_squares(list(actors.map(squares(10, faults))), 10)
        assert {path.name for path in tmp_path.iterdir()} == {"0", "7"}
        assert told.count("actor-replaced", "ActorDiedError") == 2

    def test_killed_between_two_batches(self) -> None:
        with acting(2) as actors:
            for pid in pids(actors):
                os.kill(pid, signal.SIGKILL)
            assert_squares(list(actors.map(squares(5))), 5)

    def test_killed_while_it_starts(self, tmp_path: Path) -> None:
        told, flag = Told(), tmp_path / "flag"
        with acting(1, tiny(str(flag), "die"), on_event=told) as actors:
            assert_squares(list(actors.map(squares(3))), 3)
        assert flag.exists()
        assert [event["kind"] for event in told.events] == ["retry", "actor-replaced"]

    def test_killed_again_and_again(self) -> None:
        told = Told()
        with acting(2, on_event=told) as actors, pytest.raises(RoundAborted, match=r"ActorDiedError.*then resume"):
            list(actors.map(squares(3, dict.fromkeys(range(3), ("kill",)))))
        assert told.count("actor-replaced", "ActorDiedError") == MAX_FAILURES * 2 + 1

    def test_hangs_for_good(self, tmp_path: Path) -> None:
        """The only actor is stopped, so nobody else can do what it was given."""
        told, faults = Told(), {1: ("stop", str(tmp_path / "flag"))}
        with acting(1, straggler_seconds=0.5, on_event=told) as actors:
            assert_squares(list(actors.map(squares(4, faults))), 4)
        assert told.count("actor-replaced", "hung") == 1

    def test_hangs_without_a_limit_being_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Many times the longest answer so far is long enough."""
        monkeypatch.setattr("gossamer.engines.ray.actor_pool.MIN_PATIENCE_SECONDS", 0.5)
        told, faults = Told(), {1: ("stop", str(tmp_path / "flag"))}
        with acting(2, on_event=told) as actors:
            assert actors.limit_seconds("work") == math.inf
            assert_squares(list(actors.map(squares(2))), 2)
            assert 0.5 <= actors.limit_seconds("work") < math.inf
            assert_squares(list(actors.map(squares(4, faults))), 4)
        assert told.count("retry", "straggler") >= 1

    def test_a_late_result_is_dropped(self, tmp_path: Path) -> None:
        """A stopped actor is let go when another one has done its work, and answers while the batch goes on."""
        told, flag, late = Told(), tmp_path / "flag", tmp_path / "flag.late"
        calls = [Call("slow", "work", (3, "stop", str(flag))), Call("until", "until", (str(late),))]
        found: list[tuple[Any, Any]] = []
        with acting(3, straggler_seconds=4.0, on_event=told) as actors:
            pids(actors)
            for key, result in actors.map(calls):
                found.append((key, result))
                if key == "slow":
                    os.kill(int(flag.read_text()), signal.SIGCONT)
        assert sorted(found) == [("slow", 9), ("until", True)]
        assert told.count("retry", "straggler") >= 1
        assert told.count("actor-replaced", "hung") == 0

    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.sampled_from(["", "", "kill", "stop"]), min_size=1, max_size=8), st.integers(1, 3))
    def test_any_faults(self, faults: list[str], num_actors: int) -> None:
        with tempfile.TemporaryDirectory() as folder, acting(num_actors, straggler_seconds=0.5) as actors:
            given = {number: (fault, f"{folder}/{number}") for number, fault in enumerate(faults)}
            assert_squares(list(actors.map(squares(len(faults), given))), len(faults))


class TestErrors:
    @pytest.mark.parametrize(
        ("fault", "error", "message"),
        [("refuse", DataError, "^3 is too large: take less$"), ("raise", EngineError, "ArithmeticError: 3 is too")],
    )
    def test_of_a_call(self, fault: str, error: type[Exception], message: str) -> None:
        with acting(2) as actors, pytest.raises(error, match=message):
            list(actors.map(squares(5, {3: (fault,)})))

    @pytest.mark.filterwarnings("ignore:`free` is a deprecated")
    def test_of_a_lost_argument(self) -> None:
        """As when a node dies that alone had it: there is no point in asking another actor."""
        import ray
        from ray._private.internal_api import free

        lost = ray.put(np.zeros(1 << 20))
        free([lost])
        with acting(1) as actors, pytest.raises(EngineError, match=r"^the cluster lost what .* from the last commit$"):
            list(actors.map([Call("work", "work", (lost,))]))

    def test_of_a_start(self) -> None:
        with acting(2, tiny(fault="raise")) as actors, pytest.raises(EngineError, match=r"cannot count to 3$"):
            list(actors.map(squares(2)))

    def test_nobody_comes_up(self) -> None:
        with (
            acting(2, num_cpus=1000, start_seconds=0.5) as actors,
            pytest.raises(RoundAborted, match=r"2 of 2 Ray actors did not start in 0.5 seconds: give the cluster"),
        ):
            list(actors.map(squares(1)))
