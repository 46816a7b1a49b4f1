"""Devices: profiles as data, cyclic traces against a slow clock, and who is available when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigError
from gossamer.options import parse_options
from gossamer.simulation.devices import (
    MAX_RETRIES,
    REQUIRED,
    RETRY_SECONDS,
    Availability,
    DeviceProfile,
    Devices,
    DeviceShare,
    check_devices,
    profile_names,
    read_profile,
    seconds_until_on,
    uniform_draws,
)

SHIPPED = ["laptop", "phone-high", "phone-low", "phone-mid", "raspberry-pi-4", "server"]
NUM_CLIENTS = 50


def profile_of(value: Any) -> DeviceProfile:
    return parse_options(DeviceShare, {"profile": value}, "devices.0").profile


def error_of(value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        profile_of(value)
    return str(caught.value)


class TestProfiles:
    def test_shipped(self) -> None:
        assert profile_names() == SHIPPED

    @pytest.mark.parametrize("name", SHIPPED)
    def test_a_shipped_one_is_complete_and_honest(self, name: str) -> None:
        data = read_profile(name)
        assert set(data) == set(DeviceProfile.model_fields)
        found = profile_of(name)
        assert found.name == name
        assert found.source.startswith("assumed")
        assert found == profile_of(data) == profile_of(found.model_dump(mode="json"))

    def test_quicker_ones_are_quicker(self) -> None:
        order = ["phone-low", "phone-mid", "phone-high", "laptop", "server"]
        speeds = [profile_of(name).flops_per_second for name in order]
        assert speeds == sorted(speeds)

    def test_a_file(self, tmp_path: Path) -> None:
        data = {
            "name": "mine",
            "source": "measured with a watch",
            "flops_per_second": "3e9",
            "download_bytes_per_second": 10,
            "upload_bytes_per_second": 5,
            "availability": {"probability": 0.5, "trace": [[10, 5], [3, 0]]},
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(data))
        found = profile_of(str(path))
        assert (found.name, found.flops_per_second, found.memory_bytes) == ("mine", 3e9, None)
        assert found.availability == Availability(probability=0.5, trace=[(10.0, 5.0), (3.0, 0.0)])

    def test_inline(self) -> None:
        """A shipped profile's name keeps its other numbers; without a name these are the defaults."""
        changed = profile_of({"name": "phone-low", "flops_per_second": 7.0})
        assert changed == profile_of("phone-low").model_copy(update={"flops_per_second": 7.0})
        assert profile_of({"flops_per_second": 7.0}) == DeviceProfile(flops_per_second=7.0)
        assert profile_of({"availability": "always"}) == DeviceProfile()

    @pytest.mark.parametrize("key", REQUIRED)
    def test_what_a_file_must_give(self, tmp_path: Path, key: str) -> None:
        path = tmp_path / "device.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in read_profile("laptop").items() if name != key}))
        assert error_of(str(path)) == f"device profile {str(path)!r} lacks {key}: add it to the file"

    def test_errors(self, tmp_path: Path) -> None:
        assert "unknown device profile 'phone-lo'; did you mean 'phone-low'? (known: laptop, " in error_of("phone-lo")
        assert "cannot read device profile 'no/such.yaml' (" in error_of("no/such.yaml")
        for text in ("[1, 2]", "a: [", ""):
            path = tmp_path / "bad.yaml"
            path.write_text(text)
            assert "device profile" in error_of(str(path))
        assert error_of({"flops_per_second": 0}).startswith("devices.0.profile.flops_per_second = 0")
        assert error_of({"latency_seconds": -1}).startswith("devices.0.profile.latency_seconds = -1")
        assert "unknown key 'devices.0.profile.flops'" in error_of({"flops": 1})
        assert "availability.probability = 0:" in error_of({"availability": {"probability": 0}})
        assert "never on" in error_of({"availability": {"trace": [[0, 5], [0, 1]]}})
        assert "never on" in error_of({"availability": {"trace": []}})
        assert "availability.trace.0.1 = -5:" in error_of({"availability": {"trace": [[1, -5]]}})

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([], "at least one device"),
            ([{"capacity": 1.0}, {}], "a capacity for each of them or for none"),
            ([{"capacity": 1.0}, {"capacity": 1.0}], "name every capacity once"),
            ([{"share": 0}, {"share": 0}], "share 0, all of them"),
        ],
    )
    def test_lists(self, entries: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            check_devices([DeviceShare(profile=DeviceProfile(), **entry) for entry in entries])


LENGTHS = st.integers(0, 5)
TRACES = st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=4).filter(lambda trace: any(on for on, _ in trace))


def is_on(trace: list[tuple[int, int]], second: int) -> bool:
    """Say by counting whether the device is on during the second that begins at `second`."""
    cycle = [state for on, off in trace for state in [True] * on + [False] * off]
    return cycle[second % len(cycle)]


