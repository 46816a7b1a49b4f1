"""Plans: canonical order, capacities, schedules, and what a round goes through."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gossamer import rng
from gossamer.aggregate import tree_sum
from gossamer.errors import ConfigError
from gossamer.planning import Capacities, Planner, ScheduleOptions, apportion, learning_rate, uniform
from gossamer.records import RoundPlan

SHARES = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)
NUM_CLIENTS = 40


def planner(**changes: Any) -> Planner:
    """Return a planner of 40 clients with 5 to 24 samples each, three capacities, two epochs of batches of 8."""
    options: dict[str, Any] = {
        "seed": 3,
        "num_rounds": 10,
        "num_samples": np.arange(NUM_CLIENTS) % 20 + 5,
        "per_round": 15,
        "sampler": uniform,
        "capacities": Capacities([0.25, 0.5, 1.0], [2, 1, 1], "fixed", NUM_CLIENTS, 3),
        "weighting": "samples",
        "epochs": 2,
        "steps": None,
        "batch_size": 8,
        "lr": 0.1,
        "schedule": ScheduleOptions(),
    }
    return Planner(**(options | changes))


def plan_of(variants: list[int], num_variants: int = 3) -> RoundPlan:
    count = len(variants)
    whole = np.arange(count, dtype=np.int64)
    return RoundPlan(
        round=2,
        phase=0,
        client=whole * 7,
        site=np.zeros(count, dtype=np.int64),
        weight=np.ones(count),
        steps=np.ones(count, dtype=np.int32),
        variant=np.array(sorted(variants), dtype=np.int16),
        base=np.full(count, 2),
        capacities=tuple((i + 1) / num_variants for i in range(num_variants)),
        lr=0.1,
    )


class TestApportion:
    @given(SHARES, st.integers(0, 500))
    @settings(max_examples=100, deadline=None)
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
        assert self.rates(milestones=[2]) == [0.8] * 8, "only multistep has milestones"

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
        assert (plan.round, plan.phase, plan.capacities, plan.lr) == (round, 0, (0.25, 0.5, 1.0), 0.1)
        assert plan.base.tolist() == [round] * 15
        assert plan.site.tolist() == [0] * 15
        assert plan.dropped.tolist() == []
        dtypes = [plan.client, plan.site, plan.weight, plan.steps, plan.variant, plan.base]
        assert [array.dtype.name for array in dtypes] == ["int64", "int64", "float64", "int32", "int16", "int64"]

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

    @pytest.mark.parametrize(("epochs", "steps"), [(None, None), (1, 1)])
    def test_epochs_or_steps(self, epochs: int | None, steps: int | None) -> None:
        with pytest.raises(ConfigError, match=f"train.epochs = {epochs} and train.steps = {steps}: give exactly one"):
            planner(epochs=epochs, steps=steps)

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
    @settings(max_examples=80, deadline=None)
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
            assert made.samples_trained(plan).tolist() == [count] * 15
            if epochs is not None:
                assert count == epochs * num_samples

    def test_rows_are_those_of_the_plan(self) -> None:
        made = planner()
        plan = made.plan(0)
        assert made.samples_trained(plan).tolist() == [2 * (client % 20 + 5) for client in plan.client]


class TestDigest:
    def test_every_field_counts(self) -> None:
        plan = plan_of([0, 1, 1, 2])
        digests = {plan.digest()}
        for item in fields(plan):
            value = getattr(plan, item.name)
            other: Any
            if item.name == "dropped":
                other = np.array([5])
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
    @settings(max_examples=80, deadline=None)
    def test_whole_leaves_variant_by_variant(self, variants: list[int], leaf: int, leaves: int) -> None:
        plan = plan_of(variants)
        seen: list[int] = []
        for variant in range(3):
            rows = plan.variant_rows(variant)
            assert (plan.variant[rows] == variant).all()
            assert rows.stop - rows.start == variants.count(variant)
            blocks = list(plan.blocks(variant, leaf, leaves))
            for block in blocks:
                assert (block.variant, block.leaf) == (variant, leaf)
                assert block.rows.start == rows.start + block.first_leaf * leaf
                assert 0 < block.rows.stop - block.rows.start <= leaf * leaves
                seen += range(block.rows.start, block.rows.stop)
            assert all(b.rows.stop - b.rows.start == leaf * leaves for b in blocks[:-1])
        assert seen == list(range(len(variants)))

    @given(st.integers(1, 25), st.sampled_from([1, 2, 4]), st.integers(1, 4))
    @settings(max_examples=40, deadline=None)
    def test_leaves_are_subtrees(self, count: int, leaf: int, leaves: int) -> None:
        """Summing leaf by leaf and then over leaves gives the bits of the tree over all rows."""
        source = torch.Generator().manual_seed(count)
        rows = torch.randn(count, 9, generator=source) * 10.0 ** torch.randint(-3, 4, (count, 1), generator=source)
        sums: dict[int, Any] = {}
        for block in plan_of([1] * count).blocks(1, leaf, leaves):
            mine = rows[block.rows].clone()
            for part, low in enumerate(range(0, len(mine), leaf)):
                sums[block.first_leaf + part] = tree_sum(list(mine[low : low + leaf]))
        assert list(sums) == list(range(math.ceil(count / leaf)))
        found, expected = tree_sum(list(sums.values())), tree_sum(list(rows.clone()))
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
