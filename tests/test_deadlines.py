"""Runs in simulated time: deadlines, over-selection, availability, devices by capacity, and what is logged of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from federation import Injected, assert_same, configure, digest, events, failing, mixed, without_clocks
from gossamer import resume, rounds, run
from gossamer.build import build
from gossamer.config.loading import parse
from gossamer.config.resolve import fill_in
from gossamer.config.schema import Config
from gossamer.errors import ConfigError, GossamerError, QuorumError
from gossamer.experiment import Run
from gossamer.registry import resolve
from gossamer.storage.runlog import read_metrics

SIZE = 4 * (64 * 32 + 32 + 32 * 10 + 10)  # bytes of the whole perceptron
FLOPS = 2 * (2 * 64 * 32 + 3 * 32 * 10)  # of one sample
QUICK = {"name": "quick", "download_bytes_per_second": 1e4, "upload_bytes_per_second": 1e4, "flops_per_second": 1e6}
SLOW = QUICK | {"name": "slow", "download_bytes_per_second": 1e3}
HALF_SLOW = {"devices": [{"profile": QUICK}, {"profile": SLOW}]}
ALL = {"clients.per_round": 8, "clients.quorum": 0.25}
IN_TIME = {"clients.deadline_seconds": 5.0}  # the quick take about 2.1 seconds, the slow about 11
# Three capacities on three devices that are seldom available: somebody is late, somebody is waited for.
BUSY = mixed("fedrolex") | {
    "rounds": 6,
    "clients.per_round": 3,
    "clients.over_selection": 1.5,
    "clients.deadline_seconds": 2.0,
    "clients.quorum": 0.0,
    "devices": [
        {"profile": QUICK | {"availability": {"trace": [[3, 9]]}}, "capacity": 0.25},
        {"profile": QUICK | {"latency_seconds": 0.5, "availability": {"probability": 0.6}}, "capacity": 0.5},
        {"profile": QUICK | {"upload_bytes_per_second": 5e3, "availability": {"trace": [[2, 9]]}}, "capacity": 1.0},
    ],
}


def slow_clients(config: dict[str, Any]) -> list[int]:
    """Return the clients whose device is the second one."""
    planner = build(parse(config)).planner
    return np.flatnonzero(planner.costs[0].devices.of(np.arange(8), 0) == 1).tolist()


class TestSeconds:
    def test_half_the_bandwidth_doubles_the_transfer(self, tmp_path: Path) -> None:
        changes = mixed("fedrolex") | {"device": QUICK, "clients.per_round": 8}
        before = run(configure(changes), out=tmp_path / "before").metrics
        for way in ("download", "upload"):
            halved = changes | {f"device.{way}_bytes_per_second": 5e3}
            for old, new in zip(before, run(configure(halved), out=tmp_path / way).metrics, strict=True):
                name = f"simulated_{way}_seconds"
                assert new[name] == pytest.approx(2 * old[name])
                other = {"download": "upload", "upload": "download"}[way]
                for same in (f"simulated_{other}_seconds", "simulated_compute_seconds", "accuracy", "total_bytes_up"):
                    assert new[same] == old[same]
                assert new["simulated_seconds"] > old["simulated_seconds"]

    def test_by_hand(self, tmp_path: Path) -> None:
        device = QUICK | {"latency_seconds": 0.25}
        changes = {"device": device, "workload.dataset.num_train": 160, "clients.per_round": 3}  # 20 samples each
        for record in run(configure(changes), out=tmp_path / "run").metrics:
            assert record["simulated_download_seconds"] == pytest.approx(3 * SIZE / 1e4)
            assert record["simulated_upload_seconds"] == pytest.approx(3 * SIZE / 1e4)
            assert record["simulated_compute_seconds"] == pytest.approx(3 * 20 * FLOPS / 1e6)
            one = 0.25 + 2 * SIZE / 1e4 + 20 * FLOPS / 1e6
            assert record["simulated_seconds"] == pytest.approx(record["round"] * one)
            assert record["num_dropped"] == 0


class TestLate:
    def test_the_slow_never_train(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The model is that of a federation whose sampler leaves them out; the round lasts until the deadline."""
        config = configure(ALL | IN_TIME | HALF_SLOW)
        late = slow_clients(config)
        assert len(late) == 4
        done = run(config, out=tmp_path / "run")
        quick = [client for client in range(8) if client not in late]
        (tmp_path / "left_out.py").write_text(f"def sample(seed, round, num_clients, count):\n    return {quick}\n")
        monkeypatch.syspath_prepend(tmp_path)
        alone = run(configure(ALL | HALF_SLOW | {"clients.sampler": "left_out:sample"}), out=tmp_path / "alone")
        assert digest(done.params) == digest(alone.params)
        expected = [{"round": n, "reason": "deadline", "num_clients": 4, "clients": late} for n in (1, 2, 3)]
        assert events(done.directory, "dropped") == expected
        for record in done.metrics:
            assert (record["num_participants"], record["num_survivors"], record["num_dropped"]) == (4, 4, 4)
            assert record["dropped"] == {"deadline": 4}
            assert record["simulated_seconds"] == pytest.approx(5.0 * record["round"])
            assert record["total_bytes_up"] == 4 * SIZE * record["round"]
            assert record["total_bytes_down"] == 8 * SIZE * record["round"]

    def test_over_selection(self, tmp_path: Path) -> None:
        """Of eight, the four quick ones are waited for, and no longer."""
        changes = {"clients.per_round": 4, "clients.over_selection": 2.0, "clients.quorum": 1.0}
        config = configure(changes | HALF_SLOW)
        done = run(config, out=tmp_path / "run")
        late = slow_clients(config)
        expected = [{"round": n, "reason": "over-selection", "num_clients": 4, "clients": late} for n in (1, 2, 3)]
        assert events(done.directory, "dropped") == expected
        assert done.metrics[-1]["simulated_seconds"] < 3 * 2.5
        both = run(configure(changes | HALF_SLOW | IN_TIME), out=tmp_path / "both")
        assert {event["reason"] for event in events(both.directory, "dropped")} == {"deadline"}
        assert digest(both.params) == digest(done.params)
        assert [record["dropped"] for record in both.metrics] == [{"deadline": 4}] * 3

    def test_lists_are_cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rounds, "MAX_LISTED", 3)
        done = run(configure(ALL | IN_TIME | HALF_SLOW), out=tmp_path / "run")
        event = events(done.directory, "dropped")[0]
        assert (len(event["clients"]), event["num_clients"]) == (3, 4)

    def test_nothing_is_logged_where_nobody_is_late(self, tmp_path: Path) -> None:
        done = run(configure({"clients.deadline_seconds": 1e9}), out=tmp_path / "run")
        assert events(done.directory, "dropped") == []
        assert_same(done, run(configure(), out=tmp_path / "without"))

    @pytest.mark.parametrize(("quorum", "enough"), [(0.5, True), (0.51, False)])
    def test_quorum(self, tmp_path: Path, quorum: float, enough: bool) -> None:
        """The late count as missing; nobody trains in vain."""
        config = configure(ALL | IN_TIME | HALF_SLOW | {"clients.quorum": quorum})
        if enough:
            assert len(run(config, out=tmp_path / "run").metrics) == 3
            return
        with pytest.raises(QuorumError) as caught:
            run(config, out=tmp_path / "run")
        assert str(caught.value) == (
            "round 1: only 4 of 8 updates are in time and clients.quorum asks for 5: raise clients.deadline_seconds, or"
            " lower clients.quorum; round 0 is committed"
        )
        assert events(tmp_path / "run", "dropped") == []

    def test_quorum_of_those_who_are_available(self, tmp_path: Path) -> None:
        device = QUICK | {"availability": {"probability": 0.5}}
        done = run(configure({"clients.per_round": 8, "clients.quorum": 1.0, "device": device}), out=tmp_path / "run")
        counts = [record["num_participants"] for record in done.metrics]
        assert all(0 < count < 8 for count in counts)
        assert [record["dropped"] for record in done.metrics] == [{"availability": 8 - count} for count in counts]

    def test_nobody_is_in_time(self, tmp_path: Path) -> None:
        with pytest.raises(QuorumError, match=r"only 0 of 5 updates are in time and clients.quorum asks for 1"):
            run(configure({"clients.quorum": 0, "clients.deadline_seconds": 1e-9}), out=tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(configure(BUSY), out=tmp_path_factory.mktemp("undisturbed") / "run")


class TestSameBits:
    def events(self, directory: Path) -> list[Any]:
        return [events(directory, kind) for kind in ("variant", "dropped")]

    def test_the_case_is_hard_enough(self, undisturbed: Run) -> None:
        dropped = events(undisturbed.directory, "dropped")
        assert {event["reason"] for event in dropped} == {"deadline", "over-selection"}
        assert len({record["num_participants"] for record in undisturbed.metrics}) > 1
        planner, now, waited = build(parse(configure(BUSY))).planner, 0.0, []
        for record in undisturbed.metrics:
            began, available = planner.costs[0].devices.available(record["round"] - 1, now)
            waited.append(began > now)
            assert len(available) < 8
            now = record["simulated_seconds"]
        assert any(waited)

    @pytest.mark.sweep(keep=0.34, at_least=6, together=("name", "every"))
    @pytest.mark.parametrize("name", ["train", "exchange", "commit"])
    @pytest.mark.parametrize("number", [1, 2, 4])
    @pytest.mark.parametrize("every", [0, 1000])
    def test_resumed(self, tmp_path: Path, undisturbed: Run, name: str, number: int, every: int) -> None:
        """Simulated time is part of a commit, so who is available and who is late stays the same."""
        if every and name == "commit":
            number = 1
        with pytest.raises(Injected):
            run(
                configure(BUSY | {"checkpoint.every_seconds": every}),
                out=tmp_path / "run",
                hooks=failing(name, True, number),
            )
        assert_same(resume(tmp_path / "run"), undisturbed)
        assert self.events(tmp_path / "run") == self.events(undisturbed.directory)

    @pytest.mark.parametrize("changes", [{"engine.workers": 2}, {"engine.block_size": 1}])
    def test_other_workers(self, tmp_path: Path, undisturbed: Run, changes: dict[str, Any]) -> None:
        done = run(configure(BUSY | changes), out=tmp_path / "run")
        assert_same(done, undisturbed)
        assert self.events(done.directory) == self.events(undisturbed.directory)

    def test_plans_depend_on_round_and_time_alone(self, undisturbed: Run) -> None:
        first, second = (build(parse(configure(BUSY))).planner for _ in range(2))
        starts = [0.0, *(record["simulated_seconds"] for record in undisturbed.metrics)]
        for round, record in reversed(list(enumerate(undisturbed.metrics))):
            plan = first.plan(round, starts[round])
            late = record["num_dropped"] - record["dropped"].get("availability", 0)
            assert (len(plan.client), len(plan.dropped)) == (record["num_participants"], late)
            assert first.phases(round, starts[round])[0].costs.simulated_seconds == pytest.approx(
                starts[round + 1] - starts[round]
            )
        for round in range(6):
            assert second.plan(round, starts[round]).digest() == first.plan(round, starts[round]).digest()


class TestVariants:
    def test_one_event_for_each_capacity(self, tmp_path: Path) -> None:
        done = run(configure(mixed("fedrolex", (0.25, 1.0)) | {"train.momentum": 0.9}), out=tmp_path / "run")
        small, whole = events(done.directory, "variant")
        assert list(whole) == [
            "capacity",
            "num_parameters",
            "bytes_up",
            "bytes_down",
            "flops_per_sample",
            "memory_bytes",
            "uncounted",
            "holding",
            "flops_per_round",
        ]
        assert (small["capacity"], whole["capacity"]) == (0.25, 1.0)
        assert (whole["num_parameters"], whole["bytes_up"], whole["bytes_down"]) == (SIZE / 4, SIZE, SIZE)
        assert whole["flops_per_sample"] == FLOPS
        assert whole["memory_bytes"] > 3 * SIZE, "parameters, gradients, momentum and activations"
        assert small["memory_bytes"] < whole["memory_bytes"] / 2
        first = json.loads((done.directory / "events.jsonl").read_text().splitlines()[0])
        assert first["kind"] == "variant"

    def test_once_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(Injected):
            run(configure(), out=tmp_path / "run", hooks=failing("train", True, 1))
        resume(tmp_path / "run")
        assert len(events(tmp_path / "run", "variant")) == 1


def error_of(changes: dict[str, Any], made: Callable[[Config], Any] = build) -> str:
    with pytest.raises(GossamerError) as caught:
        made(parse(configure(changes)))
    assert isinstance(caught.value, ConfigError)
    return str(caught.value)


class TestRefused:
    def test_what_does_not_fit(self) -> None:
        tiny = QUICK | {"name": "tiny", "memory_bytes": 20_000}
        message = "device 'tiny' has memory_bytes = 20000, but training capacity 1 needs "
        assert message in error_of({"device": tiny})
        changes = mixed("fedrolex", (0.25, 1.0))
        fitting = [{"profile": tiny, "capacity": 0.25}, {"profile": QUICK, "capacity": 1.0}]
        build(parse(configure(changes | {"devices": fitting})))
        wrong = [{"profile": QUICK, "capacity": 0.25}, {"profile": tiny, "capacity": 1.0}]
        assert message in error_of(changes | {"devices": wrong})
        assert message in error_of(changes | {"devices": [{"profile": tiny}, {"profile": QUICK}]})

    def test_before_anything_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="needs"):
            run(configure({"device": {"memory_bytes": 1}}), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"device": "phone-lo"}, "unknown device profile 'phone-lo'; did you mean 'phone-low'?"),
            ({"device": {"memory_byte": 1}}, "unknown key 'device.memory_byte'; did you mean 'memory_bytes'?"),
            ({"devices": []}, "devices = []: give at least one device"),
            (
                {"devices": [{"profile": "laptop", "capacity": 1.0}, {"profile": "laptop"}]},
                "for each of them or for none",
            ),
            ({"devices": [{"profile": "laptop", "share": -1}]}, "devices.0.share = -1"),
            ({"devices": [{"share": 1}]}, "missing key 'devices.0.profile'"),
            ({"devices": [{"profile": {"upload": 1}}]}, "unknown key 'devices.0.profile.upload'"),
            ({"device": "laptop", "devices": [{"profile": "laptop"}]}, "device 'laptop' contradicts devices"),
            ({"clients.deadline_seconds": 0}, "clients.deadline_seconds = 0"),
            ({"clients.over_selection": 0.9}, "clients.over_selection = 0.9"),
        ],
    )
    def test_one_sentence(self, changes: dict[str, Any], message: str) -> None:
        assert message in error_of(changes)

    @pytest.mark.parametrize(
        "devices",
        [
            [{"profile": "laptop", "capacity": 0.5}],
            [{"profile": "laptop", "capacity": 0.5}, {"profile": "laptop", "capacity": 0.25}],
            [{"profile": "laptop", "capacity": 0.5, "share": 1}, {"profile": "laptop", "capacity": 1.0, "share": 3}],
        ],
    )
    def test_devices_of_other_capacities(self, devices: list[dict[str, Any]]) -> None:
        changes = mixed("fedrolex", (0.5, 1.0)) | {"devices": devices}
        message = error_of(changes, lambda config: fill_in(config, resolve("algorithm", "fedrolex")))
        assert "do not fit submodel.capacities = [0.5, 1.0]: give one device for each capacity" in message


