"""Prediction of the next character: windows, batches, losses and metrics, each against a slow version."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gossamer
from federation import modes
from gossamer.config.loading import parse, with_value
from gossamer.config.resolve import fill_in
from gossamer.errors import ConfigError, DataError, RegistryError
from gossamer.registry import resolve
from gossamer.testing import check_workload
from gossamer.workloads.base import ForwardContext, Workload, add_sums
from gossamer.workloads.partitions import Partition
from gossamer.workloads.text import NextCharacter, _tiled, unigram_bits
from gossamer.workloads.texts import TextData

SYNTHETIC = {"name": "synthetic", "num_owners": 5, "num_characters": 60, "num_test_characters": 21, "num_symbols": 6}
MODEL = {"name": "transformer", "stream": 8, "num_blocks": 1, "num_heads": 2, "hidden": 12}
needs_data = pytest.mark.skipif(
    not os.environ.get("GOSSAMER_DATA"), reason="GOSSAMER_DATA names no folder with shakespeare"
)


def build(num_clients: int = 5, partition: Any = "natural-id", **options: Any) -> NextCharacter:
    chosen = {"dataset": SYNTHETIC, "model": MODEL, "context": 8} | options
    return NextCharacter(chosen, num_clients=num_clients, partition=partition, seed=0)


def three_voices(options: Any) -> Any:
    """A user's data set, in which nobody uses all characters; or a wrong answer."""
    train = ("abababab", "bccbb", "ddaaddaadda")
    return TextData("voices", "abcde", ("A", "B", "C"), train, ("abab", "ccb", "dea")) if options.get("right") else None


def halves(labels: Any, num_clients: int, num_labels: int, seed: int, owner: Any, *, of: type = Partition) -> Any:
    """A user's partition that knows who wrote a window; or a wrong answer."""
    assert np.array_equal(labels, owner)
    return Partition.of_clients(owner % num_clients, num_clients) if of is Partition else None


VOICES = {"name": f"{__name__}:three_voices", "right": True}


def params_of(workload: NextCharacter, seed: int = 0) -> dict[str, Tensor]:
    """Return random parameters, several times as large as initial ones, so that predictions differ."""
    return {name: 4 * value for name, value in workload.layout.views(workload.init(seed)).items()}


def measured(workload: NextCharacter, params: dict[str, Tensor]) -> dict[str, float]:
    chunks = range(workload.num_evaluation_chunks)
    return workload.metrics(add_sums([workload.evaluate(params, {}, chunk) for chunk in chunks]))


def one_client(workload: NextCharacter, client: int, positions: list[int]) -> dict[str, Any]:
    batch = workload.batch(np.array([client]), np.array([positions]))
    return {name: value[0] for name, value in (batch.samples | batch.client).items()}


# ---- windows


