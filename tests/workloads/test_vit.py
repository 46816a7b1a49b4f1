"""The vision transformer against PyTorch's own layers, and FedIns against a loop over samples and instances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from federation import SINGLY, STACKED, assert_same, configure, modes, relative_error
from gossamer import load, run
from gossamer.errors import ConfigError
from gossamer.results.export import export
from gossamer.submodel import Cutter, Layout
from gossamer.submodel.strategies import rolling
from gossamer.testing import check_workload
from gossamer.workloads.base import ForwardContext
from gossamer.workloads.images import ImageClassification
from gossamer.workloads.vit import InstanceAdaptive, VisionTransformer

SHAPE, NUM_LABELS = (3, 8, 12), 5
SIZES = {"stream": 12, "num_blocks": 2, "num_heads": 3, "hidden": 20}
POOL = {"pool": 6, "top": 2}
VIT = {"name": "vit", **SIZES}
FEDINS = {"name": "fedins", **SIZES, **POOL}
SET = {"name": "synthetic", "num_train": 96, "num_test": 30, "noise": 2.0}
RUN = {"rounds": 2, "workload": {"dataset": SET, "model": FEDINS}}


def params_of(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Return random parameters of which none is what it starts as."""
    torch.manual_seed(seed)
    drawn = model.init(np.random.default_rng(seed))
    return {name: value + 0.2 * torch.randn(value.shape) for name, value in drawn.items()}