TIED = [{"profile": QUICK, "capacity": 1.0}, {"profile": SLOW, "capacity": 0.25}]


class TestFairness:
    @pytest.mark.parametrize("assignment", ["fixed", "dynamic"])
    def test_every_method_meets_the_same_devices(self, assignment: str) -> None:
        """Baselines, which change the capacities, too."""
        who = []
        for algorithm in ("fedrolex", "heterofl", "all-smallest", "all-largest"):
            levels = mixed(algorithm, (0.25, 1.0)) | {"engine.modes": "auto", "submodel.shares": [1, 3]}
            config = configure(levels | {"devices": TIED, "submodel.assignment": assignment})
            planner = build(parse(config)).planner
            names = [profile.name for profile in planner.costs[0].devices.profiles]
            who.append([names[i] for round in range(3) for i in planner.costs[0].devices.of(np.arange(8), round)])
        assert who[0] == who[1] == who[2] == who[3]
        assert set(who[0]) == {"quick", "slow"}

    @pytest.mark.parametrize("algorithm", ["fedrolex", "all-smallest"])
    def test_a_filled_in_configuration_stays_as_it_is(self, algorithm: str) -> None:
        config = parse(configure(mixed(algorithm, (0.25, 1.0)) | {"devices": TIED, "submodel.shares": [1, 3]}))
        filled = fill_in(config, resolve("algorithm", algorithm))
        assert filled.devices is not None
        assert [device.share for device in filled.devices] == [3, 1]
        written = parse(yaml.safe_load(yaml.safe_dump(filled.model_dump(mode="json"))))
        assert written == filled
        assert fill_in(written, resolve("algorithm", algorithm)) == filled

    def test_a_run_keeps_its_profiles(self, tmp_path: Path) -> None:
        """The file that named them is not needed again."""
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(QUICK | {"source": "a test", "latency_seconds": 1.5}))
        config = configure({"device": str(path)})
        done = run(config, out=tmp_path / "done")
        with pytest.raises(Injected):
            run(config, out=tmp_path / "run", hooks=failing("train", True, 2))
        path.unlink()
        assert_same(resume(tmp_path / "run"), done)
        assert without_clocks(read_metrics(tmp_path / "run"))[0]["simulated_seconds"] > 1.5

    def test_an_override_of_a_shipped_profile(self) -> None:
        config = parse(configure({"device": "phone-low", "device.latency_seconds": 3.0}))
        shipped = parse(configure({"device": "phone-low"}))
        assert config.device == shipped.device.model_copy(update={"latency_seconds": 3.0})
