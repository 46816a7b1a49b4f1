"""Encoders of the library transformers: tiny ones, randomly initialised and saved here, frozen or with factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.errors import ConfigError
from gossamer.testing import check_workload
from gossamer.workloads.multimodal.clips import BEGIN, END, PAD
from gossamer.workloads.multimodal.hugging_face import NO_PIECE, spelled, word_pieces
from gossamer.workloads.multimodal.workload import VideoLanguage
from video_language import SMALL, gradients, merged

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'gossamer[hf]'")

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mo", "##ves", "then", "left", "right", "up", "down"]
LORA = {"rank": 4, "alpha": 8.0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a ViT, and a BERT with its tokenizer; return their folders."""
    vision, text = tmp_path_factory.mktemp("vision"), tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(vision)
    config = transformers.BertConfig(vocab_size=len(PIECES), max_position_embeddings=32, **SIZES)
    transformers.BertModel(config).save_pretrained(text)
    (text / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    transformers.BertTokenizer(str(text / "vocab.txt")).save_pretrained(text)
    return {"vision_path": str(vision), "text_path": str(text)}


def made(model: dict[str, Any], **options: Any) -> VideoLanguage:
    """Return a small workload with a pretrained model."""
    given = SMALL | {"model": {"name": "pretrained", **model}} | options
    return VideoLanguage(given, num_clients=4, partition="iid", seed=0)


def test_words_are_spelled_in_pieces_side_by_side(folders: dict[str, str]) -> None:
    """As the library's own tokenizer has it, whose ends of a sentence are the data set's."""
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "moves", "left", "a", "nowhere")
    pieces = word_pieces(folders["text_path"], words, "here")
    assert pieces[5].tolist() == [PIECES.index("mo"), PIECES.index("##ves")]
    assert pieces[PAD].tolist() == [NO_PIECE, NO_PIECE]
    text = torch.tensor([[BEGIN, 7, 5, 6, END, PAD], [BEGIN, 8, END, PAD, PAD, PAD]])
    tokens, there = spelled(text, pieces)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["text_path"])
    for row, sentence in enumerate(("a moves left", "nowhere")):
        assert tokens[row][there[row]].tolist() == tokenizer(sentence)["input_ids"]
        assert there[row].tolist() == sorted(there[row].tolist(), reverse=True)


@pytest.mark.parametrize("lora", [None, LORA], ids=["frozen", "lora"])
def test_it_keeps_the_contract(folders: dict[str, str], lora: Any) -> None:
    check_workload(made({**folders, "lora": lora}))


def test_features_are_the_librarys(folders: dict[str, str]) -> None:
    """Factors begin at a product of 0, so that nothing is changed at first."""
    workload = made({**folders, "lora": LORA})
    params, batch = workload.layout.views(workload.init(0)), merged(workload)
    model = workload.model
    bert = transformers.AutoModel.from_pretrained(folders["text_path"]).eval()
    tokens, there = spelled(batch["caption"], model.pieces)
    states = bert(input_ids=tokens, attention_mask=there.long()).last_hidden_state
    expected = torch.stack([one[has].mean(0) for one, has in zip(states, there, strict=True)])
    torch.testing.assert_close(model.read(params, batch["caption"]), expected, rtol=1e-4, atol=1e-5)
    vit = transformers.AutoModel.from_pretrained(folders["vision_path"]).eval()
    frames = [vit(pixel_values=one.expand(-1, 3, -1, -1)).last_hidden_state.mean((0, 1)) for one in batch["video"]]
    torch.testing.assert_close(model.seen(params, batch["video"]), torch.stack(frames), rtol=1e-4, atol=1e-5)


def test_what_is_frozen_is_no_parameter(folders: dict[str, str]) -> None:
    frozen, adapted = made(folders), made({**folders, "lora": LORA})
    assert set(frozen.layout.modules) == {"contrast", "recognition"}
    extra = [name for name in adapted.layout.names if name not in frozen.layout.names]
    assert extra
    assert all(name.endswith((".lora_A", ".lora_B")) for name in extra)
    assert adapted.layout.cut(0.5).num_parameters < adapted.layout.num_parameters
    params = {name: value + 0.01 for name, value in adapted.layout.views(adapted.init(0)).items()}
    found = gradients(adapted, params, merged(adapted))
    assert all(found[name] is not None and float(found[name].abs().max()) > 0 for name in extra)


