"""Parts of models: parameters kept constant by pattern, and low-rank factors beside the weights of a base."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import user_modules
from federation import SINGLY, STACKED, Injected, assert_same, configure, digest, events, failing, modes, relative_error
from gossamer import resume, run
from gossamer.errors import ConfigError
from gossamer.simulation.counting import count_step
from gossamer.submodel import Layout
from gossamer.testing import check_workload
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.models import LARGE_WEIGHT
from gossamer.workloads.parts import LoRAOptions, PartlyTrained
from gossamer.workloads.transformer import Transformer

DATA = {"name": "synthetic", "num_train": 60, "num_test": 20, "num_labels": 4, "shape": [1, 8, 8]}
MLP = {"name": "mlp", "hidden": [32, 20]}
HALF = {"name": "user_modules:HalfFrozen", "freeze": False}
TARGETS = ["embed", "attend.in_proj_weight", "attend.out_proj", "hidden"]
LORA = {"rank": 4, "alpha": 6.0, "targets": TARGETS, "train": ["head.*"]}
TOKENS = {"workload.model": "user_modules:Tokens", "workload.lora": LORA}


def classification(model: Any, whole_models: bool = True, **options: Any) -> ImageClassification:
    given = {"dataset": DATA, "model": model} | options
    return ImageClassification(given, num_clients=4, partition="iid", seed=0, whole_models=whole_models)


def changed(workload: Any, seed: int = 1) -> dict[str, Tensor]:
    """Return parameters of which none is 0."""
    row = workload.init(0)
    noise = 0.2 * torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))
    return workload.layout.views(workload.layout.flatten(workload.layout.views(row + noise)))


def whole_half() -> dict[str, Any]:
    return configure({"workload.model": HALF, "rounds": 1})


class TestFrozen:
    @pytest.mark.parametrize(
        ("frozen", "expected"),
        [
            ([], 3 * 2 * (64 * 32 + 32 * 20 + 20 * 4) - 2 * 64 * 32),
            (["hidden0.*"], 2 * 64 * 32 + 3 * 2 * (32 * 20 + 20 * 4) - 2 * 32 * 20),
            (["hidden*"], 2 * (64 * 32 + 32 * 20) + 2 * 2 * 20 * 4),
            (["output.*"], 2 * 2 * 64 * 32 + 3 * 2 * 32 * 20 + 2 * 2 * 20 * 4),
        ],
    )
    def test_backward_goes_no_lower_than_it_must(self, frozen: list[str], expected: float) -> None:
        """Forward, gradients by weights and gradients by inputs are 2 i o FLOPs a layer and sample each."""
        workload = classification(MLP, frozen=frozen)
        assert count_step(workload, workload.layout, 8).flops_per_sample == expected

    def test_is_what_requires_no_gradient(self, tmp_path: Path) -> None:
        """Patterns on a module give the bits of the module that says so itself."""
        here = run(configure({"workload.model": HALF, "workload.frozen": ["1.*"], "rounds": 1}), out=tmp_path / "a")
        other = configure({"workload.model": HALF | {"freeze": True}, "rounds": 1})
        there = run(other, out=tmp_path / "b")
        assert digest(here.params) == digest(there.params)
        costs, whole = (events(one.directory, "variant")[0] for one in (here, run(whole_half(), out=tmp_path / "c")))
        assert costs["bytes_up"] == 4 * (20 * 12 + 12 + 12 * 10 + 10 + 3 * 5 + 5)
        frozen = 4 * (64 * 20 + 20)  # held, but without a gradient, and nothing is saved below
        assert whole["memory_bytes"] - costs["memory_bytes"] >= frozen
        assert costs["memory_bytes"] > frozen + 2 * costs["bytes_up"]

    @pytest.mark.parametrize("mode", [STACKED, SINGLY], ids=["stacked", "singly"])
    def test_of_a_declared_model(self, mode: dict[str, bool], tmp_path: Path) -> None:
        model = {"workload.model": MLP, "workload.frozen": ["hidden0.*", "output.bias"], "rounds": 2}
        done = run(configure(model | modes(**mode)), out=tmp_path / "a")
        start = run(configure({"workload.model": MLP, "rounds": 1, "train.lr": 1e-30}), out=tmp_path / "b").params
        assert list(done.params) == list(start)
        same = [name for name, value in done.params.items() if torch.equal(value, start[name])]
        assert same == ["hidden0.weight", "hidden0.bias", "output.bias"]

    def test_gradients_are_those_of_the_whole(self) -> None:
        frozen, whole = classification(MLP, frozen=["hidden1.*"]), classification(MLP)
        batch = whole.batch(np.array([0]), np.arange(5)[None])
        merged = {name: value[0] for values in batch for name, value in values.items()}
        params = {name: value.requires_grad_() for name, value in whole.layout.views(whole.init(0)).items()}
        expected = dict(
            zip(params, torch.autograd.grad(whole.loss(params, merged), list(params.values())), strict=True)
        )
        mine = {name: value.requires_grad_() for name, value in frozen.layout.views(frozen.init(0)).items()}
        found = torch.autograd.grad(frozen.loss(mine, merged), list(mine.values()))
        for name, gradient in zip(mine, found, strict=True):
            assert torch.allclose(gradient, expected[name], atol=1e-7)

    def test_sub_models_keep_what_touches_a_constant(self) -> None:
        workload = classification(MLP, whole_models=False, frozen=["hidden0.*"])
        assert workload.layout.cut_axes == ("hidden1",)
        part = workload.layout.cut(0.5)
        views = part.views(torch.ones(part.d))
        images = torch.ones(3, 1, 8, 8)
        assert workload.model.apply(views, images).shape == (3, 4)
        with pytest.raises(ConfigError, match=r"submodel\.scaler to false"):
            workload.model.apply(views, images, ForwardContext(scale=2.0))
        check_workload(classification(MLP, frozen=["output.bias"]))

    @pytest.mark.parametrize("model", [MLP, "user_modules:Tokens"])
    def test_refused(self, model: Any) -> None:
        with pytest.raises(ConfigError, match=r"'hiden.*' matches no parameter; did you mean 'hidden"):
            classification(model, frozen=["hiden.*"])
        with pytest.raises(ConfigError, match="leaves nothing to train"):
            classification(model, frozen=["*"])


class TestLoRA:
    def test_a_module_is_what_merging_makes_of_it(self) -> None:
        workload = classification("user_modules:Tokens", lora=LORA)
        model = workload.model
        assert model.targets == ("embed.weight", "attend.in_proj_weight", "attend.out_proj.weight", "hidden.weight")
        assert list(model.shapes)[:3] == ["head.weight", "head.bias", "embed.lora_A"]
        assert model.shapes["attend.in_proj_weight.lora_B"] == (36, 4)
        params, x = changed(workload), torch.randn(6, 1, 8, 8)
        merged = workload.params_of(workload.layout.flatten(params))
        module = user_modules.Tokens((1, 8, 8), 4)
        module.load_state_dict(merged)
        for training in (True, False):
            with torch.no_grad():
                expected = module.train(training)(x)
                found = model.apply(params, x, ForwardContext(training=training))
            assert relative_error({"x": found}, {"x": expected}) < 1e-6
            assert relative_error({"x": found}, {"x": model.apply(start(workload), x)}) > 1e-2

    def test_starts_as_the_base(self) -> None:
        workload, plain = classification("user_modules:Tokens", lora=LORA), classification("user_modules:Tokens")
        params, x = start(workload), torch.randn(3, 1, 8, 8)
        assert torch.equal(workload.model.apply(params, x), plain.model.apply(start(plain), x))
        assert digest(workload.params_of(workload.init(0))) == digest(plain.params_of(plain.init(0)))
        a = params["hidden.lora_A"]
        assert abs(float(a.abs().max()) - 1 / math.sqrt(12)) < 0.05
        assert not params["hidden.lora_B"].any()

    def test_the_transformer(self) -> None:
        options = {"stream": 8, "num_heads": 2, "hidden": 12, "num_blocks": 1, "dropout": 0.2}
        lora = LoRAOptions(rank=2, targets=("*.query", "*.value", "embedding"), train=("output.*",))
        inner = Transformer(6, 5, **options)
        model = PartlyTrained(inner, (), lora, partial(np.random.default_rng, 0))
        layout = Layout.of(model.shapes, model.axes)
        assert layout.cut_axes == ("lora-rank",)
        assert model.axes["output.weight"] == ("label", None)
        params = {name: value + 0.1 * torch.randn(value.shape) for name, value in model.init(source()).items()}
        x = torch.randint(5, (3, 6))
        for context in (ForwardContext(), ForwardContext(scale=2.0), ForwardContext(key=torch.tensor(3))):
            expected = inner.apply(model.whole(params), x, ForwardContext(key=context.key))
            assert relative_error({"x": model.apply(params, x, context)}, {"x": expected}) < 1e-6
        two = {name: torch.stack([value, 2 * value]) for name, value in params.items()}
        stacked = torch.vmap(model.apply)(two, torch.stack([x, x]))
        assert torch.allclose(stacked[0], model.apply(params, x), atol=1e-6)
        assert list(model.whole(params)) == list(inner.shapes)

    @pytest.mark.parametrize("number", [3, 10])
    def test_built_in_models(self, number: int) -> None:
        """Large weights are multiplied another way in batches of ten."""
        data = {"dataset": {**DATA, "shape": [1, 28, 28]}}
        for model, hidden in (({"name": "mlp", "hidden": [700]}, "hidden0"), ({"name": "cnn", "width": 0.7}, "hidden")):
            lora = {"rank": 2, "targets": [hidden], "train": ["output.*"]}
            workload, plain = classification(model, lora=lora, **data), classification(model, **data)
            params, x = changed(workload), torch.randn(number, 1, 28, 28)
            merged = workload.params_of(workload.layout.flatten(params))
            found, expected = workload.model.apply(params, x), plain.model.apply(merged, x)
            assert merged[f"{hidden}.weight"].numel() >= LARGE_WEIGHT
            assert relative_error({"x": found}, {"x": expected}) < 2e-6
            assert relative_error({"x": workload.model.apply(start(workload), x)}, {"x": expected}) > 1e-2

    def test_flops_by_hand(self) -> None:
        """Beside x W^T: two thin products there, and gradients by A, by B and by the hidden x A^T; none by W."""
        lora = {"rank": 3, "targets": ["1", "3"]}
        workload = classification(HALF, lora=lora)
        first, second = (64, 20), (20, 12)
        thin = [2 * 3 * (i + o) for i, o in (first, second)]
        base = [2 * i * o for i, o in (first, second)]
        head = 2 * 12 * 4
        forward = sum(base) + sum(thin) + head
        backward = head + base[1] + 2 * thin[1] + thin[0] + 2 * 3 * 20
        assert count_step(workload, workload.layout, 8).flops_per_sample == forward + backward
        assert count_step(classification(HALF), classification(HALF).layout, 8).flops_per_sample == (
            3 * (sum(base) + head) - base[0]
        )
        assert workload.layout.num_parameters == 3 * (64 + 20 + 20 + 12)

    @pytest.mark.parametrize(
        ("lora", "message"),
        [
            ({"targets": ["hiden"]}, "'hiden' matches no parameter; did you mean 'hidden'"),
            ({"targets": ["head.bias"]}, r"'head.bias' of shape \(4,\), which is no matrix"),
            ({"targets": ["hidden"], "rank": 13}, r"rank = 13 is above the smaller side of 'hidden.weight' \(20, 12\)"),
            ({"targets": ["odd"]}, "'odd' is used otherwise than as the weight of a linear layer"),
            ({"targets": ["head"], "train": ["head.*"]}, "'head.weight' in train and in targets"),
            ({"targets": ["hidden"], "train": ["tail"]}, "'tail' matches no parameter"),
            ({"targets": []}, "targets"),
        ],
    )
    def test_refused(self, lora: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            classification("user_modules:Tokens", lora={"rank": 2} | lora)

    def test_what_else_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"frozen = \['embed.\*'\] says nothing beside workload.lora"):
            classification("user_modules:Tokens", lora=LORA, frozen=["embed.*"])
        with pytest.raises(ConfigError, match="needs a model whose linear layers"):
            classification("softmax", lora={"rank": 2, "targets": ["output"]})

    def test_keeps_its_contract(self) -> None:
        workload = classification("user_modules:Tokens", whole_models=False, lora=LORA)
        assert workload.layout.cut_axes == ("lora-rank",)
        assert workload.model.axes["head.weight"] == ("label", None)
        check_workload(workload)


def source() -> np.random.Generator:
    return np.random.default_rng(0)


def start(workload: Any) -> dict[str, Tensor]:
    """Return the initial parameters."""
    return workload.layout.views(workload.init(0))


class TestRuns:
    @pytest.mark.parametrize("levels", [[1.0], [0.25, 0.5, 1.0]], ids=["one-rank", "by-capacity"])
    def test_bits_modes_and_a_resume(self, levels: list[float], tmp_path: Path) -> None:
        algorithm = "heterofl" if len(levels) > 1 else "fedavg"
        changes = TOKENS | {"rounds": 2, "algorithm": algorithm, "submodel": {"capacities": levels}}
        done = {}
        for name, mode in (("stacked", STACKED), ("singly", SINGLY)):
            config = configure(changes | modes(levels, **mode))
            done[name] = run(config, out=tmp_path / name)
            if mode["stacked"] == (len(levels) > 1):
                engine = config["engine"] | {"workers": 2}
                assert_same(run(config | {"engine": engine}, out=tmp_path / f"{name}-workers"), done[name])
        assert relative_error(done["stacked"].params, done["singly"].params) < 1e-5
        with pytest.raises(Injected):
            run(config, out=tmp_path / "killed", hooks=failing("exchange", True, 2))
        assert_same(resume(tmp_path / "killed", trust=True), done["singly"])
        sizes = {event["capacity"]: event["bytes_up"] for event in events(done["singly"].directory, "variant")}
        sides = 16 + 12 + 36 + 12 + 12 + 12 + 20 + 12
        assert sizes == {level: 4 * (int(4 * level) * sides + 20 * 10 + 10) for level in levels}

    def test_the_base_keeps_its_bits(self, tmp_path: Path) -> None:
        """Weights that are no targets do; and targets changed by products of the rank at most."""
        config = configure(TOKENS | {"rounds": 1})
        done = run(config, out=tmp_path / "a")
        before = run(
            configure({"workload.model": "user_modules:Tokens", "rounds": 1, "train.lr": 1e-30}), out=tmp_path / "b"
        )
        for name, value in done.params.items():
            difference = value - before.params[name]
            if name in ("embed.weight", "hidden.weight", "attend.out_proj.weight", "attend.in_proj_weight"):
                assert 1 <= torch.linalg.matrix_rank(difference, atol=1e-6) <= 4
            else:
                assert (difference.abs().max() > 1e-9) == name.startswith("head")