class TestTraces:
    @given(TRACES, st.integers(0, 60), st.sampled_from([0.0, 0.25, 0.75]))
    def test_equal_a_slow_clock(self, trace: list[tuple[int, int]], second: int, part: float) -> None:
        expected = 0.0
        while not is_on(trace, second):
            expected, second, part = expected + 1 - part, second + 1, 0.0
        start = second + part - expected
        found = seconds_until_on(np.array(trace, dtype=np.float64), np.array([start]))
        assert found.tolist() == [expected]

    def test_many_at_once(self) -> None:
        found = seconds_until_on(np.array([[2.0, 3.0]]), np.array([0.0, 1.5, 2.0, 4.5, 5.0, 1e6 + 3]))
        assert found.tolist() == [0.0, 0.0, 3.0, 0.5, 0.0, 2.0]


def devices(seed: int = 0, num_clients: int = NUM_CLIENTS, **availability: Any) -> Devices:
    return Devices([DeviceProfile(availability=Availability(**availability))], None, num_clients, seed)


class TestAvailability:
    def test_always(self) -> None:
        began, available = devices().available(3, 17.5)
        assert (began, available.tolist()) == (17.5, list(range(NUM_CLIENTS)))

    def test_by_chance(self) -> None:
        """Drawn anew for every client and round, whatever the time."""
        made = devices(num_clients=1000, probability=0.3)
        rounds = [set(made.available(round, 5.0)[1].tolist()) for round in range(20)]
        assert len(set(map(frozenset, rounds))) == 20
        assert made.available(4, 99.0)[1].tolist() == sorted(rounds[4])
        total = sum(map(len, rounds))
        assert abs(total - 6000) < 4 * (20_000 * 0.3 * 0.7) ** 0.5
        times = np.bincount(np.concatenate([np.array(sorted(one)) for one in rounds]), minlength=1000)
        assert times.max() < 20, "nobody is always there"
        assert set(devices(1, 1000, probability=0.3).available(4, 0.0)[1].tolist()) != rounds[4]

    @given(st.floats(0, 1e5))
    def test_by_trace(self, now: float) -> None:
        """Every client's trace begins at a place of its own; the round does not matter."""
        made = devices(trace=[(20, 30), (10, 40)])
        began, available = made.available(0, now)
        assert began == now, "of fifty clients, somebody is on"
        shift = 100 * uniform_draws(0, "device-phase", 0, np.arange(NUM_CLIENTS))
        place = (now + shift) % 100
        assert available.tolist() == np.flatnonzero((place < 20) | ((place >= 50) & (place < 60))).tolist()
        assert made.available(8, now)[1].tolist() == available.tolist()

    def test_places_are_spread(self) -> None:
        made = devices(num_clients=1000, trace=[(25, 75)])
        counts = [len(made.available(0, now)[1]) for now in (0.0, 30.0, 60.0)]
        assert all(abs(count - 250) < 60 for count in counts)

    @given(st.floats(0, 1e7), st.integers(1, 3), st.floats(0.001, 10))
    def test_waits_until_somebody_is_on(self, now: float, num_clients: int, on: float) -> None:
        made = devices(num_clients=num_clients, trace=[(on, 1000)])
        shift = (on + 1000) * uniform_draws(0, "device-phase", 0, np.arange(num_clients))
        waits = seconds_until_on(np.array([[on, 1000.0]]), now + shift)
        began, available = made.available(0, now)
        assert began == pytest.approx(now + waits.min(), abs=1e-6)
        assert int(waits.argmin()) in available.tolist()

    def test_asks_again_where_the_draw_found_nobody(self) -> None:
        made = devices(num_clients=1, probability=0.2)
        starts = [made.available(round, 7.0)[0] - 7.0 for round in range(60)]
        assert 0.0 in starts
        tries = [start / RETRY_SECONDS for start in starts]
        assert [round(number) for number in tries] == pytest.approx(tries)
        assert 2 < np.mean(tries) < 7, "four failures in the mean"

    def test_on_and_drawn(self) -> None:
        """Both must hold; while one waits for the trace, the draw may change."""
        made = devices(probability=0.5, trace=[(50, 50)])
        by_trace = set(devices(trace=[(50, 50)]).available(0, 3.0)[1].tolist())
        by_chance = set(devices(probability=0.5).available(0, 3.0)[1].tolist())
        assert set(made.available(0, 3.0)[1].tolist()) == by_trace & by_chance

    def test_practically_never(self) -> None:
        with pytest.raises(ConfigError, match=r"round 5: nobody was available from second 7 to 600007 .*raise"):
            devices(num_clients=1, probability=1e-12).available(4, 7.0)
        assert MAX_RETRIES * RETRY_SECONDS == 600_000

    def test_mixed_profiles(self) -> None:
        class Halves:
            def variants(self, clients: Any, round: int) -> Any:
                return (clients % 2).astype(np.int16)

        profiles = [DeviceProfile(), DeviceProfile(availability=Availability(trace=[(1, 10**9)]))]
        made = Devices(profiles, Halves(), NUM_CLIENTS, 0)
        assert made.available(0, 5e8)[1].tolist() == list(range(0, NUM_CLIENTS, 2))
        assert made.of(np.array([3, 4]), 0).tolist() == [1, 0]