def images(count: int = 4) -> Tensor:
    """Return images float32 [count, *SHAPE], drawn."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def workload(model: dict[str, Any] | None = None, num_clients: int = 4) -> ImageClassification:
    """Return a small workload of synthetic images."""
    options = {"dataset": SET, "model": FEDINS if model is None else model}
    return ImageClassification(options, num_clients=num_clients, partition="iid", seed=0)


def slow_class_token(params: dict[str, Tensor], image: Tensor) -> Tensor:
    """Return the class token of one image by PyTorch's encoder layers, patch after patch."""
    tiles = [image[:, i : i + 4, j : j + 4].reshape(-1) for i in (0, 4) for j in (0, 4, 8)]
    first = params["backbone.class.weight"][0]
    embedded = [t @ params["backbone.patches.weight"].T + params["backbone.patches.bias"] for t in tiles]
    stream = torch.stack([first, *embedded]) + params["backbone.places.weight"]
    for number in range(SIZES["num_blocks"]):
        prefix = f"backbone.block{number}"
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        state = {
            f"self_attn.in_proj_{kind}": torch.cat(
                [params[f"{prefix}.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            )
            for kind in ("weight", "bias")
        }
        theirs = {"self_attn.out_proj": "attention.project", "linear1": "feed.expand", "linear2": "feed.contract"}
        theirs |= {"norm1": "attention.norm", "norm2": "feed.norm"}
        for name, mine in theirs.items():
            state |= {f"{name}.{kind}": params[f"{prefix}.{mine}.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(state)
        stream = layer(stream[None])[0]
    return nn.functional.layer_norm(stream[0], (12,), params["backbone.norm.weight"], params["backbone.norm.bias"])


def merged(params: dict[str, Tensor], layers: tuple[str, ...], scales: Tensor, shifts: Tensor) -> dict[str, Tensor]:
    """Return parameters with scales and shifts of one sample merged into all layers: gamma W, gamma b + beta."""
    found, start = dict(params), 0
    for layer in layers:
        width = len(params[f"{layer}.bias"])
        gamma, beta = scales[start : start + width], shifts[start : start + width]
        weight = params[f"{layer}.weight"]
        found[f"{layer}.weight"] = weight * (gamma if weight.dim() == 1 else gamma[:, None])
        found[f"{layer}.bias"] = params[f"{layer}.bias"] * gamma + beta
        start += width
    assert start == len(scales)
    return found


class TestVisionTransformer:
    def test_it_is_pytorchs_encoder(self) -> None:
        model = VisionTransformer(SHAPE, NUM_LABELS, **SIZES)
        params, x = params_of(model), images()
        tokens = torch.stack([slow_class_token(params, image) for image in x])
        assert torch.allclose(model.encoded(params, x), tokens, atol=1e-5)
        expected = tokens @ params["head.weight"].T + params["head.bias"]
        assert torch.allclose(model.apply(params, x), expected, atol=1e-5)

    @pytest.mark.parametrize("cut", ["heads", "head-dim"])
    def test_a_sub_model_is_the_whole_one_without_the_rest(self, cut: str) -> None:
        model = VisionTransformer(SHAPE, NUM_LABELS, **SIZES, cut=cut)
        layout = Layout.of(model.shapes, model.axes)
        window = Cutter(layout, rolling, 1, 0).cut(0.5, 3, 0)
        row, held = layout.flatten(params_of(model)), torch.zeros(layout.d, dtype=torch.bool)
        window.write(held, torch.ones(window.sub.d, dtype=torch.bool))
        sub = window.sub.views(window.read(row, row.new_zeros(window.sub.d)))
        expected = model.apply(layout.views(torch.where(held, row, 0.0)), images())
        assert torch.allclose(model.apply(sub, images()), expected, atol=1e-5)
        assert 0.3 < window.sub.num_parameters / layout.num_parameters < 0.8

    def test_a_width_has_the_shapes_of_the_sub_model(self) -> None:
        whole, narrow = (VisionTransformer(SHAPE, NUM_LABELS, **SIZES, width=width) for width in (1.0, 0.5))
        layout = Layout.of(whole.shapes, whole.axes)
        assert dict(zip(layout.cut(0.5).names, layout.cut(0.5).shapes, strict=True)) == narrow.shapes

    def test_weights_are_those_of_a_file(self, tmp_path: Path) -> None:
        model = VisionTransformer(SHAPE, NUM_LABELS, **SIZES)
        saved = params_of(model)
        save_file(saved, tmp_path / "vit.safetensors")
        begun = VisionTransformer(SHAPE, 7, **SIZES, weights=str(tmp_path / "vit.safetensors"))
        found = begun.init(np.random.default_rng(0))
        assert found["head.weight"].shape == (7, 12)
        for name, value in saved.items():
            assert name.startswith("head.") or torch.equal(found[name], value)


class TestFedIns:
    def test_against_a_loop(self) -> None:
        """Per sample: the frozen query, the nearest keys, and a backbone with their mean merged into every layer."""
        model = InstanceAdaptive(SHAPE, NUM_LABELS, **SIZES, **POOL)
        params, x = params_of(model), images()
        terms = dict[str, Tensor]()
        logits = model.apply(params, x, ForwardContext(terms=terms))
        keys, chosen = params["pool.keys.weight"], set[int]()
        for number, image in enumerate(x):
            query = slow_class_token(params, image)
            cosines = [(query @ key / (query.norm() * key.norm())).item() for key in keys]
            best = sorted(range(len(keys)), key=lambda i: -cosines[i])[: POOL["top"]]
            chosen |= {*best}
            scales, shifts = (
                sum(params[f"pool.{name}.weight"][i] for i in best) / len(best) for name in ("scales", "shifts")
            )
            token = slow_class_token(merged(params, model.layers, scales, shifts), image)
            expected = token @ params["head.weight"].T + params["head.bias"]
            assert torch.allclose(logits[number], expected, atol=1e-4)
            assert float(terms["keys"][number]) == pytest.approx(1 - sum(cosines[i] for i in best), abs=1e-5)
        assert len(chosen) > POOL["top"]  # samples have instances of their own

    @pytest.mark.parametrize("padded", [False, True])
    def test_the_loss(self, padded: bool) -> None:
        """Nine parts of cross entropy and one of the distance to the keys; padding counts for neither."""
        made = workload()
        positions = np.array([[0, 1, 2, 3, -1]]) if padded else np.array([[0, 1, 2, 3]])
        batch = made.batch(np.array([0]), positions)
        one = {key: value[0] for part in batch for key, value in part.items()} | {"scale": 1.0}
        params = made.layout.views(made.init(0))
        terms = dict[str, Tensor]()
        logits = made.model.apply(params, one["x"], ForwardContext(terms=terms))[:4]
        expected = 0.9 * nn.functional.cross_entropy(logits, one["y"][:4]) + 0.1 * terms["keys"][:4].mean()
        assert float(made.loss(params, one)) == pytest.approx(float(expected), rel=1e-5)

    def test_what_is_trained(self) -> None:
        """Keys learn from their own term alone, scales and shifts from the cross entropy; the backbone is constant."""
        made = workload()
        assert {name.partition(".")[0] for name in made.layout.names} == {"head", "pool"}
        batch = made.batch(np.array([0]), np.arange(8)[None])
        one = {key: value[0] for part in batch for key, value in part.items()} | {"scale": 1.0}
        leaves = {name: value.clone().requires_grad_() for name, value in made.layout.views(made.init(0)).items()}
        made.loss(leaves, one).backward()
        moved = {name: leaf.grad is not None and bool(leaf.grad.any()) for name, leaf in leaves.items()}
        assert moved == dict.fromkeys(leaves, True)
        (cross_entropy := made.loss_of_logits(made.logits(leaves, one, {}), one)).backward()
        assert cross_entropy.requires_grad
        with pytest.raises(ConfigError, match="adds terms to the loss, which an algorithm with a loss of its own"):
            made.logits(leaves, one)

    def test_little_travels(self) -> None:
        """With the paper's pool of 25, less than 15 % of the model from a stream of 384 on."""
        made = workload({"name": "fedins", "stream": 384, "num_heads": 6, "num_blocks": 6})
        whole = sum(value.numel() for value in made.params_of(made.init(0)).values())
        assert made.layout.num_parameters / whole < 0.15
        assert made.layout.num_parameters > 25 * 384

    def test_contract(self) -> None:
        check_workload(workload())
        check_workload(workload(VIT))


def federation(changes: dict[str, Any], out: Path) -> Any:
    """Run FedIns for two rounds."""
    return run(configure(RUN | {"train.lr": 0.2} | changes), out=out)


def test_the_backbone_keeps_its_bits_and_pools_travel(tmp_path: Path) -> None:
    """A pretrained backbone, frozen by definition; the same bits whatever the number of workers, in either mode."""
    first = run(configure(RUN | {"workload.model": VIT}), out=tmp_path / "vit")
    export(load(first.directory), tmp_path / "vit.safetensors")
    begun = {"workload.model": FEDINS | {"weights": str(tmp_path / "vit.safetensors")}}
    done = {
        name: federation(begun | modes(**mode), tmp_path / name)
        for name, mode in (("stacked", STACKED), ("singly", SINGLY))
    }
    workers = modes(**SINGLY) | {"engine.workers": 2, "engine.block_size": 1}
    assert_same(federation(begun | workers, tmp_path / "workers"), done["singly"])
    assert relative_error(done["stacked"].params, done["singly"].params) < 1e-4
    backbone = [name for name in first.params if name.startswith("backbone.")]
    assert len(backbone) == 2 * (2 + 2 * 8) + 2
    for name in backbone:
        assert torch.equal(done["singly"].params[name], first.params[name])
    trained = sum(value.numel() for name, value in done["singly"].params.items() if not name.startswith("backbone."))
    assert done["singly"].metrics[-1]["total_bytes_up"] == 2 * 5 * 4 * trained


def test_windows_roll_over_the_instances(tmp_path: Path) -> None:
    """Half a pool each; instances that nobody held keep their bits."""
    held = {"submodel": {"capacities": [0.5], "strategy": "static"}} | modes([0.5], **SINGLY)
    start = workload(num_clients=8).init(0)
    done = federation(held | {"rounds": 1}, tmp_path / "static")
    begun = workload(num_clients=8).params_of(start)
    for name in ("pool.keys.weight", "pool.scales.weight", "pool.shifts.weight"):
        assert torch.equal(done.params[name][3:], begun[name][3:])
        assert not torch.equal(done.params[name][:3], begun[name][:3])
    roll = {"algorithm": "fedrolex", "submodel": {"capacities": [0.5, 1.0]}}
    one = federation(roll | modes([0.5, 1.0], **SINGLY), tmp_path / "one")
    two = roll | modes([0.5, 1.0], **SINGLY) | {"engine.workers": 2, "engine.block_size": 1}
    assert_same(federation(two, tmp_path / "two"), one)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"workload.model": VIT | {"patch": 3}}, r"patch = 3 does not divide samples of the shape \(1, 8, 8\)"),
        ({"workload.model": VIT | {"num_heads": 5}}, r"stream 12 cannot be divided among num_heads 5"),
        ({"workload.model": FEDINS | {"top": 9}}, r"top 9 exceeds pool 6: average 6 instances at most"),
        ({"workload.model": FEDINS | {"weights": "nowhere"}}, r"weights: '.*nowhere' cannot be read"),
        ({"workload.model": FEDINS | {"cut": "heads"}}, r"unknown key 'workload\.model\.cut'"),
        (
            {"algorithm": {"name": "fjord", "distillation": True}, "submodel": {"capacities": [0.5]}},
            r"leaves out: choose fedavg",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        federation(changes | {"engine.modes": "auto"}, tmp_path / "a")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    other = VisionTransformer(SHAPE, NUM_LABELS, **SIZES | {"hidden": 8})
    save_file(other.init(np.random.default_rng(0)), tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match=r"needs 'backbone\.block0\.feed\.expand\.weight' of shape \(20, 12\), but"):
        VisionTransformer(SHAPE, NUM_LABELS, **SIZES, weights=str(tmp_path / "vit.safetensors"))
    save_file({"head.bias": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="has no such parameter"):
        InstanceAdaptive(SHAPE, NUM_LABELS, **SIZES, **POOL, weights=str(tmp_path / "other.safetensors"))
