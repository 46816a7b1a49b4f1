"""HetLoRA and FlexLoRA: against loops written from the papers, and in federations of unequal ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from federation import SINGLY, STACKED, Injected, assert_same, configure, failing, modes, relative_error
from gossamer import resume, run
from gossamer.aggregate import Part, combine
from gossamer.algorithms.lora import FlexLoRA, HetLoRA, divided, product_norms
from gossamer.errors import ConfigError
from gossamer.submodel import Cutter, Layout
from gossamer.submodel.strategies import static

RANK, LEVELS = 4, (0.25, 0.5, 1.0)
SHAPES = {"head": (3,), "p.lora_A": (RANK, 6), "p.lora_B": (5, RANK), "q.lora_A": (RANK, 30), "q.lora_B": (40, RANK)}
AXES = {
    name: tuple("lora-rank" if size == RANK and "lora" in name else None for size in shape)
    for name, shape in SHAPES.items()
}
LAYOUT = Layout.of(SHAPES, AXES)
CUTTER = Cutter(LAYOUT, static, 1, 0)
LORA = {"rank": RANK, "targets": ["embed", "attend.in_proj_weight", "hidden"], "train": ["head.*"]}
TOKENS = {"workload.model": "user_modules:Tokens", "workload.lora": LORA, "submodel": {"capacities": list(LEVELS)}}


def trained(levels: tuple[float, ...]) -> tuple[list[Part], list[dict[str, np.ndarray]], list[float]]:
    """Return what clients of these capacities send, two of each: as parts, and padded by hand."""
    parts, padded, weights = [], [], []
    generator = torch.Generator().manual_seed(3)
    for level in levels:
        cut, rows = CUTTER.cut(level, 0, 0), []
        for _ in range(2):
            row = cut.sub.flatten(cut.sub.views(torch.randn(cut.sub.d, generator=generator)))
            rows.append(row)
            weights.append(float(len(weights) + 1))
            whole = {name: np.zeros(shape) for name, shape in SHAPES.items()}
            for name, value in cut.sub.views(row).items():
                whole[name][tuple(slice(size) for size in value.shape)] = value.double().numpy()
            padded.append(whole)
        parts.append(Part(cut, {}, sum(weights[-2:]), None, {"x": rows}, weights[-2:]))
    return parts, padded, weights


def updated(algorithm: Any, parts: list[Part], start: Tensor) -> dict[str, Tensor]:
    inbox = combine(LAYOUT, algorithm.traits.uplink, parts)
    held = inbox["held"]
    views = inbox | {"held": None if held is None else held[None]}
    return LAYOUT.views(algorithm.of_model(LAYOUT).update({"x": start[None].clone()}, views, 10)["x"][0])


def start() -> Tensor:
    return LAYOUT.flatten(LAYOUT.views(torch.randn(LAYOUT.d, generator=torch.Generator().manual_seed(5))))


class TestHetLoRA:
    @pytest.mark.parametrize("levels", [LEVELS, (0.25, 0.5)], ids=["all ranks", "not the largest"])
    @pytest.mark.parametrize("weights", ["norm", "samples"])
    def test_against_a_loop(self, weights: str, levels: tuple[float, ...]) -> None:
        parts, padded, samples = trained(levels)
        found = updated(HetLoRA({"weights": weights}), parts, start())
        largest = max(int(level * RANK) for level in levels)
        for layer in ("p", "q"):
            norms = [np.linalg.norm(one[f"{layer}.lora_B"] @ one[f"{layer}.lora_A"]) for one in padded]
            shares = np.array(norms if weights == "norm" else samples)
            shares = shares / shares.sum()
            for name in (f"{layer}.lora_A", f"{layer}.lora_B"):
                expected = sum(share * one[name] for share, one in zip(shares, padded, strict=True))
                rest = LAYOUT.views(start())[name].double().numpy()
                if name.endswith("A"):
                    expected[largest:] = rest[largest:]
                else:
                    expected[:, largest:] = rest[:, largest:]
                np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        head = sum(share * one["head"] for share, one in zip(np.array(samples) / sum(samples), padded, strict=True))
        np.testing.assert_allclose(found["head"].numpy(), head, rtol=1e-5, atol=1e-6)

    def test_products_of_zero_fall_back_on_samples(self) -> None:
        parts, _, _ = trained(LEVELS)
        for part in parts:
            for row in part.rows["x"]:
                part.cut.sub.views(row)["p.lora_B"].zero_()
        by_norm, by_samples = (updated(HetLoRA({"weights": name}), parts, start()) for name in ("norm", "samples"))
        assert torch.equal(by_norm["p.lora_A"], by_samples["p.lora_A"])
        assert not torch.allclose(by_norm["q.lora_A"], by_samples["q.lora_A"])

    def test_norms(self) -> None:
        a, b = torch.randn(3, 2, 7), torch.randn(3, 5, 2)
        assert torch.allclose(product_norms(a, b), torch.linalg.matrix_norm(b @ a))


class TestFlexLoRA:
    @pytest.mark.parametrize("levels", [LEVELS, (0.25, 0.5), (0.25,)])
    def test_against_a_loop(self, levels: tuple[float, ...]) -> None:
        """Each client's factors are the best of its rank for the weighted mean of the products."""
        parts, padded, samples = trained(levels)
        found = updated(FlexLoRA({}), parts, start())
        weights = np.array(samples) / sum(samples)
        for layer in ("p", "q"):
            product = sum(
                weight * one[f"{layer}.lora_B"] @ one[f"{layer}.lora_A"]
                for weight, one in zip(weights, padded, strict=True)
            )
            u, s, v = np.linalg.svd(product, full_matrices=False)
            a, b = found[f"{layer}.lora_A"].double().numpy(), found[f"{layer}.lora_B"].double().numpy()
            for rank in range(1, RANK + 1):
                best = (u[:, :rank] * s[:rank]) @ v[:rank]
                np.testing.assert_allclose(b[:, :rank] @ a[:rank], best, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(b, axis=0)[: (s > 1e-5).sum()], s[s > 1e-5][:RANK], rtol=1e-5)
        head = sum(weight * one["head"] for weight, one in zip(weights, padded, strict=True))
        np.testing.assert_allclose(found["head"].numpy(), head, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("sizes", [(5, 6), (40, 30)], ids=["whole", "by QR"])
    def test_rows_beyond_the_rank_stay(self, sizes: tuple[int, int]) -> None:
        left, right = torch.randn(sizes[0], 2), torch.randn(2, sizes[1])
        old = torch.randn(4, sizes[1])
        left, right = torch.cat([left, left], 1), torch.cat([right, right])
        a, b = divided(left, right, old)
        assert torch.allclose(b @ a, left @ right, atol=1e-5)
        assert torch.equal(a[2:], old[2:])
        assert not b[:, 2:].any()
        assert (a[:2].gather(1, a[:2].abs().argmax(1, keepdim=True)) > 0).all()
        zero = divided(left * 0, right, old)
        assert torch.equal(zero[0], old)
        assert not zero[1].any()

    def test_needs_factors(self) -> None:
        layout = Layout.of({"w": (3,)}, {"w": (None,)})
        for algorithm in (HetLoRA({}), FlexLoRA({})):
            with pytest.raises(ConfigError, match=r"the model has none: give workload\.lora"):
                algorithm.of_model(layout)


@pytest.mark.parametrize("algorithm", ["hetlora", "flexlora"])
def test_federations(algorithm: str, tmp_path: Path) -> None:
    """The same bits whatever the number of workers, in either mode, and after a kill; nearly so across modes."""
    kept = {"train.optimizer": {"name": "adamw", "state": "keep"}, "train.lr": 0.01} if algorithm == "hetlora" else {}
    done = {}
    for name, mode in (("stacked", STACKED), ("singly", SINGLY)):
        config = configure(TOKENS | {"rounds": 2, "algorithm": algorithm} | kept | modes(LEVELS, **mode))
        done[name] = run(config, out=tmp_path / name)
    engine = config["engine"] | {"workers": 2, "block_size": 1}
    assert_same(run(config | {"engine": engine}, out=tmp_path / "workers"), done["singly"])
    assert relative_error(done["stacked"].params, done["singly"].params) < 1e-5
    with pytest.raises(Injected):
        run(config, out=tmp_path / "killed", hooks=failing("exchange", True, 2))
    assert_same(resume(tmp_path / "killed", trust=True), done["singly"])


def test_windows_are_prefixes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is 'static' by definition"):
        run(configure(TOKENS | {"algorithm": "flexlora", "submodel.strategy": "random"}), out=tmp_path / "a")
    with pytest.raises(ConfigError, match="clients send their factors"):
        run(configure(TOKENS | {"algorithm": "flexlora", "communication": {"uplink": "int8"}}), out=tmp_path / "b")