@given(st.lists(st.text("abc", min_size=2, max_size=30), min_size=1, max_size=4), st.integers(1, 12))
def test_windows_predict_every_character_but_the_first_once(texts: list[str], context: int) -> None:
    windows, owner = _tiled([np.array([ord(c) for c in text], dtype=np.int64) for text in texts], context)
    predicted: list[list[tuple[str, str]]] = [[] for _ in texts]
    for window, text in zip(windows.tolist(), owner.tolist(), strict=True):
        codes = [code for code in window if code >= 0]
        assert window == codes + [-1] * (context + 1 - len(codes))
        letters = "".join(map(chr, codes))
        predicted[text] += [(letters[:i], letters[i]) for i in range(1, len(letters))]
    for text, found in zip(texts, predicted, strict=True):
        assert found == [(text[(i - 1) // context * context : i], text[i]) for i in range(1, len(text))]


def test_it_is_a_workload() -> None:
    workload: Workload = build()
    assert workload.num_samples.tolist() == [8, 10, 12, 8, 10]  # 59, 74, 89 predictions in windows of 8
    assert (workload.num_clients, workload.num_labels, workload.num_statistics_chunks) == (5, 6, 0)
    assert workload.layout.shapes[0] == (6, 8)
    assert torch.equal(workload.init(3), workload.init(3))
    assert not torch.equal(workload.init(3), workload.init(4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_mask": "zero"},
        {"label_mask": "minus-inf"},
        {"model": MODEL | {"cut": "head-dim", "cut_stream": True, "tied": True}, "evaluation_chunk": 4},
        {"context": 1},
        {"context": 500},
    ],
    ids=str,
)
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    check_workload(build(**options))


@pytest.mark.parametrize("partition", ["iid", {"name": "dirichlet", "alpha": 0.5}, {"name": "n-classes", "n": 2}])
def test_other_partitions_divide_the_windows(partition: Any) -> None:
    """They see a window's owner as its label."""
    workload = build(4, partition)
    check_workload(workload)
    assert workload.num_samples.sum() == 48
    if not isinstance(partition, str) and partition["name"] == "n-classes":
        owner = _tiled([workload.data.encode(text) for text in workload.data.train], 8)[1]
        assert all(len(set(owner[workload.partition.of_client(client)])) == 2 for client in range(4))


# ---- batches


def test_a_batch_holds_the_clients_own_text() -> None:
    workload = build()
    clients, positions = np.array([3, 0]), np.array([[0, 5, 7], [1, 1, 6]])
    batch = workload.batch(clients, positions)
    assert set(batch.samples) == {"x", "y"}
    for i, client in enumerate(clients.tolist()):
        text = workload.data.encode(workload.data.train[client])
        for j, position in enumerate(positions[i].tolist()):
            following = text[position * 8 + 1 : position * 8 + 9]
            x, y = batch.samples["x"][i, j].tolist(), batch.samples["y"][i, j].tolist()
            assert y == [*following, *[-1] * (8 - len(following))]
            assert x[: len(following)] == text[position * 8 : position * 8 + len(following)].tolist()
    assert batch.samples["y"][0, 2, 3] == -1  # 59 predictions: the last window has three


def test_padded_windows_are_masked() -> None:
    batch = build().batch(np.array([1, 2]), np.array([[0, 1, -1], [4, -1, -1]]))
    assert batch.samples["mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    absent = batch.samples["mask"] == 0
    assert not batch.samples["x"][absent].any()
    assert bool((batch.samples["y"][absent] == -1).all())


def test_positions_of_other_clients_are_out_of_reach() -> None:
    workload = build()
    workload.batch(np.array([0]), np.array([[7]]))
    with pytest.raises(IndexError, match=r"\[8\] of clients \[0\]"):
        workload.batch(np.array([0]), np.array([[8]]))


@pytest.mark.parametrize("partition", ["natural-id", "iid"])
def test_a_clients_labels_are_the_characters_of_its_windows(partition: str) -> None:
    workload = build(3, partition, dataset=VOICES, context=3)
    for client in range(3):
        batch = workload.batch(np.array([client]), np.arange(workload.num_samples[client])[None])
        seen = {int(code) for code in batch.samples["y"].flatten() if code >= 0}
        seen |= {
            int(x) for x, y in zip(batch.samples["x"].flatten(), batch.samples["y"].flatten(), strict=True) if y >= 0
        }
        labels = workload.client_labels(np.array([client]))[0]
        assert set(labels.nonzero().flatten().tolist()) == seen
        assert torch.equal(batch.client["labels"][0], labels)
    if partition == "natural-id":
        assert workload.client_labels(np.arange(3)).int().tolist() == [
            [1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [1, 0, 0, 1, 0],
        ]


# ---- loss


def slow_loss(logits: Tensor, targets: Tensor, held: Tensor, kind: str) -> float:
    """Mean cross entropy, place by place and character by character."""
    losses = []
    for row, target in zip(logits.double().flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if target < 0:
            continue
        kept = {c: value if held[c] or kind == "none" else 0.0 for c, value in enumerate(row)}
        kept = {c: value for c, value in kept.items() if held[c] or kind != "minus-inf"}
        losses.append(math.log(sum(map(math.exp, kept.values()))) - kept[target])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["none", "zero", "minus-inf"])
def test_label_masks_equal_slow_versions(kind: str) -> None:
    workload = build(3, label_mask=kind, dataset=VOICES, context=3)
    params = params_of(workload)
    found = []
    for client in range(3):
        last = int(workload.num_samples[client]) - 1  # a window of one character
        batch = one_client(workload, client, [0, last])
        expected = slow_loss(workload.model.apply(params, batch["x"]), batch["y"], batch["labels"], kind)
        found.append(workload.loss(params, batch).item())
        assert found[-1] == pytest.approx(expected, rel=1e-5)
        padded = one_client(workload, client, [0, -1, last, -1])
        assert workload.loss(params, padded).item() == pytest.approx(expected, rel=1e-5)
        assert workload.loss(params, padded | {"y": padded["y"].abs()}).item() != pytest.approx(expected, rel=1e-3)
    assert workload.loss(params, one_client(workload, 0, [-1])).item() == 0.0
    assert len(set(found)) == 3


def test_the_mask_alone_leaves_windows_out() -> None:
    """As where an engine makes it."""
    workload = build()
    params = params_of(workload)
    both, first = one_client(workload, 0, [0, 1]), one_client(workload, 0, [0])
    masked = workload.loss(params, both | {"mask": torch.tensor([1.0, 0.0])})
    assert masked.item() == pytest.approx(workload.loss(params, first).item(), rel=1e-5)
    assert masked.item() != pytest.approx(workload.loss(params, both).item(), rel=1e-3)


def test_scale_reaches_the_model() -> None:
    workload = build()
    params, batch = params_of(workload), one_client(workload, 0, [0, 1, 2])
    expected = slow_loss(
        workload.model.apply(params, batch["x"], ForwardContext(scale=3.0)), batch["y"], batch["labels"], "none"
    )
    assert workload.loss(params, batch | {"scale": 3.0}).item() == pytest.approx(expected, rel=1e-5)
    assert workload.loss(params, batch).item() != pytest.approx(expected, rel=1e-3)


# ---- metrics


def slow_metrics(workload: NextCharacter, params: dict[str, Tensor]) -> dict[str, float]:
    """Predict one character at a time, from what stands before it in its window."""
    context, losses, hits = workload.options.context, [], []
    for text in workload.data.test:
        codes = workload.data.encode(text)
        mine = []
        for i in range(1, len(codes)):
            start = (i - 1) // context * context
            logits = workload.model.apply(params, torch.from_numpy(codes[start:i])[None])[0, -1].double()
            mine.append(float(logits.logsumexp(0) - logits[codes[i]]))
            hits.append(int(logits.argmax()) == codes[i])
        losses.append(mine)
    nats = [loss for mine in losses for loss in mine]
    local = [sum(mine) / len(mine) / math.log(2) for mine in losses]
    return {
        "accuracy": sum(hits) / len(hits),
        "loss": sum(nats) / len(nats),
        "bits_per_character": sum(nats) / len(nats) / math.log(2),
        "local_bits_per_character": sum(local) / len(local),
        "worst_client_bits_per_character": max(local),
        "unigram_bits": slow_unigram_bits(workload.data),
    }


def slow_unigram_bits(data: TextData) -> float:
    """Guess every predicted character by how often it was predicted in training, plus one."""
    counts = dict.fromkeys(data.vocabulary, 1)
    for text in data.train:
        for character in text[1:]:
            counts[character] += 1
    bits = [-math.log2(counts[character] / sum(counts.values())) for text in data.test for character in text[1:]]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_metrics_equal_slow_versions(chunk: int) -> None:
    workload = build(evaluation_chunk=chunk)
    assert workload.num_evaluation_chunks == -(-5 * 3 // chunk)  # 20 predictions an owner, in three windows
    params = params_of(workload)
    assert measured(workload, params) == pytest.approx(slow_metrics(workload, params), rel=1e-5)


def test_texts_of_unequal_length_weigh_by_characters_in_all_but_the_local_means() -> None:
    workload = build(3, dataset=VOICES, context=2)
    params = params_of(workload)
    found = measured(workload, params)
    assert found == pytest.approx(slow_metrics(workload, params), rel=1e-5)
    assert found["local_bits_per_character"] != pytest.approx(found["bits_per_character"], rel=1e-3)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary() -> None:
    workload = build()
    found = measured(workload, {name: torch.zeros(shape) for name, shape in workload.model.shapes.items()})
    for name in ("bits_per_character", "local_bits_per_character", "worst_client_bits_per_character"):
        assert found[name] == pytest.approx(math.log2(6), rel=1e-6)


@given(st.lists(st.integers(-1, 3), min_size=1), st.lists(st.integers(-1, 3), min_size=1).filter(lambda x: max(x) >= 0))
def test_unigram_bits(train: list[int], test: list[int]) -> None:
    seen, tested = [code for code in train if code >= 0], [code for code in test if code >= 0]
    bits = [-math.log2((seen.count(code) + 1) / (len(seen) + 4)) for code in tested]
    assert unigram_bits(torch.tensor(train), torch.tensor(test), 4) == pytest.approx(sum(bits) / len(bits))


# ---- runs


def configuration(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "rounds": 5,
        "workload": {"name": "next-character", "dataset": SYNTHETIC, "model": MODEL, "context": 8},
        "clients": {"num": 5, "per_round": 4, "partition": "natural-id"},
        "train": {"lr": 1.0, "batch_size": 4, "epochs": 3, "clip_norm": 1.0},
        "engine": {"workers": 0},
        "evaluation": {"by_capacity": True},
    }
    for key, value in changes.items():
        data = with_value(data, key.split("__"), value)
    return data


@pytest.mark.parametrize("kind", [{"cut": "heads"}, {"cut": "head-dim", "cut_stream": True}], ids=str)
def test_sub_models_learn_and_beat_the_unigram(tmp_path: Path, kind: dict[str, Any]) -> None:
    changes = {
        "algorithm": "fedrolex",
        "submodel__capacities": [1.0, 0.5],
        "workload__model": MODEL | kind | {"stream": 16, "hidden": 32},
        "engine__modes": modes([1.0, 0.5])["engine.modes"],
    }
    run = gossamer.run(configuration(**changes), out=tmp_path / "run")
    assert [record["total_tokens"] for record in run.metrics] == [8 * record["total_samples"] for record in run.metrics]
    first, last = run.metrics[0], run.metrics[-1]
    assert last["bits_per_character"] < 0.8 * last["unigram_bits"]
    assert last["unigram_bits"] == first["unigram_bits"]
    assert set(last["loss_by_capacity"]) == {"1", "0.5"}


def test_rows_of_a_character_that_nobody_writes_keep_their_bits(tmp_path: Path) -> None:
    changes = {"rounds": 2, "algorithm": "fedrolex", "workload__dataset": VOICES, "clients__num": 3}
    changes |= {"clients__per_round": 3, "train__momentum": 0.5}
    run = gossamer.run(configuration(**changes, **{"engine__modes": modes()["engine.modes"]}), out=tmp_path / "run")
    workload = build(3, dataset=VOICES)
    before = workload.layout.views(workload.init(0))
    for name in ("embedding.weight", "output.weight", "output.bias"):
        same = (run.params[name] == before[name]).view(5, -1).all(dim=1)
        assert same.tolist() == [False, False, False, False, True]
    assert not torch.equal(run.params["block0.query.weight"], before["block0.query.weight"])


def test_the_algorithm_decides_about_masks_and_widths() -> None:
    config = parse(configuration(algorithm="all-smallest", submodel__capacities=[1.0, 0.5]))
    filled = fill_in(config, resolve("algorithm", "all-smallest"))
    assert filled.workload["model"] == MODEL | {"width": 0.5}
    assert filled.workload["label_mask"] == "zero"
    bare = parse(configuration(workload={"name": "next-character"}))
    filled = fill_in(bare, resolve("algorithm", "fedavg"))
    assert filled.workload == {"name": "next-character", "model": "transformer", "label_mask": "none"}


# ---- errors


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"workload\.contxt'; did you mean 'context'"):
        build(contxt=3)
    with pytest.raises(ConfigError, match=r"workload\.context = 0"):
        build(context=0)
    with pytest.raises(RegistryError, match=r"unknown text-model 'mlp' .*known: transformer"):
        build(model="mlp")
    with pytest.raises(
        DataError, match=r"three_voices' returned NoneType: return gossamer\.workloads\.texts\.TextData"
    ):
        build(dataset=VOICES | {"right": False})
    with pytest.raises(DataError, match="has 3 natural owners but 4 clients: set the clients to 3"):
        build(4, dataset=VOICES)
    with pytest.raises(ConfigError, match=r"workload\.model'? does not|workload\.model\.head"):
        build(3, dataset=VOICES, model={"name": "transformer", "head": 3})


def test_a_partition_of_ones_own() -> None:
    name = f"{__name__}:halves"
    workload = build(2, name, dataset=VOICES, context=20)
    assert workload.num_samples.tolist() == [2, 1]
    with pytest.raises(DataError, match=r"returned NoneType: return gossamer\.workloads\.partitions\.Partition"):
        build(2, {"name": name, "of": int}, dataset=VOICES)


@needs_data
def test_tiny_shakespeare() -> None:
    workload = build(99, dataset="shakespeare", model="transformer", context=64)
    lengths = [len(text) - 1 for text in workload.data.train]
    assert workload.num_samples.tolist() == [-(-length // 64) for length in lengths]
    assert workload.num_labels == 65
    params = {name: torch.zeros(shape) for name, shape in workload.model.shapes.items()}
    sums = workload.evaluate(params, {}, 0)
    assert sums["loss"].sum() / sums["count"].sum() / math.log(2) == pytest.approx(math.log2(65), rel=1e-6)
    assert workload.metrics(sums | {"count": np.maximum(sums["count"], 1)})["unigram_bits"] == pytest.approx(
        slow_unigram_bits(workload.data)
    )
    assert not bool(workload.client_labels(np.arange(99)).all())


def test_validation_texts_are_the_ends_of_the_training_texts() -> None:
    options = {"dataset": VOICES, "validation": 0.3, "model": MODEL}
    found = NextCharacter(options, num_clients=3, partition="natural-id", seed=0)
    assert found.data.train == ("ababa", "bcc", "ddaadda")
    assert found.data.test == ("bab", "bb", "adda")
    assert "validation_bits_per_character" in measured(found, params_of(found))
