"""Dropout by address: its statistics, its independence of everything but the address, and PyTorch's own beside it."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from federation import SINGLY, STACKED, Injected, assert_same, configure, digest, failing, modes, relative_error
from gossamer import resume, run
from gossamer.engines.training.batches import step_keys
from gossamer.engines.training.job import Job
from gossamer.errors import ConfigError
from gossamer.plan import Block
from gossamer.testing import check_workload
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.dropout import Dropout, random_bits
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.mending import Mending
from gossamer.workloads.modules import ModuleModel
from gossamer.workloads.transformer import Transformer
from slow_peers import decentralized

MODULE = {"workload.model": "user_modules:Dropping"}
DATA = {"name": "synthetic", "num_train": 30, "num_test": 10, "num_labels": 4, "shape": [1, 8, 8]}
KEY = torch.tensor(0x1234_5678_9ABC)


def split_mix(seed: int, count: int) -> list[int]:
    """Return the first outputs of SplitMix64 as its authors write it."""
    state, outputs, last = seed % 2**64, [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & last
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & last
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & last
        outputs.append(z ^ (z >> 31))
    return outputs


def kept(key: int, p: float, *shape: int, call: int = 0) -> Tensor:
    """Return the mask of one call of dropout."""
    dropout = Dropout(torch.tensor(key))
    for _ in range(call):
        dropout(torch.ones(1), 0.5)
    return dropout(torch.ones(shape), p) != 0


def with_key(function: Any, *args: Any, key: Tensor | None = KEY) -> Tensor:
    """Call a function of torch as in a forward pass with a key."""
    with Mending({}, {}, ForwardContext(key=key)):
        result: Tensor = function(*args)
    return result


class TestBits:
    def test_are_those_of_split_mix(self) -> None:
        assert split_mix(0, 1) == [0xE220A8397B1DCDAF]  # as published with the Java library
        found = random_bits(torch.tensor(-7), [2, 3])
        for row, seed in enumerate(split_mix(split_mix(-7, 1)[0], 2)):
            assert [value % 2**64 for value in found[row].tolist()] == split_mix(seed, 3)

    def test_an_element_does_not_depend_on_sizes(self) -> None:
        large = random_bits(KEY, [5, 6, 7])
        for sizes in ([2, 6, 7], [5, 3, 7], [5, 6, 1]):
            assert torch.equal(random_bits(KEY, sizes), large[tuple(slice(size) for size in sizes)])

    def test_stacked_keys(self) -> None:
        keys = torch.tensor([3, -4, 5])
        one_by_one = torch.stack([random_bits(key, [4, 2]) for key in keys])
        assert torch.equal(random_bits(keys, [4, 2]), one_by_one)
        assert torch.equal(torch.vmap(lambda key: random_bits(key, [4, 2]))(keys), one_by_one)
        x = torch.randn(3, 4, 2)
        singly = torch.stack([Dropout(key)(row, 0.5) for key, row in zip(keys, x, strict=True)])
        assert torch.equal(Dropout(keys)(x, 0.5), singly)


class TestStatistics:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_share_of_what_is_kept(self, p: float) -> None:
        number = 40_000
        for key in range(5):
            share = float(kept(key, p, number // 100, 100).float().mean())
            assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / number)

    def test_independence(self) -> None:
        """Masks of other steps, clients and calls, and neighbours within one, agree as often as coins do."""
        words = np.array([[step, client] for step in range(3) for client in range(3)])
        keys = step_keys(*job_of(3), slice(0, 3), 3)
        masks = [kept(int(keys[client, step]), 0.5, 100, 100) for step, client in words]
        masks += [kept(int(keys[0, 0]), 0.5, 100, 100, call=call) for call in (1, 2)]
        masks += [kept(0, 0.5, 100, 100), kept(1, 0.5, 100, 100)]  # keys that differ by a bit
        pairs = [(one, other) for one, other in itertools.combinations(masks, 2)]
        pairs += [(masks[0][1:], masks[0][:-1]), (masks[0][:, 1:], masks[0][:, :-1]), (masks[0], masks[0].T)]
        for one, other in pairs:
            agreeing = float((one == other).float().mean())
            assert abs(agreeing - 0.5) < 4.5 * 0.5 / math.sqrt(one.numel() / 2)

    def test_keys_follow_from_the_address(self) -> None:
        task, job = job_of(4)
        keys = step_keys(task, job, slice(0, 4), 6)
        assert len(set(keys.flatten().tolist())) == 24
        assert torch.equal(step_keys(task, job, slice(1, 3), 2), keys[1:3, :2])
        for other in (job._replace(round=1), job._replace(phase=1)):
            assert not set(step_keys(task, other, slice(0, 4), 6).flatten().tolist()) & set(keys.flatten().tolist())


def job_of(num_clients: int) -> tuple[Any, Job]:
    """Return a task, of which only the seed matters here, and a job."""

    class Seeded:
        seed = 3

    steps, weight = np.ones(num_clients, dtype=np.int32), np.ones(num_clients)
    clients = np.arange(num_clients, dtype=np.int64)
    return Seeded(), Job(0, 0, Block(0, 0, 1, slice(0, num_clients)), clients, weight, steps, 0.1)


class TestFunctions:
    """Every function of dropout does what PyTorch's does, but for where the masks come from."""

    @pytest.mark.parametrize("p", [0.3, 1.0])
    def test_scaling(self, p: float) -> None:
        x = torch.randn(50, 40)
        expected, found = F.dropout(x, p), with_key(F.dropout, x, p)
        for one in (expected, found):
            assert ((one == 0).float().mean() - p).abs() < 0.05
            assert torch.equal(one[one != 0], (x * (1 / (1 - p) if p < 1 else 0.0))[one != 0])

    def test_alpha(self) -> None:
        x, zeros = torch.randn(200, 200), torch.zeros(200)
        found = with_key(F.alpha_dropout, zeros, 0.3, True).unique()
        assert torch.allclose(found, F.alpha_dropout(zeros, 0.3, True).unique(), atol=1e-6)
        assert len(found) == 2
        for one in (with_key(F.alpha_dropout, x, 0.3, True), F.alpha_dropout(x, 0.3, True)):
            assert abs(float(one.mean())) < 0.03
            assert abs(float(one.std()) - 1) < 0.03
        whole = with_key(F.feature_alpha_dropout, torch.zeros(30, 5, 4), 0.3, True)
        assert torch.equal(whole.amin(2), whole.amax(2))
        assert torch.allclose(whole.unique(), found, atol=1e-6)

    @pytest.mark.parametrize(
        ("function", "shape", "whole"),
        [
            (F.dropout1d, (6, 50, 4), (2,)),
            (F.dropout1d, (50, 4), (1,)),
            (F.dropout2d, (6, 50, 4, 3), (2, 3)),
            (F.dropout3d, (6, 50, 4, 3, 2), (2, 3, 4)),
            (F.dropout3d, (50, 4, 3, 2), (1, 2, 3)),
        ],
    )
    def test_whole_channels(self, function: Any, shape: tuple[int, ...], whole: tuple[int, ...]) -> None:
        for one in (with_key(function, torch.ones(shape), 0.5), function(torch.ones(shape), 0.5)):
            assert torch.equal(one.amin(whole), one.amax(whole))
            assert set(one.unique().tolist()) == {0.0, 2.0}

    def test_in_place_and_off(self) -> None:
        x = torch.ones(30)
        dropped = with_key(partial(F.dropout, inplace=True), x, 0.5)
        assert dropped is x
        assert 0 < (x == 0).sum() < 30
        assert with_key(F.dropout, x, 0.5, False) is x
        assert with_key(F.dropout, x, 0.5, key=None) is x
        with pytest.raises(ConfigError, match=r"probability of dropout is 1\.5"):
            with_key(F.dropout, x, 1.5)

    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}, {"scale": 0.3}, {"gqa": True}])
    def test_attention(self, options: dict[str, Any]) -> None:
        """Where next to nothing is dropped, it is PyTorch's; otherwise its mean over keys is."""
        q, k, v = torch.randn(3, 2, 4, 5, 6).unbind(0)
        given = dict(options)
        if given.pop("gqa", False):
            k, v, given["enable_gqa"] = k[:, :2], v[:, :2], True
        if "attn_mask" in given:
            given["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).tril()
        attend = partial(F.scaled_dot_product_attention, **given)
        expected = attend(q, k, v)
        assert torch.allclose(with_key(partial(attend, dropout_p=1e-12), q, k, v), expected, atol=1e-6)
        assert not torch.allclose(with_key(partial(attend, dropout_p=0.5), q, k, v), expected, atol=1e-2)
        assert torch.equal(with_key(partial(attend, dropout_p=0.5), q, k, v, key=None), expected)


class TestModels:
    def test_modules_follow_the_key(self) -> None:
        workload = ImageClassification(
            {"dataset": DATA, "model": "user_modules:Dropping"}, num_clients=4, partition="iid", seed=0
        )
        assert workload.traits.uses_key
        check_workload(workload)
        model, x = workload.model, torch.randn(6, 1, 8, 8)
        params = model.init(np.random.default_rng(0))
        first, again, other = (model.apply(params, x, ForwardContext(key=torch.tensor(key))) for key in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, atol=1e-2)
        part = model.apply(params, x[:2], ForwardContext(key=torch.tensor(1)))  # whoever else is in the batch
        assert torch.allclose(part, first[:2], atol=1e-5)
        off = model.apply(params, x, ForwardContext(training=False))
        assert torch.allclose(model.apply(params, x), off, atol=1e-5)

    def test_a_module_by_hand(self) -> None:
        """Calls are numbered in their order."""

        class Twice(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(super().forward(F.dropout(x.flatten(1), 0.5)), 0.25)

        model = ModuleModel(partial(Twice, 8, 3), (1, 2, 4), 3)
        params, x = model.init(np.random.default_rng(0)), torch.randn(5, 1, 2, 4)
        found = model.apply(params, x, ForwardContext(key=torch.tensor(9)))
        hidden = F.linear(x.flatten(1) * kept(9, 0.5, 5, 8) * 2, params["weight"], params["bias"])
        assert torch.allclose(found, hidden * kept(9, 0.25, 5, 3, call=1) / 0.75, atol=1e-6)

    def test_without_dropout_there_are_no_keys(self) -> None:
        for model in ("mlp", "user_modules:Tied", {"name": "mlp", "dropout": 0.0}):
            workload = ImageClassification({"dataset": DATA, "model": model}, num_clients=4, partition="iid", seed=0)
            assert not workload.traits.uses_key
        assert not Transformer(4, 5).traits.uses_key

    def test_the_transformer(self) -> None:
        dropping, plain = (Transformer(6, 5, stream=8, num_heads=2, hidden=12, dropout=p) for p in (0.2, 0.0))
        params, x = dropping.init(np.random.default_rng(0)), torch.randint(5, (3, 6))
        assert dropping.traits.uses_key
        assert torch.equal(dropping.apply(params, x), plain.apply(params, x))
        found = torch.stack([dropping.apply(params, x, ForwardContext(key=torch.tensor(key))) for key in range(3)])
        assert (found.std(0) > 0).all()


CASES = {
    "module": MODULE | {"submodel.capacities": [0.5, 1.0], "algorithm": "fedrolex"},
    "native": {"workload.model": {"name": "mlp", "hidden": [32], "dropout": 0.4}},
}


def pinned(case: str, mode: dict[str, bool]) -> dict[str, Any]:
    levels = CASES[case].get("submodel.capacities", [1.0])
    return configure({"rounds": 2} | CASES[case] | modes(levels, **mode))


@pytest.mark.parametrize("case", CASES)
class TestRuns:
    def test_bits_and_modes(self, case: str, tmp_path: Path) -> None:
        """Workers and blocks change no bits, and stacking (of padded batches) changes little."""
        done = {}
        for name, mode in (("stacked", STACKED), ("singly", SINGLY)):
            config = pinned(case, mode)
            done[name] = run(config, out=tmp_path / name)
            engine = config["engine"] | ({"workers": 1} if mode["stacked"] else {"workers": 2, "block_size": 2})
            assert_same(run(config | {"engine": engine}, out=tmp_path / f"{name}-workers"), done[name])
        assert digest(done["stacked"].params) != digest(done["singly"].params)
        assert relative_error(done["stacked"].params, done["singly"].params) < 1e-5

    def test_a_resume(self, case: str, tmp_path: Path) -> None:
        config = pinned(case, SINGLY)
        expected = run(config, out=tmp_path / "whole")
        with pytest.raises(Injected):
            run(config, out=tmp_path / "killed", hooks=failing("exchange", True, 2))
        assert_same(resume(tmp_path / "killed", trust=True), expected)


def test_it_matters(tmp_path: Path) -> None:
    dropped, plain = pinned("native", SINGLY), configure({"rounds": 2} | modes(**SINGLY))
    assert relative_error(run(dropped, out=tmp_path / "a").params, run(plain, out=tmp_path / "b").params) > 1e-2


def test_peers(tmp_path: Path) -> None:
    model = {"name": "mlp", "hidden": [16], "dropout": 0.5}
    config = decentralized({"workload.model": model, "rounds": 2})
    one = run(config, out=tmp_path / "one")
    assert_same(run(config | {"engine": config["engine"] | {"workers": 2}}, out=tmp_path / "two"), one)
    singly = run(config | {"engine": config["engine"] | {"modes": [{"capacity": 1.0}]}}, out=tmp_path / "singly")
    assert relative_error(singly.params, one.params) < 1e-5
