"""Plans: canonical order, capacities, schedules, who is in time, and what a round goes through."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossamer import rng
from gossamer.aggregate import tree_sum
from gossamer.errors import ConfigError
from gossamer.plan import RoundPlan
from gossamer.planning.assignment import Capacities, assign_devices, devices_of_capacities
from gossamer.planning.base import TimedPlan
from gossamer.planning.clients import ClientPlanner, first_to_finish, uniform
from gossamer.planning.schedule import ScheduleOptions, learning_rate
from gossamer.simulation.costs import Costs, VariantCosts
from gossamer.simulation.devices import DeviceProfile, Devices, DeviceShare, uniform_draws
from gossamer.workloads.holdings import apportion

SHARES = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)
NUM_CLIENTS = 40
LEVELS = (0.25, 0.5, 1.0)
# A sample takes 1, 2 or 4 seconds, a download 2, 4 or 8, and an upload 10, 20 or 40.
DEVICE = DeviceProfile(flops_per_second=1.0, download_bytes_per_second=5.0, upload_bytes_per_second=1.0)
VARIANTS = [VariantCosts(level, int(10 * level), int(40 * level), int(40 * level), 4 * level, 0) for level in LEVELS]


def costs(*profiles: DeviceProfile) -> Costs:
    """Return simple costs on the given devices, which clients have in equal shares; by default `DEVICE` alone."""
    entries = [DeviceShare(profile=profile) for profile in profiles or [DEVICE]]
    return Costs(VARIANTS, assign_devices(entries, "fixed", NUM_CLIENTS, 3))


def planner(**changes: Any) -> ClientPlanner:
    """Return a planner of 40 clients with 5 to 24 samples each, three capacities, two epochs of batches of 8."""
    options: dict[str, Any] = {
        "seed": 3,
        "num_rounds": 10,
        "num_samples": np.arange(NUM_CLIENTS) % 20 + 5,
        "per_round": 15,
        "sampler": uniform,
        "capacities": Capacities(LEVELS, [2, 1, 1], "fixed", NUM_CLIENTS, 3),
        "costs": [costs()],
        "weighting": "samples",
        "epochs": 2,
        "steps": None,
        "batch_size": 8,
        "lr": 0.1,
        "schedule": ScheduleOptions(),
    }
    return ClientPlanner(**(options | changes))


def plan_of(variants: list[int]) -> RoundPlan:
    count = len(variants)
    whole = np.arange(count, dtype=np.int64)
    return RoundPlan(
        round=2,
        phase=0,
        client=whole * 7,
        weight=np.ones(count),
        steps=np.ones(count, dtype=np.int32),
        variant=np.array(sorted(variants), dtype=np.int16),
        lr=0.1,
    )


class TestApportion:
    @given(SHARES, st.integers(0, 500))
    def test_largest_remainders(self, shares: list[int], count: int) -> None:
        """Everybody gets the floor of the exact quota, and those with the largest remainders one more."""
        found = apportion(shares, count)
        quotas = [Fraction(share * count, sum(shares)) for share in shares]
        extra = [int(got) - math.floor(quota) for got, quota in zip(found, quotas, strict=True)]
        assert found.sum() == count
        assert set(extra) <= {0, 1}
        remainders = [quota - math.floor(quota) for quota in quotas]
        lucky = [remainder for remainder, more in zip(remainders, extra, strict=True) if more]
        unlucky = [remainder for remainder, more in zip(remainders, extra, strict=True) if not more]
        assert min(lucky, default=1) >= max(unlucky, default=0)

    @pytest.mark.parametrize(
        ("shares", "count", "expected"),
        [
            ([1, 1, 1, 1, 1], 100, [20] * 5),
            ([6, 10, 11, 18, 55], 100, [6, 10, 11, 18, 55]),
            ([1, 1, 1], 10, [4, 3, 3]),
            ([0.5, 0, 0.5], 3, [2, 0, 1]),
            ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ],
    )
    def test_examples(self, shares: list[float], count: int, expected: list[int]) -> None:
        assert apportion(shares, count).tolist() == expected


class TestCapacities:
    def variants(self, assignment: str, round: int, seed: int = 0, shares: Any = (5, 3, 2)) -> NDArray[np.int16]:
        everybody = np.arange(100, dtype=np.int64)
        return Capacities([0.25, 0.5, 1.0], shares, assignment, 100, seed).variants(everybody, round)

    def test_fixed_ones_are_in_exact_proportion_and_stay(self) -> None:
        first = self.variants("fixed", 0)
        assert np.bincount(first).tolist() == [50, 30, 20]
        assert self.variants("fixed", 7).tolist() == first.tolist()
        assert first.dtype == np.int16

    def test_fixed_ones_are_scattered_by_the_seed(self) -> None:
        first, second = self.variants("fixed", 0), self.variants("fixed", 0, seed=1)
        assert sorted(first.tolist()) == sorted(second.tolist())
        assert first.tolist() != second.tolist()
        assert first.tolist() != sorted(first.tolist())

    def test_dynamic_ones_are_drawn_anew(self) -> None:
        rounds = [self.variants("dynamic", round).tolist() for round in range(4)]
        assert all(before != after for before, after in pairwise(rounds))
        assert self.variants("dynamic", 2).tolist() == rounds[2]
        assert self.variants("dynamic", 2, seed=1).tolist() != rounds[2]

    def test_dynamic_proportions(self) -> None:
        drawn = np.concatenate([self.variants("dynamic", round) for round in range(100)])
        counts, expected = np.bincount(drawn, minlength=3), np.array([5000, 3000, 2000])
        assert ((counts - expected) ** 2 / expected).sum() < 13.8  # 2 degrees of freedom, 0.1 % point

    @pytest.mark.parametrize("shares", [(1, 0, 1), (0, 1, 0), (0, 1, 1)])
    @pytest.mark.parametrize("assignment", ["fixed", "dynamic"])
    def test_a_share_of_nothing_is_nobody(self, shares: Any, assignment: str) -> None:
        drawn = np.concatenate([self.variants(assignment, round, shares=shares) for round in range(10)])
        assert {int(variant) for variant in drawn} == {i for i, share in enumerate(shares) if share}

    def test_one_client_has_the_same_whoever_else_is_asked(self) -> None:
        capacities = Capacities([0.5, 1.0], [1, 1], "dynamic", 100, 0)
        together = capacities.variants(np.array([4, 9, 70]), 3)
        assert together.tolist() == [int(capacities.variants(np.array([client]), 3)[0]) for client in (4, 9, 70)]


class TestSchedule:
    def rates(self, **options: Any) -> list[float]:
        return [learning_rate(0.8, ScheduleOptions(**options), round, 8) for round in range(8)]

    def test_constant(self) -> None:
        assert self.rates() == [0.8] * 8

    def test_multistep(self) -> None:
        rates = self.rates(name="multistep", milestones=[5, 2], factor=0.25)
        assert rates == pytest.approx([0.8] * 2 + [0.2] * 3 + [0.05] * 3)

    def test_cosine(self) -> None:
        rates = self.rates(name="cosine")
        assert rates == pytest.approx([0.4 * (1 + math.cos(math.pi * round / 8)) for round in range(8)])
        assert rates[0] == 0.8
        assert rates[4] == pytest.approx(0.4)

    def test_warm_up(self) -> None:
        assert self.rates(warmup_rounds=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
        both = self.rates(name="multistep", milestones=[1], factor=0.5, warmup_rounds=2)
        assert both == pytest.approx([0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])


class TestPlan:
    @pytest.mark.parametrize("round", range(4))
    def test_rows_are_those_of_the_chosen_clients_in_canonical_order(self, round: int) -> None:
        made = planner()
        plan = made.plan(round)
        assert sorted(plan.client.tolist()) == rng.choose(3, "sample-clients", round, NUM_CLIENTS, 15).tolist()
        samples = plan.client % 20 + 5
        assert plan.steps.tolist() == [2 * math.ceil(n / 8) for n in samples]
        assert plan.weight.tolist() == samples.tolist()
        assert plan.variant.tolist() == made.capacities.variants(plan.client, round).tolist()
        keys = list(zip(plan.variant.tolist(), (-plan.steps).tolist(), plan.client.tolist(), strict=True))
        assert keys == sorted(keys)
        assert len({key[1] for key in keys}) > 1
        assert (plan.round, plan.phase, plan.lr) == (round, 0, 0.1)
        assert plan.dropped.tolist() == []
        dtypes = [plan.client, plan.weight, plan.steps, plan.variant]
        assert [array.dtype.name for array in dtypes] == ["int64", "float64", "int32", "int16"]

    def test_the_order_of_the_sampler_does_not_matter(self) -> None:
        def backwards(*arguments: int) -> NDArray[np.int64]:
            return uniform(*arguments)[::-1]

        assert planner(sampler=backwards).plan(1).digest() == planner().plan(1).digest()

    def test_steps_and_equal_weights(self) -> None:
        plan = planner(epochs=None, steps=7, weighting="equal").plan(0)
        assert plan.steps.tolist() == [7] * 15
        assert plan.weight.tolist() == [1.0] * 15

    def test_learning_rate_of_the_round(self) -> None:
        made = planner(schedule=ScheduleOptions(name="cosine"))
        assert [made.plan(round).lr for round in (0, 5)] == pytest.approx([0.1, 0.05])

    @pytest.mark.parametrize("clients", [[], [1, 2, 1], [-1, 3], [3, 40], [[1, 2], [3, 4]], 5])
    def test_what_a_sampler_may_not_return(self, clients: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            planner(sampler=lambda *arguments: np.array(clients, dtype=np.int64)).plan(0)
        assert "one or more distinct clients in 0..39" in str(caught.value)
        assert f"clients.sampler returned {clients!r}" in str(caught.value)

    def test_any_number_of_distinct_clients_will_do(self) -> None:
        assert planner(sampler=lambda *arguments: [39, 0]).plan(0).client.tolist() in ([0, 39], [39, 0])

    def test_a_sampler_is_told_where_it_is(self) -> None:
        seen: list[tuple[int, ...]] = []
        planner(sampler=lambda *arguments: seen.append(arguments) or [1]).plan(6)
        assert seen == [(3, 6, NUM_CLIENTS, 15)]


class TestSamplesTrained:
    @given(st.integers(1, 30), st.integers(1, 9), st.one_of(st.tuples(st.integers(1, 4), st.none()), st.none()))
    def test_equal_a_slow_count(self, num_samples: int, batch_size: int, length: tuple[int, None] | None) -> None:
        for steps in range(1, 12) if length is None else [None]:
            epochs = None if length is None else length[0]
            made = planner(
                num_samples=np.full(NUM_CLIENTS, num_samples), batch_size=batch_size, steps=steps, epochs=epochs
            )
            plan = made.plan(0)
            count, left = 0, 0
            for _ in range(plan.steps[0]):
                left = left or num_samples
                count += min(left, batch_size)
                left -= min(left, batch_size)
            assert made.samples_trained(plan.client, plan.steps.astype(np.int64)).tolist() == [count] * 15
            if epochs is not None:
                assert count == epochs * num_samples

    def test_rows_are_those_of_the_plan(self) -> None:
        made = planner()
        plan = made.plan(0)
        trained = made.samples_trained(plan.client, plan.steps.astype(np.int64))
        assert trained.tolist() == [2 * (client % 20 + 5) for client in plan.client]


def seconds_by_hand(client: int, variant: int) -> float:
    """Add up what `DEVICE` needs for two epochs of a client of `planner`."""
    level, samples = LEVELS[variant], 2 * (client % 20 + 5)
    return 40 * level / 5 + 4 * level * samples + 40 * level


class TestFirstToFinish:
    @given(
        st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 7.0]), min_size=1, max_size=12),
        st.integers(1, 12),
        st.sampled_from([0.5, 1.5, 2.0, math.inf]),
        st.randoms(use_true_random=False),
    )
    def test_the_quickest_in_time(self, seconds: list[float], count: int, limit: float, random: Any) -> None:
        count = min(count, len(seconds))
        clients = random.sample(range(100), len(seconds))
        kept, lasted = first_to_finish(np.array(seconds), np.array(clients), count, limit)
        survivors = {client for client, is_kept in zip(clients, kept, strict=True) if is_kept}
        finished: list[int] = []
        for second, client in sorted(zip(seconds, clients, strict=True)):  # as they come in
            if second <= limit and len(finished) < count:
                finished.append(client)
        assert survivors == set(finished)
        taken = [second for second, is_kept in zip(seconds, kept, strict=True) if is_kept]
        assert lasted == (max(taken) if len(taken) == count else limit)


class TestTimedPlan:
    def timed(self, now: float = 0.0, round: int = 1, **changes: Any) -> TimedPlan:
        return planner(**changes).phases(round, now)[0]

    def test_as_long_as_the_slowest(self) -> None:
        timed = self.timed()
        expected = [seconds_by_hand(c, v) for c, v in zip(timed.plan.client, timed.plan.variant, strict=True)]
        assert timed.costs.simulated_seconds == pytest.approx(max(expected))
        assert len(timed.plan.dropped) == sum(len(clients) for clients in timed.late.values()) == 0
        assert timed.num_expected == 15

    @given(st.floats(0.1, 300), st.sampled_from([1.0, 1.1, 1.5, 2.0]), st.integers(0, 9))
    def test_late_ones_are_dropped(self, deadline: float, factor: float, round: int) -> None:
        timed = self.timed(round=round, deadline_seconds=deadline, over_selection=factor)
        everybody = planner(per_round={1.0: 15, 1.1: 17, 1.5: 23, 2.0: 30}[factor]).plan(round)
        seconds = {
            int(c): seconds_by_hand(int(c), int(v)) for c, v in zip(everybody.client, everybody.variant, strict=True)
        }
        kept, dropped = set(timed.plan.client.tolist()), set(timed.plan.dropped.tolist())
        assert kept | dropped == set(seconds)
        assert not kept & dropped
        assert len(kept) <= 15
        assert timed.plan.dropped.tolist() == sorted(dropped)
        assert set(timed.late["deadline"].tolist()) == {c for c in seconds if seconds[c] > deadline}
        assert set(timed.late["deadline"].tolist()) | set(timed.late["over-selection"].tolist()) == dropped
        in_time = {seconds[c] for c in timed.late["over-selection"].tolist()}
        assert max((seconds[c] for c in kept), default=0) <= min(in_time, default=math.inf)
        assert len(kept) == 15 or not in_time
        lasted = max(seconds[c] for c in kept) if len(kept) == 15 else deadline
        assert timed.costs.simulated_seconds == pytest.approx(lasted)
        keys = list(zip(timed.plan.variant, -timed.plan.steps, timed.plan.client, strict=True))
        assert keys == sorted(keys)
        assert timed.plan.weight.tolist() == [client % 20 + 5 for client in timed.plan.client.tolist()]

    def test_what_a_late_client_costs(self) -> None:
        """Its whole download, no upload, and what it computed until the round was over."""
        timed = self.timed(deadline_seconds=60.0)
        plan, late = timed.plan, timed.late["deadline"]
        assert len(late) > 0
        variants = planner().capacities.variants(late, 1)
        computed = [
            max(0.0, min(60 - 8 * LEVELS[v], 8 * LEVELS[v] * (c % 20 + 5))) for c, v in zip(late, variants, strict=True)
        ]
        finished = [8 * LEVELS[v] * (c % 20 + 5) for c, v in zip(plan.client, plan.variant, strict=True)]
        everybody = [LEVELS[v] for v in (*plan.variant, *variants)]
        assert timed.costs.client_flops == pytest.approx(sum(computed) + sum(finished))
        assert timed.costs.compute_seconds == pytest.approx(sum(computed) + sum(finished))
        assert timed.costs.bytes_down == sum(40 * level for level in everybody)
        assert timed.costs.download_seconds == pytest.approx(sum(8 * level for level in everybody))
        assert timed.costs.bytes_up == sum(40 * LEVELS[v] for v in plan.variant)
        assert timed.costs.upload_seconds == pytest.approx(sum(40 * LEVELS[v] for v in plan.variant))
        assert timed.costs.simulated_seconds == 60.0

    @pytest.mark.parametrize(
        ("factor", "per_round", "chosen"), [(1.1, 10, 11), (1.12, 25, 28), (1.3, 10, 13), (1.25, 10, 13), (9, 15, 40)]
    )
    def test_how_many_are_chosen(self, factor: float, per_round: int, chosen: int) -> None:
        """As many as the product says, rounded up, but never more than there are."""
        timed = self.timed(over_selection=factor, per_round=per_round)
        assert len(timed.plan.client) == timed.num_expected == per_round
        assert len(timed.plan.client) + len(timed.plan.dropped) == chosen

    def test_a_sampler_that_returns_more_keeps_them(self) -> None:
        timed = self.timed(sampler=lambda *arguments: np.arange(30))
        assert len(timed.plan.client) == timed.num_expected == 30

    def test_slow_devices_are_late(self) -> None:
        slow = DEVICE.model_copy(update={"flops_per_second": 0.01})
        made = planner(costs=[costs(DEVICE, slow)], deadline_seconds=500.0, per_round=NUM_CLIENTS)
        plan = made.plan(0)
        device = made.costs[0].devices.of(np.arange(NUM_CLIENTS), 0)
        assert np.bincount(device).tolist() == [20, 20]
        assert device[plan.client].tolist() == [0] * 20
        assert device[plan.dropped].tolist() == [1] * 20

    def test_equal_arguments_equal_plans(self) -> None:
        options: dict[str, Any] = {"deadline_seconds": 100.0, "over_selection": 1.5}
        on_and_off = DEVICE.model_copy(
            update={"availability": DeviceShare(profile={"availability": {"trace": [[5, 5]]}}).profile.availability}
        )
        first, second = (planner(costs=[costs(on_and_off)], **options) for _ in range(2))
        first.plan(7, 3.0)  # whatever was asked before
        for round in range(4):
            for now in (0.0, 4.0, 1e6):
                assert first.plan(round, now).digest() == second.plan(round, now).digest()
        assert first.plan(0, 0.0).digest() != first.plan(0, 4.0).digest()


class TestAvailability:
    def timed(self, now: float, availability: dict[str, Any], **changes: Any) -> TimedPlan:
        device = DeviceProfile.model_validate({**DEVICE.model_dump(), "availability": availability})
        return planner(costs=[costs(device)], **changes).phases(2, now)[0]

    def test_only_the_available_take_part(self) -> None:
        timed = self.timed(0.0, {"probability": 0.5})
        devices = (
            planner(costs=[costs(DeviceProfile.model_validate({"availability": {"probability": 0.5}}))])
            .costs[0]
            .devices
        )
        began, available = devices.available(2, 0.0)
        assert began == 0.0
        assert 15 < len(available) < 25
        places = rng.choose(3, "sample-clients", 2, len(available), 15)
        assert sorted(timed.plan.client.tolist()) == available[places].tolist()

    def test_all_take_part_where_they_are_few(self) -> None:
        timed = self.timed(0.0, {"probability": 0.1})
        assert 0 < len(timed.plan.client) < 15
        assert timed.num_expected == len(timed.plan.client)
        assert len(timed.plan.dropped) == 0

    def test_waiting_takes_simulated_time(self) -> None:
        """Two seconds on in a thousand: mostly nobody, and the round begins when the first one wakes up."""
        timed = self.timed(100.0, {"trace": [[2, 998]]}, per_round=1)
        shift = uniform_draws(3, "device-phase", 0, np.arange(NUM_CLIENTS))
        places = (100.0 + 1000 * shift) % 1000
        assert (places > 2).all()
        waited = 1000 - places.max()
        client = int(places.argmax())
        assert timed.plan.client.tolist() == [client]
        assert timed.costs.simulated_seconds == pytest.approx(
            waited + seconds_by_hand(client, int(timed.plan.variant[0]))
        )

    def test_everybody_always_changes_nothing(self) -> None:
        assert self.timed(5.0, {"trace": [[7, 0]]}).plan.digest() == planner().plan(2).digest()


class TestDevices:
    def shares(self, *entries: dict[str, Any], assignment: str = "fixed", seed: int = 0) -> Devices:
        made = [DeviceShare(profile={"name": str(i)}, **entry) for i, entry in enumerate(entries)]
        return assign_devices(made, assignment, 100, seed)

    def test_by_shares(self) -> None:
        devices = self.shares({"share": 1}, {"share": 3})
        everybody = np.arange(100)
        assert np.bincount(devices.of(everybody, 0)).tolist() == [25, 75]
        assert devices.of(everybody, 5).tolist() == devices.of(everybody, 0).tolist()
        other = self.shares({"share": 1}, {"share": 3}, seed=1)
        assert other.of(everybody, 0).tolist() != devices.of(everybody, 0).tolist()
        assert np.bincount(self.shares({}, {}).of(everybody, 0)).tolist() == [50, 50]

    @pytest.mark.parametrize("assignment", ["fixed", "dynamic"])
    def test_by_capacity(self, assignment: str) -> None:
        """Given in any order, devices follow the capacities, client by client and round by round."""
        large, small = {"capacity": 1.0, "share": 3}, {"capacity": 0.25, "share": 1}
        devices = self.shares(large, small, assignment=assignment)
        capacities = Capacities([0.25, 1.0], [1, 3], assignment, 100, 0)
        everybody = np.arange(100)
        for round in range(3):
            assert devices.of(everybody, round).tolist() == capacities.variants(everybody, round).tolist()
        assert [profile.name for profile in devices.profiles] == ["1", "0"]
        assert devices_of_capacities(devices, capacities, 100) == [(0, 0), (1, 1)]

    def test_which_pairs_occur(self) -> None:
        """Few clients, so that not every pair does."""
        made = [DeviceShare(profile={}), DeviceShare(profile={})]
        devices = assign_devices(made, "fixed", 3, 0)
        capacities = Capacities(LEVELS, [1, 1, 1], "fixed", 3, 0)
        whole = np.arange(3)
        expected = set(zip(devices.of(whole, 0).tolist(), capacities.variants(whole, 0).tolist(), strict=True))
        assert set(devices_of_capacities(devices, capacities, 3)) == expected
        assert len(expected) < 6
        drawn = Capacities(LEVELS, [1, 1, 1], "dynamic", 3, 0)
        assert len(devices_of_capacities(devices, drawn, 3)) == 6
        alone = assign_devices(made[:1], "fixed", 3, 0)
        assert devices_of_capacities(alone, drawn, 3) == [(0, 0), (0, 1), (0, 2)]


class TestDigest:
    def test_every_field_counts(self) -> None:
        plan = plan_of([0, 1, 1, 2])
        digests = {plan.digest()}
        for item in fields(plan):
            value = getattr(plan, item.name)
            other: Any
            if item.name in ("dropped", "variants"):
                other = np.array([5])
            elif item.name == "mixing":
                other = "mean"
            elif isinstance(value, np.ndarray):
                other = value.copy()
                other[-1] += 1
            else:
                other = (0.5, 1.0) if item.name == "capacities" else value + 1
            digests.add(replace(plan, **{item.name: other}).digest())
        assert len(digests) == len(fields(plan)) + 1

    def test_equal_plans_are_equal(self) -> None:
        assert planner().plan(4).digest() == planner().plan(4).digest()
        assert planner().plan(4).digest() != planner().plan(5).digest()
        assert planner().plan(4).digest() != planner(seed=4).plan(4).digest()


class TestBlocks:
    @given(st.lists(st.integers(0, 2), max_size=25), st.sampled_from([1, 2, 4]), st.integers(1, 4))
    def test_whole_tiles_variant_by_variant(self, variants: list[int], tile: int, tiles: int) -> None:
        plan = plan_of(variants)
        seen: list[int] = []
        for variant in range(3):
            rows = plan.variant_rows(variant)
            assert (plan.variant[rows] == variant).all()
            assert rows.stop - rows.start == variants.count(variant)
            blocks = list(plan.blocks(variant, tile, tiles))
            for block in blocks:
                assert (block.variant, block.tile) == (variant, tile)
                assert block.rows.start == rows.start + block.first_tile * tile
                assert 0 < block.rows.stop - block.rows.start <= tile * tiles
                seen += range(block.rows.start, block.rows.stop)
            assert all(b.rows.stop - b.rows.start == tile * tiles for b in blocks[:-1])
        assert seen == list(range(len(variants)))

    @given(st.integers(1, 25), st.sampled_from([1, 2, 4]), st.integers(1, 4))
    def test_tiles_are_subtrees(self, count: int, tile: int, tiles: int) -> None:
        """Summing tile by tile and then over tiles gives the bits of the tree over all rows."""
        source = torch.Generator().manual_seed(count)
        rows = torch.randn(count, 9, generator=source) * 10.0 ** torch.randint(-3, 4, (count, 1), generator=source)
        sums: dict[int, Any] = {}
        for block in plan_of([1] * count).blocks(1, tile, tiles):
            mine = rows[block.rows].clone()
            for part, low in enumerate(range(0, len(mine), tile)):
                sums[block.first_tile + part] = tree_sum(list(mine[low : low + tile]))
        assert list(sums) == list(range(math.ceil(count / tile)))
        found, expected = tree_sum(list(sums.values())), tree_sum(list(rows.clone()))
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