@pytest.mark.parametrize("sides", [("vision_path", "text_path"), ("vision_path",), ("text_path",)])
def test_a_federation_leaves_the_base_as_it_is(folders: dict[str, str], sides: tuple[str, ...], tmp_path: Path) -> None:
    """Clients of two ranks, some without texts; workers change no bits."""
    before = {side: (Path(folders[side]) / "model.safetensors").read_bytes() for side in sides}
    config = {
        "rounds": 2,
        "workload": {
            "name": "video-language",
            **SMALL,
            "model": {"name": "pretrained", "lora": LORA, **{side: folders[side] for side in sides}},
            "modalities": {"video+text": 0.5, "video": 0.5},
        },
        "clients": {"num": 4, "per_round": 4},
        "train": {"lr": 0.01, "batch_size": 8, "steps": 2, "optimizer": "adam"},
        "algorithm": "heterofl",
        "submodel": {"capacities": [0.5, 1.0], "scaler": False},
    }
    runs = [
        gossamer.run(config | {"engine": {"name": "local", "workers": workers}}, out=tmp_path / str(workers))
        for workers in (0, 1)
    ]
    assert all(torch.equal(value, runs[1].params[name]) for name, value in runs[0].params.items())
    assert any(name.endswith(".lora_B") and bool(value.any()) for name, value in runs[0].params.items())
    assert before == {side: (Path(folders[side]) / "model.safetensors").read_bytes() for side in sides}


def test_the_base_is_untouched_bit_for_bit(folders: dict[str, str]) -> None:
    workload = made({**folders, "lora": LORA})
    before = {name: value.clone() for name, value in workload.model.text.constants.items()}
    params = {name: value + 0.1 for name, value in workload.layout.views(workload.init(0)).items()}
    gradients(workload, params, merged(workload))
    assert all(torch.equal(value, before[name]) for name, value in workload.model.text.constants.items())
    assert not any(value.requires_grad for value in workload.model.text.constants.values())


def test_a_run_does_not_go_on_with_other_weights(folders: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    digests = {made({"vision_path": one}).digest() for one in (folders["vision_path"], str(tmp_path))}
    assert len(digests) == 2


def test_low_rank_factors_are_asked_for_once(folders: dict[str, str]) -> None:
    given = SMALL | {"model": {"name": "pretrained", "lora": LORA, **folders}, "lora": {"targets": ["text.*"]}}
    with pytest.raises(ConfigError, match=r"workload\.lora and workload\.model\.lora both .* 'pretrained': leave one"):
        VideoLanguage(given, num_clients=4, partition="iid", seed=0)


def test_a_frozen_part_is_constant_beside_what_is_pretrained(folders: dict[str, str]) -> None:
    given = SMALL | {"model": {"name": "pretrained", "vision_path": folders["vision_path"]}, "frozen": ["text.*"]}
    workload = VideoLanguage(given, num_clients=4, partition="iid", seed=0)
    constants = workload.blueprint().constants
    assert {"text.embedding.weight", "vision.embeddings.cls_token"} <= {*constants}
    assert {*workload.params_of(workload.init(0))} == {*constants, *workload.layout.names}


def test_in_double_precision(folders: dict[str, str]) -> None:
    given = SMALL | {"model": {"name": "pretrained", "lora": LORA, **folders}}
    workload = VideoLanguage(given, num_clients=4, partition="iid", seed=0, dtype=torch.float64)
    loss = workload.loss(workload.layout.views(workload.init(0)), merged(workload))
    assert loss.dtype == torch.float64


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, "nothing of it is pretrained: give vision_path or text_path"),
        ({"text_path": "nowhere"}, "text_path = 'nowhere' is no folder with a config.json"),
        ({"vision_path": "EMPTY"}, "vision_path = .* holds no model that could be loaded"),
        ({"text_path": "TEXT", "lora": {"targets": ["*qurey"]}}, r"lora.targets = \['\*qurey'\] name no linear layer"),
    ],
)
def test_wrong_options(folders: dict[str, str], model: dict[str, Any], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    places = {"EMPTY": str(tmp_path), "TEXT": folders["text_path"]}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in model.items()}
    with pytest.raises(ConfigError, match=expected):
        made(given)


def test_the_library_is_missing(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs the library transformers: pip install 'gossamer\[hf\]'"):
        made(folders)
